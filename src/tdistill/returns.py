"""Soft values and recovered rewards over packed positions."""

from __future__ import annotations

import torch
from torch import Tensor

from tdistill.types import ActionStats, Ends


def slot_rows(offsets: Tensor, num_slots: int) -> Tensor:
    """Row of each slot, int64 [M]."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=num_slots)


def sum_over_sets(values_M: Tensor, offsets: Tensor) -> Tensor:
    """Σ over the slots of each row, [N]; 0 for an empty row."""
    return values_M.new_zeros(len(offsets) - 1).index_add(0, slot_rows(offsets, len(values_M)), values_M)


def max_over_sets(values_M: Tensor, offsets: Tensor) -> Tensor:
    """Maximum over the slots of each row, [N]; 0 for an empty row. Ties share the gradient."""
    out = values_M.new_zeros(len(offsets) - 1)
    rows = slot_rows(offsets, len(values_M))
    return out.scatter_reduce(0, rows, values_M, "amax", include_self=False)


def soft_value(q_M: Tensor, offsets: Tensor) -> Tensor:
    """Soft value of a state on its action set.

    V_p(s) = log Σ_{a ∈ A_p(s)} exp Q(s, a).  Source: arXiv 2505.20335, §3.

    Args:
        q_M: soft Q-values, nats, float [M].
        offsets: int64 [N + 1].
    Returns:
        float [N], nats; 0 for an empty row.
    """
    rows = slot_rows(offsets, len(q_M))
    shift_N = max_over_sets(q_M.detach(), offsets)
    total_N = sum_over_sets(torch.exp(q_M - shift_N[rows]), offsets)
    # An empty row has no value; 1 keeps its logarithm and gradient finite.
    return shift_N + torch.log(torch.where(offsets.diff() > 0, total_N, torch.ones_like(total_N)))


def next_value(value_N: Tensor, stats: ActionStats) -> tuple[Tensor, Tensor]:
    """Value of the state after each transition, and where it is known.

    V(s') is the next row's value, 0 after termination, and unknown where a sequence was cut without a bootstrap row.

    Returns:
        float [N] (0 where unknown) and bool [N].
    """
    shifted = torch.cat([value_N[1:], value_N.new_zeros(1)])
    goes_on = stats.ends_N == Ends.NEXT
    known = stats.ends_N != Ends.TRUNCATED
    return torch.where(goes_on, shifted, torch.zeros_like(shifted)), known


def teacher_probs(stats: ActionStats) -> tuple[Tensor, Tensor]:
    """Projected teacher probabilities and the covered mass.

    proj_p π(a|s) = π(a|s) / Z(s) on A_p(s), Z(s) = Σ_{b ∈ A_p(s)} π(b|s).  Source: arXiv 2505.20335, §3.

    Returns:
        float [M] and float [N] (0 for an empty row).
    """
    probs_M = stats.log_prob_teacher_M.exp()
    mass_N = sum_over_sets(probs_M, stats.offsets)
    return probs_M / mass_N[slot_rows(stats.offsets, len(probs_M))], mass_N
