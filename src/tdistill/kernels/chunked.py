"""Log-normalisers over many tokens, a chunk of positions at a time, so that positions × tokens never exists whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdistill.head import OutputHead, compute_dtype

# Elements of the largest temporary, 16 Mi: 64 MiB in float32. Logits that fit it are kept for the backward pass.
_MAX_ELEMENTS = 2**24


def chunk_slices(num_rows: int, num_columns: int, max_elements: int | None = None) -> Iterator[slice]:
    """Row slices such that rows × columns of each stays within the temporary's bound, or another one."""
    rows = max(1, (max_elements or _MAX_ELEMENTS) // max(num_columns, 1))
    for start in range(0, num_rows, rows):
        yield slice(start, start + rows)


class _NormaliserAndPairs(torch.autograd.Function):
    """log Σ_v w_v exp(logit_v) of every row, and the logits of listed pairs, from one product with the matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        log_weight_V: Tensor | None,
        offsets: Tensor,
        columns_M: Tensor,
        head: OutputHead,
    ) -> tuple[Tensor, Tensor]:
        ctx.head = head
        chunks = list(chunk_slices(len(hidden_ND), len(weight_VD)))
        positions_M = torch.repeat_interleave(offsets.diff(), output_size=len(columns_M))
        # One copy to the host: which pairs belong to which chunk.
        bounds = offsets[[min(c.stop, len(hidden_ND)) for c in chunks]].tolist() if chunks else []
        ctx.chunks = list(zip(chunks, [slice(a, b) for a, b in zip([0, *bounds], bounds, strict=False)], strict=True))
        normaliser_N, pairs_M = hidden_ND.new_empty(len(hidden_ND)), hidden_ND.new_empty(len(columns_M))
        logits = None
        for rows, pairs in ctx.chunks:
            logits = _logits(hidden_ND[rows], weight_VD, bias_V, head)
            pairs_M[pairs] = logits[positions_M[pairs] - rows.start, columns_M[pairs]]
            normaliser_N[rows] = (logits if log_weight_V is None else logits + log_weight_V).logsumexp(-1)
        kept = logits if len(chunks) == 1 else None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, log_weight_V, positions_M, columns_M, normaliser_N, kept)
        return normaliser_N, pairs_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_normaliser_N, grad_pairs_M = grads
        hidden_ND, weight_VD, bias_V, log_weight_V, positions_M, columns_M, normaliser_N, kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None
        head: OutputHead = ctx.head
        for rows, pairs in ctx.chunks:
            logits = _logits(hidden_ND[rows], weight_VD, bias_V, head) if kept is None else kept
            grad = logits - normaliser_N[rows, None]
            if log_weight_V is not None:
                grad += log_weight_V
            grad.exp_().mul_(grad_normaliser_N[rows, None])
            at = (positions_M[pairs] - rows.start) * grad.shape[1] + columns_M[pairs]
            grad.view(-1).index_add_(0, at, grad_pairs_M[pairs])
            if head.softcap is not None:
                grad *= 1 - (logits / head.softcap).square()
            if head.scale != 1.0:
                grad *= head.scale
            if grad_hidden is not None:
                torch.mm(grad, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden_ND[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: OutputHead) -> Tensor:
    return head.finish(torch.nn.functional.linear(hidden_CD, weight_VD, bias_V))


def normaliser_and_pairs(
    hidden_ND: Tensor, head: OutputHead, offsets: Tensor, columns_M: Tensor, log_weight_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-normaliser of every row over all tokens of the head, and the logits of the tokens listed at each position.

    log Σ_v w_v exp(logit_v).  The backward pass forms the logits of a chunk again, unless one chunk holds them all.

    Args:
        hidden_ND: last hidden states, [N, D].
        head: output head, whole or restricted by :meth:`OutputHead.select`.
        offsets: int64 [N + 1]; the list of position n is ``columns_M[offsets[n]:offsets[n + 1]]``.
        columns_M: int64 [M], rows of the head.
        log_weight_V: log w of the head's tokens, or None for ones.
    Returns:
        float [N], nats, and float [M]; at least float32.
    """
    head = head.merged()
    dtype = compute_dtype(hidden_ND, head.weight_VD)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = _NormaliserAndPairs.apply(
            hidden_ND.to(dtype), head.weight_VD.to(dtype), bias, log_weight_V, offsets, columns_M, head
        )
    return found


@torch.no_grad()
def normaliser_and_argmax(hidden_ND: Tensor, head: OutputHead) -> tuple[Tensor, Tensor]:
    """Log-normaliser and most likely token over the vocabulary, for evaluation: float [N] and int64 [N]."""
    head, normalisers, tops = head.ready(hidden_ND.dtype), [], []
    for rows in chunk_slices(len(hidden_ND), len(head.weight_VD)):
        logits = head.logits(hidden_ND[rows])
        normalisers.append(logits.logsumexp(-1))
        tops.append(logits.argmax(-1))
    return torch.cat(normalisers), torch.cat(tops)
