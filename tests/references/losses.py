"""Objectives, one transition at a time, from their printed definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from references.sets import log_sum_exp


@dataclass(frozen=True)
class State:
    """A state with its action set and the student's numbers on it.

    ``divergence`` is what a teacher in memory gives, ``log_prob_sampled`` the log-probability under the policy that
    sampled the action. ``taken`` is the slot of the action in the set; None where no action counts (bootstrap state,
    dropped transition).
    """

    logits: np.ndarray
    teacher_log_probs: np.ndarray
    taken: int | None
    normaliser: float = 0.0
    value_head: float = 0.0
    q_max: float = 0.0
    teacher_log_sum_exp: float = 0.0
    divergence: float = 0.0
    log_prob_sampled: float = 0.0
    slow_logits: np.ndarray | None = None
    slow_value_head: float = 0.0


@dataclass(frozen=True)
class Episode:
    """States one after another; ``truncated`` episodes may end with a state in which no action was taken.

    ``from_student``: the student took the actions. ``slow_*`` are the numbers under a slow copy of the student.
    """

    states: list[State]
    ends: Literal["terminal", "truncated"]
    bootstrap: bool = False
    from_student: bool = False


def projected(log_probs: np.ndarray) -> np.ndarray:
    """proj_p π: the probabilities on the set, divided by their sum."""
    probs = np.exp(np.asarray(log_probs, dtype=np.float64))
    return probs / math.fsum(probs)


def soft_value(q: np.ndarray) -> float:
    """E_{proj_p π_Q}[Q − log proj_p π_Q], the second of the two equal forms of V_p."""
    policy = np.exp(q - np.max(q))
    policy = policy / policy.sum()
    return float(sum(w * (x - math.log(w)) for w, x in zip(policy, q, strict=True) if w > 0))


def soft_q(state: State, coordinates: str, q_floor: float | None) -> np.ndarray:
    """Q on the set in the given coordinates."""
    q = np.asarray(state.logits, dtype=np.float64)
    if coordinates == "max_set":
        q = q - max(q)
    if q_floor is not None:
        q = np.array([max(x, q_floor) for x in q])
    if coordinates == "value_head":
        q = q - log_sum_exp(q) + state.value_head
    return q


def phi_value(name: str, x: float, scale: float, max_slope: float | None = None, tv_slope: float = 0.5) -> float:
    """c φ(x/c), continued below the point of slope ``max_slope`` by its tangent there."""
    if name == "identity" or math.isinf(scale):
        return x
    y = x / scale
    if name == "chi2":
        lowest = -math.inf if max_slope is None else 2 - 2 * max_slope
        value, slope = (lambda z: z - z * z / 4), max_slope
    elif name == "total_variation":
        if y > 0.5:
            return scale * (0.5 + (1 - tv_slope) * (y - 0.5))
        return scale * (y if y >= -0.5 else -0.5 + (1 + tv_slope) * (y + 0.5))
    else:
        slope = 4.0 if max_slope is None else max_slope
        # φ' = e^{−z}, 1/(1+z)², e^{−z}/(2 − e^{−z}), solved for z.
        lowest, value = {
            "reverse_kl": (-math.log(slope), lambda z: 1 - math.exp(-z)),
            "hellinger": (1 / math.sqrt(slope) - 1, lambda z: z / (1 + z)),
            "jensen_shannon": (math.log((1 + slope) / (2 * slope)), lambda z: math.log(2 - math.exp(-z))),
        }[name]
    if y >= lowest:
        return scale * value(y)
    return scale * (value(lowest) + slope * (y - lowest))


def iq_learn(
    episodes: list[Episode],
    alpha: float,
    gamma: float,
    coordinates: str = "raw",
    first_order: str = "sampled",
    q_floor: float | None = None,
    phi: str = "chi2",
    steps: int = 1,
    student_value_weight: float = 0.0,
    max_slope: float | None = None,
    tv_slope: float = 0.5,
) -> float:
    """−J = −Σ φ(Q(s,a) − γV(s')) + V(s) − γV(s') as printed and not telescoped, with what the package adds to it.

    ``expected`` puts the expectation under proj_p π* on φ's linear part. Where the next value is unknown, φ is its
    linear part, which does not depend on that value. With d > 1 steps the non-linear part x − φ(x) is that of the
    d-step residual. ``student_value_weight`` w: the value term is (1 − w) of the teacher's states, w of the student's.
    """

    def shape(x: float) -> float:
        return phi_value(phi, x, alpha, max_slope, tv_slope)

    objective = 0.0
    for episode in episodes:
        qs = [soft_q(state, coordinates, q_floor) for state in episode.states]
        values = [soft_value(q) for q in qs]
        for t, state in enumerate(episode.states):
            if state.taken is None:
                continue
            known = t + 1 < len(qs) or episode.ends == "terminal"
            following = values[t + 1] if t + 1 < len(qs) else 0.0
            if episode.from_student:
                objective -= student_value_weight * (values[t] - gamma * following) if known else 0.0
                continue
            reward = qs[t][state.taken] - gamma * following
            linear = reward
            if first_order != "sampled":
                expected = float(projected(state.teacher_log_probs) @ (qs[t] - gamma * following))
                linear = expected if first_order == "expected" else (reward + expected) / 2
            if not known:
                objective += linear - (values[t] - gamma * following)
                continue
            residual = reward
            if steps > 1:
                residual, u = values[t], t
                while u < t + steps and u < len(qs) and episode.states[u].taken is not None:
                    if u + 1 == len(qs) and episode.ends != "terminal":
                        break
                    residual += gamma ** (u - t) * (qs[u][episode.states[u].taken] - values[u])
                    u += 1
                residual -= gamma ** (u - t) * values[u] if u < len(qs) else 0.0
            objective += linear - (residual - shape(residual))
            objective -= (1 - student_value_weight) * (values[t] - gamma * following)
    return -objective


def sft(episodes: list[Episode]) -> float:
    """Σ −log softmax(logits)[a] over the support of the normaliser."""
    return sum(s.normaliser - float(s.logits[s.taken]) for e in episodes for s in e.states if s.taken is not None)


def off_support(episodes: list[Episode]) -> float:
    """Σ −Z log P − (1 − Z) log(1 − P), P = Σ_{a ∈ A} exp(Q(s,a) − L)."""
    total = 0.0
    for state in (s for e in episodes for s in e.states if s.taken is not None):
        covered = math.fsum(np.exp(state.teacher_log_probs))
        inside = math.fsum(np.exp(np.asarray(state.logits) - state.normaliser))
        total += -covered * math.log(inside) - (1 - covered) * math.log(1 - inside)
    return total


def kl_teacher_student(teacher_probs: np.ndarray, student_probs: np.ndarray) -> float:
    """Σ π log(π / π_Q) over outcomes with π > 0."""
    return math.fsum(t * math.log(t / s) for t, s in zip(teacher_probs, student_probs, strict=True) if t > 0)


def set_tail_kl(state: State) -> float:
    """KL between the distributions over the tokens of the set and one more outcome, all the others."""
    teacher = np.exp(np.asarray(state.teacher_log_probs, dtype=np.float64))
    student = np.exp(np.asarray(state.logits, dtype=np.float64) - state.normaliser)
    return kl_teacher_student(
        np.append(teacher, max(0.0, 1 - math.fsum(teacher))), np.append(student, 1 - math.fsum(student))
    )
