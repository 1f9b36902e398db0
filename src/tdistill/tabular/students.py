"""Processes with a horizon, and students that are trained on them with exact expectations.

All processes are finite and deterministic, and an episode ends after H steps; nothing here is sampling noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from tdistill.errors import DomainError
from tdistill.tabular.processes import Floats

PROCESSES = ("forgiving", "unforgiving")
STUDENTS = ("aliased", "low_rank", "exact")

ValueHead = Literal["per_step", "stationary"]

_NUM_CONTEXTS = 8
_NUM_ACTIONS = 6
_NUM_FEATURES = 6  # of the low-rank student, for 16 states
_LOGIT_SCALE = 2.0
# Logit of the action that leaves the track; those of the others have a scale of 2.
_FATAL_LOGIT = -8.0
_SINGULAR = 1e-10
_LBFGS = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}


@dataclass(frozen=True)
class HorizonProcess:
    """A teacher on 2·8 states, the same at every step, and the features a student sees.

    The teacher is soft-optimal, with V = 0, for the reward log π_E(a|s), whatever the horizon. The action space is the
    reduced one: all actions of a state are supported.

    Attributes:
        policy_SA: π_E, float64 [S, A].
        next_SA: int64 [S, A], the successor.
        start_S: distribution of the first state.
        features_SF: student logits are features times a matrix; float64 [S, F].
        off_track_S: bool, states that a wrong action leads to for good.
    """

    policy_SA: Floats
    next_SA: NDArray[np.int64]
    start_S: Floats
    features_SF: Floats
    off_track_S: NDArray[np.bool_]

    def occupancy(self, policy_SA: Floats, horizon: int) -> Floats:
        """P(s_t = s) under a policy for t < H, float64 [H, S]."""
        reach_TS = np.empty((horizon, len(policy_SA)))
        state_S = self.start_S
        for step in range(horizon):
            reach_TS[step] = state_S
            flow_SA = state_S[:, None] * policy_SA
            flow_S = np.bincount(self.next_SA.ravel(), flow_SA.ravel(), minlength=len(policy_SA))
            state_S = flow_S.astype(np.float64)
        return reach_TS


def draw_horizon_process(rng: np.random.Generator, kind: str, student: str) -> HorizonProcess:
    """A random process.

    ``forgiving``: every action leads to a uniform one of the 16 states; a wrong action is soon forgotten.
    ``unforgiving``: 8 states on the track and 8 off it, entered by one fatal action of each state on the track and
    never left; the teacher's policy there is another, and it rarely goes there.

    ``aliased``: the student sees one of 4 classes: two states on the track and the two off it that they lead to.
    ``low_rank``: 6 random features of 16 states. ``exact``: it sees the state, and can represent the teacher.

    Raises:
        DomainError: an unknown kind of process or student.
    """
    num_states = 2 * _NUM_CONTEXTS
    logits_SA = rng.normal(scale=_LOGIT_SCALE, size=(num_states, _NUM_ACTIONS))
    start_S = np.full(num_states, 1 / num_states)
    off_track_S = np.zeros(num_states, dtype=bool)
    if kind == "forgiving":
        next_SA = rng.integers(0, num_states, size=logits_SA.shape)
    elif kind == "unforgiving":
        next_SA = rng.integers(0, _NUM_CONTEXTS, size=logits_SA.shape)
        next_SA[_NUM_CONTEXTS:] += _NUM_CONTEXTS
        on_track = np.arange(_NUM_CONTEXTS)
        fatal = rng.integers(0, _NUM_ACTIONS, size=_NUM_CONTEXTS)
        next_SA[on_track, fatal] = on_track + _NUM_CONTEXTS
        logits_SA[on_track, fatal] = _FATAL_LOGIT
        off_track_S[_NUM_CONTEXTS:] = True
        start_S = np.where(off_track_S, 0.0, 1 / _NUM_CONTEXTS)
    else:
        raise DomainError(f"process {kind!r} is not known. Known: {', '.join(PROCESSES)}.")
    if student == "aliased":
        features_SF = np.eye(_NUM_CONTEXTS // 2)[np.arange(num_states) % (_NUM_CONTEXTS // 2)]
    elif student == "low_rank":
        features_SF = rng.normal(size=(num_states, _NUM_FEATURES))
    elif student == "exact":
        features_SF = np.eye(num_states)
    else:
        raise DomainError(f"student {student!r} is not known. Known: {', '.join(STUDENTS)}.")
    return HorizonProcess(np.exp(log_softmax(logits_SA, axis=1)), next_SA, start_S, features_SF, off_track_S)


def residual_form(process: HorizonProcess, horizon: int, gamma: float, head: ValueHead = "per_step") -> Floats:
    """The quadratic form C with ℓᵀCℓ = min over v of Σ_t E[(ℓ(s_t,a_t) + v_t(s_t) − γ v_{t+1}(s_{t+1}))²], v_H = 0.

    ``value_head`` coordinates: ℓ = log π_Q, and v is linear in the student's features. ``per_step``: with weights of
    its own at every step, as a hidden state that knows its position allows; the least-squares problem is then block
    tridiagonal in t, and its steps are eliminated one after another. ``stationary``: with the same weights throughout.

    Returns:
        float64 [S·A, S·A], positive semi-definite.
    """
    features_SF, flat_next = process.features_SF, process.next_SA.ravel()
    now_XF = np.repeat(features_SF, process.policy_SA.shape[1], axis=0)  # X runs over (s, a)
    next_XF = features_SF[flat_next]
    weight_TX = (process.occupancy(process.policy_SA, horizon)[:, :, None] * process.policy_SA).reshape(horizon, -1)
    if head == "stationary":
        inner_X, last_X = weight_TX[:-1].sum(0), weight_TX[-1]
        design_XF = now_XF - gamma * next_XF
        system = design_XF.T @ (inner_X[:, None] * design_XF) + now_XF.T @ (last_X[:, None] * now_XF)
        target = design_XF.T * inner_X + now_XF.T * last_X
        return np.diag(weight_TX.sum(0)) - target.T @ _inverse(system) @ target
    form = np.diag(weight_TX.sum(0))
    carried = np.zeros((features_SF.shape[1], features_SF.shape[1]))
    carried_target = np.zeros((features_SF.shape[1], len(flat_next)))
    for weight_X in weight_TX:
        inverse = _inverse(carried + now_XF.T @ (weight_X[:, None] * now_XF))
        target = carried_target + now_XF.T * weight_X
        coupling = -gamma * now_XF.T @ (weight_X[:, None] * next_XF)  # of v_t and v_{t+1}
        form -= target.T @ inverse @ target
        carried = gamma**2 * next_XF.T @ (weight_X[:, None] * next_XF) - coupling.T @ inverse @ coupling
        carried_target = -gamma * next_XF.T * weight_X - coupling.T @ inverse @ target
    return form


def _inverse(system: Floats) -> Floats:
    """Pseudo-inverse: a state that the teacher cannot reach at a step leaves its value free."""
    return np.asarray(np.linalg.pinv(system, rcond=_SINGULAR, hermitian=True), dtype=np.float64)


def train_student(
    process: HorizonProcess,
    horizon: int,
    form: Floats | None = None,
    alpha: float = np.inf,
    start: Floats | None = None,
) -> Floats:
    """Maximise Σ_t E_E[log π_Q(a_t|s_t)] − ℓᵀCℓ/4α over the student's weights by L-BFGS.

    Args:
        process: teacher, transitions, features.
        horizon: H.
        form: C of :func:`residual_form`; None is behaviour cloning.
        alpha: α; ``inf`` is behaviour cloning too.
        start: weights to start from, float64 [F, A]; None starts from 0.
    Returns:
        Weights, float64 [F, A].
    """
    shape = (process.features_SF.shape[1], process.policy_SA.shape[1])
    weight_SA = process.occupancy(process.policy_SA, horizon).sum(0)[:, None] * process.policy_SA / horizon

    def loss(flat: Floats) -> tuple[float, Floats]:
        log_policy_SA = log_softmax(process.features_SF @ flat.reshape(shape), axis=1)
        value, slope_SA = (weight_SA * log_policy_SA).sum(), weight_SA
        if form is not None:
            pull = form @ log_policy_SA.ravel() / horizon
            value = value - log_policy_SA.ravel() @ pull / (4 * alpha)
            slope_SA = weight_SA - pull.reshape(weight_SA.shape) / (2 * alpha)
        slope_SA = slope_SA - np.exp(log_policy_SA) * slope_SA.sum(1, keepdims=True)
        return -value, -(process.features_SF.T @ slope_SA).ravel()

    first = np.zeros(shape) if start is None else start
    return minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=_LBFGS).x.reshape(shape)


def rollout_measures(process: HorizonProcess, weights_FA: Floats, horizon: int) -> dict[str, float]:
    """What a student's own episodes are like, and what it loses on them.

    Returns:
        ``student_teacher``: KL(student's trajectories ‖ teacher's) = Σ_t E_{student}[KL(π_Q ‖ π_E)], which is also the
        loss in soft return for the teacher's reward, nats; ``teacher_student``: KL(teacher's ‖ student's
        trajectories), which behaviour cloning minimises by definition, nats; ``return``: E_teacher − E_student of
        Σ_t log π_E(a_t|s_t), nats; ``entropy``: mean entropy of the student's policy over its steps, nats;
        ``off_track``: share of its steps that lie off the track.
    """
    log_policy_SA = log_softmax(process.features_SF @ weights_FA, axis=1)
    policy_SA, log_teacher_SA = np.exp(log_policy_SA), np.log(process.policy_SA)
    own_S = process.occupancy(policy_SA, horizon).sum(0)
    teacher_S = process.occupancy(process.policy_SA, horizon).sum(0)
    own_return = own_S @ (policy_SA * log_teacher_SA).sum(1)
    own_entropy = own_S @ -(policy_SA * log_policy_SA).sum(1)
    return {
        "student_teacher": float(own_S @ (policy_SA * (log_policy_SA - log_teacher_SA)).sum(1)),
        "teacher_student": float(teacher_S @ (process.policy_SA * (log_teacher_SA - log_policy_SA)).sum(1)),
        "return": float(teacher_S @ (process.policy_SA * log_teacher_SA).sum(1) - own_return),
        "entropy": float(own_entropy / horizon),
        "off_track": float(own_S[process.off_track_S].sum() / horizon),
    }
