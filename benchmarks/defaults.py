"""Train variants of the second phase from one start and compare them on the dev split of a finished run.

    python benchmarks/defaults.py runs/demo benchmarks/results/defaults.json

The defaults of TDistillConfig and IQLearn were chosen from this table. It goes on from the JSON already there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tdistill.config import load_recipe
from tdistill.pipeline import environment
from tdistill.reports.write import write_atomically
from tdistill.store import Store
from tdistill.teachers.loading import load_causal_lm, load_tokenizer
from tdistill.training import TDistillTrainer

BD = {"name": "iq_learn", "alpha": 10.0, "coordinates": "value_head", "first_order": "expected"}
INF = {**BD, "alpha": float("inf"), "coordinates": "raw"}
DEFAULT = {**BD, "alpha": 100.0}
VARIANTS = {
    "sft continued": {"objective": "sft"},
    "sft continued, learning rate 1e-4": {"objective": "sft", "learning_rate": 1e-4},
    "sft continued, learning rate 3e-5": {"objective": "sft", "learning_rate": 3e-5},
    "default: alpha 100, value head, expected, negatives": {"objective": DEFAULT},
    "alpha inf, negatives": {"objective": INF},
    "as printed: alpha 0.1, raw, sampled, no control": {
        "objective": {**BD, "alpha": 0.1, "coordinates": "raw", "first_order": "sampled"},
        "off_support": "none",
    },
    "default with gamma 0": {"objective": {**DEFAULT, "gamma": 0.0}},
    "alpha inf, union": {"objective": INF, "off_support": "union"},
    "default with the sampled first-order term": {"objective": {**DEFAULT, "first_order": "sampled"}},
    "default with alpha 10": {"objective": BD},
    "alpha inf, tail": {"objective": INF, "off_support": "tail"},
    "alpha inf, no control": {"objective": INF, "off_support": "none"},
    "default, learning rate 1e-4": {"objective": DEFAULT, "learning_rate": 1e-4},
    "default with raw coordinates": {"objective": {**DEFAULT, "coordinates": "raw"}},
}


def main(run: Path, output: Path) -> None:
    """Train what is missing in the JSON and write it after every variant."""
    recipe = load_recipe(run / "recipe.yaml")
    train, dev = (Store.open(run / "store" / split) for split in ("train", "dev"))
    init = run / "phases" / recipe.init_of("bd") / "student"
    rows = json.loads(output.read_text())["rows"] if output.is_file() else []
    for name, changes in VARIANTS.items():
        if any(row["variant"] == name for row in rows):
            continue
        model, tokenizer = load_causal_lm(init, dtype="float32"), load_tokenizer(init)
        with tempfile.TemporaryDirectory() as scratch:
            changes = {**changes, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
            args = {**recipe.phases["bd"].args, **changes}
            recipe_with = recipe.model_copy(
                update={"phases": {"bd": recipe.phases["bd"].model_copy(update={"args": args})}}
            )
            trainer = TDistillTrainer(model, recipe_with.arguments("bd", scratch), train, dev, tokenizer)
            before = trainer.evaluate() if not rows else {}
            trainer.train()
            after = trainer.evaluate()
        if before:
            rows.append(_row("before this phase", before, 0))
        rows.append(_row(name, after, trainer.state.num_input_tokens_seen))
        content = {
            "run": recipe.name,
            "split": "dev",
            "num_prompts": len(dev),
            "environment": environment(),
            "rows": rows,
        }
        write_atomically(output, json.dumps(content, indent=1) + "\n")
        print(rows[-1], flush=True)


def _row(name: str, metrics: dict[str, float], tokens: int) -> dict[str, object]:
    names = ("kl_set_tail", "nll", "agreement_top1", "mass_outside_set")
    return {"variant": name, "response_tokens": tokens, **{key: metrics[f"eval_{key}"] for key in names}}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
