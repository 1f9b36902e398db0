"""Fixed points against closed forms, against plain loops, and against the package's own top-p sets."""

import math

import numpy as np
import pytest
import soft_reference as reference
import torch

from tdistill.actions import top_p_sets
from tdistill.errors import ProbabilityRangeError, TDistillError
from tdistill.tabular import solve
from tdistill.tabular.processes import STRUCTURES, SoftMDP, draw_process
from tdistill.tabular.solve import bellman, covered_mass_loss, optimal_q, project, solve_process, top_p_mask


def small_process(seed: int, structure: str) -> SoftMDP:
    """Five states, at most 7 actions, so that plain loops are quick; γ = 0.9: 600 sweeps leave 0.9⁶⁰⁰ ≈ 10⁻²⁷."""
    drawn = draw_process(np.random.default_rng(seed), structure, "gaussian")
    few = slice(0, 7)
    return SoftMDP(
        drawn.reward_SA[:5, few],
        np.minimum(drawn.next_SAB[:5, few], 5),
        drawn.prob_SAB[:5, few],
        gamma=0.9,
        structure=structure,
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_solutions_equal_value_iteration_by_plain_loops(structure):
    process = small_process(7, structure)
    solved = solve_process(process, 0.7)
    everything = [range(process.num_actions)] * 5
    q_star = reference.optimal(process, everything)
    np.testing.assert_allclose(solved.q_star_SA, q_star, atol=1e-11)
    policy = [[math.exp(q - reference.log_sum_exp(row)) for q in row] for row in q_star]
    sets = [reference.top_p(row, 0.7) for row in policy]
    assert [np.flatnonzero(row).tolist() for row in solved.mask_SA] == sets
    mass = [math.fsum(row[a] for a in chosen) for row, chosen in zip(policy, sets, strict=True)]
    np.testing.assert_allclose(solved.covered_mass_S, mass, rtol=1e-12)
    projected = [
        [row[a] / z if a in chosen else 0.0 for a in range(len(row))]
        for row, chosen, z in zip(policy, sets, mass, strict=True)
    ]
    np.testing.assert_allclose(solved.projected_SA, projected, rtol=1e-11)
    np.testing.assert_allclose(solved.q_restricted_SA, reference.optimal(process, sets), atol=1e-11)
    np.testing.assert_allclose(solved.q_projected_SA, reference.of_policy(process, projected), atol=1e-11)
    loss = covered_mass_loss(process, solved.projected_SA, solved.covered_mass_S)
    np.testing.assert_allclose(loss, reference.discounted_surprise(process, projected, mass), atol=1e-11)
    assert loss.max() > 0.01  # the set did leave something out


def test_one_state_that_loops_has_closed_forms():
    # V = log Σ exp(r + γV) = γV + log Σ exp r, so V = log(1 + 3 + 6)/(1 − γ); π = 0.1, 0.3, 0.6 whatever γ.
    # At p = 0.8 the set is {0.6, 0.3}, Z = 0.9: restricted V = log 9/(1 − γ), and the loss is γ/(1−γ)·(−log 0.9).
    gamma = 0.95
    process = SoftMDP(np.log([[1.0, 3.0, 6.0]]), np.zeros((1, 3, 1), dtype=np.int64), np.ones((1, 3, 1)), gamma)
    solved = solve_process(process, 0.8)
    np.testing.assert_allclose(solved.policy_SA, [[0.1, 0.3, 0.6]], rtol=1e-12)
    assert solved.mask_SA.tolist() == [[False, True, True]]
    assert solved.q_star_SA[0, 0] == pytest.approx(gamma * math.log(10) / (1 - gamma), rel=1e-13)
    assert solved.q_restricted_SA[0, 0] == pytest.approx(gamma * math.log(9) / (1 - gamma), rel=1e-13)
    loss = covered_mass_loss(process, solved.projected_SA, solved.covered_mass_S)
    np.testing.assert_allclose(loss, gamma / (1 - gamma) * -math.log(0.9), rtol=1e-11)
    np.testing.assert_allclose(solved.q_projected_SA, solved.q_restricted_SA, rtol=1e-13)


def test_the_operator_by_hand():
    # γ = 0.5, next state 0 with Q = (log 2, 0, ?) and policy (0.5, 0.5, 0): value = ½ log 2 + log 2.
    process = SoftMDP(np.array([[1.0, 2.0, 3.0]]), np.array([[[0], [1], [0]]]), np.ones((1, 3, 1)), 0.5)
    policy = np.array([[0.5, 0.5, 0.0]])
    for off_the_set in (0.0, np.inf, np.nan):
        after = bellman(process, policy, np.array([[math.log(2), 0.0, off_the_set]]))
        np.testing.assert_allclose(after, [[1 + 0.75 * math.log(2), 2.0, 3 + 0.75 * math.log(2)]])


@pytest.mark.parametrize("p", [0.3, 0.8, 0.95, 1.0])
def test_sets_are_those_of_the_store(p):
    rng = np.random.default_rng(2)
    logits = np.concatenate([rng.normal(size=(6, 300)) * 2, rng.integers(0, 3, size=(6, 300)).astype(float)])
    policy = torch.log_softmax(torch.from_numpy(logits), -1).exp().numpy()
    sets = top_p_sets(torch.from_numpy(logits), p)
    mask = top_p_mask(policy, p)
    for row in range(len(logits)):
        ids = sets.ids[sets.offsets[row] : sets.offsets[row + 1]]
        assert np.flatnonzero(mask[row]).tolist() == sorted(ids.tolist())
    np.testing.assert_allclose(project(policy, mask).sum(1), 1)


@pytest.mark.parametrize("p", [0.0, 1.2, float("nan")])
def test_p_outside_its_range_is_refused(p):
    with pytest.raises(ProbabilityRangeError, match="outside"):
        top_p_mask(np.full((1, 2), 0.5), p)


def test_a_process_that_does_not_converge_is_an_error(monkeypatch):
    process = draw_process(np.random.default_rng(0), "random", "sharp")
    monkeypatch.setattr(solve, "_MAX_POLICY_ITERATIONS", 2)
    with pytest.raises(TDistillError, match="residual"):
        optimal_q(process, np.ones(process.reward_SA.shape, dtype=bool))
