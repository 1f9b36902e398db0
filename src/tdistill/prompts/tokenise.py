"""From records to token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from tdistill.errors import (
    ConfigError,
    DataFileError,
    EmptyPromptSetError,
    PromptTooLongError,
    UnsupportedModelError,
    did_you_mean,
)
from tdistill.prompts.read import Record
from tdistill.prompts.templates import Template
from tdistill.types import PromptTokens

_log = logging.getLogger(__name__)

Turns = Literal["last", "all"]
TooLong = Literal["error", "skip"]
Messages = Sequence[Mapping[str, str]]


def tokenize_prompts(
    records: Sequence[Record],
    tokenizer: Any,
    template: Template,
    *,
    end_token_ids: Sequence[int],
    max_prompt_tokens: int,
    max_new_tokens: int,
    turns: Turns = "last",
    with_answers: bool = False,
    too_long: TooLong = "error",
) -> list[PromptTokens]:
    """Render and tokenise prompts, with their given answers if asked for.

    Without answers a conversation is cut before the assistant turn to be generated, which is the one after a closing
    user turn, if there is one. With answers ``prompt_ids`` and ``response_ids`` together are the tokenizer's own
    tokens of the conversation up to and including the answer, cut after the end token that follows it; a closing
    user turn is left out. A record without assistant turns is answered by its first reference.

    Args:
        records: see :func:`tdistill.prompts.read.read_records`.
        tokenizer: a transformers tokenizer.
        template: see :func:`tdistill.prompts.templates.choose_template`. ``chat`` writes every special token itself;
            for the other kinds the tokenizer's leading special tokens are kept and one end token follows an answer.
        end_token_ids: tokens that end an answer. For ``alpaca`` and ``none`` the tokenizer's own is written if it is
            among them, else the first.
        max_prompt_tokens: limit on a prompt, tokens.
        max_new_tokens: limit on an answer with its end token, tokens; a longer one is cut and ``truncated``.
        turns: ``last`` assistant turn of a conversation, or ``all``: then its k-th one, from 0, is named
            ``<id>#turn-k``.
        with_answers: fill ``response_ids``.
        too_long: ``error``, or ``skip`` to leave out prompts over the limit; their number is logged as a warning.
    Returns:
        Prompts in the order of the records.
    Raises:
        PromptTooLongError: a prompt is over the limit.
        EmptyPromptSetError: no records, or none left.
        DataFileError: a record has no answer, renders to no tokens, or does not fit the template; ids are not unique.
        UnsupportedModelError: the chat template cannot tell where an answer begins or ends.
        ConfigError: unknown ``turns`` or ``too_long``.
    """
    for name, value, known in (("turns", turns, get_args(Turns)), ("too_long", too_long, get_args(TooLong))):
        if value not in known:
            raise ConfigError(f"{name} = '{value}' is unknown.{did_you_mean(str(value), known)}")
    if not records:
        raise EmptyPromptSetError("There are no prompts to tokenise. Name a prompt set with at least one record.")
    prompts: list[PromptTokens] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for record in records:
        for prompt_id, context, answer in _choose_turns(record, turns, with_answers):
            if prompt_id in seen:
                raise DataFileError(f"Two prompts have the id '{prompt_id}'. Give every record its own id.")
            seen.add(prompt_id)
            who = f"Prompt '{prompt_id}'"
            text = template.render(context, tokenizer, add_generation_prompt=True, who=who)
            ids = _encode(text, tokenizer, template)
            if not ids:
                raise DataFileError(f"{who} renders to no tokens. Write a text, or choose another template.")
            if len(ids) > max_prompt_tokens:
                if too_long == "error":
                    raise PromptTooLongError(
                        f"{who} has {len(ids)} tokens, more than max_prompt_tokens = {max_prompt_tokens}. "
                        "Raise max_prompt_tokens, or set too_long = skip to leave such prompts out."
                    )
                skipped.append(prompt_id)
                continue
            response = None
            if answer is not None:
                whole = [*context, {"role": "assistant", "content": answer}]
                response = _response(text, ids, whole, tokenizer, template, end_token_ids, who)
            prompts.append(_pack(prompt_id, ids, response, max_new_tokens))
    if skipped:
        _log.warning(
            "Left out %d of %d prompts with more than max_prompt_tokens = %d tokens; the first is '%s'.",
            len(skipped),
            len(seen),
            max_prompt_tokens,
            skipped[0],
        )
    if not prompts:
        raise EmptyPromptSetError(
            f"All {len(skipped)} prompts have more than max_prompt_tokens = {max_prompt_tokens} tokens and were left "
            "out. Raise max_prompt_tokens."
        )
    return prompts


def _choose_turns(record: Record, turns: Turns, with_answers: bool) -> Iterator[tuple[str, Messages, str | None]]:
    """Id, conversation before the turn, and the turn's given text where it is wanted."""
    messages = list(record.messages)
    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    starts = list(answered)
    if with_answers and not answered:
        if not record.references:
            raise DataFileError(
                f"Prompt '{record.prompt_id}' has no answer. Give one under 'output', 'response' or 'answer', or let "
                "the teacher generate answers."
            )
        starts = [len(messages)]
        messages.append({"role": "assistant", "content": record.references[0]})
    elif not with_answers and messages[-1]["role"] == "user":
        starts.append(len(messages))
    for number, start in enumerate(starts):
        if turns == "last" and start != starts[-1]:
            continue
        suffix = f"#turn-{number}" if turns == "all" and answered else ""
        yield record.prompt_id + suffix, messages[:start], messages[start]["content"] if with_answers else None


