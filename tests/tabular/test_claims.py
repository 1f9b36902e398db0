"""The claims hold; and each of them, made slightly wrong, is counted as violated."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from tdistill.errors import DomainError
from tdistill.tabular import check_theory, claims
from tdistill.tabular.check import Claim, process_claims, solved_processes, solved_trees, tally, tree_claims
from tdistill.tabular.processes import SoftMDP
from tdistill.tabular.solve import solve_process

NAMES = [
    "fixed_points",
    "contraction",
    "projected_policy_bound",
    "sandwich",
    "restricted_optimum_bound",
    "loss_value",
    "loss_value_bounds_restricted_optimum",
    "chi2_stationarity",
    "chi2_policy_error_vanishes",
]


@pytest.fixture(scope="module")
def processes():
    return list(solved_processes(50, seed=11))


@pytest.fixture(scope="module")
def trees():
    return list(solved_trees(8, seed=11))


def violations(name, cases):
    """Violations of the named claim of the suite, as it stands now."""
    statements = process_claims(0) if cases and hasattr(cases[0], "process") else tree_claims()
    (row,) = [row for row in tally(statements, cases) if row["claim"] == name]
    return row["violations"]


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_holds(name, processes, trees):
    assert violations(name, trees if name.startswith("chi2") else processes) == 0


def test_half_of_kappa_is_no_bound(processes, monkeypatch):
    right = claims.kappa
    monkeypatch.setattr(claims, "kappa", lambda p, gamma: right(p, gamma) / 2)
    assert violations("projected_policy_bound", processes) > 10
    assert violations("restricted_optimum_bound", processes) > 10


def test_kappa_is_tight_where_a_flat_teacher_fills_its_set_exactly():
    # 10 equal actions at p = 0.5 in a process that never ends: Z = 0.5, so the loss is κ itself (p a little lower, so
    # that five rounded tenths reach it).
    shape = (4, 10, 1)
    process = SoftMDP(np.zeros(shape[:2]), np.random.default_rng(0).integers(0, 4, size=shape), np.ones(shape), 0.97)
    case = solve_process(process, 0.5 - 1e-13)
    assert claims.kappa(0.5, 0.97) > 22
    assert abs(claims.projected_policy_bound(case)) < 1e-9
    assert abs(claims.restricted_optimum_bound(case)) < 1e-9


@pytest.mark.parametrize("share", [1 - 1e-6, 0.9])
def test_a_kappa_smaller_by_a_millionth_is_no_bound(share, monkeypatch):
    right = claims.kappa
    monkeypatch.setattr(claims, "kappa", lambda p, gamma: share * right(p, gamma))
    cases = [s for s in solved_processes(300, 0) if s.process.reward == "flat"]
    assert violations("projected_policy_bound", cases) > 0


@pytest.mark.parametrize("wrong", [-1.0, 1 + 1e-6, 1 - 1e-6])
def test_a_wrong_value_of_the_loss_is_noticed(wrong, processes, monkeypatch):
    # The sign turned, or one millionth off.
    right = claims.covered_mass_loss
    monkeypatch.setattr(claims, "covered_mass_loss", lambda *given: wrong * right(*given))
    assert violations("loss_value", processes) > 25
    if wrong < 1:  # a larger value still bounds the restricted optimum
        assert violations("loss_value_bounds_restricted_optimum", processes) > 0


def test_a_sum_that_starts_a_step_early_is_noticed(processes, monkeypatch):
    right = claims.covered_mass_loss

    def from_k_zero(process, projected, mass):  # Σ_{k≥0} in place of Σ_{k≥1}, the factor γ missing
        return right(process, projected, mass) / process.gamma

    monkeypatch.setattr(claims, "covered_mass_loss", from_k_zero)
    assert violations("loss_value", processes) > 25


def test_a_modulus_below_gamma_is_noticed(processes, monkeypatch):
    right = claims.bellman

    def sharper(process, policy, q):  # as if the claim were a modulus of γ/1.0001
        return right(replace(process, gamma=min(0.9999, 1.0001 * process.gamma)), policy, q)

    monkeypatch.setattr(claims, "bellman", sharper)
    assert violations("contraction", processes) > 25


def test_a_sandwich_in_the_wrong_order_is_noticed(processes):
    upper = [replace(s, q_restricted_SA=s.q_star_SA, q_star_SA=s.q_restricted_SA) for s in processes]
    lower = [replace(s, q_restricted_SA=s.q_projected_SA, q_projected_SA=s.q_restricted_SA) for s in processes]
    assert violations("sandwich", upper) > 25
    # The projected teacher is the best policy on its set where only one action or one state value is left.
    assert violations("sandwich", lower) > 10


@pytest.mark.parametrize("field", ["q_star_SA", "q_projected_SA", "q_restricted_SA"])
def test_an_inexact_solution_is_noticed(field, processes):
    moved = [replace(s, **{field: getattr(s, field) + 1e-6}) for s in processes]
    assert violations("fixed_points", moved) == len(moved)


def test_a_wrong_coefficient_of_the_stationarity_is_noticed(trees):
    def with_alpha(case):
        return replace(case, optima=tuple(replace(o, alpha=2 * o.alpha) for o in case.optima))

    def without_incoming(case):
        return replace(case, tree=replace(case.tree, gamma=0.0))

    def one_gamma_for_another(case):
        return replace(case, tree=replace(case.tree, gamma=case.tree.gamma * (1 - 1e-5)))

    # Behind a state with one action r⁻ is 0, and γ has no effect.
    linked = [case for case in trees if np.abs(case.tree.incoming(case.optima[0].reward_M)).max() > 0.01]
    assert len(linked) > len(trees) / 2
    assert violations("chi2_stationarity", [with_alpha(case) for case in trees]) == len(trees)
    for spoil in (without_incoming, one_gamma_for_another):
        assert violations("chi2_stationarity", [spoil(case) for case in linked]) == len(linked)


def test_a_point_that_is_no_maximum_is_noticed_though_it_satisfies_the_identity(trees):
    spoiled = [replace(case, optima=(replace(case.optima[0], residual=1e-3), *case.optima[1:])) for case in trees]
    assert violations("chi2_stationarity", spoiled) == len(trees)


def test_a_policy_error_that_grows_or_stays_is_noticed(trees):
    def backwards(case):
        optima = tuple(replace(o, alpha=new.alpha) for o, new in zip(case.optima[::-1], case.optima, strict=True))
        return replace(case, optima=optima)

    def stays(case):  # equal errors at every α: not growing, but not under R/4α either
        return replace(case, optima=tuple(replace(case.optima[0], alpha=o.alpha) for o in case.optima))

    for spoil in (backwards, stays):
        assert violations("chi2_policy_error_vanishes", [spoil(case) for case in trees]) == len(trees)


@dataclass(frozen=True)
class Number:
    """A case that is its own margin."""

    margin: float
    gamma: float = 0.5

    @property
    def settings(self):
        return {"gamma": self.gamma}


def test_the_tally_counts_margins_below_minus_the_tolerance_and_what_is_no_number():
    claim = Claim("n", "n ≥ 0", lambda case: case.margin, lambda case: 0.1 * case.gamma)
    cases = [Number(3.0), Number(-0.05), Number(-0.050001), Number(-0.09, gamma=1.0)]
    (row,) = tally([claim], cases)
    assert row == {
        "claim": "n",
        "cases": 4,
        "violations": 1,
        "worst_margin": -0.09,
        "tolerance": 0.1,
        "statement": "n ≥ 0",
        "gamma": [0.5, 1.0],
    }
    assert tally([claim], [Number(float("nan")), Number(1.0)])[0]["violations"] == 1


def test_the_suite_reports_every_claim_with_its_ranges_and_repeats_itself():
    calls = []
    rows = check_theory(10, seed=3, progress=lambda *call: calls.append(call))
    assert [row["claim"] for row in rows] == NAMES
    for row in rows:
        assert row["cases"] == 10 and row["violations"] == 0 and type(row["worst_margin"]) is float
        assert row["worst_margin"] >= -row["tolerance"] and row["statement"]
        assert 0.9 <= row["gamma"][0] < row["gamma"][1] <= 0.99
        assert 10 <= row["num_actions"][0] < row["num_actions"][1] <= 1000
        assert 0.3 <= row["p"][0] < row["p"][1] <= 0.99
    assert calls == [(done, 20) for done in range(1, 21)]
    assert check_theory(10, seed=3) == rows
    assert check_theory(2, seed=4)[1]["worst_margin"] != check_theory(2, seed=3)[1]["worst_margin"]


def test_no_processes_are_refused():
    with pytest.raises(DomainError, match="num_processes = 0"):
        check_theory(0)
    with pytest.raises(DomainError, match="must rise"):
        claims.solve_tree(None, (1.0, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_claim_on_three_hundred_processes(seed):
    rows = check_theory(300, seed)
    assert [(row["cases"], row["violations"]) for row in rows] == [(300, 0)] * len(NAMES)
    assert all(row["gamma"] == [0.9, 0.99] and row["num_actions"] == [10, 1000] for row in rows)
    assert all(row["p"] == [0.3, 0.99] for row in rows)


def test_random_pairs_of_the_contraction_alone_would_not_be_tight(processes):
    # Why shifted pairs are among them: without those the smallest margin is far from 0.
    case = processes[0]
    margin = partial(claims.contraction, case)
    assert abs(margin(np.random.default_rng(0))) < 1e-9
    first, second = np.random.default_rng(1).normal(size=(2, *case.q_star_SA.shape))
    after = claims.bellman(case.process, case.projected_SA, first) - claims.bellman(
        case.process, case.projected_SA, second
    )
    before = np.abs(first - second)[case.mask_SA].max()
    assert np.abs(after[case.mask_SA]).max() < 0.9 * case.process.gamma * before
