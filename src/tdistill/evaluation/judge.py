"""Win rate of one model's answers against another's, by a language model behind an OpenAI-compatible address."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import sleep
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator
from tqdm import tqdm

from tdistill.errors import ConfigError, JudgeError

Verdict = Literal["first", "second", "tie"]

# What a request is, and what sends it → its reply.
Keep = Callable[[Mapping[str, Any], Callable[[], str]], str]

_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
# The form of a verdict that MT-bench asks for.
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# Statuses after which every request will fail: redirects (not followed), no or a wrong key, an unknown model or path.
_REFUSED = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
# Statuses after which the same request may succeed later: time-out, conflict, too many requests, and the server's own.
_LATER = frozenset({408, 409, 429, 500, 502, 503, 504})
# Of these, the ones with which a server may say how long to wait.
_BUSY = frozenset({429, 503})
_LONGEST_ASKED_WAIT_S = 60.0
_SHOWN_CHARACTERS = 200
# What the package itself fills in, or could not read the reply with, and what would be a secret in a recipe.
_OWN_KEYS = {
    "model": "it is evaluation.judge.model",
    "messages": "they are the comparison itself",
    "max_tokens": "it is evaluation.judge.max_tokens; only null stands here, which leaves it out",
    "stream": "replies are read as a whole",
}
_SECRET = re.compile(
    r"auth(orization)?(_.*)?|bearer|headers?|(.*_)?(apikey|key|token|secret|passw(or)?d|credentials?)", re.I
)

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
        retry_wait_s: seconds before the second attempt; the wait doubles with every further one. It is longer, up to
            60 s, where a busy server (statuses 429 and 503) asks for that with ``Retry-After`` in seconds.
        extra_body: fields of the requests beside or instead of ``max_tokens``, ``temperature: 0`` and ``seed: 0``; None
            as a value leaves a field out.
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
    extra_body: dict[str, JsonValue] | None = None

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

    @field_validator("extra_body")
    @classmethod
    def _fields_of_a_request(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        for name, reason in _OWN_KEYS.items():
            if value is not None and name in value and not (name == "max_tokens" and value[name] is None):
                raise ValueError(f"extra_body.{name} cannot be set: {reason}. Remove it")
        for name in _names(value):
            if _SECRET.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_")):
                raise ValueError(
                    f"extra_body.{name} looks like a key, which is kept in no recipe; name the environment variable "
                    "that holds it under api_key_env (the value given is not shown)"
                )
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("extra_body holds a number that is not finite, which no request can; correct it") from None
        return value

    def body(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        own = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        return {name: value for name, value in {**own, **(self.extra_body or {})}.items() if value is not None}

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


class _Reply(NamedTuple):
    """What came back: status, content, and the header ``Retry-After``."""

    status: int
    content: bytes
    retry_after: str | None


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
    keep: Keep = lambda _facts, ask: ask(),
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
        keep: returns the reply to a request from where it was kept, or what asking for it returns, and keeps that.
    Raises:
        ConfigError: the environment variable of the key is not set.
        JudgeError: the judge refuses the key, the model or the form of the requests: a later attempt would be useless.
    """
    key = settings.api_key()
    # What a reply depends on, beside the request.
    facts = settings.model_dump(include={"base_url", "model", "max_tokens", "extra_body"})
    orders = [
        (prompt, *pair) for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True) for pair in ((a, b), (b, a))
    ]
    with (
        ThreadPoolExecutor(settings.num_parallel) as pool,
        tqdm(total=len(orders), desc=progress, unit="request", disable=progress is None) as bar,
    ):
        replies = []
        requests = [_messages(*order) for order in orders]
        waiting = [
            pool.submit(keep, {**facts, "messages": of}, partial(_reply, settings, key, of, settings.max_tokens))
            for of in requests
        ]
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
        judge = f"The judge at {settings.base_url} (evaluation.judge.base_url)"
        if error.status is None:
            message = f"{judge} does not answer: {error}. Start the server, or correct the address."
        elif error.status in _LATER:
            message = f"{judge} is not ready, {error}. Wait until it is, or raise evaluation.judge.max_attempts."
        else:
            message = (
                f"{judge} rejects a request to model '{settings.model}', {error}. Change the field that it names with "
                "evaluation.judge.extra_body, such as {temperature: null}, which leaves it out, or {max_tokens: null, "
                "max_completion_tokens: 512}; or correct base_url or model."
            )
        raise JudgeError(message) from None


class _UnansweredError(Exception):
    """The last attempt at a request failed in a way that may pass, or concerns this request.

    Attributes:
        status: of the reply, or None where there was none.
    """

    def __init__(self, reason: str, status: int | None) -> None:
        super().__init__(reason)
        self.status = status


def _names(value: JsonValue) -> Iterator[str]:
    """Names of all fields, at every depth."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _names(inner)


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
    """Text of a completion; empty where it has none.

    Raises:
        _UnansweredError: no attempt succeeded, or the server cannot take this one request.
        JudgeError: the server refuses the key, the model or the address.
    """
    body = settings.body(messages, max_tokens)
    reason, status, asked_wait_s = "", None, 0.0
    for attempt in range(settings.max_attempts):
        if attempt:
            sleep(max(settings.retry_wait_s * 2 ** (attempt - 1), asked_wait_s))
        status, asked_wait_s = None, 0.0
        try:
            status, content, retry_after = _post(settings, key, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # No connection, a time-out, a reply that is no HTTP, or a name that is no host's.
            cause = getattr(error, "reason", None) or error
            reason = _shown(str(cause) or type(cause).__name__, key)
            continue
        if status == http.HTTPStatus.OK:
            if (text := _content(content)) is not None:
                return text
            # Something between here and the judge has answered, which may pass.
            reason, status = f"no completion came back: {_shown(content.decode('utf-8', 'replace'), key)}", None
            continue
        reason = f"status {status}: {_shown(content.decode('utf-8', 'replace'), key)}"
        if status in _REFUSED:
            raise JudgeError(
                f"The judge at {settings.base_url} refuses a request to model '{settings.model}', {reason}. Correct "
                "base_url, model or api_key_env under evaluation.judge."
            )
        if status not in _LATER:
            break
        if status in _BUSY:
            asked_wait_s = _seconds(retry_after)
    raise _UnansweredError(reason, status)


def _seconds(retry_after: str | None) -> float:
    """How long a server asks to wait, at most a minute; 0 where it says nothing, or a date."""
    given = (retry_after or "").strip()
    return min(float(given), _LONGEST_ASKED_WAIT_S) if given.isascii() and given.isdecimal() else 0.0


def _post(settings: JudgeSettings, key: str | None, body: dict[str, Any]) -> _Reply:
    """Send one request."""
    request = urllib.request.Request(
        f"{settings.base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"}),
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=settings.timeout_s) as response:
            return _Reply(response.status, response.read(), response.headers["Retry-After"])
    except urllib.error.HTTPError as error:
        with error:
            return _Reply(error.code, error.read(), error.headers["Retry-After"])


def _content(raw: bytes) -> str | None:
    """Text of a completion, empty where it has none; None where this is no completion."""
    try:
        content = json.loads(raw)["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return content if isinstance(content, str) else ""


def _shown(text: str, key: str | None) -> str:
    """The start of a server's text on one line, without the key, which some servers repeat; terminal codes escaped."""
    line = " ".join(text.split())
    shown = (line if key is None else line.replace(key, "***"))[:_SHOWN_CHARACTERS]
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)
