"""The pinned training runs: which they are, and how their numbers are written again after a change that is meant.

    PYTHONPATH=tests python tests/training/golden_training.py             writes tests/golden/training.json
    PYTHONPATH=tests python tests/training/golden_training.py --inputs    first makes tests/fixtures/golden_run anew

Start and stores are files, not fixtures made on the spot: training the tiny teacher takes another course on another
processor, and these runs would follow it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import support
import torch
from training_support import losses, settings

from tdistill.store import Store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm
from tdistill.training.trainer import TDistillTrainer

INPUTS = Path(__file__).parents[1] / "fixtures" / "golden_run"
NUMBERS = Path(__file__).parents[1] / "golden" / "training.json"
RUNS: dict[str, dict[str, Any]] = {"sft": {"objective": "sft"}, "default": {}}


def run(changes: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Losses of every step, and the dev split's metrics before and after."""
    args = settings(output_dir, **{"max_steps": 40, "learning_rate": 3e-3, "warmup_steps": 4, **changes})
    model = load_causal_lm(INPUTS / "start", dtype="float32")
    trainer = TDistillTrainer(model, args, Store.open(INPUTS / "train"), Store.open(INPUTS / "dev"))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    names = [name for name in before if name.startswith("eval_") and name != "eval_runtime"]
    return {
        "loss": losses(trainer),
        "before": {name: before[name] for name in names},
        "after": {name: after[name] for name in names},
    }


def make_inputs() -> None:
    """Train a teacher, capture the stores and prune the start; weights in bfloat16 for half the size."""
    shutil.rmtree(INPUTS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        support.save_tiny_teacher(folder / "teacher")
        teacher = HFTeacher.from_pretrained(str(folder / "teacher"), dtype="float32")
        prompts = support.write_tiny_prompts(folder)
        for split in ("train", "dev"):
            support.capture_tiny(teacher, prompts[split], INPUTS / split, support.TINY_SAMPLING)
        support.save_tiny_start(teacher, Store.open(INPUTS / "train"), folder / "start")
        load_causal_lm(folder / "start", dtype="bfloat16").save_pretrained(INPUTS / "start")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--inputs" in sys.argv:
        make_inputs()
    with tempfile.TemporaryDirectory() as scratch:
        numbers = {name: run(changes, Path(scratch)) for name, changes in RUNS.items()}
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