def _encode(text: str, tokenizer: Any, template: Template) -> list[int]:
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if template.kind == "chat" or not plain:
        return plain
    # Some tokenizers also close a text with an end token; after a prompt it would say that the answer is over.
    marked = list(tokenizer(text, verbose=False)["input_ids"])
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[: start + len(plain)]
    raise UnsupportedModelError(
        f"The tokenizer changes the text's own tokens when it adds special ones ({marked[:8]} for {plain[:8]}). "
        "Use a tokenizer that only puts special tokens around a text."
    )


def _response(
    prompt_text: str,
    prompt_ids: list[int],
    whole: Messages,
    tokenizer: Any,
    template: Template,
    end_token_ids: Sequence[int],
    who: str,
) -> list[int]:
    """Tokens of the answer that closes the conversation ``whole``, up to and including its end token."""
    text = template.render(whole, tokenizer, add_generation_prompt=False, who=who)
    if not text.startswith(prompt_text):
        raise UnsupportedModelError(
            f"{who}: the chat template opens an answer as {prompt_text[-40:]!r} but writes a given one differently, so "
            "given answers cannot be told from prompts. Let the teacher generate answers, or use template = 'alpaca'."
        )
    ids = _encode(text, tokenizer, template)
    if template.kind != "chat":
        own = tokenizer.eos_token_id
        ids.append(own if own in end_token_ids else end_token_ids[0])
    if ids[: len(prompt_ids)] != prompt_ids:
        raise DataFileError(
            f"{who}: the prompt's end {prompt_text[-10:]!r} and the answer's beginning "
            f"{text[len(prompt_text) :][:10]!r} share a token, so the answer has no first token of its own. Begin the "
            "answer differently: without its leading white space or, where nothing separates the two, with some."
        )
    response = ids[len(prompt_ids) :]
    stop = next((index for index, token in enumerate(response) if token in end_token_ids), None)
    if stop is None:
        raise UnsupportedModelError(
            f"{who}: the chat template writes no end token after an answer (end tokens: {list(end_token_ids)}). "
            "Let the teacher generate answers, or use template = 'alpaca'."
        )
    after = [token for token in response[stop + 1 :] if token not in end_token_ids]
    if (left := tokenizer.decode(after, skip_special_tokens=True)).strip():
        raise DataFileError(
            f"{who}: the answer goes on with {left.strip()[:40]!r} after the end token "
            f"'{tokenizer.convert_ids_to_tokens(response[stop])}'. Remove end tokens from the answer's text."
        )
    return response[: stop + 1]


def _pack(prompt_id: str, prompt_ids: list[int], response: list[int] | None, max_new_tokens: int) -> PromptTokens:
    ids = np.array(prompt_ids, dtype=np.int32)
    if response is None:
        return PromptTokens(prompt_id, ids)
    ends: Literal["terminal", "truncated"] = "terminal" if len(response) <= max_new_tokens else "truncated"
    return PromptTokens(prompt_id, ids, np.array(response[:max_new_tokens], dtype=np.int32), ends)


def tokenize_texts(texts: Sequence[str], tokenizer: Any, max_tokens: int, source: str) -> list[np.ndarray]:
    """Tokenise plain texts, without special tokens.

    Args:
        texts: see :func:`tdistill.prompts.read.read_texts`.
        tokenizer: a transformers tokenizer.
        max_tokens: longer ones are cut, tokens.
        source: file and setting that they come from, for messages.
    Returns:
        Rows of int64 ids; texts of one token are left out.
    Raises:
        EmptyPromptSetError: nothing is left.
    """
    rows = [
        np.array(tokenizer(text, truncation=True, max_length=max_tokens, add_special_tokens=False)["input_ids"])
        for text in texts
    ]
    # A single token has nothing before it that could predict it.
    if not (rows := [row.astype(np.int64) for row in rows if len(row) > 1]):
        raise EmptyPromptSetError(f"{source} holds no text of two tokens or more.")
    return rows
