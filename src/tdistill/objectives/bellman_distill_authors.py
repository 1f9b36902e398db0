"""Bellman Distill as the released code has it; for comparison only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import Objective, masked_sum, refuse_full_support, teacher_rows
from tdistill.regularisers import Regulariser
from tdistill.types import ActionStats, Ends, LossOutput


@dataclass(frozen=True)
class BellmanDistillAuthors(Objective):
    """−J with the first term averaged over all |V| tokens instead of taken at the action.

    J = Σ (1/|V|) [Σ_{a ∈ A_p(s)} φ(Q̃(s,a) − γ V(s')) + (|V| − |A_p(s)|) φ(−γ V(s'))] − (V(s) − γ V(s')),
    Q̃ = max(logit − max_v logit, q_floor),  V(s) = Σ_v π̃(v|s) (Q̃(s,v) − log π̃(v|s)),
    π̃ ∝ 1[v ∈ A_p(s)] softmax(Q̃)(v) + ε over the whole vocabulary;  φ(x) = x − x²/(4α).
    Source: the code released with arXiv 2505.20335 (TobyLeelsz/Bellman-Distillation, ``bellman/losses.py``). It cannot
    run: its module of arguments, and with it the value of ε, and its ``kl_loss`` are missing. ε is filled in here;
    ``kl_loss`` was only logged there and is left out.
    Differs from the source: tokens off the set have Q̃ = q_floor, exact for those at least −q_floor below the largest
    logit; they enter through their number, so no row of the vocabulary is formed. ε stands for the source's ε times
    its p. Sets come from a store. After truncation the value is bootstrapped; without a recorded state the last
    transition is left out, as there. The plain-text term is the trainer's.

    Attributes:
        alpha: α of χ², nats; ``inf`` for the source's form without ``chi-reg``.
        gamma: discount γ in [0, 1].
        q_floor: Q̃ is clipped from below at this value, inside the graph.
        epsilon: added to every probability by the projection.
        mask_end: leave transitions that end the answer out and give the states before them the value 0, as the released
            code does, where padding and end token are one.

    Raises:
        DomainError: a field outside its domain; p = 1.
    """

    name: ClassVar[str] = "bellman_distill_authors"
    needs_q_max: ClassVar[bool] = True

    alpha: float = 0.1
    gamma: float = 0.99
    q_floor: float = -10.0
    epsilon: float = 1e-8
    mask_end: bool = True

    def __post_init__(self) -> None:
        check_discount(self.gamma, f"{self.name}: gamma")
        Regulariser("chi2", self.alpha)
        if not 0 < self.epsilon < math.inf:
            raise DomainError(
                f"bellman_distill_authors: epsilon = {self.epsilon} must be positive and finite, such as 1e-8."
            )
        if not -math.inf < self.q_floor < 0:
            raise DomainError(
                f"bellman_distill_authors: q_floor = {self.q_floor} must be negative: Q is at most 0. The source: -10."
            )

    def _values(self, q_M: Tensor, stats: ActionStats, num_off_N: Tensor) -> Tensor:
        """V(s) from the sets and the number of tokens off them, float [N], nats."""
        assert stats.vocab_size is not None
        rows_M = returns.slot_rows(stats.offsets, len(q_M))
        log_inside_N = returns.soft_value(q_M, stats.offsets)
        log_total_N = torch.logaddexp(log_inside_N, num_off_N.log() + self.q_floor)
        # Weights are in units of exp Q̃, where a probability of ε is ε Σ_v exp Q̃.
        log_epsilon_N = math.log(self.epsilon) + log_total_N
        log_normaliser_N = torch.logaddexp(log_inside_N, math.log(stats.vocab_size) + log_epsilon_N)
        log_policy_M = torch.logaddexp(q_M, log_epsilon_N[rows_M]) - log_normaliser_N[rows_M]
        log_policy_off_N = log_epsilon_N - log_normaliser_N
        inside_N = returns.sum_over_sets(log_policy_M.exp() * (q_M - log_policy_M), stats.offsets)
        return inside_N + num_off_N * log_policy_off_N.exp() * (self.q_floor - log_policy_off_N)

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats with q_max. Returns: −J, the sum over rows that count, nats; its terms as metrics."""
        refuse_full_support(stats, self.name, "train iq_learn with first_order: sampled there")
        assert stats.q_max_N is not None and stats.vocab_size is not None
        rows_M, sizes_N = returns.slot_rows(stats.offsets, len(stats.q_M)), stats.offsets.diff()
        num_off_N = (stats.vocab_size - sizes_N).to(stats.q_M.dtype)
        shifted_M = stats.q_M - stats.q_max_N[rows_M]
        q_M = shifted_M.clamp(min=self.q_floor)
        value_N = self._values(q_M, stats, num_off_N)
        ends_N = stats.ends_N == Ends.TERMINAL
        if self.mask_end:
            value_N = torch.where(ends_N, torch.zeros_like(value_N), value_N)

        following_N, known_N = returns.next_value(value_N, stats)
        phi = Regulariser("chi2", self.alpha)
        inside_M, _ = phi(q_M - self.gamma * following_N[rows_M])
        outside_N, _ = phi(-self.gamma * following_N)
        first_N = (returns.sum_over_sets(inside_M, stats.offsets) + num_off_N * outside_N) / stats.vocab_size
        counted_N = teacher_rows(stats) & known_N
        if self.mask_end:
            counted_N = counted_N & ~ends_N
        first, second = masked_sum(first_N, counted_N), masked_sum(value_N - self.gamma * following_N, counted_N)
        count = counted_N.sum()
        outside_set_N = returns.max_over_sets(shifted_M.detach(), stats.offsets) < 0
        metrics = {
            "first_term": (first.detach(), count),
            "value_term": (second.detach(), count),
            "value": (masked_sum(value_N.detach(), counted_N), count),
            "clipped_share": (((shifted_M < self.q_floor) & counted_N[rows_M]).sum(), masked_sum(sizes_N, counted_N)),
            "largest_outside_share": ((outside_set_N & counted_N).sum(), count),
        }
        return LossOutput(second - first, metrics)
