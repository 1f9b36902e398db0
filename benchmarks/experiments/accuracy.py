"""How many of GSM8K's questions teacher and start of E9 answer right, marked by lm-eval.

    pip install '.[tasks]' && python benchmarks/experiments accuracy

The students are left out: what they were trained on ends after 64 tokens, before results do.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finals import Load
from plan import RESULTS, Method
from rows import markdown, with_interval
from scipy.stats import binomtest
from setups import Setup

from tdistill.evaluation.tasks import TaskSettings, run_task
from tdistill.files import write_atomically
from tdistill.resampling import Interval

PATH = RESULTS / "accuracy.json"
# As the literature has it: five solved questions before each, greedy answers, exact match of the number.
NUM_QUESTIONS, NUM_EXAMPLES, MAX_NEW_TOKENS = 100, 5, 160


def missing() -> list[tuple[str, Method | None, int]]:
    """Models without a row."""
    done = {row["method"] for row in _rows()}
    return [(name, None, 0) for name in ("teacher", "start") if name not in done]


def run(setup: Setup, load: Load) -> None:
    """Mark what is missing and write each row down: screening prompts, after solved training prompts."""
    with TemporaryDirectory() as folder:
        data, examples = (_solved(setup, split, Path(folder)) for split in ("held_out", "train"))
        settings = TaskSettings(data=data, fewshot_data=examples, num_fewshot=NUM_EXAMPLES, limit=NUM_QUESTIONS,
                                max_new_tokens=MAX_NEW_TOKENS, batch_size=20)  # fmt: skip
        for name, method, seed in missing():
            model = load(name, method, seed, "float32")
            ends = setup.stores["train"].end_token_ids
            right = run_task(model, setup.tokenizer, "gsm8k", settings, end_token_ids=ends)
            row = {"method": name, "right": [int(of) for of in right]}
            lines = ",\n".join(map(json.dumps, [*_rows(), row]))
            head = f'{{"setup": {json.dumps(setup.name)}, "num_examples": {NUM_EXAMPLES}, "rows": [\n'
            write_atomically(PATH, head + lines + "\n]}\n")
            print(f"accuracy: {name}: {sum(row['right'])} of {len(right)}", flush=True)


def _solved(setup: Setup, split: str, folder: Path) -> str:
    """A file of questions and answers, as lm-eval's tasks have them."""
    target = folder / f"{split}.jsonl"
    lines = [
        json.dumps({"question": record.messages[-1]["content"], "answer": record.references[0]}) + "\n"
        for record in setup.run.records(split)
    ]
    target.write_text("".join(lines), encoding="utf-8")
    return str(target)


def _rows() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text())["rows"] if PATH.is_file() else []


def section(path: Path) -> str:
    """The section of docs/results.md."""
    content = json.loads(path.read_text())
    lines = [["", "questions", "right", "share"]]
    for row in content["rows"]:
        right, asked = sum(row["right"]), len(row["right"])
        exact = binomtest(right, asked).proportion_ci()
        share = with_interval(Interval(right / asked, exact.low, exact.high))
        lines.append([row["method"], str(asked), str(right), share])
    return (
        f"## Right answers to GSM8K\n\nFrom `{path}`, which `python benchmarks/experiments accuracy` makes: screening "
        f"prompts of E9, {content['num_examples']} solved training prompts before each, greedy answers of at most "
        f"{MAX_NEW_TOKENS} tokens, marked by lm-eval as its task `gsm8k` does (exact match of the number after "
        "`####`). Intervals: 95 %, exact. E9's students are not marked: what they were trained on ends after 64 "
        f"tokens, before results do.\n\n{markdown(lines)}\n"
    )
