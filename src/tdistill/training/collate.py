"""Trajectories → one packed micro-batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tdistill.actions import budget_sizes, nested_sizes, set_loss_nats
from tdistill.types import ActionSets, Ends, Trajectory

# Field → its place in ActionStats; these travel unchanged from the collator to the objective.
STATS_FIELDS = (
    "offsets",
    "log_prob_teacher_M",
    "added_M",
    "log_prob_taken_teacher_N",
    "teacher_log_sum_exp_N",
    "from_student_N",
    "log_prob_sampled_N",
    "sequence_N",
    "has_action_N",
    "ends_N",
)


@dataclass(frozen=True)
class PlainText:
    """Plain text for the language-modelling term: token sequences, and how many to add to a micro-batch."""

    sequences: Sequence[np.ndarray]
    per_batch: int = 1


@dataclass(frozen=True)
class PackedCollator:
    """Collate trajectories into padded input ids and packed, ragged positions.

    At p < p_max a sampled transition whose token is not in A_p is dropped: its row stays as the next state of the row
    before it. For a given answer, or one of the student's own, the taken token is added to the set instead. Both are
    counted. An objective that does not read the token taken can keep the sampled transitions as they are.
    Source: arXiv 2505.20335, §3; sets nest, trajectories do not.

    Attributes:
        pad_token_id: any id; padded places are masked out of attention and have no positions.
        p: mass of the sets, or None for the sets as stored.
        budget: (nats, gamma), or None. Each state keeps the smallest set such that the discounted sum of −log Z along
            its trajectory stays within the nats (:func:`~tdistill.actions.budget_sizes`); instead of p.
        keep_outside: keep sampled transitions whose token is not in A_p.
        scored: (p_max, cap) that the student's own answers were scored at: a taken token beyond those sets was added to
            them, which off-support control is to know. None: no answers of the student, or sets that are not listed.
        text: plain text to append, or None. Which sequences is a function of the trajectories of the batch alone.
    """

    pad_token_id: int
    p: float | None = None
    budget: tuple[float, float] | None = None
    text: PlainText | None = None
    seed: int = field(default=0)
    keep_outside: bool = False
    scored: tuple[float, int | None] | None = None

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask [B, T], position_index_N into their flattened form, and packed fields."""
        texts = self._choose_text(trajectories)
        rows = [np.concatenate([t.prompt_ids, t.response_ids]) for t in trajectories] + texts
        width = max(len(row) for row in rows)
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            input_ids[b, : len(row)], mask[b, : len(row)] = row, 1

        packed = self._pack(trajectories, width)
        text_at = [(len(trajectories) + i) * width + np.arange(len(t) - 1) for i, t in enumerate(texts)]
        packed["text_index_L"] = np.concatenate([*text_at, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        packed["text_target_L"] = np.concatenate([*(t[1:] for t in texts), np.zeros(0, dtype=np.int64)]).astype(
            np.int64
        )
        tensors = {name: torch.as_tensor(values) for name, values in packed.items()}
        return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask), **tensors}

    def _pack(self, trajectories: Sequence[Trajectory], width: int) -> dict[str, np.ndarray]:
        """Fields of all rows at once; B sequences of input ids are ``width`` apart."""
        sets = [t.sets for t in trajectories]
        rows_B = np.array([len(own) for own in sets])
        num_taken_B = np.array([len(t.response_ids) for t in trajectories])
        last_B = np.cumsum(rows_B) - 1
        sequence_N = np.repeat(np.arange(len(trajectories)), rows_B)
        rank_N = np.arange(len(sequence_N)) - np.repeat(last_B + 1 - rows_B, rows_B)
        acts_N = rank_N < num_taken_B[sequence_N]
        taken_N = np.zeros(len(sequence_N), dtype=np.int64)
        taken_N[acts_N] = np.concatenate([t.response_ids for t in trajectories])
        log_prob_sampled_N = np.zeros(len(sequence_N), dtype=np.float32)
        log_prob_sampled_N[acts_N] = np.concatenate(
            [
                np.zeros(len(t.response_ids)) if t.log_probs_sampled is None else t.log_probs_sampled
                for t in trajectories
            ]
        )

        stored_N = np.concatenate([np.diff(own.offsets) for own in sets])
        ids_M = np.concatenate([own.ids for own in sets])
        log_probs_M = np.concatenate([own.log_probs for own in sets])
        row_M = np.repeat(np.arange(len(sequence_N)), stored_N)
        # −1 is no token: a row that takes none has none in its set.
        taken_M = np.flatnonzero(ids_M == np.where(acts_N, taken_N, -1)[row_M])
        log_prob_taken_N = np.bincount(row_M[taken_M], log_probs_M[taken_M], minlength=len(sequence_N))
        student_N = np.array([t.source == "student" for t in trajectories])[sequence_N]
        place_M = np.arange(len(ids_M)) - (np.cumsum(stored_N) - stored_N)[row_M]
        added_M = np.zeros(len(ids_M), dtype=bool)
        if self.scored is not None:
            p_max, cap = self.scored
            own_N = np.minimum(np.concatenate([nested_sizes(own, p_max) for own in sets]), cap or len(ids_M))
            added_M[taken_M] = student_N[row_M[taken_M]] & (place_M[taken_M] >= own_N[row_M[taken_M]])
        dropped_N = added_N = np.zeros(len(sequence_N), dtype=bool)
        num_over_budget = 0
        if self.p is not None or self.budget is not None:
            sizes_N, num_over_budget = self._sizes(sets)
            keep_M = place_M < sizes_N[row_M]
            inside_N = np.zeros(len(sequence_N), dtype=bool)
            inside_N[row_M[taken_M[keep_M[taken_M]]]] = True
            # Without lists a set is the whole vocabulary, and nothing is outside.
            listed_N = np.array([len(own.ids) > 0 for own in sets])[sequence_N]
            outside_N = acts_N & listed_N & ~inside_N
            sampled_N = np.array([t.source == "teacher" for t in trajectories])[sequence_N]
            dropped_N, added_N = outside_N & sampled_N, outside_N & ~sampled_N
            if self.keep_outside:
                dropped_N = np.zeros_like(dropped_N)
            acts_N = acts_N & ~dropped_N
            added_M[taken_M] |= (added_N & student_N)[row_M[taken_M]]
            keep_M[taken_M[~sampled_N[row_M[taken_M]]]] = True
            stored_N = np.bincount(row_M[keep_M], minlength=len(sequence_N))
            ids_M, log_probs_M, added_M = ids_M[keep_M], log_probs_M[keep_M], added_M[keep_M]
        ends_N = np.full(len(sequence_N), Ends.NEXT, dtype=np.int64)
        ends_N[last_B] = [Ends.TERMINAL if t.ends == "terminal" else Ends.TRUNCATED for t in trajectories]
        first_B = np.arange(len(trajectories)) * width + [len(t.prompt_ids) - 1 for t in trajectories]
        return {
            "position_index_N": first_B[sequence_N] + rank_N,
            "offsets": np.concatenate([[0], np.cumsum(stored_N)]),
            "action_ids_M": ids_M.astype(np.int64),
            "log_prob_teacher_M": log_probs_M,
            "log_prob_taken_teacher_N": np.where(acts_N, log_prob_taken_N, 0.0).astype(np.float32),
            "teacher_log_sum_exp_N": np.concatenate([own.log_sum_exp for own in sets]),
            "added_M": added_M,
            "from_student_N": student_N,
            "log_prob_sampled_N": log_prob_sampled_N,
            "taken_N": taken_N,
            "sequence_N": sequence_N,
            "has_action_N": acts_N,
            "ends_N": ends_N,
            "dropped_N": dropped_N,
            "added_N": added_N,
            "num_over_budget": np.asarray(num_over_budget),
        }

    def _sizes(self, sets: Sequence[ActionSets]) -> tuple[np.ndarray, int]:
        """Sizes of the sets that are kept, int64 [N], and for how many trajectories the stored ones lose too much."""
        if self.budget is None:
            assert self.p is not None
            return np.concatenate([nested_sizes(own, self.p) for own in sets]), 0
        nats, gamma = self.budget
        sizes_N = np.concatenate([budget_sizes(own, nats, gamma) for own in sets])
        over = [set_loss_nats(own, np.diff(own.offsets), gamma) > nats for own in sets]
        return sizes_N, sum(over)

    def _choose_text(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        if self.text is None:
            return []
        names = "\n".join(f"{t.prompt_id} {t.answer_index}" for t in trajectories)
        rng = np.random.default_rng([self.seed, zlib.crc32(names.encode())])
        chosen = rng.integers(len(self.text.sequences), size=self.text.per_batch)
        return [self.text.sequences[i] for i in chosen]
