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
