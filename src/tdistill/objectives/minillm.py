"""MiniLLM: policy gradient of the reverse KL between sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdistill import returns
from tdistill.actions import check_discount
from tdistill.errors import DomainError
from tdistill.objectives.base import masked_sum, student_rows
from tdistill.objectives.divergence import Divergence, kl_terms
from tdistill.types import ActionStats, Ends, LossOutput


@dataclass(frozen=True)
class MiniLLM(Divergence):
    """Σ_student w_t KL(π_Q‖π*)(s_t) − Σ_student min( w_t A_t, clip(w_t, 1 − ε, 1 + ε) A_t ).

    The single-step term has a gradient through π_Q at s_t; w_t in front of it has none. The long term is the surrogate
    of PPO for what follows:
    r_t = log π*(a_t|s_t) − log π_Q(a_t|s_t),  R_t = Σ_{k≥1} γ^{k−1} r_{t+k} / (number of those),  A_t = R_t, whitened;
    w_t = π_Q(a_t|s_t) / π̃(a_t|s_t), π̃ the policy that sampled: the teacher's mixed into the student's by
    ``rollouts.teacher_mix``. Rewards have no gradient.
    Source: Gu et al. 2023, arXiv 2306.08543, eq. 4–8 and algorithm 1; γ, whitening and the clip from its code.
    Differs from the source: rewards are those of the present student, not of the one that sampled; γ multiplies once
    per step and nothing after an answer's end is summed; whitening is over the micro-batch; J_PT is the phase's
    plain-text term (``data.text``); from the store, tokens outside the set are one event of the single-step term.

    Attributes:
        source: ``store`` or ``teacher``; rewards need probabilities over the vocabulary.
        gamma: discount γ in [0, 1]; the released code: 0.95.
        length_normalised: divide R_t by the number of its rewards.
        single_step: with the single-step term; without it R_t also holds r_t.
        clip: ε of the surrogate, above 0; ``inf`` for none.
        whiten: subtract the mean of R over the micro-batch and divide by its standard deviation. The loss of a step
            then depends on how it is cut into micro-batches.

    Raises:
        DomainError: a field outside its domain.
    Reduces to: ``reverse_kl`` on the student's answers with ``clip`` = ∞ where R is 0, as at the last token.
    """

    name: ClassVar[str] = "minillm"

    source: Literal["store", "teacher"] = "store"
    gamma: float = 0.95
    length_normalised: bool = True
    single_step: bool = True
    clip: float = 0.2
    whiten: bool = True

    def __post_init__(self) -> None:
        check_discount(self.gamma, f"{self.name}: gamma")
        if not self.clip > 0:
            raise DomainError(f"minillm: clip = {self.clip} must be positive; the released code has 0.2.")

    @property
    def reads_action(self) -> bool:
        """Whether it depends on the token taken."""
        return True

    @property
    def needs_rollouts(self) -> bool:
        """Whether it needs trajectories that the student sampled."""
        return True

    @property
    def needs_log_probs_sampled(self) -> bool:
        """Whether it reads how likely the student's answers were under the policy that sampled them."""
        return True

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """π_Q log π_Q/π*."""
        return kl_terms(log_probs_student, log_probs_teacher)

    def returns_ahead(self, reward_N: Tensor, stats: ActionStats) -> Tensor:
        """R_t, float [N], nats.

        Args:
            reward_N: r_t; not read where no action counts.
            stats: episodes.
        """
        act_N = stats.has_action_N
        reward_N = torch.where(act_N, reward_N, torch.zeros_like(reward_N))
        goes_on_N = (stats.ends_N == Ends.NEXT).to(reward_N.dtype)
        total_N = returns.discounted_sum(reward_N, self.gamma * goes_on_N)
        number_N = returns.discounted_sum(act_N.to(reward_N.dtype), goes_on_N)
        if self.single_step:
            total_N, number_N = (
                goes_on_N * torch.cat([values_N[1:], values_N.new_zeros(1)]) for values_N in (total_N, number_N)
            )
        return total_N / number_N.clamp(min=1) if self.length_normalised else total_N

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats. Returns: the sum over rows in which the student acted, nats; its terms as metrics."""
        single_N = self.values(stats)
        assert stats.log_normaliser_N is not None
        if stats.log_prob_taken_teacher_N is None or stats.log_prob_sampled_N is None:
            raise DomainError("minillm: the student's answers need log-probabilities of their tokens; use rollouts.")
        own_N = student_rows(stats)
        zero_N = torch.zeros_like(stats.q_taken_N)
        log_prob_N = torch.where(own_N, stats.q_taken_N - stats.log_normaliser_N, zero_N)
        reward_N = (stats.log_prob_taken_teacher_N - log_prob_N).detach()
        ahead_N = self.returns_ahead(reward_N, stats)
        advantage_N = _whitened(ahead_N, own_N) if self.whiten else ahead_N
        ratio_N = torch.exp(log_prob_N - torch.where(own_N, stats.log_prob_sampled_N, zero_N))
        clipped_N = ratio_N.clamp(1 - self.clip, 1 + self.clip) if self.clip < math.inf else ratio_N
        surrogate_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
        single = masked_sum(ratio_N.detach() * single_N, own_N) if self.single_step else zero_N.sum()
        long, count = masked_sum(surrogate_N, own_N), own_N.sum()
        return LossOutput(
            single - long,
            {
                "reverse_kl_student": (masked_sum(single_N.detach(), own_N), count),
                "reward": (masked_sum(reward_N, own_N), count),
                "return_ahead": (masked_sum(ahead_N, own_N), count),
                "importance_weight": (masked_sum(ratio_N.detach(), own_N), count),
                "clipped_share": ((own_N & (surrogate_N != ratio_N * advantage_N)).sum(), count),
            },
        )


def _whitened(values_N: Tensor, mask_N: Tensor) -> Tensor:
    """(x − mean) / standard deviation over the masked rows; fewer than two rows are left at 0."""
    count = mask_N.sum().clamp(min=1)
    centred_N = values_N - masked_sum(values_N, mask_N) / count
    variance = masked_sum(centred_N.square(), mask_N) / count
    # The same floor as in the released code.
    return centred_N * torch.rsqrt(variance + _SMALLEST_VARIANCE)


_SMALLEST_VARIANCE = 1e-8
