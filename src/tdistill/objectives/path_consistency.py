"""Path consistency with the teacher's reward: a temporal term whose optimum is the teacher itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import (
    Objective,
    expected_log_prob,
    masked_sum,
    refuse_full_support,
    soft_q,
    student_rows,
    teacher_log_prob_taken,
    teacher_rows,
)
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class PathConsistency(Objective):
    """First-order term on the sets and squared residuals of the teacher's reward, summed over transitions.

    weight · Σ δ² − Σ Σ_a proj_p π*(a|s) log proj_p π_Q(a|s),
    δ = Σ_{i<d} γ^i [log proj_p π*(a|s) − log proj_p π_Q(a|s)]_{t+i} + γ^d v(s_{t+d}) − v(s_t).
    The teacher is soft-optimal for the reward log proj_p π* with value 0, so δ vanishes at π_Q = π*, v = 0, for every γ
    and d. Where the student cannot match it, v is the discounted divergence still to come: +KL(teacher‖student) on the
    teacher's actions, −KL(student‖teacher) on the student's own.
    Source: Nachum et al. 2017 (arXiv 1702.08892), eq. 15, with the teacher's log-probabilities as the reward.
    Differs from the source: no reward but the teacher's; states of the teacher's answers too; a first-order term beside
    it.

    Attributes:
        weight: factor on the squared residuals; 0 leaves the first-order term.
        gamma: discount γ in [0, 1]. At 0 a residual is the log-ratio of one action less v(s).
        steps: d ≥ 1, transitions of one residual.
        first_order: ``expected`` (over the stored teacher probabilities, in every state), ``sampled`` (log-probability
            of the teacher's action, in the teacher's states only), or ``none``.
        value: ``head`` (v is a scalar linear head on the last hidden state) or ``none`` (v = 0).
        states: ``teacher``, or ``both``: those of the student's own answers too, which needs rollouts.
        student_weight: factor on the squared residuals of the student's states.

    Raises:
        DomainError: a field outside its domain.
    Reduces to: behaviour cloning on the sets when weight is 0 and states is ``teacher``.
    """

    name: ClassVar[str] = "path_consistency"

    weight: float = 0.05
    gamma: float = 0.99
    steps: int = 1
    first_order: Literal["expected", "sampled", "none"] = "expected"
    value: Literal["head", "none"] = "head"
    states: Literal["teacher", "both"] = "teacher"
    student_weight: float = 1.0

    def __post_init__(self) -> None:
        check_discount(self.gamma, f"{self.name}: gamma")
        for name in ("weight", "student_weight"):
            if getattr(self, name) < 0:
                raise DomainError(f"path_consistency: {name} = {getattr(self, name)} must not be negative.")
        if self.steps < 1:
            raise DomainError(f"path_consistency: steps = {self.steps} must be at least 1.")
        if self.first_order == "none" and self.weight == 0:
            raise DomainError("path_consistency: weight = 0 and first_order = none leave no loss; set one of them.")

    @property
    def needs_value_head(self) -> bool:
        """Whether the student must carry a scalar value head."""
        return self.value == "head"

    @property
    def needs_rollouts(self) -> bool:
        """Whether it needs trajectories that the student sampled."""
        return self.states == "both"

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: the sum over rows with an action, nats (δ² in nats²); its terms as metrics."""
        refuse_full_support(stats, self.name, "train iq_learn with first_order: sampled there")
        q = soft_q(stats, "value_head" if self.value == "head" else "raw")
        value_N = q.value_N if self.value == "head" else torch.zeros_like(q.value_N)
        log_ratio_N = q.log_prob_taken_N - teacher_log_prob_taken(stats)
        residual_N, known_N = returns.consistency_residual(log_ratio_N, value_N, stats, self.gamma, self.steps)
        teacher_N, student_N = teacher_rows(stats), student_rows(stats)
        if self.states == "teacher":
            student_N = torch.zeros_like(student_N)
        squared_N = residual_N.square()
        on_teacher, on_student = masked_sum(squared_N, teacher_N), masked_sum(squared_N, student_N)

        log_likelihood, counted_N = torch.zeros_like(on_teacher), teacher_N
        if self.first_order == "sampled":
            log_likelihood = masked_sum(q.log_prob_taken_N, teacher_N)
        elif self.first_order == "expected":
            counted_N = teacher_N | student_N
            log_likelihood = masked_sum(expected_log_prob(stats, q), counted_N)
        loss = self.weight * (on_teacher + self.student_weight * on_student) - log_likelihood
        metrics = {
            "first_order": (-log_likelihood.detach(), counted_N.sum()),
            # consistency_residual has the student's sign of the log-ratio and +v: it is −δ.
            "residual": (-masked_sum(residual_N.detach(), teacher_N), (known_N & teacher_N).sum()),
            "residual_squared": (on_teacher.detach(), (known_N & teacher_N).sum()),
            "log_ratio": (masked_sum(log_ratio_N.detach(), teacher_N), teacher_N.sum()),
            "value": (masked_sum(value_N.detach(), teacher_N), teacher_N.sum()),
        }
        if self.states == "both":
            metrics["residual_student"] = (-masked_sum(residual_N.detach(), student_N), (known_N & student_N).sum())
            metrics["residual_squared_student"] = (on_student.detach(), (known_N & student_N).sum())
            metrics["log_ratio_student"] = (masked_sum(log_ratio_N.detach(), student_N), student_N.sum())
        return LossOutput(loss, metrics)
