"""Logged means, and the divergence from the store alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import pack, random_episodes, random_state
from references import losses
from references.sets import log_sum_exp

from tdistill.training.metrics import MeanMeter, set_tail_kl
from tdistill.types import widest


def test_set_tail_kl_is_the_reference():
    for seed in range(5):
        episodes = random_episodes(seed)
        wanted = [losses.set_tail_kl(s) for e in episodes for s in e.states]
        np.testing.assert_allclose(set_tail_kl(pack(episodes)), wanted, rtol=1e-9, atol=1e-12)


def test_the_widest_float_of_a_device():
    assert widest(torch.device("mps")) == torch.float32
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64


def test_by_hand():
    # Teacher (½, ¼ | ¼), student (¼, ¼ | ½): ½ log 2 + 0 + ¼ log ½ = ¼ log 2.
    state = losses.State(np.zeros(2), np.log([0.5, 0.25]), taken=0, normaliser=math.log(4))
    assert float(set_tail_kl(pack([losses.Episode([state], "terminal")]))) == pytest.approx(math.log(2) / 4)


def full_problem(seed: int, vocab: int, size: int) -> tuple[losses.State, np.ndarray, np.ndarray]:
    """The largest ``size`` teacher probabilities as a set, and both full distributions."""
    rng = np.random.default_rng(seed)
    teacher, student = np.sort(rng.normal(size=vocab) * 2)[::-1], rng.normal(size=vocab) * 2
    log_teacher = teacher - log_sum_exp(teacher)
    state = losses.State(student[:size], log_teacher[:size], taken=0, normaliser=log_sum_exp(student))
    return state, np.exp(log_teacher), np.exp(student - log_sum_exp(student))


@pytest.mark.parametrize("seed", range(4))
def test_lower_bound_that_is_reached_with_the_whole_vocabulary(seed):
    previous = 0.0
    for size in (1, 3, 8, 20):
        state, teacher, student = full_problem(seed, 20, size)
        found = float(set_tail_kl(pack([losses.Episode([state], "terminal")])))
        full = losses.kl_teacher_student(teacher, student)
        assert previous - 1e-12 <= found <= full + 1e-12  # a finer partition never lowers it
        previous = found
    assert found == pytest.approx(full, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_where_the_student_is_the_teacher(dtype):
    states = [random_state(np.random.default_rng(seed), 6) for seed in range(20)]
    same = [replace(s, logits=s.teacher_log_probs + 3.0, normaliser=3.0) for s in states]
    found = set_tail_kl(pack([losses.Episode(same, "terminal")], dtype))
    np.testing.assert_allclose(found, 0.0, atol=1e-12 if dtype == torch.float64 else 3e-6)


def test_rows_without_a_set_and_sets_without_a_tail():
    full = losses.State(np.log([0.7, 0.3]), np.log([0.5, 0.5]), taken=0)
    stats = pack([losses.Episode([full, full], "terminal")])
    stats = replace(
        stats, offsets=torch.tensor([0, 0, 2]), q_M=stats.q_M[:2], log_prob_teacher_M=stats.log_prob_teacher_M[:2]
    )
    found = set_tail_kl(stats)
    wanted = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert found.tolist() == pytest.approx([0.0, wanted], abs=1e-9)


def test_student_without_any_mass_outside_gives_a_finite_value():
    state = losses.State(np.log([0.5, 0.5]), np.log([0.5, 0.4]), taken=0, normaliser=-1e-6)
    found = float(set_tail_kl(pack([losses.Episode([state], "terminal")], torch.float32)))
    assert math.isfinite(found)
    assert found > 1.0


class _TwoAlike:
    """Two processes that hold the same numbers."""

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return 2 * tensor


class _Alone:
    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def test_means_are_sums_over_counts_not_means_of_means():
    meter = MeanMeter()
    meter.add({"a": (torch.tensor(6.0), torch.tensor(1)), "b": (torch.tensor(1), torch.tensor(4))})
    meter.add({"a": (torch.tensor(3.0), torch.tensor(8))})
    meter.add({"never": (torch.tensor(0.0), torch.tensor(0))})
    means = meter.pop(_Alone())
    assert means["a"] == 1.0
    assert means["b"] == 0.25
    assert math.isnan(means["never"])
    assert meter.pop(_Alone()) == {}


def test_processes_are_averaged_by_their_counts():
    meter = MeanMeter()
    meter.add({"a": (torch.tensor(5.0), torch.tensor(10))})
    assert meter.pop(_TwoAlike()) == {"a": 0.5}
