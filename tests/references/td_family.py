"""The other members of the family, one transition at a time, from their printed definitions."""

from __future__ import annotations

import math

import numpy as np

from references.losses import Episode, State, phi_value, projected, soft_q, soft_value
from references.returns import consistency_residual, lambda_return, n_step_return, usable


def _slow(state: State) -> State:
    assert state.slow_logits is not None
    return State(state.slow_logits, state.teacher_log_probs, state.taken, value_head=state.slow_value_head)


def _action_value(state: State, coordinates: str) -> float:
    return float(soft_q(state, coordinates, None)[state.taken])


def _log_policy(state: State) -> np.ndarray:
    logits = np.asarray(state.logits, dtype=np.float64)
    return logits - (max(logits) + math.log(math.fsum(np.exp(logits - max(logits)))))


def _teacher_log_prob(state: State) -> float:
    return math.log(projected(state.teacher_log_probs)[state.taken])


def path_consistency(
    episodes: list[Episode],
    weight: float,
    gamma: float,
    steps: int,
    first_order: str,
    value: str,
    states: str,
    student_weight: float,
) -> float:
    """weight Σ δ² − Σ first-order term, δ with the teacher's reward."""
    total = 0.0
    for episode in episodes:
        if episode.from_student and states == "teacher":
            continue
        values = [state.value_head if value == "head" else 0.0 for state in episode.states]
        ratios = [
            0.0 if s.taken is None else _teacher_log_prob(s) - float(_log_policy(s)[s.taken]) for s in episode.states
        ]
        for t, state in enumerate(episode.states):
            if state.taken is None:
                continue
            if first_order == "expected":
                total -= float(projected(state.teacher_log_probs) @ _log_policy(state))
            elif first_order == "sampled" and not episode.from_student:
                total -= float(_log_policy(state)[state.taken])
            if usable(episode, t):
                # δ has the opposite sign of V in it.
                delta = consistency_residual(episode, ratios, [-v for v in values], t, gamma, steps)
                total += weight * (student_weight if episode.from_student else 1.0) * delta**2
    return total


def sqil(
    episodes: list[Episode], gamma: float, coordinates: str, reward: float, student_weight: float, target: str
) -> float:
    """Σ (Q − R − γV')² on the teacher's transitions, (Q − γV')² on the student's."""
    total = 0.0
    for episode in episodes:
        source = [s if target == "residual" else _slow(s) for s in episode.states]
        for t, state in enumerate(episode.states):
            if not usable(episode, t):
                continue
            after = soft_value(soft_q(source[t + 1], coordinates, None)) if t + 1 < len(source) else 0.0
            error = _action_value(state, coordinates) - gamma * after
            total += student_weight * error**2 if episode.from_student else (error - reward) ** 2
    return total


def ls_iq(
    episodes: list[Episode],
    gamma: float,
    coordinates: str,
    r_max: float,
    student_weight: float,
    absorbing: str,
    teacher_target: str,
    target: str,
) -> float:
    """Σ (Q − r − γV')², r = ±r_max, values bounded by r_max/(1 − γ), absorbing states after termination."""
    bound, total = r_max / (1 - gamma), 0.0
    for episode in episodes:
        sign = -1.0 if episode.from_student else 1.0
        source = [s if target == "residual" else _slow(s) for s in episode.states]
        for t, state in enumerate(episode.states):
            if not usable(episode, t):
                continue
            if t + 1 < len(source):
                after = min(max(soft_value(soft_q(source[t + 1], coordinates, None)), -bound), bound)
            else:
                after = sign * bound if absorbing == "signed" else 0.0
            goal = sign * r_max + gamma * after
            if teacher_target == "fixed" and not episode.from_student:
                goal = bound
            factor = student_weight if episode.from_student else 1.0
            total += factor * (_action_value(state, coordinates) - goal) ** 2
    return total


def teacher_q(
    episodes: list[Episode],
    gamma: float,
    coordinates: str,
    teacher_level: str,
    steps: int,
    lam: float | None,
    target: str,
) -> float:
    """½ Σ (Q − y)², the entropies of the states after the first inside y."""
    total = 0.0
    for episode in episodes:
        source = [s if target == "residual" else _slow(s) for s in episode.states]
        values = [soft_value(soft_q(s, coordinates, None)) for s in source]
        levels = [
            s.teacher_log_sum_exp + math.log(math.fsum(np.exp(s.teacher_log_probs)))
            if teacher_level == "logits"
            else 0.0
            for s in episode.states
        ]
        rewards, entropic = [], []
        for t, state in enumerate(episode.states):
            if state.taken is None:
                rewards.append(0.0)
                entropic.append(0.0)
                continue
            after = levels[t + 1] if t + 1 < len(levels) else 0.0
            # Q* of the action: the teacher's logit at the recorded temperature, or its projected log-probability.
            q_star = _teacher_log_prob(state) + levels[t]
            rewards.append(q_star - gamma * after)
            entropic.append(rewards[t] - float(_log_policy(source[t])[state.taken]))
        for t, state in enumerate(episode.states):
            if not usable(episode, t):
                continue
            if lam is None:
                y = n_step_return(episode, entropic, values, t, gamma, steps)
            else:
                y = lambda_return(episode, entropic, values, t, gamma, lam)
            y += rewards[t] - entropic[t]
            total += (_action_value(state, coordinates) - y) ** 2 / 2
    return total


def bellman_distill_authors(
    episodes: list[Episode],
    vocab_size: int,
    alpha: float,
    gamma: float,
    q_floor: float,
    epsilon: float,
    mask_end: bool,
) -> float:
    """−J over whole rows of the vocabulary, which are written out here."""

    def row(state: State) -> tuple[np.ndarray, float]:
        """Masked Q over the vocabulary and the soft value; tokens off the set follow those on it, at the floor."""
        size = len(state.logits)
        q = np.full(vocab_size, q_floor)
        q[:size] = [max(x - state.q_max, q_floor) for x in state.logits]
        mask = np.arange(vocab_size) < size
        policy = np.exp(q) / math.fsum(np.exp(q)) * mask + epsilon
        policy = policy / math.fsum(policy)
        return q * mask, math.fsum(policy * (q - np.log(policy)))

    objective = 0.0
    for episode in (e for e in episodes if not e.from_student):
        rows = [row(state) for state in episode.states]
        if mask_end and episode.ends == "terminal":
            rows[-1] = (rows[-1][0], 0.0)
        for t in range(len(rows)):
            last = t + 1 == len(rows)
            if not usable(episode, t) or (last and mask_end):
                continue
            after = 0.0 if last else rows[t + 1][1]
            first = math.fsum(phi_value("chi2", float(x) - gamma * after, alpha) for x in rows[t][0]) / vocab_size
            objective += first - (rows[t][1] - gamma * after)
    return -objective
