"""Logits of listed (position, token) pairs only: the product of a few rows of the output matrix.

All three products are PyTorch's ``embedding_bag``, which reads ragged lists where they lie: a bag's weighted sum of
rows is the gradient to a hidden state, its gradient to the weights is the logits, and with positions and tokens
exchanged it is the gradient to the rows. Nothing of size pairs × D is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from tdistill.head import OutputHead, compute_dtype


class _PairProducts(torch.autograd.Function):
    """products_M = Σ_D h[row of m] · R[columns_M]."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, rows_UD: Tensor, offsets: Tensor, columns_M: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, rows_UD, offsets, columns_M)
        with torch.enable_grad():
            unit_M = hidden_ND.new_zeros(len(columns_M), requires_grad=True)
            sums_ND = embedding_bag(columns_M, rows_UD, offsets[:-1], per_sample_weights=unit_M, mode="sum")
        return torch.autograd.grad(sums_ND, unit_M, hidden_ND)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_ND, rows_UD, offsets, columns_M = ctx.saved_tensors
        (grad_M,) = grads
        grad_hidden = embedding_bag(columns_M, rows_UD, offsets[:-1], per_sample_weights=grad_M, mode="sum")
        # The same pairs, listed by column.
        position_M = torch.repeat_interleave(offsets.diff(), output_size=len(columns_M))
        order = torch.argsort(columns_M, stable=True)
        starts = torch.searchsorted(columns_M[order], torch.arange(len(rows_UD), device=columns_M.device))
        grad_rows = embedding_bag(position_M[order], hidden_ND, starts, per_sample_weights=grad_M[order], mode="sum")
        return grad_hidden, grad_rows, None, None


def pair_logits(hidden_ND: Tensor, head: OutputHead, offsets: Tensor, ids_M: Tensor) -> Tensor:
    """Logits of the tokens listed at each position.

    logit_m = softcap · tanh((h_n · W[ids_m] + b) · scale / softcap), n the position whose list holds m. The rows of the
    output matrix that are listed are gathered once; the gradient reaches no other row.

    Args:
        hidden_ND: last hidden states, [N, D].
        head: output head.
        offsets: int64 [N + 1]; the list of position n is ``ids_M[offsets[n]:offsets[n + 1]]``, and may be empty.
        ids_M: int64 [M] token ids.
    Returns:
        float [M], at least float32.
    """
    ids_U, columns_M = torch.unique(ids_M, return_inverse=True)
    listed = head.select(ids_U)
    dtype = compute_dtype(hidden_ND, listed.weight_VD)
    products: Tensor = _PairProducts.apply(hidden_ND.to(dtype), listed.weight_VD.to(dtype), offsets, columns_M)
    if listed.bias_V is not None:
        products = products + listed.bias_V.to(dtype)[columns_M]
    return listed.finish(products)
