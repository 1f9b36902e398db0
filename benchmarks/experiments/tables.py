"""Sections of docs/results.md from the JSON of the experiments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from claims import Claims
from plan import (
    BASE,
    BOTH,
    BUDGET,
    CHOSEN,
    COST_ONE,
    CURVES,
    EXPERIMENTS,
    FIRST,
    FROZEN,
    MAIN,
    METHODS,
    OTHER_FORMS,
    OURS,
    SET_SKEW,
    START_OF_TESTS,
    STEPS,
    WHOLE,
    WITH_CAPTURE,
    asked_s,
    at_cost_one,
    at_rate,
    frozen,
    times,
)

from tdistill.objectives import OffSupport
from tdistill.reports.plots import curves_chart
from tdistill.resampling import Interval, Measured, percentile_interval, resample
from tdistill.training.arguments import TDistillConfig

_LEVEL, _SEED = 0.95, 0
# Metric → heading, and whether more is better.
_SAMPLED = {"rouge_l": ("Rouge-L to references", True), "rouge_l_teacher": ("Rouge-L to the teacher", True)}
_TOKENS = {"kl_sum": ("KL(teacher‖student)", False), "nll_sum": ("loss on teacher answers", False)}
_METRICS = _SAMPLED | _TOKENS
# Of the sampled answers, to be read beside their scores: heading and format of the mean.
_ANSWERS = {"length": ("tokens", ".1f"), "terminated": ("ended", ".0%"), "distinct_2": ("distinct-2", ".2f")}
UNTRAINED = ("start", START_OF_TESTS, "teacher")
_NAMED = METHODS | WHOLE
# Names in the README, where no row tells a form of the default from another.
_SHOWN = {
    OURS: "iq_learn on scored references",
    SET_SKEW: "reverse skewed KL on scored references",
    BOTH: "iq_learn, both terms, on scored references",
    BUDGET: "iq_learn, expected, on scored references",
    FIRST: "iq_learn, expected, on answers",
    "start": "start, common to all",
}
_COST_HEAD = ["steps", "cost, s", "with scores of references, s"]
# Setup of the rows that are taken from the main table.
_BASE_SHOWN = "main table's setup"
_Rows = list[dict[str, Any]]


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
        "batches are those of the start's healing again in their order. The experiments' default and the learning "
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
        parts += [_table([row for row in rows if row["setup"] == setup], _costs if name == "e8" else None), ""]
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


def base_rows(path: Path, shown: Mapping[str, str]) -> _Rows:
    """Rows of the main table under the names that another experiment has for them, with start and teacher."""
    names = {**shown, "start": "start", "teacher": "teacher"} if shown else {}
    found = json.loads(path.read_text())["rows"] if names and path.is_file() else []
    return [row | {"method": names[row["method"]]} for row in found if row["method"] in names]


def teacher_rows(path: Path, rows: _Rows, setups: list[Claims]) -> _Rows:
    """The base's row of the teacher for each setup with rows of its own that asks this teacher the same."""
    begun = {row["setup"] for row in rows}
    same = [what.name for what in setups if what.name in begun and what != BASE and what.same_teacher(BASE)]
    found = json.loads(path.read_text())["rows"] if same and path.is_file() else []
    return [row | {"setup": name} for name in same for row in found if row["method"] == "teacher"]


def cost_rows(path: Path) -> _Rows:
    """Rows of equal cost with those of the main table: the default's, of others at the chosen rates, the untrained."""
    main, own = (json.loads(of.read_text())["rows"] if of.is_file() else [] for of in (path.with_name("e1.json"), path))
    ours = tuple(f"{name}, learning rate" for name in COST_ONE)
    also = {*UNTRAINED, *(at_rate(name, rate)[0] for name, rate in CHOSEN.items())}
    shared = [row for row in main if row["method"] in also or row["method"].startswith(ours)]
    return shared + own


def measured(rows: _Rows, metric: str) -> Measured:
    """Rows of one method, a training seed each."""
    found = [row["screening"] for row in rows]
    if metric in _SAMPLED:
        sums = np.array([np.transpose(f[metric]) for f in found])
        return Measured(sums, np.ones(sums.shape[:2]))
    return Measured(np.array([f[metric] for f in found])[..., None], np.array([f["num_tokens"] for f in found]))


