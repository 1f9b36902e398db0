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
from plan import BASE, OURS, RESULTS, SCREENING_SEEDS, STUDIED_SEED, Method, frozen
from scores import TOP_P, screened_answers
from setups import Setup
from tables import with_interval

from tdistill.files import write_atomically
from tdistill.resampling import Measured, percentile_interval, resample

PATH = RESULTS / "decoding.json"
# The last leaves the likeliest token alone at nearly every position.
TOP_PS = (TOP_P, 0.5, 0.2, 0.01)


def missing() -> list[tuple[str, Method | None, float]]:
    """Students and top-p without a row, one student after another."""
    done = {(row["method"], row["top_p"]) for row in _rows()}
    models = {**frozen(), "start": None, "teacher": None}
    return [(name, method, p) for name, method in models.items() for p in TOP_PS if (name, p) not in done]


def run(setup: Setup, load: Load) -> None:
    """Measure what is missing and write each row down."""
    model, loaded = None, None
    for name, method, top_p in missing():
        if loaded != name:
            model, loaded = load(name, method, STUDIED_SEED, DTYPE), name
        row = {"method": name, "top_p": top_p, **screened_answers(setup, model, SCREENING_SEEDS, top_p)}
        lines = ",\n".join(map(json.dumps, [*_rows(), row]))
        head = f'{{"setup": {json.dumps(BASE.name)}, "training_seed": {STUDIED_SEED}, "rows": [\n'
        write_atomically(PATH, f"{head}{lines}\n]}}\n")
        print(f"decoding: {name}, top-p {top_p:g}: Rouge-L {np.mean(row['rouge_l']):.4f}", flush=True)


def _rows() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text())["rows"] if PATH.is_file() else []


def section(path: Path) -> str:
    """The section of docs/results.md."""
    content = json.loads(path.read_text())
    rows = content["rows"]
    values = {
        (row["method"], row["top_p"]): Measured(
            np.transpose(row["rouge_l"])[None], np.ones((1, len(row["rouge_l"][0])))
        )
        for row in rows
    }
    draws = dict(zip(values, resample(list(values.values()), 0), strict=True))
    names = dict.fromkeys(name for name, _ in values)
    shared = [p for p in TOP_PS if all((name, p) in values for name in names)]
    best = {name: max(((name, p) for p in shared), key=lambda at: values[at].value) for name in names}
    ours = next((at for name, at in best.items() if name.startswith(OURS)), None)
    head = ["", *(f"top-p {p:g}" for p in TOP_PS), "best less the default's best"]
    head.append(f"distinct-2 at {min(shared):g}")
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, at_best in best.items():
        cells = [
            with_interval(percentile_interval(values[at].value, draws[at], 0.95))
            if (at := (name, p)) in values
            else "–"
            for p in TOP_PS
        ]
        gap = "–"
        if ours is not None and at_best != ours:
            difference = values[at_best].value - values[ours].value
            gap = with_interval(percentile_interval(difference, draws[at_best] - draws[ours], 0.95), "+")
        smallest = next(row for row in rows if (row["method"], row["top_p"]) == (name, min(shared)))
        lines.append([name, *cells, gap, f"{np.mean(smallest['distinct_2']):.2f}"])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return (
        f"## Smaller sets at decoding\n\nFrom `{path}`, which `python benchmarks/experiments decoding` makes: Rouge-L "
        f"to references of the students of training seed {content['training_seed']} on the 200 screening prompts, "
        f"temperature 1, two sampling seeds, weights in {DTYPE}. A student can be given fewer tokens to choose from "
        "when it answers, at no cost; "
        "the last difference compares each at its best of the top-p that all have, chosen on these prompts, paired, "
        f"95 %.\n\n{table}\n"
    )
