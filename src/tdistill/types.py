"""Frozen records that cross module borders.

Shape legend, used as name suffixes everywhere:

    B  sequences of a micro-batch        N  packed response positions (states), sequences one after another
    T  tokens of one response            M  action slots, all positions together (ragged, never padded)
    V  vocabulary                        D  hidden width
    R  states of one trajectory: T, or T + 1 when it is truncated and its last state is recorded
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class Ends(IntEnum):
    """How the transition that leaves a state goes on."""

    NEXT = 0
    """The next packed position is the next state."""
    TERMINAL = 1
    """The action was an end token: the value after it is 0."""
    TRUNCATED = 2
    """The episode was cut and no next state is recorded. Also marks the bootstrap row itself."""


@dataclass(frozen=True)
class PromptTokens:
    """A rendered prompt, and the existing answer to it if there is one.

    Attributes:
        prompt_id: unique name.
        prompt_ids: int32 [P], template applied, generation prompt included.
        response_ids: int32 [T], the given answer with its end token, or None.
        ends: how the given answer ends; ``truncated`` when it was cut at the length limit.
    """

    prompt_id: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray | None = None
    ends: Literal["terminal", "truncated"] = "terminal"


@dataclass(frozen=True)
class ActionSets:
    """Reduced action sets of R consecutive states, ragged.

    Attributes:
        offsets: int64 [R + 1]; the set of state r is ``ids[offsets[r]:offsets[r + 1]]``.
        ids: int32 [M] token ids, falling teacher probability inside each set, ties by lower id first.
        log_probs: float32 [M] teacher log-probabilities of the full softmax at the recorded temperature, nats.
        covered_mass: float32 [R] teacher mass of the set. Recorded as it is: below p where a cap cut the set;
            a taken token that was added to the set (given answers only) is not counted in it.
        log_sum_exp: float32 [R] log-sum-exp of the teacher's logits divided by the temperature, nats.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    covered_mass: np.ndarray
    log_sum_exp: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Trajectory:
    """One answer to one prompt, with the teacher's action set at every state.

    Attributes:
        prompt_id: name of the prompt, unique in a store together with ``answer_index``.
        answer_index: which answer to that prompt, from 0.
        prompt_ids: int32 [P] token ids of the rendered prompt.
        response_ids: int32 [T] token ids of the answer; includes the end token when ``ends`` is ``terminal``.
        ends: ``terminal`` (an end token was produced) or ``truncated`` (length limit).
        source: ``teacher`` (sampled from the truncated teacher), ``given`` (an existing answer that was scored) or
            ``student`` (sampled from the student in training and scored; never in a store, which calls it given).
        sets: action sets of the T states before each response token, and of the state after the last token when
            truncated. A store with p_max = 1 keeps no lists: every set is empty there.
        log_probs_sampled: float32 [T] log-probabilities of the response tokens under the policy that sampled them,
            nats; only for ``student``.
    """

    prompt_id: str
    answer_index: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    ends: Literal["terminal", "truncated"]
    source: Literal["teacher", "given", "student"]
    sets: ActionSets
    log_probs_sampled: np.ndarray | None = None


@dataclass(frozen=True)
class ActionStats:
    """All that an objective may see of a micro-batch; nothing here has a vocabulary axis.

    Rows are N packed response positions, sequences one after another, prompt positions left out. A truncated
    sequence has one more row for its last state (``has_action_N`` false, ``ends_N`` truncated).

    Attributes:
        offsets: int64 [N + 1]; the slots of row n are ``offsets[n]:offsets[n + 1]``.
        q_M: student logits of the set's tokens, float.
        log_prob_teacher_M: raw full-softmax teacher log-probabilities at the recorded temperature, nats, float.
        q_taken_N: student logit of the token taken; arbitrary where ``has_action_N`` is false.
        sequence_N: int64, which sequence of the micro-batch a row belongs to, non-decreasing.
        has_action_N: bool; false for a bootstrap row and for a transition dropped at p < p_max. Such a row still
            serves as the next state of the row before it.
        ends_N: int64, values of :class:`Ends`.
        log_normaliser_N: log-sum-exp of the student's logits over the support that the objective or the off-support
            term asks for: the vocabulary, all sets of the micro-batch (``union``), or those and weighted draws
            (``negatives``); or None.
        value_N: output of the scalar value head, or None.
        q_max_N: largest logit over the vocabulary, or None.
        vocab_size: tokens of the vocabulary, or None.
        log_prob_taken_teacher_N: raw full-softmax teacher log-probability of the token taken, nats; 0 where
            ``has_action_N`` is false. None where the store lists no sets.
        teacher_log_sum_exp_N: log-sum-exp of the teacher's logits at the recorded temperature, nats, or None.
        from_student_N: bool, true in trajectories that the student sampled and the teacher scored; None for none.
        added_M: bool, true for a token that the student took and that is in the set for that alone; None for none.
        divergence_N: the objective's divergence between the distributions of a teacher in memory and of the student,
            over the tokens that both have, or None.
        log_prob_sampled_N: log-probability that the policy which sampled an answer of the student gave the token
            taken, nats; 0 in other answers. Or None.
        target: the same rows under a slow copy of the student, without gradient, or None.
        full_support: the action set is the whole vocabulary (p = 1): no slots are listed and the soft value is
            ``log_normaliser_N`` over the vocabulary.
    """

    offsets: Tensor
    q_M: Tensor
    log_prob_teacher_M: Tensor
    q_taken_N: Tensor
    sequence_N: Tensor
    has_action_N: Tensor
    ends_N: Tensor
    log_normaliser_N: Tensor | None = None
    value_N: Tensor | None = None
    q_max_N: Tensor | None = None
    vocab_size: int | None = None
    log_prob_taken_teacher_N: Tensor | None = None
    teacher_log_sum_exp_N: Tensor | None = None
    from_student_N: Tensor | None = None
    added_M: Tensor | None = None
    divergence_N: Tensor | None = None
    log_prob_sampled_N: Tensor | None = None
    target: ActionStats | None = None
    full_support: bool = False


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    Attributes:
        loss: scalar, the **sum** over transitions, nats. Only the trainer divides.
        metrics: name → (sum, count), both scalars without gradient; the logged value is sum / count.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    import torch  # a store is read without it

    return torch.float32 if device.type == "mps" else torch.float64
