"""Top-p sets, one state at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ReferenceSet:
    """One action set, and every sum that its size was decided by."""

    ids: list[int]
    log_probs: list[float]
    mass: float
    log_sum_exp: float


def log_sum_exp(values: np.ndarray) -> float:
    """log Σ exp of finite or −inf values, with an exactly rounded sum."""
    top = float(np.max(values))
    return top + math.log(math.fsum(math.exp(float(v) - top) for v in values))


def top_p_set(
    logits: np.ndarray, p: float, max_actions: int | None = None, temperature: float = 1.0, slack: float = 0.0
) -> ReferenceSet:
    """Take tokens by falling probability, lower id first among equals, until their mass reaches p − slack.

    With p = 1 every token is taken. Then the cap keeps the first ``max_actions``.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    normaliser = log_sum_exp(scaled)
    ranking = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    chosen: list[int] = []
    for token in ranking:
        chosen.append(token)
        mass = math.fsum(math.exp(scaled[t] - normaliser) for t in chosen)
        if p < 1 and mass >= p - slack:
            break
    chosen = chosen[:max_actions]
    return ReferenceSet(
        ids=chosen,
        log_probs=[float(scaled[t] - normaliser) for t in chosen],
        mass=math.fsum(math.exp(scaled[t] - normaliser) for t in chosen),
        log_sum_exp=normaliser,
    )


def possible_sizes(logits: np.ndarray, p: float, max_actions: int | None, temperature: float, slack: float) -> set[int]:
    """Sizes that are right up to an error ``slack`` in the cumulative mass: one, unless a mass lies within it of p."""
    early = top_p_set(logits, p, max_actions, temperature, slack)
    late = top_p_set(logits, p, max_actions, temperature, -slack)
    return set(range(len(early.ids), len(late.ids) + 1))


def mass_of(log_probs: Sequence[float]) -> float:
    """Σ π over some tokens, at most 1."""
    return min(1.0, math.fsum(math.exp(x) for x in log_probs))


def size_at(log_probs: Sequence[float], p: float) -> int:
    """Length of the shortest prefix whose mass reaches p, or of the whole list."""
    return next((k for k in range(1, len(log_probs)) if mass_of(log_probs[:k]) >= p), len(log_probs))


def losses_along(masses: Sequence[float], gamma: float) -> tuple[float, float]:
    """Σ_{t≥0} and Σ_{t≥1} of γ^t (−log Z(s_t))."""
    terms = [gamma**t * -math.log(mass) for t, mass in enumerate(masses)]
    return math.fsum(terms), math.fsum(terms[1:])


def fewest_slots(states: Sequence[Sequence[float]], budget: float, gamma: float) -> int | None:
    """Smallest Σ k_t, k_t ≥ 1, of all combinations of prefixes whose loss is within the budget; None if none is."""
    within = [
        sum(sizes)
        for sizes in itertools.product(*(range(1, len(state) + 1) for state in states))
        if losses_along([mass_of(s[:k]) for s, k in zip(states, sizes, strict=True)], gamma)[0] <= budget
    ]
    return min(within, default=None)
