"""What 8-bit log-probabilities do to a step, against the 16 bits of the given store: loss and gradient.

python benchmarks/log_prob_bits.py runs/objectives/real/run benchmarks/results/log_prob_bits.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdistill.files import write_atomically
from tdistill.store import Store, codes
from tdistill.teachers.loading import load_causal_lm
from tdistill.training import TDistillConfig, TDistillTrainer
from tdistill.training.collate import PackedCollator
from tdistill.types import Trajectory

OBJECTIVES: dict[str, dict[str, Any]] = {
    "iq_learn": {"name": "iq_learn"},
    "iq_learn, alpha 1": {"name": "iq_learn", "alpha": 1.0},
    "path_consistency": {"name": "path_consistency"},
    "teacher_q, residual": {"name": "teacher_q", "target": "residual"},
}
NUM_BATCHES, BATCH = 3, 8


def in_8_bits(trajectory: Trajectory) -> Trajectory:
    """The trajectory as an 8-bit store keeps its log-probabilities and log-sum-exps."""
    sets = trajectory.sets
    kept = codes.dequantise(codes.quantise(sets.log_probs, 8), 8)
    totals = codes.unpack_log_sum_exp(codes.pack_log_sum_exp(sets.log_sum_exp, 8), 8)
    return replace(trajectory, sets=replace(sets, log_probs=kept, log_sum_exp=totals))


def loss_and_gradient(trainer: TDistillTrainer, rows: list[Trajectory]) -> tuple[float, torch.Tensor]:
    """Loss per token, and the gradient to all weights as one vector."""
    batch = PackedCollator(0)(rows)
    torch.manual_seed(0)  # the same negatives
    trainer.model.zero_grad()
    counts = torch.tensor([int(batch["has_action_N"].sum()), 0])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
    loss.backward()
    gradients = [p.grad.flatten().double() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def main(run: Path, output: Path) -> None:
    """Compare and write."""
    store = Store.open(run / "store" / "train")
    chosen = np.random.default_rng(0).choice(len(store), (NUM_BATCHES, BATCH), replace=False)
    rows = []
    for name, objective in OBJECTIVES.items():
        with tempfile.TemporaryDirectory() as scratch:
            args = TDistillConfig(scratch, objective=objective, use_cpu=True, save_strategy="no")
            trainer = TDistillTrainer(load_causal_lm(run / "start", dtype="float32"), args, store)
            trainer.model.train()
            found = []
            for batch in chosen:
                exact = [store[int(i)] for i in batch]
                loss, gradient = loss_and_gradient(trainer, exact)
                other, rounded = loss_and_gradient(trainer, [in_8_bits(t) for t in exact])
                found.append(
                    (abs(other / loss - 1), torch.cosine_similarity(gradient, rounded, dim=0).item(), gradient)
                )
        between = torch.cosine_similarity(found[0][2], found[1][2], dim=0).item()
        rows.append(
            {
                "objective": name,
                "loss_change": float(np.mean([row[0] for row in found])),
                "gradient_cosine": float(np.mean([row[1] for row in found])),
                "gradient_cosine_between_batches": between,
            }
        )
        print(rows[-1], flush=True)
    write_atomically(output, json.dumps({"batches": NUM_BATCHES, "trajectories": BATCH, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
