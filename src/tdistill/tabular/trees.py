"""Trees of teacher transitions, and the printed objective of χ² Bellman Distill on them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from tdistill.errors import DomainError
from tdistill.tabular.processes import (
    GAMMA_RANGE,
    P_RANGE,
    REWARDS,
    Floats,
    draw_between,
    draw_num_actions,
    draw_rewards,
)
from tdistill.tabular.solve import project, top_p_mask

Ints = NDArray[np.int64]

TERMINAL = -1
_MAX_DEPTH = 5
_MAX_STATES = 40
_ENOUGH_SLOTS = 400  # a tree of this many slots grows no further
_MAX_SLOTS = 1100  # one state of 1,000 actions and some more; the complex-step gradient costs the square
_COMPLEX_STEP = 1e-100  # the imaginary step of complex-step differentiation: its square underflows to nothing


@dataclass(frozen=True)
class Level:
    """The states of one depth: their numbers, their slots, and the slots that lead to them."""

    states: slice
    slots: slice
    starts: Ints
    sizes: Ints
    parent_slots: Ints

    def sum(self, values_m: Floats) -> Floats:
        """Sums over the slots of each state."""
        return np.add.reduceat(values_m, self.starts)

    def spread(self, values_n: Floats) -> Floats:
        """Values of the states, one for each of their slots."""
        return np.repeat(values_n, self.sizes)


@dataclass(frozen=True)
class TeacherTree:
    """Teacher transitions that form a tree: every state has one incoming transition, and one root has none.

    A language model is such a tree: a state is the whole text so far. States are numbered breadth first.

    Attributes:
        prob_M: proj_p π*(a|s) of each slot, float64.
        offsets: int64 [N + 1]; the slots of state n are ``offsets[n]:offsets[n + 1]``.
        parent_slot_N: int64, the slot whose transition leads to the state; −1 for the root.
        num_actions: number of actions A before truncation.
        p: mass of the sets.
        gamma: discount γ in [0, 1].

    Raises:
        DomainError: no tree, or probabilities that are not positive and normalised.
    """

    prob_M: Floats
    offsets: Ints
    parent_slot_N: Ints
    num_actions: int
    p: float
    gamma: float

    def __post_init__(self) -> None:
        parents = self.parent_slot_N[1:]
        if self.parent_slot_N[0] != TERMINAL or (parents < 0).any() or len(set(parents.tolist())) != len(parents):
            raise DomainError("parent_slot_N must be -1 for state 0, and a slot of its own for every other state.")
        if (self.state_M[parents] >= np.arange(1, len(self.parent_slot_N))).any() or (np.diff(parents) < 0).any():
            raise DomainError("parent_slot_N: states must be numbered breadth first, children after their parents.")
        if not 0 <= self.gamma <= 1:
            raise DomainError(f"gamma = {self.gamma} is outside [0, 1].")
        sums = np.add.reduceat(self.prob_M, self.offsets[:-1])
        if not (self.prob_M > 0).all() or not np.allclose(sums, 1, rtol=0, atol=1e-12):
            raise DomainError("prob_M must be positive and sum to 1 in every state.")

    @property
    def num_states(self) -> int:
        """N."""
        return len(self.parent_slot_N)

    @property
    def num_slots(self) -> int:
        """M."""
        return len(self.prob_M)

    @cached_property
    def state_M(self) -> Ints:
        """State of each slot."""
        return np.repeat(np.arange(self.num_states), np.diff(self.offsets))

    @cached_property
    def child_M(self) -> Ints:
        """State that each slot leads to; −1 where the episode ends."""
        child_M = np.full(self.num_slots, TERMINAL, dtype=np.int64)
        child_M[self.parent_slot_N[1:]] = np.arange(1, self.num_states)
        return child_M

    @cached_property
    def levels(self) -> list[Level]:
        """The states of each depth, root first."""
        depth_N = np.zeros(self.num_states, dtype=np.int64)
        for state in range(1, self.num_states):
            depth_N[state] = depth_N[self.state_M[self.parent_slot_N[state]]] + 1
        bounds = np.searchsorted(depth_N, np.arange(depth_N[-1] + 2))
        return [
            Level(
                states=slice(low, high),
                slots=slice(self.offsets[low], self.offsets[high]),
                starts=self.offsets[low:high] - self.offsets[low],
                sizes=np.diff(self.offsets[low : high + 1]),
                parent_slots=self.parent_slot_N[low:high],
            )
            for low, high in itertools.pairwise(bounds.tolist())
        ]

    @cached_property
    def weight_M(self) -> Floats:
        """d(s) π_E(a|s): how often the teacher takes each transition in an episode."""
        weight_M = self.prob_M.copy()
        for level in self.levels[1:]:
            weight_M[level.slots] *= level.spread(weight_M[level.parent_slots])
        return weight_M

    @cached_property
    def reach_N(self) -> Floats:
        """d(s): the probability that an episode of the teacher passes through the state."""
        return np.where(self.parent_slot_N == TERMINAL, 1.0, self.weight_M[self.parent_slot_N])

    def next_value(self, value_XN: NDArray) -> NDArray:
        """V(s') of each slot, [..., M]; 0 where the episode ends."""
        return np.where(self.child_M == TERMINAL, 0.0, value_XN[..., self.child_M])

    def incoming(self, reward_M: Floats) -> Floats:
        """r⁻: the value of each state's incoming transition, float64 [N]; 0 for the root, which has none."""
        return np.where(self.parent_slot_N == TERMINAL, 0.0, reward_M[self.parent_slot_N])


def soft_values(tree: TeacherTree, q_XM: NDArray) -> NDArray:
    """V(s) = log Σ_{a ∈ A_p(s)} exp Q(s, a), [..., N]; analytic in a complex argument."""
    shift_XN = np.maximum.reduceat(q_XM.real, tree.offsets[:-1], axis=-1)
    return shift_XN + np.log(np.add.reduceat(np.exp(q_XM - shift_XN[..., tree.state_M]), tree.offsets[:-1], axis=-1))


def printed_objective(tree: TeacherTree, q_XM: NDArray, alpha: float) -> NDArray:
    """χ²-BD as printed, over all teacher transitions of the tree.

    J(Q) = E[φ(Q(s,a) − γ V_p(s'))] − E[V_p(s) − γ V_p(s')],  φ(x) = x − x²/(4α).
    Source: arXiv 2505.20335, §4.

    Args:
        tree: the transitions and their weights.
        q_XM: soft Q-values, nats, float64 or complex128 [..., M].
        alpha: α > 0.
    Returns:
        [...], nats per episode.
    """
    value_XN = soft_values(tree, q_XM)
    discounted_XM = tree.gamma * tree.next_value(value_XN)
    reward_XM = q_XM - discounted_XM
    phi_XM = reward_XM - reward_XM**2 / (4 * alpha)
    return (tree.weight_M * (phi_XM - (value_XN[..., tree.state_M] - discounted_XM))).sum(-1)


def printed_gradient(tree: TeacherTree, q_M: Floats, alpha: float) -> Floats:
    """∂J/∂Q of :func:`printed_objective`, float64 [M], by complex steps: exact to rounding, no formula involved."""
    steps = q_M.astype(np.complex128) + 1j * _COMPLEX_STEP * np.eye(tree.num_slots)
    return printed_objective(tree, steps, alpha).imag / _COMPLEX_STEP


def draw_tree(rng: np.random.Generator) -> TeacherTree:
    """A random tree: a teacher over 10–1,000 actions in every state, truncated at a random p, grown breadth first.

    The kind of teacher logits (``processes.REWARDS``) is drawn per state, so that states differ in entropy as a
    language model's do. A supported action leads on with a probability that falls with depth, until the tree has 40
    states or 400 slots; all others end the episode. Trees of one state or without any choice are
    drawn again.
    """
    num_actions, p, gamma = draw_num_actions(rng), draw_between(rng, P_RANGE), draw_between(rng, GAMMA_RANGE)
    while True:
        probs, parents = [_truncated_teacher(rng, num_actions, p)], [TERMINAL]
        slot_depths = [0] * len(probs[0])
        slot = 0
        while slot < len(slot_depths) and len(parents) < _MAX_STATES:
            if len(slot_depths) >= _ENOUGH_SLOTS and len(parents) > 1:
                break
            depth = slot_depths[slot] + 1
            if depth <= _MAX_DEPTH and rng.random() < 1 / depth:
                kept = _truncated_teacher(rng, num_actions, p)
                if len(slot_depths) + len(kept) <= _MAX_SLOTS:
                    probs.append(kept)
                    parents.append(slot)
                    slot_depths += [depth] * len(kept)
            slot += 1
        if len(slot_depths) > len(parents) > 1:
            break
    return TeacherTree(
        prob_M=np.concatenate(probs),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part in probs])]).astype(np.int64),
        parent_slot_N=np.array(parents, dtype=np.int64),
        num_actions=num_actions,
        p=p,
        gamma=gamma,
    )


def _truncated_teacher(rng: np.random.Generator, num_actions: int, p: float) -> Floats:
    logits = draw_rewards(rng, str(rng.choice(REWARDS)), 1, num_actions)
    policy = np.exp(logits - logsumexp(logits))
    mask = top_p_mask(policy, p)
    return project(policy, mask)[mask]
