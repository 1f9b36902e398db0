"""Whether a lead is one of decoding: the students that meet the test sets, sampled from smaller sets.

    python benchmarks/experiments decoding

Rouge-L rewards likely tokens. A method that concentrates the student's mass could owe its lead to that, and then
another student would have the same score at a smaller top-p.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from finals import DTYPE, Load
from plan import BASE, OURS, RESULTS, SCREENING_SEEDS, Method, studied
from scores import TOP_P, screened_answers
from setups import Setup
from tables import UNTRAINED, markdown, with_interval

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


def section(path: Path) -> str:
    """The section of docs/results.md."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        rows.setdefault((row["method"], row["top_p"]), []).append(row)
    sums = {at: np.array([np.transpose(row["rouge_l"]) for row in of]) for at, of in rows.items()}
    values = {at: Measured(of, np.ones(of.shape[:2])) for at, of in sums.items()}
    draws = dict(zip(values, resample(list(values.values()), 0), strict=True))
    names = dict.fromkeys(name for name, _ in values)
    shared = [p for p in TOP_PS if all((name, p) in values for name in names)]
    # Of each its best top-p, which every resample chooses anew.
    best = {name: max(values[name, p].value for p in shared) for name in names}
    drawn = {name: np.max([draws[name, p] for p in shared], axis=0) for name in names}
    ours = next((name for name in names if name.startswith(OURS)), None)
    head = ["", "seeds", *(f"top-p {p:g}" for p in TOP_PS), "best less the default's best"]
    head.append(f"distinct-2 at {min(shared):g}")
    lines = [head]
    for name in names:
        cells = [str(len(rows[name, shared[0]])) if name not in UNTRAINED else "–"]
        cells += [
            with_interval(percentile_interval(values[at].value, draws[at], 0.95))
            if (at := (name, p)) in values
            else "–"
            for p in TOP_PS
        ]
        gap = "–"
        if ours is not None and name != ours:
            gap = with_interval(percentile_interval(best[name] - best[ours], drawn[name] - drawn[ours], 0.95), "+")
        distinct = np.mean([row["distinct_2"] for row in rows[name, min(shared)]])
        lines.append([name, *cells, gap, f"{distinct:.2f}"])
    return (
        f"## Smaller sets at decoding\n\nFrom `{path}`, which `python benchmarks/experiments decoding` makes: Rouge-L "
        "to references of teacher, start and students of several training seeds on the 200 screening prompts, "
        f"temperature 1, two sampling seeds, weights in {DTYPE}. A student can be given fewer tokens to choose from "
        "when it answers, at no cost; the last difference compares each at its best of the top-p that all have, chosen "
        f"on these prompts and anew in each resample, paired, 95 %.\n\n{markdown(lines)}\n"
    )
