"""Exact solutions of soft Markov decision processes: top-p sets, Bellman operators and their fixed points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lu_factor, lu_solve
from scipy.special import logsumexp, xlogy

from tdistill.errors import ProbabilityRangeError, TDistillError
from tdistill.tabular.processes import Floats, SoftMDP

Mask = NDArray[np.bool_]

EPS = float(np.finfo(np.float64).eps)
# A residual is as small as it gets once it lies within this many roundings of the values themselves.
_ROUNDINGS = 4
_TOLERATED_ROUNDINGS = 16
_MAX_POLICY_ITERATIONS = 200


def top_p_mask(policy_SA: Floats, p: float) -> Mask:
    """A_p(s): the smallest set of actions, by falling probability, whose mass reaches p.

    Ties: lower action first.  Source: arXiv 2505.20335, §3.

    Args:
        policy_SA: probabilities, float64 [S, A].
        p: target mass, in (0, 1].
    Returns:
        bool [S, A], at least one True in each row.
    Raises:
        ProbabilityRangeError: p outside (0, 1].
    """
    if not 0.0 < p <= 1.0:
        raise ProbabilityRangeError(f"p = {p} is outside (0, 1]. Use a probability such as 0.8, or 1 for all.")
    if p == 1.0:  # a sum of rounded probabilities may reach 1 early
        return np.ones(policy_SA.shape, dtype=bool)
    order = np.argsort(-policy_SA, axis=1, kind="stable")
    mass = np.take_along_axis(policy_SA, order, axis=1).cumsum(1)
    # An action belongs to the set when the mass before it is below p.
    inside = np.concatenate([np.ones((len(mass), 1), dtype=bool), mass[:, :-1] < p], axis=1)
    mask = np.empty_like(inside)
    np.put_along_axis(mask, order, inside, axis=1)
    return mask


def project(policy_SA: Floats, mask_SA: Mask) -> Floats:
    """proj_p π(a|s) = π(a|s)·1[a ∈ A_p(s)] / Z(s), Z(s) = Σ_{b ∈ A_p(s)} π(b|s).  Source: arXiv 2505.20335, §3."""
    kept = np.where(mask_SA, policy_SA, 0.0)
    return kept / kept.sum(1, keepdims=True)


def soft_value(q_SA: Floats, mask_SA: Mask) -> Floats:
    """V_p(s) = log Σ_{a ∈ A_p(s)} exp Q(s, a), nats, float64 [S].  Source: arXiv 2505.20335, §3."""
    return logsumexp(np.where(mask_SA, q_SA, -np.inf), axis=1)


def bellman(process: SoftMDP, projected_SA: Floats, q_SA: Floats) -> Floats:
    """Top-p soft Bellman operator of a policy.

    (B_p^π Q)(s, a) = r(s, a) + γ E_{a' ~ proj_p π}[Q(s', a') − log proj_p π(a'|s')], averaged over s'.
    Source: arXiv 2505.20335, §3.
    Differs from the source: the next state may be random; the value after the end is 0.

    Args:
        process: rewards, transitions, γ.
        projected_SA: proj_p π, float64 [S, A], 0 off the sets.
        q_SA: soft Q-values, nats, float64 [S, A]; what it holds off the sets has no effect.
    Returns:
        float64 [S, A], nats.
    """
    q_on_set = np.where(projected_SA > 0, q_SA, 0.0)
    value_S = (projected_SA * q_on_set - xlogy(projected_SA, projected_SA)).sum(1)
    return process.reward_SA + process.gamma * process.expected_next(value_S)


def policy_value(process: SoftMDP, policy_SA: Floats, gain_S: Floats) -> Floats:
    """Solve V = g + γ P_π V.

    One step of iterative refinement, with the residual taken from π and the transitions rather than from the
    assembled P_π, removes the rounding of P_π's sums over actions.

    Args:
        process: transitions, γ.
        policy_SA: float64 [S, A], rows sum to 1.
        gain_S: g, what a state yields in one step, nats, float64 [S].
    Returns:
        float64 [S], nats.
    """
    system = np.eye(process.num_states) - process.gamma * process.state_transitions(policy_SA)
    factors = lu_factor(system)
    value_S = lu_solve(factors, gain_S)
    after_S = gain_S + process.gamma * (policy_SA * process.expected_next(value_S)).sum(1)
    return value_S + lu_solve(factors, after_S - value_S)


def policy_q(process: SoftMDP, projected_SA: Floats) -> Floats:
    """Q̄^π, the fixed point of B_p^π, by a linear solve; float64 [S, A], nats.

    V(s) = E_{proj_p π}[r(s, a) − log proj_p π(a|s)] + γ P V,  Q̄^π = r + γ E V(s').
    """
    gain_S = (projected_SA * process.reward_SA - xlogy(projected_SA, projected_SA)).sum(1)
    return process.reward_SA + process.gamma * process.expected_next(policy_value(process, projected_SA, gain_S))


def optimal_q(process: SoftMDP, mask_SA: Mask) -> Floats:
    """Q̄*_p, the fixed point of r + γ log Σ_{A_p} exp Q(s', ·); Q* where the mask is all True.

    Soft policy iteration, which is Newton's method on V ↦ log Σ exp(r + γ E V) − V and converges quadratically:
    V ← V + (I − γ P_π)⁻¹ (TV − V), π = softmax of r + γ E V on the sets.

    Args:
        process: rewards, transitions, γ.
        mask_SA: the action sets, bool [S, A].
    Returns:
        float64 [S, A], nats, also off the sets.
    Raises:
        TDistillError: the residual does not come down to the rounding of V.
    """
    value_S = np.zeros(process.num_states)
    best = np.inf
    for _ in range(_MAX_POLICY_ITERATIONS):
        q_SA = process.reward_SA + process.gamma * process.expected_next(value_S)
        target_S = soft_value(q_SA, mask_SA)
        residual_S = target_S - value_S
        size = float(np.abs(residual_S).max())
        if size <= _ROUNDINGS * EPS * np.abs(target_S).max() or (size >= best and _settled(size, target_S)):
            return process.reward_SA + process.gamma * process.expected_next(target_S)
        best = min(best, size)
        policy_SA = np.where(mask_SA, np.exp(q_SA - target_S[:, None]), 0.0)
        value_S = value_S + policy_value(process, policy_SA, residual_S)
    raise TDistillError(
        f"Soft policy iteration left a residual of {best:.1e} nats after {_MAX_POLICY_ITERATIONS} steps "
        f"({process.structure} process, {process.num_states} states, gamma {process.gamma}). "
        "Lower gamma or the rewards."
    )


def _settled(size: float, target_S: Floats) -> bool:
    """Whether a residual that no longer falls is round-off of the S-term sums in P_π V."""
    return size <= _ROUNDINGS * EPS * len(target_S) * max(1.0, float(np.abs(target_S).max()))


def covered_mass_loss(process: SoftMDP, projected_SA: Floats, covered_mass_S: Floats) -> Floats:
    """The exact, data-dependent value of the loss Q* − Q̄^{proj_p π*}.

    E_{proj_p π*}[Σ_{k ≥ 1} −γ^k log Z(s_k)] from each (s, a), Z the teacher's mass on the set.
    Source: derived in docs/theory.md; the one-step loss in value is −log Z(s).

    Args:
        process: transitions, γ (rewards are not used).
        projected_SA: proj_p π*, float64 [S, A].
        covered_mass_S: Z, float64 [S].
    Returns:
        float64 [S, A], nats, non-negative.
    """
    surprise_S = policy_value(process, projected_SA, -np.log(covered_mass_S))
    return process.gamma * process.expected_next(surprise_S)


@dataclass(frozen=True)
class SolvedProcess:
    """A process, its teacher, the reduced action sets and the three fixed points, all float64 [S, A] or [S].

    Attributes:
        process: the process.
        p: mass of the sets.
        mask_SA: A_p(s).
        policy_SA: π* = softmax Q*.
        projected_SA: proj_p π*.
        covered_mass_S: Z(s).
        q_star_SA: Q*.
        q_projected_SA: Q̄^{proj_p π*}.
        q_restricted_SA: Q̄*_p.
    """

    process: SoftMDP
    p: float
    mask_SA: Mask
    policy_SA: Floats
    projected_SA: Floats
    covered_mass_S: Floats
    q_star_SA: Floats
    q_projected_SA: Floats
    q_restricted_SA: Floats

    @property
    def settings(self) -> dict[str, float]:
        """γ, number of actions, p."""
        return {"gamma": self.process.gamma, "num_actions": self.process.num_actions, "p": self.p}

    @property
    def round_off(self) -> float:
        """Tolerance of the inequalities, nats: 16 ε · max(1, ‖Q‖_∞) / (1 − γ), Q the largest of the three, ε = 2⁻⁵².

        Values of size ‖Q‖ carry errors of some ε‖Q‖, which a fixed point multiplies by up to 1/(1 − γ).
        """
        solutions = (self.q_star_SA, self.q_projected_SA, self.q_restricted_SA)
        scale = max(1.0, *(float(np.abs(q_SA).max()) for q_SA in solutions))
        return _TOLERATED_ROUNDINGS * EPS * scale / (1 - self.process.gamma)


def solve_process(process: SoftMDP, p: float) -> SolvedProcess:
    """Solve a process for its teacher, truncate the teacher at p, and solve for both reduced fixed points.

    Raises:
        ProbabilityRangeError: p outside (0, 1].
        TDistillError: the process cannot be solved to machine precision.
    """
    everything = np.ones(process.reward_SA.shape, dtype=bool)
    q_star_SA = optimal_q(process, everything)
    policy_SA = np.exp(q_star_SA - soft_value(q_star_SA, everything)[:, None])
    mask_SA = top_p_mask(policy_SA, p)
    projected_SA = project(policy_SA, mask_SA)
    return SolvedProcess(
        process=process,
        p=p,
        mask_SA=mask_SA,
        policy_SA=policy_SA,
        projected_SA=projected_SA,
        covered_mass_S=np.where(mask_SA, policy_SA, 0.0).sum(1),
        q_star_SA=q_star_SA,
        q_projected_SA=policy_q(process, projected_SA),
        q_restricted_SA=optimal_q(process, mask_SA),
    )
