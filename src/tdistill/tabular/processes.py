"""Random and structured soft Markov decision processes, small enough to be solved exactly.

Shape legend of this package, used as name suffixes:

    S  states        A  actions        B  successors of one (state, action)
    N  states of a tree        M  (state, action) slots of a tree, ragged as everywhere else
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdistill.errors import DomainError

Floats = NDArray[np.float64]

STRUCTURES = ("random", "stochastic", "chain", "tree", "ending")
REWARDS = ("flat", "gaussian", "sharp", "heavy_tailed", "zipf")

# The ranges over which the claims are checked.
GAMMA_RANGE = (0.9, 0.99)
P_RANGE = (0.3, 0.99)
NUM_ACTIONS_RANGE = (10, 1000)

_NUM_STATES_RANGE = (5, 40)
# Keeps a process of 1,000 actions at some ten thousand (state, action) pairs.
_MAX_PAIRS = 12_000
_BRANCHES = 3  # successors of a pair in a stochastic process, children of a node in a tree
_MAX_END_ACTIONS = 3
# One draw in four takes each end of a range, so that the corners are among the cases.
_END_OF_RANGE_SHARE = 0.25
_DEGREES_OF_FREEDOM = 3  # Student t: finite variance, infinite kurtosis


@dataclass(frozen=True)
class SoftMDP:
    """A soft (entropy-regularised) Markov decision process with finitely many states and actions.

    Attributes:
        reward_SA: r(s, a), nats, float64 [S, A].
        next_SAB: int64 [S, A, B] successor states; S stands for the end, whose value is 0.
        prob_SAB: float64 [S, A, B] their probabilities; B = 1 is a deterministic process, as a language model's.
        gamma: discount γ in [0, 1).
        structure: one of ``STRUCTURES``, or what the caller calls it.
        reward: one of ``REWARDS``, or what the caller calls it.

    Raises:
        DomainError: arrays that do not fit together, or γ outside [0, 1).
    """

    reward_SA: Floats
    next_SAB: NDArray[np.int64]
    prob_SAB: Floats
    gamma: float
    structure: str = "given"
    reward: str = "given"

    def __post_init__(self) -> None:
        num_states, num_actions = self.reward_SA.shape
        if not 0 <= self.gamma < 1:
            raise DomainError(f"gamma = {self.gamma} is outside [0, 1): the fixed points need a discount below 1.")
        if self.next_SAB.shape != self.prob_SAB.shape or self.next_SAB.shape[:2] != (num_states, num_actions):
            raise DomainError(
                f"next_SAB {self.next_SAB.shape} and prob_SAB {self.prob_SAB.shape} must both be "
                f"[{num_states}, {num_actions}, B], as reward_SA is."
            )
        if self.next_SAB.min() < 0 or self.next_SAB.max() > num_states:
            raise DomainError(f"next_SAB must hold states 0 … {num_states - 1}, or {num_states} for the end.")
        if not np.allclose(self.prob_SAB.sum(-1), 1.0, rtol=0, atol=1e-12) or (self.prob_SAB < 0).any():
            raise DomainError("prob_SAB must be non-negative and sum to 1 over its last axis.")

    @property
    def num_states(self) -> int:
        """S."""
        return self.reward_SA.shape[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.reward_SA.shape[1]

    def expected_next(self, value_S: Floats) -> Floats:
        """E_{s'}[V(s')] of each pair, float64 [S, A]; the end has value 0."""
        with_end = np.append(value_S, 0.0)
        return np.einsum("sab,sab->sa", self.prob_SAB, with_end[self.next_SAB])

    def state_transitions(self, policy_SA: Floats) -> Floats:
        """P_π(s'|s) = Σ_a π(a|s) P(s'|s, a), float64 [S, S]; rows sum to less than 1 where the episode may end."""
        size = self.num_states
        weight_SAB = policy_SA[:, :, None] * self.prob_SAB
        cell_SAB = np.arange(size)[:, None, None] * (size + 1) + self.next_SAB
        flat = np.bincount(cell_SAB.ravel(), weight_SAB.ravel(), minlength=size * (size + 1)).astype(np.float64)
        return flat.reshape(size, size + 1)[:, :size]


def draw_process(rng: np.random.Generator, structure: str, reward: str) -> SoftMDP:
    """A process of the named structure and rewards, with γ, the numbers of states and of actions drawn.

    Structures: ``random`` (deterministic, each pair to a uniform state), ``stochastic`` (three successors with
    Dirichlet weights), ``chain`` (steps of −1 … 2 towards the end), ``tree`` (three children; the leaves end),
    ``ending`` (random, and up to three end actions in every state, as end tokens).
    Rewards: ``flat`` (equal), ``gaussian`` (scale 0.3–3), ``sharp`` (Gaussian, scale 5–20), ``heavy_tailed``
    (Student t with 3 degrees of freedom), ``zipf`` (log of a permuted Zipf law with exponent 1–2, as tokens have).

    Raises:
        DomainError: an unknown structure or kind of reward.
    """
    num_actions = draw_num_actions(rng)
    high = min(_NUM_STATES_RANGE[1], max(_NUM_STATES_RANGE[0], _MAX_PAIRS // num_actions))
    num_states = int(rng.integers(_NUM_STATES_RANGE[0], high + 1))
    next_SAB, prob_SAB = _transitions(rng, structure, num_states, num_actions)
    return SoftMDP(
        reward_SA=draw_rewards(rng, reward, num_states, num_actions),
        next_SAB=next_SAB,
        prob_SAB=prob_SAB,
        gamma=draw_between(rng, GAMMA_RANGE),
        structure=structure,
        reward=reward,
    )


def draw_between(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    """Uniform between two ends, and each end itself with a probability of one in four."""
    choice = rng.random()
    if choice < _END_OF_RANGE_SHARE:
        return ends[0]
    if choice < 2 * _END_OF_RANGE_SHARE:
        return ends[1]
    return float(rng.uniform(*ends))


def draw_num_actions(rng: np.random.Generator) -> int:
    """Log-uniform between 10 and 1,000, and each end itself with a probability of one in four."""
    low, high = NUM_ACTIONS_RANGE
    return round(float(np.exp(draw_between(rng, (np.log(low), np.log(high))))))


def draw_rewards(rng: np.random.Generator, kind: str, num_states: int, num_actions: int) -> Floats:
    """Rewards of the named kind, nats, float64 [S, A]; see :func:`draw_process`.

    Raises:
        DomainError: an unknown kind.
    """
    shape = (num_states, num_actions)
    if kind == "flat":
        return np.full(shape, rng.normal())
    if kind == "gaussian":
        return rng.normal(scale=np.exp(rng.uniform(np.log(0.3), np.log(3.0))), size=shape)
    if kind == "sharp":
        return rng.normal(scale=rng.uniform(5.0, 20.0), size=shape)
    if kind == "heavy_tailed":
        return rng.uniform(0.3, 3.0) * rng.standard_t(_DEGREES_OF_FREEDOM, size=shape)
    if kind == "zipf":
        ranks = 1.0 + np.argsort(rng.random(shape), axis=1)
        logits = -rng.uniform(1.0, 2.0, size=(num_states, 1)) * np.log(ranks) + rng.normal(scale=0.3, size=shape)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))
    raise DomainError(f"rewards {kind!r} are not known. Known: {', '.join(REWARDS)}.")


def _transitions(
    rng: np.random.Generator, structure: str, num_states: int, num_actions: int
) -> tuple[NDArray[np.int64], Floats]:
    shape = (num_states, num_actions, 1)
    if structure == "stochastic":
        prob_SAB = rng.dirichlet(np.ones(_BRANCHES), size=shape[:2])
        return rng.integers(0, num_states, size=(*shape[:2], _BRANCHES)), prob_SAB
    states = np.arange(num_states)[:, None, None]
    if structure == "random":
        next_SAB = rng.integers(0, num_states, size=shape)
    elif structure == "chain":
        next_SAB = np.clip(states + rng.integers(-1, 3, size=shape), 0, num_states)
    elif structure == "tree":
        next_SAB = np.minimum(_BRANCHES * states + rng.integers(1, _BRANCHES + 1, size=shape), num_states)
    elif structure == "ending":
        next_SAB = rng.integers(0, num_states, size=shape)
        next_SAB[:, : rng.integers(1, _MAX_END_ACTIONS + 1)] = num_states
    else:
        raise DomainError(f"structure {structure!r} is not known. Known: {', '.join(STRUCTURES)}.")
    return next_SAB, np.ones(shape)
