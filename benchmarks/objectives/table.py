"""The tables of docs/results.md, from the JSON of the comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from variants import QUESTIONS

COLUMNS = {
    "kl_teacher_student": "KL(teacher‖student)",
    "nll": "loss on teacher answers",
    "kl_student_teacher": "KL(student‖teacher), own answers",
    "mass_outside_set": "mass outside A_p",
    "rouge_l_teacher": "Rouge-L to teacher",
    "rouge_l_reference": "Rouge-L to references",
}


_TWIN = ", gamma 0"
# What is wrong with the order of batches, by scale.
_ORDER = {
    "real": " The second phase begins with the batches of the SFT phase again, in their order, which costs SFT more "
    "than the others (experiments.md), so its distance to them is too large."
}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval over seeds (Student's t); NaN for one seed."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def _shown(values: np.ndarray) -> str:
    if len(values) == 2:  # an interval of two is too wide to say anything
        return " and ".join(f"{value:.3f}" for value in sorted(values))
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def comparison_section(path: Path) -> str:
    """The section of docs/results.md about one scale."""
    content = json.loads(path.read_text())
    scale, facts = content["scale"], content["facts"]
    first, second = content["first_phase"], content["second_phase"]
    before = [row["held_out"] for row in content["rows"] if row["variant"] == "before"]
    start = ", ".join(
        f"{COLUMNS[name]} {_shown(np.array([row[name] for row in before]))}" for name in COLUMNS if name in before[0]
    )
    return "\n".join(
        [
            f"## Objectives compared, {scale} scale",
            "",
            f"From `{path}`, which `python benchmarks/objectives {scale}` makes again and goes on with. "
            f"{'; '.join(f'{key}: {value}' for key, value in facts.items())}. Each seed has its own "
            f"{'start and ' if scale == 'tiny' else ''}SFT phase ({first['max_steps']} steps) and order of batches; "
            f"all of its variants go on from there for {second['max_steps']} steps of "
            f"{second['response_tokens_per_batch']} response tokens at learning rate {second['learning_rate']:g}, "
            f"and {f'p = {p:g}' if (p := second.get('p')) else 'the p of the store'}, unless the row names another. "
            "Means over seeds with 95 % intervals (Student's t) where there are several; "
            "the differences are paired by seed: read a row with fewer seeds than the first by them. Held-out prompts "
            "unless a column says dev; divergences and losses in nats per token. KL, set and tail: over the tokens of "
            "the set, and all others as one event. Off-support control asks for the teacher's own mass on the sets "
            f"(`off_support_target: teacher`) unless the row says otherwise.{_ORDER.get(scale, '')}",
            "",
            f"Before the second phase: {start}.",
            "",
            comparison_tables(content),
            *_twins(content["rows"]),
        ]
    )


def comparison_tables(content: dict[str, Any]) -> str:
    """One table per question; differences are paired by seed against the first row of the question."""
    rows = [row for row in content["rows"] if row["variant"] != "before"]
    columns = [name for name in COLUMNS if name in rows[0]["held_out"]]
    head = ["", "seeds", "dev: KL, set and tail", *(COLUMNS[name] for name in columns), "less the first row's: dev"]
    step_s = content.get("step_s", {})  # of a quiet machine alone
    head += ["less the first row's: KL(teacher‖student)", *(["s per step"] if step_s else [])]
    parts = []
    for title, names in QUESTIONS[content["scale"]].items():
        found = {name: _by_seed(rows, name) for name in names}
        lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        first = found[names[0]]
        for name, mine in found.items():
            if not mine:
                continue
            cells = [_shown(np.array([_dev_kl(row) for row in mine.values()]))]
            cells += [_shown(np.array([row["held_out"][key] for row in mine.values()])) for key in columns]
            gaps = ["–", "–"] if name == names[0] else [_gap(mine, first, kl) for kl in (_dev_kl, _kl)]
            step = [f"{step_s[name]:.2f}" if name in step_s else "–"] if step_s else []
            lines.append("| " + " | ".join([name, str(len(mine)), *cells, *gaps, *step]) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _twins(rows: list[dict[str, Any]]) -> list[str]:
    """A table of what the value of the next state adds: each row less its twin with γ = 0."""
    names = dict.fromkeys(row["variant"] for row in rows)
    lines = []
    for name in names:
        twin = _by_seed(rows, f"{name.partition(', gamma')[0]}{_TWIN}")
        mine = _by_seed(rows, name)
        if not twin or name.endswith(_TWIN) or len(mine.keys() & twin.keys()) < 2:
            continue
        gaps = [_gap(mine, twin, kl) for kl in (_dev_kl, _kl)]
        lines.append("| " + " | ".join([name, str(len(mine.keys() & twin.keys())), *gaps]) + " |")
    if not lines:
        return []
    head = ["", "seeds", "dev: KL, set and tail, less the twin's", "KL(teacher‖student), less the twin's"]
    return [
        "### What is temporal: each member less its twin with γ = 0",
        "",
        "Below 0: closer to the teacher than without the value of the next state. γ is 0.99 unless the row names "
        "another. No correction for the number of rows.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
        *lines,
        "",
    ]


def _by_seed(rows: list[dict[str, Any]], variant: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in rows if row["variant"] == variant}


def _gap(mine: dict[int, Any], first: dict[int, Any], kl: Callable[[dict[str, Any]], float]) -> str:
    """Difference of the seeds that both have."""
    gaps = np.array([kl(mine[seed]) - kl(first[seed]) for seed in sorted(mine.keys() & first.keys())])
    return _shown(gaps) if len(gaps) else "–"


def _dev_kl(row: dict[str, Any]) -> float:
    return row["dev"]["kl_set_tail"]


def _kl(row: dict[str, Any]) -> float:
    return row["held_out"]["kl_teacher_student"]