def cost_figure(path: Path, with_capture: bool) -> str:
    """Scores over cost of the rows at the chosen rates, a line per method, without or with what asking costs."""
    cost = _with_capture if with_capture else _seconds
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    every = _by_method(cost_rows(path))
    rows = {name: mine for name, mine in every.items() if _at_chosen_rate(name) in (*CURVES, *MAIN)}
    rows = {name: mine for name, mine in rows.items() if not name.endswith((WITH_CAPTURE, "search"))}
    longest = max(cost(mine[0]) for mine in rows.values()) / 60
    for metric, (title, _) in (("rouge_l", _SAMPLED["rouge_l"]), ("kl_sum", _TOKENS["kl_sum"])):
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, mine in rows.items():
            point = (cost(mine[0]) / 60, measured(mine, metric).value)
            curves.setdefault(short_name(name), []).append(point)
        start = measured(every["start"], metric).value
        curves["the start"] = [(0.0, start), (longest, start)]
        panels[title] = {name: tuple(map(list, zip(*sorted(points), strict=True))) for name, points in curves.items()}
    name, counted = ("cost-with-capture", "and of capture") if with_capture else ("cost", "without capture")
    return curves_chart(name, "Scores over cost", f"minutes of training, {counted}", panels)


def _reach(rows: _Rows) -> list[str]:
    """The default's cheapest row that is separated above all of another method's, beside the dearest of those.

    Rows with one training are left out: nothing says how far another training would be.
    """
    methods = {name: mine for name, mine in _by_method(rows).items() if len(mine) > 1 or name == "start"}
    found: dict[str, list[str]] = {}
    for row in methods:
        if (name := _at_chosen_rate(row)) is not None:
            found.setdefault(name, []).append(row)
    compared = ["start", *(row for of in found.values() for row in of)]
    values = {row: measured(methods[row], "rouge_l") for row in compared}
    draws = dict(zip(values, resample(list(values.values()), _SEED), strict=True))

    def above(own: str, other: str) -> Interval:
        return percentile_interval(values[own].value - values[other].value, draws[own] - draws[other], _LEVEL)

    ours = sorted(found.pop(OURS, []), key=lambda row: _seconds(methods[row][0]))
    lines = [
        ["", "costs tried, s", "best Rouge-L", "less the start's", "cost of the default above it, s",
         "its lead over the other's best row", "the other's dearest row costs, times",
         "with scores of references, times"]
    ]  # fmt: skip
    best = {name: max(of, key=lambda row: values[row].value) for name, of in found.items()}
    level = [name for name, row in best.items() if (above(row, "start").low or 0.0) <= 0.0]
    for name, row in sorted(best.items(), key=lambda item: -values[item[1]].value):
        tried = sorted({_seconds(methods[each][0]) for each in found[name]})
        cells = [name, ", ".join(f"{cost:.0f}" for cost in tried), f"{values[row].value:.4f}"]
        cells.append(with_interval(above(row, "start"), "+"))
        separated = [own for own in ours if all((above(own, other).low or 0.0) > 0.0 for other in found[name])]
        if not separated:
            lines.append([*cells, "none", "–", "–", "–"])
            continue
        own, dearest = methods[separated[0]][0], max((methods[each][0] for each in found[name]), key=_seconds)
        cells += [f"{_seconds(own):.0f}", with_interval(above(separated[0], row), "+")]
        ratios = (_seconds(dearest) / _seconds(own), _with_capture(dearest) / _with_capture(own))
        lines.append([*cells, *(f"{ratio:.1f}" for ratio in ratios)])
    if len(lines) == 1:
        return []
    return [
        "What a score costs, of the rows above at the chosen rates with more than one training. "
        f"Not separated above the start, which costs nothing here: {'; '.join(level) or 'none'}. Of these the ratio "
        "says that the default passes their best score before they do, not when they would. Beside each method: the "
        "cheapest row of the default that is separated above every row of it, by how much above its best, and how many "
        "times its cost the dearest of the method's rows is, none of which has that score. The ratio says how far the "
        "other method was tried. With scores of references: those that the steps read are added.",
        "",
        markdown(lines),
        "",
    ]


