"""Total variation distance between teacher and student, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdistill.objectives.divergence import Divergence


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Σ ½ Σ_v |π*(v|s) − π_Q(v|s)|.

    Source: Wen et al. 2023 (f-distill), arXiv 2307.15190, §3.1.
    Differs from the source: states are the store's, not half of them the student's unless ``rollouts`` say so; from the
    store, tokens outside the set are one event.
    """

    name: ClassVar[str] = "total_variation"

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """½ |π* − π_Q|."""
        return (log_probs_teacher.exp() - log_probs_student.exp()).abs() / 2
