"""Log-normalisers over many tokens, a chunk of positions at a time, so that positions × tokens never exists whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdistill.head import OutputHead

# Elements of the largest temporary, 16 Mi: 64 MiB in float32.
_MAX_ELEMENTS = 2**24


def chunk_slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Row slices such that rows × columns of each stays within the temporary's bound."""
    rows = max(1, _MAX_ELEMENTS // max(num_columns, 1))
    for start in range(0, num_rows, rows):
        yield slice(start, start + rows)


def log_normaliser(hidden_ND: Tensor, head: OutputHead, log_weight_V: Tensor | None = None) -> Tensor:
    """log Σ_v w_v exp(logit_v) of every row over all tokens of the head; the backward pass recomputes each chunk.

    Args:
        hidden_ND: last hidden states, [N, D].
        head: output head, whole or restricted by :meth:`OutputHead.select`.
        log_weight_V: log w of the head's tokens, or None for ones.
    Returns:
        float [N], at least float32, nats.
    """

    def of_chunk(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        logits = OutputHead(weight_VD, bias_V, head.scale, head.softcap).logits(hidden_CD)
        return (logits if log_weight_V is None else logits + log_weight_V).logsumexp(-1)

    parts = [
        checkpoint(
            of_chunk, hidden_ND[rows], head.weight_VD, head.bias_V, use_reentrant=False, preserve_rng_state=False
        )
        for rows in chunk_slices(len(hidden_ND), len(head.weight_VD))
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


@torch.no_grad()
def normaliser_and_argmax(hidden_ND: Tensor, head: OutputHead) -> tuple[Tensor, Tensor]:
    """Log-normaliser and most likely token over the vocabulary, for evaluation: float [N] and int64 [N]."""
    normalisers, tops = [], []
    for rows in chunk_slices(len(hidden_ND), len(head.weight_VD)):
        logits = head.logits(hidden_ND[rows])
        normalisers.append(logits.logsumexp(-1))
        tops.append(logits.argmax(-1))
    return torch.cat(normalisers), torch.cat(tops)