def tests_section(path: Path) -> str:
    """The section of the test sets: Rouge-L on each, their mean, and paired differences to the default."""
    content = json.loads(path.read_text())
    if not (rows := _test_rows(path)):
        return ""
    seeds = sorted({row["sampling_seed"] for row in content["rows"]})
    sets = {row["set"]: len(row["rouge_l"]) for row in content["rows"]}
    scores = [["", "seeds", "needs", *_COST_HEAD, *sets, "mean", "share of the teacher's", "distinct-2",
               "parameters, M", "tokens/s"]]  # fmt: skip
    scores += [
        [row.name, row.seeds, _needs(row.name), *row.costs, *row.scores, row.share, row.distinct, *row.size]
        for row in rows
    ]
    less = [["", *(f"{name} less the default's" for name in [*sets, "mean"]), "separated above, on each set"]]
    less += [[row.name, *row.less, row.above] for row in rows]
    parts = [
        "## Test sets, equal cost",
        "",
        f"From `{path}`, which `python benchmarks/experiments tests` makes: Rouge-L (F1) to references, temperature 1, "
        f"top-p 0.8, sampling seeds {', '.join(map(str, seeds))}, of answers to "
        f"{', '.join(f'{number} prompts of {name}' for name, number in sets.items())}; those of Vicuna have answers of "
        "GPT-3.5 for references, the others people's. The mean is that of the sets. Each frozen recipe was looked at "
        "once; the JSON says when. Intervals: 95 %, bootstrap over prompts, those of each set by themselves, and "
        "training seeds where there are several: over three trainings a rough guide, which does not cover another "
        "start, other training prompts or other answers of the teacher. Differences are paired by prompt. Bold: the "
        f"best student of a column; ≈: not separated from it. Weights in {content['dtype']} for sampling, logits "
        f"rounded to it but for those of {'; '.join((SET_SKEW, *OTHER_FORMS))}, which are float32. ²: see the tables "
        "of the screening prompts. Size and speed are those of the models in float32, one answer at a time on two CPU "
        f"cores. Equal cost is that of training. {_asked_before()} Needs and distinct-2: see the tables of the "
        "screening prompts.",
        "",
        markdown(scores),
        "",
        markdown(less),
        "",
    ]
    return "\n".join(parts)


def _asked_before() -> str:
    """What the teacher was asked for before the training of the frozen methods, in a sentence."""
    measured = times()
    if not {"captured", "scored"} <= measured.keys():
        return "What the teacher was asked for is not measured."
    captured = measured["captured"]
    answers_s = captured["all_response_tokens"] * captured["seconds"] / captured["response_tokens"]
    scores = {name: asked_s(METHODS[name], measured, frozen()[at_cost_one(name)].args.get("max_steps", STEPS))
              for name in FROZEN}  # fmt: skip
    told = ", ".join(f"{cost:.0f} s for {name}" for name, cost in scores.items() if cost)
    return (
        f"Left out is what the teacher was asked for: its answers, {answers_s:.0f} s, on which the start of all was "
        f"healed, and its scores of people's answers, {told}."
    )


def test_scores(path: Path) -> str:
    """The table of the test sets with the difference of the mean alone, for the README."""
    if not (path.is_file() and (rows := _test_rows(path))):
        return ""
    looks = json.loads(path.read_text())["rows"]
    head = ["", "seeds", *dict.fromkeys(row["set"] for row in looks), "mean", f"mean less that of {_SHOWN[OURS]}"]
    lines = [[*head, "share of the teacher's", "KL(teacher‖student), dev prompts", "parameters, M", "tokens/s"]]
    dev = _by_method(cost_rows(path.with_name("e8.json")))
    for row in rows:
        kl = f"{measured(dev[row.name], 'kl_sum').value:.2f}" if row.name in dev else "–"
        lines.append([short_name(row.name), row.seeds, *row.scores, row.less[-1], row.share, kl, *row.size])
    return markdown(lines) + "\n"


def not_better_section(main: Path) -> str:
    """What did not work: rows that end separated below the start they go on from."""
    rows = json.loads(main.read_text())["rows"]
    methods = _by_method(rows + [row for row in cost_rows(main.with_name("e8.json")) if row not in rows])
    values = {name: measured(mine, "rouge_l") for name, mine in methods.items()}
    draws = dict(zip(values, resample(list(values.values()), _SEED), strict=True))
    below = {}
    for name, value in values.items():
        gap = percentile_interval(value.value - values["start"].value, draws[name] - draws["start"], _LEVEL)
        if name not in UNTRAINED and gap.high is not None and gap.high < 0:
            below[name] = gap
    if not below:
        return ""
    lines = [["", "seeds", "Rouge-L less the start's"]]
    lines += [
        [name, _seeds_of(methods[name]), with_interval(gap, "+")]
        for name, gap in sorted(below.items(), key=lambda item: item[1].value or 0.0)
    ]
    return (
        "## What did not work\n\nRows of the main table and of equal cost that end below the start which they go on "
        "from, by Rouge-L to references on the screening prompts, with an interval that excludes 0. Of the members of "
        'the temporal-difference family "Objectives compared" says it, twin by twin, and of all that was tried '
        f"[LOG.md](LOG.md).\n\n{markdown(lines)}\n"
    )


