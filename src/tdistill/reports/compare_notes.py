"""What makes a comparison of runs doubtful, in sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tdistill.reports.load import ScoredRun

# Settings of an evaluation that change what a sampled answer is.
_SAMPLING = ("max_new_tokens", "temperature", "top_p")
# Settings of a capture that change the stored action sets, and with them the answers that the teacher samples.
_SETS = ("p_max", "max_actions", "temperature")


def notes_on(runs: Sequence[ScoredRun], shared: Sequence[str]) -> list[str]:
    """What limits a comparison of these runs over the prompts that they share."""
    notes = []
    more = [f"{run.folder} {len(run.scores.prompt_ids):,}" for run in runs if len(run.scores.prompt_ids) > len(shared)]
    if more:
        notes.append(f"Only the {len(shared):,} prompts that all runs share are compared; of {', '.join(more)}.")
    if all(run.scores.num_tokens for run in runs):
        notes += _notes_on_stored(runs, shared)
    files = dict.fromkeys(str(_file(run)) for run in runs)
    if len(files) > 1:
        notes.append(
            f"Prompts are paired by their ids alone, of different files ({file_key(runs[0])}): {', '.join(files)}."
        )
    if len({run.results.summary.teacher.name for run in runs}) > 1:
        notes.append("The runs have different teachers: distances are each to its own.")
    settings = [(run.results.model_extra or {}).get("settings") or {} for run in runs]
    for key in _SAMPLING:
        values = dict.fromkeys(str(of.get(key)) for of in settings if key in of)
        if len(values) > 1:
            notes.append(f"Answers were sampled with different evaluation.{key}: {', '.join(values)}.")
    return notes


def _notes_on_stored(runs: Sequence[ScoredRun], shared: Sequence[str]) -> list[str]:
    """How far the stored answers and action sets of the runs are not the same."""
    notes = []
    lengths = [dict(zip(run.scores.prompt_ids, run.scores.num_tokens, strict=True)) for run in runs]
    other_lengths = any(length[prompt_id] != lengths[0][prompt_id] for length in lengths for prompt_id in shared)
    if other_lengths or len({_origin_of_answers(run) for run in runs}) > 1:
        notes.append(
            "The runs were measured on different stored answers to the same prompts, so differences per token include "
            "that of the answers."
        )
    for key in _SETS:
        values = dict.fromkeys(json.dumps(_capture(run).get(key)) for run in runs if key in _capture(run))
        if len(values) > 1:
            notes.append(
                f"The stored action sets were made with different capture.{key}: {', '.join(values)}. The mass outside "
                "the set is each outside other sets."
            )
    return notes


def file_key(run: ScoredRun) -> str:
    """What of a recipe names the file of the compared prompts."""
    return f"evaluation.prompt_sets.{run.split}" if run.split in _prompt_sets(run) else "data.held_out"


def _file(run: ScoredRun) -> str | None:
    return _prompt_sets(run).get(run.split, (run.recipe.get("data") or {}).get("held_out"))


def _prompt_sets(run: ScoredRun) -> dict[str, str]:
    return (run.recipe.get("evaluation") or {}).get("prompt_sets") or {}


def _capture(run: ScoredRun) -> dict[str, Any]:
    return run.recipe.get("capture") or {}


def _origin_of_answers(run: ScoredRun) -> str:
    """What decides the stored answers beside prompts and teacher: nothing where they were given."""
    capture = _capture(run)
    keys = ("mode",) if capture.get("mode") == "score" else ("mode", *_SETS, "seed")
    return json.dumps([capture.get(key) for key in keys])
