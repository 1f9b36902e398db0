"""Divergences from the store and from a teacher in memory: printed formulas, limits, TRL, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import pack, random_episodes, with_leaves
from references import divergences as printed
from references.losses import projected

from tdistill.errors import DomainError
from tdistill.head import OutputHead
from tdistill.kernels.dense import dense_sums
from tdistill.objectives.alpha_beta import AlphaBeta
from tdistill.objectives.distillm2 import DistiLLM2
from tdistill.objectives.divergence import Divergence
from tdistill.objectives.forward_kl import ForwardKL
from tdistill.objectives.gkd import GKD
from tdistill.objectives.iq_learn import IQLearn
from tdistill.objectives.minillm import MiniLLM
from tdistill.objectives.off_support import OffSupport
from tdistill.objectives.reverse_kl import ReverseKL
from tdistill.objectives.sampled_kl import SampledKL
from tdistill.objectives.skew_kl import SkewKL
from tdistill.objectives.total_variation import TotalVariation

FORMULAS = {
    ForwardKL(): printed.kl,
    ReverseKL(): lambda p, q: printed.kl(q, p),
    GKD(beta=0.3): lambda p, q: printed.jsd(p, q, 0.3),
    SkewKL(skew=0.1): lambda p, q: printed.skewed(p, q, 0.1),
    SkewKL(skew=0.4, direction="reverse"): lambda p, q: printed.skewed(q, p, 0.4),
    AlphaBeta(alpha=0.2, beta=0.7): lambda p, q: printed.alpha_beta(p, q, 0.2, 0.7),
    AlphaBeta(alpha=-0.4, beta=1.1): lambda p, q: printed.alpha_beta(p, q, -0.4, 1.1),
    TotalVariation(): printed.total_variation,
}
every_divergence = pytest.mark.parametrize("loss", FORMULAS, ids=str)
# Minimisers of every one of them; minillm's loss is a policy gradient and no divergence.
MEMBERS = [*FORMULAS, GKD(beta=0.0), GKD(beta=1.0), AlphaBeta(alpha=1.0, beta=0.0), DistiLLM2()]


@every_divergence
def test_from_the_store_it_is_the_printed_divergence_of_set_and_tail(loss):
    episodes = random_episodes(21)
    wanted = math.fsum(
        FORMULAS[loss](*printed.set_and_tail(state))
        for episode in episodes
        for state in episode.states
        if state.taken is not None
    )
    assert float(loss(pack(episodes)).loss) == pytest.approx(wanted, rel=1e-9)


@every_divergence
def test_on_the_set_it_is_the_printed_divergence_of_the_projected_policies(loss):
    episodes = random_episodes(27)
    wanted = math.fsum(
        FORMULAS[loss](projected(state.teacher_log_probs), projected(state.logits))
        for episode in episodes
        for state in episode.states
        if state.taken is not None
    )
    on_set = replace(loss, source="set")
    assert float(on_set(replace(pack(episodes), log_normaliser_N=None)).loss) == pytest.approx(wanted, rel=1e-9)
    assert on_set.uses_off_support and on_set.support is None


def test_forward_kl_on_the_set_is_the_expected_first_order_term():
    """But for the entropy of the teacher's projected policy, which has no gradient."""
    stats, other = (with_leaves(pack(random_episodes(28))) for _ in range(2))
    ForwardKL(source="set")(stats).loss.backward()
    IQLearn()(other).loss.backward()
    torch.testing.assert_close(stats.q_M.grad, other.q_M.grad, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """Teacher (½, ¼ | ¼ outside), student (¼, ¼ | ½ outside)."""
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    log_p, log_q = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    no = torch.zeros(3, dtype=torch.bool)
    by_hand = {
        ForwardKL(): 0.25 * math.log(2),  # ½ ln 2 + 0 − ¼ ln 2
        ReverseKL(): 0.25 * math.log(2),  # −¼ ln 2 + 0 + ½ ln 2
        TotalVariation(): 0.25,
        # m = (3/8, ¼, 3/8): both KL are ½ ln 4/3 + ¼ ln 2/3
        GKD(): 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
        # λ = ½ has the same m
        SkewKL(skew=0.5): 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
        # α = β = 1: half the squared distance: (1/16 + 1/16)/2
        AlphaBeta(alpha=1.0, beta=1.0): 1 / 16,
    }
    for loss, wanted in by_hand.items():
        assert float(loss.terms(log_p, log_q, no).sum()) == pytest.approx(wanted, rel=1e-12), loss


@pytest.mark.parametrize("loss", MEMBERS, ids=str)
def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient(loss):
    # The same floats on both sides: total variation has a kink there.
    logits = torch.randn(5, 7, dtype=torch.float64).requires_grad_()
    log_probs = logits.detach().log_softmax(-1)
    from_student = torch.tensor([True, False, True, False, False])[:, None]
    total = loss.terms(log_probs, logits.log_softmax(-1), from_student).sum()
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert float(logits.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("loss", MEMBERS, ids=str)
def test_any_other_student_has_a_loss(loss):
    torch.manual_seed(1)
    log_probs, other = torch.randn(2, 50, 7, dtype=torch.float64).log_softmax(-1)
    for from_student in (False, True):
        terms = loss.terms(log_probs, other, torch.full((50, 1), from_student))
        assert float(terms.sum(-1).min()) > 1e-4


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (ForwardKL(), GKD(beta=0.0)),
        (ReverseKL(), GKD(beta=1.0)),
        (ForwardKL(), SkewKL(skew=0.0)),
        (ReverseKL(), SkewKL(skew=0.0, direction="reverse")),
        (ForwardKL(), AlphaBeta(alpha=1.0, beta=0.0)),
        (ReverseKL(), AlphaBeta(alpha=0.0, beta=1.0)),
        (SkewKL(), DistiLLM2()),
    ],
    ids=str,
)
def test_limits(special, general):
    stats = pack(random_episodes(22))
    assert float(general(stats).loss) == pytest.approx(float(special(stats).loss), rel=1e-10)