@dataclass(frozen=True)
class _TestRow:
    """Cells of one method: Rouge-L and its difference to the default's, on each set and in the mean, and the rest.

    ``above``: what it is separated above, on each set and in the mean.
    """

    name: str
    seeds: str
    costs: list[str]
    scores: list[str]
    less: list[str]
    above: str
    share: str
    distinct: str
    size: list[str]


def _test_rows(path: Path) -> list[_TestRow]:
    """Rows of the table of the test sets; none before the default was looked at on all of them."""
    looks, trained = json.loads(path.read_text())["rows"], _by_method(cost_rows(path.with_name("e8.json")))
    rows, sets = looks_complete(looks), list(dict.fromkeys(row["set"] for row in looks))
    if not any(row["method"].startswith(OURS) for row in rows):
        return []
    values: dict[str, dict[str, Measured]] = {}
    for name in sets:
        for method, mine in _by_method([row for row in rows if row["set"] == name]).items():
            trainings = [[r["rouge_l"] for r in mine if r["seed"] == seed] for seed in {r["seed"] for r in mine}]
            sums = np.array([np.transpose(answers) for answers in trainings])
            values.setdefault(name, {})[method] = Measured(sums, np.ones(sums.shape[:2]))
    draws = {name: dict(zip(of, resample(list(of.values()), _SEED), strict=True)) for name, of in values.items()}
    methods = list(values[sets[0]])
    num_seeds = {method: len(values[sets[0]][method].sums_RPS) for method in methods}
    # Of each set, and then of the mean.
    points = {method: np.array([values[name][method].value for name in sets]) for method in methods}
    points = {method: np.append(of, of.mean()) for method, of in points.items()}
    drawn = {method: np.array([draws[name][method] for name in sets]) for method in methods}
    drawn = {method: np.append(of, of.mean(0, keepdims=True), axis=0) for method, of in drawn.items()}
    marks = [
        _marks({m: points[m][i] for m in methods}, num_seeds, {m: drawn[m][i] for m in methods}, True)
        for i in range(len(sets) + 1)
    ]
    ours = next(method for method in methods if method.startswith(OURS))
    models, distinct = times().get("models", {}), _by_method([row for row in rows if "distinct_2" in row])
    found = []
    for method in sorted(methods, key=lambda method: -points[method][-1]):
        cells: dict[str, list[str]] = {"": [], "+": []}
        gaps = {
            other: [
                percentile_interval(float(points[method][i] - points[other][i]), of - drawn[other][i], _LEVEL)
                for i, of in enumerate(drawn[method])
            ]
            for other in methods
        }
        below = [name for name, gap in gaps.items() if all(of.low and of.low > 0 for of in gap)]
        for sign, of in cells.items():
            for i, column in enumerate(marks):
                shown = gaps[ours][i] if sign else percentile_interval(points[method][i], drawn[method][i], _LEVEL)
                form = "{}" if sign else column.get(method, "{}")
                of.append("–" if sign and method == ours else form.format(with_interval(shown, sign)))
        share = "–"
        if "teacher" in points:
            ratio = points[method][-1] / points["teacher"][-1], drawn[method][-1] / drawn["teacher"][-1]
            share = with_interval(percentile_interval(float(ratio[0]), ratio[1], _LEVEL), "", ".1%")
        of_model = models.get("teacher" if method == "teacher" else "student")
        size = [f"{of_model['num_parameters'] / 1e6:.1f}", f"{of_model['decode_tokens_per_s']:.1f}"] if of_model else []
        mine = [{"method": method}] if method in UNTRAINED else trained[method]
        bigrams = [np.mean(row["distinct_2"]) for row in distinct.get(method, [])]
        found.append(
            _TestRow(
                method,
                _seeds_of(mine, num_seeds[method]),
                _costs(mine[0]),
                cells[""],
                cells["+"],
                "; ".join(name if name in UNTRAINED else _method_of(name) for name in below) or "none",
                share,
                f"{np.mean(bigrams):.2f}" if bigrams else "–",
                size or ["–", "–"],
            )
        )
    return found


