"""Forward Kullback–Leibler divergence: knowledge distillation token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdistill.objectives.divergence import Divergence, kl_terms


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """Σ KL(π*‖π_Q) = Σ_s Σ_v π*(v|s) log π*(v|s)/π_Q(v|s).

    Source: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
    Differs from the source: no cross-entropy with given tokens beside it; from the store, tokens outside the set are
    one event.
    Reduces to: ``iq_learn`` at α = ∞ with expected first-order term scaled by Z and ``tail``, but for the teacher's
    entropy.
    """

    name: ClassVar[str] = "forward_kl"

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """π* log π*/π_Q."""
        return kl_terms(log_probs_teacher, log_probs_student)
