"""What the check does not say: how tight κ(p) is, and how far χ²-BD is from the teacher at each α."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from scipy.special import xlogy

from tdistill.tabular.check import solved_processes, solved_trees
from tdistill.tabular.claims import ALPHA_LADDER, kappa
from tdistill.tabular.solve import SolvedProcess, covered_mass_loss

# Structures in which no episode ends: the sum behind the loss then has all its terms, as κ(p) supposes.
ENDLESS = ("random", "stochastic")


def shares_of_kappa(solved: SolvedProcess) -> tuple[float, float]:
    """The largest data-dependent loss, and ‖Q* − Q̄*_p‖, both over supported actions and as shares of κ(p)."""
    bound = kappa(solved.p, solved.process.gamma)
    loss = covered_mass_loss(solved.process, solved.projected_SA, solved.covered_mass_S)
    optimum = solved.q_star_SA - solved.q_restricted_SA
    return float(loss[solved.mask_SA].max() / bound), float(np.abs(optimum[solved.mask_SA]).max() / bound)


def measure_tightness(num_processes: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """Quartiles of the shares of κ(p), by kind of reward and by whether episodes end.

    The processes are those of the check at the same seed.

    Args:
        num_processes: number of random processes.
        seed: seed of all random numbers.
    Returns:
        Objects with ``reward``, ``episodes`` (``endless`` or ``ending``), ``cases``, ``perplexity`` (median over cases
        of exp of the teacher's mean entropy over states), ``loss_share`` and ``optimum_share`` (quartiles over cases).
    Raises:
        DomainError: fewer than one process.
    """
    groups: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for solved in solved_processes(num_processes, seed):
        process = solved.process
        entropy = -xlogy(solved.policy_SA, solved.policy_SA).sum(1).mean()
        key = (process.reward, "endless" if process.structure in ENDLESS else "ending")
        groups[key].append((float(np.exp(entropy)), *shares_of_kappa(solved)))
    rows = []
    for (reward, episodes), found in groups.items():
        perplexity, loss, optimum = np.array(found).T
        rows.append(
            {
                "reward": reward,
                "episodes": episodes,
                "cases": len(found),
                "perplexity": float(np.median(perplexity)),
                "loss_share": np.quantile(loss, [0.25, 0.5, 0.75]).tolist(),
                "optimum_share": np.quantile(optimum, [0.25, 0.5, 0.75]).tolist(),
            }
        )
    return rows


def measure_policy_error(num_trees: int = 300, seed: int = 0) -> list[dict[str, float]]:
    """How far the maximum of χ²-BD is from the teacher on the trees of the check, by α.

    Args:
        num_trees: number of random trees.
        seed: seed of all random numbers.
    Returns:
        For each α of the ladder ``alpha``, the median over trees of ``total_variation`` (largest over states) and of
        ``divergence`` (E_d[KL(π_E ‖ π_Q)], nats per episode).
    Raises:
        DomainError: fewer than one tree.
    """
    trees = list(solved_trees(num_trees, seed))
    return [
        {
            "alpha": alpha,
            "total_variation": float(np.median([s.optima[step].total_variation(s.tree) for s in trees])),
            "divergence": float(np.median([s.optima[step].divergence(s.tree) for s in trees])),
        }
        for step, alpha in enumerate(ALPHA_LADDER)
    ]
