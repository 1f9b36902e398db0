"""Each claim about the reduced action space as one function that returns its measured margin.

A margin is signed: the claim holds where it is non-negative, up to a tolerance for rounding. The margin of an equality
is minus the largest difference, so it is never positive. Norms are over supported actions, a ∈ A_p(s). Proofs:
docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tdistill.errors import DomainError
from tdistill.tabular.optimum import TreeOptimum, least_residual, maximise
from tdistill.tabular.processes import Floats
from tdistill.tabular.solve import EPS, SolvedProcess, bellman, covered_mass_loss, project, soft_value
from tdistill.tabular.trees import TeacherTree

EQUALITY_TOLERANCE = 1e-8
"""Largest difference, in nats or as a relative one, at which two values count as equal."""

ALPHA_LADDER = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""Values of α at which χ²-BD is solved on a tree, rising."""

_NUM_PAIRS = 4
_TOLERATED_ROUNDINGS = 16


def kappa(p: float, gamma: float) -> float:
    """κ(p) = −γ/(1−γ) · log p, nats: the bound on the loss from a set of mass p.  Source: arXiv 2505.20335, §3."""
    return -gamma / (1 - gamma) * float(np.log(p))


def _norm(difference_SA: Floats, solved: SolvedProcess) -> float:
    return float(np.abs(difference_SA[solved.mask_SA]).max())


def fixed_points(solved: SolvedProcess) -> float:
    """Minus the largest distance of Q*, Q̄^{proj_p π*} and Q̄*_p from exact fixed points, by their residuals.

    ‖Q − Q_exact‖ ≤ ‖BQ − Q‖/(1 − γ) for a γ-contraction B. No claim of the paper: the premise of the others.
    """
    process = solved.process
    everything = np.ones_like(solved.mask_SA)
    residuals = [
        process.reward_SA + process.gamma * process.expected_next(soft_value(solved.q_star_SA, everything)),
        process.reward_SA + process.gamma * process.expected_next(soft_value(solved.q_restricted_SA, solved.mask_SA)),
        bellman(process, solved.projected_SA, solved.q_projected_SA),
    ]
    found = [solved.q_star_SA, solved.q_restricted_SA, solved.q_projected_SA]
    size = max(float(np.abs(target - q).max()) for target, q in zip(residuals, found, strict=True))
    return -size / (1 - process.gamma)


def contraction(solved: SolvedProcess, rng: np.random.Generator) -> float:
    """Smallest γ‖Q₁ − Q₂‖ − ‖B_p^π Q₁ − B_p^π Q₂‖ over pairs and over two policies, the teacher and a random one.

    Source: arXiv 2505.20335, proposition 1. Half of the pairs are random. In the other half Q₂ = Q₁ + c up to a
    perturbation of relative size 10⁻³ or 0: a constant shift attains equality wherever the episode goes on for sure,
    so a smaller modulus than γ would be noticed.
    """
    process, q_star = solved.process, solved.q_star_SA
    scale = max(1.0, float(np.abs(q_star).max()))
    policies = [
        solved.projected_SA,
        project(rng.dirichlet(np.ones(process.num_actions), size=process.num_states), solved.mask_SA),
    ]
    margin = np.inf
    for pair in range(_NUM_PAIRS):
        first = q_star + scale * rng.normal(size=q_star.shape)
        second = q_star + scale * rng.normal(size=q_star.shape)
        if pair >= _NUM_PAIRS // 2:
            second = first + scale * (rng.uniform(0.1, 1.0) + 1e-3 * (pair % 2) * rng.normal(size=q_star.shape))
        for policy in policies:
            after = bellman(process, policy, first) - bellman(process, policy, second)
            margin = min(margin, process.gamma * _norm(first - second, solved) - _norm(after, solved))
    return margin


def projected_policy_bound(solved: SolvedProcess) -> float:
    """κ(p) − ‖Q* − Q̄^{proj_p π*}‖.  Source: arXiv 2505.20335, proposition 2."""
    return kappa(solved.p, solved.process.gamma) - _norm(solved.q_star_SA - solved.q_projected_SA, solved)


def sandwich(solved: SolvedProcess) -> float:
    """Smallest of Q̄*_p − Q̄^{proj_p π*} and Q* − Q̄*_p.  Source: arXiv 2505.20335, proposition 3."""
    mask = solved.mask_SA
    lower = (solved.q_restricted_SA - solved.q_projected_SA)[mask].min()
    upper = (solved.q_star_SA - solved.q_restricted_SA)[mask].min()
    return float(min(lower, upper))


