"""Functions of the teacher's and the student's whole distributions at each position, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdistill.head import OutputHead
from tdistill.kernels.chunked import chunk_slices

# Elements of one chunk of logits, 32 Mi: 128 MiB in float32. What fits one chunk is kept for the backward pass.
_MAX_ELEMENTS = 2**25

Terms = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log-probabilities of teacher and student [C, V] and from_student [C, 1] → contributions of the tokens [C, V]."""


def dense_sums(
    hidden_ND: Tensor,
    head: OutputHead,
    teacher_hidden_NE: Tensor,
    teacher_head: OutputHead,
    from_student_N: Tensor,
    terms: Terms,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ_v f(log π*(v), log π_Q(v)) over the tokens that both models have, at each position.

    Both distributions are normalised over those tokens: a model whose vocabulary is shorter has no probability beyond
    its end, and rows that only pad a vocabulary have none either. Chunks are formed again in the backward pass unless
    one holds all positions.

    Args:
        hidden_ND: the student's last hidden states, [N, D].
        head: its output head.
        teacher_hidden_NE: the teacher's, without gradient, [N, E].
        teacher_head: its output head.
        from_student_N: bool [N], handed on to ``terms``.
        terms: the summand.
        num_tokens: tokens of the tokenizer, or None.
    Returns:
        The sums, float [N], and the student's log-normaliser over those tokens, float [N], nats; at least float32.
    """
    shared = shared_tokens(head, teacher_head, num_tokens)
    # Once for all chunks: the gradients of a matrix in bfloat16 add up in float32.
    own = head.first(shared).ready(hidden_ND.dtype)
    theirs = teacher_head.first(shared).ready(teacher_hidden_NE.dtype)

    def chunk(hidden_CD: Tensor, teacher_hidden_CE: Tensor, from_student_C: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_probs_teacher = theirs.logits(teacher_hidden_CE).log_softmax(-1).to(hidden_CD.device)
        logits = own.logits(hidden_CD)
        normaliser_C = logits.logsumexp(-1)
        log_probs_student = logits - normaliser_C[:, None]
        return terms(log_probs_teacher, log_probs_student, from_student_C[:, None]).sum(-1), normaliser_C

    parts = (hidden_ND, teacher_hidden_NE, from_student_N)
    slices = list(chunk_slices(len(hidden_ND), shared, _MAX_ELEMENTS))
    if len(slices) <= 1:
        return chunk(*parts)
    chunks = [checkpoint(chunk, *(part[rows] for part in parts), use_reentrant=False) for rows in slices]
    sums, normalisers = zip(*chunks, strict=True)
    return torch.cat(sums), torch.cat(normalisers)


def shared_tokens(head: OutputHead, teacher_head: OutputHead, num_tokens: int | None) -> int:
    """How many tokens both models have; rows that pad a vocabulary are left out where the tokenizer's size is given."""
    return min(len(head.weight_VD), len(teacher_head.weight_VD), num_tokens or len(head.weight_VD))
