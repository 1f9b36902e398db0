"""Write docs/results.md, its figures and the tables of other documents from the JSON in benchmarks/results."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tdistill.files import write_atomically
from tdistill.reports.load import read_results
from tdistill.reports.performance import bars_table, headline, performance_table
from tdistill.reports.plots import sparsity_study_chart
from tdistill.reports.tables import markdown_table, results_section

sys.path.insert(0, str(Path(__file__).parent / "objectives"))
sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import accuracy
import decoding
import finals
import perplexity
import prefixes
from final_tables import paper_section, test_scores, tests_section
from plan import EXPERIMENTS, missing
from rows import markdown
from table import comparison_section
from tables import cost_figure, experiment_section, not_better_section, own_answers_section, screening_section
from variants import VARIANTS

RESULTS = Path("benchmarks/results")
FIGURES = Path("docs/figures")
COLUMNS = {
    "kl_set_tail": "KL over set and tail (nats/token)",
    "kl_teacher_student": "KL (nats/token)",
    "nll": "loss on teacher answers (nats/token)",
    "agreement_top1": "top-1 agreement",
    "mass_outside_set": "mass outside A_p",
}

INTRODUCTION = """# Results

Numbers are read from the JSON file named above them, those of setups that experiments share from
`benchmarks/results/experiments/e1.json`, costs and sizes from `times.json` there. What is shared and what was chosen on
which data: [experiments.md](experiments.md). What follows from it: [LOG.md](LOG.md).

The questions, and where they are answered:

