"""The maximum of χ² Bellman Distill on a tree, to machine precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tdistill.errors import DomainError
from tdistill.tabular.processes import Floats
from tdistill.tabular.solve import EPS
from tdistill.tabular.trees import TERMINAL, TeacherTree, printed_gradient

_MAX_NEWTON_STEPS = 100
_ARMIJO = 1e-4
_NEARLY = 1e-9  # a relative gradient below this that no longer halves is round-off


def soft_backup(tree: TeacherTree, reward_M: Floats) -> tuple[Floats, Floats]:
    """Q and V of a reward: Q(s,a) = r(s,a) + γ V(s'), from the leaves to the root."""
    q_M, value_N = reward_M.copy(), np.zeros(tree.num_states)
    for level in reversed(tree.levels):
        q_m = q_M[level.slots]
        shift_n = np.maximum.reduceat(q_m, level.starts)
        value_n = shift_n + np.log(level.sum(np.exp(q_m - level.spread(shift_n))))
        value_N[level.states] = value_n
        if level.parent_slots[0] != TERMINAL:
            q_M[level.parent_slots] += tree.gamma * value_n
    return q_M, value_N


@dataclass(frozen=True)
class TreeOptimum:
    """The maximum of χ²-BD on a tree.

    Attributes:
        alpha: α.
        q_M: the maximising Q, nats.
        reward_M: the recovered reward r = Q − γ V(s'), nats.
        ratio_M: π_Q/π_E of each slot.
        residual: largest |∂J/∂Q| / (d π_E), the gradient being that of :func:`printed_gradient`.
    """

    alpha: float
    q_M: Floats
    reward_M: Floats
    ratio_M: Floats
    residual: float

    def divergence(self, tree: TeacherTree) -> float:
        """E_d[KL(π_E ‖ π_Q)], nats per episode, without cancellation: Σ d π_E (x − log(1 + x)), x = π_Q/π_E − 1."""
        excess_M = self.ratio_M - 1
        return float((tree.weight_M * (excess_M - np.log1p(excess_M))).sum())

    def total_variation(self, tree: TeacherTree) -> float:
        """max_s TV(π_E, π_Q)."""
        per_state = np.add.reduceat(np.abs(self.ratio_M - 1) * tree.prob_M, tree.offsets[:-1])
        return float(per_state.max() / 2)


def maximise(tree: TeacherTree, alpha: float, start: TreeOptimum | None = None) -> TreeOptimum:
    """Maximise χ²-BD on a tree by Newton's method.

    In r the objective is strictly concave (docs/theory.md), so there is one maximum, and Q ↔ r is one to one.

    Args:
        tree: the teacher's transitions.
        alpha: α > 0, finite.
        start: the maximum at another α, to start from.
    Returns:
        The maximum; ``residual`` says how exactly it was reached.
    Raises:
        DomainError: alpha not positive and finite.
    """
    if not 0 < alpha < np.inf:
        raise DomainError(f"alpha = {alpha} must be positive and finite; at inf the level of Q is not determined.")
    reward_M = np.zeros(tree.num_slots) if start is None else start.reward_M
    q_M, value_N = soft_backup(tree, reward_M)
    scaled = np.inf
    for _ in range(_MAX_NEWTON_STEPS):
        gradient_M, step_r_M = _newton_step(tree, q_M, value_N, reward_M, alpha)
        previous, scaled = scaled, float(np.abs(gradient_M / tree.weight_M).max())
        if scaled <= EPS or (scaled <= _NEARLY and scaled >= previous / 2):
            break
        slope = float(gradient_M @ step_r_M)
        objective, length = _concave_objective(tree, reward_M, value_N, alpha), 1.0
        while True:
            candidate_M = reward_M + length * step_r_M
            q_M, value_N = soft_backup(tree, candidate_M)
            gained = _concave_objective(tree, candidate_M, value_N, alpha) - objective
            # Near the maximum the gain drowns in the rounding of J; the full step is then right.
            if gained >= _ARMIJO * length * slope - 64 * EPS * (1 + abs(objective)):
                break
            length /= 2
        reward_M = candidate_M
    ratio_M = np.exp(q_M - value_N[tree.state_M] - np.log(tree.prob_M))
    residual = float(np.abs(printed_gradient(tree, q_M, alpha) / tree.weight_M).max())
    return TreeOptimum(alpha=alpha, q_M=q_M, reward_M=reward_M, ratio_M=ratio_M, residual=residual)


def _concave_objective(tree: TeacherTree, reward_M: Floats, value_N: Floats, alpha: float) -> float:
    """J as a function of r: E[φ(r)] − V(root) − (1 − γ) Σ_{s ≠ root} d(s) V(s), a concave function on a tree."""
    value = value_N[0] + (1 - tree.gamma) * (tree.reach_N[1:] @ value_N[1:])
    return float(tree.weight_M @ (reward_M - reward_M**2 / (4 * alpha)) - value)


def _newton_step(
    tree: TeacherTree, q_M: Floats, value_N: Floats, reward_M: Floats, alpha: float
) -> tuple[Floats, Floats]:
    """Gradient ∂J/∂r, and the Newton step in r, in time linear in M.

    With x the step in Q, L = ∂r/∂Q and D = d π_E/2α, the step minimises

        ½ Σ D (Lx)² + ½ Σ_s w(s) Var_{π_Q(·|s)}(x) − gᵀx,    (Lx)(s,a) = x(s,a) − γ Σ_b π_Q(b|s') x(s',b)

    a tree of blocks diag + rank one: the children of a slot are eliminated into the slot's own diagonal.
    """
    gamma, policy_M = tree.gamma, np.exp(q_M - value_N[tree.state_M])
    # w(s): what a unit of V(s) costs in the value terms, all paths from the root included.
    flow_N = (1 - gamma) * tree.reach_N
    flow_N[0] = 1.0
    for level in tree.levels[1:]:
        slots = level.parent_slots
        flow_N[level.states] += gamma * policy_M[slots] * flow_N[tree.state_M[slots]]
    slope_M = tree.weight_M * (1 - reward_M / (2 * alpha)) - flow_N[tree.state_M] * policy_M
    rhs_M = slope_M.copy()
    for level in tree.levels[1:]:
        rhs_M[level.slots] -= gamma * policy_M[level.slots] * level.spread(slope_M[level.parent_slots])

    stiffness_M = tree.weight_M / (2 * alpha)  # D, and after elimination what is left of it
    reply_M, pull_N = np.empty_like(q_M), np.empty(tree.num_states)
    unit_M = np.empty_like(q_M)
    for level in reversed(tree.levels):
        policy_m, flow_n = policy_M[level.slots], flow_N[level.states]
        diagonal_m = stiffness_M[level.slots] + level.spread(flow_n) * policy_m
        # 1 − w Σ π²/diagonal, as a sum of positive terms.
        rest_n = level.sum(policy_m * stiffness_M[level.slots] / diagonal_m)
        unit_m = policy_m / (diagonal_m * level.spread(rest_n))  # Y⁻¹π
        share_m = rhs_M[level.slots] / diagonal_m
        reply_m = share_m + level.spread(flow_n * level.sum(policy_m * share_m)) * unit_m  # Y⁻¹g
        unit_M[level.slots], reply_M[level.slots] = unit_m, reply_m
        pull_N[level.states] = level.sum(policy_m * reply_m)
        if (slots := level.parent_slots)[0] != TERMINAL:
            compliance_n = level.sum(policy_m * unit_m)
            stiffness_M[slots] /= 1 + gamma**2 * stiffness_M[slots] * compliance_n
            rhs_M[slots] += gamma * stiffness_M[slots] * pull_N[level.states]

    step_q_M = reply_M
    for level in tree.levels[1:]:
        slots = level.parent_slots
        force_n = gamma * stiffness_M[slots] * (step_q_M[slots] - gamma * pull_N[level.states])
        step_q_M[level.slots] += level.spread(force_n) * unit_M[level.slots]
    step_r_M = step_q_M.copy()
    for level in tree.levels[1:]:
        step_r_M[level.parent_slots] -= gamma * level.sum(policy_M[level.slots] * step_q_M[level.slots])
    return slope_M, step_r_M


def least_residual(tree: TeacherTree) -> float:
    """min over v of E[(log π_E(a|s) + v(s) − γ v(s'))²]: the smallest squared reward of a Q with the teacher's policy.

    Linear least squares in v. At finite α, E_d[KL(π_E ‖ π_Q)] is at most this over 4α.

    Returns:
        nats² per episode.
    """
    root_weight_M = np.sqrt(tree.weight_M)
    design = np.zeros((tree.num_slots, tree.num_states))
    design[np.arange(tree.num_slots), tree.state_M] = 1.0
    goes_on = tree.child_M != TERMINAL
    design[goes_on, tree.child_M[goes_on]] -= tree.gamma
    design *= root_weight_M[:, None]
    target_M = root_weight_M * np.log(tree.prob_M)
    solution, *_ = np.linalg.lstsq(design, -target_M, rcond=None)
    return float(((target_M + design @ solution) ** 2).sum())
