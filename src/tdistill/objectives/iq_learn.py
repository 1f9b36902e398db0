"""Bellman Distill: IQ-Learn on the teacher's reduced action space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdistill import returns
from tdistill.errors import DomainError
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class IQLearn:
    """−J of Bellman Distill with the χ² regulariser, summed over teacher transitions.

    J(Q) = Σ φ(Q(s,a) − γ V_p(s')) − (V_p(s) − γ V_p(s')),  φ(x) = x − x²/(4α),
    which is Σ log proj_p π_Q(a|s) − r²/(4α) with r = log proj_p π_Q(a|s) + V_p(s) − γ V_p(s').
    Source: arXiv 2505.20335, §4 (Bellman Distill); arXiv 2106.12142 (IQ-Learn).
    Differs from the source: the level of Q is a choice (``coordinates``); the first-order term can be the
    expectation over the stored teacher probabilities (``first_order``); clipping Q is off; after truncation the
    value is bootstrapped, or the transition loses its quadratic part only.

    Attributes:
        alpha: χ² weight α > 0; ``inf`` removes the temporal term (behaviour cloning on the sets). The paper: 0.1.
        gamma: discount γ in [0, 1]. The paper: 0.99.
        coordinates: ``raw`` (Q = logits, as printed), ``max_set`` (Q = logits − their maximum over the set),
            ``value_head`` (Q = log proj_p π_Q + v with a scalar head v on the last hidden state, so V_p = v).
        first_order: ``sampled`` (log-probability of the token taken, as printed) or ``expected``
            (Σ_a proj_p π*(a|s) log proj_p π_Q(a|s): the same expectation, lower variance).
        q_floor: Q is clipped from below at this value (the paper: −10), or None. Refused with ``value_head``.

    Raises:
        DomainError: a field outside its domain.
    Reduces to: masked cross-entropy when α = inf and the first-order term is sampled, for every γ.
    """

    name: ClassVar[str] = "iq_learn"
    uses_sets: ClassVar[bool] = True

    alpha: float = 100.0
    gamma: float = 0.99
    coordinates: Literal["raw", "max_set", "value_head"] = "value_head"
    first_order: Literal["sampled", "expected"] = "expected"
    q_floor: float | None = None

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise DomainError(f"iq_learn: alpha = {self.alpha} must be positive; use .inf to remove the χ² term.")
        if not 0 <= self.gamma <= 1:
            raise DomainError(f"iq_learn: gamma = {self.gamma} is outside [0, 1]. The paper uses 0.99.")
        if self.q_floor is not None and self.coordinates == "value_head":
            raise DomainError("iq_learn: q_floor needs logits as Q; set coordinates to raw or max_set, or drop it.")

    @property
    def needs_value_head(self) -> bool:
        """Whether the student must carry a scalar value head."""
        return self.coordinates == "value_head"

    support: ClassVar[None] = None

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: −J, the sum over rows with an action, nats; its terms as metrics."""
        if stats.full_support:
            self._check_full_support()
        q_M, q_taken_N, clipped = self._soft_q(stats)
        log_sum_N = stats.log_normaliser_N if stats.full_support else returns.soft_value(q_M, stats.offsets)
        assert log_sum_N is not None
        log_prob_taken_N = q_taken_N - log_sum_N
        value_N = stats.value_N if self.needs_value_head else log_sum_N
        assert value_N is not None
        next_value_N, known_N = returns.next_value(value_N, stats)
        reward_N = log_prob_taken_N + value_N - self.gamma * next_value_N

        act_N = stats.has_action_N
        log_likelihood = self._first_order(stats, q_M, log_sum_N, log_prob_taken_N)[act_N].sum()
        squared_N = torch.where(act_N & known_N, reward_N, torch.zeros_like(reward_N)).square()
        penalty = squared_N.sum() / (4 * self.alpha) if math.isfinite(self.alpha) else squared_N.sum() * 0.0
        count, known = act_N.sum(), (act_N & known_N).sum()
        metrics = {
            "first_order": (-log_likelihood.detach(), count),
            "chi2_penalty": (penalty.detach(), count),
            "recovered_reward": (reward_N.detach()[act_N & known_N].sum(), known),
            "residual_squared": (squared_N.detach().sum(), known),
            "value": (value_N.detach()[act_N].sum(), count),
        }
        if clipped is not None:
            metrics["clipped_share"] = clipped
        return LossOutput(penalty - log_likelihood, metrics)

    def _check_full_support(self) -> None:
        if self.first_order == "expected" or self.coordinates == "max_set" or self.q_floor is not None:
            raise DomainError(
                "iq_learn at p = 1 has no listed action sets: set first_order to sampled, coordinates to raw or "
                "value_head, and leave q_floor empty; or train at p < 1."
            )

    def _soft_q(self, stats: ActionStats) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        q_M, q_taken_N = stats.q_M, stats.q_taken_N
        if self.coordinates == "max_set":
            top_N = returns.max_over_sets(q_M, stats.offsets)
            q_M, q_taken_N = q_M - top_N[returns.slot_rows(stats.offsets, len(q_M))], q_taken_N - top_N
        if self.q_floor is None:
            return q_M, q_taken_N, None
        below = (q_M < self.q_floor).sum()
        return (
            q_M.clamp(min=self.q_floor),
            q_taken_N.clamp(min=self.q_floor),
            (below, torch.full_like(below, len(q_M))),
        )

    def _first_order(self, stats: ActionStats, q_M: Tensor, log_sum_N: Tensor, log_prob_taken_N: Tensor) -> Tensor:
        if self.first_order == "sampled":
            return log_prob_taken_N
        probs_M, _ = returns.teacher_probs(stats)
        return returns.sum_over_sets(probs_M * q_M, stats.offsets) - log_sum_N
