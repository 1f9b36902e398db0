"""The reduced action space: top-p sets of the teacher's next-token distribution (method: arXiv 2505.20335, §3)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tdistill.errors import DomainError, ProbabilityRangeError
from tdistill.types import ActionSets, widest

# First guess for the number of candidates to sort; rows that need more are sorted again, alone, 8 times wider. One more
# than a usual cap: a row that the cap cuts is settled once the first value left out is seen to be smaller.
_FIRST_WIDTH = 65
_WIDENING = 8
# Tokens whose maximum stands for them all in the search for the largest ones.
_BLOCK = 16


def check_p(p: float, name: str = "p") -> None:
    """Raise ProbabilityRangeError unless 0 < p <= 1."""
    if not 0.0 < p <= 1.0:
        raise ProbabilityRangeError(f"{name} = {p} is outside (0, 1]. Use a probability such as 0.8, or 1 for all.")


def check_budget(budget_nats: float) -> None:
    """Raise DomainError unless 0 < budget_nats < ∞."""
    if not 0.0 < budget_nats < math.inf:
        raise DomainError(
            f"budget_nats = {budget_nats} is not positive and finite. Use a loss in nats; "
            "`tdistill check sparsity STORE` shows what budgets cost."
        )


def check_discount(gamma: float, name: str = "gamma") -> None:
    """Raise DomainError unless 0 <= gamma <= 1."""
    if not 0.0 <= gamma <= 1.0:
        raise DomainError(f"{name} = {gamma} is outside [0, 1]. The paper uses 0.99.")


def top_p_sets(logits_NV: Tensor, p: float, max_actions: int | None = None, temperature: float = 1.0) -> ActionSets:
    """Smallest sets of tokens, by falling probability, whose mass reaches p.

    A_p(s) = {a_1 … a_k}, k = min{j : Σ_{i≤j} π(a_i|s) ≥ p}, probabilities falling, ties by lower token id first.
    Source: arXiv 2505.20335, §3 (top-p candidate set).
    Differs from the source: the tie rule is fixed, and ``max_actions`` may cut a set.

    Args:
        logits_NV: teacher logits, float [N, V]; ``-inf`` marks tokens of probability 0.
        p: target mass, in (0, 1]. p = 1 lists every token of the vocabulary.
        max_actions: cap on the size of a set, or None.
        temperature: logits are divided by it first.
    Returns:
        :class:`ActionSets` of N states. ``covered_mass`` is Z(s), which is below p where the cap cut the set.
        Masses are summed in float64 (:func:`~tdistill.types.widest`); log-probabilities are computed in float32, or
        float64 for float64 logits.
    Raises:
        ProbabilityRangeError: p outside (0, 1].
    """
    check_p(p)
    work = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if temperature != 1.0:
        work = work / temperature
    num_rows, num_tokens = work.shape
    lse_N = torch.logsumexp(work, dim=-1)
    cap = num_tokens if max_actions is None else min(max_actions, num_tokens)

    pending = torch.arange(num_rows, device=work.device)
    width = num_tokens if p == 1.0 else min(_FIRST_WIDTH, cap + 1, num_tokens)
    row_parts: list[Tensor] = []
    id_parts: list[Tensor] = []
    log_prob_parts: list[Tensor] = []
    while len(pending) or not row_parts:  # one round even for no rows: it gives the empty parts their dtypes
        values, ids = _largest(work if len(pending) == num_rows else work[pending], width)
        # Ascending ids first, then a stable sort by value: equal values stay in order of their ids.
        ids, order = torch.sort(ids, dim=-1)
        values, order = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
        log_probs = values - lse_N[pending, None]
        mass = log_probs.to(widest(log_probs.device)).exp().cumsum(-1)
        size = (mass < p).sum(-1).add(1).clamp(max=cap) if p < 1.0 else torch.full_like(pending, cap)
        # Among values equal to the smallest one kept by topk, topk chose arbitrarily: such a row must be widened.
        last = size.clamp(max=width).sub(1)
        settled = (size <= width) & (values.gather(-1, last[:, None]).squeeze(-1) > values[:, -1])
        if width == num_tokens:
            settled, size = torch.ones_like(settled), size.clamp(max=num_tokens)
        keep = settled[:, None] & (torch.arange(width, device=work.device) < size[:, None])
        row_parts.append(pending[:, None].expand_as(keep)[keep])
        id_parts.append(ids[keep])
        log_prob_parts.append(log_probs[keep])
        pending, width = pending[~settled], min(width * _WIDENING, num_tokens)

    rows, ids, log_probs = torch.cat(row_parts), torch.cat(id_parts), torch.cat(log_prob_parts)
    order = torch.argsort(rows, stable=True)  # rows settled in different rounds go back to their places
    log_probs_M = log_probs[order].cpu().numpy()
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows.cpu().numpy(), minlength=num_rows))]).astype(np.int64)
    covered = np.add.reduceat(np.exp(log_probs_M.astype(np.float64)), offsets[:-1]) if num_rows else np.zeros(0)
    return ActionSets(
        offsets=offsets,
        ids=ids[order].cpu().numpy().astype(np.int32),
        log_probs=log_probs_M,
        covered_mass=np.minimum(covered, 1.0).astype(np.float32),
        log_sum_exp=lse_N.cpu().numpy(),
    )


def _largest(values_NV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest values of each row and their columns, in no order; among values equal to the last, any.

    They lie in the ``width`` blocks of largest maxima: each of these holds a value at least as large as all of the
    other blocks. Searching the maxima and then those blocks is faster than searching the row.
    """
    num_tokens = values_NV.shape[1]
    num_blocks = num_tokens // _BLOCK
    if width >= num_blocks:
        return torch.topk(values_NV, width, dim=-1, sorted=False)
    # Block b has the columns b, b + num_blocks, …: maxima over such blocks need no sums across neighbours.
    maxima_NJ = values_NV[:, : num_blocks * _BLOCK].unflatten(1, (_BLOCK, num_blocks)).amax(1)
    block_NW = torch.topk(maxima_NJ, width, dim=-1, sorted=False).indices
    start_K = torch.arange(_BLOCK, device=values_NV.device)[:, None] * num_blocks
    columns = (block_NW[:, None, :] + start_K).flatten(1)
    rest = torch.arange(num_blocks * _BLOCK, num_tokens, device=values_NV.device).expand(len(values_NV), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, at = torch.topk(values_NV.gather(1, columns), width, dim=-1, sorted=False)
    return values, columns.gather(1, at)


def sample_from_sets(sets: ActionSets, uniform_N: np.ndarray) -> np.ndarray:
    """Draw one token per state from proj_p π, by inverting the cumulative distribution at a given uniform number.

    proj_p π(a|s) = π(a|s)·1[a ∈ A_p(s)] / Z(s).  Source: arXiv 2505.20335, §3.

    Args:
        sets: action sets of N states, none of them empty.
        uniform_N: float64 [N], in [0, 1).
    Returns:
        int64 [N] token ids.
    """
    size_N = np.diff(sets.offsets)
    listed_NK = np.arange(size_N.max(initial=0)) < size_N[:, None]
    # Padded to the widest set with slots of mass 0, which leave the sums of a row as they are.
    mass_NK = np.zeros(listed_NK.shape)
    mass_NK[listed_NK] = np.exp(sets.log_probs.astype(np.float64))
    np.cumsum(mass_NK, axis=1, out=mass_NK)
    slot_N = (mass_NK <= uniform_N[:, None] * mass_NK[:, -1:]).sum(1)
    return sets.ids[sets.offsets[:-1] + np.minimum(slot_N, size_N - 1)].astype(np.int64)


def nested_sizes(sets: ActionSets, p: float) -> np.ndarray:
    """Sizes of the sets A_p inside stored sets A_{p_max}, p <= p_max: sets nest, so each is a prefix.

    Computed from the stored log-probabilities: where the cumulative mass of the exact ones comes within the store's
    rounding of p, the size differs, by several where the tokens there are unlikely ones. At the p of the store itself
    the trainer takes the sets as they are.

    Returns:
        int64 [R], at least 1 where the stored set is not empty.
    """
    check_p(p)
    mass = np.cumsum(np.exp(sets.log_probs.astype(np.float64)))
    before = np.concatenate([[0.0], mass])[sets.offsets[:-1]]
    # A slot belongs to A_p when the mass of the slots before it is below p.
    mass_before_M = mass - np.exp(sets.log_probs.astype(np.float64)) - np.repeat(before, np.diff(sets.offsets))
    inside = np.concatenate([[0], np.cumsum(mass_before_M < p)])
    return inside[sets.offsets[1:]] - inside[sets.offsets[:-1]]


def kappa(p: float, gamma: float) -> float:
    """Bound on the loss of value that comes from acting on A_p, for every teacher and state.

    κ(p) = −γ/(1−γ) · log p ≥ ‖Q* − Q̄*_p‖_∞ over supported actions, for a teacher that is soft-optimal for its reward.
    Source: arXiv 2505.20335 (bounds of the top-p soft Bellman operator).
    Differs from the source: nothing.

    Args:
        p: target mass, in (0, 1].
        gamma: discount, in [0, 1].
    Returns:
        Nats; 0 at p = 1, and infinite at γ = 1 below it.
    Raises:
        ProbabilityRangeError: p outside (0, 1].
        DomainError: gamma outside [0, 1].

    >>> round(kappa(0.8, 0.99), 2)
    22.09
    """
    check_p(p)
    check_discount(gamma)
    if p == 1.0:
        return 0.0
    return -gamma / (1.0 - gamma) * math.log(p) if gamma < 1.0 else math.inf


def prefix_mass(sets: ActionSets, sizes: np.ndarray) -> np.ndarray:
    """Teacher mass of the first slots of each set.

    Z(s) = Σ_{i ≤ size(s)} π(a_i|s), from the stored log-probabilities, at most 1. An empty set has mass 1: a store
    lists no slots only at p_max = 1, where every set is the whole vocabulary.

    Args:
        sets: action sets of R states.
        sizes: int [..., R], each from 0 to the size of its set.
    Returns:
        float64 [..., R]. log Z is off by at most half a quantisation step of the store.
    """
    mass = _cumulative_mass(sets)
    first_R = sets.offsets[:-1]
    mass_R = np.minimum(mass[first_R + sizes] - mass[first_R], 1.0)
    return np.where(np.diff(sets.offsets) > 0, mass_R, 1.0)


def set_loss_nats(sets: ActionSets, sizes: np.ndarray, gamma: float) -> float:
    """Discounted loss of value along one trajectory on prefixes of its sets.

    Σ_{t≥0} γ^t (−log Z(s_t)), with t counted from the first of the states.  Derived: the one-step loss in value is
    −log Z(s), so the expectation of this sum over trajectories of proj_p π* is V*(s_0) − V̄(s_0), V̄ the value of
    proj_p π* (arXiv 2505.20335, §3, for the operator). On one trajectory it is an estimate of that expectation; on
    one that was truncated the terms after the cut are missing, and all terms are at least 0.

    Args:
        sets: action sets of the R states of one trajectory.
        sizes: int64 [R], slots used of each set.
        gamma: discount, in [0, 1].
    Returns:
        Nats. 0 where the sets are empty (p_max = 1).
    Raises:
        DomainError: gamma outside [0, 1].
    """
    check_discount(gamma)
    return 0.0 - float(_discounts(len(sets), gamma) @ np.log(prefix_mass(sets, sizes)))


def budget_sizes(sets: ActionSets, budget_nats: float, gamma: float) -> np.ndarray:
    """Sizes of the smallest prefixes that keep a trajectory's loss of value within a budget.

    Minimises Σ_t k_t subject to Σ_t γ^t (−log Z_{k_t}(s_t)) ≤ budget and k_t ≥ 1, Z_k the mass of the first k slots.
    Derived; the loss is :func:`set_loss_nats`. It replaces the fixed mass p of arXiv 2505.20335, §3.

    Where even the stored sets lose more than the budget, all stored slots are kept; such a trajectory is found by
    ``set_loss_nats(sets, np.diff(sets.offsets), gamma) > budget_nats``. Among equal gains the earlier slot comes first.
    A token that was added to the set of a given answer is a slot like any other, the last one.

    Args:
        sets: action sets of the R states of one trajectory.
        budget_nats: largest loss, nats, above 0.
        gamma: discount, in [0, 1]. Later states weigh γ^t, so below 1 their sets get smaller.
    Returns:
        int64 [R]; at least 1 where the stored set is not empty. 0 where it is: at p_max = 1 a set is the whole
        vocabulary, which loses nothing and cannot be shortened.
    Raises:
        DomainError: budget_nats not positive and finite, or gamma outside [0, 1].
    """
    check_budget(budget_nats)
    check_discount(gamma)
    stored_R = np.diff(sets.offsets)
    if set_loss_nats(sets, stored_R, gamma) > budget_nats:
        return stored_R
    least_R = np.minimum(stored_R, 1)
    row_M = np.repeat(np.arange(len(sets)), stored_R)
    first_M = sets.offsets[row_M]
    mass = _cumulative_mass(sets)
    log_mass_M = np.log(np.minimum(mass[1:] - mass[first_M], 1.0))
    further = np.flatnonzero(np.arange(len(row_M)) > first_M)
    gain = _discounts(len(sets), gamma)[row_M[further]] * (log_mass_M[further] - log_mass_M[further - 1])
    # Optimal, and prefixes: log(1 + π_k / Z_{k−1}) falls with k, as π_k falls and Z_{k−1} rises, so the n largest gains
    # of all states together are those of n slots that continue each state's prefix, and no other n slots gain more.
    order = np.argsort(-gain, kind="stable")
    loss = set_loss_nats(sets, least_R, gamma) - np.concatenate([[0.0], np.cumsum(gain[order])])
    num_further = np.count_nonzero(loss > budget_nats)
    return least_R + np.bincount(row_M[further[order[:num_further]]], minlength=len(sets))


def _cumulative_mass(sets: ActionSets) -> np.ndarray:
    """Mass of all slots before each slot and after the last, float64 [M + 1]."""
    return np.concatenate([[0.0], np.cumsum(np.exp(sets.log_probs.astype(np.float64)))])


def _discounts(num_states: int, gamma: float) -> np.ndarray:
    return float(gamma) ** np.arange(num_states)
