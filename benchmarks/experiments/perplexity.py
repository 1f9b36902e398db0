"""Perplexity of plain text that nobody was trained on, of the students that meet the test sets.

    python benchmarks/experiments perplexity

It says what training on answers has cost of the language model that the student is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from finals import Load
from plan import BASE, RESULTS, Method, studied
from rows import UNTRAINED, markdown, with_interval
from setups import Setup

from tdistill.evaluation.perplexity import text_losses, tokenize_documents
from tdistill.files import write_atomically
from tdistill.prompts import read_texts
from tdistill.resampling import Measured, percentile_interval, resample

PATH = RESULTS / "perplexity.json"
# WikiText-2's test split has 62 articles, a quarter of a million words.
FILE, NUM_DOCUMENTS = "wikitext2_test.jsonl", 12


def missing() -> list[tuple[str, Method | None, int]]:
    """Students without a row, and the start and the teacher."""
    done = {(row["method"], row["seed"]) for row in _rows()}
    return [of for of in studied() if (of[0], of[2]) not in done]


def run(setup: Setup, load: Load) -> None:
    """Measure what is missing and write each row down."""
    assert setup.text is not None
    texts = read_texts(str(setup.text.with_name(FILE)))[:NUM_DOCUMENTS]
    documents = tokenize_documents(texts, setup.tokenizer)
    tokens = [len(document.token_ids) - 1 for document in documents]
    for name, method, seed in missing():
        model = load(name, method, seed, "float32")
        losses = text_losses({name: model}, documents, vocab_size=len(setup.tokenizer))[name]
        row = {"method": name, "seed": seed, "nll_sum": np.round(losses, 3).tolist(), "num_tokens": tokens}
        lines = ",\n".join(map(json.dumps, [*_rows(), row]))
        head = f'{{"setup": {json.dumps(BASE.name)}, "text": {json.dumps(FILE)}, "rows": [\n'
        write_atomically(PATH, head + lines + "\n]}\n")
        print(f"perplexity: {name}, seed {seed}: {np.exp(losses.sum() / sum(tokens)):.1f}", flush=True)


def _rows() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text())["rows"] if PATH.is_file() else []


def section(path: Path) -> str:
    """The section of docs/results.md."""
    content = json.loads(path.read_text())
    tokens, sums = np.array(content["rows"][0]["num_tokens"]), {}
    for row in content["rows"]:
        sums.setdefault(row["method"], []).append(row["nll_sum"])
    values = {
        name: Measured(np.array(of)[..., None], np.tile(tokens, (len(of), 1)).astype(float))
        for name, of in sums.items()
    }
    draws = dict(zip(values, resample(list(values.values()), 0), strict=True))
    lines = [["", "seeds", "loss, nats/token", "less the start's", "perplexity"]]
    for name in sorted(values, key=lambda name: values[name].value):
        value, gap = values[name].value, "–"
        if "start" in values and name != "start":
            less = percentile_interval(value - values["start"].value, draws[name] - draws["start"], 0.95)
            gap = with_interval(less, "+")
        seeds = "–" if name in UNTRAINED else str(len(sums[name]))
        loss = with_interval(percentile_interval(value, draws[name], 0.95))
        lines.append([name, seeds, loss, gap, f"{np.exp(value):.1f}"])
    return (
        f"## Perplexity of plain text\n\nFrom `{path}`, which `python benchmarks/experiments perplexity` makes: the "
        f"first {NUM_DOCUMENTS} articles of `{content['text']}`, {tokens.sum():,} tokens, windows of 512 tokens that "
        "move by 256. Intervals: 95 %, over articles and, where there are several, training seeds. None of these "
        f"students was trained on plain text.\n\n{markdown(lines)}\n"
    )
