"""Answers by people, to measure a student's against."""

from __future__ import annotations

from collections.abc import Sequence

from tdistill.errors import DataFileError
from tdistill.prompts.read import Record
from tdistill.prompts.tokenise import Turns


def references_by_id(
    records: Sequence[Record], source: str, *, turns: Turns, scored: bool
) -> dict[str, tuple[str, ...]] | None:
    """References by the ids that a store has; None where no prompt has any.

    Args:
        records: see :func:`tdistill.prompts.read.read_records`.
        source: file and setting that they come from, for messages.
        turns: as :func:`tdistill.prompts.tokenise.tokenize_prompts` had.
        scored: the store has given answers, with which a closing user turn is left out.
    Raises:
        DataFileError: some prompts have one and others have not; names one of the latter.
    """
    found: dict[str, tuple[str, ...]] = {}
    for record in records:
        given = [message["content"] for message in record.messages if message["role"] == "assistant"]
        open_turn = record.messages[-1]["role"] == "user"
        if turns == "all" and given:
            found |= {f"{record.prompt_id}#turn-{turn}": (text,) for turn, text in enumerate(given)}
            if open_turn and not scored:
                found[f"{record.prompt_id}#turn-{len(given)}"] = record.references
        elif scored and given:
            found[record.prompt_id] = (given[-1],)
        else:
            found[record.prompt_id] = record.references
    without = [prompt_id for prompt_id, texts in found.items() if not texts]
    if without and len(without) < len(found):
        raise DataFileError(
            f"{source}: prompt '{without[0]}' has no reference answer, and "
            f"{len(found) - len(without)} others have one. Add one to each prompt under 'output', or to none."
        )
    return None if without else found
