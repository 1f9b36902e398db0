"""Sections of docs/results.md from the JSON of the experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from plan import BASE, EXPERIMENTS

from tdistill.resampling import Interval, Measured, percentile_interval, resample

_LEVEL, _SEED = 0.95, 0
# Metric → heading, and whether more is better.
_SAMPLED = {"rouge_l": ("Rouge-L to references", True), "rouge_l_teacher": ("Rouge-L to the teacher", True)}
_TOKENS = {"kl_sum": ("KL(teacher‖student)", False), "nll_sum": ("loss on teacher answers", False)}
_METRICS = _SAMPLED | _TOKENS
_OURS = "bellman_distill"


def experiment_section(path: Path) -> str:
    """The section of one experiment."""
    content = json.loads(path.read_text())
    experiment, facts = EXPERIMENTS[content["experiment"]], content["facts"]
    first, second = content["first_phase"], content["second_phase"]
    shared = {key: value for key, value in facts.items() if len(experiment.setups) == 1 or key == "teacher"}
    parts = [
        f"## {experiment.title}",
        "",
        f"From `{path}`, which `python benchmarks/experiments {content['experiment']}` makes again and goes on with. "
        f"{'; '.join(f'{key}: {value}' for key, value in shared.items())}. One healed start for all of a setup "
        f"({first['max_steps']} steps of SFT on the teacher's answers); every method goes on from it for "
        f"{second['max_steps']} steps of {second['response_tokens_per_batch']} response tokens at learning rate "
        f"{second['learning_rate']:g}, unless the row names another. 200 screening prompts of the dev file, "
        f"sampling seeds {', '.join(map(str, content['screening_seeds']))}, temperature 1, top-p 0.8. Intervals: 95 %, "
        "bootstrap over prompts and training seeds; differences are paired. A row of one training seed "
        "does not say how far another training would be.",
        "",
    ]
    for setup in dict.fromkeys(row["setup"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["setup"] == setup]
        if len(experiment.setups) > 1 or setup != BASE.name:
            parts += [f"### {setup}", ""]
        parts += [_table(rows), ""]
    return "\n".join(parts)


def measured(rows: list[dict[str, Any]], metric: str) -> Measured:
    """Rows of one method, a training seed each."""
    found = [row["screening"] for row in rows]
    if metric in _SAMPLED:
        sums = np.array([np.transpose(f[metric]) for f in found])
        return Measured(sums, np.ones(sums.shape[:2]))
    return Measured(np.array([f[metric] for f in found])[..., None], np.array([f["num_tokens"] for f in found]))


def _table(rows: list[dict[str, Any]]) -> str:
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    ours = _best_of_ours(methods)
    values = {metric: {name: measured(mine, metric) for name, mine in methods.items()} for metric in _METRICS}
    draws = {metric: dict(zip(of, resample(list(of.values()), _SEED), strict=True)) for metric, of in values.items()}
    head = ["", "seeds", *(title for title, _ in _METRICS.values()), f"Rouge-L less {ours}'s" if ours else "difference"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, mine in methods.items():
        cells = [
            _shown(percentile_interval(values[metric][name].value, draws[metric][name], _LEVEL)) for metric in _METRICS
        ]
        gap = "–"
        if ours and name != ours:
            point = values["rouge_l"][name].value - values["rouge_l"][ours].value
            gap = _shown(percentile_interval(point, draws["rouge_l"][name] - draws["rouge_l"][ours], _LEVEL), "+")
        lines.append([name, str(len(mine)), *cells, gap])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _best_of_ours(methods: dict[str, list[dict[str, Any]]]) -> str | None:
    """Of the rows of the default objective, the one with most seeds, then with the higher Rouge-L."""
    own = [name for name in methods if name.startswith(_OURS)]
    return max(own, key=lambda name: (len(methods[name]), measured(methods[name], "rouge_l").value), default=None)


def _shown(interval: Interval, sign: str = "") -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:{sign}.4f}"
    return f"{interval.value:{sign}.4f} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"
