"""Whether a lead is one of decoding: the students that meet the test sets, sampled from smaller sets.

    python benchmarks/experiments decoding

Rouge-L rewards likely tokens. A method that concentrates the student's mass could owe its lead to that, and then
another student would have the same score at a smaller top-p.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from finals import DTYPE, Load
from plan import BASE, OURS, RESULTS, SCREENING_SEEDS, Method, studied
from rows import UNTRAINED, markdown, short_name, with_interval
from scores import TOP_P, screened_answers
from setups import Setup

from tdistill.files import write_atomically
from tdistill.resampling import Measured, percentile_interval, resample

PATH = RESULTS / "decoding.json"
# The last leaves the likeliest token alone at nearly every position.
TOP_PS = (TOP_P, 0.2, 0.01)


def missing() -> list[tuple[str, Method | None, int, float]]:
    """Students, their training seeds and top-p without a row, one student after another."""
    done = {(row["method"], row["seed"], row["top_p"]) for row in _rows()}
    return [(*of, p) for of in studied() for p in TOP_PS if (of[0], of[2], p) not in done]


def run(setup: Setup, load: Load) -> None:
    """Measure what is missing and write each row down."""
    model, loaded = None, None
    for name, method, seed, top_p in missing():
        if loaded != (name, seed):
            model, loaded = load(name, method, seed, DTYPE), (name, seed)
        row = {"method": name, "seed": seed, "top_p": top_p}
        row |= screened_answers(setup, model, SCREENING_SEEDS, top_p)
        lines = ",\n".join(map(json.dumps, [*_rows(), row]))
        write_atomically(PATH, f'{{"setup": {json.dumps(BASE.name)}, "rows": [\n{lines}\n]}}\n')
        print(f"decoding: {name}, seed {seed}, top-p {top_p:g}: Rouge-L {np.mean(row['rouge_l']):.4f}", flush=True)


def _rows() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text())["rows"] if PATH.is_file() else []


@dataclass(frozen=True)
class _Study:
    """Rouge-L by method and top-p, its resamples, and of each method its best top-p, chosen anew in each resample."""

    rows: dict[tuple[str, float], list[dict[str, Any]]]
    values: dict[tuple[str, float], Measured]
    draws: dict[tuple[str, float], np.ndarray]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.values))

    def best(self, name: str) -> tuple[float, np.ndarray]:
        """Rouge-L at the best top-p, and its resamples."""
        value = max(self.values[name, p].value for p in TOP_PS)
        return value, np.max([self.draws[name, p] for p in TOP_PS], axis=0)

    def at(self, name: str, top_p: float) -> tuple[float, np.ndarray]:
        """Rouge-L at one top-p, and its resamples."""
        return self.values[name, top_p].value, self.draws[name, top_p]


def _read(path: Path) -> _Study:
    """What is there of the students that were sampled at every top-p."""
    found = json.loads(path.read_text())["rows"]
    taken = Counter((row["method"], row["seed"]) for row in found if row["top_p"] in TOP_PS)
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in found:
        if taken[row["method"], row["seed"]] == len(TOP_PS):
            rows.setdefault((row["method"], row["top_p"]), []).append(row)
    sums = {at: np.array([np.transpose(row["rouge_l"]) for row in of]) for at, of in rows.items()}
    values = {at: Measured(of, np.ones(of.shape[:2])) for at, of in sums.items()}
    draws = dict(zip(values, resample(list(values.values()), 0), strict=True))
    return _Study(rows, values, draws)


def _less(one: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> str:
    return with_interval(percentile_interval(one[0] - other[0], one[1] - other[1], 0.95), "+")


def section(path: Path) -> str:
    """The section of docs/results.md."""
    study = _read(path)
    names, smallest = study.names(), min(TOP_PS)
    ours = next((name for name in names if name.startswith(OURS)), None)
    lines = [["", "seeds", *(f"top-p {p:g}" for p in TOP_PS), "best less the sampled form's best",
              f"distinct-2 at {smallest:g}"]]  # fmt: skip
    for name in names:
        scores = [
            with_interval(percentile_interval(study.values[name, p].value, study.draws[name, p], 0.95)) for p in TOP_PS
        ]
        seeds = "–" if name in UNTRAINED else str(len(study.rows[name, smallest]))
        gap = "–" if ours is None or name == ours else _less(study.best(name), study.best(ours))
        distinct = np.mean([row["distinct_2"] for row in study.rows[name, smallest]])
        lines.append([name, seeds, *scores, gap, f"{distinct:.2f}"])
    return (
        f"## Smaller sets at decoding\n\nFrom `{path}`, which `python benchmarks/experiments decoding` makes: Rouge-L "
        "to references of teacher, start and students of several training seeds on the 200 screening prompts, "
        f"temperature 1, two sampling seeds, weights in {DTYPE}. A student can be given fewer tokens to choose from "
        "when it answers, at no cost; the last difference compares each at its best of these top-p, chosen "
        f"on these prompts and anew in each resample, paired, 95 %.\n\n{markdown(lines)}\n"
    )


def lead(path: Path, other: str) -> str:
    """The sampled form's lead over another method at the paper's top-p and at the best of each, for the README."""
    names = (study := _read(path)).names() if path.is_file() else []
    found = [next((name for name in names if name.startswith(of)), None) for of in (OURS, other)]
    if None in found:
        return ""
    ours, theirs = found
    seeds = len(study.rows[ours, TOP_P])
    return (
        f"On the dev prompts ({seeds} training seeds) the lead over {short_name(theirs)} is "
        f"{_less(study.at(ours, TOP_P), study.at(theirs, TOP_P))} at top-p {TOP_P:g}, and "
        f"{_less(study.best(ours), study.best(theirs))} with each at its best of top-p "
        f"{', '.join(f'{p:g}' for p in TOP_PS)} "
        "([Smaller sets at decoding](docs/results.md#smaller-sets-at-decoding)).\n"
    )
