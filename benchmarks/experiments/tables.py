"""Sections of docs/results.md on the screening prompts, from the JSON of the experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from claims import Claims
from plan import (
    BASE,
    CHOSEN,
    CURVES,
    EXPERIMENTS,
    MAIN,
    ON_OWN_ANSWERS,
    OURS,
    WITH_CAPTURE,
    at_cost_one,
    at_rate,
    times,
)
from rows import (
    COST_HEAD,
    LEVEL,
    SAMPLED,
    SEED,
    TOKENS,
    UNTRAINED,
    Rows,
    by_method,
    cost_rows,
    costs_of,
    markdown,
    marks_of,
    measured,
    method_shown,
    needs_of,
    seconds,
    seconds_with_scores,
    seeds_of,
    short_name,
    with_interval,
)

from tdistill.reports.plots import curves_chart
from tdistill.resampling import Interval, percentile_interval, resample

_METRICS = SAMPLED | TOKENS
# Of the sampled answers, to be read beside their scores: heading and format of the mean.
_ANSWERS = {"length": ("tokens", ".1f"), "terminated": ("ended", ".0%"), "distinct_2": ("distinct-2", ".2f")}
# Setup of the rows that are taken from the main table.
_BASE_SHOWN = "main table's setup"


def screening_section() -> str:
    """What all tables of the screening prompts share."""
    parts = [
        "## Tables of the screening prompts",
        "",
        "The sections from here to the Sparsity section share this. All methods of a setup go on from one healed "
        "start (SFT on the teacher's answers). 200 screening prompts of the dev file are answered with two sampling "
        "seeds at temperature 1, top-p 0.8. Rouge-L to the teacher, KL and loss are measured on the answers of the "
        "setup's teacher to these prompts, so they compare within a table, as another setup has other answers.",
        "",
        "Intervals: 95 %, bootstrap over prompts and, where there are several, training seeds; over two or three "
        "trainings they are a rough guide, and none covers another start, other training prompts or other answers of "
        "the teacher. Differences are paired by prompt. Bold: the best of a column among the rows with several "
        "training seeds, where there are two such; ≈: such a row that is not separated from it. ¹: one training seed, "
        "which does not say how far another training would be, so the row is not compared. ²: with training seed 0 the "
        "batches are those of the start's healing again in their order. The sampled form and the learning "
        "rates were chosen by Rouge-L on these prompts (those of Dolly), so their scores look better here than on "
        "others, and nothing corrects for the number of rows.",
        "",
        "Needs: what training needs beside the store: the teacher in memory, answers of the student (rollouts), or "
        "logits of the whole vocabulary. KL and loss: nats per token. Tokens: mean length of the sampled answers. "
        "Ended: share of them that ended within their limit. Distinct-2: share of an answer's bigrams that are "
        "distinct. Rouge-L to the teacher in its own row: its new answers against its stored ones.",
        "",
    ]
    return "\n".join(parts + _sizes())


def experiment_section(path: Path) -> str:
    """The section of one experiment."""
    content = json.loads(path.read_text())
    name, second = content["experiment"], content["second_phase"]
    experiment = EXPERIMENTS[name]
    facts = {what.name: what.facts() for what in experiment.groups}
    first = next(iter(facts.values()))
    same = {key: value for key, value in first.items() if all(of[key] == value for of in facts.values())}
    length = f"{second['max_steps']} steps" if name != "e8" else "the steps of its row"
    rate = "the learning rate chosen for it"
    if name == "e8":
        rate = "the learning rate that it names"
    elif name == "e1":
        rate = f"learning rate {second['learning_rate']:g} unless the row names another"
    parts = [
        f"## {experiment.title} ({name.upper()})",
        "",
        *([experiment.about, ""] if experiment.about else []),
        f"From `{path}`, which `python benchmarks/experiments {name}` makes again and goes on with. "
        f"{_told(same)}. The start is healed for {content['first_phase']['max_steps']} steps; every method goes on "
        f"for {length} of {second['response_tokens_per_batch']} response tokens, at {rate}.",
        "",
    ]
    main = path.with_name("e1.json")
    rows = content["rows"] + teacher_rows(main, content["rows"], list(experiment.groups))
    if name == "e8":
        rows = cost_rows(path)
    rows += [row | {"setup": _BASE_SHOWN} for row in base_rows(main, experiment.base)]
    facts[_BASE_SHOWN] = BASE.facts()
    setups = list(dict.fromkeys(row["setup"] for row in rows))
    for setup in setups:
        if len(setups) > 1:
            own = {key: value for key, value in facts[setup].items() if key not in same}
            parts += [f"### {setup}", "", *([f"{_told(own)}.", ""] if own else [])]
        parts += [_table([row for row in rows if row["setup"] == setup], costs_of if name == "e8" else None), ""]
    if name == "e8":
        parts += [
            "![Scores over cost](figures/cost.svg)",
            "![The same with the scores of references](figures/cost-with-scores.svg)",
            "",
        ]
        parts += _reach(rows)
    return "\n".join(parts)


def _told(facts: dict[str, str]) -> str:
    return "; ".join(f"{key}: {value}" for key, value in facts.items())


def _sizes() -> list[str]:
    """Size and speed of the base's teacher and student, if they were measured."""
    if not (models := times().get("models")):
        return []
    shown = [
        f"the {name} has {of['num_parameters'] / 1e6:.1f} M parameters ({of['weights_bytes'] / 1e6:.0f} MB in float32) "
        f"and decodes {of['decode_tokens_per_s']:.1f} tokens/s, one answer at a time"
        for name, of in models.items()
    ]
    return [f"With 15 layers, on two CPU cores (`times.json` beside the JSON below): {'; '.join(shown)}.", ""]


