"""The off-support term: its reference, a value by hand, and the chain rule that it completes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import gradients, pack, random_episodes, random_state, with_leaves
from references import losses

from tdistill.errors import DomainError
from tdistill.head import OutputHead
from tdistill.kernels.dispatch import student_statistics
from tdistill.objectives import IQLearn, OffSupport
from tdistill.training.metrics import set_tail_kl


@pytest.mark.parametrize("kind", ["tail", "union", "negatives"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_term_is_the_binary_cross_entropy(kind, weight):
    for seed in range(5):
        episodes = random_episodes(seed)
        found = float(OffSupport(kind, weight, "teacher")(pack(episodes)).loss)
        assert found == pytest.approx(weight * losses.off_support(episodes), rel=1e-9, abs=1e-12)


def test_by_hand():
    # Teacher mass ¾ on the set; student: log 2 of log 4, so half of it: −¾ log ½ − ¼ log ½ = log 2.
    state = losses.State(np.array([0.0, 0.0]), np.log([0.5, 0.25]), taken=1, normaliser=math.log(4))
    result = OffSupport("tail", target="teacher")(pack([losses.Episode([state], "terminal")]))
    assert float(result.loss) == pytest.approx(math.log(2))
    assert [float(x) for x in result.metrics["mass_outside_tail"]] == pytest.approx([0.5, 1.0])


def test_a_teachers_mass_above_1_counts_as_1():
    """Stored log-probabilities are rounded, so those of a set that is the whole support can add up to more."""
    # The student's mass inside is 2 of 8: −log ¼.
    state = losses.State(np.zeros(2), np.log([0.6, 0.4006]), taken=1, normaliser=math.log(8))
    loss = OffSupport("tail", target="teacher")(pack([losses.Episode([state], "terminal")])).loss
    assert float(loss) == pytest.approx(math.log(4), rel=1e-12)


def test_least_where_the_student_has_the_teachers_mass_on_the_set():
    """The derivative in the normaliser vanishes at P = Z and has the sign of P − Z."""
    teacher = np.log([0.5, 0.25])
    for inside, sign in [(0.75, 0), (0.9, -1), (0.3, 1)]:
        # Logits (0, 0): the mass inside is 2 / exp(normaliser).
        state = losses.State(np.zeros(2), teacher, taken=0, normaliser=math.log(2 / inside))
        stats = with_leaves(pack([losses.Episode([state], "terminal")]))
        OffSupport("tail", target="teacher")(stats).loss.backward()
        slope = float(gradients(stats)["log_normaliser_N"])
        assert slope == pytest.approx(0.0, abs=1e-9) if sign == 0 else slope * sign > 0.1


@pytest.mark.parametrize("target", ["set", "teacher"])
def test_a_token_of_the_students_that_the_teacher_finds_unlikely_is_outside(target):
    """The student took b, which was added to {a}: nothing but {a} counts, and b is pushed down however likely it is."""
    logits, normaliser = np.log([0.1, 0.6]), 0.0
    own = losses.State(logits[:1], np.log([0.9]), taken=0, normaliser=normaliser)
    both = losses.State(logits, np.log([0.9, 1e-6]), taken=1, normaliser=normaliser)
    wanted, stats = (with_leaves(pack([losses.Episode([state], "terminal")])) for state in (own, both))
    control = OffSupport("tail", target=target)
    result = control(replace(stats, added_M=torch.tensor([False, True])))
    assert float(result.loss) == pytest.approx(float(control(wanted).loss), rel=1e-12)
    result.loss.backward()
    slopes = gradients(stats)
    # The whole slope of b's logit: here, and through the normaliser, in which b has its probability.
    assert float(slopes["q_M"][1] + 0.6 * slopes["log_normaliser_N"]) > 0.5
    assert float(control(stats).loss) < float(result.loss)


@pytest.mark.parametrize("seed", range(5))
def test_with_the_expected_first_order_it_is_set_and_tail_forward_kl(seed):
    """−Z Σ proj_p π* log proj_p π_Q + tail = KL(teacher‖student) over set and tail + the teacher's entropy there."""
    state = random_state(np.random.default_rng(seed), 5)
    stats = pack([losses.Episode([state], "terminal")])
    covered = math.fsum(np.exp(state.teacher_log_probs))
    first_order = float(IQLearn(alpha=math.inf, first_order="expected")(stats).loss)
    outcomes = np.append(np.exp(state.teacher_log_probs), 1 - covered)
    entropy = -float(np.sum(outcomes * np.log(outcomes)))
    found = covered * first_order + float(OffSupport("tail", target="teacher")(stats).loss)
    assert found == pytest.approx(losses.set_tail_kl(state) + entropy, rel=1e-10)
    assert found == pytest.approx(float(set_tail_kl(stats)) + entropy, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_with_target_set_it_completes_the_kl_from_the_projected_teacher(seed):
    """−Σ proj_p π* log proj_p π_Q − log P = −Σ proj_p π* log π_Q, the sums over the set."""
    state = random_state(np.random.default_rng(seed), 5)
    stats = pack([losses.Episode([state], "terminal")])
    projected = np.exp(state.teacher_log_probs) / math.fsum(np.exp(state.teacher_log_probs))
    first_order = float(IQLearn(alpha=math.inf, first_order="expected")(stats).loss)
    found = first_order + float(OffSupport("tail", target="set")(stats).loss)
    assert found == pytest.approx(-math.fsum(projected * (state.logits - state.normaliser)), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("excess", [0.0, 1e-7, -1e-7, 1e-3])
def test_finite_where_the_set_is_the_whole_support(dtype, excess):
    """P = 1 up to rounding on either side gives a finite term and gradient."""
    state = losses.State(np.array([1.0, 2.0]), np.log([0.6, 0.3]), taken=0, normaliser=np.logaddexp(1.0, 2.0) - excess)
    stats = with_leaves(pack([losses.Episode([state], "terminal")], dtype))
    loss = OffSupport("union", target="teacher")(stats).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(stats).values())


@pytest.mark.parametrize(
    ("outside", "pushes"), [(1e-3, True), (1e-5, True), (2e-6, True), (5e-7, False), (1e-9, False)]
)
def test_a_confident_student_is_pushed_outwards_until_its_outside_mass_is_rounding(outside, pushes):
    """Teacher 0.9 on the set. In the logit of an outside token the slope is Z − P, down to an outside mass of 1e-6."""
    inside = torch.tensor(math.log1p(-outside), dtype=torch.float64)
    outer = torch.tensor(math.log(outside), dtype=torch.float64, requires_grad=True)
    state = losses.State(np.array([float(inside)]), np.log([0.9]), taken=0)
    stats = replace(pack([losses.Episode([state], "terminal")]), log_normaliser_N=torch.logaddexp(inside, outer)[None])
    OffSupport("tail", target="teacher")(stats).loss.backward()
    assert float(outer.grad) == pytest.approx(0.9 - (1 - outside) if pushes else 0.0, rel=1e-6)


@pytest.mark.parametrize(("outside", "tolerance"), [(1e-2, 1e-3), (1e-3, 1e-2), (1e-4, 5e-2)])
def test_gradients_through_the_kernel_in_float32(outside, tolerance):
    """Against float64, for logits at the level of a language model's and a student too sure of the set."""
    generator = torch.Generator().manual_seed(0)
    num_rows, width, vocab, listed = 16, 64, 2000, 8
    hidden, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (num_rows, vocab))
    weight = 0.1 * weight
    logits = hidden @ weight.T
    gap = (logits[:, listed:].logsumexp(1) - logits[:, :listed].logsumexp(1)).mean()
    bias = torch.full((vocab,), 15.0, dtype=torch.float64)
    bias[:listed] += gap + math.log((1 - outside) / outside)
    template = pack([losses.Episode([random_state(np.random.default_rng(0), listed)] * num_rows, "terminal")])

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        leaf = hidden.detach().clone().to(dtype).requires_grad_()
        fields = student_statistics(
            leaf,
            OutputHead(weight.to(dtype), bias.to(dtype)),
            offsets=template.offsets,
            action_ids_M=torch.arange(listed).repeat(num_rows),
            taken_N=torch.zeros(num_rows, dtype=torch.long),
            support="vocabulary",
        )
        stats = replace(template, log_prob_teacher_M=template.log_prob_teacher_M.to(dtype), **fields)
        OffSupport("tail", target="teacher")(stats).loss.backward()
        return leaf.grad.double()

    exact, found = gradient(torch.float64), gradient(torch.float32)
    assert float((found - exact).norm()) < tolerance * float(exact.norm())


def test_support_names_the_normaliser():
    kinds = {"none": None, "union": "union", "negatives": "negatives", "tail": "vocabulary"}
    assert {kind: OffSupport(kind).support for kind in kinds} == kinds


def test_negative_weight_is_refused():
    with pytest.raises(DomainError, match=r"weight = -0.1 must be finite and not negative"):
        OffSupport(weight=-0.1)
