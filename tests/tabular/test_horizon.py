"""The horizon experiment: its quadratic form, students and gaps against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from tdistill.errors import DomainError
from tdistill.tabular.horizon import (
    Method,
    default_methods,
    growth_exponents,
    horizon_experiment,
    interval,
    measure_methods,
)
from tdistill.tabular.optimum import maximise
from tdistill.tabular.students import (
    PROCESSES,
    STUDENTS,
    HorizonProcess,
    draw_horizon_process,
    residual_form,
    rollout_measures,
    train_student,
)
from tdistill.tabular.trees import TeacherTree

CLONING = Method(np.inf, 0.0, "per_step")


def draw(kind="unforgiving", student="low_rank", seed=0) -> HorizonProcess:
    return draw_horizon_process(np.random.default_rng(seed), kind, student)


def least_squares(process, horizon, gamma, head, log_policy_SA):
    """min over v of the expected squared residual, from one dense system with a row for every (t, s, a)."""
    num_states, num_actions = process.policy_SA.shape
    width = process.features_SF.shape[1]
    columns = width * (horizon if head == "per_step" else 1)
    rows, target, state = [], [], process.start_S
    for t in range(horizon):
        for s, a in itertools.product(range(num_states), range(num_actions)):
            root = math.sqrt(state[s] * process.policy_SA[s, a])
            row = np.zeros(columns)
            here, there = (width * t, width * (t + 1)) if head == "per_step" else (0, 0)
            row[here : here + width] += process.features_SF[s]
            if t + 1 < horizon:
                row[there : there + width] -= gamma * process.features_SF[process.next_SA[s, a]]
            rows.append(root * row)
            target.append(-root * log_policy_SA[s, a])
        after = np.zeros(num_states)
        for s, a in itertools.product(range(num_states), range(num_actions)):
            after[process.next_SA[s, a]] += state[s] * process.policy_SA[s, a]
        state = after
    design, target = np.array(rows), np.array(target)
    return ((design @ np.linalg.lstsq(design, target, rcond=None)[0] - target) ** 2).sum()


@pytest.mark.parametrize("head", ["per_step", "stationary"])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("kind", "student"), [*itertools.product(PROCESSES, STUDENTS)])
def test_the_quadratic_form_is_the_least_squares_over_values(kind, student, gamma, head):
    process = draw(kind, student)
    form = residual_form(process, 4, gamma, head)
    log_policy = np.random.default_rng(5).normal(size=process.policy_SA.shape)
    wanted = least_squares(process, 4, gamma, head, log_policy)
    assert log_policy.ravel() @ form @ log_policy.ravel() == pytest.approx(wanted, rel=1e-8)
    assert np.linalg.eigvalsh(form).min() > -1e-12


def test_occupancy_and_gaps_are_those_of_all_trajectories():
    process = draw()
    weights = np.random.default_rng(1).normal(size=(6, 6))
    logits = process.features_SF @ weights
    student = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    totals = dict.fromkeys(("student_teacher", "teacher_student", "return", "entropy", "off_track"), 0.0)
    for first, *actions in itertools.product(range(8), *[range(6)] * 3):
        state, own, teacher, off_track, entropy = first, 1 / 8, 1 / 8, 0.0, 0.0
        for action in actions:
            off_track += (state >= 8) / 3
            entropy -= student[state] @ np.log(student[state]) / 3
            own *= student[state, action]
            teacher *= process.policy_SA[state, action]
            state = process.next_SA[state, action]
        totals["student_teacher"] += own * math.log(own / teacher)
        totals["teacher_student"] += teacher * math.log(teacher / own)
        totals["off_track"] += own * off_track
        totals["entropy"] += own * entropy
        totals["return"] += (teacher - own) * math.log(8 * teacher)
    found = rollout_measures(process, weights, 3)
    assert found == pytest.approx(totals, rel=1e-10)


def test_behaviour_cloning_of_an_aliased_student_is_the_mean_policy_of_its_class():
    process = draw("forgiving", "aliased")
    weights = train_student(process, 8)
    reach = process.occupancy(process.policy_SA, 8).sum(0)
    for group in range(4):
        members = np.arange(16) % 4 == group
        mean = reach[members] @ process.policy_SA[members] / reach[members].sum()
        own = np.exp(weights[group]) / np.exp(weights[group]).sum()
        np.testing.assert_allclose(own, mean, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_with_one_step_an_exact_student_finds_the_maximum_on_the_tree(alpha):
    process = draw("forgiving", "exact")
    weights = train_student(process, 1, residual_form(process, 1, 0.9), alpha, train_student(process, 1))
    for state in range(0, 16, 5):
        probs = process.policy_SA[state]
        wanted = maximise(TeacherTree(probs, np.array([0, 6]), np.array([-1]), 6, 1.0, 0.9), alpha)
        own = np.exp(weights[state]) / np.exp(weights[state]).sum()
        np.testing.assert_allclose(own, probs * wanted.ratio_M, atol=2e-5)


def test_the_track_is_left_by_the_fatal_action_alone_and_never_entered_again():
    process = draw("unforgiving")
    leaves = process.next_SA >= 8
    assert (leaves[:8].sum(1) == 1).all() and leaves[8:].all()
    assert process.policy_SA[:8][leaves[:8]].max() < 1e-3
    assert (process.next_SA[:8][leaves[:8]] == np.arange(8) + 8).all()
    assert process.start_S[:8].sum() == 1


@pytest.mark.parametrize(("kind", "student"), [("forgiving", "aliased"), ("unforgiving", "low_rank")])
def test_behaviour_cloning_has_the_least_divergence_on_the_teachers_trajectories(kind, student):
    gaps = measure_methods(draw(kind, student), default_methods(), [8, 32])
    assert (gaps["teacher_student"] >= gaps["teacher_student"][0] * (1 - 1e-7)).all()
    assert (gaps["student_teacher"] > 0).all()
    near = [index for index, method in enumerate(default_methods()) if method.alpha == 100.0]
    np.testing.assert_allclose(gaps["teacher_student"][near], gaps["teacher_student"][:1].repeat(3, 0), rtol=0.01)


def test_an_exact_student_clones_the_teacher_and_chi2_keeps_it_away():
    gaps = measure_methods(draw("forgiving", "exact"), [CLONING, Method(1.0, 0.99, "per_step")], [8, 64])
    assert gaps["student_teacher"][0].max() < 1e-6
    assert 0.05 < gaps["student_teacher"][1, 0] < gaps["student_teacher"][1, 1] / 4


def test_exponents_and_intervals_of_known_numbers():
    horizons = (8, 16, 32, 64, 128)
    gaps = np.array([[5.0 * h**1.7 for h in horizons], [h if h < 100 else 1e9 for h in horizons]])
    np.testing.assert_allclose(growth_exponents(gaps, horizons, (8, 64)), [1.7, 1.0])
    # Mean 2, standard error 1/√3, t at 2 degrees of freedom 4.302653.
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx([2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    assert interval(np.array([0.5, 0.5])) == [0.5, 0.5, 0.5]


def test_the_experiment_compares_every_method_with_behaviour_cloning():
    calls = []
    methods = [CLONING, Method(0.1, 0.9, "per_step")]
    settings = [("forgiving", "aliased"), ("forgiving", "exact")]
    run = {"num_seeds": 3, "seed": 5, "settings": settings, "methods": methods, "horizons": (8, 64, 512)}
    rows = horizon_experiment(**run, progress=lambda *call: calls.append(call))
    assert [(r["student"], r["method"], r["alpha"]) for r in rows] == [
        ("aliased", "bc", None),
        ("aliased", "bd alpha=0.1 gamma=0.9 per_step", 0.1),
        ("exact", "bc", None),
        ("exact", "bd alpha=0.1 gamma=0.9 per_step", 0.1),
    ]
    assert calls == [(done, 6) for done in range(1, 7)]
    cloned, trained = rows[0]["student_teacher"], rows[1]["student_teacher"]
    assert cloned["exponents_cloning_minus_this"] == [[0, 0, 0], [0, 0, 0]]
    assert cloned["log_ratio_to_cloning"] == [[0, 0, 0]] * 3
    for part in range(2):
        difference = cloned["exponents"][part][0] - trained["exponents"][part][0]
        assert trained["exponents_cloning_minus_this"][part][0] == pytest.approx(difference, abs=1e-12)
        mean, low, high = trained["exponents"][part]
        assert low < mean < high and 0.7 < mean < 1.3  # errors that are forgotten add up
    assert "student_teacher" not in rows[2] and rows[2]["means"]["student_teacher"][2] < 1e-4
    one = measure_methods(draw_horizon_process(np.random.default_rng([5, 2, 1]), *settings[0]), methods, (8,))
    others = [
        measure_methods(draw_horizon_process(np.random.default_rng([5, 2, index]), *settings[0]), methods, (8,))
        for index in (0, 2)
    ]
    mean = np.mean([gap["return"][1, 0] for gap in [one, *others]])
    assert rows[1]["means"]["return"][0] == pytest.approx(mean, rel=1e-9)


def test_what_the_experiment_cannot_do_is_refused():
    with pytest.raises(DomainError, match="at least 2"):
        horizon_experiment(1)
    with pytest.raises(DomainError, match="must come first"):
        horizon_experiment(2, methods=[Method(1.0, 0.9, "per_step")])
    with pytest.raises(DomainError, match=r"'cruel' is not known\. Known: forgiving"):
        draw("cruel")
    with pytest.raises(DomainError, match=r"'dull' is not known\. Known: aliased"):
        draw(student="dull")