- Which method gives the better student at equal cost? [Test sets](#test-sets-equal-cost), and of what else was tried
  [Equal cost](#equal-cost-and-what-a-score-costs-e8) and the [Main table](#main-table-equal-response-tokens-e1).
- How much of that is decoding? [Smaller sets at decoding](#smaller-sets-at-decoding).
- Is it the temporal part that helps? On the teacher's answers, by KL, no: [tiny scale](#objectives-compared-tiny-scale)
  (E3, E4, E7). On people's answers α = 10 ends 0.05 nats closer and 0.013 lower by Rouge-L; 0.04 of the 0.05 is there
  with γ = 0 too (one training each, [Main table](#main-table-equal-response-tokens-e1)).
- What did not work? [What did not work](#what-did-not-work), and in words [LOG.md](LOG.md).

*The sampled form* is `bellman_distill, sampled, off-support weight 3, references`: `iq_learn` with α = ∞, the sampled
first-order term, p = 0.5 and an off-support weight of 3 on people's answers that the teacher scored. Nothing in it is
temporal, and it is not the library's default, which has the expected first-order term, weight 1 and the p of its store,
0.8 unless the capture says otherwise. Other forms, with `both` terms (at weight 10 too) and with the expected one, were
taken to the test sets after it, and so was `bellman_distill, cost 1`: the library's default but for p = 0.5, on the
teacher's answers.
None of these is the paper's method: that is `bellman_distill, as printed`. Names of rows:

- `bellman_distill`: `iq_learn` with α = ∞, at p = 0.5 unless the name has another, with the expected first-order term
  unless it says `sampled` or `both` (their mean). A name that begins with `sampled` has off-support control `tail`, the
  exact mass outside the sets, in place of `negatives`, draws.
- `references`: trained on people's answers to the training prompts, else on the teacher's. `seqkd`: SFT on the latter.
- `set`: the divergence is taken on the stored sets, with off-support control; `store`: on the sets and the mass outside
  as one token; neither: on whole distributions, with the teacher in memory.
- `target teacher`: off-support control asks for the mass that the teacher leaves outside the sets, else for none.
  `outside kept`: tokens of the answers outside the sets are trained on, else dropped.
- `10 nats`: in place of a p, the loss of value that a trajectory may have ([choosing p](choosing-p.md)).
- `cost 0.25`: as many steps as this share of the budget pays for; `search`: a row that a learning rate was chosen by.
"""


def page() -> str:
    """The whole page: what users ask first, then what it rests on."""
    runs = RESULTS / "experiments"
    tests, exposure, batches = runs / "tests.json", runs / "exposure.json", RESULTS / "batches.json"
    demo = RESULTS / "demo.json"
    parts = [INTRODUCTION]
    if tests.is_file():
        parts += [tests_section(tests), paper_section(runs / "paper.json", tests)]
    if (runs / "decoding.json").is_file():
        parts.append(decoding.section(runs / "decoding.json"))
    if exposure.is_file():
        parts.append(prefixes.section(exposure, f"{FIGURES.name}/exposure.svg"))
    if (runs / "perplexity.json").is_file():
        parts.append(perplexity.section(runs / "perplexity.json"))
    if (runs / "accuracy.json").is_file():
        parts.append(accuracy.section(runs / "accuracy.json"))
    if made := [runs / f"{name}.json" for name in EXPERIMENTS if (runs / f"{name}.json").is_file()]:
        parts += [screening_section(), *map(experiment_section, made)]
    if (runs / "e1.json").is_file():
        parts.append(own_answers_section(runs / "e1.json"))
        parts.append(not_better_section(runs / "e1.json"))
    if (runs / "sparsity.json").is_file():
        parts.append(_sparsity(runs / "sparsity.json"))
    parts += [
        comparison_section(path)
        for scale in ("tiny", "real")
        if (path := RESULTS / f"objectives_{scale}.json").is_file()
    ]
    if demo.is_file():
        parts.append(results_section(demo))
    parts.append(
        _section(
            "Start",
            "start.json",
            "start",
            "python benchmarks/start.py runs/demo benchmarks/results/start.json",
            "Before any training, dev split.",
        )
    )
    if batches.is_file():
        facts = json.loads(batches.read_text())
        sizes = ", ".join(map(str, facts["batch_sizes"]))
        parts.append(
            f"## Batch size and answers\n\nFrom `{batches}`, which `tdistill check batches recipes/demo.yaml --json` "
            f"makes again. Sums of floats may depend on the shape of a batch.\n\nOf {facts['num_answers']} answers, "
            f"{facts['changed_share']:.1%} are not the same at batch sizes {sizes}.\n"
        )
    parts.append(_not_run())
    return "\n".join(parts)


# What the library measures and no experiment asks for, and why.
_NOT_PLANNED = (
    "Not planned: win rates by a judge, as there is none where the experiments run, and right answers of E9's students."
)


def _not_run() -> str:
    """The section of what is planned and has no row yet; empty where all have."""
    left: dict[str, dict[str, list[int]]] = {}
    for name, experiment in EXPERIMENTS.items():
        for what, method, _, seed in missing(name):
            shown = method if len(experiment.groups) == 1 else f"{what.name}: {method}"
            left.setdefault(f"{experiment.title} (`{name}`)", {}).setdefault(shown, []).append(seed)
    for scale, variants in VARIANTS.items():
        path = RESULTS / f"objectives_{scale}.json"
        done = Counter(row["variant"] for row in json.loads(path.read_text())["rows"]) if path.is_file() else Counter()
        for name, variant in variants.items():
            if seeds := list(range(done[name], variant.num_seeds)):
                left.setdefault(f"Objectives compared, {scale} scale (`benchmarks/objectives`)", {})[name] = seeds
    for method, _, seed, *_ in finals.missing():
        left.setdefault("Test sets (`tests`)", {}).setdefault(method, []).append(seed)
    studies = {"exposure": prefixes, "decoding": decoding, "perplexity": perplexity, "accuracy": accuracy}
    for name, study in studies.items():
        for method, _, seed, *_ in study.missing():
            left.setdefault(f"`{name}`", {}).setdefault(method, []).append(seed)
    lines = [
        f"- {title}: " + "; ".join(method + _seeds(seeds) for method, seeds in of.items()) for title, of in left.items()
    ]
    head = "Planned in `benchmarks/experiments/plan.py`; of training seed 0 where none is named."
    return "## Not run yet\n\n" + "\n".join([head, "", *lines, "", _NOT_PLANNED]) + "\n"


def _seeds(seeds: list[int]) -> str:
    several = sorted(set(seeds))
    shown = f"s {several[0]} to {several[-1]}" if len(several) > 2 else f" {' and '.join(map(str, several))}"
    return "" if several == [0] else f" (training seed{shown})"


def _sparsity(path: Path) -> str:
    study = json.loads(path.read_text())
    rows = [
        [f"{r['p']:g}", f"{r['size']['mean']:.1f}", f"{r['size']['median']:g}", f"{r['covered_mass']['mean']:.3f}",
         f"{r['cut_share']:.1%}", f"{r['q_loss_nats']['median']:.1f}"]
        for r in study["by_p"]
    ]  # fmt: skip
    head = ["p", "mean actions in A_p", "median", "covered mass", "sets cut", "loss of value, median, nats"]
    return (
        f"## Sparsity of the teacher\n\nFrom `{path}`, which `tdistill check sparsity "
        f"runs/experiments/claims/base/run/store/train --json` prints: {study['num_states']:,} states of the main "
        f"table's store. Sets hold at most {study['cap']} tokens; those cut there have less than "
        f"p.\n\n{markdown([head, *rows])}\n\n![Sparsity]({FIGURES.name}/sparsity.svg)\n"
    )


def _sparsity_figure(path: Path) -> str:
    return sparsity_study_chart(json.loads(path.read_text()))


FIGURE_SOURCES = {
    "cost.svg": ("e8.json", partial(cost_figure, with_capture=False)),
    "cost-with-scores.svg": ("e8.json", partial(cost_figure, with_capture=True)),
    "sparsity.svg": ("sparsity.json", _sparsity_figure),
    "exposure.svg": ("exposure.json", prefixes.chart),
}


def _section(title: str, file: str, key: str, command: str, note: str) -> str:
    path = RESULTS / file
    if not path.is_file():
        return ""
    content: dict[str, Any] = json.loads(path.read_text())
    columns = [name for name in COLUMNS if name in content["rows"][0]]
    lines = [f"## {title}", "", f"From `{path}`, which `{command}` makes again. {note}", ""]
    if "teacher_nll" in content:
        lines += [f"The teacher's own loss is {content['teacher_nll']:.3f}.", ""]
    lines += ["| | " + " | ".join(COLUMNS[name] for name in columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    lines += [f"| {row[key]} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |" for row in content["rows"]]
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    """README.md with its tables made new."""
    demo = markdown_table(read_results(RESULTS / "demo.json"))
    tests = RESULTS / "experiments" / "tests.json"
    tables = {
        "methods": f"At equal cost of training, from `{tests}`: Rouge-L to references on the test sets:\n\n"
        + test_scores(tests),
        "results": f"`make demo`, from `{RESULTS}/demo.json`:\n\n{demo}",
        "decoding": decoding.lead(RESULTS / "experiments" / "decoding.json", "sft on references"),
        "costs": f"`tdistill bench`, from `{RESULTS}/bench_*.json`:\n\n{headline(measurements())}",
    }
    return fill(text, tables)


def measurements() -> dict[str, Any]:
    """Contents of the JSON files of ``tdistill bench``, by kind."""
    files = {
        kind: RESULTS / f"bench_{kind}.json" for kind in ("step", "memory", "accuracy", "scaling", "store", "capture")
    }
    return {kind: json.loads(path.read_text()) for kind, path in files.items() if path.is_file()}


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with a table between each pair of markers."""
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"The marker <!-- {name} --> must stand in the page once; it stands there {count} times.")
    return text


def performance(text: str) -> str:
    """docs/performance.md with its tables made new."""
    found = measurements()
    rows = json.loads((RESULTS / "log_prob_bits.json").read_text())["rows"]
    bits = [
        [r["objective"], f"{r['loss_change']:.2%}", f"{r['gradient_cosine']:.5f}", f"{r[_BETWEEN]:.2f}"] for r in rows
    ]
    head = ["objective", "change of the loss", "cosine of the gradients", "between two micro-batches"]
    tables = {kind: performance_table(kind, content) for kind, content in found.items()}
    return fill(text, {"bars": bars_table(found), "bits": markdown([head, *bits]) + "\n", **tables})


_BETWEEN = "gradient_cosine_between_batches"


def store_format(text: str) -> str:
    """docs/store-format.md with its tables made new."""
    content = measurements()["store"]
    size = {(r["p"], r["cap"], r["log_prob_bits"]): r for r in content["by_p_and_cap"]}
    masses, caps = (sorted({key[i] for key in size}) for i in (0, 1))
    sizes = [
        [f"{p:g}"]
        + [
            f"{size[p, cap, 8][_BYTES]:.1f} / {size[p, cap, 16][_BYTES]:.1f} ({size[p, cap, 8]['mean_set_size']:.1f})"
            for cap in caps
        ]
        for p in masses
    ]
    bytes_of: dict[str, dict[str, float]] = {}
    for r in content["encodings"]:
        if r["zstd_level"] == 19:
            bytes_of.setdefault(f"`{r['column']}`: {r['representation']}", {})[r["encoding"]] = r[_BYTES]
    names = list(next(iter(bytes_of.values())))
    encodings = [[what, *(f"{found[name]:.1f}" for name in names)] for what, found in bytes_of.items()]
    return fill(
        text,
        {
            "sizes": markdown([["p", *(f"cap {cap}" for cap in caps)], *sizes]) + "\n",
            "encodings": markdown([["", *names], *encodings]) + "\n",
        },
    )


_BYTES = "bytes_per_response_token"


if __name__ == "__main__":
    for path, made in ((Path("docs/performance.md"), performance), (Path("docs/store-format.md"), store_format)):
        write_atomically(path, made(path.read_text(encoding="utf-8")))
    write_atomically(Path("docs/results.md"), page())
    for figure, (made_of, draw) in FIGURE_SOURCES.items():
        if (source := RESULTS / "experiments" / made_of).is_file():
            write_atomically(FIGURES / figure, draw(source) + "\n")
    write_atomically(Path("README.md"), readme(Path("README.md").read_text(encoding="utf-8")))
