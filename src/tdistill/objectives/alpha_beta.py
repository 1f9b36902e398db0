"""α-β divergence between teacher and student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdistill.errors import DomainError
from tdistill.objectives.divergence import Divergence


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Σ −1/(αβ) Σ_v ( π*^α π_Q^β − α/(α+β) π*^{α+β} − β/(α+β) π_Q^{α+β} ).

    At β = 0 it is the limit 1/α² Σ_v ( π*^α log(π*/π_Q)^α − π*^α + π_Q^α ), and at α = 0 the same with teacher and
    student exchanged.
    Source: Wang et al. 2025 (ABKD), arXiv 2505.04560, definition 3.1; Cichocki et al. 2011.
    Differs from the source: from the store, tokens outside the set are one event, and α ≠ 1 makes the divergence
    depend on how tokens are joined.

    Attributes:
        alpha: α; with ``beta`` not both 0, and α + β not 0. The paper's setting for instructions: 0.2.
        beta: β. The paper: 0.7.

    Raises:
        DomainError: α + β = 0, or one is not finite.
    Reduces to: ``forward_kl`` at (1, 0), ``reverse_kl`` at (0, 1).
    """

    name: ClassVar[str] = "alpha_beta"

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha) or not math.isfinite(self.beta):
            raise DomainError(f"alpha_beta: alpha = {self.alpha} and beta = {self.beta} must be finite.")
        if self.alpha + self.beta == 0:
            raise DomainError(
                f"alpha_beta: alpha = {self.alpha} and beta = {self.beta} sum to 0, where the divergence is not "
                "defined. (1, 0) is the forward KL, (0, 1) the reverse KL."
            )

    @property
    def least_log_prob_bits(self) -> int:
        """Read from the store, a power of the small mass outside a set counts, which 8 bits may round to 0."""
        return 16 if self.source == "store" and self.alpha < 1 else 8

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """The summand."""
        a, b = self.alpha, self.beta
        if b == 0:
            return _limit(log_probs_teacher, log_probs_student, a)
        if a == 0:
            return _limit(log_probs_student, log_probs_teacher, b)
        both = (a * log_probs_teacher + b * log_probs_student).exp()
        teacher, student = ((a + b) * log_probs_teacher).exp(), ((a + b) * log_probs_student).exp()
        return (a * teacher + b * student) / (a + b) / (a * b) - both / (a * b)


def _limit(log_probs: Tensor, log_probs_other: Tensor, power: float) -> Tensor:
    here, there = (power * log_probs).exp(), (power * log_probs_other).exp()
    return (here * power * (log_probs - log_probs_other) - here + there) / power**2
