"""The inverse soft Bellman operator on the teacher's logits as a reward, learnt by soft Q-learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import (
    BellmanObjective,
    Coordinates,
    masked_sum,
    refuse_full_support,
    teacher_log_prob_taken,
)
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class TeacherQ(BellmanObjective):
    """½ Σ (Q(s_t,a_t) − y_t)², y_t a multi-step soft target for a reward under which the teacher is soft-optimal.

    r(s,a) = Q*(s,a) − γ V*_p(s'),  Q*(s,a) = log π*(a|s) + L(s),  V*_p(s) = log Σ_{A_p(s)} exp Q* = L(s) + log Z(s),
    L the log-sum-exp of the teacher's logits, Z its mass on the set, V*_p = 0 after termination.
    y_t = r_t + Σ_{1≤i<k} γ^i (r_{t+i} − log π_p(a_{t+i}|s_{t+i})) + γ^k V_p(s_{t+k}),  k = min(n, transitions left),
    with the student's π_p and V_p; or the exponential mixture over n with weight λ. The entropy terms make y_t the
    value of Q for every n where π_p is soft-optimal, whichever actions were taken.
    On the sets V*_p is the consistent choice: Q* is then the only fixed point of Q = r + γ log Σ_{A_p} exp Q. With
    L(s') in its place, V* at p = 1, the fixed point falls short of Q* by −γ log Z(s') where s' is the last state, and
    by more before it.
    ``normalised`` sets the arbitrary level of the teacher's logits so that V*_p = 0: Q* = r = log proj_p π*. The
    reward of ``logits`` is that plus V*_p(s) − γ V*_p(s'), potential-based shaping: the policy is the same, V_p higher
    by V*_p.
    Source: inverse soft Bellman operator, Garg et al. 2021 (arXiv 2106.12142), §4; soft targets along a path, Nachum
    et al. 2017 (arXiv 1702.08892), eq. 15; shaping, Ng, Harada, Russell 1999.
    Differs from the sources: the teacher's logits are given, so no reward is learnt; sets; the level. Actions of the
    teacher and of the student count alike.
    Target: ``slow`` takes V_p and the log π_p of later transitions from an exponential moving average of the
    student's weights, without gradient: one more forward pass per micro-batch and one copy of the weights.
    ``residual`` differentiates all of it.

    Attributes:
        gamma: discount γ in [0, 1].
        coordinates: ``value_head`` (Q = log π_p + v), ``raw`` (Q = logits) or ``max_set`` (logits − their maximum:
            V_p is then not free, and Q* is reached only where it has that level).
        teacher_level: ``normalised`` (V*_p = 0) or ``logits`` (V*_p = L + log Z).
        steps: n ≥ 1; 1 with ``lam``.
        lam: λ in [0, 1] of the λ-target, 1 to the end of the episode; or None for n steps.
        target: ``slow`` or ``residual``.

    Raises:
        DomainError: a field outside its domain; p = 1.
    Reduces to: half the squared residuals of ``path_consistency`` when ``normalised``, ``value_head``, ``residual``.
    """

    name: ClassVar[str] = "teacher_q"

    gamma: float = 0.99
    coordinates: Coordinates = "value_head"
    teacher_level: Literal["normalised", "logits"] = "normalised"
    steps: int = 1
    lam: float | None = None
    target: Literal["residual", "slow"] = "slow"

    def __post_init__(self) -> None:
        check_discount(self.gamma, f"{self.name}: gamma")
        if self.steps < 1:
            raise DomainError(f"teacher_q: steps = {self.steps} must be at least 1.")
        if self.lam is not None and not 0 <= self.lam <= 1:
            raise DomainError(f"teacher_q: lam = {self.lam} is outside [0, 1]; leave it empty for n-step targets.")
        if self.lam is not None and self.steps != 1:
            raise DomainError(f"teacher_q: lam = {self.lam} mixes all n; drop steps = {self.steps}, or lam.")

    def rewards(self, stats: ActionStats) -> Tensor:
        """Return r(s,a) of each transition, float [N], nats; arbitrary where no action counts."""
        log_prob_N = teacher_log_prob_taken(stats)
        if self.teacher_level == "normalised":
            return log_prob_N
        assert stats.teacher_log_sum_exp_N is not None
        value_N = stats.teacher_log_sum_exp_N + returns.soft_value(stats.log_prob_teacher_M, stats.offsets)
        following_N, _ = returns.next_value(value_N, stats)
        return log_prob_N + value_N - self.gamma * following_N

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: the sum over rows with an action and a known target, nats²; its terms."""
        refuse_full_support(stats, self.name, "train iq_learn with first_order: sampled there")
        q, later = self.present_and_later(stats)
        reward_N = self.rewards(stats)
        entropic_N = reward_N - later.log_prob_taken_N
        if self.lam is None:
            return_N = returns.n_step_return(entropic_N, later.value_N, stats, self.gamma, self.steps)
        else:
            return_N = returns.lambda_return(entropic_N, later.value_N, stats, self.gamma, self.lam)
        # The return is a target for V_p(s_t); that of Q(s_t, a_t) has no entropy term for a_t itself.
        target_N = return_N + later.log_prob_taken_N
        known_N = returns.windows(stats, 1).uses_N
        error_N = torch.where(known_N, q.action_value_N - target_N, torch.zeros_like(target_N))
        loss, count = error_N.square().sum() / 2, known_N.sum()
        return LossOutput(
            loss,
            {
                "td_error_squared": (error_N.detach().square().sum(), count),
                "td_error": (error_N.detach().sum(), count),
                "teacher_reward": (masked_sum(reward_N.detach(), known_N), count),
                "value": (masked_sum(q.value_N.detach(), known_N), count),
            },
        )
