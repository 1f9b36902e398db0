"""Random processes are what they say, and ill-formed ones are refused."""

from dataclasses import replace

import numpy as np
import pytest

from tdistill.errors import DomainError
from tdistill.tabular.processes import REWARDS, STRUCTURES, SoftMDP, draw_between, draw_num_actions, draw_process


def two_states() -> SoftMDP:
    # State 0: action 0 stays, action 1 goes on; state 1: both end.
    return SoftMDP(
        reward_SA=np.array([[0.5, -1.0], [2.0, 0.0]]),
        next_SAB=np.array([[[0], [1]], [[2], [2]]]),
        prob_SAB=np.ones((2, 2, 1)),
        gamma=0.9,
    )


def test_the_end_has_no_value_and_takes_its_mass_along():
    process = two_states()
    assert process.expected_next(np.array([3.0, 5.0])).tolist() == [[3.0, 5.0], [0.0, 0.0]]
    policy = np.array([[0.25, 0.75], [0.5, 0.5]])
    assert process.state_transitions(policy).tolist() == [[0.25, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_transitions_are_the_average_of_single_steps(structure):
    rng = np.random.default_rng(1)
    process = draw_process(rng, structure, "gaussian")
    policy = rng.dirichlet(np.ones(process.num_actions), size=process.num_states)
    value = rng.normal(size=process.num_states)
    np.testing.assert_allclose(
        process.state_transitions(policy) @ value, (policy * process.expected_next(value)).sum(1), atol=1e-13
    )
    leaves = 1 - process.state_transitions(policy).sum(1)
    assert (leaves.max() > 1e-6) == (structure in ("chain", "tree", "ending"))


def test_trees_and_chains_are_what_their_names_say():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        tree = draw_process(rng, "tree", "flat")
        states = np.arange(tree.num_states)[:, None, None]
        assert (tree.next_SAB > states).all()  # downwards
        parents = [set(np.nonzero((tree.next_SAB == s).any((1, 2)))[0].tolist()) for s in range(1, tree.num_states)]
        assert all(len(found) <= 1 for found in parents)  # no state with two parents
        chain = draw_process(rng, "chain", "flat")
        steps = chain.next_SAB - np.arange(chain.num_states)[:, None, None]
        assert steps.min() >= -1 and steps.max() <= 2
        assert (chain.prob_SAB == 1).all() and chain.prob_SAB.shape[-1] == 1


@pytest.mark.parametrize("reward", REWARDS)
def test_kinds_of_reward_differ_in_the_spread_they_name(reward):
    spreads = [draw_process(np.random.default_rng(seed), "random", reward).reward_SA.std(1).mean() for seed in range(9)]
    low, high = {
        "flat": (0, 1e-12),
        "gaussian": (0.2, 3.2),
        "sharp": (4, 21),
        "heavy_tailed": (0.3, 9),
        "zipf": (0.7, 3),
    }[reward]
    assert low <= min(spreads) and max(spreads) <= high


def test_zipf_rewards_are_log_probabilities_that_fall_with_rank():
    rewards = draw_process(np.random.default_rng(0), "random", "zipf").reward_SA
    np.testing.assert_allclose(np.exp(rewards).sum(1), 1)
    ordered = np.sort(rewards, axis=1)[:, ::-1]
    slope = np.polyfit(np.log(1 + np.arange(rewards.shape[1])), ordered.mean(0), 1)[0]
    assert -2.3 < slope < -0.9


def test_draws_take_both_ends_of_their_range():
    rng = np.random.default_rng(0)
    drawn = [draw_between(rng, (0.9, 0.99)) for _ in range(200)]
    assert min(drawn) == 0.9 and max(drawn) == 0.99 and 60 < sum(0.9 < x < 0.99 for x in drawn) < 140
    numbers = [draw_num_actions(rng) for _ in range(200)]
    assert min(numbers) == 10 and max(numbers) == 1000 and len(set(numbers)) > 30


def test_the_same_generator_draws_the_same_process():
    one, two, other = (draw_process(np.random.default_rng(seed), "stochastic", "zipf") for seed in (3, 3, 4))
    assert one.gamma == two.gamma and np.array_equal(one.prob_SAB, two.prob_SAB)
    assert one.reward_SA.shape != other.reward_SA.shape or not np.array_equal(one.reward_SA, other.reward_SA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.0}, "gamma = 1.0"),
        ({"gamma": -0.1}, "gamma = -0.1"),
        ({"next_SAB": np.zeros((2, 3, 1), dtype=np.int64)}, r"\[2, 2, B\]"),
        ({"next_SAB": np.full((2, 2, 1), 3)}, "2 for the end"),
        ({"prob_SAB": np.full((2, 2, 1), 0.9)}, "sum to 1"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(DomainError, match=message):
        replace(two_states(), **changes)


def test_unknown_kinds_are_refused_by_name():
    with pytest.raises(DomainError, match=r"'loop' is not known\. Known: random"):
        draw_process(np.random.default_rng(0), "loop", "flat")
    with pytest.raises(DomainError, match=r"'sweet' are not known\. Known: flat"):
        draw_process(np.random.default_rng(0), "random", "sweet")
