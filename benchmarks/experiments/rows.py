"""What a row of a table says: its name, needs, costs, scores, and marks of the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from plan import (
    BOTH,
    BOTH_HEAVY,
    BUDGET,
    CHOSEN,
    COST_ONE,
    FIRST,
    METHODS,
    OURS,
    SET_SKEW,
    START_OF_TESTS,
    WHOLE,
    WITH_CAPTURE,
    asked_s,
    at_rate,
    times,
)

from tdistill.objectives import OffSupport
from tdistill.resampling import Interval, Measured, percentile_interval
from tdistill.training.arguments import TDistillConfig

LEVEL, SEED = 0.95, 0
# Metric → heading, and whether more is better.
SAMPLED = {"rouge_l": ("Rouge-L to references", True), "rouge_l_teacher": ("Rouge-L to the teacher", True)}
TOKENS = {"kl_sum": ("KL(teacher‖student)", False), "nll_sum": ("loss on teacher answers", False)}
UNTRAINED = ("start", START_OF_TESTS, "teacher")
_NAMED = METHODS | WHOLE
# Names in the README.
SHOWN = {
    OURS: "iq_learn on scored references",
    SET_SKEW: "reverse skewed KL on scored references",
    BOTH: "iq_learn, both terms, on scored references",
    BOTH_HEAVY: "iq_learn, both terms, weight 10, on scored references",
    BUDGET: "iq_learn, expected, on scored references",
    FIRST: "iq_learn, expected, on answers",
    "start": "start, common to all",
}
COST_HEAD = ["steps", "cost, s", "with scores of references, s"]
Rows = list[dict[str, Any]]


def cost_rows(path: Path) -> Rows:
    """Rows of equal cost, and those of the main table of the sampled form, of others at chosen rates, the untrained."""
    main, own = (json.loads(of.read_text())["rows"] if of.is_file() else [] for of in (path.with_name("e1.json"), path))
    ours = tuple(f"{name}, learning rate" for name in COST_ONE)
    also = {*UNTRAINED, *(at_rate(name, rate)[0] for name, rate in CHOSEN.items())}
    shared = [row for row in main if row["method"] in also or row["method"].startswith(ours)]
    return shared + own


def measured(rows: Rows, metric: str) -> Measured:
    """Rows of one method, a training seed each."""
    found = [row["screening"] for row in rows]
    if metric in SAMPLED:
        sums = np.array([np.transpose(f[metric]) for f in found])
        return Measured(sums, np.ones(sums.shape[:2]))
    return Measured(np.array([f[metric] for f in found])[..., None], np.array([f["num_tokens"] for f in found]))


def short_name(row: str) -> str:
    """Name of a row in the README, where it is the only one of its method at its budget."""
    name = method_shown(row)
    return SHOWN.get(name, name)


def method_shown(row: str) -> str:
    """Name of a row of equal cost without its learning rate."""
    if row in UNTRAINED:
        return row
    return method_of(row) + (f", {WITH_CAPTURE}" if row.endswith(WITH_CAPTURE) else "")


def method_of(row: str) -> str:
    """Name of the method that a row is of, without rate and cost."""
    return next(name for name in sorted(_NAMED, key=len, reverse=True) if row.startswith(name))


def seconds(row: dict[str, Any]) -> float:
    """Cost of a row's training by the quiet times."""
    return row["steps"] * times()["step_s"][method_of(row["method"])]


def seconds_with_scores(row: dict[str, Any]) -> float:
    """The same with what asking the teacher for what its steps read costs."""
    return seconds(row) + asked_s(METHODS[method_of(row["method"])], times(), row["steps"])


def costs_of(row: dict[str, Any]) -> list[str]:
    """Cells of a row: steps, cost, cost with what asking the teacher first costs."""
    if row["method"] in UNTRAINED:
        return ["–", "–", "–"]
    return [str(row["steps"]), f"{seconds(row):.0f}", f"{seconds_with_scores(row):.0f}"]


def by_method(rows: Rows) -> dict[str, Rows]:
    """Rows by their name, a training seed each, in the order of their first."""
    methods: dict[str, Rows] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def seeds_of(rows: Rows, number: int | None = None) -> str:
    """How many training seeds, of these rows if no other number is given, and whether one has the start's batches."""
    if (row := rows[0]["method"]) in UNTRAINED:
        return "–"
    number, method = number or len(rows), _NAMED[method_of(row)]
    reads_answers = not method.references and (method.rollouts or {}).get("share") != 1
    again = reads_answers and any(row["seed"] == 0 and "data_seed" not in row for row in rows)
    return f"{number}{'²' if again else '¹' if number == 1 else ''}"


def needs_of(row: str) -> str:
    """What the training of a row needs beside its store."""
    if row in UNTRAINED:
        return "–"
    method = _NAMED[method_of(row)]
    args = TDistillConfig("unused", **method.args)
    objective = args.build_objective()
    off_support = OffSupport(args.off_support) if objective.uses_off_support else None
    needs = {
        "teacher": objective.needs_teacher,
        "rollouts": method.rollouts is not None,
        "vocabulary": method.whole or "vocabulary" in (objective.support, off_support and off_support.support),
    }
    return ", ".join(name for name, needed in needs.items() if needed) or "–"


def marks_of(
    points: dict[str, float], num_seeds: dict[str, int], draws: dict[str, np.ndarray], more: bool
) -> dict[str, str]:
    """Formats of the best student of a column and of those that are not separated from it.

    No interval says how far another training of a row with one training seed would be, so such rows are not compared.
    """
    students = {name: point if more else -point for name, point in points.items() if name not in UNTRAINED}
    if len(seeded := [name for name in students if num_seeds[name] > 1]) < 2:
        return {}
    best = max(seeded, key=lambda name: students[name])
    marks = {best: "**{}**"}
    for name in set(seeded) - {best}:
        gap = percentile_interval(points[name] - points[best], draws[name] - draws[best], LEVEL)
        if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
            marks[name] = "≈ {}"
    return marks


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head and whose first column is text."""
    head, *body = lines
    ruled = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ruled)


def with_interval(interval: Interval, sign: str = "", digits: str = ".4f") -> str:
    """A value and the ends of its interval; the value alone where the data define none."""
    value, *ends = (
        "" if number is None else format(number, sign + digits)
        for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{', '.join(ends)}]" if all(ends) else value
