"""Multi-step quantities from their definitions as sums, one episode and one state at a time."""

from __future__ import annotations

from collections.abc import Sequence

from references.losses import Episode


def usable(episode: Episode, t: int) -> bool:
    """Whether the transition of state t exists, counts, and leads to a state of known value."""
    if t >= len(episode.states) or episode.states[t].taken is None:
        return False
    return t + 1 < len(episode.states) or episode.ends == "terminal"


def num_usable(episode: Episode, t: int, most: int | None) -> int:
    """Number of such transitions in a row from state t on, at most ``most``."""
    k = 0
    while (most is None or k < most) and usable(episode, t + k):
        k += 1
    return k


def n_step_return(
    episode: Episode, rewards: Sequence[float], values: Sequence[float], t: int, gamma: float, n: int | None
) -> float:
    """Σ_{i<k} γ^i r_{t+i} + γ^k V(s_{t+k}); the value after the last state of an episode is 0."""
    k = num_usable(episode, t, n)
    after = values[t + k] if t + k < len(episode.states) else 0.0
    return sum(gamma**i * rewards[t + i] for i in range(k)) + gamma**k * after


def lambda_return(
    episode: Episode, rewards: Sequence[float], values: Sequence[float], t: int, gamma: float, lam: float
) -> float:
    """(1 − λ) Σ_{n<K} λ^{n−1} G^{(n)} + λ^{K−1} G^{(K)}, K the longest that there is."""
    longest = num_usable(episode, t, None)
    total = sum(
        (1 - lam) * lam ** (n - 1) * n_step_return(episode, rewards, values, t, gamma, n) for n in range(1, longest)
    )
    return total + lam ** (longest - 1) * n_step_return(episode, rewards, values, t, gamma, longest)


def consistency_residual(
    episode: Episode, rewards: Sequence[float], values: Sequence[float], t: int, gamma: float, d: int
) -> float:
    """Σ_{i<k} γ^i r_{t+i} + V(s_t) − γ^k V(s_{t+k})."""
    return n_step_return(episode, rewards, [-v for v in values], t, gamma, d) + values[t]
