"""SQIL: its formula, a value by hand, and its fixed point."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import gradients, pack, random_episodes, with_leaves
from references import td_family
from references.losses import Episode, State
from references.sets import log_sum_exp

from tdistill.errors import DomainError
from tdistill.objectives import check_full_support
from tdistill.objectives.sqil import SQIL

GRID = [
    dict(zip(("coordinates", "target", "gamma", "reward", "student_weight"), row, strict=True))
    for row in itertools.product(
        ["raw", "max_set", "value_head"], ["residual", "slow"], [0.0, 0.9, 1.0], [1.0, 0.3], [0.5]
    )
]


@pytest.mark.parametrize("fields", GRID)
def test_loss_is_the_printed_formula(fields):
    episodes = random_episodes(1, with_student=True)
    for part in (episodes, *([episode] for episode in episodes)):
        found = float(SQIL(**fields)(pack(part)).loss)
        assert found == pytest.approx(td_family.sqil(part, **fields), rel=1e-9, abs=1e-9)


def test_two_answers_by_hand():
    # Teacher: Q(s,a) = 2, next V = log(e¹) = 1, γ = ½: error 2 − 1 − ½ = ½. Its last step: Q = 1, ends: error 0.
    # Student: Q(s,a) = 3, ends: error 3. Sum: ¼ + 0 + λ·9.
    def state(logits: list[float]) -> State:
        return State(np.array(logits), np.log([0.9 / len(logits)] * len(logits)), 0)

    teacher = Episode([state([2.0, 0.0]), state([1.0])], "terminal")
    student = Episode([state([3.0])], "terminal", from_student=True)
    result = SQIL(gamma=0.5, coordinates="raw", student_weight=0.5)(pack([teacher, student]))
    assert float(result.loss) == pytest.approx(0.25 + 4.5)
    assert [float(x) for x in result.metrics["recovered_reward_student"]] == [3.0, 1.0]


def test_rewards_that_are_met_leave_no_error():
    # One action per state, reward 1, γ = ½ and two steps: Q = 1 at the last, 1 + ½ at the first.
    one = [State(np.array([q]), np.log([0.9]), 0) for q in (1.5, 1.0)]
    assert float(SQIL(gamma=0.5, coordinates="raw")(pack([Episode(one, "terminal")])).loss) == 0.0


def test_one_answer_from_both_is_stationary_halfway_between_the_rewards():
    """(Q − R − y)² + (Q − y)² has its minimum at Q − y = R/2."""
    states = [State(np.array([q]), np.log([0.9]), 0) for q in (0.75, 0.5)]
    both = [Episode(states, "terminal"), Episode(states, "terminal", from_student=True)]
    leaves = with_leaves(pack(both))
    SQIL(gamma=0.5, coordinates="raw")(leaves).loss.backward()
    by_state = [g.view(2, 2).sum(0) for name, g in gradients(leaves).items() if name in ("q_M", "q_taken_N")]
    assert sum(by_state).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert all(g.abs().max() > 0.1 for g in gradients(leaves)["q_taken_N"].view(2, 2))


def test_a_slow_target_has_no_gradient_through_the_next_value():
    """With raw logits only the logit of the action moves, by 2(Q − y); the value of the next state does not."""
    stats = pack([Episode([State(np.array([2.0, 0.0]), np.log([0.5, 0.4]), 0)] * 2, "terminal")])
    stats = replace(stats, target=stats)
    after = float(np.logaddexp(2.0, 0.0))
    errors = [2.0 - 1.0 - 0.5 * after, 2.0 - 1.0]
    for target in ("slow", "residual"):
        leaves = with_leaves(stats)
        loss = SQIL(gamma=0.5, coordinates="raw", target=target, student_weight=0.0)(leaves).loss
        assert float(loss.detach()) == pytest.approx(sum(e * e for e in errors))
        loss.backward()
        found = gradients(leaves)
        assert found["q_taken_N"].tolist() == pytest.approx([2 * e for e in errors])
        through_value = -0.5 * 2 * errors[0] * np.exp(np.array([2.0, 0.0]) - after)
        wanted = [0.0, 0.0, *through_value] if target == "residual" else [0.0] * 4
        assert found["q_M"].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("coordinates", ["raw", "value_head"])
@pytest.mark.parametrize("target", ["residual", "slow"])
def test_p_1_equals_the_list_of_all_tokens(coordinates, target):
    episodes = [
        replace(e, states=[replace(s, normaliser=log_sum_exp(s.logits)) for s in e.states])
        for e in random_episodes(5, with_student=True)
    ]
    listed = pack(episodes)
    slow_values = [log_sum_exp(s.slow_logits) for e in episodes for s in e.states]
    none = {"offsets": torch.zeros_like(listed.offsets), "q_M": listed.q_M[:0], "full_support": True}
    none["log_prob_teacher_M"] = none["q_M"]
    slow = replace(listed.target, log_normaliser_N=torch.tensor(slow_values, dtype=torch.float64), **none)
    objective = SQIL(coordinates=coordinates, target=target)
    found = objective(replace(listed, target=slow, **none)).loss
    assert float(found) == pytest.approx(float(objective(listed).loss), rel=1e-12)


def test_the_maximum_over_the_set_is_refused_at_p_1():
    with pytest.raises(DomainError, match="set coordinates to raw or value_head"):
        check_full_support(SQIL(coordinates="max_set"))
    check_full_support(SQIL())


def test_what_it_asks_for():
    assert SQIL().needs_rollouts and SQIL().needs_value_head and not SQIL().needs_target
    other = SQIL(coordinates="raw", student_weight=0.0, target="slow")
    assert not other.needs_rollouts and not other.needs_value_head and other.needs_target
    metrics = other(pack(random_episodes(6, with_student=True))).metrics
    assert not any(name.endswith("_student") for name in metrics)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"student_weight": -1.0}, "student_weight"),
        ({"student_weight": float("nan")}, "student_weight"),
        ({"reward": float("inf")}, "reward"),
    ],
)
def test_fields_outside_their_domain_are_refused(fields, part):
    with pytest.raises(DomainError, match=part):
        SQIL(**fields)


def test_a_slow_copy_works_without_listed_sets():
    check_full_support(SQIL(coordinates="raw", target="slow"))
