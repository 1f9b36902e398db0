"""Soft Q-learning of the teacher's reward: its formula, and the teacher as its fixed point."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from builders import gradients, pack, random_episodes, with_leaves
from references import td_family
from references.losses import Episode, State
from references.sets import log_sum_exp

from tdistill import returns
from tdistill.errors import DomainError
from tdistill.objectives import check_full_support
from tdistill.objectives.path_consistency import PathConsistency
from tdistill.objectives.teacher_q import TeacherQ

NAMES = ("coordinates", "target", "teacher_level", "gamma", "steps", "lam")
GRID = [
    dict(zip(NAMES, (*row, *kind), strict=True))
    for row in itertools.product(
        ["raw", "max_set", "value_head"], ["slow", "residual"], ["logits", "normalised"], [0.0, 0.9]
    )
    for kind in ((1, None), (3, None), (1, 0.0), (1, 0.6), (1, 1.0))
]


@pytest.mark.parametrize("fields", GRID)
def test_loss_is_the_printed_formula(fields):
    episodes = random_episodes(1, with_student=True)
    for part in (episodes, *([episode] for episode in episodes)):
        found = float(TeacherQ(**fields)(pack(part)).loss)
        assert found == pytest.approx(td_family.teacher_q(part, **fields), rel=1e-9, abs=1e-9)


def like_the_teacher(state: State, level: str) -> State:
    """Student and slow copy whose Q on the set is the teacher's, in every coordinate that can hold it."""
    covered = math.log(math.fsum(np.exp(state.teacher_log_probs)))
    value = state.teacher_log_sum_exp + covered if level == "logits" else 0.0
    q = state.teacher_log_probs - covered + value
    return replace(state, logits=q, slow_logits=q, value_head=value, slow_value_head=value)


@pytest.mark.parametrize("coordinates", ["raw", "value_head"])
@pytest.mark.parametrize("level", ["logits", "normalised"])
@pytest.mark.parametrize("target", ["slow", "residual"])
@pytest.mark.parametrize(("gamma", "steps", "lam"), [(0.0, 1, None), (0.9, 1, None), (1.0, 7, None), (0.9, 1, 0.8)])
def test_the_teacher_is_the_fixed_point(coordinates, level, target, gamma, steps, lam):
    episodes = random_episodes(2, with_student=True)
    at = [replace(e, states=[like_the_teacher(s, level) for s in e.states]) for e in episodes]
    objective = TeacherQ(gamma, coordinates, level, steps, lam, target)
    leaves = with_leaves(pack(at))
    result = objective(leaves)
    assert float(result.loss.detach()) < 1e-24
    result.loss.backward()
    assert all(float(g.abs().max()) < 1e-11 for g in gradients(leaves).values())


def test_one_step_by_hand():
    # Teacher (0.6, 0.2), projected (¾, ¼), level 0, one terminal step, first action: y = r = log ¾. Q(s,a) = 1.
    state = State(np.array([1.0, 0.0]), np.log([0.6, 0.2]), 0, slow_logits=np.zeros(2))
    result = TeacherQ(coordinates="raw")(pack([Episode([state], "terminal")]))
    assert float(result.loss) == pytest.approx((1 - math.log(0.75)) ** 2 / 2)
    # The teacher's logits have log-sum-exp 2: on the set it is 2 + log 0.8, and Q* = log 0.6 + 2.
    state = replace(state, teacher_log_sum_exp=2.0)
    result = TeacherQ(coordinates="raw", teacher_level="logits")(pack([Episode([state], "terminal")]))
    assert float(result.loss) == pytest.approx((1 - math.log(0.6) - 2) ** 2 / 2)


