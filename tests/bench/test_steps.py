"""Each timed step is the computation that its name says, on the tiny teacher."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from builders import tiny_llama

from tdistill.bench import accuracy, memory, peers, scaling, step, steps
from tdistill.bench.timing import interleaved_medians
from tdistill.bench.workload import capped, make_workload
from tdistill.reports.performance import performance_table

TOKENS = 9


@pytest.fixture(scope="module")
def workload(tiny_teacher_folder, tmp_path_factory):
    return make_workload(
        {"address": str(tiny_teacher_folder), "dtype": "float32"}, tmp_path_factory.mktemp("w"), TOKENS
    )


def test_every_position_of_the_workload_acts_and_its_sets_are_the_teachers(workload):
    for trajectory in workload.trajectories:
        assert (len(trajectory.prompt_ids), len(trajectory.response_ids)) == (1, TOKENS - 1)
        assert all(len(trajectory.sets.ids[a:b]) for a, b in zip(*_bounds(trajectory.sets), strict=True))
    uncapped, two = (workload.batch(3, cap)[0].sets for cap in (None, 2))
    assert np.diff(two.offsets).tolist() == np.minimum(np.diff(uncapped.offsets), 2).tolist()
    assert np.diff(uncapped.offsets).max() > 2


def _bounds(sets):
    return sets.offsets[:-1], sets.offsets[1:]


def test_a_cap_keeps_the_first_actions_and_their_mass(workload):
    sets = workload.trajectories[0].sets
    short = capped(sets, 1)
    assert short.ids.tolist() == sets.ids[sets.offsets[:-1]].tolist()
    np.testing.assert_allclose(short.covered_mass, np.exp(sets.log_probs[sets.offsets[:-1]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [
        *((name, size) for name in ("body", *steps.BD, "sft") for size in (None, 64)),
        *((name, None) for name in ("kd_live", "authors")),  # the teacher has its own vocabulary
    ],
)
def test_a_step_leaves_gradients_and_the_optimiser_moves_weights(workload, name, vocab_size, monkeypatch):
    students = []
    student = type(workload).student
    monkeypatch.setattr(type(workload), "student", lambda self, *a: students.append(student(self, *a)) or students[-1])
    run = steps.build_step(name, workload, vocab_size=vocab_size, num_sequences=2, optimiser=True)
    before = [p.detach().clone() for p in students[0].parameters()]
    run()
    moved = [not torch.equal(p, q) for p, q in zip(students[0].parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert students[0].config.num_hidden_layers == steps.STUDENT_LAYERS


def test_forward_kl_is_that_of_the_distributions():
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    with torch.no_grad():
        p, q = (model(**inputs).logits[0].double().softmax(-1).numpy() for model in (teacher, student))
    wanted = np.sum(p * np.log(p / q)) / 6
    assert peers.forward_kl(student, teacher, inputs).item() == pytest.approx(wanted, rel=1e-5)
    assert peers.forward_kl(student, student, inputs).item() == pytest.approx(0, abs=1e-6)


def test_the_released_formulation_by_its_description():
    """Written out with loops over positions and tokens."""
    student, teacher = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = {"input_ids": torch.arange(3, 7)[None], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        pi, q = (model(**inputs).logits[0].double().numpy() for model in (teacher, student))
    pi = np.exp(pi - np.logaddexp.reduce(pi, axis=-1, keepdims=True))
    q = np.maximum(q - q.max(-1, keepdims=True), -10.0)
    values, masks = [], []
    for t in range(4):
        inside, mass = np.zeros(48), 0.0
        for token in np.argsort(-pi[t], kind="stable"):
            if mass >= 0.8:
                break
            inside[token], mass = 1.0, mass + pi[t, token]
        policy = np.exp(q[t]) / np.exp(q[t]).sum() * inside + 1e-8
        policy /= policy.sum()
        values.append(sum(policy[a] * (q[t, a] - math.log(policy[a])) for a in range(48)))
        masks.append(inside)
    total = 0.0
    for t in range(3):
        rewards = [masks[t][a] * q[t, a] - 0.99 * values[t + 1] for a in range(48)]
        total += values[t] - 0.99 * values[t + 1] - np.mean([r - r * r / 0.4 for r in rewards])
    found = peers.released_formulation(student, teacher, inputs, 0.8).item()
    assert found == pytest.approx(total / 3, rel=1e-4)


def test_medians_are_of_the_rounds_and_take_turns(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("tdistill.bench.timing.time.perf_counter", lambda: next(clock))
    calls = []
    medians = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert medians == {"a": 1, "b": 1}


def test_the_measurements_have_a_table_each(workload, monkeypatch):
    monkeypatch.setattr(step, "GEMMA_VOCABULARY", 96)
    monkeypatch.setattr(step, "SMALL_VOCABULARY", 48)
    monkeypatch.setattr(step, "LARGE_VOCABULARY", 64)
    monkeypatch.setattr(step, "PEERS", ("sft", "kd_live", "authors"))
    found = step.measure(workload, rounds=1)
    assert set(found) >= {"body_s", "bd_s", "bd_uncapped_s", "bd_default_s", "sft_s", "kd_live_s", "authors_s"}
    assert json.loads(json.dumps(found)) == found
    assert f"| `bd_s` / `body_s` | {found['bd_s'] / found['body_s']:.3f} |" in performance_table("step", found)
    monkeypatch.setattr(scaling, "NUM_SEQUENCES", (1, 2, 3))
    grown = scaling.measure(workload, rounds=1)
    assert grown["tokens"] == [TOKENS, 2 * TOKENS, 3 * TOKENS]
    assert "R²" in performance_table("scaling", grown)


def test_errors_are_against_float64(workload):
    found = accuracy.measure(workload, rounds=2)
    for name in ("bare", "default"):
        for errors in found[name].values():
            assert 0 < errors["candidates"] < 1e-3 and 0 < errors["dense"] < 1e-3
    assert found["default"]["matrix"]["ratio"] < 2
    assert "| bare, loss: ratio |" in performance_table("accuracy", found)


def test_a_straight_line():
    assert scaling.line([1, 2, 3], [1.5, 2.5, 3.5]) == pytest.approx(
        {"s_per_token": 1, "intercept_s": 0.5, "r_squared": 1}
    )
    assert scaling.line([1, 2, 3], [1.0, 5.0, 1.0])["r_squared"] == pytest.approx(0)


@pytest.mark.slow
def test_peak_memory_of_a_step_on_a_gpu_is_the_gpus(workload, monkeypatch):
    monkeypatch.setattr(memory, "build_step", lambda *_, **__: lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert memory._run("sft", workload, 64) == 123


def test_peak_memory_is_of_the_process_of_its_own(workload):
    ballast = torch.ones(2**28)  # 1 GiB here must not count there
    found = memory.measure(workload, rounds=1, vocab_sizes=[64])
    assert found["vocabulary"]["64"]["body_bytes"] < ballast.numel() * 4
    assert "MB" in performance_table("memory", found)
