"""Bellman Distill: IQ-Learn on the teacher's reduced action space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import (
    Coordinates,
    Objective,
    expected_log_prob,
    masked_sum,
    refuse_full_support,
    soft_q,
    student_rows,
    teacher_rows,
)
from tdistill.regularisers import PhiName, Regulariser
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class IQLearn(Objective):
    """−J of Bellman Distill, summed over teacher transitions.

    J(Q) = Σ φ(r) − (V_p(s) − γ V_p(s')),  r = Q(s,a) − γ V_p(s') = log proj_p π_Q(a|s) + V_p(s) − γ V_p(s'),
    which is Σ log proj_p π_Q(a|s) − (r − φ(r)); for χ² with φ(x) = x − x²/(4α) the last term is r²/(4α).
    Source: arXiv 2505.20335, §4 (Bellman Distill); arXiv 2106.12142 (IQ-Learn).
    Differs from the source: the level of Q is a choice (``coordinates``); the first-order term can be the
    expectation over the stored teacher probabilities (``first_order``); clipping Q is off; φ has a scale and a
    tangent (:class:`~tdistill.regularisers.Regulariser`); after truncation the value is bootstrapped, or the transition
    loses its non-linear part only; with ``steps`` = d the argument of the non-linear part is the d-step residual.

    Attributes:
        alpha: scale of φ, nats (χ²: the paper's α, 0.1 there). ``inf``, the default by measurement, removes the
            temporal term: behaviour cloning on the sets.
        gamma: discount γ in [0, 1]. The paper: 0.99.
        coordinates: ``raw`` (Q = logits, as printed), ``max_set`` (Q = logits − their maximum over the set),
            ``value_head`` (Q = log proj_p π_Q + v with a scalar head v on the last hidden state, so V_p = v).
        first_order: ``sampled`` (log-probability of the token taken, as printed), ``expected``
            (Σ_a proj_p π*(a|s) log proj_p π_Q(a|s): the same expectation on the teacher's answers, lower variance) or
            ``both``, their mean: on given answers half of each target, as hard and soft labels in arXiv 1503.02531.
        phi: the regulariser; the paper: ``chi2``.
        steps: d ≥ 1, transitions of one residual.
        student_value_weight: weight w of the student's states in the value term, (1 − w) Σ_teacher + w Σ_student of
            V_p(s) − γ V_p(s'); 0 is the offline form, ½ with as many rollout tokens as teacher tokens the mixture of
            IQ-Learn's online form. Above 0 it needs rollouts.
        max_slope: slope at which φ goes on by its tangent, or None for the φ's own.
        tv_slope: λ of ``total_variation``.
        q_floor: Q is clipped from below at this value (the paper: −10), or None. Refused with ``value_head``.

    Raises:
        DomainError: a field outside its domain.
    Reduces to: masked cross-entropy when φ is the identity or alpha = inf, with a sampled first-order term, for every
        γ and every number of steps.
    """

    name: ClassVar[str] = "iq_learn"

    alpha: float = math.inf
    gamma: float = 0.99
    coordinates: Coordinates = "value_head"
    first_order: Literal["sampled", "expected", "both"] = "expected"
    phi: PhiName = "chi2"
    steps: int = 1
    student_value_weight: float = 0.0
    max_slope: float | None = None
    tv_slope: float = 0.5
    q_floor: float | None = None

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise DomainError(f"iq_learn: alpha = {self.alpha} must be positive; use .inf to remove the temporal term.")
        check_discount(self.gamma, "iq_learn: gamma")
        if self.steps < 1:
            raise DomainError(f"iq_learn: steps = {self.steps} must be at least 1.")
        if not 0 <= self.student_value_weight <= 1:
            raise DomainError(f"iq_learn: student_value_weight = {self.student_value_weight} is outside [0, 1].")
        if self.q_floor is not None and self.coordinates == "value_head":
            raise DomainError("iq_learn: q_floor needs logits as Q; set coordinates to raw or max_set, or drop it.")
        self.regulariser()

    def regulariser(self) -> Regulariser:
        """Return φ with its scale and tangent."""
        return Regulariser(self.phi, self.alpha, self.max_slope, self.tv_slope)

    @property
    def needs_value_head(self) -> bool:
        """Whether the student must carry a scalar value head."""
        return self.coordinates == "value_head"

    @property
    def reads_action(self) -> bool:
        """Whether it depends on the token taken."""
        return self.first_order != "expected" or self.alpha < math.inf or self.student_value_weight > 0

    @property
    def needs_rollouts(self) -> bool:
        """Whether it needs trajectories that the student sampled."""
        return self.student_value_weight > 0

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: −J, the sum over rows with an action, nats; its terms as metrics."""
        if self.first_order != "sampled" or self.coordinates == "max_set" or self.q_floor is not None:
            refuse_full_support(
                stats,
                "iq_learn",
                "set first_order to sampled, coordinates to raw or value_head, and leave q_floor empty",
            )
        q = soft_q(stats, self.coordinates, self.q_floor)
        act_N, phi = teacher_rows(stats), self.regulariser()
        count = act_N.sum()

        log_prob_N = q.log_prob_taken_N if self.first_order == "sampled" else expected_log_prob(stats, q)
        if self.first_order == "both":
            log_prob_N = (log_prob_N + q.log_prob_taken_N) / 2
        log_likelihood = masked_sum(log_prob_N, act_N)
        residual_N, known_N = returns.consistency_residual(q.log_prob_taken_N, q.value_N, stats, self.gamma, self.steps)
        known_N = known_N & act_N
        residual_N = torch.where(known_N, residual_N, torch.zeros_like(residual_N))
        phi_N, on_tangent_N = phi(residual_N)
        penalty = (residual_N - phi_N).sum()
        loss = penalty - log_likelihood
        metrics = {
            "first_order": (-log_likelihood.detach(), count),
            "phi_penalty": (penalty.detach(), count),
            "recovered_reward": (residual_N.detach().sum(), known_N.sum()),
            "residual_squared": (residual_N.detach().square().sum(), known_N.sum()),
            "value": (masked_sum(q.value_N.detach(), act_N), count),
            "tangent_share": ((on_tangent_N & known_N).sum(), known_N.sum()),
        }
        if self.student_value_weight > 0:
            following_N, follows_N = returns.next_value(q.value_N, stats)
            step_N = q.value_N - self.gamma * following_N
            visited_N = student_rows(stats) & follows_N
            shift = masked_sum(step_N, visited_N) - masked_sum(step_N, known_N)
            loss = loss + self.student_value_weight * shift
            metrics["value_step_student"] = (masked_sum(step_N.detach(), visited_N), visited_N.sum())
        if q.clipped is not None:
            metrics["clipped_share"] = q.clipped
        return LossOutput(loss, metrics)
