"""Run every claim over many exact processes and count violations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from tdistill.errors import DomainError
from tdistill.tabular import claims
from tdistill.tabular.processes import P_RANGE, REWARDS, STRUCTURES, draw_between, draw_process
from tdistill.tabular.solve import SolvedProcess, solve_process
from tdistill.tabular.trees import draw_tree


class HasSettings(Protocol):
    """A case that names its γ, number of actions and p."""

    @property
    def settings(self) -> dict[str, float]:
        """γ, number of actions, p."""


Case = TypeVar("Case", bound=HasSettings)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Claim(Generic[Case]):
    """One claim: what it says, how it is measured, and what rounding may do to it.

    Attributes:
        name: identifier.
        statement: the claim as a formula.
        margin: measured margin of a case; the claim holds where it is at least −tolerance.
        tolerance: tolerance of a case, same unit as the margin.
    """

    name: str
    statement: str
    margin: Callable[[Case], float]
    tolerance: Callable[[Case], float]


def _round_off(solved: SolvedProcess) -> float:
    return solved.round_off


def process_claims(seed: int) -> list[Claim[SolvedProcess]]:
    """The claims about soft decision processes; ``seed`` draws the pairs of the contraction."""

    def contraction(solved: SolvedProcess) -> float:
        return claims.contraction(solved, np.random.default_rng(seed))

    return [
        Claim("fixed_points", "‖Q − Q_exact‖ = 0 for Q*, Q̄^{proj_p π*} and Q̄*_p", claims.fixed_points, _round_off),
        Claim("contraction", "‖B_p^π Q₁ − B_p^π Q₂‖ ≤ γ ‖Q₁ − Q₂‖", contraction, _round_off),
        Claim("projected_policy_bound", "‖Q* − Q̄^{proj_p π*}‖ ≤ κ(p)", claims.projected_policy_bound, _round_off),
        Claim("sandwich", "Q̄^{proj_p π*} ≤ Q̄*_p ≤ Q*", claims.sandwich, _round_off),
        Claim("restricted_optimum_bound", "‖Q* − Q̄*_p‖ ≤ κ(p)", claims.restricted_optimum_bound, _round_off),
        Claim(
            "loss_value",
            "Q* − Q̄^{proj_p π*} = E_{proj_p π*}[Σ_{k≥1} −γ^k log Z(s_k)]",
            claims.loss_value,
            lambda _: claims.EQUALITY_TOLERANCE,
        ),
        Claim(
            "loss_value_bounds_restricted_optimum",
            "Q* − Q̄*_p ≤ E_{proj_p π*}[Σ_{k≥1} −γ^k log Z(s_k)]",
            claims.loss_value_bounds_restricted_optimum,
            _round_off,
        ),
    ]


def tree_claims() -> list[Claim[claims.SolvedTree]]:
    """The claims about χ²-BD on trees."""
    return [
        Claim(
            "chi2_stationarity",
            "π_Q/π_E · (1 − γ r⁻/2α) = 1 − r/2α on a tree, r⁻ = 0 at the root",
            claims.stationarity,
            lambda _: claims.EQUALITY_TOLERANCE,
        ),
        Claim(
            "chi2_policy_error_vanishes",
            "E_d[KL(π_E ‖ π_Q)] falls in α and is at most min_v E[(log π_E + v − γ v')²] / 4α",
            claims.policy_error_vanishes,
            claims.divergence_round_off,
        ),
    ]


def solved_processes(num_processes: int, seed: int) -> Iterable[SolvedProcess]:
    """Random solved processes: kinds of structure and of reward in turn, the rest drawn.

    Raises:
        DomainError: fewer than one process.
    """
    _check_count(num_processes)
    for index in range(num_processes):
        rng = np.random.default_rng([seed, 0, index])
        structure = STRUCTURES[index % len(STRUCTURES)]
        reward = REWARDS[index // len(STRUCTURES) % len(REWARDS)]
        yield solve_process(draw_process(rng, structure, reward), draw_between(rng, P_RANGE))


def solved_trees(num_trees: int, seed: int) -> Iterable[claims.SolvedTree]:
    """Random trees with χ²-BD solved at every α of the ladder.

    Raises:
        DomainError: fewer than one tree.
    """
    _check_count(num_trees)
    for index in range(num_trees):
        yield claims.solve_tree(draw_tree(np.random.default_rng([seed, 1, index])))


def _check_count(count: int) -> None:
    if count < 1:
        raise DomainError(f"num_processes = {count} must be at least 1; a statement about claims takes hundreds.")


def tally(
    statements: Sequence[Claim[Case]], cases: Iterable[Case], step: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Measure every claim on every case.

    Args:
        statements: the claims.
        cases: the cases; used once.
        step: called after each case.
    Returns:
        One object per claim: ``claim``, ``cases``, ``violations`` (margin below −tolerance, or not a number),
        ``worst_margin`` (the smallest), ``tolerance`` (the largest over cases), ``statement``; and the smallest and
        largest ``gamma``, ``num_actions`` and ``p`` of the cases.
    """
    settings: list[dict[str, float]] = []
    margins: list[list[float]] = [[] for _ in statements]
    tolerances: list[list[float]] = [[] for _ in statements]
    for case in cases:
        settings.append(case.settings)
        for index, claim in enumerate(statements):
            margins[index].append(claim.margin(case))
            tolerances[index].append(claim.tolerance(case))
        if step is not None:
            step()
    ranges = {key: [min(s[key] for s in settings), max(s[key] for s in settings)] for key in settings[0]}
    return [
        {
            "claim": claim.name,
            "cases": len(found),
            # Written so that NaN counts.
            "violations": sum(not margin >= -slack for margin, slack in zip(found, allowed, strict=True)),
            "worst_margin": float(np.min(found)),
            "tolerance": max(allowed),
            "statement": claim.statement,
            **ranges,
        }
        for claim, found, allowed in zip(statements, margins, tolerances, strict=True)
    ]


def check_theory(num_processes: int = 300, seed: int = 0, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Check every claim on random exact processes: γ 0.9–0.99, 10–1,000 actions, p 0.3–0.99.

    Args:
        num_processes: number of decision processes, and of trees.
        seed: seed of all random numbers.
        progress: called with (cases done, cases in all) after each case.
    Returns:
        One JSON object per claim, as :func:`tally` describes.
    Raises:
        DomainError: fewer than one process.
        TDistillError: a process that cannot be solved to machine precision.
    """
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 2 * num_processes)

    found = tally(process_claims(seed), solved_processes(num_processes, seed), step)
    return found + tally(tree_claims(), solved_trees(num_processes, seed), step)
