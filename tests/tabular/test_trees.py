"""χ²-BD on trees: the known example, a general optimiser, and what the derivation says of gradient and limit."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from tdistill.errors import DomainError
from tdistill.tabular.optimum import least_residual, maximise, soft_backup
from tdistill.tabular.trees import TeacherTree, draw_tree, printed_gradient, printed_objective, soft_values


def tree(gamma: float = 0.9) -> TeacherTree:
    """Root (0.5, 0.3, 0.2): the first action leads to (0.9, 0.1), the third to (0.6, 0.4), its second to (0.7, 0.3)."""
    return TeacherTree(
        prob_M=np.array([0.5, 0.3, 0.2, 0.9, 0.1, 0.6, 0.4, 0.7, 0.3]),
        offsets=np.array([0, 3, 5, 7, 9]),
        parent_slot_N=np.array([-1, 0, 2, 6]),
        num_actions=3,
        p=1.0,
        gamma=gamma,
    )


def one_state(probs: list[float], gamma: float) -> TeacherTree:
    return TeacherTree(np.array(probs), np.array([0, len(probs)]), np.array([-1]), len(probs), 1.0, gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.99])
def test_the_known_example(gamma):
    # One state: V(s') = 0, so γ has no effect, and the stationarity is π_Q = π_E (1 − Q/2α). At α = 0.1 with
    # π_Q = softmax Q: Q = (0.0577, −0.5193) gives 0.9·(1 − 0.0577/0.2) = 0.640 and 0.1·(1 + 0.5193/0.2) = 0.360.
    optimum = maximise(one_state([0.9, 0.1], gamma), 0.1)
    policy = optimum.ratio_M * [0.9, 0.1]
    np.testing.assert_allclose(policy, [0.64, 0.36], atol=5e-4)
    np.testing.assert_allclose(policy, [0.9 * (1 - optimum.q_M[0] / 0.2), 0.1 * (1 - optimum.q_M[1] / 0.2)], rtol=1e-13)
    np.testing.assert_allclose(policy, np.exp(optimum.q_M) / np.exp(optimum.q_M).sum(), rtol=1e-13)


def test_weights_reach_and_incoming_by_hand():
    t = tree()
    np.testing.assert_allclose(t.reach_N, [1, 0.5, 0.2, 0.08])
    np.testing.assert_allclose(t.weight_M, [0.5, 0.3, 0.2, 0.45, 0.05, 0.12, 0.08, 0.056, 0.024])
    assert t.child_M.tolist() == [1, -1, 2, -1, -1, -1, 3, -1, -1]
    assert t.incoming(np.arange(9.0)).tolist() == [0, 0, 2, 6]
    assert t.next_value(np.array([9.0, 5.0, 7.0, 8.0])).tolist() == [5, 0, 7, 0, 0, 0, 8, 0, 0]


def test_the_printed_objective_by_hand():
    # One step of two, γ = 0.5, α = 0.25 (1/4α = 1): Q = (0, log 3) at the root, whose first action (0.5) leads to one
    # action with Q = 2. V = (log 4, 2). r = (0 − 1, log 3, 2). J = ½(−1 − 1 − log 4 + 1) + ½(log 3 − log²3 − log 4)
    # + ½(2 − 4 − 2).
    t = TeacherTree(np.array([0.5, 0.5, 1.0]), np.array([0, 2, 3]), np.array([-1, 0]), 2, 1.0, 0.5)
    q = np.array([0.0, math.log(3), 2.0])
    by_hand = 0.5 * (-1 - math.log(4)) + 0.5 * (math.log(3) - math.log(3) ** 2 - math.log(4)) + 0.5 * -4
    assert printed_objective(t, q, 0.25) == pytest.approx(by_hand, rel=1e-14)


def test_the_first_order_terms_telescope_to_behaviour_cloning():
    rng = np.random.default_rng(0)
    t = tree()
    q = 3 * rng.normal(size=9)
    values = soft_values(t, q)
    log_policy = q - values[t.state_M]
    rewards = log_policy + values[t.state_M] - t.gamma * t.next_value(values)
    for alpha in (0.1, 2.0):
        telescoped = t.weight_M @ log_policy - t.weight_M @ rewards**2 / (4 * alpha)
        assert printed_objective(t, q, alpha) == pytest.approx(telescoped, rel=1e-13)


def test_the_printed_gradient_is_that_of_finite_differences():
    q, step = np.random.default_rng(1).normal(size=9), 1e-6
    finite = [
        (printed_objective(tree(), q + step * unit, 0.5) - printed_objective(tree(), q - step * unit, 0.5)) / (2 * step)
        for unit in np.eye(9)
    ]
    np.testing.assert_allclose(printed_gradient(tree(), q, 0.5), finite, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_maximum_is_the_one_that_a_general_optimiser_finds(alpha, gamma):
    t = tree(gamma)
    found = maximise(t, alpha)
    general = minimize(
        lambda q: -printed_objective(t, q, alpha),
        np.zeros(9),
        jac=lambda q: -printed_gradient(t, q, alpha),
        method="BFGS",
        options={"gtol": 1e-10},
    )
    np.testing.assert_allclose(general.x, found.q_M, atol=1e-5 * max(1, alpha))
    assert printed_objective(t, found.q_M, alpha) >= -general.fun - 1e-14
    assert found.residual < 1e-13


def test_the_objective_is_concave_in_the_reward_and_not_in_q():
    t, rng = tree(), np.random.default_rng(0)
    gaps_r, gaps_q = [], []
    for _ in range(300):
        first, second = 4 * rng.normal(size=(2, 9))
        ends, middle = [], printed_objective(t, soft_backup(t, (first + second) / 2)[0], 0.1)
        ends = [printed_objective(t, soft_backup(t, r)[0], 0.1) for r in (first, second)]
        gaps_r.append(middle - sum(ends) / 2)
        gaps_q.append(
            printed_objective(t, (first + second) / 2, 0.1)
            - (printed_objective(t, first, 0.1) + printed_objective(t, second, 0.1)) / 2
        )
    assert min(gaps_r) > 0
    assert min(gaps_q) < 0


def test_the_mean_reward_of_a_state_is_gamma_times_the_incoming_one():
    # Summing the stationarity over the actions of a state: E_{π_E}[r(s,·)] = γ r⁻, and 0 at the root.
    for seed in range(5):
        t = draw_tree(np.random.default_rng(seed))
        rewards = maximise(t, 0.7).reward_M
        mean_N = np.add.reduceat(t.prob_M * rewards, t.offsets[:-1])
        np.testing.assert_allclose(mean_N, t.gamma * t.incoming(rewards), atol=1e-11)


def test_far_out_the_policy_error_falls_as_one_over_alpha_at_the_predicted_rate():
    # 2α (π_Q/π_E − 1) → γ r⁻ − r, with r of the Q of least squares that has the teacher's policy.
    t = tree()
    design = np.zeros((9, 4))
    design[np.arange(9), t.state_M] = 1
    for slot, child in enumerate(t.child_M):
        if child >= 0:
            design[slot, child] -= t.gamma
    root = np.sqrt(t.weight_M)[:, None]
    v = np.linalg.lstsq(root * design, -root[:, 0] * np.log(t.prob_M), rcond=None)[0]
    limit = np.log(t.prob_M) + design @ v
    assert least_residual(t) == pytest.approx(t.weight_M @ limit**2, rel=1e-12)
    errors = []
    for alpha in (1e3, 1e4):
        optimum = maximise(t, alpha)
        predicted = t.gamma * t.incoming(limit)[t.state_M] - limit
        errors.append(np.abs(2 * alpha * (optimum.ratio_M - 1) - predicted).max())
    assert errors[0] < 0.05 and errors[1] == pytest.approx(errors[0] / 10, rel=0.05)


def test_divergence_and_total_variation_are_those_of_the_definitions():
    t, optimum = tree(), maximise(tree(), 0.3)
    policy = t.prob_M * optimum.ratio_M
    assert optimum.divergence(t) == pytest.approx(t.weight_M @ np.log(t.prob_M / policy), rel=1e-12)
    per_state = np.add.reduceat(np.abs(policy - t.prob_M), t.offsets[:-1]) / 2
    assert optimum.total_variation(t) == pytest.approx(per_state.max(), rel=1e-12)


def test_a_point_beside_the_maximum_is_noticed_by_the_printed_gradient():
    optimum = maximise(tree(), 0.3)
    moved = optimum.q_M + 1e-6 * np.eye(9)[4]
    assert np.abs(printed_gradient(tree(), moved, 0.3) / tree().weight_M).max() > 1e-7


def test_random_trees_have_the_ranges_asked_for():
    trees = [draw_tree(np.random.default_rng(seed)) for seed in range(40)]
    assert {t.num_actions for t in trees} >= {10, 1000} and {t.gamma for t in trees} >= {0.9, 0.99}
    assert all(t.num_slots > t.num_states for t in trees)  # a choice somewhere
    assert sum(t.num_states > 1 for t in trees) == len(trees)
    assert max(t.num_slots for t in trees) <= 1100 and max(t.num_states for t in trees) <= 40
    assert max(len(t.levels) for t in trees) >= 5 and max(np.diff(t.offsets).max() for t in trees) > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parent_slot_N": np.array([0, 1, 2, 6])}, "-1 for state 0"),
        ({"parent_slot_N": np.array([-1, 0, 0, 6])}, "a slot of its own"),
        ({"parent_slot_N": np.array([-1, 2, 0, 6])}, "breadth first"),
        ({"parent_slot_N": np.array([-1, 0, 2, 7])}, "after their parents"),
        ({"gamma": 1.1}, "gamma = 1.1"),
        ({"prob_M": np.array([0.5, 0.3, 0.2, 1.0, 0.0, 0.6, 0.4, 0.7, 0.3])}, "positive"),
        ({"prob_M": np.array([0.5, 0.3, 0.1, 0.9, 0.1, 0.6, 0.4, 0.7, 0.3])}, "sum to 1"),
    ],
)
def test_what_is_no_tree_is_refused(changes, message):
    with pytest.raises(DomainError, match=message):
        replace(tree(), **changes)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.inf, np.nan])
def test_alpha_must_be_positive_and_finite(alpha):
    with pytest.raises(DomainError, match="alpha"):
        maximise(tree(), alpha)