@pytest.mark.parametrize(
    ("limit", "near", "scale"),
    [
        # Small β: KL(π*‖m) is of second order and β KL(π*‖π_Q) remains. Likewise at the other end.
        (ForwardKL(), GKD(beta=1e-6), 1e-6),
        (ReverseKL(), GKD(beta=1 - 1e-6), 1e-6),
        (ForwardKL(), SkewKL(skew=1e-7), 1),
        (ForwardKL(), AlphaBeta(alpha=1.0, beta=1e-7), 1),
        (ReverseKL(), AlphaBeta(alpha=1e-7, beta=1.0), 1),
    ],
    ids=str,
)
def test_limits_are_approached(limit, near, scale):
    stats = pack(random_episodes(23))
    assert float(near(stats).loss) / scale == pytest.approx(float(limit(stats).loss), rel=1e-3)


EVENTS = {
    "store": printed.set_and_tail,
    "set": lambda state: (projected(state.teacher_log_probs), projected(state.logits)),
}


@pytest.mark.parametrize("source", EVENTS)
@pytest.mark.parametrize(("skew", "weight"), [(0.1, 1.0), (0.3, 0.6), (0.0, 2.0)])
def test_distillm2_is_the_printed_pair(source, skew, weight):
    episodes = random_episodes(29, with_student=True)
    wanted = printed.distillm2(episodes, skew, weight, EVENTS[source])
    loss = DistiLLM2(source=source, skew=skew, student_weight=weight)
    assert float(loss(pack(episodes)).loss) == pytest.approx(wanted, rel=1e-9)


def test_sampled_kl_is_the_mean_over_its_draws():
    torch.manual_seed(9)
    log_p, log_q = torch.randn(2, 6, 7, dtype=torch.float64).log_softmax(-1)
    torch.manual_seed(10)
    found = SampledKL(num_samples=20).terms(log_p, log_q, torch.zeros(6, 1, dtype=torch.bool)).sum(-1)
    torch.manual_seed(10)
    drawn = torch.multinomial(log_p.exp(), 20, replacement=True).numpy()
    for row in range(6):
        wanted = printed.sampled_kl(log_p[row].exp().numpy(), log_q[row].exp().numpy(), drawn[row])
        assert float(found[row]) == pytest.approx(wanted, rel=1e-12)


