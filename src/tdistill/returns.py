"""Soft values, residuals and returns over packed positions: O(N) work, no loop over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdistill.types import ActionStats, Ends, widest


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


def discounted_sum(x_N: Tensor, factor_N: Tensor) -> Tensor:
    """Backward linear recurrence over all rows.

    G_n = x_n + f_n G_{n+1},  G_N = 0. A factor of 0 ends an episode.

    Rows are combined in pairs, the half as many pairs are solved in the same way, and the odd rows follow from them:
    2N additions and a depth of log₂ N.  Source: odd-even reduction (Hockney 1965; Blelloch 1990).

    Args:
        x_N: float [N].
        factor_N: float [N].
    Returns:
        float [N], in the units of x.
    """
    if len(x_N) <= 1:
        return x_N
    if len(x_N) % 2:
        zero = x_N.new_zeros(1)
        return discounted_sum(torch.cat([x_N, zero]), torch.cat([factor_N, zero]))[:-1]
    (x_even, x_odd), (f_even, f_odd) = x_N.view(-1, 2).unbind(1), factor_N.view(-1, 2).unbind(1)
    even = discounted_sum(x_even + f_even * x_odd, f_even * f_odd)
    odd = x_odd + f_odd * torch.cat([even[1:], even.new_zeros(1)])
    return torch.stack([even, odd], dim=1).flatten()


class Windows(NamedTuple):
    """For each row, the run of transitions from it on that a multi-step quantity may use.

    Attributes:
        uses_N: bool; the row's transition can be used: it has an action and the state after it has a known value.
        steps_N: int64; usable transitions from the row on, at most the number asked for, 0 where ``uses_N`` is false.
        end_row_N: int64; row of the state after the last of them (the row itself where steps is 0).
        ends_alive_N: bool; that state has a value, which is the value of ``end_row_N``; false after termination.
    """

    uses_N: Tensor
    steps_N: Tensor
    end_row_N: Tensor
    ends_alive_N: Tensor


def windows(stats: ActionStats, num_steps: int | None) -> Windows:
    """Longest runs of at most ``num_steps`` transitions (None: to the end of the episode).

    A run stops at termination, at the bootstrap row of a truncated episode, before a transition that was dropped (its
    state still has a value), and before a last transition whose next state was not recorded.
    """
    num_rows = len(stats.ends_N)
    row_N = torch.arange(num_rows, device=stats.ends_N.device)
    uses_N = stats.has_action_N & (stats.ends_N != Ends.TRUNCATED)
    terminal_N = uses_N & (stats.ends_N == Ends.TERMINAL)
    # First row at or after this one at which a run stops: there it cannot act, or acts for the last time.
    stop_N = torch.where(~uses_N | terminal_N, row_N, num_rows).flip(0).cummin(0).values.flip(0)
    last_N = stop_N.clamp(max=max(num_rows - 1, 0))
    steps_N = stop_N - row_N + terminal_N[last_N].long()
    if num_steps is not None:
        steps_N = steps_N.clamp(max=num_steps)
    end_N = row_N + steps_N
    alive_N = (end_N <= stop_N) & (steps_N > 0)
    return Windows(uses_N, steps_N, torch.where(alive_N, end_N, row_N), alive_N)


def n_step_return(reward_N: Tensor, value_N: Tensor, stats: ActionStats, gamma: float, num_steps: int | None) -> Tensor:
    """Discounted sum of up to n rewards and the value of the state after them.

    G_t = Σ_{i<k} γ^i r_{t+i} + γ^k V(s_{t+k}),  k = min(n, transitions left).  V = 0 after termination.
    Source: Sutton and Barto, Reinforcement Learning, 2nd ed., eq. 7.1.

    Args:
        reward_N: reward of each transition, nats; not read where the transition cannot be used.
        value_N: value of each state, nats.
        stats: episodes.
        gamma: discount in [0, 1].
        num_steps: n ≥ 1, or None for the whole episode (Monte Carlo).
    Returns:
        float [N]; 0 where :class:`Windows` uses no transition.
    Reduces to: r + γV(s') when n = 1.
    """
    run = windows(stats, num_steps)
    if num_steps == 1:
        # No sums over the rest of the episode: nothing later can round this away, and no float64 is needed.
        following_N, _ = next_value(value_N, stats)
        return torch.where(run.uses_N, reward_N + gamma * following_N, torch.zeros_like(value_N))
    # In float64 where there is one: a window is the difference of two sums over the rest of the episode.
    wide = widest(value_N.device)
    reward_N, values_N = torch.where(run.uses_N, reward_N, torch.zeros_like(reward_N)).to(wide), value_N.to(wide)
    goes_on_N = run.uses_N & (stats.ends_N == Ends.NEXT)
    whole_N = discounted_sum(reward_N, gamma * goes_on_N.to(wide))
    discount_N = torch.as_tensor(gamma, dtype=wide, device=values_N.device) ** run.steps_N
    tail_N = torch.where(run.ends_alive_N, (values_N - whole_N)[run.end_row_N], torch.zeros_like(values_N))
    return torch.where(run.uses_N, whole_N + discount_N * tail_N, torch.zeros_like(whole_N)).to(value_N.dtype)


def lambda_return(reward_N: Tensor, value_N: Tensor, stats: ActionStats, gamma: float, lam: float) -> Tensor:
    """Exponential mixture of all n-step returns.

    G^λ_t = r_t + γ [(1 − λ) V(s_{t+1}) + λ G^λ_{t+1}]; at the end of a run G^λ of its last state is V.
    Source: Sutton and Barto, Reinforcement Learning, 2nd ed., eq. 12.18.

    Args:
        reward_N: reward of each transition, nats; not read where the transition cannot be used.
        value_N: value of each state, nats.
        stats: episodes.
        gamma: discount in [0, 1].
        lam: λ in [0, 1].
    Returns:
        float [N]; 0 where :class:`Windows` uses no transition.
    Reduces to: the one-step return when λ = 0, the Monte Carlo return when λ = 1.
    """
    uses_N = windows(stats, 1).uses_N
    goes_on_N = uses_N & (stats.ends_N == Ends.NEXT)
    next_uses_N = torch.cat([uses_N[1:], uses_N.new_zeros(1)])
    following_N, _ = next_value(value_N, stats)
    # Where the run stops at the next state, all of the weight is on its value.
    mixes_N = (goes_on_N & next_uses_N).to(torch.promote_types(value_N.dtype, torch.float32))
    base_N = torch.where(uses_N, reward_N + gamma * (1 - lam * mixes_N) * following_N, torch.zeros_like(value_N))
    return discounted_sum(base_N, gamma * lam * mixes_N)


def consistency_residual(
    reward_N: Tensor, value_N: Tensor, stats: ActionStats, gamma: float, num_steps: int = 1
) -> tuple[Tensor, Tensor]:
    """d-step path-consistency residual.

    δ_t = Σ_{i<k} γ^i r_{t+i} + V(s_t) − γ^k V(s_{t+k}),  k = min(d, transitions left).  V = 0 after termination.
    Source: Nachum et al. 2017 (arXiv 1702.08892), eq. 15, with the sign of the rewards turned.

    Args:
        reward_N: what each transition adds, nats (log π_p of the action; or its difference from the teacher's).
        value_N: value of each state, nats.
        stats: episodes.
        gamma: discount in [0, 1].
        num_steps: d ≥ 1.
    Returns:
        float [N], 0 where unknown, and bool [N] where it is known.
    Reduces to: r + V(s) − γV(s') when d = 1.
    """
    returned_N = n_step_return(reward_N, -value_N, stats, gamma, num_steps)
    known_N = windows(stats, 1).uses_N
    return torch.where(known_N, returned_N + value_N, torch.zeros_like(value_N)), known_N


def teacher_probs(stats: ActionStats) -> tuple[Tensor, Tensor]:
    """Projected teacher probabilities and the covered mass.

    proj_p π(a|s) = π(a|s) / Z(s) on A_p(s), Z(s) = Σ_{b ∈ A_p(s)} π(b|s).  Source: arXiv 2505.20335, §3.

    Returns:
        float [M] and float [N] (0 for an empty row).
    """
    probs_M = stats.log_prob_teacher_M.exp()
    mass_N = sum_over_sets(probs_M, stats.offsets)
    return probs_M / mass_N[slot_rows(stats.offsets, len(probs_M))], mass_N