def restricted_optimum_bound(solved: SolvedProcess) -> float:
    """κ(p) − ‖Q* − Q̄*_p‖.  Source: arXiv 2505.20335, proposition 4."""
    return kappa(solved.p, solved.process.gamma) - _norm(solved.q_star_SA - solved.q_restricted_SA, solved)


def loss_value(solved: SolvedProcess) -> float:
    """−‖(Q* − Q̄^{proj_p π*}) − E_{proj_p π*}[Σ_{k≥1} −γ^k log Z(s_k)]‖.

    Source: derived in docs/theory.md. The two sides are solved apart: the left from rewards and entropies, the right
    from covered masses alone.
    """
    loss = covered_mass_loss(solved.process, solved.projected_SA, solved.covered_mass_S)
    return -_norm(solved.q_star_SA - solved.q_projected_SA - loss, solved)


def loss_value_bounds_restricted_optimum(solved: SolvedProcess) -> float:
    """Smallest E_{proj_p π*}[Σ_{k≥1} −γ^k log Z(s_k)] − (Q* − Q̄*_p).  Source: derived in docs/theory.md."""
    loss = covered_mass_loss(solved.process, solved.projected_SA, solved.covered_mass_S)
    return float((loss - (solved.q_star_SA - solved.q_restricted_SA))[solved.mask_SA].min())


@dataclass(frozen=True)
class SolvedTree:
    """A tree of teacher transitions and the maxima of χ²-BD on it at rising α."""

    tree: TeacherTree
    optima: tuple[TreeOptimum, ...]

    @property
    def settings(self) -> dict[str, float]:
        """γ, number of actions before truncation, p."""
        return {"gamma": self.tree.gamma, "num_actions": self.tree.num_actions, "p": self.tree.p}


def solve_tree(tree: TeacherTree, alphas: tuple[float, ...] = ALPHA_LADDER) -> SolvedTree:
    """Maximise χ²-BD at each α, from the maximum at the one before.

    Raises:
        DomainError: the values of α do not rise.
    """
    if not np.all(np.diff(alphas) > 0):
        raise DomainError(f"alphas = {alphas} must rise.")
    optima: list[TreeOptimum] = []
    for alpha in alphas:
        optima.append(maximise(tree, alpha, optima[-1] if optima else None))
    return SolvedTree(tree=tree, optima=tuple(optima))


def stationarity(solved: SolvedTree) -> float:
    """Minus the largest relative error of the identity that holds at the maximum of χ²-BD on a tree.

        π_Q/π_E · (1 − γ r⁻/2α) = 1 − r/2α

    r⁻ the recovered reward of the incoming transition, 0 at the root.  Source: derived in docs/theory.md.
    Where the printed objective's own gradient, taken by complex steps, is larger than that error, it counts instead:
    the identity says nothing about a point that is no maximum.
    """
    worst = 0.0
    for optimum in solved.optima:
        before_M = solved.tree.incoming(optimum.reward_M)[solved.tree.state_M]
        left_M = optimum.ratio_M * (1 - solved.tree.gamma * before_M / (2 * optimum.alpha))
        difference = float(np.abs(left_M - (1 - optimum.reward_M / (2 * optimum.alpha))).max())
        worst = max(worst, difference, optimum.residual)
    return -worst


def policy_error_vanishes(solved: SolvedTree) -> float:
    """Smallest of two margins along rising α, for the policy error K(α) = E_d[KL(π_E ‖ π_Q)], nats per episode.

        K(α_i) − K(α_{i+1})        the error does not grow
        R/4α − K(α)                and it falls at least as 1/α,  R = min_v E[(log π_E(a|s) + v(s) − γ v(s'))²]

    Source: derived in docs/theory.md.
    """
    errors = np.array([optimum.divergence(solved.tree) for optimum in solved.optima])
    alphas = np.array([optimum.alpha for optimum in solved.optima])
    return float(min((-np.diff(errors)).min(), (least_residual(solved.tree) / (4 * alphas) - errors).min()))


def divergence_round_off(solved: SolvedTree) -> float:
    """Tolerance of :func:`policy_error_vanishes`, nats: 16 ε · Σ d, ε = 2⁻⁵², Σ d the expected length of an episode."""
    return float(_TOLERATED_ROUNDINGS * EPS * solved.tree.reach_N.sum())
