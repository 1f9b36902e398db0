"""Supervised fine-tuning on the trajectories: cross-entropy of the token taken over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tdistill.objectives.base import Objective, masked_sum
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class SFT(Objective):
    """Σ −log π_Q(a|s) = Σ log Σ_v exp Q(s,v) − Q(s,a), over all tokens v of the vocabulary.

    Source: maximum likelihood; on teacher answers it is sequence-level distillation (arXiv 1606.07947).
    Differs from the source: nothing.
    Reduces to: ``iq_learn`` at p = 1 with α = inf.
    """

    name: ClassVar[str] = "sft"
    uses_sets: ClassVar[bool] = False
    takes_rollouts: ClassVar[bool] = False
    support: ClassVar[Literal["vocabulary"]] = "vocabulary"

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats with the normaliser over the vocabulary. Returns: the sum over rows with an action, nats."""
        assert stats.log_normaliser_N is not None
        negative_log_likelihood = masked_sum(stats.log_normaliser_N - stats.q_taken_N, stats.has_action_N)
        return LossOutput(
            negative_log_likelihood, {"nll": (negative_log_likelihood.detach(), stats.has_action_N.sum())}
        )
