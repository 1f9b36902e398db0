"""Soft values, next values and projected probabilities over packed positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import pack, random_episodes
from hypothesis import given, settings
from hypothesis import strategies as st
from references import losses

from tdistill import returns


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
