"""What an objective is, and soft Q-values in the coordinates that objectives on sets share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdistill import returns
from tdistill.errors import DomainError
from tdistill.types import ActionStats, LossOutput

Coordinates = Literal["raw", "max_set", "value_head"]


class Objective:
    """A pure function of :class:`ActionStats`. What a class does not say has the value given here."""

    name: ClassVar[str]
    """Its key in the table."""

    @property
    def uses_sets(self) -> bool:
        """Whether it reads the action sets; then p applies and transitions outside A_p are dropped."""
        return True

    @property
    def reads_action(self) -> bool:
        """Whether it depends on the token taken, or on the next state through it."""
        return True

    @property
    def uses_off_support(self) -> bool:
        """Whether the phase's off-support term is added to it."""
        return self.uses_sets

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher in memory runs in each step; then it has ``terms`` as ``Divergence`` does."""
        return False

    @property
    def needs_value_head(self) -> bool:
        """Whether the student must carry a scalar value head."""
        return False

    @property
    def support(self) -> Literal["vocabulary", "union", "negatives"] | None:
        """Tokens of the log-normaliser that it reads."""
        return None

    @property
    def needs_rollouts(self) -> bool:
        """Whether it needs trajectories that the student sampled."""
        return False

    @property
    def takes_rollouts(self) -> bool:
        """Whether rollouts may be mixed in; not where tokens are imitated whoever took them."""
        return True

    @property
    def needs_log_probs_sampled(self) -> bool:
        """Whether it reads how likely the student's answers were under the policy that sampled them."""
        return False

    @property
    def needs_target(self) -> bool:
        """Whether it reads ``target``, the statistics under a slow copy of the student."""
        return False

    @property
    def least_log_prob_bits(self) -> int:
        """Bits of stored log-probabilities below which it is another objective, 8 or 16."""
        return 8

    @property
    def needs_q_max(self) -> bool:
        """Whether it reads the largest logit over the vocabulary."""
        return False

    def __call__(self, stats: ActionStats) -> LossOutput:
        """Return the loss of a micro-batch, a sum over transitions."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftQ:
    """Soft Q-values of the rows in chosen coordinates.

    Attributes:
        q_M: Q on the sets, nats; before a value head is added.
        q_taken_N: Q of the action taken, in the same level as ``q_M``.
        log_sum_N: log-sum-exp of ``q_M`` over the set.
        value_N: soft value V_p(s) in these coordinates.
        clipped: slots below the floor and slots in all, or None without a floor.
    """

    q_M: Tensor
    q_taken_N: Tensor
    log_sum_N: Tensor
    value_N: Tensor
    clipped: tuple[Tensor, Tensor] | None = None

    @property
    def log_prob_taken_N(self) -> Tensor:
        """Log proj_p π_Q(a|s) of the action taken."""
        return self.q_taken_N - self.log_sum_N

    @property
    def action_value_N(self) -> Tensor:
        """Q(s,a) of the action taken, in the coordinates asked for."""
        return self.log_prob_taken_N + self.value_N


def soft_q(stats: ActionStats, coordinates: Coordinates, q_floor: float | None = None) -> SoftQ:
    """Soft Q-values in a level of choice.

    ``raw``: Q = logits. ``max_set``: Q = logits − their maximum over the set. ``value_head``: Q = log proj_p π_Q + v,
    so that V_p = v; the level of the logits drops out.  Source: method of the package; the paper uses ``raw``.

    Args:
        stats: rows; with ``value_N`` for ``value_head``.
        coordinates: the level of Q.
        q_floor: Q is clipped from below at this value, or None.
    """
    q_M, q_taken_N, clipped = stats.q_M, stats.q_taken_N, None
    if coordinates == "max_set":
        top_N = returns.max_over_sets(q_M, stats.offsets)
        q_M, q_taken_N = q_M - top_N[returns.slot_rows(stats.offsets, len(q_M))], q_taken_N - top_N
    if q_floor is not None:
        below = (q_M < q_floor).sum()
        clipped = (below, torch.full_like(below, len(q_M)))
        q_M, q_taken_N = q_M.clamp(min=q_floor), q_taken_N.clamp(min=q_floor)
    log_sum_N = stats.log_normaliser_N if stats.full_support else returns.soft_value(q_M, stats.offsets)
    assert log_sum_N is not None
    value_N = stats.value_N if coordinates == "value_head" else log_sum_N
    assert value_N is not None
    return SoftQ(q_M, q_taken_N, log_sum_N, value_N, clipped)


def teacher_rows(stats: ActionStats) -> Tensor:
    """Rows whose action counts and was the teacher's (or given), bool [N]."""
    if stats.from_student_N is None:
        return stats.has_action_N
    return stats.has_action_N & ~stats.from_student_N


def student_rows(stats: ActionStats) -> Tensor:
    """Rows whose action counts and was sampled from the student, bool [N]."""
    if stats.from_student_N is None:
        return torch.zeros_like(stats.has_action_N)
    return stats.has_action_N & stats.from_student_N


def masked_sum(values_N: Tensor, mask_N: Tensor) -> Tensor:
    """Sum of the values where the mask holds; what is elsewhere has no gradient, not even if it is not finite."""
    return torch.where(mask_N, values_N, torch.zeros_like(values_N)).sum()


