"""Pressure on tokens outside the action sets, which the objectives on the sets do not exert."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tdistill import returns
from tdistill.errors import DomainError
from tdistill.objectives.base import log_mass_inside_and_outside, masked_sum
from tdistill.types import ActionStats, LossOutput


@dataclass(frozen=True)
class OffSupport:
    """Cross-entropy between "in the set" and "outside" of teacher and student, weighted.

    Σ −Z log P − (1 − Z) log(1 − P),  log P = V_p(s) − L(s),  L the student's log-normaliser over the support and Z
    the teacher's covered mass.  Source: the binary part of the chain rule of KL(teacher‖student) over set and tail.
    With ``target = set``, Z is 1: the teacher that is learned is the one projected onto the set (arXiv 2505.20335, §3),
    which never samples outside it. In the student's own answers a token that is in the set for being taken alone is
    outside, or the student's mistakes would be taken for the teacher's policy.
    Differs from the source: with ``union`` the normaliser runs over the tokens of all sets of the micro-batch; with
    ``negatives`` it is estimated from those and shared uniform draws (importance-sampled softmax).

    Attributes:
        kind: ``none``; ``union`` (a small matrix product, blind to tokens in no set of the micro-batch);
            ``negatives`` (a somewhat larger one); ``tail`` (the whole vocabulary, as costly as SFT).
        weight: factor on the term.
        target: ``teacher``, its covered mass, or ``set``, all mass.

    Raises:
        DomainError: negative or infinite weight.
    Reduces to: with weight 1, ``tail`` and iq_learn's expected first-order term scaled by Z, set-and-tail forward KL;
    with that term unscaled and target ``set``, KL(proj_p π*‖π_Q) up to the teacher's entropy.
    """

    kind: Literal["none", "union", "negatives", "tail"] = "negatives"
    weight: float = 1.0
    target: Literal["teacher", "set"] = "set"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise DomainError(
                f"off_support: weight = {self.weight} must be finite and not negative; use kind none to drop it."
            )

    @property
    def support(self) -> Literal["vocabulary", "union", "negatives"] | None:
        """Tokens of the log-normaliser that the term needs."""
        if self.kind == "none":
            return None
        return "vocabulary" if self.kind == "tail" else self.kind

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Args: stats with the normaliser of ``support``. Returns: the weighted sum over rows with an action, nats."""
        if stats.added_M is not None:
            # Nothing of the slot counts: neither the student's mass there nor the teacher's.
            q_M, log_prob_M = (of.masked_fill(stats.added_M, -math.inf) for of in (stats.q_M, stats.log_prob_teacher_M))
            stats = replace(stats, q_M=q_M, log_prob_teacher_M=log_prob_M)
        _, mass_N = returns.teacher_probs(stats)
        mass_N = mass_N.clamp(max=1.0) if self.target == "teacher" else torch.ones_like(mass_N)
        log_inside_N, log_outside_N = log_mass_inside_and_outside(stats)
        term_N = -(mass_N * log_inside_N + (1 - mass_N) * log_outside_N)
        act_N = stats.has_action_N
        total = self.weight * masked_sum(term_N, act_N)
        outside = masked_sum(-torch.expm1(log_inside_N.detach()), act_N)
        return LossOutput(
            total, {"off_support": (total.detach(), act_N.sum()), f"mass_outside_{self.kind}": (outside, act_N.sum())}
        )
