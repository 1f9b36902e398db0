"""Prompts that two sets share."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tdistill.prompts.read import Record


def count_shared(records: Iterable[Record], others: Iterable[Record]) -> int:
    """How many records have the prompt of one of the others, whatever their ids and answers.

    The prompt is the conversation without a closing assistant turn.
    """
    known = set(map(_prompt, others))
    return sum(_prompt(record) in known for record in records)


def _prompt(record: Record) -> str:
    messages = record.messages[:-1] if record.messages[-1]["role"] == "assistant" else record.messages
    return json.dumps(messages, sort_keys=True)