def test_distillm2_is_the_skewed_pair():
    stats = pack(random_episodes(24, with_student=True))
    own = stats.from_student_N
    forward = SkewKL(skew=0.2)(replace(stats, has_action_N=stats.has_action_N & ~own)).loss
    reverse = SkewKL(skew=0.2, direction="reverse")(replace(stats, has_action_N=stats.has_action_N & own)).loss
    found = DistiLLM2(skew=0.2, student_weight=0.7)(stats).loss
    assert float(found) == pytest.approx(float(forward + 0.7 * reverse), rel=1e-12)


def test_forward_kl_of_set_and_tail_is_the_truncated_first_order_term_and_the_tail():
    """Σ_A π* log π_Q splits into Z (E log proj_p π_Q + log P); the teacher's entropy has no gradient."""
    episodes = random_episodes(25)
    stats, other = with_leaves(pack(episodes)), with_leaves(pack(episodes))
    ForwardKL()(stats).loss.backward()
    mass = torch.zeros(len(other.ends_N), dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(len(mass)), other.offsets.diff())
    mass.index_add_(0, rows, other.log_prob_teacher_M.exp())
    # The weight Z belongs to each row, so rows are taken one at a time.
    for row in torch.nonzero(other.has_action_N).flatten():
        one = replace(other, has_action_N=torch.arange(len(mass)) == row)
        (mass[row] * IQLearn()(one).loss + OffSupport("tail", target="teacher")(one).loss).backward()
    torch.testing.assert_close(stats.q_M.grad, other.q_M.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.log_normaliser_N.grad, other.log_normaliser_N.grad, rtol=1e-10, atol=1e-12)


def test_joining_tokens_never_raises_a_divergence():
    """Set and tail against all tokens: a lower bound, for those that are f-divergences."""
    log_p, log_q = torch.randn(2, 200, 9, dtype=torch.float64).log_softmax(-1)

    def joined(log_probs):
        return torch.cat([log_probs[:, :3], log_probs[:, 3:].logsumexp(-1, keepdim=True)], -1)

    for loss in (ForwardKL(), ReverseKL(), GKD(), SkewKL(), TotalVariation()):
        flags = torch.zeros(200, 1, dtype=torch.bool)
        whole = loss.terms(log_p, log_q, flags).sum(-1)
        assert (loss.terms(joined(log_p), joined(log_q), flags).sum(-1) <= whole + 1e-12).all(), loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_from_a_teacher_in_memory_is_that_of_trl(beta):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is in the extra dev")
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(30, 16, requires_grad=True), torch.randn(30, 12)
    heads = [OutputHead(torch.randn(101, width)) for width in (16, 12)]
    logits = hidden @ heads[0].weight_VD.T
    wanted = gkd.GKDTrainer.generalized_jsd_loss(
        logits[None], (teacher_hidden @ heads[1].weight_VD.T)[None], beta=beta, reduction="sum"
    )
    flags = torch.zeros(30, dtype=torch.bool)
    found, _ = dense_sums(hidden, heads[0], teacher_hidden, heads[1], flags, GKD(beta=beta).terms)
    assert found.sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(total, hidden, retain_graph=True)[0] for total in (found.sum(), wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_a_teacher_in_memory_is_asked_for_by_name():
    stats = replace(pack(random_episodes(26)), divergence_N=None)
    with pytest.raises(DomainError, match="forward_kl: source = teacher needs a teacher in memory"):
        ForwardKL(source="teacher")(stats)


def test_without_sets_the_store_has_no_divergence():
    with pytest.raises(DomainError, match="reverse_kl at p = 1 has no listed action sets: set source to teacher"):
        ReverseKL()(replace(pack(random_episodes(26)), full_support=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GKD(beta=1.2), r"gkd: beta = 1.2 is outside \[0, 1\]"),
        (lambda: SkewKL(skew=1.0), r"skew_kl: skew = 1.0 is outside \[0, 1\)"),
        (lambda: DistiLLM2(skew=-0.1), r"distillm2: skew = -0.1"),
        (lambda: DistiLLM2(student_weight=0.0), r"student_weight = 0.0 must be positive"),
        (lambda: AlphaBeta(alpha=0.5, beta=-0.5), r"sum to 0"),
        (lambda: AlphaBeta(alpha=math.nan), r"alpha = nan and beta = 0.7 must be finite"),
        (lambda: MiniLLM(clip=0.0), r"clip = 0.0 must be positive"),
        (lambda: SampledKL(num_samples=0), r"sampled_kl: num_samples = 0 must be at least 1"),
        (lambda: MiniLLM(gamma=1.5), r"gamma = 1.5"),
    ],
)
def test_settings_out_of_their_domain(make, message):
    with pytest.raises(DomainError, match=message):
        make()


