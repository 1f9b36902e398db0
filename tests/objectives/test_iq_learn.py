"""Bellman Distill: the printed objective, values by hand, the identities it claims, and its optimum."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from builders import gradients, pack, random_episodes, random_state, with_leaves
from references import losses
from torch import Tensor

from tdistill import returns
from tdistill.errors import ConfigError, DomainError
from tdistill.head import OutputHead
from tdistill.kernels.dispatch import student_statistics
from tdistill.objectives import SFT, IQLearn, objective_class
from tdistill.regularisers import PhiName
from tdistill.types import ActionStats, Ends

INF = math.inf
GRID = [
    (coordinates, *rest, q_floor)
    for coordinates, *rest, q_floor in itertools.product(
        ["raw", "max_set", "value_head"],
        ["sampled", "expected", "both"],
        [0.1, 10.0, INF],
        [0.0, 0.7, 1.0],
        [None, -0.4],
    )
    if coordinates != "value_head" or q_floor is None
]


@pytest.mark.parametrize(("coordinates", "first_order", "alpha", "gamma", "q_floor"), GRID)
def test_loss_is_the_printed_objective(coordinates, first_order, alpha, gamma, q_floor):
    """−Σ φ(Q − γV') + V − γV' with its terms as printed equals the telescoped form, for every kind of episode end."""
    settings = {
        "alpha": alpha,
        "gamma": gamma,
        "coordinates": coordinates,
        "first_order": first_order,
        "q_floor": q_floor,
    }
    for seed in range(3):
        episodes = random_episodes(seed)
        result = IQLearn(**settings)(pack(episodes))
        assert float(result.loss) == pytest.approx(losses.iq_learn(episodes, **settings), rel=1e-9, abs=1e-9)
        for episode in episodes:  # each kind alone, so that no error hides behind another
            found = float(IQLearn(**settings)(pack([episode])).loss)
            assert found == pytest.approx(losses.iq_learn([episode], **settings), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("phi", get_args(PhiName))
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("coordinates", "first_order"), [("raw", "sampled"), ("value_head", "expected")])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_every_phi_number_of_steps_and_mixture_is_its_formula(phi, steps, coordinates, first_order, weight):
    fields = {"alpha": 0.6, "gamma": 0.9, "coordinates": coordinates, "first_order": first_order, "phi": phi}
    fields |= {"steps": steps, "student_value_weight": weight, "tv_slope": 0.7}
    episodes = random_episodes(7, with_student=True)
    for part in (episodes, *([episode] for episode in episodes)):
        found = float(IQLearn(**fields)(pack(part)).loss)
        assert found == pytest.approx(losses.iq_learn(part, **fields), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("fields", [{"phi": "identity"}, {"alpha": INF}, {"phi": "hellinger", "alpha": INF}])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("coordinates", ["raw", "max_set", "value_head"])
def test_without_a_non_linear_part_it_is_masked_cross_entropy_exactly(fields, gamma, steps, coordinates):
    episodes = random_episodes(8)
    objective = IQLearn(gamma=gamma, steps=steps, coordinates=coordinates, first_order="sampled", **fields)
    leaves = with_leaves(pack(episodes))
    result = objective(leaves)
    result.loss.backward()
    plain = with_leaves(pack(episodes))
    act = plain.has_action_N
    cross_entropy = (returns.soft_value(plain.q_M, plain.offsets) - plain.q_taken_N)[act].sum()
    cross_entropy.backward()
    assert float(result.loss.detach()) == pytest.approx(float(cross_entropy.detach()), rel=1e-15)
    torch.testing.assert_close(leaves.q_M.grad, plain.q_M.grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(leaves.q_taken_N.grad, plain.q_taken_N.grad, rtol=1e-13, atol=1e-15)
    assert leaves.value_N.grad is None or float(leaves.value_N.grad.abs().max()) == 0.0


def test_the_tangent_share_counts_the_residuals_below_the_point():
    # Two teacher transitions that end: r = log π_p + v = log ½ + v with v = 0 and −9. Hellinger at scale 1: x₀ = −½.
    def one(value: float) -> losses.Episode:
        return losses.Episode([losses.State(np.zeros(2), np.log([0.5, 0.4]), 0, value_head=value)], "terminal")

    result = IQLearn(phi="hellinger", alpha=1.0)(pack([one(0.5), one(-9.0)]))
    assert [float(x) for x in result.metrics["tangent_share"]] == [1.0, 2.0]


def tree_gradients(first_order: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and total variance, over all trajectories of a tree, of the gradient in its logits.

    A root of four actions whose children have four each; trajectories are weighted by the teacher's probabilities.
    """
    rng = np.random.default_rng(9)
    teacher, logits = np.log(rng.dirichlet(np.ones(4), size=5)), rng.normal(size=(5, 4))
    objective = IQLearn(alpha=INF, coordinates="raw", first_order=first_order)
    rows, weights = [], []
    for a, b in itertools.product(range(4), range(4)):
        nodes = [0, 1 + a]
        states = [losses.State(logits[n], teacher[n], t) for n, t in zip(nodes, (a, b), strict=True)]
        leaves = with_leaves(pack([losses.Episode(states, "terminal")]))
        objective(leaves).loss.backward()
        gradient = np.zeros((5, 4))
        for place, (node, taken) in enumerate(zip(nodes, (a, b), strict=True)):
            gradient[node] += leaves.q_M.grad[4 * place : 4 * place + 4].numpy()
            if leaves.q_taken_N.grad is not None:
                gradient[node, taken] += float(leaves.q_taken_N.grad[place])
        rows.append(gradient.ravel())
        weights.append(math.exp(teacher[0, a] + teacher[1 + a, b]))
    mean = np.average(rows, axis=0, weights=weights)
    return mean, np.average(((rows - mean) ** 2).sum(1), weights=weights)


def test_the_expected_first_order_term_has_the_same_mean_and_a_lower_variance():
    (sampled, wide), (expected, narrow) = tree_gradients("sampled"), tree_gradients("expected")
    np.testing.assert_allclose(expected, sampled, atol=1e-12)
    assert narrow < 0.8 * wide


def one_row(logits: list[float], teacher: list[float], taken: int, value: float = 0.0, ends=Ends.TERMINAL):
    return ActionStats(
        offsets=torch.tensor([0, len(logits)]),
        q_M=torch.tensor(logits, dtype=torch.float64),
        log_prob_teacher_M=torch.log(torch.tensor(teacher, dtype=torch.float64)),
        q_taken_N=torch.tensor([logits[taken]], dtype=torch.float64),
        sequence_N=torch.tensor([0]),
        has_action_N=torch.tensor([True]),
        ends_N=torch.tensor([int(ends)]),
        log_normaliser_N=torch.tensor([float(np.logaddexp.reduce([*logits, 0.0]))], dtype=torch.float64),
        value_N=torch.tensor([value], dtype=torch.float64),
    )


def test_one_terminal_step_by_hand():
    # Q = (log 3, log 1), V = log 4. Taken: the first. log π_Q = log ¾, r = Q = log 3.
    # −J = log(4/3) + (log 3)² / (4 · 2).
    stats = one_row([math.log(3), 0.0], [0.5, 0.3], taken=0)
    result = IQLearn(alpha=2.0, coordinates="raw", first_order="sampled")(stats)
    assert float(result.loss) == pytest.approx(math.log(4 / 3) + math.log(3) ** 2 / 8)
    # Expected: proj π* = (5/8, 3/8), so the first term is 5/8 log(4/3) + 3/8 log 4.
    result = IQLearn(alpha=2.0, coordinates="raw", first_order="expected")(stats)
    wanted = 5 / 8 * math.log(4 / 3) + 3 / 8 * math.log(4)
    assert float(result.loss) == pytest.approx(wanted + math.log(3) ** 2 / 8)
    assert float(result.metrics["first_order"][0]) == pytest.approx(wanted)
    # Maximum over the set: Q = (0, −log 3), so r = 0 and the penalty vanishes.
    result = IQLearn(alpha=2.0, coordinates="max_set", first_order="sampled")(stats)
    assert float(result.loss) == pytest.approx(math.log(4 / 3))
    # Value head v = 0.5: r = log ¾ + 0.5.
    result = IQLearn(alpha=2.0, coordinates="value_head", first_order="sampled")(
        replace(stats, value_N=stats.value_N + 0.5)
    )
    assert float(result.loss) == pytest.approx(math.log(4 / 3) + (math.log(0.75) + 0.5) ** 2 / 8)


def test_two_steps_and_a_truncation_by_hand():
    # Value head: v = (1, 2), single-token sets, so log π_Q = 0. r₀ = v₀ − γ v₁ = 1 − ½·2 = 0; r₁ = 2 at the end,
    # and no penalty at all where the episode was cut without a next state.
    first, second = one_row([0.3], [0.9], 0, 1.0), one_row([5.0], [0.9], 0, 2.0)
    stats = replace(
        first,
        offsets=torch.tensor([0, 1, 2]),
        **{
            name: torch.cat([getattr(first, name), getattr(second, name)])
            for name in ("q_M", "log_prob_teacher_M", "q_taken_N", "sequence_N", "has_action_N", "value_N")
        },
        ends_N=torch.tensor([int(Ends.NEXT), int(Ends.TERMINAL)]),
    )
    objective = IQLearn(alpha=0.5, gamma=0.5)
    result = objective(stats)
    assert float(result.loss) == pytest.approx(2.0**2 / 2)
    assert [float(x) for x in result.metrics["recovered_reward"]] == [2.0, 2.0]
    assert [float(x) for x in result.metrics["phi_penalty"]] == [2.0, 2.0]
    cut = replace(stats, ends_N=torch.tensor([int(Ends.NEXT), int(Ends.TRUNCATED)]))
    result = objective(cut)
    assert float(result.loss) == pytest.approx(0.0)
    assert [float(x) for x in result.metrics["residual_squared"]] == [0.0, 1.0]
    assert [float(x) for x in result.metrics["value"]] == [3.0, 2.0]


@pytest.mark.parametrize("coordinates", ["raw", "max_set", "value_head"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_without_chi2_it_is_masked_cross_entropy(coordinates, gamma):
    """Behaviour cloning on the set: dense cross-entropy over logits that are −∞ off the set, whatever γ is."""
    episodes = random_episodes(3)
    stats = with_leaves(pack(episodes))
    loss = IQLearn(alpha=INF, gamma=gamma, coordinates=coordinates, first_order="sampled")(stats).loss
    loss.backward()
    found = gradients(stats)

    states = [s for e in episodes for s in e.states]
    width = max(len(s.logits) for s in states)
    masked = torch.full((len(states), width), -INF, dtype=torch.float64)
    for n, state in enumerate(states):
        masked[n, : len(state.logits)] = torch.from_numpy(state.logits)
    masked.requires_grad_()
    taken = torch.tensor([-100 if s.taken is None else s.taken for s in states])
    cross_entropy = torch.nn.functional.cross_entropy(masked, taken, reduction="sum")
    cross_entropy.backward()
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-12)
    # The taken token's gradient arrives by q_taken_N; add it to its slot before comparing.
    total_M = found["q_M"].clone()
    for n, state in enumerate(states):
        if state.taken is not None:
            total_M[stats.offsets[n] + state.taken] += found["q_taken_N"][n]
    dense = torch.cat([masked.grad[n, : len(s.logits)] for n, s in enumerate(states)])
    torch.testing.assert_close(total_M, dense, rtol=1e-9, atol=1e-12)
    assert float(found["value_N"].abs().sum()) == 0.0


def dense_problem(full_support: bool) -> tuple[ActionStats, np.ndarray, np.ndarray]:
    """Seven positions of two episodes over a vocabulary of 12 through the dense kernel: all tokens listed, or none."""
    generator = torch.Generator().manual_seed(4)
    num, vocab, width = 7, 12, 5
    hidden = torch.randn(num, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, width, dtype=torch.float64, generator=generator)
    taken = torch.randint(0, vocab, (num,), generator=generator)
    listed = 0 if full_support else vocab
    fields = student_statistics(
        hidden,
        OutputHead(weight),
        offsets=torch.arange(num + 1) * listed,
        action_ids_M=torch.arange(listed).repeat(num),
        taken_N=taken,
        support="vocabulary",
        kernel="reference",
    )
    stats = ActionStats(
        offsets=torch.arange(num + 1) * listed,
        log_prob_teacher_M=torch.full((num * listed,), -math.log(vocab), dtype=torch.float64),
        sequence_N=torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        has_action_N=torch.tensor([True] * 6 + [False]),
        ends_N=torch.tensor([Ends.NEXT, Ends.NEXT, Ends.TERMINAL, Ends.NEXT, Ends.NEXT, Ends.NEXT, Ends.TRUNCATED]),
        value_N=torch.linspace(-1, 1, num, dtype=torch.float64),
        full_support=full_support,
        **fields,
    )
    return stats, (hidden @ weight.T).numpy(), taken.numpy()


@pytest.mark.parametrize("coordinates", ["raw", "value_head"])
@pytest.mark.parametrize("alpha", [0.1, INF])
def test_p_1_equals_the_list_of_all_tokens(coordinates, alpha):
    objective = IQLearn(alpha=alpha, gamma=0.9, coordinates=coordinates, first_order="sampled")
    without, with_list = objective(dense_problem(True)[0]), objective(dense_problem(False)[0])
    assert float(without.loss) == pytest.approx(float(with_list.loss), rel=1e-12)
    for name, (total, count) in with_list.metrics.items():
        assert [float(x) for x in without.metrics[name]] == pytest.approx([float(total), float(count)], rel=1e-9)


@pytest.mark.parametrize("phi", get_args(PhiName))
@pytest.mark.parametrize("alpha", [0.1, 20.0])
def test_p_1_is_iq_learn_on_the_whole_vocabulary(phi, alpha):
    """J(Q) = E[φ(Q(s,a) − γV(s'))] − E[V(s) − γV(s')], V = log Σ_a exp Q, all tokens (arXiv 2106.12142)."""
    stats, logits, taken = dense_problem(True)
    gamma = 0.9
    value = np.log(np.exp(logits).sum(1))
    following = np.array([value[1], value[2], 0.0, value[4], value[5], value[6]])
    reward = logits[np.arange(6), taken[:6]] - gamma * following
    wanted = sum(losses.phi_value(phi, x, alpha) for x in reward) - (value[:6] - gamma * following).sum()
    loss = IQLearn(alpha=alpha, gamma=gamma, coordinates="raw", first_order="sampled", phi=phi)(stats).loss
    assert float(loss) == pytest.approx(-wanted, rel=1e-9)


def test_sft_is_p_1_without_chi2():
    stats, _, _ = dense_problem(True)
    behaviour_cloning = IQLearn(alpha=INF, coordinates="raw", first_order="sampled")(stats).loss
    assert float(SFT()(stats).loss) == pytest.approx(float(behaviour_cloning), rel=1e-12)


@pytest.mark.parametrize("coordinates", ["raw", "max_set", "value_head"])
def test_gamma_0_does_not_look_at_the_next_state(coordinates):
    """The only row that is nothing but a next state is the bootstrap row: its numbers must not matter at γ = 0."""
    states = [random_state(np.random.default_rng(0), 4), random_state(np.random.default_rng(1), 5, acts=False)]
    stats = pack([losses.Episode(states, "truncated", bootstrap=True)])
    for gamma, expects_gradient in [(0.0, False), (0.5, True)]:
        leaves = with_leaves(stats)
        IQLearn(alpha=0.3, gamma=gamma, coordinates=coordinates)(leaves).loss.backward()
        found = gradients(leaves)
        on_next = found["q_M"][4:].abs().sum() + found["value_N"][1].abs()
        assert (float(on_next) > 1e-3) is expects_gradient


@pytest.mark.parametrize("coordinates", ["raw", "max_set", "value_head"])
@pytest.mark.parametrize("ends", ["terminal", "truncated"])
def test_expected_and_sampled_first_order_have_one_expectation(coordinates, ends):
    """Averaged over the actions of the set with weights proj_p π*, both give the same loss."""
    states = [random_state(np.random.default_rng(seed), size) for seed, size in enumerate((4, 3, 5))]
    mean = {"sampled": 0.0, "expected": 0.0}
    weights = [losses.projected(s.teacher_log_probs) for s in states]
    for actions in itertools.product(*(range(len(s.logits)) for s in states)):
        episode = losses.Episode([replace(s, taken=a) for s, a in zip(states, actions, strict=True)], ends)
        probability = math.prod(w[a] for w, a in zip(weights, actions, strict=True))
        for first_order in mean:
            objective = IQLearn(alpha=0.3, gamma=0.9, coordinates=coordinates, first_order=first_order)
            mean[first_order] += probability * float(objective(pack([episode])).loss)
    assert mean["sampled"] == pytest.approx(mean["expected"], rel=1e-10)


@pytest.mark.parametrize("first_order", ["sampled", "expected", "both"])
def test_raw_and_value_head_coincide_where_the_values_do(first_order):
    """With v = V_raw as a function of the logits, loss and gradient are those of the raw coordinates."""
    objective = {"alpha": 0.3, "gamma": 0.9, "first_order": first_order}
    raw, head = (with_leaves(pack(random_episodes(5))) for _ in range(2))
    raw_loss = IQLearn(**objective, coordinates="raw")(raw).loss
    head_loss = IQLearn(**objective, coordinates="value_head")(
        replace(head, value_N=returns.soft_value(head.q_M, head.offsets))
    ).loss
    raw_loss.backward()
    head_loss.backward()
    assert float(raw_loss.detach()) == pytest.approx(float(head_loss.detach()), rel=1e-12)
    for name in ("q_M", "q_taken_N"):
        torch.testing.assert_close(gradients(raw)[name], gradients(head)[name], rtol=1e-9, atol=1e-12)


def test_shifting_all_logits_of_a_state_changes_raw_only():
    stats = pack(random_episodes(6))
    shift_N = torch.linspace(-3, 3, len(stats.q_taken_N), dtype=torch.float64)
    shifted = replace(
        stats,
        q_M=stats.q_M + shift_N[returns.slot_rows(stats.offsets, len(stats.q_M))],
        q_taken_N=stats.q_taken_N + shift_N,
    )
    for coordinates in ("raw", "max_set", "value_head"):
        objective = IQLearn(alpha=0.3, coordinates=coordinates)
        same = math.isclose(float(objective(stats).loss), float(objective(shifted).loss), rel_tol=1e-9)
        assert same is (coordinates != "raw")


def tabular_optimum(coordinates: str, alpha: float) -> Tensor:
    """Student probabilities that minimise the loss over ten one-step episodes, nine of which took the first token."""
    taken = torch.tensor([0] * 9 + [1])
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    objective = IQLearn(alpha=alpha, gamma=0.0, coordinates=coordinates, first_order="sampled")
    optimiser = torch.optim.LBFGS(
        [logits, value], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        stats = ActionStats(
            offsets=torch.arange(11) * 2,
            q_M=logits.repeat(10),
            log_prob_teacher_M=torch.log(torch.tensor([0.9, 0.1], dtype=torch.float64)).repeat(10),
            q_taken_N=logits[taken],
            sequence_N=torch.arange(10),
            has_action_N=torch.ones(10, dtype=torch.bool),
            ends_N=torch.full((10,), int(Ends.TERMINAL)),
            value_N=value.expand(10),
        )
        loss = objective(stats).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.softmax(logits.detach(), 0)


@pytest.mark.parametrize("coordinates", ["raw", "value_head"])
def test_optimum_at_finite_alpha_is_not_the_teacher(coordinates):
    """Stationarity, π_Q(a) = π_E(a) (1 − Q(a)/2α): teacher (0.9, 0.1) at α = 0.1, γ = 0 gives (0.64, 0.36)."""
    student = tabular_optimum(coordinates, alpha=0.1)
    assert student.tolist() == pytest.approx([0.64, 0.36], abs=0.005)
    # Independently: with Q = (0.1 d, −0.9 d), which makes the two probabilities sum to 1, solve for the difference d.
    low, high = 0.0, 2.0
    for _ in range(200):
        middle = (low + high) / 2
        excess = math.exp(middle) * 0.1 * (1 + 4.5 * middle) - 0.9 * (1 - 0.5 * middle)
        low, high = (middle, high) if excess < 0 else (low, middle)
    assert float(student[0]) == pytest.approx(1 / (1 + math.exp(-low)), abs=1e-7)


@pytest.mark.parametrize("coordinates", ["raw", "value_head"])
def test_optimum_tends_to_the_teacher_as_alpha_grows(coordinates):
    distance = [abs(float(tabular_optimum(coordinates, alpha)[0]) - 0.9) for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-3


def test_floor_stops_the_gradient_and_counts_what_it_clips():
    stats = with_leaves(one_row([-12.0, 0.0, -11.0], [0.5, 0.2, 0.2], taken=0))
    result = IQLearn(coordinates="raw", first_order="sampled", q_floor=-10.0)(stats)
    result.loss.backward()
    assert float(gradients(stats)["q_taken_N"].abs()) == 0.0
    assert gradients(stats)["q_M"].nonzero().flatten().tolist() == [1]
    assert [int(x) for x in result.metrics["clipped_share"]] == [2, 3]


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ({"alpha": 0.0}, "alpha = 0.0 must be positive"),
        ({"alpha": -1.0}, "alpha = -1.0 must be positive"),
        ({"alpha": math.nan}, "alpha = nan must be positive"),
        ({"gamma": 1.01}, r"gamma = 1.01 is outside \[0, 1\]"),
        ({"gamma": -0.1}, r"gamma = -0.1 is outside \[0, 1\]"),
        ({"q_floor": -10.0}, "q_floor needs logits as Q"),
        ({"steps": 0}, "steps = 0 must be at least 1"),
        ({"student_value_weight": 1.1}, r"student_value_weight = 1.1 is outside \[0, 1\]"),
        ({"phi": "chi3"}, "phi = 'chi3' is unknown"),
        ({"max_slope": 0.5}, "max_slope = 0.5 must be above 1"),
        ({"tv_slope": -0.1}, r"tv_slope = -0.1 is outside \[0, 1\]"),
    ],
)
def test_fields_outside_their_domain_are_refused(field, match):
    with pytest.raises(DomainError, match=match):
        IQLearn(**field)


@pytest.mark.parametrize(
    "field", [{"first_order": "expected"}, {"coordinates": "max_set"}, {"coordinates": "raw", "q_floor": -10.0}]
)
def test_settings_that_need_lists_are_refused_at_p_1(field):
    stats, _, _ = dense_problem(True)
    with pytest.raises(DomainError, match="no listed action sets"):
        IQLearn(**{"first_order": "sampled", **field})(stats)


def test_the_table_finds_objectives_by_name():
    assert objective_class("iq_learn") is IQLearn
    assert objective_class("sft") is SFT
    with pytest.raises(ConfigError, match="Did you mean 'iq_learn'"):
        objective_class("iqlearn")
