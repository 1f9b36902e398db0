"""MiniLLM: the printed surrogate, its gradient with weights and rewards held fixed, and known errors of other code."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from builders import gradients, pack, random_episodes, with_leaves
from references import divergences as printed
from references.losses import Episode

from tdistill.errors import DomainError
from tdistill.objectives.minillm import MiniLLM
from tdistill.objectives.reverse_kl import ReverseKL

SETTINGS = [
    {},
    {"whiten": False},
    {"whiten": False, "gamma": 1.0, "length_normalised": False},
    {"whiten": False, "single_step": False, "clip": 1e9},
    {"single_step": False, "clip": 0.05},
]


@pytest.mark.parametrize("fields", SETTINGS)
def test_it_is_the_printed_surrogate(fields):
    episodes = random_episodes(31, with_student=True)
    defaults = {"gamma": 0.95, "length_normalised": True, "single_step": True, "clip": 0.2, "whiten": True}
    wanted = printed.minillm(episodes, **{**defaults, **fields})
    assert float(MiniLLM(**fields)(pack(episodes)).loss) == pytest.approx(wanted, rel=1e-9)


def test_gradient_of_the_long_term_is_the_policy_gradient():
    """Σ w A ∇ log π_Q(a|s), w and A numbers; with a ratio inside the clip."""
    episodes = random_episodes(32, with_student=True)
    stats = with_leaves(pack(episodes))
    loss = MiniLLM(whiten=False, single_step=False, clip=math.inf)
    loss(stats).loss.backward()
    rewards = stats.log_prob_taken_teacher_N - (stats.q_taken_N - stats.log_normaliser_N)
    ahead = loss.returns_ahead(rewards.detach(), stats)
    own = stats.has_action_N & stats.from_student_N
    weight = (stats.q_taken_N - stats.log_normaliser_N - stats.log_prob_sampled_N).detach().exp()
    wanted = torch.where(own, -weight * ahead, 0.0)
    torch.testing.assert_close(gradients(stats)["q_taken_N"], wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(stats)["log_normaliser_N"], -wanted, rtol=1e-12, atol=1e-14)


def test_gradient_of_the_single_step_is_that_of_the_reverse_kl_weighted():
    """With answers of one token nothing follows, so the long term is 0."""
    episodes = [Episode(e.states[:1], "terminal", from_student=True) for e in random_episodes(33, copies=2)]
    episodes = [e for e in episodes if e.states[0].taken is not None]
    sampled = [replace(s, log_prob_sampled=s.logits[s.taken] - s.normaliser) for e in episodes for s in e.states]
    stats = pack([Episode([s], "terminal", from_student=True) for s in sampled])
    ours, theirs = with_leaves(stats), with_leaves(stats)
    MiniLLM(whiten=False)(ours).loss.backward()
    ReverseKL()(theirs).loss.backward()
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_discounts_multiply_once_per_step():
    """Rewards 1, 10, 100 at γ = ½: R is 10 + 50, 100 and 0. Other code has γ^t on top, or γ² at the second step."""
    (episode,) = [e for e in random_episodes(34, with_student=True) if e.from_student and len(e.states) == 4]
    stats = pack([episode])
    rewards = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    loss = MiniLLM(gamma=0.5, length_normalised=False)
    assert loss.returns_ahead(rewards, stats).tolist() == [10 + 50 + 250, 100 + 500, 1000, 0]
    normalised = MiniLLM(gamma=0.5).returns_ahead(rewards, stats)
    assert normalised.tolist() == [310 / 3, 300, 1000, 0]


def test_nothing_leaks_from_one_answer_into_another():
    episodes = random_episodes(35, with_student=True)
    loss = MiniLLM(whiten=False)
    apart = math.fsum(float(loss(pack([episode])).loss) for episode in episodes)
    assert float(loss(pack(episodes)).loss) == pytest.approx(apart, rel=1e-12)


def test_whitened_the_loss_of_a_step_depends_on_how_it_is_cut_into_micro_batches():
    """Each of them is whitened by its own mean and deviation, as printed; not whitened, the cut makes no difference."""
    episodes = random_episodes(35, copies=2, with_student=True)
    cuts = [[episodes], [episodes[:9], episodes[9:]], [episodes[:7], episodes[7:]]]
    fields = {"gamma": 0.95, "length_normalised": True, "single_step": True, "clip": 0.2}
    totals = {}
    for whiten in (True, False):
        totals[whiten] = [math.fsum(float(MiniLLM(whiten=whiten)(pack(part)).loss) for part in cut) for cut in cuts]
        wanted = [math.fsum(printed.minillm(part, **fields, whiten=whiten) for part in cut) for cut in cuts]
        assert totals[whiten] == pytest.approx(wanted, rel=1e-9)
    assert totals[False] == pytest.approx([totals[False][0]] * 3, rel=1e-12)
    assert min(abs(a - b) for a, b in itertools.combinations(totals[True], 2)) > 1e-2 * abs(totals[True][0])


def test_whitening_is_over_the_students_transitions_alone():
    episodes = random_episodes(36, with_student=True)
    own = [episode for episode in episodes if episode.from_student]
    assert float(MiniLLM()(pack(episodes)).loss) == pytest.approx(float(MiniLLM()(pack(own)).loss), rel=1e-12)


def test_the_teachers_answers_teach_nothing():
    assert float(MiniLLM()(pack(random_episodes(37))).loss) == 0.0


def test_without_the_sampling_probabilities_it_refuses():
    stats = replace(pack(random_episodes(38, with_student=True)), log_prob_sampled_N=None)
    with pytest.raises(DomainError, match="minillm: the student's answers need log-probabilities"):
        MiniLLM()(stats)