def base_rows(path: Path, shown: Mapping[str, str]) -> Rows:
    """Rows of the main table under the names that another experiment has for them, with start and teacher."""
    names = {**shown, "start": "start", "teacher": "teacher"} if shown else {}
    found = json.loads(path.read_text())["rows"] if names and path.is_file() else []
    return [row | {"method": names[row["method"]]} for row in found if row["method"] in names]


def teacher_rows(path: Path, rows: Rows, setups: list[Claims]) -> Rows:
    """The base's row of the teacher for each setup with rows of its own that asks this teacher the same."""
    begun = {row["setup"] for row in rows}
    same = [what.name for what in setups if what.name in begun and what != BASE and what.same_teacher(BASE)]
    found = json.loads(path.read_text())["rows"] if same and path.is_file() else []
    return [row | {"setup": name} for name in same for row in found if row["method"] == "teacher"]


def cost_figure(path: Path, with_capture: bool) -> str:
    """Scores over cost of the rows at the chosen rates, a line per method, without or with what asking costs."""
    cost = seconds_with_scores if with_capture else seconds
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    every = by_method(cost_rows(path))
    rows = {name: mine for name, mine in every.items() if _at_chosen_rate(name) in (*CURVES, *MAIN)}
    rows = {name: mine for name, mine in rows.items() if not name.endswith((WITH_CAPTURE, "search"))}
    longest = max(cost(mine[0]) for mine in rows.values()) / 60
    for metric, (title, _) in (("rouge_l", SAMPLED["rouge_l"]), ("kl_sum", TOKENS["kl_sum"])):
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, mine in rows.items():
            point = (cost(mine[0]) / 60, measured(mine, metric).value)
            curves.setdefault(short_name(name), []).append(point)
        start = measured(every["start"], metric).value
        curves["the start"] = [(0.0, start), (longest, start)]
        panels[title] = {name: tuple(map(list, zip(*sorted(points), strict=True))) for name, points in curves.items()}
    name, counted = ("cost-with-capture", "and of capture") if with_capture else ("cost", "without capture")
    return curves_chart(name, "Scores over cost", f"minutes of training, {counted}", panels)


