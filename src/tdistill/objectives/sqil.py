"""SQIL: soft Q-learning with one constant reward for the teacher's transitions and none for the student's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import Coordinates, TwoSidedSquares, student_rows, teacher_rows
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class SQIL(TwoSidedSquares):
    """Squared soft Bellman error on the reduced sets, with constant rewards.

    Σ_teacher (Q(s,a) − R − γ V_p(s'))² + λ Σ_student (Q(s,a) − γ V_p(s'))²;  V_p(s') = 0 after termination,
    bootstrapped after truncation; where it is unknown the transition is left out.
    Source: Reddy, Dragan, Levine 2020 (arXiv 1905.11108), eq. 1 and algorithm 1.
    Differs from the source: V runs over A_p; the level of Q is a choice; sums over the two kinds of rows instead of
    means, so λ times the ratio of their numbers in a micro-batch, student to teacher, is the source's λ_samp; γ is
    lower.
    Target: ``residual`` differentiates V_p(s') too, as in the source's equation; transitions are deterministic, so the
    square is that of the Bellman error itself. ``slow`` takes V_p(s') from an exponential moving average of the
    student's weights, without gradient: one more forward pass per micro-batch and one copy of the weights.

    Attributes:
        gamma: discount γ in [0, 1]. The source: 0.99. V rises up to R/(1 − γ), from 0 with a value head.
        coordinates: ``value_head`` (Q = log π_p + v), ``raw`` (Q = logits) or ``max_set`` (logits − their maximum).
        reward: R of the teacher's transitions, nats.
        student_weight: λ ≥ 0. 0 leaves the student's transitions out; then no rollouts are needed.
        target: ``residual`` or ``slow``.

    Raises:
        DomainError: a field outside its domain; ``max_set`` at p = 1.
    Reduces to: ``ls_iq`` with r_max = R/2 of the values less R/(2(1 − γ)), where nothing ends and no value is clipped.
    """

    name: ClassVar[str] = "sqil"

    gamma: float = 0.9
    coordinates: Coordinates = "value_head"
    reward: float = 1.0
    student_weight: float = 1.0
    target: Literal["residual", "slow"] = "residual"

    def __post_init__(self) -> None:
        check_discount(self.gamma, f"{self.name}: gamma")
        if not math.isfinite(self.reward):
            raise DomainError(f"sqil: reward = {self.reward} must be finite. The paper uses 1.")
        self.check_student_weight()

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: the sum over rows with an action and a known next value, nats²; its terms."""
        q, later = self.present_and_later(stats)
        following_N, known_N = returns.next_value(later.value_N, stats)
        recovered_N = q.action_value_N - self.gamma * following_N
        rows = teacher_rows(stats) & known_N, student_rows(stats) & known_N
        return self.squares((recovered_N - self.reward, recovered_N), rows, recovered_N, q.value_N)
