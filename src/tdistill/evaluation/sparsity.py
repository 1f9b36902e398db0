"""How sparse the teacher is, and what each choice of p, cap or budget keeps, from a store alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from tdistill.actions import budget_sizes, check_budget, kappa, nested_sizes, prefix_mass, set_loss_nats
from tdistill.errors import StoreError
from tdistill.store import Store
from tdistill.store.codes import quantisation_error
from tdistill.store.schema import arrow_schema
from tdistill.types import ActionSets, Trajectory

_RANKS = (1, 2, 3, 5, 7, 10, 20, 50)
_MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
_STUDY_MASSES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_SMALLEST_CAP = 8
_SECOND_BIN_STOP = 4
_NUM_BUDGETS = 6
# Share of the largest budget: where the stored sets lose nothing, a geometric grid has to begin above 0.
_SMALLEST_BUDGET = 1e-3


def sparsity(store: Store, max_trajectories: int = 2000) -> dict[str, Any] | None:
    """Mean mass of the top k tokens, and sizes of A_p, over the stored states.

    Only what the store holds whole is reported: k up to the cap, and p up to p_max. A size at the cap stands for
    "at least"; the share of such states is given. Tokens that were added to the sets of given answers are not counted.

    Args:
        store: any store with sets.
        max_trajectories: how many trajectories are read, from the first.
    Returns:
        ``num_states``, ``top_k_mass``, ``set_size`` and ``note``; None for a store at p_max = 1, which has no sets.
    """
    return None if store.p_max == 1.0 else _sets_part(_Sample.read(store, max_trajectories), _MASSES)


def check_has_sets(store: Store) -> None:
    """Raise StoreError for a store at p_max = 1."""
    if store.p_max == 1.0:
        raise StoreError(
            f"{store.path} was captured at p_max = 1, which keeps no action sets, so it does not say how large they "
            "are. Capture with p_max below 1, such as capture.p_max=0.95."
        )


def sparsity_study(
    store: Store,
    gamma: float = 0.99,
    budgets_nats: Sequence[float] | None = None,
    max_trajectories: int = 2000,
) -> dict[str, Any]:
    """What a user needs to choose p, or a budget, and a cap.

    On every trajectory, with Z(s) the teacher mass of the set in use: the estimate Σ_{k≥1} −γ^k log Z(s_k) of
    Q* − Q̄^{proj_p π*} at its first transition, beside the bound κ(p) = −γ/(1−γ) · log p; and Σ_{t≥0} −γ^t log Z(s_t),
    the loss of its first state's value, which a budget limits.  Source: arXiv 2505.20335 (A_p, κ); the sums are
    derived, see :func:`~tdistill.actions.set_loss_nats`.
    Differs from the source: the estimates are over trajectories of the teacher truncated at p_max, or over given
    answers, not over those of proj_p π*.

    Args:
        store: any store with sets.
        gamma: discount, in [0, 1].
        budgets_nats: losses in nats, each positive; None for six in geometric steps, from the median loss on the
            stored sets to that on the most probable token alone.
        max_trajectories: how many trajectories are read, from the first.
    Returns:
        A JSON object: ``top_k_mass`` and ``set_size`` as :func:`sparsity`; ``by_p`` (each p up to p_max, at the store's
        cap), ``by_cap`` (each p and each cap up to the store's), ``by_budget``, ``by_position``, ``bytes``, ``notes``.
        A row holds ``size``, ``covered_mass``, ``q_loss_nats`` (k ≥ 1), ``v_loss_nats`` (t ≥ 0),
        ``tokens_outside_share`` (taken tokens that are not in the set) and ``bytes_per_token`` (uncompressed,
        without the prompts). ``kappa_nats`` is None where the bound is infinite.
    Raises:
        StoreError: the store is at p_max = 1, which keeps no sets.
        DomainError: gamma or a budget outside its domain.
    """
    check_has_sets(store)
    for budget in budgets_nats or ():
        check_budget(budget)
    kappas = {p: kappa(p, gamma) for p in _masses(store.p_max, _STUDY_MASSES)}
    sample = _Sample.read(store, max_trajectories)
    by_p, by_cap, by_position = [], [], []
    for p, bound in kappas.items():
        sizes_S = sample.sizes(p)
        sizes_KS = np.stack([sizes_S if cap is None else np.minimum(sizes_S, cap) for cap in sample.caps])
        for cap, capped_S, mass_S in zip(sample.caps, sizes_KS, sample.masses(sizes_KS), strict=True):
            # A recorded mass is rounded to float32, and so has p to be.
            missed = float(((capped_S == cap) & (mass_S < float(np.float32(p)))).mean()) if cap else 0.0
            by_cap.append({"p": p, "cap": cap, **sample.row(capped_S, mass_S, gamma), "cut_share": missed})
        by_p.append({**by_cap[-1], "kappa_nats": bound if math.isfinite(bound) else None})
        by_position += [{"p": p, **bin_row} for bin_row in _by_position(sizes_S, sample.position_S)]
    least = np.array([set_loss_nats(sets, np.diff(sets.offsets), gamma) for sets in sample.sets])
    if budgets_nats is None:
        most = [set_loss_nats(sets, np.ones(len(sets), dtype=np.int64), gamma) for sets in sample.sets]
        budgets_nats = _budgets(float(np.median(least)), float(np.median(most)))
    by_budget = []
    for budget in budgets_nats:
        sizes_S = np.concatenate([budget_sizes(sets, budget, gamma) for sets in sample.sets])
        row = sample.row(sizes_S, sample.masses(sizes_S[None])[0], gamma)
        by_budget.append({"budget_nats": budget, **row, "unmet_share": float((least > budget).mean())})
    part = _sets_part(sample, _STUDY_MASSES)
    note = part.pop("note")
    return {
        "p_max": store.p_max,
        "cap": sample.cap,
        "gamma": gamma,
        "mode": store.identity["mode"],
        "num_trajectories": len(sample.sets),
        "num_stored_trajectories": len(store),
        "truncated_share": sample.truncated_share,
        **part,
        "by_p": by_p,
        "by_cap": by_cap,
        "by_budget": by_budget,
        "by_position": by_position,
        "bytes": {
            **sample.widths,
            "prompts_per_token": sample.prompt_bytes_per_token,
            "on_disk_per_token": store.manifest["totals"]["bytes"] / store.total_response_tokens,
        },
        "notes": [note, *_notes(store, sample)],
    }


@dataclass(frozen=True)
class _Sample:
    """Sets of the trajectories that are read; arrays over their S states, one trajectory after another."""

    p_max: float
    cap: int | None
    sets: list[ActionSets]
    stored_S: np.ndarray
    position_S: np.ndarray
    rank_S: np.ndarray
    """Slots before the taken token; as many as the set has where it is not in it; −1 where no token was taken."""
    widths: dict[str, int]
    prompt_bytes_per_token: float
    truncated_share: float
    log_prob_bits: int

    @classmethod
    def read(cls, store: Store, max_trajectories: int) -> _Sample:
        cap, bits = store.identity["sampling"]["max_actions"], store.identity["log_prob_bits"]
        lists = [field for field in arrow_schema(bits) if pa.types.is_list(field.type)]
        width = {field.name: field.type.value_type.bit_width // 8 for field in lists}
        trajectories = [store[i] for i in range(min(len(store), max_trajectories))]
        sets = [_without_added(t, store.p_max, cap) for t in trajectories]
        num_prompt_tokens = sum(len(t.prompt_ids) for t in trajectories)
        num_response_tokens = sum(len(t.response_ids) for t in trajectories)
        return cls(
            p_max=store.p_max,
            cap=cap,
            sets=sets,
            stored_S=np.concatenate([np.diff(own.offsets) for own in sets]),
            position_S=np.concatenate([np.arange(len(own)) for own in sets]),
            rank_S=np.concatenate([_taken_ranks(t, own) for t, own in zip(trajectories, sets, strict=True)]),
            widths={
                "per_action_slot": width["set_ids"] + width["set_log_probs"],
                "per_state": sum(
                    width[name] for name in ("set_sizes", "set_tops", "last_log_probs", "covered_mass", "log_sum_exp")
                ),
                "per_response_token": width["taken_slots"],
            },
            prompt_bytes_per_token=width["prompt_ids"] * num_prompt_tokens / num_response_tokens,
            truncated_share=float(np.mean([t.ends == "truncated" for t in trajectories])),
            log_prob_bits=bits,
        )

    @property
    def starts(self) -> np.ndarray:
        """First state of each trajectory."""
        return np.flatnonzero(self.position_S == 0)

    @property
    def caps(self) -> list[int | None]:
        """Doubling caps below the store's own, which stands last; without one, below the largest set."""
        largest = int(self.stored_S.max()) if self.cap is None else self.cap
        num_smaller = max(0, math.ceil(math.log2(largest / _SMALLEST_CAP)))
        return [*(_SMALLEST_CAP * 2**i for i in range(num_smaller)), self.cap]

    def sizes(self, p: float) -> np.ndarray:
        """Sizes of A_p; at p_max those stored, which were cut by the exact probabilities."""
        return self.stored_S if p == self.p_max else np.concatenate([nested_sizes(sets, p) for sets in self.sets])

    def masses(self, sizes_KS: np.ndarray) -> np.ndarray:
        """Masses of K choices of prefixes, float64 [K, S]; of a whole set the exact one, as recorded."""
        parts = zip(self.sets, np.split(sizes_KS, self.starts[1:], axis=1), strict=True)
        recorded_S = np.concatenate([sets.covered_mass for sets in self.sets])
        mass_KS = np.concatenate([prefix_mass(sets, sizes) for sets, sizes in parts], axis=1)
        return np.where(sizes_KS == self.stored_S, recorded_S, mass_KS)

    def row(self, sizes_S: np.ndarray, mass_S: np.ndarray, gamma: float) -> dict[str, Any]:
        """What prefixes of these sizes keep, lose and cost."""
        loss_S = float(gamma) ** self.position_S * (0.0 - np.log(mass_S))
        v_loss = np.add.reduceat(loss_S, self.starts)
        took_S = self.rank_S >= 0
        num_tokens = int(took_S.sum())
        num_bytes = (
            self.widths["per_action_slot"] * int(sizes_S.sum())
            + self.widths["per_state"] * len(sizes_S)
            + self.widths["per_response_token"] * num_tokens
        )
        return {
            "size": _size(sizes_S),
            "covered_mass": _spread(mass_S),
            "q_loss_nats": _spread(v_loss - loss_S[self.starts]),
            "v_loss_nats": _spread(v_loss),
            "tokens_outside_share": float((self.rank_S >= sizes_S)[took_S].mean()),
            "bytes_per_token": num_bytes / num_tokens,
        }


def _sets_part(sample: _Sample, masses: Sequence[float]) -> dict[str, Any]:
    ranks = [k for k in _RANKS if sample.cap is None or k <= sample.cap]
    top = [prefix_mass(s, np.minimum(np.array(ranks)[:, None], np.diff(s.offsets))) for s in sample.sets]
    mass = np.concatenate(top, axis=1).mean(axis=1)
    rows = []
    for p in _masses(sample.p_max, masses):
        sizes_S = sample.sizes(p)
        at_cap = float((sizes_S == sample.cap).mean()) if sample.cap else 0.0
        rows.append({"p": p, **_size(sizes_S), "share_at_cap": at_cap})
    return {
        "num_states": len(sample.stored_S),
        "top_k_mass": [{"k": k, "mean": float(value)} for k, value in zip(ranks, mass, strict=True)],
        "set_size": rows,
        "note": f"From the store (p_max = {sample.p_max}, cap {sample.cap}): where a set is smaller than k, its whole "
        "mass counts for k, so the mass of large k is a lower bound.",
    }


def _masses(p_max: float, masses: Sequence[float]) -> list[float]:
    return sorted({*(p for p in masses if p < p_max), p_max})


def _without_added(trajectory: Trajectory, p_max: float, cap: int | None) -> ActionSets:
    """The teacher's sets: without the taken tokens that were added to those of given answers.

    An added token stands last, after slots that already reach p_max or the cap.
    """
    sets = trajectory.sets
    if trajectory.source == "teacher":
        return sets
    stored, own = np.diff(sets.offsets), nested_sizes(sets, p_max)
    if cap is not None:
        own = np.minimum(own, cap)
    last_is_taken = np.zeros(len(sets), dtype=bool)
    num_taken = len(trajectory.response_ids)
    last_is_taken[:num_taken] = sets.ids[sets.offsets[1 : num_taken + 1] - 1] == trajectory.response_ids
    added = last_is_taken & (own < stored)
    keep_M = np.ones(len(sets.ids), dtype=bool)
    keep_M[sets.offsets[1:][added] - 1] = False
    offsets = np.concatenate([[0], np.cumsum(stored - added)])
    return replace(sets, offsets=offsets, ids=sets.ids[keep_M], log_probs=sets.log_probs[keep_M])


def _taken_ranks(trajectory: Trajectory, sets: ActionSets) -> np.ndarray:
    num_taken, stored = len(trajectory.response_ids), np.diff(sets.offsets)
    row_M = np.repeat(np.arange(len(sets)), stored)
    taken = np.append(trajectory.response_ids, np.full(len(sets) - num_taken, -1))
    found = np.flatnonzero(sets.ids == taken[row_M])
    rank = stored.copy()
    rank[num_taken:] = -1
    rank[row_M[found]] = found - sets.offsets[row_M[found]]
    return rank


def _by_position(sizes_S: np.ndarray, position_S: np.ndarray) -> list[dict[str, Any]]:
    """Sizes in bins of positions 0, 1–3, 4–7, 8–15, … up to the last one there is."""
    end = int(position_S.max()) + 1
    edges = [0, 1]
    while edges[-1] < end:
        edges.append(max(_SECOND_BIN_STOP, 2 * edges[-1]))
    rows = []
    for first, stop in pairwise(edges):
        own = sizes_S[(position_S >= first) & (position_S < stop)]
        rows.append(
            {
                "first": first,
                "last": min(stop, end) - 1,
                "num_states": len(own),
                "mean": float(own.mean()),
                "median": float(np.median(own)),
            }
        )
    return rows


def _budgets(least: float, most: float) -> list[float]:
    """Budgets between the loss on all stored slots and on one of each set; none where even that loses nothing."""
    if most == 0.0:
        return []
    grid = np.geomspace(max(least, _SMALLEST_BUDGET * most), most, _NUM_BUDGETS)
    return list(dict.fromkeys(float(f"{budget:.2g}") for budget in grid))


def _size(sizes: np.ndarray) -> dict[str, Any]:
    return {"mean": float(sizes.mean()), **_percentiles(sizes, median=50, p99=99), "max": int(sizes.max())}


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean(dtype=np.float64)), **_percentiles(values, q25=25, median=50, q75=75)}