def test_a_set_whose_mass_was_rounded_to_1_leaves_the_resolution_of_16_bits_outside():
    """Student 0.95 on the one token listed, whose stored probability is 1: 0.05 outside, against 2⁻¹²."""
    stats = pack(random_episodes(3))
    one = torch.tensor([0, 1])
    first = {
        name: value[:1]
        for name, value in vars(stats).items()
        if name.endswith("_N") and isinstance(value, torch.Tensor) and name != "has_action_N"
    }
    stats = replace(
        stats,
        **first | {"log_normaliser_N": torch.zeros(1, dtype=torch.float64)},
        has_action_N=torch.tensor([True]),
        offsets=one,
        q_M=torch.tensor([math.log(0.95)], dtype=torch.float64),
        log_prob_teacher_M=torch.zeros(1, dtype=torch.float64),
    )
    wanted = 0.95 * math.log(0.95) + 0.05 * math.log(0.05 * 2**12)
    assert float(ReverseKL()(stats).loss) == pytest.approx(wanted, rel=1e-9)


def test_what_divides_by_the_mass_outside_is_not_read_from_8_bits():
    coarse = [ForwardKL(), GKD(), SkewKL(direction="reverse"), DistiLLM2(), TotalVariation()]
    coarse += [AlphaBeta(alpha=1.0, beta=0.5)]
    coarse += [loss(source=source) for loss in (ReverseKL, AlphaBeta) for source in ("set", "teacher")]
    assert {loss.least_log_prob_bits for loss in coarse} == {8}
    assert {loss.least_log_prob_bits for loss in (ReverseKL(), GKD(beta=1.0), AlphaBeta())} == {16}
    assert SkewKL(direction="reverse", skew=0.0).least_log_prob_bits == DistiLLM2(skew=0.0).least_log_prob_bits == 16
    assert SkewKL(skew=0.0).least_log_prob_bits == SkewKL(direction="reverse").least_log_prob_bits == 8


def test_members_say_what_they_need():
    assert ForwardKL().uses_sets and not ForwardKL().needs_teacher
    assert ForwardKL(source="teacher").needs_teacher and not ForwardKL(source="teacher").uses_sets
    assert all(isinstance(loss, Divergence) and not loss.uses_off_support for loss in MEMBERS)
    assert DistiLLM2().needs_rollouts and MiniLLM().needs_rollouts and not GKD().needs_rollouts


def test_sampled_kl_is_unbiased_in_value_and_gradient():
    """The mean of 4,000 estimates is within four of its standard errors of the forward KL; top-k alone is far off."""
    torch.manual_seed(7)
    log_p = (2 * torch.randn(1, 9, dtype=torch.float64)).log_softmax(-1).expand(4000, 9)
    logits = torch.randn(1, 9, dtype=torch.float64).expand(4000, 9).clone().requires_grad_()
    values = SampledKL(num_samples=3).terms(log_p, logits.log_softmax(-1), torch.tensor([False])).sum(-1)
    values.sum().backward()
    gradients = logits.grad.clone()
    logits.grad = None
    wanted = ForwardKL().terms(log_p, logits.log_softmax(-1), torch.tensor([False])).sum(-1)
    wanted.sum().backward()
    for found, true in ((values[:, None].detach(), wanted[:1, None].detach()), (gradients, logits.grad[:1])):
        error = found.std(0) / math.sqrt(4000)
        assert ((found.mean(0) - true[0]).abs() < 4 * error + 1e-12).all()
        assert (error > 0).all()


def test_sampled_kl_of_many_draws_is_the_forward_kl():
    torch.manual_seed(8)
    log_p, log_q = torch.randn(2, 5, 7, dtype=torch.float64).log_softmax(-1)
    flags = torch.zeros(5, 1, dtype=torch.bool)
    found = SampledKL(num_samples=1_000_000).terms(log_p, log_q, flags).sum(-1)
    torch.testing.assert_close(found, ForwardKL().terms(log_p, log_q, flags).sum(-1), rtol=0.02, atol=2e-3)
