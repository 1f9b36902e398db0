"""Measure starts made from the teacher by keeping some of its layers, before any training.

    python benchmarks/start.py runs/demo benchmarks/results/start.json

Loss and divergence on the dev split's teacher answers; the default of ``student.method`` was chosen from this table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from tdistill.config import load_recipe
from tdistill.evaluation.divergence import divergences
from tdistill.files import write_atomically
from tdistill.pipeline import Run
from tdistill.run_folder import environment
from tdistill.store import Store
from tdistill.training.pruning import block_influence, choose_layers, prune_layers


def main(run: Path, output: Path) -> None:
    """Make every start, measure them in one pass, write the JSON."""
    recipe = load_recipe(run / "recipe.yaml")
    train, dev = (Store.open(run / "store" / split) for split in ("train", "dev"))
    teacher = Run(recipe).load_teacher()
    rows = [train[i] for i in range(min(recipe.student.calibration_answers, len(train)))]
    tokens = [np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64) for row in rows]
    influence = block_influence(teacher.model, map(torch.from_numpy, tokens))
    starts = {
        f"{keep} layers, {method}": prune_layers(teacher.model, choose_layers(len(influence), keep, method, influence))
        for keep in (15, 20)
        for method in ("even", "block_influence")
    }
    totals = divergences(
        teacher.model, starts, [dev[i] for i in range(len(dev))], vocab_size=len(teacher.tokenizer), progress=True
    )
    first = next(iter(totals.values()))
    content = {
        "run": recipe.name,
        "split": "dev",
        "num_prompts": len(dev),
        "environment": environment(),
        "teacher_nll": float(first.nll_teacher.sum() / first.num_tokens.sum()),
        "block_influence": influence,
        "rows": [
            {
                "start": name,
                "nll": float(t.nll.sum() / t.num_tokens.sum()),
                "kl_teacher_student": float(t.kl_teacher_student.sum() / t.num_tokens.sum()),
            }
            for name, t in totals.items()
        ],
    }
    write_atomically(output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