def _percentiles(values: np.ndarray, **percents: float) -> dict[str, float]:
    found = np.percentile(values, list(percents.values()))
    return {name: float(value) for name, value in zip(percents, found, strict=True)}


def _notes(store: Store, sample: _Sample) -> list[str]:
    if store.identity["mode"] == "generate":
        where = (
            f"the trajectories are samples of the teacher truncated at p_max = {store.p_max}, so that the mean "
            "estimates the expectation at p_max, and at no smaller set"
        )
    else:
        where = "the trajectories are given answers and no samples of the teacher, so that no expectation is estimated"
    return [
        "A size at the store's cap stands for at least as many; cut_share is the share of states whose mass a cap "
        "leaves below p, where kappa_nats is no bound.",
        f"q_loss_nats and v_loss_nats are estimates, not bounds: {where}. Quartiles are over trajectories.",
        f"{sample.truncated_share:.1%} of the trajectories are truncated: their sums miss the terms after the cut and "
        "are too small. kappa_nats is for answers of any length.",
        "tokens_outside_share: sampled transitions that training drops at this choice; of given answers, tokens that "
        "are added to the set.",
        "unmet_share: trajectories that lose more than the budget even on all stored slots, which are then kept.",
        f"Below p_max and for budgets, masses come from stored log-probabilities: each log Z within "
        f"{quantisation_error(sample.log_prob_bits):.2g} nats.",
        "bytes_per_token: uncompressed, by the columns of the store format, without prompts and file headers; "
        "on_disk_per_token: files of the whole store, compressed, with both.",
    ]
