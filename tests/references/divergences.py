"""Divergences between two distributions, from their printed definitions on probabilities; and MiniLLM's loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from references.losses import Episode, State


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(p: np.ndarray, q: np.ndarray, beta: float) -> float:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skewed(p: np.ndarray, q: np.ndarray, skew: float) -> float:
    return kl(p, skew * p + (1 - skew) * q)


def alpha_beta(p: np.ndarray, q: np.ndarray, a: float, b: float) -> float:
    inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -math.fsum(inside) / (a * b)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return math.fsum(abs(p - q)) / 2


def set_and_tail(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Teacher's and student's probabilities of the tokens of the set and of everything else as one event."""
    teacher = np.exp(state.teacher_log_probs)
    student = np.exp(state.logits - state.normaliser)
    return np.append(teacher, 1 - teacher.sum()), np.append(student, 1 - student.sum())


def distillm2(
    episodes: list[Episode],
    skew: float,
    student_weight: float,
    events: Callable[[State], tuple[np.ndarray, np.ndarray]],
) -> float:
    """Forward skewed KL of the teacher's states and w times the reverse of the student's, over given events."""
    total = 0.0
    for episode in episodes:
        for p, q in (events(state) for state in episode.states if state.taken is not None):
            total += student_weight * skewed(q, p, skew) if episode.from_student else skewed(p, q, skew)
    return total


def sampled_kl(p: np.ndarray, q: np.ndarray, drawn: np.ndarray) -> float:
    """Mean of log p/q over tokens that were drawn from p."""
    return math.fsum(math.log(p[token] / q[token]) for token in drawn) / len(drawn)


def minillm(
    episodes: list[Episode], gamma: float, length_normalised: bool, single_step: bool, clip: float, whiten: bool
) -> float:
    """The surrogate, transition by transition, sums written out."""
    single, ahead, ratios = [], [], []
    for episode in episodes:
        if not episode.from_student:
            continue
        acting = [t for t, s in enumerate(episode.states) if s.taken is not None]
        rewards = {}
        for t in acting:
            state = episode.states[t]
            own = state.logits[state.taken] - state.normaliser
            rewards[t] = state.teacher_log_probs[state.taken] - own
            ratios.append(math.exp(own - state.log_prob_sampled))
            teacher, student = set_and_tail(state)
            single.append(kl(student, teacher))
        for t in acting:
            first = t + 1 if single_step else t
            later = [k for k in acting if k >= first]
            total = sum(gamma ** (k - first) * rewards[k] for k in later)
            ahead.append(total / max(len(later), 1) if length_normalised else total)
    advantage = np.array(ahead)
    if whiten:
        advantage = (advantage - advantage.mean()) / math.sqrt(advantage.var() + 1e-8)
    loss = 0.0
    for one, a, w in zip(single, advantage, ratios, strict=True):
        loss += w * one if single_step else 0.0
        loss -= min(w * a, min(max(w, 1 - clip), 1 + clip) * a)
    return loss
