"""Reverse Kullback–Leibler divergence, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdistill.objectives.divergence import Divergence, kl_terms


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """Σ KL(π_Q‖π*) = Σ_s Σ_v π_Q(v|s) log π_Q(v|s)/π*(v|s), at given states.

    The gradient goes through π_Q at the state, not through how the state was reached; see ``minillm`` for that.
    Source: Gu et al. 2023, arXiv 2306.08543, eq. 1, for a single token.
    Differs from the source: states are given, not sampled from the student; from the store, tokens outside the set are
    one event.
    Reduces to: ``gkd`` at β = 1.
    """

    name: ClassVar[str] = "reverse_kl"

    @property
    def least_log_prob_bits(self) -> int:
        """Read from the store, the small mass outside a set is in a denominator; 8 bits may round it to 0."""
        return 16 if self.source == "store" else 8

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """π_Q log π_Q/π*."""
        return kl_terms(log_probs_student, log_probs_teacher)
