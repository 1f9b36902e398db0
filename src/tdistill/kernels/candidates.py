"""Logits of listed (position, token) pairs only: the product of a few rows of the output matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdistill.head import OutputHead, compute_dtype

# Pairs gathered at a time: bounds the temporary to this many rows of width D.
_BLOCK = 8192


class _PairProducts(torch.autograd.Function):
    """products_M = Σ_D h[rows_M] · W[ids_M], with both gradients accumulated block by block."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, rows_M: Tensor, ids_M: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, rows_M, ids_M)
        dtype = compute_dtype(hidden_ND, weight_VD)
        out = torch.empty(len(rows_M), dtype=dtype, device=hidden_ND.device)
        for start in range(0, len(rows_M), _BLOCK):
            block = slice(start, start + _BLOCK)
            left, right = hidden_ND[rows_M[block]].to(dtype), weight_VD[ids_M[block]].to(dtype)
            with torch.autocast(hidden_ND.device.type, enabled=False):
                out[block] = torch.einsum("md,md->m", left, right)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, rows_M, ids_M = ctx.saved_tensors
        (grad_M,) = grads
        grad_h = torch.zeros(hidden_ND.shape, dtype=grad_M.dtype, device=grad_M.device)
        grad_w = torch.zeros(weight_VD.shape, dtype=grad_M.dtype, device=grad_M.device)
        for start in range(0, len(rows_M), _BLOCK):
            block = slice(start, start + _BLOCK)
            rows, ids, grad = rows_M[block], ids_M[block], grad_M[block, None]
            grad_h.index_add_(0, rows, grad * weight_VD[ids].to(grad.dtype))
            grad_w.index_add_(0, ids, grad * hidden_ND[rows].to(grad.dtype))
        return grad_h.to(hidden_ND.dtype), grad_w.to(weight_VD.dtype), None, None


def pair_logits(hidden_ND: Tensor, head: OutputHead, rows_M: Tensor, ids_M: Tensor) -> Tensor:
    """Logits of the pairs (rows_M[m], ids_M[m]).

    Args:
        hidden_ND: last hidden states, [N, D].
        head: output head.
        rows_M: int64, position of each pair.
        ids_M: int64, token of each pair.
    Returns:
        float [M], at least float32.
    """
    products: Tensor = _PairProducts.apply(hidden_ND, head.weight_VD, rows_M, ids_M)
    if head.bias_V is not None:
        products = products + head.bias_V[ids_M].to(products.dtype)
    return head.finish(products)
