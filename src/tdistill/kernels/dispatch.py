"""The two kernels behind one signature: ``candidates`` for training, ``reference`` to judge it by."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdistill.head import OutputHead
from tdistill.kernels.candidates import pair_logits
from tdistill.kernels.chunked import normaliser_and_argmax, normaliser_and_pairs

Support = Literal["vocabulary", "union", "negatives"]

# Tokens drawn for ``negatives``: a normaliser over about a sixth of a vocabulary of 50,000, union included.
_NUM_NEGATIVES = 4096


def draw_negatives(union_U: Tensor, vocab_size: int, num_negatives: int = _NUM_NEGATIVES) -> tuple[Tensor, Tensor]:
    """Uniform draws from the vocabulary that stand for all tokens outside a union, and the logarithms of their weights.

    Each counts V / num_negatives times, and 0 times if it is in the union, so that a log-normaliser over the union and
    the draws is that of an unbiased estimate of the whole normaliser. Draws come from torch's global generator.
    Source: importance-sampled softmax (Bengio and Senécal 2008).

    Returns:
        int64 and float [num_negatives].
    """
    drawn = torch.randint(vocab_size, (num_negatives,), device=union_U.device)
    log_weight = torch.full((num_negatives,), math.log(vocab_size / num_negatives), device=union_U.device)
    return drawn, log_weight.masked_fill(_members(union_U, vocab_size)[drawn], -torch.inf)


def _members(ids_U: Tensor, vocab_size: int) -> Tensor:
    """Whether each token of the vocabulary is one of some, bool [V]."""
    members_V = torch.zeros(vocab_size, dtype=torch.bool, device=ids_U.device)
    members_V[ids_U] = True
    return members_V


def student_statistics(
    hidden_ND: Tensor,
    head: OutputHead,
    *,
    offsets: Tensor,
    action_ids_M: Tensor,
    taken_N: Tensor,
    support: Support | None,
    q_max: bool = False,
    kernel: Literal["candidates", "reference"] = "candidates",
) -> dict[str, Tensor | None]:
    """The student's part of :class:`ActionStats`.

    Args:
        hidden_ND: last hidden states of the packed positions, [N, D].
        head: output head.
        offsets: int64 [N + 1], see ActionStats.
        action_ids_M: int64 [M] tokens of the sets.
        taken_N: int64 [N] token taken; any valid id where no action is taken.
        support: tokens of the log-normaliser, see :func:`draw_negatives`; None for no normaliser.
        q_max: whether to return the largest logit over the vocabulary.
        kernel: ``candidates`` forms only what is asked for; ``reference`` forms the dense [N, V] logits.
    Returns:
        ``q_M`` [M], ``q_taken_N`` [N], ``log_normaliser_N`` [N] or None and ``q_max_N`` [N] or None; at least float32.
    """
    num_rows = len(hidden_ND)
    all_rows = torch.arange(num_rows, device=hidden_ND.device)
    rows_M = torch.repeat_interleave(all_rows, offsets.diff(), output_size=len(action_ids_M))
    union_U = torch.unique(action_ids_M) if support in ("union", "negatives") else None
    draws = None
    if union_U is not None and support == "negatives":
        draws = draw_negatives(union_U, len(head.weight_VD))

    if kernel == "reference":
        logits_NV = head.logits(hidden_ND)
        parts = [logits_NV if union_U is None else logits_NV[:, union_U]]
        if draws is not None:
            drawn, log_weight = draws
            parts.append(logits_NV[:, drawn] + log_weight)
        normaliser = None if support is None else torch.cat(parts, -1).logsumexp(-1)
        q_M, q_taken_N = logits_NV[rows_M, action_ids_M], logits_NV[all_rows, taken_N]
    else:
        # Each position lists its set and then the token taken, so that one product serves both.
        slot_at_M, taken_at_N = torch.arange(len(rows_M), device=rows_M.device) + rows_M, offsets[1:] + all_rows
        listed = action_ids_M.new_empty(len(action_ids_M) + num_rows)
        listed[slot_at_M], listed[taken_at_N] = action_ids_M, taken_N
        bounds = torch.cat([offsets[:1], taken_at_N + 1])
        if support is None:
            normaliser, pairs = None, pair_logits(hidden_ND, head, bounds, listed)
        elif union_U is None:
            normaliser, pairs = normaliser_and_pairs(hidden_ND, head, bounds, listed)
        else:
            ids_U, columns = torch.unique(listed, return_inverse=True)
            # A token that was taken but is in no set has a column that the normaliser does not see.
            outside_U = ~_members(union_U, len(head.weight_VD))[ids_U]
            log_weight_U = torch.zeros(len(ids_U), device=ids_U.device).masked_fill(outside_U, -torch.inf)
            if draws is not None:
                drawn, log_weight = draws
                ids_U, log_weight_U = torch.cat([ids_U, drawn]), torch.cat([log_weight_U, log_weight])
            normaliser, pairs = normaliser_and_pairs(hidden_ND, head.select(ids_U), bounds, columns, log_weight_U)
        q_M, q_taken_N = pairs[slot_at_M], pairs[taken_at_N]
    # The largest is found without gradient, a chunk at a time, and then formed like any other pair.
    q_max_N = None
    if q_max:
        top_N = normaliser_and_argmax(hidden_ND, head)[1]
        q_max_N = pair_logits(hidden_ND, head, torch.arange(num_rows + 1, device=top_N.device), top_N)
    return {"q_M": q_M, "q_taken_N": q_taken_N, "log_normaliser_N": normaliser, "q_max_N": q_max_N}
