"""What every objective must satisfy; a new row of the table is picked up by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from builders import (
    FLOAT_FIELDS,
    gradients,
    pack,
    random_episodes,
    random_trajectory,
    statistics,
    tiny_llama,
    with_leaves,
)
from references.losses import Episode
from torch import Tensor
from transformers import PreTrainedModel

from tdistill.objectives import OBJECTIVES, OffSupport
from tdistill.regularisers import PhiName
from tdistill.training.collate import PackedCollator
from tdistill.training.student import LiveTeacher, add_value_head, attach_statistics
from tdistill.types import ActionStats, LossOutput, Trajectory

SETTINGS: dict[str, list[dict]] = {
    "iq_learn": [
        {},
        {"alpha": 0.1, "coordinates": "raw", "first_order": "sampled"},
        {"alpha": 0.5, "coordinates": "raw", "first_order": "expected", "gamma": 0.5, "q_floor": -0.3517},
        {"alpha": 0.5, "coordinates": "max_set", "first_order": "sampled"},
        {"alpha": 0.5, "coordinates": "max_set", "first_order": "expected", "gamma": 1.0, "q_floor": -0.8513},
        {"alpha": 0.1, "coordinates": "value_head", "first_order": "sampled", "gamma": 0.9},
        {"alpha": math.inf, "coordinates": "raw", "first_order": "expected"},
        {"alpha": math.inf, "first_order": "both"},
        {"gamma": 0.0},
        *({"alpha": 0.7, "phi": phi, "steps": 2} for phi in get_args(PhiName)),
        {"alpha": 0.5, "coordinates": "raw", "first_order": "sampled", "steps": 3, "gamma": 0.9},
        {"alpha": 0.5, "student_value_weight": 0.5},
        {"alpha": 0.5, "student_value_weight": 0.3, "coordinates": "raw", "phi": "hellinger", "max_slope": 2.0},
    ],
    "path_consistency": [
        {},
        {"states": "both", "student_weight": 0.5, "steps": 3},
        {"weight": 0.7, "first_order": "none", "gamma": 0.0, "states": "both"},
        {"weight": 0.7, "first_order": "sampled", "value": "none"},
    ],
    "sqil": [{}, {"coordinates": "raw", "target": "slow", "student_weight": 0.5}, {"coordinates": "max_set"}],
    "ls_iq": [
        {},
        {"coordinates": "raw", "target": "slow", "r_max": 0.02, "gamma": 0.9},
        {"absorbing": "zero", "student_weight": 0.5},
        {"teacher_target": "fixed"},
    ],
    "teacher_q": [
        {},
        {"target": "residual", "coordinates": "raw", "teacher_level": "logits", "steps": 3},
        {"lam": 0.6, "gamma": 0.9},
        {"lam": 1.0, "target": "residual", "coordinates": "max_set"},
    ],
    "forward_kl": [{}, {"source": "teacher"}],
    "reverse_kl": [{}, {"source": "teacher"}, {"source": "set"}],
    "gkd": [{}, {"source": "set"}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1, "source": "teacher"}],
    "skew_kl": [{}, {"direction": "reverse", "skew": 0.3}, {"skew": 0.0}],
    "distillm2": [{}, {"source": "set"}, {"skew": 0.0, "student_weight": 0.3}, {"source": "teacher"}],
    "alpha_beta": [{}, {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 0.5}, {"alpha": -0.3, "beta": 1.2}],
    "total_variation": [{}, {"source": "teacher"}],
    # Whitening sees the whole micro-batch; it has tests of its own.
    "minillm": [
        {"whiten": False},
        {"whiten": False, "source": "teacher", "gamma": 1.0, "clip": math.inf},
        {"whiten": False, "single_step": False, "length_normalised": False},
    ],
    "bellman_distill_authors": [{}, {"mask_end": False, "q_floor": -0.9137, "epsilon": 0.01}],
}
Loss = Callable[[ActionStats], LossOutput]
LOSSES: dict[str, Loss] = {
    f"{name}-{index}": cls(**fields)
    for name, cls in OBJECTIVES.items()
    for index, fields in enumerate(SETTINGS.get(name, [{}]))
} | {
    f"off_support-{kind}": OffSupport(kind, weight=0.7, target="teacher")
    for kind in get_args(get_type_hints(OffSupport)["kind"])
    if kind != "none"
}

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def value_and_gradients(loss: Loss, stats: ActionStats) -> tuple[float, dict[str, Tensor]]:
    leaves = with_leaves(stats)
    total = loss(leaves).loss
    total.backward()
    return total.item(), gradients(leaves)


def assert_same_metrics(found: LossOutput, wanted: LossOutput, factor: float = 1.0) -> None:
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, (total, count) in wanted.metrics.items():
        assert float(found.metrics[name][0]) == pytest.approx(factor * float(total), rel=1e-9, abs=1e-9), name
        assert float(found.metrics[name][1]) == factor * float(count), name


# A policy gradient holds rewards and importance weights fixed; tests/objectives/test_minillm.py has its own.
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("minillm")])
def test_gradient_is_that_of_the_returned_scalar(name):
    loss = LOSSES[name]
    stats = pack(random_episodes(11, with_student=True))
    inputs = tuple(getattr(stats, name).clone().requires_grad_() for name in FLOAT_FIELDS)

    def scalar(*values: Tensor) -> Tensor:
        return loss(replace(stats, **dict(zip(FLOAT_FIELDS, values, strict=True)))).loss

    assert scalar(*inputs).shape == ()
    assert torch.autograd.gradcheck(scalar, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


@every_loss
def test_some_gradient_arrives(loss):
    _, found = value_and_gradients(loss, pack(random_episodes(11, with_student=True)))
    assert sum(float(g.abs().sum()) for g in found.values()) > 0.1


@every_loss
def test_metrics_are_sums_and_counts_without_gradient(loss):
    stats = with_leaves(pack(random_episodes(12, with_student=True)))
    result = loss(stats)
    assert result.metrics
    for name, (total, count) in result.metrics.items():
        assert total.shape == count.shape == (), name
        assert not total.requires_grad, name
        assert not count.requires_grad, name
        assert float(count) > 0, name


@every_loss
def test_order_of_sequences_does_not_matter(loss):
    episodes = random_episodes(13, with_student=True)
    order = np.random.default_rng(0).permutation(len(episodes))
    shuffled = [episodes[i] for i in order]
    value, found = value_and_gradients(loss, pack(episodes))
    value_2, found_2 = value_and_gradients(loss, pack(shuffled))
    assert value_2 == pytest.approx(value, rel=1e-12)

    def per_episode(stats: list[Episode], grads: dict[str, Tensor]) -> list[list[Tensor]]:
        slots = [sum(len(s.logits) for s in e.states) for e in stats]
        rows = [len(e.states) for e in stats]
        parts = [grads[name].split(slots if name == "q_M" else rows) for name in FLOAT_FIELDS]
        return [list(p) for p in zip(*parts, strict=True)]

    first, second = per_episode(episodes, found), per_episode(shuffled, found_2)
    for place, source in enumerate(order):
        for ours, theirs in zip(second[place], first[source], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@every_loss
def test_order_of_slots_inside_a_set_does_not_matter(loss):
    stats = pack(random_episodes(14, with_student=True))
    rng = np.random.default_rng(0)
    offsets = stats.offsets.tolist()
    order = torch.tensor(np.concatenate([a + rng.permutation(b - a) for a, b in itertools.pairwise(offsets)]))
    permuted = replace(
        stats,
        q_M=stats.q_M[order],
        log_prob_teacher_M=stats.log_prob_teacher_M[order],
        target=replace(stats.target, q_M=stats.target.q_M[order], log_prob_teacher_M=stats.log_prob_teacher_M[order]),
    )
    value, found = value_and_gradients(loss, stats)
    value_2, found_2 = value_and_gradients(loss, permuted)
    assert value_2 == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found_2["q_M"], found["q_M"][order], rtol=1e-10, atol=1e-12)
    for name in FLOAT_FIELDS[1:]:
        torch.testing.assert_close(found_2[name], found[name], rtol=1e-10, atol=1e-12)


@every_loss
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_batch_without_actions_gives_zero(loss, scale):
    stats = pack(random_episodes(15, with_student=True))
    stats = replace(stats, has_action_N=torch.zeros_like(stats.has_action_N), q_M=stats.q_M * scale)
    value, found = value_and_gradients(loss, stats)
    assert value == 0.0
    assert all(float(g.abs().sum()) == 0.0 for g in found.values())


@every_loss
def test_what_is_said_where_no_action_counts_does_not_matter(loss):
    stats = pack(random_episodes(16, with_student=True))
    other = replace(stats, q_taken_N=torch.where(stats.has_action_N, stats.q_taken_N, -4.0e3))
    assert value_and_gradients(loss, other)[0] == value_and_gradients(loss, stats)[0]


@every_loss
def test_twice_the_batch_is_twice_the_sum(loss):
    once, twice = (
        loss(pack(random_episodes(17, with_student=True))),
        loss(pack(random_episodes(17, with_student=True) * 2)),
    )
    assert float(twice.loss) == pytest.approx(2 * float(once.loss), rel=1e-12)
    assert_same_metrics(twice, once, factor=2)


@every_loss
def test_micro_batches_add_up(loss):
    """With the support of the normaliser held fixed."""
    episodes = random_episodes(18, copies=2, with_student=True)
    parts = [episodes[:1], episodes[1:5], episodes[5:]]
    value, found = value_and_gradients(loss, pack(episodes))
    pieces = [value_and_gradients(loss, pack(part)) for part in parts]
    assert sum(v for v, _ in pieces) == pytest.approx(value, rel=1e-12)
    for name in FLOAT_FIELDS:
        torch.testing.assert_close(torch.cat([g[name] for _, g in pieces]), found[name], rtol=1e-10, atol=1e-12)


@every_loss
def test_float32_stays_close_to_float64(loss):
    exact, found = value_and_gradients(loss, pack(random_episodes(19, with_student=True)))
    value, found_32 = value_and_gradients(loss, pack(random_episodes(19, with_student=True), torch.float32))
    assert value == pytest.approx(exact, rel=1e-5)
    for name in FLOAT_FIELDS:
        assert found_32[name].dtype == torch.float32
        torch.testing.assert_close(found_32[name].double(), found[name], rtol=1e-4, atol=1e-5)


# ---- through the collator and a model ----

VOCAB = 48
# It draws tokens, and other ones where rows stand elsewhere; tests/objectives/test_divergences.py has its own.
fixed_loss = pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("sampled_kl")])


def trajectories() -> list[Trajectory]:
    return [
        random_trajectory(0, VOCAB, 3, 5),
        random_trajectory(1, VOCAB, 6, 9, ends="truncated"),
        random_trajectory(2, VOCAB, 1, 1),
        random_trajectory(3, VOCAB, 4, 12, source="given"),
        replace(random_trajectory(4, VOCAB, 2, 6), source="student", log_probs_sampled=np.linspace(-3, -1, 6)),
    ]


def student(loss: Loss) -> PreTrainedModel:
    model = tiny_llama(VOCAB).double()
    support, teacher = getattr(loss, "support", None), None
    if getattr(loss, "needs_teacher", False):
        support, teacher = None, LiveTeacher(tiny_llama(VOCAB, seed=1).double(), loss.terms)
    add_value_head(model)
    model.value_head.double()
    torch.nn.init.normal_(model.value_head.weight)
    attach_statistics(model, support=support, q_max=True, teacher=teacher)
    model.live_teacher = teacher
    return model.train()


def through_model(
    model: PreTrainedModel, loss: Loss, batches: list[list[Trajectory]], collator: PackedCollator
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all weights, summed over micro-batches."""
    model.zero_grad()
    torch.manual_seed(0)  # the same negatives each time
    total = 0.0
    for batch in batches:
        inputs = collator(batch)
        if model.live_teacher is not None:
            inputs["teacher_hidden_NE"] = model.live_teacher.hidden(inputs)
        result = loss(statistics(model, inputs)).loss
        result.backward()
        total += result.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_run(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        # Rotary embeddings are computed in float32 inside the model, which bounds the agreement.
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name
        )


@fixed_loss
@pytest.mark.parametrize("p", [None, 0.6])
def test_padding_and_packing_through_a_model(name, p):
    """Pad token, width of the padding and order of the trajectories leave loss and gradients as they are."""
    loss = LOSSES[name]
    model = student(loss)
    rows = trajectories()
    wanted = through_model(model, loss, [rows], PackedCollator(0, p))
    assert abs(wanted[0]) > 1e-3
    assert_same_run(through_model(model, loss, [rows], PackedCollator(7, p)), wanted)
    assert_same_run(through_model(model, loss, [rows[::-1]], PackedCollator(0, p)), wanted)


@fixed_loss
@pytest.mark.parametrize("p", [None, 0.6])
def test_micro_batches_add_up_through_a_model(name, p):
    """Except where the support depends on the batch's own sets; see test_micro_batches_add_up for those."""
    loss = LOSSES[name]
    if getattr(loss, "support", None) in ("union", "negatives"):
        return
    model = student(loss)
    rows = trajectories()
    wanted = through_model(model, loss, [rows], PackedCollator(0, p))
    assert_same_run(through_model(model, loss, [[row] for row in rows], PackedCollator(0, p)), wanted)