def looks_complete(rows: _Rows) -> _Rows:
    """Rows of the trainings that every test set was answered by with every sampling seed."""
    taken = Counter((row["method"], row["seed"]) for row in rows)
    num_looks = len({(row["set"], row["sampling_seed"]) for row in rows})
    return [row for row in rows if taken[row["method"], row["seed"]] == num_looks]


def paper_section(path: Path, tests: Path) -> str:
    """The paper's figures beside ours, where the test sets were looked at."""
    paper = json.loads(path.read_text())
    rows = looks_complete(json.loads(tests.read_text())["rows"])
    lines = [["", *paper["pairs"], "here, 135M to 81M"]]

    def here(method: str) -> str:
        scores = [
            [r["rouge_l"] for r in rows if r["set"] == name and r["method"].startswith(f"{method}, learning")]
            for name in paper["sets"]
        ]
        return " / ".join(f"{100 * np.mean(of):.1f}" for of in scores) if all(scores) else "–"

    for row in paper["rows"]:
        cells = [" / ".join(f"{v:.1f}" for v in of) for of in row["rouge_l"]]
        lines.append([row["name"], *cells, "–" if row["method"] == "bellman_distill" else here(row["method"])])
    lines.append([f"{_SHOWN[OURS]}, not in the paper", *["–"] * len(paper["pairs"]), here(OURS)])
    return "\n".join(
        [
            "## Beside the paper's figures",
            "",
            f"{paper['source']} (`{path}`); here from `{tests}`. Rouge-L to references, in percent: "
            f"{' / '.join(paper['sets'])}. What differs here: the teacher is 11 to 50 times smaller, the student 1.5 "
            "to 6 times; the teacher is a chat model that was not fine-tuned on Dolly; 1,000 training prompts, answers "
            "of at most 64 tokens, minutes of training on two CPU cores at equal cost, the chat template in place of "
            "Alpaca's. Bellman Distill has no row: it was not taken to the test sets, as with a temporal part it was "
            'no better by KL than without ("Objectives compared", the real scale of which was measured on 48 prompts '
            "of DollyEval). The note has the same figures for SFT of GPT-2 and of OPT, perhaps a slip. The last row is "
            "iq_learn with alpha = inf, in which nothing is temporal, on answers of people that the teacher scored. "
            "Columns do not compare.",
            "",
            markdown(lines),
            "",
        ]
    )


def _at_chosen_rate(row: str) -> str | None:
    """Method of a row of equal cost at the chosen rate, with whatever number of steps."""
    chosen = {at_rate(name, rate)[0]: name for name, rate in CHOSEN.items()}
    return chosen.get(row.split(", cost")[0].removesuffix(", search"))


def short_name(row: str) -> str:
    """Name of a row where it is the only one of its method."""
    name = row if row in UNTRAINED else _method_of(row)
    return _SHOWN.get(name, name)


def _method_of(row: str) -> str:
    return next(name for name in sorted(_NAMED, key=len, reverse=True) if row.startswith(name))


def _seconds(row: dict[str, Any]) -> float:
    """Cost of a row's training by the quiet times."""
    return row["steps"] * times()["step_s"][_method_of(row["method"])]


def _with_capture(row: dict[str, Any]) -> float:
    """The same with what asking the teacher for what its steps read costs."""
    return _seconds(row) + asked_s(METHODS[_method_of(row["method"])], times(), row["steps"])


def _costs(row: dict[str, Any]) -> list[str]:
    """Cells of a row: steps, cost, cost with what asking the teacher first costs."""
    if row["method"] in UNTRAINED:
        return ["–", "–", "–"]
    return [str(row["steps"]), f"{_seconds(row):.0f}", f"{_with_capture(row):.0f}"]


