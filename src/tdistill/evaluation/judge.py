"""Win rate of one model's answers against another's, by a language model behind an OpenAI-compatible address."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from tqdm import tqdm

from tdistill.errors import ConfigError, JudgeError

Verdict = Literal["first", "second", "tie"]

_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
# The form of a verdict that MT-bench asks for.
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# Statuses after which every request will fail: redirects (not followed), no or a wrong key, an unknown model or path.
_REFUSED = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
# Statuses after which the same request may succeed later: time-out, conflict, too many requests, and the server's own.
_LATER = frozenset({408, 409, 429, 500, 502, 503, 504})
_SHOWN_CHARACTERS = 200

_INSTRUCTION = (
    "You compare two answers to the same request. Judge how helpful, correct and complete they are and how well they "
    "follow the request. Neither their order nor their length nor their tone may decide. Give your reasons in a few "
    "sentences, then end with exactly one of these: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if "
    "they are equally good."
)


class JudgeSettings(BaseModel):
    """Who judges, and whose answers are compared.

    Attributes:
        base_url: address of the server, with the path before ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: name of the judge on that server.
        api_key_env: name of the environment variable that holds the key, or None for a server that asks for none. The
            key itself stands in no recipe and in no other file.
        against: subject whose answers all others are compared with.
        max_prompts: only the first prompts, or None for all.
        max_tokens: length limit of a judgement, tokens.
        timeout_s: seconds that one request may take.
        max_attempts: how often a request is sent before it counts as unanswered.
        num_parallel: requests under way at the same time.
        retry_wait_s: seconds before the second attempt; the wait doubles with every further one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    base_url: str
    model: str = Field(min_length=1)
    api_key_env: str | None = None
    against: str = "teacher"
    max_prompts: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    max_attempts: int = Field(default=3, ge=1)
    num_parallel: int = Field(default=4, ge=1)
    retry_wait_s: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        # What stands in a recipe is copied into the run's folder, and no message may repeat a secret either.
        if "@" in value or "?" in value:
            raise ValueError(
                "base_url holds a user, a password or a query; write the plain address, and the name of the "
                "environment variable with the key under api_key_env"
            )
        try:
            parts = urlsplit(value)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address or not (value.isascii() and value.isprintable()) or " " in value:
            raise ValueError(f"base_url = '{value}' is no address; write it like http://localhost:8000/v1")
        return value.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str | None) -> str | None:
        if value is not None and not _VARIABLE.fullmatch(value):
            raise ValueError(
                "api_key_env is the name of an environment variable, in capitals, such as JUDGE_API_KEY, and never the "
                "key itself (the value given is not shown)"
            )
        return value

    def api_key(self) -> str | None:
        """The key, from the environment.

        Raises:
            ConfigError: the variable is not set or holds no key.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(
                f"The environment variable {self.api_key_env} (evaluation.judge.api_key_env) is not set. Set it to the "
                "judge's key, or leave api_key_env empty if the judge asks for none."
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(
                f"The environment variable {self.api_key_env} (evaluation.judge.api_key_env) holds a space or a "
                "character that no key has. Set it to the key alone (its value is not shown)."
            )
        return key


@dataclass(frozen=True)
class Judgements:
    """What the judge said about answers a against answers b, prompt by prompt.

    Attributes:
        score: 1 where a wins, 0 where b does, ½ for a tie; NaN where one of the two orders has no verdict.
        agrees: 1 where both orders have the same verdict, else 0; NaN as in ``score``.
        num_malformed: replies without exactly one verdict, of 2 · prompts.
        num_unanswered: requests that the server did not answer, of 2 · prompts.
    """

    score: np.ndarray
    agrees: np.ndarray
    num_malformed: int
    num_unanswered: int

    @property
    def judged(self) -> np.ndarray:
        """Where both orders have a verdict, bool [prompts]."""
        return ~np.isnan(self.score)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""


def read_verdict(reply: str | None) -> Verdict | None:
    """The verdict in a reply, or None where it has none, or several that contradict each other.

    >>> read_verdict("Both are right, but A says why. [[A]]"), read_verdict("[[A]] or [[B]]"), read_verdict("A")
    ('first', None, None)
    """
    found = set(_VERDICT.findall(reply or ""))
    return _VERDICTS[found.pop()] if len(found) == 1 else None


def combine(order_ab: Verdict | None, order_ba: Verdict | None) -> tuple[float, float]:
    """Score and self-agreement of one prompt from the verdicts in both orders.

    1 if a wins in both orders, 0 if b does, ½ otherwise.  Source: Zheng et al. 2023, arXiv 2306.05685, §3.4: a win
    counts only if both orders agree on it.
    Differs from the source: nothing.

    Args:
        order_ab: verdict when a stood first.
        order_ba: verdict when b stood first.
    Returns:
        Score of a, and 1.0 or 0.0 for whether the judge agrees with itself; NaN both, if a verdict is missing.
    """
    if order_ab is None or order_ba is None:
        return float("nan"), float("nan")
    swapped: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
    agrees = order_ab == swapped[order_ba]
    score = {"first": 1.0, "second": 0.0, "tie": 0.5}[order_ab] if agrees else 0.5
    return score, float(agrees)


def judge_answers(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    settings: JudgeSettings,
    *,
    progress: str | None = None,
) -> Judgements:
    """Ask the judge which of two answers to each prompt is better, in both orders.

    Pairwise comparison with swapped positions.  Source: Zheng et al. 2023, arXiv 2306.05685 (MT-bench), §3.1, §3.4.
    Differs from the source: own wording of the instruction, and no reference answer.

    A reply without exactly one verdict is counted and not interpreted. A request that fails is sent again after a
    wait; one that still fails is counted, and the others go on.

    Args:
        prompts: what was asked, one text each.
        answers_a: one answer to each.
        answers_b: the other.
        settings: :class:`JudgeSettings`.
        progress: label of a progress bar, or None.
    Raises:
        ConfigError: the environment variable of the key is not set.
        JudgeError: the judge refuses the key, the model or the form of the requests: a later attempt would be useless.
    """
    key = settings.api_key()
    orders = [
        (prompt, *pair) for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True) for pair in ((a, b), (b, a))
    ]
    with (
        ThreadPoolExecutor(settings.num_parallel) as pool,
        tqdm(total=len(orders), desc=progress, unit="request", disable=progress is None) as bar,
    ):
        replies = []
        waiting = [pool.submit(_reply, settings, key, _messages(*order), settings.max_tokens) for order in orders]
        try:
            for future in waiting:
                replies.append(_or_none(future.result))
                bar.update()
        except BaseException:  # also Ctrl-C: what is queued may cost money
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    verdicts = [None if reply is None else read_verdict(reply) for reply in replies]
    combined = [combine(*verdicts[index : index + 2]) for index in range(0, len(verdicts), 2)]
    num_unanswered = sum(reply is None for reply in replies)
    return Judgements(
        score=np.array([score for score, _ in combined]),
        agrees=np.array([agrees for _, agrees in combined]),
        num_malformed=sum(verdict is None for verdict in verdicts) - num_unanswered,
        num_unanswered=num_unanswered,
    )


def check_judge(settings: JudgeSettings) -> None:
    """Send one short request, so that a wrong address, key or name is found before long work.

    Raises:
        ConfigError: the environment variable of the key is not set.
        JudgeError: no answer, or a refusal; names the address, the reason and the remedy, and never the key.
    """
    try:
        _reply(settings, settings.api_key(), [{"role": "user", "content": "Say yes."}], max_tokens=1)
    except _UnansweredError as error:
        raise JudgeError(
            f"The judge at {settings.base_url} (evaluation.judge.base_url) does not answer: {error}. Start the server, "
            "or correct the address."
        ) from None


class _UnansweredError(Exception):
    """The last attempt at a request failed in a way that may pass."""


def _or_none(result: Any) -> str | None:
    try:
        return result()
    except _UnansweredError:
        return None


def _messages(prompt: str, first: str, second: str) -> list[dict[str, str]]:
    request = (
        f"[Request]\n{prompt}\n\n[Answer A begins]\n{first}\n[Answer A ends]\n\n"
        f"[Answer B begins]\n{second}\n[Answer B ends]"
    )
    return [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": request}]


def _reply(settings: JudgeSettings, key: str | None, messages: list[dict[str, str]], max_tokens: int) -> str:
    """Text of a reply; empty where the server answered with something else.

    Raises:
        _UnansweredError: no attempt succeeded, or the server cannot take this one request.
        JudgeError: the server refuses the key, the model or the address.
    """
    body = {"model": settings.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    reason = ""
    for attempt in range(settings.max_attempts):
        if attempt:
            time.sleep(settings.retry_wait_s * 2 ** (attempt - 1))
        try:
            status, content = _post(settings, key, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # No connection, a time-out, a reply that is no HTTP, or a name that is no host's.
            cause = getattr(error, "reason", None) or error
            reason = _shown(str(cause) or type(cause).__name__, key)
            continue
        if status == http.HTTPStatus.OK:
            return _content(content)
        reason = f"status {status}: {_shown(content.decode('utf-8', 'replace'), key)}"
        if status in _REFUSED:
            raise JudgeError(
                f"The judge at {settings.base_url} refuses a request to model '{settings.model}', {reason}. Correct "
                "base_url, model or api_key_env under evaluation.judge."
            )
        if status not in _LATER:
            break
    raise _UnansweredError(reason)


def _post(settings: JudgeSettings, key: str | None, body: dict[str, Any]) -> tuple[int, bytes]:
    """Status and content of one reply."""
    request = urllib.request.Request(
        f"{settings.base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"}),
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=settings.timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def _shown(text: str, key: str | None) -> str:
    """The start of a server's text on one line, without the key, which some servers repeat."""
    line = " ".join(text.split())
    return (line if key is None else line.replace(key, "***"))[:_SHOWN_CHARACTERS]
