"""Skewed Kullback–Leibler divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tdistill.errors import DomainError
from tdistill.objectives.divergence import Divergence, kl_terms, log_mixture


def check_skew(who: str, skew: float) -> None:
    """Raise DomainError unless 0 ≤ skew < 1."""
    if not 0 <= skew < 1:
        raise DomainError(f"{who}: skew = {skew} is outside [0, 1); at 1 the divergence is 0. The paper uses 0.1.")


def skewed_kl_terms(log_probs: Tensor, log_probs_other: Tensor, skew: float) -> Tensor:
    """P log P/(λ P + (1 − λ) R) of every event: summed, KL(P‖λ P + (1 − λ) R)."""
    if skew == 0:
        return kl_terms(log_probs, log_probs_other)
    return kl_terms(log_probs, log_mixture(log_probs, log_probs_other, skew))


@dataclass(frozen=True)
class SkewKL(Divergence):
    """``forward``: Σ KL(π*‖λ π* + (1 − λ) π_Q). ``reverse``: Σ KL(π_Q‖λ π_Q + (1 − λ) π*).

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, eq. 4 and 5.
    Differs from the source: its adaptive use of the student's answers is the ramp and the replay of ``rollouts``; from
    the store, tokens outside the set are one event.

    Attributes:
        skew: λ in [0, 1). The paper: 0.1.
        direction: ``forward`` or ``reverse``.

    Raises:
        DomainError: λ outside [0, 1).
    Reduces to: ``forward_kl`` and ``reverse_kl`` at λ = 0.
    """

    name: ClassVar[str] = "skew_kl"

    skew: float = 0.1
    direction: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        check_skew(self.name, self.skew)

    @property
    def least_log_prob_bits(self) -> int:
        """At λ = 0 the reverse one is ``reverse_kl``, see there."""
        return 16 if self.source == "store" and self.direction == "reverse" and self.skew == 0 else 8

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """P log P/(λ P + (1 − λ) R), P the teacher for ``forward`` and the student for ``reverse``."""
        if self.direction == "forward":
            return skewed_kl_terms(log_probs_teacher, log_probs_student, self.skew)
        return skewed_kl_terms(log_probs_student, log_probs_teacher, self.skew)
