"""Path consistency with the teacher's reward: its formula, its optimum, and what its value learns."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import gradients, pack, random_episodes, with_leaves
from references import td_family
from references.losses import Episode, State, projected

from tdistill.errors import DomainError
from tdistill.objectives import IQLearn, check_full_support
from tdistill.objectives.path_consistency import PathConsistency
from tdistill.objectives.reverse_kl import ReverseKL

GRID = [
    dict(zip(("first_order", "value", "states", "steps", "gamma", "weight", "student_weight"), row, strict=True))
    for row in itertools.product(
        ["expected", "sampled", "none"], ["head", "none"], ["teacher", "both"], [1, 3], [0.0, 0.9], [0.3], [0.5]
    )
]


@pytest.mark.parametrize("fields", GRID)
def test_loss_is_the_printed_formula(fields):
    episodes = random_episodes(1, with_student=True)
    objective = PathConsistency(**fields)
    assert float(objective(pack(episodes)).loss) == pytest.approx(
        td_family.path_consistency(episodes, **vars(objective)), rel=1e-9, abs=1e-9
    )
    for episode in episodes:
        found = float(objective(pack([episode])).loss)
        assert found == pytest.approx(td_family.path_consistency([episode], **vars(objective)), rel=1e-9, abs=1e-9)


def state(logits: list[float], probs: list[float], taken: int | None, value: float) -> State:
    return State(np.array(logits), np.log(probs), taken, value_head=value)


def test_two_steps_by_hand():
    # First state: student (½, ½), teacher (0.6, 0.2), projected (¾, ¼), first action: log-ratio log(¾/½) = log 1.5.
    # Second: one token, log-ratio 0, ends. v = 1 and 2, γ = ½: δ₀ = log 1.5 + ½·2 − 1 = log 1.5, δ₁ = 0 − 2 = −2.
    # First-order terms: ¾ log ½ + ¼ log ½ = −log 2, and 0.
    episode = Episode([state([0.0, 0.0], [0.6, 0.2], 0, 1.0), state([5.0], [0.9], 0, 2.0)], "terminal")
    result = PathConsistency(weight=0.1, gamma=0.5)(pack([episode]))
    assert float(result.loss) == pytest.approx(0.1 * (math.log(1.5) ** 2 + 4) + math.log(2))
    # Two steps: δ₀ = log 1.5 + ½·0 − 1.
    result = PathConsistency(weight=0.1, gamma=0.5, steps=2)(pack([episode]))
    assert float(result.loss) == pytest.approx(0.1 * ((math.log(1.5) - 1) ** 2 + 4) + math.log(2))


@pytest.mark.parametrize("first_order", ["expected", "none"])
@pytest.mark.parametrize(("gamma", "steps"), [(0.0, 1), (0.9, 1), (1.0, 3), (0.99, 40)])
def test_the_teacher_is_stationary_for_every_discount_and_number_of_steps(first_order, gamma, steps):
    episodes = random_episodes(2, with_student=True)
    at_teacher = [
        replace(e, states=[replace(s, logits=s.teacher_log_probs + 3.7, value_head=0.0) for s in e.states])
        for e in episodes
    ]
    objective = PathConsistency(gamma=gamma, steps=steps, first_order=first_order, states="both", weight=2.0)
    leaves = with_leaves(pack(at_teacher))
    result = objective(leaves)
    result.loss.backward()
    assert all(float(g.abs().max()) < 1e-12 for g in gradients(leaves).values())
    assert float(result.metrics["residual_squared"][0]) < 1e-24


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_the_value_is_the_divergence_still_to_come(whose):
    """A tree of depth 2 whose student is fixed and wrong: the least squares v over all of its trajectories."""
    gamma, rng = 0.8, np.random.default_rng(3)
    teacher, student = (np.log(rng.dirichlet([1, 1, 1], size=4)) for _ in range(2))
    actor = np.exp(teacher if whose == "teacher" else student)
    # Nodes: 0 the root, 1 to 3 its children; every trajectory is weighted by its probability under the actor.
    value = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    objective = PathConsistency(gamma=gamma, weight=1.0, first_order="none", states="both")
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        nodes = [0, 1 + a]
        states = [State(student[n], teacher[n], t, value_head=0.0) for n, t in zip(nodes, (a, b), strict=True)]
        episode = Episode(states, "terminal", from_student=whose == "student")
        stats = replace(pack([episode]), value_N=value[nodes])
        total = total + actor[0, a] * actor[1 + a, b] * objective(stats).loss
    # A quadratic in v: one Newton step reaches its minimum.
    (gradient,) = torch.autograd.grad(total, value, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(gradient[i], value, retain_graph=True)[0] for i in range(4)])
    best = -torch.linalg.solve(hessian, gradient.detach())
    found = best.detach().numpy()
    gap = (actor * (teacher - student)).sum(1)  # KL(T‖S) under the teacher, −KL(S‖T) under the student
    # v(child) is in the residual of its own step and, as the value after it, in that of the root.
    arrived = teacher[0] - student[0] + gamma * found[1:] - found[0]
    assert found[1:] == pytest.approx(gap[1:] - gamma * arrived, abs=1e-9)
    # What arrives has mean 0, so the root's value is the discounted sum of the divergences exactly.
    assert found[0] == pytest.approx(gap[0] + gamma * float(actor[0] @ gap[1:]), abs=1e-9)
    assert np.sign(found[0]) == (1 if whose == "teacher" else -1)


@pytest.mark.parametrize("value", [-1.5, 0.0, 2.0])
def test_at_gamma_0_the_students_own_tokens_of_a_set_descend_reverse_kl(value):
    """Every token of a set, weighted by how likely the student is to take it: twice the gradient, whatever v is."""
    (episode, *_) = random_episodes(6)
    own = max(episode.states, key=lambda s: len(s.logits))

    def gradient(objective, taken):
        leaves = with_leaves(pack([Episode([replace(own, taken=taken, value_head=value)], "terminal")]))
        objective(leaves).loss.backward()
        found = gradients(leaves)
        of_set = found["q_M"].numpy().copy()
        of_set[taken] += float(found["q_taken_N"])
        return of_set

    student = projected(own.logits)
    squares = PathConsistency(weight=1.0, gamma=0.0, first_order="none")
    found = sum(prob * gradient(squares, taken) for taken, prob in enumerate(student))
    wanted = 2 * gradient(ReverseKL(source="set"), 0)
    assert np.abs(wanted).max() > 1e-3 and found == pytest.approx(wanted, abs=1e-12)


def test_without_residuals_it_is_behaviour_cloning_on_the_sets():
    stats = pack(random_episodes(4))
    for first_order in ("expected", "sampled"):
        found = PathConsistency(weight=0.0, first_order=first_order)(stats).loss
        assert float(found) == pytest.approx(float(IQLearn(alpha=math.inf, first_order=first_order)(stats).loss))


def test_projected_probabilities_are_the_teachers():
    episodes = random_episodes(5)
    ratio = PathConsistency()(pack(episodes)).metrics["log_ratio"][0]
    wanted = sum(
        float((s.logits - np.logaddexp.reduce(s.logits))[s.taken]) - math.log(projected(s.teacher_log_probs)[s.taken])
        for e in episodes
        for s in e.states
        if s.taken is not None
    )
    assert float(ratio) == pytest.approx(wanted)


def test_metrics_by_hand():
    # A teacher's and a student's answer of one token, each its end: set (½, ½) for the student, (¾, ¼) for the teacher.
    # Teacher's, first token, v = 1: δ = log(¾/½) − 1 = log 1.5 − 1. Student's, second token, v = −2: δ = log ½ + 2.
    def one(taken: int, value: float, from_student: bool) -> Episode:
        return Episode([state([0.0, 0.0], [0.6, 0.2], taken, value)], "terminal", from_student=from_student)

    stats = pack([one(0, 1.0, False), one(1, -2.0, True)])
    metrics = PathConsistency(states="both", weight=0.3, student_weight=7.0)(stats).metrics
    on_teacher, on_student = math.log(1.5) - 1, math.log(0.5) + 2
    wanted = {
        "residual": on_teacher,
        "residual_squared": on_teacher**2,
        "residual_student": on_student,
        "residual_squared_student": on_student**2,
        "log_ratio": -math.log(1.5),
        "log_ratio_student": -math.log(0.5),
        "value": 1.0,
    }
    assert {name: float(metrics[name][0]) for name in wanted} == pytest.approx(wanted)
    assert {int(metrics[name][1]) for name in wanted} == {1}
    # The expected first-order term is that of both answers, the sampled one that of the teacher's: log ½ each.
    assert [float(x) for x in metrics["first_order"]] == pytest.approx([2 * math.log(2), 2])
    sampled = PathConsistency(states="both", first_order="sampled")(stats).metrics["first_order"]
    assert [float(x) for x in sampled] == pytest.approx([math.log(2), 1])
    offline = PathConsistency()(stats).metrics
    assert [float(x) for x in offline["first_order"]] == pytest.approx([math.log(2), 1])
    assert not [name for name in offline if name.endswith("_student")]


def test_what_it_needs_follows_from_its_fields():
    assert (PathConsistency().needs_rollouts, PathConsistency(states="both").needs_rollouts) == (False, True)
    assert (PathConsistency().needs_value_head, PathConsistency(value="none").needs_value_head) == (True, False)


def test_p_1_is_refused_with_a_remedy():
    with pytest.raises(DomainError, match=r"path_consistency at p = 1 .* train iq_learn .* at p < 1"):
        check_full_support(PathConsistency())


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"weight": -1.0}, "weight = -1.0"),
        ({"student_weight": -1.0}, "student_weight = -1.0"),
        ({"gamma": 1.5}, "gamma = 1.5"),
        ({"steps": 0}, "steps = 0"),
        ({"weight": 0.0, "first_order": "none"}, "leave no loss"),
    ],
)
def test_fields_outside_their_domain_are_refused(fields, part):
    with pytest.raises(DomainError, match=part):
        PathConsistency(**fields)
