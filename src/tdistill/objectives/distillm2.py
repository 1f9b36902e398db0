"""The contrastive pair of skewed divergences: forward on the teacher's answers, reverse on the student's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdistill.errors import DomainError
from tdistill.objectives.divergence import Divergence
from tdistill.objectives.skew_kl import check_skew, skewed_kl_terms


@dataclass(frozen=True)
class DistiLLM2(Divergence):
    """Σ_teacher KL(π*‖λ π* + (1 − λ) π_Q) + w Σ_student KL(π_Q‖λ π_Q + (1 − λ) π*).

    The first sum is over states of the teacher's answers, the second over those of the student's own: likelihood is
    pulled up on the former and pushed down on the latter.
    Source: Ko et al. 2025 (DistiLLM-2), arXiv 2503.07067, §3.
    Differs from the source: λ and w are constants, without its schedule of λ per sample and of w over training; the
    student's answers come in rounds; from the store, tokens outside the set are one event.

    Attributes:
        skew: λ in [0, 1). The paper starts from 0.1.
        student_weight: w.

    Raises:
        DomainError: a field outside its domain.
    Reduces to: ``skew_kl`` forward where no answer is the student's.
    """

    name: ClassVar[str] = "distillm2"

    skew: float = 0.1
    student_weight: float = 1.0

    def __post_init__(self) -> None:
        check_skew(self.name, self.skew)
        if not 0 < self.student_weight < math.inf:
            raise DomainError(
                f"distillm2: student_weight = {self.student_weight} must be positive and finite; to leave the "
                "student's answers out use skew_kl."
            )

    @property
    def needs_rollouts(self) -> bool:
        """Whether it needs trajectories that the student sampled."""
        return True

    @property
    def least_log_prob_bits(self) -> int:
        """At λ = 0 the student's answers have ``reverse_kl``, see there."""
        return 16 if self.source == "store" and self.skew == 0 else 8

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """Forward terms where the teacher acted, w times reverse terms where the student did."""
        forward = skewed_kl_terms(log_probs_teacher, log_probs_student, self.skew)
        reverse = skewed_kl_terms(log_probs_student, log_probs_teacher, self.skew)
        return torch.where(from_student, self.student_weight * reverse, forward)
