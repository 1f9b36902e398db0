"""Soft values, residuals and returns over packed positions, against sums taken one transition at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import pack, random_episodes, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from references import losses
from references import returns as reference
from references.losses import Episode
from torch.utils._python_dispatch import TorchDispatchMode

from tdistill import returns
from tdistill.types import ActionStats


def test_soft_value_equals_the_entropy_form():
    episodes = random_episodes(0)
    stats = pack(episodes)
    wanted = [losses.soft_value(s.logits) for e in episodes for s in e.states]
    np.testing.assert_allclose(returns.soft_value(stats.q_M, stats.offsets), wanted, rtol=1e-12)


def test_soft_value_by_hand():
    # log(e^0 + e^0) = log 2 | log(e^1) = 1 | an empty row has 0 | log(1 + 3) = log 4.
    q_M = torch.tensor([0.0, 0.0, 1.0, 0.0, math.log(3)], dtype=torch.float64)
    value_N = returns.soft_value(q_M, torch.tensor([0, 2, 3, 3, 5]))
    assert value_N.tolist() == pytest.approx([math.log(2), 1.0, 0.0, math.log(4)])


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-2000, 2000), min_size=1, max_size=6))
def test_soft_value_neither_overflows_nor_vanishes(logits):
    q_M = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    value_N = returns.soft_value(q_M, torch.tensor([0, len(logits)]))
    torch.testing.assert_close(value_N[0], torch.logsumexp(q_M.detach(), 0), rtol=1e-12, atol=1e-12)
    value_N.sum().backward()
    torch.testing.assert_close(q_M.grad, torch.softmax(q_M.detach(), 0), rtol=1e-9, atol=1e-12)


def test_gradient_of_an_empty_row_is_finite():
    q_M = torch.tensor([-900.0, -901.0], requires_grad=True)
    returns.soft_value(q_M, torch.tensor([0, 0, 2, 2])).sum().backward()
    torch.testing.assert_close(q_M.grad, torch.softmax(torch.tensor([0.0, -1.0]), 0))


def test_maximum_over_sets_shares_the_gradient_among_ties():
    q_M = torch.tensor([2.0, -5.0, 2.0, -7.0], requires_grad=True)
    top_N = returns.max_over_sets(q_M, torch.tensor([0, 3, 3, 4]))
    assert top_N.tolist() == [2.0, 0.0, -7.0]
    top_N.sum().backward()
    assert q_M.grad.tolist() == [0.5, 0.0, 0.5, 1.0]


def test_next_values_follow_the_ends_of_the_episodes():
    # Rows: terminal of 2 states | truncated of 2 states and a bootstrap row | truncated of 1 state.
    sizes = [(2, "terminal", False), (3, "truncated", True), (1, "truncated", False)]
    episodes = [
        losses.Episode([losses.State(np.zeros(1), np.zeros(1), 0)] * n, ends, bootstrap) for n, ends, bootstrap in sizes
    ]
    value_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    following_N, known_N = returns.next_value(value_N, pack(episodes))
    assert following_N.tolist() == [2.0, 0.0, 4.0, 5.0, 0.0, 0.0]
    assert known_N.tolist() == [True, True, True, True, False, False]


def test_projected_teacher_probabilities():
    episodes = random_episodes(1)
    probs_M, mass_N = returns.teacher_probs(pack(episodes))
    states = [s for e in episodes for s in e.states]
    wanted = np.concatenate([losses.projected(s.teacher_log_probs) for s in states])
    np.testing.assert_allclose(probs_M, wanted, rtol=1e-12)
    np.testing.assert_allclose(mass_N, [np.exp(s.teacher_log_probs).sum() for s in states], rtol=1e-12)


# ---- several steps ----

GAMMAS = [0.0, 0.7, 0.99, 1.0]


def ragged(seed: int, copies: int = 2) -> tuple[list[Episode], ActionStats, torch.Tensor, torch.Tensor]:
    """Episodes with every kind of end, and random rewards and values for their rows."""
    episodes = random_episodes(seed, copies, with_student=True)
    stats = pack(episodes)
    rng = np.random.default_rng(seed)
    rewards, values = (torch.tensor(rng.normal(size=len(stats.ends_N))) for _ in range(2))
    return episodes, stats, rewards, values


def by_episode(episodes: list[Episode], *columns: torch.Tensor):
    at = 0
    for episode in episodes:
        stop = at + len(episode.states)
        yield episode, *(column[at:stop].tolist() for column in columns)
        at = stop


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50, None])
def test_n_step_returns_are_their_sums(gamma, num_steps):
    episodes, stats, rewards, values = ragged(1)
    found = returns.n_step_return(rewards, values, stats, gamma, num_steps)
    checked = 0
    for episode, r, v, own in by_episode(episodes, rewards, values, found):
        for t in range(len(own)):
            if reference.usable(episode, t):
                wanted = reference.n_step_return(episode, r, v, t, gamma, num_steps)
                assert own[t] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
                checked += 1
            else:
                assert own[t] == 0.0
    assert checked > 30


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_lambda_returns_are_mixtures_of_n_step_returns(gamma, lam):
    episodes, stats, rewards, values = ragged(2)
    found = returns.lambda_return(rewards, values, stats, gamma, lam)
    for episode, r, v, own in by_episode(episodes, rewards, values, found):
        for t in range(len(own)):
            wanted = reference.lambda_return(episode, r, v, t, gamma, lam) if reference.usable(episode, t) else 0.0
            assert own[t] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_limits_of_lambda_and_of_the_number_of_steps(gamma):
    _, stats, rewards, values = ragged(3)
    following, known = returns.next_value(values, stats)
    one_step = torch.where(known & stats.has_action_N, rewards + gamma * following, 0.0)
    whole = returns.n_step_return(rewards, values, stats, gamma, None)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(returns.n_step_return(rewards, values, stats, gamma, 1), one_step, **close)
    torch.testing.assert_close(returns.lambda_return(rewards, values, stats, gamma, 0.0), one_step, **close)
    torch.testing.assert_close(returns.lambda_return(rewards, values, stats, gamma, 1.0), whole, **close)
    torch.testing.assert_close(returns.n_step_return(rewards, values, stats, gamma, 10**6), whole, **close)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("num_steps", [1, 3, 40])
def test_consistency_residuals_are_their_sums(gamma, num_steps):
    episodes, stats, rewards, values = ragged(4)
    found, known = returns.consistency_residual(rewards, values, stats, gamma, num_steps)
    for episode, r, v, own, own_known in by_episode(episodes, rewards, values, found, known):
        for t in range(len(own)):
            assert own_known[t] == reference.usable(episode, t)
            if own_known[t]:
                wanted = reference.consistency_residual(episode, r, v, t, gamma, num_steps)
                assert own[t] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@st.composite
def any_episodes(draw) -> list[Episode]:
    """Up to four episodes of up to seven states, any way of ending, transitions dropped at any place."""
    episodes = []
    for _ in range(draw(st.integers(1, 4))):
        acts = draw(st.lists(st.booleans(), min_size=1, max_size=7))
        ends = draw(st.sampled_from(["terminal", "truncated"]))
        bootstrap = ends == "truncated" and draw(st.booleans())
        rng = np.random.default_rng(len(acts))
        # A bootstrap state has no action; an episode that terminates or is cut has one unless it was dropped.
        states = [random_state(rng, 2, act and not (bootstrap and t + 1 == len(acts))) for t, act in enumerate(acts)]
        episodes.append(Episode(states, ends, bootstrap))
    return episodes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    episodes=any_episodes(),
    gamma=st.sampled_from(GAMMAS),
    lam=st.floats(0, 1),
    num_steps=st.sampled_from([1, 2, 3, 6, 20, None]),
    seed=st.integers(0, 2**20),
)
def test_any_episodes_give_their_sums(episodes, gamma, lam, num_steps, seed):
    """Rewards that must not be read are not numbers."""
    stats = pack(episodes)
    usable = [reference.usable(e, t) for e in episodes for t in range(len(e.states))]
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(size=len(usable)))
    rewards = torch.tensor(np.where(usable, rng.normal(size=len(usable)), np.nan))
    n_step = returns.n_step_return(rewards, values, stats, gamma, num_steps)
    mixed = returns.lambda_return(rewards, values, stats, gamma, lam)
    residual, known = returns.consistency_residual(rewards, values, stats, gamma, num_steps or 20)
    assert known.tolist() == usable
    for episode, r, v, *found in by_episode(episodes, rewards, values, n_step, mixed, residual):
        for t, row in enumerate(zip(*found, strict=True)):
            wanted = (0.0, 0.0, 0.0)
            if reference.usable(episode, t):
                wanted = (
                    reference.n_step_return(episode, r, v, t, gamma, num_steps),
                    reference.lambda_return(episode, r, v, t, gamma, lam),
                    reference.consistency_residual(episode, r, v, t, gamma, num_steps or 20),
                )
            assert row == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_one_step_reads_no_later_reward():
    """A later reward of any size leaves the one-step return of earlier rows as it is, to the last bit."""
    episodes = [Episode([random_state(np.random.default_rng(0), 2) for _ in range(4)], "terminal")]
    stats = pack(episodes)
    values = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for later in (-1e30, -math.inf):
        rewards = torch.tensor([0.5, 0.25, 0.125, later], dtype=torch.float64)
        found = returns.n_step_return(rewards, values, stats, 0.5, 1).tolist()
        assert found == [0.5 + 0.5 * 0.2, 0.25 + 0.5 * 0.3, 0.125 + 0.5 * 0.4, later]


def test_no_rows_give_no_returns():
    stats = pack(random_episodes(0)[:1])
    stats = replace(stats, has_action_N=stats.has_action_N[:0], ends_N=stats.ends_N[:0])
    none = torch.zeros(0, dtype=torch.float64)
    assert len(returns.n_step_return(none, none, stats, 0.9, 3)) == 0
    assert len(returns.lambda_return(none, none, stats, 0.9, 0.5)) == 0
    assert len(returns.consistency_residual(none, none, stats, 0.9)[0]) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize("num_steps", [1, 8, None])
def test_a_long_episode_keeps_its_precision(num_steps, dtype, tolerance):
    """One answer of 10,000 tokens at γ = 1: the sum over a window is not lost in the sum over the rest."""
    num_rows, rng = 10_000, np.random.default_rng(6)
    state = random_state(rng, 1)
    stats = pack([Episode([state] * num_rows, "terminal")])
    rewards, values = rng.normal(size=(2, num_rows)) - 1.0
    found = returns.n_step_return(
        torch.tensor(rewards, dtype=dtype), torch.tensor(values, dtype=dtype), stats, 1.0, num_steps
    )
    for t in (0, 1, 4321, num_rows - 8, num_rows - 7, num_rows - 1):
        stop = num_rows if num_steps is None else min(t + num_steps, num_rows)
        wanted = math.fsum(rewards[t:stop]) + (values[stop] if stop < num_rows else 0.0)
        assert float(found[t]) == pytest.approx(wanted, rel=tolerance, abs=tolerance)


def test_a_window_by_hand():
    # One answer of three tokens that ends: rewards 1, 2, 4, values 10, 20, 30, γ = ½.
    # Two steps from the first state: 1 + ½·2 + ¼·30 = 9.5; from the second: 2 + ½·4 = 4, for it ends there.
    episodes = [Episode([random_state(np.random.default_rng(0), 2) for _ in range(3)], "terminal")]
    stats = pack(episodes)
    rewards, values = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2, 4], [10.0, 20, 30]))
    assert returns.n_step_return(rewards, values, stats, 0.5, 2).tolist() == [9.5, 4.0, 4.0]
    # λ = ½: G₂ = 4; G₁ = 2 + ½(½·30 + ½·4) = 10.5; G₀ = 1 + ½(½·20 + ½·10.5) = 8.625.
    assert returns.lambda_return(rewards, values, stats, 0.5, 0.5).tolist() == [8.625, 10.5, 4.0]


@pytest.mark.parametrize("function", ["n_step", "lambda", "residual"])
def test_gradients_of_multi_step_quantities(function):
    _, stats, rewards, values = ragged(5, copies=1)

    def of(r: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if function == "n_step":
            return returns.n_step_return(r, v, stats, 0.9, 3)
        if function == "lambda":
            return returns.lambda_return(r, v, stats, 0.9, 0.7)
        return returns.consistency_residual(r, v, stats, 0.9, 3)[0]

    assert torch.autograd.gradcheck(of, (rewards.requires_grad_(), values.requires_grad_()))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 8, 1000])
def test_discounted_sums_of_any_length(num_rows):
    rng = np.random.default_rng(num_rows)
    x, factor = rng.normal(size=num_rows), rng.uniform(0, 1, num_rows) * (rng.random(num_rows) > 0.1)
    wanted, total = np.zeros(num_rows), 0.0
    for n in reversed(range(num_rows)):
        total = x[n] + factor[n] * total
        wanted[n] = total
    found = returns.discounted_sum(torch.tensor(x), torch.tensor(factor))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, _: returns.discounted_sum(x, x),
        lambda x, stats: returns.n_step_return(x, x, stats, 0.9, 1),
        lambda x, stats: returns.n_step_return(x, x, stats, 0.9, 500),
        lambda x, stats: returns.lambda_return(x, x, stats, 0.9, 0.5),
        lambda x, stats: returns.consistency_residual(x, x, stats, 0.9, 500),
    ],
    ids=["discounted_sum", "one_step", "n_step", "lambda", "residual"],
)
def test_the_work_grows_with_the_number_of_rows_and_no_faster(function):
    """Elements written by all operations together, per row: the same for 1,000 rows and for 64,000.

    The number of operations grows with the logarithm, so there is no loop over rows either.
    """

    class Count(TorchDispatchMode):
        elements = operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Count.elements += out.numel()
            Count.operations += 1
            return out

    def work(num_rows: int) -> tuple[float, int]:
        x = torch.ones(num_rows)
        stats = pack([Episode([state] * num_rows, "terminal")])
        Count.elements = Count.operations = 0
        with Count():
            function(x, stats)
        return Count.elements / num_rows, Count.operations

    state = random_state(np.random.default_rng(0), 1)

    (small, few), (large, many) = work(1000), work(64000)
    assert large < 1.2 * small
    assert many < 2 * few
