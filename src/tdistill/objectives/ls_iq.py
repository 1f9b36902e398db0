"""LS-IQ: inverse soft Q-learning with χ² on the mixture of teacher and student, as least squares."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import Coordinates, TwoSidedSquares, student_rows, teacher_rows
from tdistill.types import ActionStats, Ends, LossOutput


@dataclass(frozen=True)
class LSIQ(TwoSidedSquares):
    """Squared distance of the recovered reward from +r_max on the teacher's and −r_max on the student's transitions.

    Σ_teacher (r − r_max)² + λ Σ_student (r + r_max)²,  r = Q(s,a) − γ V_p(s').
    With c = 1/r_max it is 2/c times [−Σ_teacher (r − c/2·r²) + λ Σ_student (r + c/2·r²)], plus a constant: IQ-Learn
    with χ² on the mixture of teacher and student, whose reward is bounded by ±r_max.
    V_p(s') is clipped to ±r_max/(1 − γ), beyond which it has no gradient. An end token leads to an absorbing state
    whose reward is ±r_max for ever: r_max/(1 − γ) after the teacher's, −r_max/(1 − γ) after the student's (``signed``).
    With ``fixed`` the teacher's transitions have the target Q(s,a) = r_max/(1 − γ), what acting like the teacher for
    ever is worth, in the place of r_max + γ V_p(s').
    Source: Al-Hafez et al. 2023 (arXiv 2303.00599); of its repository robfiras/ls-iq the variant ``sqil_like``,
    ``q_old_policy``, ``treat_absorbing_states``, with target clipping, ``bootstrap`` or ``fix``.
    Differs from the source: no actor, the policy is softmax(Q) and V_p = log Σ_A exp Q at temperature 1 (there the
    entropy's weight is 0.001); V over A_p; the level of Q; sums instead of means; squares only, no Huber loss. The
    student's term is on the actions that the student took; the source's experiments have V(s) of all states in the
    place of Q(s,a), with the next state of another action. γ is lower.
    Target: ``residual`` differentiates V_p(s') too. ``slow`` takes it from an exponential moving average of the
    student's weights, without gradient (the source's choice): one more forward pass per micro-batch and one copy of
    the weights.

    Attributes:
        gamma: discount γ in [0, 1). The source: 0.99. Q rises to r_max/(1 − γ), from 0 with a value head.
        coordinates: ``value_head`` (Q = log π_p + v), ``raw`` (Q = logits) or ``max_set`` (logits − their maximum).
        r_max: bound of the recovered reward, nats; 1/c. The source: 2.
        student_weight: λ ≥ 0. 0 leaves the student's transitions out; then no rollouts are needed.
        absorbing: value after an end token, ``signed`` (±r_max/(1 − γ)) or ``zero``.
        teacher_target: ``bootstrap`` or ``fixed``.
        target: ``residual`` or ``slow``.

    Raises:
        DomainError: a field outside its domain; ``max_set`` at p = 1.
    Reduces to: on the teacher's rows, 4·alpha times ``iq_learn`` (χ², ``sampled``) less its value term, plus r_max² a
        row, when r_max = 2·alpha, values are inside the bounds and ``absorbing`` is ``zero``.
    """

    name: ClassVar[str] = "ls_iq"

    gamma: float = 0.9
    coordinates: Coordinates = "value_head"
    r_max: float = 2.0
    student_weight: float = 1.0
    absorbing: Literal["signed", "zero"] = "signed"
    teacher_target: Literal["bootstrap", "fixed"] = "bootstrap"
    target: Literal["residual", "slow"] = "residual"

    def __post_init__(self) -> None:
        check_discount(self.gamma, f"{self.name}: gamma")
        if self.gamma == 1:
            raise DomainError(f"ls_iq: gamma = {self.gamma} makes the bound r_max/(1 − gamma) infinite. Lower gamma.")
        if not 0 < self.r_max < math.inf:
            raise DomainError(f"ls_iq: r_max = {self.r_max} must be positive and finite. The paper uses 2.")
        self.check_student_weight()

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: the sum over rows with an action and a known next value, nats²; its terms."""
        (q, later), bound = self.present_and_later(stats), self.r_max / (1 - self.gamma)
        following_N, known_N = returns.next_value(later.value_N, stats)
        teacher_N, student_N = teacher_rows(stats) & known_N, student_rows(stats) & known_N
        used_N = teacher_N | student_N if self.student_weight > 0 else teacher_N
        clipped_N = used_N & (following_N.abs() > bound)
        following_N = following_N.clamp(-bound, bound)
        if self.absorbing == "signed":
            bound_N = torch.full_like(following_N, bound)
            signed_N = torch.where(student_N, -bound_N, bound_N)
            following_N = torch.where(stats.ends_N == Ends.TERMINAL, signed_N, following_N)
        recovered_N = q.action_value_N - self.gamma * following_N

        error_N = q.action_value_N - bound if self.teacher_target == "fixed" else recovered_N - self.r_max
        errors = error_N, recovered_N + self.r_max
        result = self.squares(errors, (teacher_N, student_N), recovered_N, q.value_N)
        return replace(result, metrics={**result.metrics, "clipped_share": (clipped_N.sum(), used_N.sum())})
