"""LS-IQ: its formula, a value by hand, its bounds, and what it has in common with SQIL."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import pack, random_episodes, with_leaves
from references import td_family
from references.losses import Episode, State

from tdistill import returns
from tdistill.errors import DomainError
from tdistill.objectives import check_full_support
from tdistill.objectives.iq_learn import IQLearn
from tdistill.objectives.ls_iq import LSIQ
from tdistill.objectives.sqil import SQIL

NAMES = ("coordinates", "target", "absorbing", "teacher_target", "gamma", "r_max", "student_weight")
GRID = [
    dict(zip(NAMES, row, strict=True))
    for row in itertools.product(
        ["raw", "value_head"], ["residual", "slow"], ["signed", "zero"], ["bootstrap", "fixed"], [0.0, 0.9],
        [0.02, 3.0], [0.5],
    )
]  # fmt: skip


@pytest.mark.parametrize("fields", GRID)
def test_loss_is_the_printed_formula(fields):
    episodes = random_episodes(1, with_student=True)
    for part in (episodes, *([episode] for episode in episodes)):
        found = float(LSIQ(**fields)(pack(part)).loss)
        assert found == pytest.approx(td_family.ls_iq(part, **fields), rel=1e-9, abs=1e-9)


def state(*logits: float) -> State:
    return State(np.array(logits), np.log([0.9 / len(logits)] * len(logits)), 0)


def test_two_answers_by_hand():
    # r_max = 1, γ = ½: values lie in ±2. Teacher: Q = 3, next V = 5, clipped to 2: error 3 − 1 − 1 = 1; then Q = 5 at
    # the end, which is followed by 2: error 5 − 1 − 1 = 3. Student: Q = 1, ends in −2: error 1 + 1 + 1 = 3.
    teacher = Episode([state(3.0, 0.0), state(5.0)], "terminal")
    episodes = [teacher, Episode([state(1.0)], "terminal", from_student=True)]
    result = LSIQ(gamma=0.5, coordinates="raw", r_max=1.0)(pack(episodes))
    assert float(result.loss) == pytest.approx(1 + 9 + 9)
    # One of three next values is outside the bounds; those after an end token are set and not clipped.
    assert [float(x) for x in result.metrics["clipped_share"]] == [1.0, 3.0]
    # Fixed target 2: errors 3 − 2 and 5 − 2.
    result = LSIQ(gamma=0.5, coordinates="raw", r_max=1.0, teacher_target="fixed", student_weight=0.0)(pack(episodes))
    assert float(result.loss) == pytest.approx(1 + 9)


def test_an_expert_that_never_leaves_its_bound_has_no_error():
    # Q = r_max/(1 − γ) on every teacher transition, terminal or not.
    one = [state(20.0), state(20.0)]
    assert float(LSIQ(gamma=0.95, coordinates="raw", r_max=1.0)(pack([Episode(one, "terminal")])).loss) < 1e-20


def test_without_termination_and_clipping_it_is_sqil_with_a_shifted_reward():
    """Q − c for Q, c = r_max/(1 − γ), turns rewards of +r and −r into 2r and 0."""
    gamma, r_max = 0.9, 50.0
    episodes = [replace(e, ends="truncated") for e in random_episodes(2, with_student=True)]
    stats = pack(episodes)
    # High enough for the lowered values to stay above the lower bound.
    stats = replace(stats, q_M=stats.q_M + 20, q_taken_N=stats.q_taken_N + 20)
    shift = r_max / (1 - gamma)
    lower = replace(stats, q_M=stats.q_M - shift, q_taken_N=stats.q_taken_N - shift)
    shifted = SQIL(gamma=gamma, coordinates="raw", reward=2 * r_max)(stats).loss
    found = LSIQ(gamma=gamma, coordinates="raw", r_max=r_max, absorbing="zero")(lower).loss
    assert float(found) == pytest.approx(float(shifted), rel=1e-9)


@pytest.mark.parametrize("coordinates", ["raw", "value_head"])
def test_it_is_iq_learn_without_its_value_term(coordinates):
    """(r − r_max)² = 4α (r²/(4α) − r) + r_max² with r_max = 2α; iq_learn is Σ −φ(r) + V(s) − γV(s')."""
    alpha, gamma = 10.0, 0.9
    stats = pack([e for e in random_episodes(3) if e.ends == "terminal" or e.bootstrap])
    value_N = stats.value_N if coordinates == "value_head" else returns.soft_value(stats.q_M, stats.offsets)
    following_N, _ = returns.next_value(value_N, stats)
    value_term = (value_N - gamma * following_N)[stats.has_action_N].sum()
    inverse = IQLearn(alpha=alpha, gamma=gamma, coordinates=coordinates, first_order="sampled")(stats).loss
    r_max = 2 * alpha
    found = LSIQ(gamma, coordinates, r_max, student_weight=0.0, absorbing="zero")(stats).loss
    wanted = 4 * alpha * (inverse - value_term) + r_max**2 * stats.has_action_N.sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)


def test_what_it_asks_for():
    assert LSIQ().needs_rollouts and LSIQ().needs_value_head and not LSIQ().needs_target
    other = LSIQ(coordinates="raw", student_weight=0.0, target="slow")
    assert not other.needs_rollouts and not other.needs_value_head and other.needs_target
    metrics = other(pack(random_episodes(6, with_student=True))).metrics
    assert not any(name.endswith("_student") for name in metrics)


def test_the_maximum_over_the_set_is_refused_at_p_1():
    with pytest.raises(DomainError, match="set coordinates to raw or value_head"):
        check_full_support(LSIQ(coordinates="max_set"))
    check_full_support(LSIQ())


def test_a_clipped_value_has_no_gradient():
    episode = Episode([state(0.0, 0.0), state(9.0, 0.0)], "terminal")
    leaves = with_leaves(pack([episode]))
    LSIQ(gamma=0.5, coordinates="raw", r_max=1.0, absorbing="zero")(leaves).loss.backward()
    # Slots of the second state: only its own squared error acts, not the value it has for the first.
    assert leaves.q_M.grad[3] == 0.0
    assert torch.count_nonzero(leaves.q_taken_N.grad) == 2


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"gamma": 1.0}, "gamma = 1.0"),
        ({"gamma": 1.5}, "gamma = 1.5"),
        ({"r_max": 0.0}, "r_max = 0.0"),
        ({"r_max": float("inf")}, "r_max = inf"),
        ({"student_weight": -1.0}, "student_weight = -1.0"),
    ],
)
def test_fields_outside_their_domain_are_refused(fields, part):
    with pytest.raises(DomainError, match=part):
        LSIQ(**fields)
