"""Sums over whole distributions: against dense float64, chunk by chunk, over the tokens that both models have."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tdistill.head import OutputHead
from tdistill.kernels import dense
from tdistill.objectives.forward_kl import ForwardKL
from tdistill.objectives.gkd import GKD

V, N = 101, 23


def heads(**changes) -> tuple[Tensor, OutputHead, Tensor, OutputHead]:
    torch.manual_seed(3)
    student = OutputHead(torch.randn(V, 8, dtype=torch.float64).requires_grad_(), **changes)
    teacher = OutputHead(torch.randn(V, 6, dtype=torch.float64), **changes)
    hidden = torch.randn(N, 8, dtype=torch.float64).requires_grad_()
    return hidden, student, torch.randn(N, 6, dtype=torch.float64), teacher


def plain(hidden: Tensor, head: OutputHead) -> Tensor:
    """Log-probabilities from the printed form of the head."""
    logits = (hidden @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log(logits.exp() / logits.exp().sum(-1, keepdim=True))


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_gradients_of_a_matrix_in_bfloat16_add_up_in_float32(monkeypatch):
    _, head, _, teacher_head = heads()
    states, teacher_states = torch.randn(400, 8), torch.randn(400, 6)
    weight = head.weight_VD.detach().bfloat16().requires_grad_()
    flags = torch.zeros(400, dtype=torch.bool)

    def gradient(max_elements: int) -> Tensor:
        monkeypatch.setattr(dense, "_MAX_ELEMENTS", max_elements)
        sums, _ = dense.dense_sums(states, OutputHead(weight), teacher_states, teacher_head, flags, ForwardKL().terms)
        return torch.autograd.grad(sums.sum(), weight)[0]

    # Chunk by chunk in bfloat16, most of the last bits would differ.
    assert (gradient(1) != gradient(2**25)).float().mean() < 0.05


@pytest.mark.parametrize("max_elements", [2**25, 5 * V, 1])
@pytest.mark.parametrize(
    "changes",
    [{}, {"softcap": 2.5}, {"scale": 0.3}, {"bias_V": torch.linspace(-1, 1, V, dtype=torch.float64)}],
    ids=str,
)
def test_forward_kl_of_whole_distributions(monkeypatch, max_elements, changes):
    """Values, gradients and normaliser, however many positions a chunk holds; a cap on the logits is not forgotten."""
    monkeypatch.setattr(dense, "_MAX_ELEMENTS", max_elements)
    hidden, head, teacher_hidden, teacher_head = heads(**changes)
    flags = torch.zeros(N, dtype=torch.bool)
    found, normaliser = dense.dense_sums(hidden, head, teacher_hidden, teacher_head, flags, ForwardKL().terms)
    wanted = kl(plain(teacher_hidden, teacher_head), plain(hidden, head))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(normaliser, head.logits(hidden).logsumexp(-1), rtol=1e-12, atol=0)
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    inputs = (hidden, head.weight_VD)
    ours, theirs = (torch.autograd.grad((weights * total).sum(), inputs) for total in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_only_tokens_that_both_have_are_compared(longer):
    """A vocabulary that is padded with 0 logits would move mass to tokens that do not exist."""
    hidden, head, teacher_hidden, teacher_head = heads()
    flags = torch.zeros(N, dtype=torch.bool)
    wanted, _ = dense.dense_sums(hidden, head, teacher_hidden, teacher_head, flags, GKD().terms)
    extra = torch.randn(7, 8 if longer == "student" else 6, dtype=torch.float64)
    if longer == "student":
        head = replace(head, weight_VD=torch.cat([head.weight_VD, extra]))
    else:
        teacher_head = replace(teacher_head, weight_VD=torch.cat([teacher_head.weight_VD, extra]))
    found, _ = dense.dense_sums(hidden, head, teacher_hidden, teacher_head, flags, GKD().terms)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_rows_that_pad_both_vocabularies_are_left_out():
    hidden, head, teacher_hidden, teacher_head = heads()
    flags = torch.zeros(N, dtype=torch.bool)
    found, _ = dense.dense_sums(hidden, head, teacher_hidden, teacher_head, flags, ForwardKL().terms, num_tokens=90)
    first = [plain(h, o)[:, :90] for h, o in ((teacher_hidden, teacher_head), (hidden, head))]
    log_p, log_q = (log_probs - log_probs.logsumexp(-1, keepdim=True) for log_probs in first)
    torch.testing.assert_close(found, kl(log_p, log_q), rtol=1e-10, atol=1e-12)


def test_rows_keep_their_flag_in_every_chunk(monkeypatch):
    monkeypatch.setattr(dense, "_MAX_ELEMENTS", 4 * V)
    hidden, head, teacher_hidden, teacher_head = heads()
    flags = torch.arange(N) % 3 == 0

    def terms(log_p: Tensor, log_q: Tensor, from_student: Tensor) -> Tensor:
        return torch.where(from_student, 1.0, 0.0).expand_as(log_p) / V

    found, _ = dense.dense_sums(hidden, head, teacher_hidden, teacher_head, flags, terms)
    assert found.tolist() == pytest.approx(flags.double().tolist())


def test_float32_is_as_exact_as_the_dense_computation():
    hidden, head, teacher_hidden, teacher_head = heads()
    flags = torch.zeros(N, dtype=torch.bool)
    exact, _ = dense.dense_sums(hidden, head, teacher_hidden, teacher_head, flags, ForwardKL().terms)
    single = (hidden.float(), OutputHead(head.weight_VD.float()), teacher_hidden.float())
    found, _ = dense.dense_sums(*single, OutputHead(teacher_head.weight_VD.float()), flags, ForwardKL().terms)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).detach().abs().max()) < 1e-5 * max(1.0, math.log(V))
