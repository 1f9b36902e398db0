"""Generalised Jensen–Shannon divergence, on the teacher's answers and the student's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdistill.errors import DomainError
from tdistill.objectives.divergence import Divergence, kl_terms, log_mixture


@dataclass(frozen=True)
class GKD(Divergence):
    """Σ β KL(π*‖m) + (1 − β) KL(π_Q‖m),  m = β π* + (1 − β) π_Q.

    With ``rollouts`` of the phase, a share of the states comes from the student's own answers (λ of the source).
    Source: Agarwal et al. 2023, arXiv 2306.13649, eq. 1 and algorithm 1.
    Differs from the source: β = 0 and β = 1 are the forward and the reverse KL, as TRL has it, where the formula itself
    is 0; the student answers in rounds, not before every step; from the store, tokens outside the set are one event.

    Attributes:
        beta: β in [0, 1].

    Raises:
        DomainError: β outside [0, 1].
    Reduces to: ``forward_kl`` at β = 0, ``reverse_kl`` at β = 1.
    """

    name: ClassVar[str] = "gkd"

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise DomainError(f"gkd: beta = {self.beta} is outside [0, 1]; 0 is the forward KL and 1 the reverse KL.")

    @property
    def least_log_prob_bits(self) -> int:
        """Read from the store, the small mass outside a set is in a denominator; 8 bits may round it to 0."""
        return 16 if self.source == "store" and self.beta == 1 else 8

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """β π* log π*/m + (1 − β) π_Q log π_Q/m."""
        if self.beta == 0:
            return kl_terms(log_probs_teacher, log_probs_student)
        if self.beta == 1:
            return kl_terms(log_probs_student, log_probs_teacher)
        mixture = log_mixture(log_probs_teacher, log_probs_student, self.beta)
        of_teacher, of_student = kl_terms(log_probs_teacher, mixture), kl_terms(log_probs_student, mixture)
        return self.beta * of_teacher + (1 - self.beta) * of_student