def _by_method(rows: _Rows) -> dict[str, _Rows]:
    methods: dict[str, _Rows] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def _table(rows: _Rows, costs: Any = None) -> str:
    methods = _by_method(rows)
    ours = _best_of_ours(methods)
    values = {metric: {name: measured(mine, metric) for name, mine in methods.items()} for metric in _METRICS}
    draws = {metric: dict(zip(of, resample(list(of.values()), _SEED), strict=True)) for metric, of in values.items()}
    against = "Rouge-L less that of " + ("the default" if ours and ours.startswith(OURS) else str(ours))
    extra = _COST_HEAD if costs else []
    lines = [["", "seeds", "needs", *extra, *(title for title, _ in _METRICS.values()), against,
              "share of the teacher's Rouge-L", *(title for title, _ in _ANSWERS.values())]]  # fmt: skip
    points = {metric: {name: value.value for name, value in of.items()} for metric, of in values.items()}
    num_seeds = {name: len(mine) for name, mine in methods.items()}
    marks = {metric: _marks(points[metric], num_seeds, draws[metric], more) for metric, (_, more) in _METRICS.items()}
    for name in sorted(methods, key=lambda name: (name not in UNTRAINED, -values["rouge_l"][name].value)):
        mine = methods[name]
        cells = [_seeds_of(mine), _needs(name), *(costs(mine[0]) if costs else [])]
        for metric in _METRICS:
            shown = with_interval(percentile_interval(values[metric][name].value, draws[metric][name], _LEVEL))
            cells.append(marks[metric].get(name, "{}").format(shown))
        gap = "–"
        if ours and name != ours:
            point = values["rouge_l"][name].value - values["rouge_l"][ours].value
            gap = with_interval(
                percentile_interval(point, draws["rouge_l"][name] - draws["rouge_l"][ours], _LEVEL), "+"
            )
        share = "–"
        if "teacher" in methods:
            point = values["rouge_l"][name].value / values["rouge_l"]["teacher"].value
            of_draws = draws["rouge_l"][name] / draws["rouge_l"]["teacher"]
            share = with_interval(percentile_interval(point, of_draws, _LEVEL), "", ".1%")
        lines.append([name, *cells, gap, share, *(_of_answers(mine, key, form) for key, (_, form) in _ANSWERS.items())])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head and whose first column is text."""
    head, *body = lines
    ruled = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ruled)


def _seeds_of(rows: _Rows, number: int | None = None) -> str:
    """How many training seeds, of these rows if no other number is given, and whether one has the start's batches."""
    if (row := rows[0]["method"]) in UNTRAINED:
        return "–"
    number, method = number or len(rows), _NAMED[_method_of(row)]
    reads_answers = not method.references and (method.rollouts or {}).get("share") != 1
    again = reads_answers and any(row["seed"] == 0 and "data_seed" not in row for row in rows)
    return f"{number}{'²' if again else '¹' if number == 1 else ''}"


def _needs(row: str) -> str:
    """What the training of a row needs beside its store."""
    if row in UNTRAINED:
        return "–"
    method = _NAMED[_method_of(row)]
    args = TDistillConfig("unused", **method.args)
    objective = args.build_objective()
    off_support = OffSupport(args.off_support) if objective.uses_off_support else None
    needs = {
        "teacher": objective.needs_teacher,
        "rollouts": method.rollouts is not None,
        "vocabulary": method.whole or "vocabulary" in (objective.support, off_support and off_support.support),
    }
    return ", ".join(name for name, needed in needs.items() if needed) or "–"


def _of_answers(rows: _Rows, key: str, form: str) -> str:
    """Mean over the answers of rows that have it; rows of before it was measured do not."""
    found = [row["screening"][key] for row in rows if key in row["screening"]]
    return format(np.mean(found), form) if found else "–"


def _marks(
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
        gap = percentile_interval(points[name] - points[best], draws[name] - draws[best], _LEVEL)
        if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
            marks[name] = "≈ {}"
    return marks


def _best_of_ours(methods: dict[str, _Rows]) -> str | None:
    """The default at equal cost; without it, of the rows of its objective the one with most seeds, then Rouge-L."""
    if (name := at_cost_one(OURS)) in methods:
        return name
    own = [name for name in methods if name.startswith(OURS)] or [n for n in methods if n.startswith("bellman_distill")]
    return max(own, key=lambda name: (len(methods[name]), measured(methods[name], "rouge_l").value), default=None)


def with_interval(interval: Interval, sign: str = "", digits: str = ".4f") -> str:
    """A value and the ends of its interval; the value alone where the data define none."""
    value, *ends = (
        "" if number is None else format(number, sign + digits)
        for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{', '.join(ends)}]" if all(ends) else value
