"""Top-p sets: exact against a slow reference, nested, and sampled from in the right proportions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.sets import fewest_slots, losses_along, mass_of, possible_sizes, top_p_set

from tdistill import actions
from tdistill.actions import (
    budget_sizes,
    check_p,
    kappa,
    nested_sizes,
    prefix_mass,
    sample_from_sets,
    set_loss_nats,
    top_p_sets,
)
from tdistill.errors import DomainError, ProbabilityRangeError
from tdistill.types import ActionSets

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
# Cumulative masses of float64 log-probabilities; the reference adds with exact rounding.
SLACK_64 = 1e-12
# Log-probabilities in float32: about 2⁻²⁴ of log-probabilities up to 16, on a mass of at most 1.
SLACK_32 = 2e-6


def assert_sets(sets: ActionSets, logits: np.ndarray, p: float, cap: int | None, temperature: float, slack: float):
    for row in range(len(logits)):
        part = slice(sets.offsets[row], sets.offsets[row + 1])
        ids = sets.ids[part].tolist()
        assert len(ids) in possible_sizes(logits[row], p, cap, temperature, slack)
        wanted = top_p_set(logits[row], 1.0, len(ids), temperature)
        assert ids == wanted.ids
        np.testing.assert_allclose(sets.log_probs[part], wanted.log_probs, rtol=slack, atol=slack)
        np.testing.assert_allclose(sets.covered_mass[row], wanted.mass, rtol=1e-6 + slack)
        np.testing.assert_allclose(sets.log_sum_exp[row], wanted.log_sum_exp, rtol=slack, atol=slack)


def rows_of_logits(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    """Matrices of few distinct values (many exact ties), of random values, and with tokens of probability 0."""
    tied = st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 0.5, 1.0, 4.0])
    spread = st.floats(-8, 8, width=32)

    def matrix(size: int) -> st.SearchStrategy[np.ndarray]:
        row = st.one_of(
            st.lists(tied, min_size=size, max_size=size),
            st.lists(spread, min_size=size, max_size=size),
            st.sampled_from([-3.0, 0.0, 2.5]).map(lambda level: [level] * size),
        ).filter(lambda values: max(values) > -np.inf)
        return st.lists(row, min_size=1, max_size=4).map(np.array)

    return sizes.flatmap(matrix)


P = st.one_of(st.floats(0.01, 0.999), st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.8, 0.95, 1.0]))
CAP = st.one_of(st.none(), st.integers(1, 50))


@PROPERTY
@given(rows_of_logits(st.integers(1, 12)), P, CAP, st.sampled_from([1.0, 0.7, 2.0]))
def test_sets_of_a_vocabulary_not_larger_than_the_first_width(logits, p, cap, temperature):
    sets = top_p_sets(torch.from_numpy(logits), p, cap, temperature)
    assert_sets(sets, logits, p, cap, temperature, SLACK_64)


@PROPERTY
@given(rows_of_logits(st.integers(17, 40)), P, CAP)
def test_sets_after_two_rounds_of_widening(logits, p, cap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions, "_FIRST_WIDTH", 4)
        patch.setattr(actions, "_WIDENING", 4)
        sets = top_p_sets(torch.from_numpy(logits), p, cap)
    assert_sets(sets, logits, p, cap, 1.0, SLACK_64)


@PROPERTY
@given(rows_of_logits(st.integers(13, 60)), P, CAP)
def test_sets_found_through_maxima_of_blocks(logits, p, cap):
    # Blocks of 4: up to 15 of them and a rest of up to 3 columns, searched for 3 values and, after widening, for 9.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions, "_FIRST_WIDTH", 3)
        patch.setattr(actions, "_WIDENING", 3)
        patch.setattr(actions, "_BLOCK", 4)
        sets = top_p_sets(torch.from_numpy(logits), p, cap)
    assert_sets(sets, logits, p, cap, 1.0, SLACK_64)


@PROPERTY
@given(rows_of_logits(st.integers(20, 70)), st.integers(1, 12), st.integers(2, 5))
def test_the_largest_values_of_a_row_are_those_of_a_full_sort(logits, width, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions, "_BLOCK", block)
        values, columns = actions._largest(torch.from_numpy(logits), width)
    assert np.sort(values.numpy(), axis=1).tolist() == np.sort(logits, axis=1)[:, -width:].tolist()
    assert np.take_along_axis(logits, columns.numpy(), 1).tolist() == values.tolist()
    assert all(len(set(row)) == width for row in columns.tolist())


def test_sets_of_a_vocabulary_that_blocks_do_not_divide():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4, 16 * 80 + 7)) * 3
    logits[1, -3:] = 12.0  # three equal values among the columns that belong to no block
    logits[2, [5, 85, 165]] = 14.0  # three in one block
    sets = top_p_sets(torch.from_numpy(logits), 0.9)
    assert_sets(sets, logits, 0.9, None, 1.0, SLACK_64)
    assert sets.ids[sets.offsets[1] : sets.offsets[1] + 3].tolist() == [1284, 1285, 1286]
    assert sets.ids[sets.offsets[2] : sets.offsets[2] + 3].tolist() == [5, 85, 165]


@pytest.mark.parametrize("cap", [1, 16, 64])
def test_a_row_that_the_cap_cuts_is_searched_once(cap, monkeypatch):
    widths = []
    search = actions._largest
    monkeypatch.setattr(actions, "_largest", lambda values, width: widths.append(width) or search(values, width))
    logits = np.random.default_rng(6).normal(size=(3, 2000)) * 0.1  # flat: 0.8 of the mass needs far more tokens
    sets = top_p_sets(torch.from_numpy(logits), 0.8, cap)
    assert np.diff(sets.offsets).tolist() == [cap] * 3
    assert widths == [cap + 1]


@PROPERTY
@given(rows_of_logits(st.integers(2, 30)), P, CAP)
def test_sets_of_float32_logits(logits, p, cap):
    logits = logits.astype(np.float32)
    assert_sets(top_p_sets(torch.from_numpy(logits), p, cap), logits, p, cap, 1.0, SLACK_32)


@pytest.mark.parametrize("p", [0.3, 0.8, 0.99])
def test_sets_at_the_real_widths_with_rows_that_settle_in_different_rounds(p):
    rng = np.random.default_rng(3)
    logits = np.stack(
        [
            np.zeros(600),  # needs up to 594 of 600 tokens: both rounds of widening
            rng.normal(size=600) * 6,  # sharp: settles at once
            rng.normal(size=600) * 0.5,  # flat
            rng.integers(0, 3, size=600).astype(float),  # three levels, about 200 ties each
            np.where(np.arange(600) == 599, 20.0, 0.0),  # the last token takes it all
        ]
    )
    sets = top_p_sets(torch.from_numpy(logits), p)
    assert_sets(sets, logits, p, None, 1.0, SLACK_64)
    assert np.diff(sets.offsets)[1] < 64
    assert p < 0.9 or np.diff(sets.offsets)[0] > 512


def test_a_set_by_hand():
    # Probabilities 0.1, 0.4, 0.4, 0.1: at p = 0.5 the two 0.4 are needed, the lower id first; at 0.85 one of the
    # tied 0.1 joins, the lower id.
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.4, 0.1]], dtype=torch.float64)) + 7
    assert top_p_sets(logits, 0.39).ids.tolist() == [1]
    assert top_p_sets(logits, 0.5).ids.tolist() == [1, 2]
    sets = top_p_sets(logits, 0.85)
    assert sets.ids.tolist() == [1, 2, 0]
    assert sets.covered_mass[0] == pytest.approx(0.9)
    assert sets.log_sum_exp[0] == pytest.approx(7.0)
    assert top_p_sets(logits, 1.0).ids.tolist() == [1, 2, 0, 3]


def test_cap_records_the_mass_as_it_is():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64))
    sets = top_p_sets(logits, 0.95, max_actions=2)
    assert sets.ids.tolist() == [1, 2]
    assert sets.covered_mass[0] == pytest.approx(0.7)


def test_temperature_two_takes_square_roots_of_probabilities():
    # Probabilities 0.64 : 0.36 become 0.8 : 0.6 over 1.4.
    logits = torch.log(torch.tensor([[0.36, 0.64]], dtype=torch.float64))
    sets = top_p_sets(logits, 0.5, temperature=2.0)
    assert sets.ids.tolist() == [1]
    assert math.exp(sets.log_probs[0]) == pytest.approx(0.8 / 1.4)


def test_half_precision_logits_are_ranked_with_their_ties():
    logits = torch.tensor([[1.0, 1.001, 0.999, 3.0]]).bfloat16()  # the first three round to one number
    assert top_p_sets(logits, 0.95).ids.tolist() == [3, 0, 1, 2]


def test_no_states_give_no_sets():
    sets = top_p_sets(torch.zeros(0, 5), 0.8)
    assert len(sets) == 0
    assert len(sets.ids) == len(sets.covered_mass) == 0


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0001, float("nan")])
def test_p_outside_its_range_is_refused(p):
    with pytest.raises(ProbabilityRangeError, match="outside"):
        check_p(p)
    with pytest.raises(ProbabilityRangeError):
        top_p_sets(torch.zeros(1, 3), p)


@PROPERTY
@given(rows_of_logits(st.integers(2, 30)), st.floats(0.05, 0.999), st.floats(0.01, 1.0))
def test_nested_sizes_are_those_of_the_sets_computed_at_p(logits, p_max, fraction):
    p = p_max * fraction
    stored = top_p_sets(torch.from_numpy(logits), p_max)
    for log_probs, slack in [(stored.log_probs, SLACK_64), (stored.log_probs.astype(np.float32), SLACK_32)]:
        sizes = nested_sizes(replace(stored, log_probs=log_probs), p)
        for row, size in enumerate(sizes):
            assert size in possible_sizes(logits[row], p, None, 1.0, slack)
            assert 1 <= size <= stored.offsets[row + 1] - stored.offsets[row]


def test_nested_sizes_equal_a_second_pass_over_the_teacher():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 300)) * 2)
    stored = top_p_sets(logits, 0.95)
    for p in (0.1, 0.5, 0.8, 0.95):
        again = top_p_sets(logits, p)
        sizes = nested_sizes(stored, p)
        assert sizes.tolist() == np.diff(again.offsets).tolist()
        for row, size in enumerate(sizes):
            start, own = stored.offsets[row], again.offsets[row]
            assert stored.ids[start : start + size].tolist() == again.ids[own : own + size].tolist()
    float32 = replace(stored, log_probs=stored.log_probs.astype(np.float32))
    assert (np.abs(nested_sizes(float32, 0.8) - nested_sizes(stored, 0.8)) <= 1).all()


def test_nested_sizes_of_capped_and_empty_sets():
    # Masses 0.4, 0.3 | nothing | 0.5: the cap left the first set at 0.7, so p = 0.9 takes all that there is.
    sets = ActionSets(
        offsets=np.array([0, 2, 2, 3]),
        ids=np.array([4, 1, 9], dtype=np.int32),
        log_probs=np.log([0.4, 0.3, 0.5]),
        covered_mass=np.array([0.7, 0.0, 0.5], dtype=np.float32),
        log_sum_exp=np.zeros(3, dtype=np.float32),
    )
    assert nested_sizes(sets, 0.9).tolist() == [2, 0, 1]
    assert nested_sizes(sets, 0.39).tolist() == [1, 0, 1]


def test_samples_are_the_quantiles_of_the_projected_distribution():
    # Set {7, 2} with masses 0.6 and 0.2: projected 0.75 and 0.25.
    sets = ActionSets(
        offsets=np.array([0, 2]),
        ids=np.array([7, 2], dtype=np.int32),
        log_probs=np.log([0.6, 0.2]),
        covered_mass=np.array([0.8], dtype=np.float32),
        log_sum_exp=np.zeros(1, dtype=np.float32),
    )
    for uniform, token in [(0.0, 7), (0.7499, 7), (0.7501, 2), (1 - 2**-53, 2)]:
        assert sample_from_sets(sets, np.array([uniform])).tolist() == [token]


@PROPERTY
@given(rows_of_logits(st.integers(1, 30)), P, CAP, st.data())
def test_samples_of_many_states_are_those_of_each_state_alone(logits, p, cap, data):
    sets = top_p_sets(torch.from_numpy(logits.astype(np.float32)), p, cap)
    draws = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-53])
    uniforms = data.draw(st.lists(draws, min_size=len(sets), max_size=len(sets)))
    drawn = sample_from_sets(sets, np.array(uniforms))
    for row, uniform in enumerate(uniforms):
        part = slice(sets.offsets[row], sets.offsets[row + 1])
        masses = list(itertools.accumulate(np.exp(sets.log_probs[part].astype(np.float64)).tolist()))
        beyond = [token for token, mass in zip(sets.ids[part], masses, strict=True) if mass > uniform * masses[-1]]
        assert drawn[row] == (beyond[0] if beyond else sets.ids[part][-1])


def test_sample_frequencies_follow_the_projected_probabilities():
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(1, 40)) * 1.5)
    one = top_p_sets(logits, 0.8)
    num = 20_000
    many = top_p_sets(logits.expand(num, -1), 0.8)
    drawn = sample_from_sets(many, (np.arange(num) + 0.5) / num)  # evenly spread numbers: no chance involved
    wanted = np.exp(one.log_probs) / np.exp(one.log_probs).sum()
    counts = np.array([(drawn == token).sum() for token in one.ids])
    assert counts.sum() == num
    np.testing.assert_allclose(counts / num, wanted, atol=1.5 / num)


# ---- loss of value, and the smallest sets within a budget ----


def sets_of(*probs: list[float]) -> ActionSets:
    """Action sets with these probabilities; token ids stand for nothing."""
    sizes = [len(state) for state in probs]
    return ActionSets(
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        ids=np.array([token for size in sizes for token in range(size)], dtype=np.int32),
        log_probs=np.log(np.concatenate([*probs, []])),
        covered_mass=np.array([sum(state) for state in probs], dtype=np.float32),
        log_sum_exp=np.zeros(len(sizes), dtype=np.float32),
    )


def test_kappa_by_hand():
    # −γ/(1−γ) · log p: 1 · log 2; 3 · log 4; and the limits.
    assert kappa(0.5, 0.5) == pytest.approx(math.log(2))
    assert kappa(0.25, 0.75) == pytest.approx(3 * math.log(4))
    assert kappa(0.5, 0.0) == kappa(1.0, 0.9) == kappa(1.0, 1.0) == 0.0
    assert kappa(0.5, 1.0) == math.inf


def test_kappa_is_the_loss_on_sets_of_mass_exactly_p_for_ever():
    # Σ_{k≥1} γ^k (−log p): all terms of set_loss_nats but the first. 0.9^500 is below 1e-22.
    sets = sets_of(*[[0.7]] * 500)
    assert set_loss_nats(sets, np.ones(500, dtype=int), 0.9) + math.log(0.7) == pytest.approx(kappa(0.7, 0.9))


def test_mass_of_prefixes_by_hand():
    sets = sets_of([0.5, 0.25, 0.125], [0.8, 0.1])
    np.testing.assert_allclose(prefix_mass(sets, np.array([2, 1])), [0.75, 0.8])
    np.testing.assert_allclose(
        prefix_mass(sets, np.array([[0, 0], [1, 1], [3, 2]])), [[0.0, 0.0], [0.5, 0.8], [0.875, 0.9]]
    )
    # Rounding of stored log-probabilities can put a sum above 1.
    assert prefix_mass(sets_of([0.7, 0.3002]), np.array([2])).tolist() == [1.0]


def test_budget_by_hand():
    # γ = ½. −log Z of the first: log 2 = 0.693, −log ¾ = 0.288, −log ⅞ = 0.134; of the second, halved: 0.112, 0.053.
    # On one slot each the loss is 0.805; discounted gains are 0.405, 0.154 (first) and 0.059 (second).
    sets = sets_of([0.5, 0.25, 0.125], [0.8, 0.1])
    wanted = {0.9: [1, 1], 0.5: [2, 1], 0.3: [3, 1], 0.2: [3, 2]}
    losses = {0.9: 0.8047, 0.5: 0.3993, 0.3: 0.2451, 0.2: 0.1862}
    for budget, sizes in wanted.items():
        found = budget_sizes(sets, budget, 0.5)
        assert found.tolist() == sizes
        assert set_loss_nats(sets, found, 0.5) == pytest.approx(losses[budget], abs=5e-5)
    # 0.186 is what the stored sets lose: below it they are kept whole, and the loss says that the budget is missed.
    missed = budget_sizes(sets, 0.18, 0.5)
    assert missed.tolist() == [3, 2]
    assert set_loss_nats(sets, missed, 0.5) > 0.18


def test_discount_decides_which_state_gets_the_slots():
    # Two equal states: 0.7 + 0.2 each. At γ = 1 the first of the equal gains is taken, at γ < 1 it is the larger one;
    # a loss of 0.47 needs one of the two further slots at γ = 1 (0.713 → 0.462).
    sets = sets_of([0.7, 0.2], [0.7, 0.2])
    assert budget_sizes(sets, 0.47, 1.0).tolist() == [2, 1]
    assert budget_sizes(sets, 0.45, 0.9).tolist() == [2, 1]
    assert budget_sizes(sets, 0.3, 1.0).tolist() == [2, 2]
    # At γ = 0 only the first state counts.
    assert budget_sizes(sets, 0.2, 0.0).tolist() == [2, 1]


falling = st.lists(st.integers(1, 60), min_size=1, max_size=4).map(lambda xs: sorted(xs, reverse=True))


@PROPERTY
@given(st.lists(falling, min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.floats(0.02, 4.0))
def test_budget_takes_the_fewest_slots_of_all_combinations(weights, gamma, budget):
    # Many ties; the mass outside the sets is that of 5 further units.
    probs = [[w / (sum(state) + 5) for w in state] for state in weights]
    sets = sets_of(*probs)
    logs = [np.log(state).tolist() for state in probs]
    sizes = budget_sizes(sets, budget, gamma)
    loss = losses_along([mass_of(state[:k]) for state, k in zip(logs, sizes, strict=True)], gamma)[0]
    assert set_loss_nats(sets, sizes, gamma) == pytest.approx(loss, abs=1e-12)
    assert all(1 <= k <= len(state) for k, state in zip(sizes, logs, strict=True))
    strict, loose = (fewest_slots(logs, budget + slack, gamma) for slack in (-1e-12, 1e-12))
    if loose is None:
        assert sizes.tolist() == [len(state) for state in logs] and loss > budget
    elif strict is not None:
        assert loose <= sizes.sum() <= strict and loss <= budget + 1e-12


def test_budget_on_sets_of_a_teacher():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 300)) * 2)
    sets = top_p_sets(logits, 0.95)
    stored = np.diff(sets.offsets)
    least = set_loss_nats(sets, stored, 0.99)
    before = stored
    for budget in (1.001 * least, 2 * least, 4 * least):
        sizes = budget_sizes(sets, budget, 0.99)
        assert (sizes >= 1).all() and (sizes <= before).all() and sizes.sum() < before.sum()
        assert set_loss_nats(sets, sizes, 0.99) <= budget
        # One slot less anywhere, and the budget is missed.
        for row in np.flatnonzero(sizes > 1):
            fewer = sizes - (np.arange(len(sizes)) == row)
            assert set_loss_nats(sets, fewer, 0.99) > budget
        before = sizes


def test_expected_loss_along_trajectories_is_the_exact_loss_of_value():
    # A tree of depth 2 with π* and any r = Q* − γ V*': backward recursions of V* and of the value of proj_p π*, against
    # the mean of set_loss_nats over the trajectories of proj_p π*.
    gamma = 0.9
    root, leaves = [0.5, 0.3, 0.2], [[0.6, 0.4], [0.9, 0.1], [0.55, 0.45]]
    value_root, value_leaves = 2.0, [1.0, -3.0, 0.5]
    sizes_root, sizes_leaves = 2, [1, 2, 1]

    def kept(probs: list[float], size: int) -> list[float]:
        return [x / sum(probs[:size]) for x in probs[:size]]

    def soft(probs: list[float], q: list[float]) -> float:
        return sum(x * (y - math.log(x)) for x, y in zip(probs, q, strict=True))

    # Q*(s,a) = V*(s) + log π*(a|s); after a leaf's action the episode ends, so r = Q* there.
    projected = [
        soft(kept(probs, k), [value + math.log(x) for x in probs[:k]])
        for probs, value, k in zip(leaves, value_leaves, sizes_leaves, strict=True)
    ]
    reward = [value_root + math.log(x) - gamma * v for x, v in zip(root, value_leaves, strict=True)]
    q_root = [r + gamma * v for r, v in zip(reward, projected, strict=True)][:sizes_root]
    exact = value_root - soft(kept(root, sizes_root), q_root)
    expected = sum(
        weight * set_loss_nats(sets_of(root, leaves[a]), np.array([sizes_root, sizes_leaves[a]]), gamma)
        for a, weight in enumerate(kept(root, sizes_root))
    )
    assert expected == pytest.approx(exact, abs=1e-12)


def test_budget_where_nothing_is_listed():
    # p_max = 1: each set is the whole vocabulary, of mass 1.
    nothing = sets_of([], [], [])
    assert set_loss_nats(nothing, np.zeros(3, dtype=int), 0.9) == 0.0
    assert budget_sizes(nothing, 1.0, 0.9).tolist() == [0, 0, 0]
    assert budget_sizes(sets_of(), 1.0, 0.9).tolist() == []
    assert budget_sizes(sets_of([0.5, 0.4], [], [0.9]), 0.3, 1.0).tolist() == [2, 0, 1]


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_is_no_positive_number_is_refused(budget):
    with pytest.raises(DomainError, match="budget_nats"):
        budget_sizes(sets_of([0.5]), budget, 0.9)


@pytest.mark.parametrize("gamma", [-0.01, 1.01, math.nan])
def test_a_discount_outside_its_range_is_refused(gamma):
    sets = sets_of([0.5])
    for call in (
        lambda: kappa(0.5, gamma),
        lambda: set_loss_nats(sets, np.array([1]), gamma),
        lambda: budget_sizes(sets, 1.0, gamma),
    ):
        with pytest.raises(DomainError, match="gamma"):
            call()
    with pytest.raises(ProbabilityRangeError):
        kappa(0.0, 0.5)
