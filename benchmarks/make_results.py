"""Write docs/results.md from the committed JSON in benchmarks/results.

python benchmarks/make_results.py [OUTPUT]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tdistill.reports.load import read_results
from tdistill.reports.performance import bars_table, headline, performance_table
from tdistill.reports.tables import markdown_table, results_page
from tdistill.reports.write import write_atomically

sys.path.insert(0, str(Path(__file__).parent / "objectives"))
from table import comparison_section

RESULTS = Path("benchmarks/results")
COLUMNS = {
    "kl_set_tail": "KL over set and tail (nats/token)",
    "kl_teacher_student": "KL (nats/token)",
    "nll": "loss on teacher answers (nats/token)",
    "agreement_top1": "top-1 agreement",
    "mass_outside_set": "mass outside A_p",
}


def page() -> str:
    """The whole page."""
    demo = RESULTS / "demo.json"
    parts = [results_page([demo] if demo.is_file() else [])]
    parts.append(
        _section(
            "Start",
            "start.json",
            "start",
            "python benchmarks/start.py runs/demo benchmarks/results/start.json",
            "Before any training, dev split.",
        )
    )
    for scale in ("tiny", "real"):
        path = RESULTS / f"objectives_{scale}.json"
        if path.is_file():
            parts.append(comparison_section(path))
    batches = RESULTS / "batches.json"
    if batches.is_file():
        facts = json.loads(batches.read_text())
        sizes = ", ".join(map(str, facts["batch_sizes"]))
        parts.append(
            f"## Batch size and answers\n\nFrom `{batches}`, which `tdistill check batches recipes/demo.yaml --json` "
            f"makes again.\n\nOf {facts['num_answers']} answers, {facts['changed_share']:.1%} are not the same at "
            f"batch sizes {sizes}: sums of floats depend on the shape of a batch.\n"
        )
    return "\n".join(parts)


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
    table = markdown_table(read_results(RESULTS / "demo.json"))
    block = f"<!-- results -->\n`make demo`, from `{RESULTS}/demo.json`:\n\n{table}<!-- /results -->"
    text = re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: block, text, flags=re.DOTALL)
    costs = (
        f"<!-- costs -->\n`tdistill bench`, from `{RESULTS}/bench_*.json`:\n\n{headline(measurements())}<!-- /costs -->"
    )
    return re.sub(r"<!-- costs -->.*<!-- /costs -->", lambda _: costs, text, flags=re.DOTALL)


def measurements() -> dict[str, Any]:
    """Contents of the JSON files of ``tdistill bench``, by kind."""
    files = {
        kind: RESULTS / f"bench_{kind}.json" for kind in ("step", "memory", "accuracy", "scaling", "store", "capture")
    }
    return {kind: json.loads(path.read_text()) for kind, path in files.items() if path.is_file()}


def performance(text: str) -> str:
    """docs/performance.md with its tables made new."""
    found = measurements()
    bits = RESULTS / "log_prob_bits.json"
    if bits.is_file():
        rows = json.loads(bits.read_text())["rows"]
        lines = ["| objective | change of the loss | cosine of the gradients | between two micro-batches |"]
        lines += ["|---|---:|---:|---:|"]
        lines += [
            f"| {row['objective']} | {row['loss_change']:.2%} | {row['gradient_cosine']:.5f} | "
            f"{row['gradient_cosine_between_batches']:.2f} |"
            for row in rows
        ]
        table = "\n".join(lines) + "\n"
        block = f"<!-- bits -->\n{table}<!-- /bits -->"
        text = re.sub("<!-- bits -->.*?<!-- /bits -->", lambda _: block, text, flags=re.DOTALL)
    for name in ("bars", *found):
        table = bars_table(found) if name == "bars" else performance_table(name, found[name])
        block = f"<!-- {name} -->\n{table}<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    write_atomically(Path("docs/performance.md"), performance(Path("docs/performance.md").read_text(encoding="utf-8")))
    write_atomically(Path("docs/results.md"), page())
    write_atomically(Path("README.md"), readme(Path("README.md").read_text(encoding="utf-8")))
