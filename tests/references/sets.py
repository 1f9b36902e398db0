"""Top-p sets, one state at a time."""

from __future__ import annotations

import math
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
