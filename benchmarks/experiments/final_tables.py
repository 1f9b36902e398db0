"""The tables of the test sets, for docs/results.md and the README."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plan import (
    FROZEN,
    FROZEN_WITH_CAPTURE,
    METHODS,
    OTHER_FORMS,
    OURS,
    SET_SKEW,
    STEPS,
    TAKEN_LAST,
    WITH_CAPTURE,
    asked_s,
    at_cost_one,
    frozen,
    times,
)
from rows import (
    COST_HEAD,
    LEVEL,
    SEED,
    SHOWN,
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
    seeds_of,
    short_name,
    with_interval,
)

from tdistill.resampling import Measured, percentile_interval, resample


def tests_section(path: Path) -> str:
    """The section of the test sets: Rouge-L on each, their mean, and paired differences to the sampled form."""
    content = json.loads(path.read_text())
    if not (rows := _test_rows(path)):
        return ""
    seeds = sorted({row["sampling_seed"] for row in content["rows"]})
    sets = {row["set"]: len(row["rouge_l"]) for row in content["rows"]}
    scores = [["", "seeds", "needs", *COST_HEAD, *sets, "mean", "share of the teacher's", "distinct-2",
               "parameters, M", "tokens/s"]]  # fmt: skip
    scores += [
        [row.name, row.seeds, needs_of(row.name), *row.costs, *row.scores, row.share, row.distinct, *row.size]
        for row in rows
    ]
    counted = [f"{name}, {WITH_CAPTURE}" for name in FROZEN_WITH_CAPTURE]
    less = [
        [
            "",
            *(f"{name} less the sampled form's" for name in [*sets, "mean"]),
            "above in the mean; *: on each set too",
        ]
    ]
    less += [[row.name, *row.less, row.above] for row in rows]
    forms = [row for row in rows if method_shown(row.name) in (OURS, *OTHER_FORMS)]
    over = [["", *(method_shown(form.name) for form in forms)]]
    over += [[row.name, *(form.over[row.name] for form in forms)] for row in rows if row not in forms]
    parts = [
        "## Test sets, equal cost",
        "",
        f"From `{path}`, which `python benchmarks/experiments tests` makes: Rouge-L (F1) to references, temperature 1, "
        f"top-p 0.8, sampling seeds {', '.join(map(str, seeds))}, of answers to "
        f"{', '.join(f'{number} prompts of {name}' for name, number in sets.items())}; those of Vicuna have answers of "
        "GPT-3.5 for references, the others people's. The mean is that of the sets. Each frozen recipe was looked at "
        "once; the JSON says when. Intervals: 95 %, bootstrap over prompts, those of each set by themselves, and "
        "training seeds where there are several: over three trainings a rough guide, which does not cover another "
        "start, other training prompts or other answers of the teacher. Differences are paired by prompt. Above: with "
        "an interval of the difference that excludes 0. Bold: the best student of a column; ≈: not separated from it. "
        f"Weights in {content['dtype']} for sampling, logits "
        f"rounded to it but for those of {'; '.join((SET_SKEW, *OTHER_FORMS, *TAKEN_LAST, *counted))}, which are "
        "float32. ²: see the tables of the screening prompts. Size and speed are those of the models in float32, one "
        f"answer at a time on two CPU cores. Equal cost is that of training. {_asked_before()} Needs and distinct-2: "
        "see the tables of the screening prompts.",
        "",
        markdown(scores),
        "",
        markdown(less),
        "",
        "The mean of each form of iq_learn less that of the row's method:",
        "",
        markdown(over),
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
    head = ["", "seeds", *dict.fromkeys(row["set"] for row in looks), "mean", f"mean less that of {SHOWN[OURS]}"]
    lines = [[*head, "share of the teacher's", "KL(teacher‖student), dev prompts", "parameters, M", "tokens/s"]]
    dev = by_method(cost_rows(path.with_name("e8.json")))
    for row in rows:
        kl = f"{measured(dev[row.name], 'kl_sum').value:.2f}" if row.name in dev else "–"
        lines.append([short_name(row.name), row.seeds, *row.scores, row.less[-1], row.share, kl, *row.size])
    return markdown(lines) + "\n"


@dataclass(frozen=True)
class _TestRow:
    """Cells of one method: Rouge-L and its difference to the sampled form's, on each set and in the mean, and the rest.

    ``above``: what it is separated above in the mean, and whether on each set too. ``over``: the difference of its
    mean to that of each method.
    """

    name: str
    seeds: str
    costs: list[str]
    scores: list[str]
    less: list[str]
    above: str
    over: dict[str, str]
    share: str
    distinct: str
    size: list[str]


def _test_rows(path: Path) -> list[_TestRow]:
    """Rows of the table of the test sets; none before the sampled form was looked at on all of them."""
    looks, trained = json.loads(path.read_text())["rows"], by_method(cost_rows(path.with_name("e8.json")))
    rows, sets = looks_complete(looks), list(dict.fromkeys(row["set"] for row in looks))
    if not any(row["method"].startswith(OURS) for row in rows):
        return []
    values: dict[str, dict[str, Measured]] = {}
    for name in sets:
        for method, mine in by_method([row for row in rows if row["set"] == name]).items():
            trainings = [[r["rouge_l"] for r in mine if r["seed"] == seed] for seed in {r["seed"] for r in mine}]
            sums = np.array([np.transpose(answers) for answers in trainings])
            values.setdefault(name, {})[method] = Measured(sums, np.ones(sums.shape[:2]))
    draws = {name: dict(zip(of, resample(list(of.values()), SEED), strict=True)) for name, of in values.items()}
    methods = list(values[sets[0]])
    num_seeds = {method: len(values[sets[0]][method].sums_RPS) for method in methods}
    # Of each set, and then of the mean.
    points = {method: np.array([values[name][method].value for name in sets]) for method in methods}
    points = {method: np.append(of, of.mean()) for method, of in points.items()}
    drawn = {method: np.array([draws[name][method] for name in sets]) for method in methods}
    drawn = {method: np.append(of, of.mean(0, keepdims=True), axis=0) for method, of in drawn.items()}
    marks = [
        marks_of({m: points[m][i] for m in methods}, num_seeds, {m: drawn[m][i] for m in methods}, True)
        for i in range(len(sets) + 1)
    ]
    ours = next(method for method in methods if method.startswith(OURS))
    models, distinct = times().get("models", {}), by_method([row for row in rows if "distinct_2" in row])
    found = []
    for method in sorted(methods, key=lambda method: -points[method][-1]):
        cells: dict[str, list[str]] = {"": [], "+": []}
        gaps = {
            other: [
                percentile_interval(float(points[method][i] - points[other][i]), of - drawn[other][i], LEVEL)
                for i, of in enumerate(drawn[method])
            ]
            for other in methods
        }
        above = {name: [bool(of.low and of.low > 0) for of in gap] for name, gap in gaps.items()}
        for sign, of in cells.items():
            for i, column in enumerate(marks):
                shown = gaps[ours][i] if sign else percentile_interval(points[method][i], drawn[method][i], LEVEL)
                form = "{}" if sign else column.get(method, "{}")
                of.append("–" if sign and method == ours else form.format(with_interval(shown, sign)))
        share = "–"
        if "teacher" in points:
            ratio = points[method][-1] / points["teacher"][-1], drawn[method][-1] / drawn["teacher"][-1]
            share = with_interval(percentile_interval(float(ratio[0]), ratio[1], LEVEL), "", ".1%")
        of_model = models.get("teacher" if method == "teacher" else "student")
        size = [f"{of_model['num_parameters'] / 1e6:.1f}", f"{of_model['decode_tokens_per_s']:.1f}"] if of_model else []
        mine = [{"method": method}] if method in UNTRAINED else trained[method]
        bigrams = [np.mean(row["distinct_2"]) for row in distinct.get(method, [])]
        found.append(
            _TestRow(
                method,
                seeds_of(mine, num_seeds[method]),
                costs_of(mine[0]),
                cells[""],
                cells["+"],
                "; ".join(method_shown(of) + "*" * all(on) for of, on in above.items() if on[-1]) or "none",
                {other: with_interval(gap[-1], "+") for other, gap in gaps.items()},
                share,
                f"{np.mean(bigrams):.2f}" if bigrams else "–",
                size or ["–", "–"],
            )
        )
    return found


def looks_complete(rows: Rows) -> Rows:
    """Rows of the trainings that every test set was answered by with every sampling seed."""
    taken = Counter((row["method"], row["seed"]) for row in rows)
    num_looks = len({(row["set"], row["sampling_seed"]) for row in rows})
    return [row for row in rows if taken[row["method"], row["seed"]] == num_looks]


def paper_section(path: Path, tests: Path) -> str:
    """The paper's figures beside ours, where the test sets were looked at."""
    paper = json.loads(path.read_text())
    rows = looks_complete(json.loads(tests.read_text())["rows"])
    cost_one = [row for row in rows if not row["method"].endswith(WITH_CAPTURE)]
    lines = [["", *paper["pairs"], "here, 135M to 81M"]]

    def here(method: str) -> str:
        scores = [
            [r["rouge_l"] for r in cost_one if r["set"] == name and r["method"].startswith(f"{method}, learning")]
            for name in paper["sets"]
        ]
        return " / ".join(f"{100 * np.mean(of):.1f}" for of in scores) if all(scores) else "–"

    for row in paper["rows"]:
        cells = [" / ".join(f"{v:.1f}" for v in of) for of in row["rouge_l"]]
        lines.append([row["name"], *cells, "–" if row["method"] == "bellman_distill" else here(row["method"])])
    lines.append([f"{SHOWN[OURS]}, not in the paper", *["–"] * len(paper["pairs"]), here(OURS)])
    return "\n".join(
        [
            "## Beside the paper's figures",
            "",
            f"{paper['source']} (`{path}`); here from `{tests}`. Rouge-L to references, in percent: "
            f"{' / '.join(paper['sets'])}. What differs here: the teacher is 11 to 50 times smaller, the student 1.5 "
            "to 6 times; the teacher is a chat model that was not fine-tuned on Dolly; 1,000 training prompts, answers "
            "of at most 64 tokens, minutes of training on two CPU cores at equal cost, the chat template in place of "
            "Alpaca's. Bellman Distill has no row: it was not taken to the test sets, as with a temporal part it was "
            'no better by KL than without, on the teacher\'s answers ("Objectives compared", the real scale of which '
            "was measured on 48 prompts of DollyEval). The paper's figures were not checked against it; those of SFT "
            "are the same for GPT-2 and OPT, perhaps a slip. The last row is iq_learn with alpha = inf, in which "
            "nothing is temporal, on answers of people that the teacher scored. "
            "Columns do not compare.",
            "",
            markdown(lines),
            "",
        ]
    )