@pytest.mark.parametrize("level_of_next", ["on the set", "over the vocabulary"])
def test_the_value_on_the_set_makes_the_teacher_the_fixed_point(level_of_next):
    """Backward induction of Q = r + γ log Σ_A exp Q over a tree of depth 3, every action of the sets tried.

    With r = Q* − γ V*_p(s') the solution is Q*. With L(s') for V*_p(s') it lacks −γ log Z(s') one step before the last
    state, and γ times the same of the later states more before that.
    """
    gamma, rng = 0.9, np.random.default_rng(0)

    def tree(depth: int) -> dict:
        logits = np.sort(rng.normal(size=5))[::-1] * 2
        size = int(rng.integers(1, 4))
        children = [None if depth == 0 or i == 2 else tree(depth - 1) for i in range(size)]
        return {"logits": logits, "size": size, "children": children}

    def on_set(node: dict) -> float:
        return log_sum_exp(node["logits"][: node["size"]])

    def solve(node: dict) -> np.ndarray:
        q = []
        for i, child in enumerate(node["children"]):
            value = 0.0
            if child is not None:
                value = on_set(child) if level_of_next == "on the set" else log_sum_exp(child["logits"])
            reward = node["logits"][i] - gamma * value
            q.append(reward if child is None else reward + gamma * log_sum_exp(solve(child)))
        return np.array(q)

    def gaps(node: dict) -> list[float]:
        own = np.abs(solve(node) - node["logits"][: node["size"]]).max()
        return [own, *(g for child in node["children"] if child is not None for g in gaps(child))]

    root = tree(3)
    if level_of_next == "on the set":
        assert max(gaps(root)) < 1e-12
        return
    assert max(gaps(root)) > 0.01
    before_last = {"logits": root["logits"], "size": 1, "children": [tree(0)]}
    last = before_last["children"][0]
    log_mass = on_set(last) - log_sum_exp(last["logits"])
    assert float(solve(before_last)[0] - root["logits"][0]) == pytest.approx(gamma * log_mass)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_with_gradient_through_the_target_it_is_path_consistency(steps, gamma):
    stats = with_leaves(pack(random_episodes(5, with_student=True)))
    found = TeacherQ(gamma, steps=steps, target="residual")(stats).loss
    wanted = PathConsistency(weight=1.0, gamma=gamma, steps=steps, first_order="none", states="both")(stats).loss
    assert float(found.detach()) == pytest.approx(float(wanted.detach()) / 2, rel=1e-12)


@pytest.mark.parametrize("target", ["slow", "residual"])
@pytest.mark.parametrize("kind", [{"steps": 3}, {"lam": 0.7}])
def test_the_level_of_the_teacher_is_a_potential(target, kind):
    """With v + V*_p for v, the reward of the logits gives the errors of the normalised one."""
    stats = pack(random_episodes(6, with_student=True))
    potential_N = stats.teacher_log_sum_exp_N + returns.soft_value(stats.log_prob_teacher_M, stats.offsets)
    higher = replace(
        stats,
        value_N=stats.value_N + potential_N,
        target=replace(stats.target, value_N=stats.target.value_N + potential_N),
    )
    found = TeacherQ(teacher_level="logits", target=target, **kind)(higher).loss
    assert float(found) == pytest.approx(float(TeacherQ(target=target, **kind)(stats).loss), rel=1e-9)


def test_a_slow_target_moves_the_action_only():
    stats = pack([e for e in random_episodes(7) if len(e.states) > 2])
    for target, moves in (("slow", False), ("residual", True)):
        leaves = with_leaves(stats)
        TeacherQ(coordinates="raw", steps=2, target=target)(leaves).loss.backward()
        assert bool(gradients(leaves)["q_M"].abs().max() > 1e-3) is moves
        assert gradients(leaves)["q_taken_N"].abs().max() > 1e-3


def test_it_is_refused_at_p_1():
    for target in ("slow", "residual"):
        with pytest.raises(DomainError, match="no listed action sets"):
            check_full_support(TeacherQ(target=target))


def test_limits_of_lambda():
    stats = pack(random_episodes(3))
    one, whole = TeacherQ(steps=1)(stats).loss, TeacherQ(steps=10**6)(stats).loss
    assert float(TeacherQ(lam=0.0)(stats).loss) == pytest.approx(float(one), rel=1e-12)
    assert float(TeacherQ(lam=1.0)(stats).loss) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"gamma": 2.0}, "gamma"),
        ({"steps": 0}, "steps = 0"),
        ({"lam": 1.2}, "lam = 1.2"),
        ({"lam": 0.5, "steps": 2}, "drop steps = 2"),
    ],
)
def test_fields_outside_their_domain_are_refused(fields, part):
    with pytest.raises(DomainError, match=part):
        TeacherQ(**fields)


def test_a_slow_target_needs_a_slow_copy():
    with pytest.raises(DomainError, match="slow copy"):
        TeacherQ()(replace(pack(random_episodes(4)), target=None))
