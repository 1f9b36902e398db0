"""Sums and counts of logged quantities, and the store-only divergence used on the dev split."""

from __future__ import annotations

import torch
from torch import Tensor

from tdistill import returns
from tdistill.types import ActionStats, widest


class MeanMeter:
    """Accumulates (sum, count) pairs on the device and turns them into means across processes when asked."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add one micro-batch."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.float(), count.to(total.device).float()])
            self._totals[name] = self._totals.get(name, torch.zeros_like(pair)) + pair

    def pop(self, accelerator: object) -> dict[str, float]:
        """Return the means over all processes and start again."""
        means = {}
        for name in sorted(self._totals):
            total, count = accelerator.reduce(self._totals[name], "sum").tolist()  # type: ignore[attr-defined]
            means[name] = total / count if count else float("nan")
        self._totals = {}
        return means


def set_tail_kl(stats: ActionStats) -> Tensor:
    """KL(teacher‖student) with all tokens outside the set taken as one: a lower bound on the full divergence.

    Σ_{a ∈ A} π(a) log π(a)/π_Q(a) + (1 − Z) log (1 − Z)/(1 − P),  P = Σ_{a ∈ A} π_Q(a).
    Source: data-processing inequality.

    Args:
        stats: with the normaliser over the vocabulary.
    Returns:
        float [N], nats; 0 for an empty row.
    """
    assert stats.log_normaliser_N is not None
    rows = returns.slot_rows(stats.offsets, len(stats.q_M))
    wide = widest(stats.q_M.device)
    log_prob_student_M = (stats.q_M - stats.log_normaliser_N[rows]).to(wide)
    log_prob_teacher_M = stats.log_prob_teacher_M.to(wide)
    inside_M = log_prob_teacher_M.exp() * (log_prob_teacher_M - log_prob_student_M)
    smallest = torch.finfo(torch.float32).tiny
    teacher_tail = (1 - returns.sum_over_sets(log_prob_teacher_M.exp(), stats.offsets)).clamp(min=0)
    student_tail = (1 - returns.sum_over_sets(log_prob_student_M.exp(), stats.offsets)).clamp(min=smallest)
    tail = torch.where(
        teacher_tail > 0, teacher_tail * (teacher_tail.clamp(min=smallest).log() - student_tail.log()), 0.0
    )
    return torch.where(stats.offsets.diff() > 0, returns.sum_over_sets(inside_M, stats.offsets) + tail, 0.0)