def _reach(rows: Rows) -> list[str]:
    """The sampled form's cheapest row that is separated above all of another method's, beside the dearest of those.

    Rows with one training are left out: nothing says how far another training would be.
    """
    methods = {name: mine for name, mine in by_method(rows).items() if len(mine) > 1 or name == "start"}
    found: dict[str, list[str]] = {}
    for row in methods:
        if (name := _at_chosen_rate(row)) is not None:
            found.setdefault(name, []).append(row)
    compared = ["start", *(row for of in found.values() for row in of)]
    values = {row: measured(methods[row], "rouge_l") for row in compared}
    draws = dict(zip(values, resample(list(values.values()), SEED), strict=True))

    def above(own: str, other: str) -> Interval:
        return percentile_interval(values[own].value - values[other].value, draws[own] - draws[other], LEVEL)

    ours = sorted(found.pop(OURS, []), key=lambda row: seconds(methods[row][0]))
    lines = [
        ["", "costs tried, s", "best Rouge-L", "less the start's", "cost of the sampled form above it, s",
         "its lead over the other's best row", "the other's dearest row costs, times",
         "with scores of references, times"]
    ]  # fmt: skip
    best = {name: max(of, key=lambda row: values[row].value) for name, of in found.items()}
    level = [name for name, row in best.items() if (above(row, "start").low or 0.0) <= 0.0]
    for name, row in sorted(best.items(), key=lambda item: -values[item[1]].value):
        tried = sorted({seconds(methods[each][0]) for each in found[name]})
        cells = [name, ", ".join(f"{cost:.0f}" for cost in tried), f"{values[row].value:.4f}"]
        cells.append(with_interval(above(row, "start"), "+"))
        separated = [own for own in ours if all((above(own, other).low or 0.0) > 0.0 for other in found[name])]
        if not separated:
            lines.append([*cells, "none", "–", "–", "–"])
            continue
        own, dearest = methods[separated[0]][0], max((methods[each][0] for each in found[name]), key=seconds)
        cells += [f"{seconds(own):.0f}", with_interval(above(separated[0], row), "+")]
        ratios = (seconds(dearest) / seconds(own), seconds_with_scores(dearest) / seconds_with_scores(own))
        lines.append([*cells, *(f"{ratio:.1f}" for ratio in ratios)])
    if len(lines) == 1:
        return []
    return [
        "What a score costs, of the rows above at the chosen rates with more than one training. "
        f"Not separated above the start, which costs nothing here: {'; '.join(level) or 'none'}. Of these the ratio "
        "says that the sampled form passes their best score before they do, not when they would. Beside each method: "
        "the cheapest row of the sampled form that is separated above every row of it, by how much above its best, and "
        "how many times its cost the dearest of the method's rows is, none of which has that score. The ratio says how "
        "far the other method was tried. With scores of references: those that the steps read are added. All of this "
        "is by Rouge-L: by KL the sampled form ends further from the teacher than it began, and forward KL with a "
        "teacher in memory nearer.",
        "",
        markdown(lines),
        "",
    ]


def _trained(main: Path) -> dict[str, Rows]:
    """Rows of the main table and of equal cost, by their name."""
    rows = json.loads(main.read_text())["rows"]
    return by_method(rows + [row for row in cost_rows(main.with_name("e8.json")) if row not in rows])


def _less_the_starts(methods: dict[str, Rows], metric: str) -> dict[str, Interval]:
    """Paired differences of trained rows to the start."""
    values = {name: measured(mine, metric) for name, mine in methods.items()}
    draws = dict(zip(values, resample(list(values.values()), SEED), strict=True))
    return {
        name: percentile_interval(value.value - values["start"].value, draws[name] - draws["start"], LEVEL)
        for name, value in values.items()
        if name not in UNTRAINED
    }


def own_answers_section(main: Path) -> str:
    """How far the search brought the two baselines that train on the student's answers."""
    methods = _trained(main)
    mine = {name: of for name, of in methods.items() if method_shown(name).startswith(("start", *ON_OWN_ANSWERS))}
    if len(mine) < 2:
        return ""
    score, kl = (_less_the_starts(mine, metric) for metric in ("rouge_l", "kl_sum"))
    lines = [["", "seeds", "steps", "Rouge-L less the start's", "KL(teacher‖student) less the start's"]]
    lines += [
        [name, seeds_of(mine[name]), str(mine[name][0]["steps"]), with_interval(gap, "+"), with_interval(kl[name], "+")]
        for name, gap in sorted(score.items(), key=lambda item: -(item[1].value or 0.0))
    ]
    return (
        "## GKD and MiniLLM: the search\n\nEvery row of the two in the main table and at equal cost: learning rates, "
        "budgets and, for MiniLLM, the paper's plain text. GKD has β = 0.5 and half of its batches from the student's "
        "answers, MiniLLM the paper's mixture and clipping; these were not searched. "
        f"Paired differences to the common start, screening prompts.\n\n{markdown(lines)}\n"
    )