def expected_log_prob(stats: ActionStats, q: SoftQ) -> Tensor:
    """Σ_a proj_p π*(a|s) log proj_p π_Q(a|s), float [N], nats."""
    probs_M, _ = returns.teacher_probs(stats)
    return returns.sum_over_sets(probs_M * q.q_M, stats.offsets) - q.log_sum_N


# Largest log of the student's mass on a set: keeps log(1 − mass) finite where a set is the whole support. Beyond it the
# gradient is 0: an outside mass below 1e-6, from the difference of two float32 log-sum-exps, is rounding, and the
# gradient of a smooth form would have a random direction there.
_MAX_LOG_MASS = -1e-6


def log_mass_inside_and_outside(stats: ActionStats) -> tuple[Tensor, Tensor]:
    """Logarithms of the student's mass on the set and outside it, over the normaliser's support: float [N] each."""
    assert stats.log_normaliser_N is not None
    log_inside_N = (returns.soft_value(stats.q_M, stats.offsets) - stats.log_normaliser_N).clamp(max=_MAX_LOG_MASS)
    return log_inside_N, torch.log(-torch.expm1(log_inside_N))


def teacher_log_prob_taken(stats: ActionStats) -> Tensor:
    """Log proj_p π*(a|s) of the action taken, float [N], nats."""
    assert stats.log_prob_taken_teacher_N is not None
    _, mass_N = returns.teacher_probs(stats)
    return stats.log_prob_taken_teacher_N - torch.log(torch.where(mass_N > 0, mass_N, torch.ones_like(mass_N)))


def refuse_full_support(stats: ActionStats, who: str, remedy: str) -> None:
    """Raise DomainError at p = 1, where a store lists no sets."""
    if stats.full_support:
        raise DomainError(f"{who} at p = 1 has no listed action sets: {remedy}; or train at p < 1.")


class BellmanObjective(Objective):
    """What objectives on Bellman errors share. The dataclass declares the two fields.

    ``target`` says where the value of the next state comes from: ``residual``, the student itself, with gradient; or
    ``slow``, an exponential moving average of its weights, without: one more forward pass per micro-batch and one copy
    of the weights.
    """

    coordinates: Coordinates
    target: Literal["residual", "slow"]

    @property
    def needs_value_head(self) -> bool:
        """Whether the student must carry a scalar value head."""
        return self.coordinates == "value_head"

    @property
    def needs_target(self) -> bool:
        """Whether it reads the statistics under a slow copy of the student."""
        return self.target == "slow"

    def present_and_later(self, stats: ActionStats) -> tuple[SoftQ, SoftQ]:
        """Return soft Q-values of the student, and those that values of next states are taken from."""
        if self.coordinates == "max_set":
            refuse_full_support(stats, self.name, "set coordinates to raw or value_head")
        present = soft_q(stats, self.coordinates)
        if self.target == "residual":
            return present, present
        if stats.target is None:
            raise DomainError(
                f"{self.name}: target = slow needs the statistics of a slow copy; the trainer provides them."
            )
        return present, soft_q(stats.target, self.coordinates)


class TwoSidedSquares(BellmanObjective):
    """Squared errors on the teacher's transitions, and weighted ones on the student's. The dataclass has the field."""

    student_weight: float

    @property
    def needs_rollouts(self) -> bool:
        """Whether it needs trajectories that the student sampled."""
        return self.student_weight > 0

    def check_student_weight(self) -> None:
        """Raise DomainError unless 0 ≤ student_weight < ∞."""
        if not 0 <= self.student_weight < math.inf:
            raise DomainError(
                f"{self.name}: student_weight = {self.student_weight} must be finite and not negative; 0 drops the "
                "student's transitions."
            )

    def squares(
        self,
        errors: tuple[Tensor, Tensor],
        rows: tuple[Tensor, Tensor],
        recovered_N: Tensor,
        value_N: Tensor,
    ) -> LossOutput:
        """Sum the squares.

        Args:
            errors: of the teacher's and of the student's transitions, float [N] each, nats.
            rows: which rows these are, bool [N] each.
            recovered_N: recovered reward, for the log.
            value_N: soft value, for the log.
        Returns:
            The loss, nats², and what is logged of it.
        """
        (teacher_N, student_N), zero_N = rows, torch.zeros_like(recovered_N)
        on_teacher, on_student = (
            torch.where(mask_N, error_N, zero_N).square().sum() for error_N, mask_N in zip(errors, rows, strict=True)
        )
        metrics = {
            "bellman_error_squared": (on_teacher.detach(), teacher_N.sum()),
            "recovered_reward": (masked_sum(recovered_N.detach(), teacher_N), teacher_N.sum()),
            "value": (masked_sum(value_N.detach(), teacher_N), teacher_N.sum()),
        }
        if self.student_weight > 0:
            metrics |= {
                "bellman_error_squared_student": (on_student.detach(), student_N.sum()),
                "recovered_reward_student": (masked_sum(recovered_N.detach(), student_N), student_N.sum()),
            }
        return LossOutput(on_teacher + self.student_weight * on_student, metrics)
