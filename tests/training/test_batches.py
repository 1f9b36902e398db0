"""Micro-batches by response tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdistill.errors import ConfigError
from tdistill.training.batches import TokenBudgetSampler


def sampler(lengths: list[int], budget: int, seed: int | None = 0, num_replicas: int = 1, prompt: int = 20):
    response = np.array(lengths)
    return TokenBudgetSampler(response, response + prompt, budget, seed, num_replicas)


LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=60)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(LENGTHS, st.integers(1, 400), st.one_of(st.none(), st.integers(0, 5)), st.integers(1, 4))
def test_every_trajectory_once_and_no_batch_empty(lengths, budget, seed, num_replicas):
    if len(lengths) < num_replicas:
        with pytest.raises(ConfigError, match="cannot be shared out"):
            sampler(lengths, budget, seed, num_replicas)
        return
    batches = sampler(lengths, budget, seed, num_replicas)
    for epoch in range(3):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches)
        assert len(found) % num_replicas == 0
        assert all(found)
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 4))
def test_budget_holds_on_average_where_there_are_trajectories_enough(lengths, budget, num_replicas):
    if len(lengths) < num_replicas:
        return
    batches = sampler(lengths, budget, num_replicas=num_replicas)
    spare = len(batches) + num_replicas <= len(lengths)  # another round of batches would have been possible
    assert sum(lengths) / len(batches) <= budget or not spare
    # And no more batches than that takes.
    assert len(batches) == num_replicas or sum(lengths) / (len(batches) - num_replicas) > budget


def test_batches_are_near_the_budget_for_ordinary_lengths():
    lengths = np.random.default_rng(0).integers(1, 257, size=3000).tolist()
    tokens = np.array([sum(lengths[i] for i in batch) for batch in sampler(lengths, 1024)])
    assert tokens.mean() <= 1024
    assert tokens.mean() > 1000
    assert tokens.max() <= 1024 + 257


@pytest.mark.parametrize("lengths", [[5], [1000, 1], [1, 1000], [0, 0, 0], [1000] * 3, [1] * 50 + [5000]])
@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_few_or_long_trajectories(lengths, budget):
    found = list(sampler(lengths, budget))
    assert all(found)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))


def test_one_long_trajectory_does_not_swell_the_other_batches():
    lengths = [100] * 20 + [2000]
    tokens = sorted(sum(lengths[i] for i in batch) for batch in sampler(lengths, 200))
    assert tokens[-1] <= 2000 + 200
    assert tokens[-2] <= 400


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(1).integers(1, 100, size=200).tolist()

    def epoch_of(seed: int, epoch: int) -> list[list[int]]:
        batches = sampler(lengths, 256, seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert epoch_of(3, 5) == epoch_of(3, 5)
    assert epoch_of(3, 5) != epoch_of(3, 6)
    assert epoch_of(3, 5) != epoch_of(4, 5)
    again = sampler(lengths, 256, 3)
    again.set_epoch(5)
    assert list(again) == list(again) == epoch_of(3, 5)


def test_batches_hold_trajectories_of_like_length():
    lengths = np.random.default_rng(2).integers(1, 257, size=2000).tolist()
    spread = np.mean([np.std([lengths[i] for i in batch]) for batch in sampler(lengths, 2048, prompt=0)])
    assert spread < 0.25 * np.std(lengths)


def test_shuffled_lengths_do_not_come_in_order_of_size():
    lengths = np.arange(1, 401).tolist()
    means = [np.mean([lengths[i] for i in batch]) for batch in sampler(lengths, 500)]
    # Neither overall nor from one batch to the next, where the windows of sorted lengths would show.
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4
    assert 0.35 < np.mean(np.diff(means) > 0) < 0.65
    in_order = [np.mean([lengths[i] for i in batch]) for batch in sampler(lengths, 500, seed=None)]
    assert in_order == sorted(in_order)


GROUP_ROWS = 10


def windowed(num_rows: int, budget: int, window: int, seed: int | None = 0) -> TokenBudgetSampler:
    lengths = np.random.default_rng(4).integers(1, 100, size=num_rows)
    groups = np.arange(num_rows) // GROUP_ROWS
    return TokenBudgetSampler(lengths, lengths + 20, budget, seed, row_groups=groups, window_row_groups=window)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(LENGTHS, st.integers(1, 400), st.one_of(st.none(), st.integers(0, 5)), st.integers(1, 7), st.integers(1, 5))
def test_every_trajectory_once_whatever_the_windows(lengths, budget, seed, group_rows, window):
    response = np.array(lengths)
    groups = np.arange(len(lengths)) // group_rows
    found = list(TokenBudgetSampler(response, response, budget, seed, row_groups=groups, window_row_groups=window))
    assert all(found)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert len(found) == len(TokenBudgetSampler(response, response, budget, seed))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_store_of_one_window_is_shuffled_as_if_it_had_no_row_groups(seed):
    lengths = np.random.default_rng(4).integers(1, 100, size=200)
    plain = list(TokenBudgetSampler(lengths, lengths + 20, 256, seed))
    assert list(windowed(200, 256, window=20, seed=seed)) == plain
    assert list(windowed(200, 256, window=10, seed=seed)) != plain


def decoded(batches: TokenBudgetSampler, room: int) -> int:
    """Row groups that are decoded in one epoch, when the ``room`` used last are kept."""
    kept: list[int] = []
    count = 0
    for batch in batches:
        for group in (row // GROUP_ROWS for row in batch):
            count += group not in kept
            kept = [*(other for other in kept if other != group), group][-room:]
    return count


def test_row_groups_are_decoded_about_once_per_epoch():
    # 300 row groups, windows of 15, and room for twice as many, as the store keeps.
    assert decoded(windowed(3000, 256, window=15), room=30) <= 1.1 * 300
    # Shuffled as a whole, nearly every trajectory would need its row group decoded again.
    assert decoded(windowed(3000, 256, window=300), room=30) > 5 * 300


def test_windows_hold_other_row_groups_in_every_epoch():
    batches = windowed(3000, 256, window=15)
    firsts = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        rows = [row for batch in batches for row in batch][: 15 * GROUP_ROWS]
        firsts.append({row // GROUP_ROWS for row in rows})
        # Not neighbours: the window is drawn from the whole store.
        assert max(firsts[-1]) - min(firsts[-1]) > 150
    assert len(firsts[0] & firsts[1]) < 10


def test_evaluation_goes_through_the_store_in_order_of_its_windows():
    rows = [row for batch in windowed(3000, 256, window=15, seed=None) for row in batch]
    windows = [row // GROUP_ROWS // 15 for row in rows]
    assert windows == sorted(windows)
