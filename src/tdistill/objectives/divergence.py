"""Divergences between teacher and student that are sums over tokens: from the store, or from a teacher in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdistill import returns
from tdistill.errors import DomainError
from tdistill.objectives.base import Objective, log_mass_inside_and_outside, masked_sum, refuse_full_support
from tdistill.types import ActionStats, LossOutput

# The teacher's mass outside a set is not told from 0 below half a step of 16-bit log-probabilities.
_LEAST_TAIL = 2.0**-12


@dataclass(frozen=True)
class Divergence(Objective):
    """Σ over transitions of D(π*(·|s), π_Q(·|s)), D a sum of terms over events. Each member says its ``terms``.

    ``set``: the events are the tokens of the stored set, both policies projected onto it; the phase's off-support term
    holds the mass outside. Nothing is as large as the vocabulary (source: arXiv 2505.20335, §3, for the projection).
    ``store``: the events are the tokens of the stored set and all others as one. That is a divergence of its own,
    between distributions that sum to 1, and a lower bound of the whole one (data-processing inequality), up to the
    rounding of what is stored: the teacher's mass on the others counts as at least 2⁻¹². No teacher is in memory, and
    the teacher's temperature is the recorded one. ``teacher``: every token is an event, at temperature
    1; a teacher in memory runs in each step.

    Attributes:
        source: ``set``, ``store`` or ``teacher``.

    Raises:
        DomainError: ``set`` or ``store`` at p = 1, where a store lists no sets.
    """

    source: Literal["set", "store", "teacher"] = "store"

    @property
    def uses_sets(self) -> bool:
        """Whether it reads the action sets."""
        return self.source != "teacher"

    @property
    def reads_action(self) -> bool:
        """Whether it depends on the token taken."""
        return False

    @property
    def uses_off_support(self) -> bool:
        """Whether the phase's off-support term is added to it."""
        return self.source == "set"

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher runs in each step."""
        return self.source == "teacher"

    @property
    def support(self) -> Literal["vocabulary"] | None:
        """Tokens of the log-normaliser."""
        return None if self.source == "set" else "vocabulary"

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """Contributions of events to the divergence, elementwise.

        Args:
            log_probs_teacher: nats, any shape; none is −∞.
            log_probs_student: nats, the same shape.
            from_student: bool, whether the student took the action of the row; broadcasts to that shape.
        Returns:
            float, the same shape; the sum over the events of a row is D.
        """
        raise NotImplementedError

    def values(self, stats: ActionStats) -> Tensor:
        """D at every row, float [N]; arbitrary where no action counts.

        Args:
            stats: rows with a normaliser over the vocabulary, or with ``divergence_N`` from the dense kernel.
        """
        if self.source == "teacher":
            if stats.divergence_N is None:
                raise DomainError(
                    f"{self.name}: source = teacher needs a teacher in memory; give the trainer one, or set source to "
                    "store."
                )
            return stats.divergence_N
        refuse_full_support(stats, self.name, "set source to teacher")
        rows_M = returns.slot_rows(stats.offsets, len(stats.q_M))
        from_student_N = torch.zeros_like(stats.has_action_N) if stats.from_student_N is None else stats.from_student_N
        _, mass_N = returns.teacher_probs(stats)
        log_prob_teacher_M, normaliser_N = stats.log_prob_teacher_M, stats.log_normaliser_N
        if self.source == "set":
            log_prob_teacher_M = log_prob_teacher_M - mass_N.log()[rows_M]
            normaliser_N = returns.soft_value(stats.q_M, stats.offsets)
        assert normaliser_N is not None
        # Rows that do not count must stay finite, or their gradient of 0 would become NaN.
        log_prob_M = torch.where(stats.has_action_N[rows_M], stats.q_M - normaliser_N[rows_M], log_prob_teacher_M)
        inside_M = self.terms(log_prob_teacher_M, log_prob_M, from_student_N[rows_M])
        inside_N = returns.sum_over_sets(inside_M, stats.offsets)
        if self.source == "set":
            return inside_N
        _, log_outside_N = log_mass_inside_and_outside(stats)
        tail_N = torch.log((1 - mass_N).clamp(min=_LEAST_TAIL))
        return inside_N + self.terms(tail_N, log_outside_N, from_student_N)

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: the sum over rows with an action, and it as a metric."""
        total = masked_sum(self.values(stats), stats.has_action_N)
        return LossOutput(total, {self.name: (total.detach(), stats.has_action_N.sum())})


def kl_terms(log_probs: Tensor, log_probs_other: Tensor) -> Tensor:
    """P log P/R of every event: summed, KL(P‖R)."""
    return log_probs.exp() * (log_probs - log_probs_other)


def log_mixture(log_probs: Tensor, log_probs_other: Tensor, weight: float) -> Tensor:
    """log (w P + (1 − w) R), 0 < w < 1."""
    return torch.logaddexp(log_probs + math.log(weight), log_probs_other + math.log1p(-weight))