def not_better_section(main: Path) -> str:
    """What did not work: rows that end separated below the start they go on from."""
    methods = _trained(main)
    gaps = _less_the_starts(methods, "rouge_l")
    below = {name: gap for name, gap in gaps.items() if gap.high is not None and gap.high < 0}
    if not below:
        return ""
    lines = [["", "seeds", "Rouge-L less the start's"]]
    lines += [
        [name, seeds_of(methods[name]), with_interval(gap, "+")]
        for name, gap in sorted(below.items(), key=lambda item: item[1].value or 0.0)
    ]
    return (
        "## What did not work\n\nRows of the main table and of equal cost that end below the start which they go on "
        "from, by Rouge-L to references on the screening prompts, with an interval that excludes 0. Of the members of "
        'the temporal-difference family "Objectives compared" says it, twin by twin, and of all that was tried '
        f"[LOG.md](LOG.md).\n\n{markdown(lines)}\n"
    )


def _at_chosen_rate(row: str) -> str | None:
    """Method of a row of equal cost at the chosen rate, with whatever number of steps."""
    chosen = {at_rate(name, rate)[0]: name for name, rate in CHOSEN.items()}
    return chosen.get(row.split(", cost")[0].removesuffix(", search"))


def _table(rows: Rows, costs: Any = None) -> str:
    methods = by_method(rows)
    ours = _best_of_ours(methods)
    values = {metric: {name: measured(mine, metric) for name, mine in methods.items()} for metric in _METRICS}
    draws = {metric: dict(zip(of, resample(list(of.values()), SEED), strict=True)) for metric, of in values.items()}
    against = "Rouge-L less that of " + ("the sampled form" if ours and ours.startswith(OURS) else str(ours))
    extra = COST_HEAD if costs else []
    lines = [["", "seeds", "needs", *extra, *(title for title, _ in _METRICS.values()), against,
              "share of the teacher's Rouge-L", *(title for title, _ in _ANSWERS.values())]]  # fmt: skip
    points = {metric: {name: value.value for name, value in of.items()} for metric, of in values.items()}
    num_seeds = {name: len(mine) for name, mine in methods.items()}
    marks = {metric: marks_of(points[metric], num_seeds, draws[metric], more) for metric, (_, more) in _METRICS.items()}
    for name in sorted(methods, key=lambda name: (name not in UNTRAINED, -values["rouge_l"][name].value)):
        mine = methods[name]
        cells = [seeds_of(mine), needs_of(name), *(costs(mine[0]) if costs else [])]
        for metric in _METRICS:
            shown = with_interval(percentile_interval(values[metric][name].value, draws[metric][name], LEVEL))
            cells.append(marks[metric].get(name, "{}").format(shown))
        gap = "–"
        if ours and name != ours:
            point = values["rouge_l"][name].value - values["rouge_l"][ours].value
            gap = with_interval(percentile_interval(point, draws["rouge_l"][name] - draws["rouge_l"][ours], LEVEL), "+")
        share = "–"
        if "teacher" in methods:
            point = values["rouge_l"][name].value / values["rouge_l"]["teacher"].value
            of_draws = draws["rouge_l"][name] / draws["rouge_l"]["teacher"]
            share = with_interval(percentile_interval(point, of_draws, LEVEL), "", ".1%")
        lines.append([name, *cells, gap, share, *(_of_answers(mine, key, form) for key, (_, form) in _ANSWERS.items())])
    return markdown(lines)


def _of_answers(rows: Rows, key: str, form: str) -> str:
    """Mean over the answers of rows that have it; rows of before it was measured do not."""
    found = [row["screening"][key] for row in rows if key in row["screening"]]
    return format(np.mean(found), form) if found else "–"


def _best_of_ours(methods: dict[str, Rows]) -> str | None:
    """The sampled form at equal cost; else, of the rows of its objective, the one with most seeds, then Rouge-L."""
    if (name := at_cost_one(OURS)) in methods:
        return name
    own = [name for name in methods if name.startswith(OURS)] or [n for n in methods if n.startswith("bellman_distill")]
    return max(own, key=lambda name: (len(methods[name]), measured(methods[name], "rouge_l").value), default=None)
