"""The two kernels behind one signature: ``candidates`` for training, ``reference`` to judge it by."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdistill.head import OutputHead
from tdistill.kernels.candidates import pair_logits
from tdistill.kernels.chunked import log_normaliser, normaliser_and_argmax

Support = Literal["vocabulary", "union", "negatives"]

# Tokens drawn for ``negatives``: a normaliser over about a sixth of a vocabulary of 50,000, union included.
_NUM_NEGATIVES = 4096


def support_tokens(
    support: Support | None, listed_M: Tensor, vocab_size: int, num_negatives: int = _NUM_NEGATIVES
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens that a log-normaliser runs over, and the logarithms of their weights.

    ``union``: all listed tokens once. ``negatives``: those, and uniform draws from the vocabulary that stand for the
    rest, each with weight V / num_negatives (0 if it is listed): an unbiased estimate of the whole normaliser, with
    draws from torch's global generator.  Source: importance-sampled softmax (Bengio and Senécal 2008).

    Returns:
        int64 [U] and float [U]; None for the whole vocabulary, and None for weights of one.
    """
    if support is None or support == "vocabulary":
        return None, None
    ids_U = torch.unique(listed_M)
    if support == "union":
        return ids_U, None
    drawn = torch.randint(vocab_size, (num_negatives,), device=listed_M.device)
    log_weight = torch.full((num_negatives,), math.log(vocab_size / num_negatives), device=listed_M.device)
    log_weight[torch.isin(drawn, ids_U)] = -torch.inf
    return torch.cat([ids_U, drawn]), torch.cat([log_weight.new_zeros(len(ids_U)), log_weight])


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
        support: tokens of the log-normaliser, see :func:`support_tokens`; None for no normaliser.
        q_max: whether to return the largest logit over the vocabulary.
        kernel: ``candidates`` forms only what is asked for; ``reference`` forms the dense [N, V] logits.
    Returns:
        ``q_M`` [M], ``q_taken_N`` [N], ``log_normaliser_N`` [N] or None and ``q_max_N`` [N] or None; at least float32.
    """
    num_rows, num_slots = len(hidden_ND), len(action_ids_M)
    all_rows = torch.arange(num_rows, device=hidden_ND.device)
    rows_M = torch.repeat_interleave(all_rows, offsets.diff(), output_size=num_slots)
    ids_U, log_weight_U = support_tokens(support, action_ids_M, len(head.weight_VD))

    if kernel == "reference":
        logits_NV = head.logits(hidden_ND)
        supported = logits_NV if ids_U is None else logits_NV[:, ids_U]
        weighted = supported if log_weight_U is None else supported + log_weight_U
        normaliser = None if support is None else weighted.logsumexp(-1)
        q_M, q_taken_N = logits_NV[rows_M, action_ids_M], logits_NV[all_rows, taken_N]
    else:
        # One call for sets and taken tokens: one pass over the output matrix' gradient instead of two.
        pairs = pair_logits(hidden_ND, head, torch.cat([rows_M, all_rows]), torch.cat([action_ids_M, taken_N]))
        q_M, q_taken_N = pairs[:num_slots], pairs[num_slots:]
        support_head = head if ids_U is None else head.select(ids_U)
        normaliser = None if support is None else log_normaliser(hidden_ND, support_head, log_weight_U)
    # The largest is found without gradient, a chunk at a time, and then formed like any other pair.
    top_N = normaliser_and_argmax(hidden_ND, head)[1] if q_max else None
    q_max_N = None if top_N is None else pair_logits(hidden_ND, head, all_rows, top_N)
    return {"q_M": q_M, "q_taken_N": q_taken_N, "log_normaliser_N": normaliser, "q_max_N": q_max_N}
