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
    "log_prob_taken_teacher_N",
    "teacher_log_sum_exp_N",
    "from_student_N",
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
    counted.
    Source: arXiv 2505.20335, §3; sets nest, trajectories do not.

    Attributes:
        pad_token_id: any id; padded places are masked out of attention and have no positions.
        p: mass of the sets, or None for the sets as stored.
        budget: (nats, gamma), or None. Each state keeps the smallest set such that the discounted sum of −log Z along
            its trajectory stays within the nats (:func:`~tdistill.actions.budget_sizes`); instead of p.
        text: plain text to append, or None. Which sequences is a function of the trajectories of the batch alone.
    """

    pad_token_id: int
    p: float | None = None
    budget: tuple[float, float] | None = None
    text: PlainText | None = None
    seed: int = field(default=0)

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask [B, T], position_index_N into their flattened form, and packed fields."""
        texts = self._choose_text(trajectories)
        rows = [np.concatenate([t.prompt_ids, t.response_ids]) for t in trajectories] + texts
        width = max(len(row) for row in rows)
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            input_ids[b, : len(row)], mask[b, : len(row)] = row, 1

        parts = [self._pack(t, b, b * width) for b, t in enumerate(trajectories)]
        packed = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        sizes, over = packed.pop("sizes"), packed.pop("over_budget")
        packed["offsets"] = np.concatenate([[0], np.cumsum(sizes)])
        text_at = [(len(trajectories) + i) * width + np.arange(len(t) - 1) for i, t in enumerate(texts)]
        packed["text_index_L"] = np.concatenate([*text_at, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        packed["text_target_L"] = np.concatenate([*(t[1:] for t in texts), np.zeros(0, dtype=np.int64)]).astype(
            np.int64
        )
        packed["num_over_budget"] = over.sum()
        tensors = {name: torch.as_tensor(values) for name, values in packed.items()}
        return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask), **tensors}

    def _pack(self, trajectory: Trajectory, sequence: int, start: int) -> dict[str, np.ndarray]:
        sets, num_taken = trajectory.sets, len(trajectory.response_ids)
        num_rows = len(sets)
        stored = np.diff(sets.offsets)
        taken = np.concatenate([trajectory.response_ids, np.zeros(num_rows - num_taken, dtype=np.int64)]).astype(
            np.int64
        )
        acts = np.arange(num_rows) < num_taken
        keep_M = np.ones(len(sets.ids), dtype=bool)
        dropped = added = np.zeros(num_rows, dtype=bool)
        over_budget = False
        row_M = np.repeat(np.arange(num_rows), stored)
        is_taken_M = (sets.ids == taken[row_M]) & acts[row_M]
        log_prob_taken = np.bincount(row_M[is_taken_M], sets.log_probs[is_taken_M], minlength=num_rows)
        if (self.p is not None or self.budget is not None) and len(sets.ids):
            sizes, over_budget = self._sizes(sets)
            rank_M = np.arange(len(sets.ids)) - np.repeat(sets.offsets[:-1], stored)
            keep_M = rank_M < sizes[row_M]
            outside = acts & (np.bincount(row_M[is_taken_M & keep_M], minlength=num_rows) == 0)
            if trajectory.source == "teacher":
                acts, dropped = acts & ~outside, outside
            else:
                keep_M, added = keep_M | is_taken_M, outside
            stored = np.bincount(row_M[keep_M], minlength=num_rows)
        ends = np.full(num_rows, Ends.NEXT, dtype=np.int64)
        ends[-1] = Ends.TERMINAL if trajectory.ends == "terminal" else Ends.TRUNCATED
        first = start + len(trajectory.prompt_ids) - 1
        return {
            "position_index_N": first + np.arange(num_rows, dtype=np.int64),
            "sizes": stored,
            "action_ids_M": sets.ids[keep_M].astype(np.int64),
            "log_prob_teacher_M": sets.log_probs[keep_M],
            "log_prob_taken_teacher_N": np.where(acts, log_prob_taken, 0.0).astype(np.float32),
            "teacher_log_sum_exp_N": sets.log_sum_exp,
            "from_student_N": np.full(num_rows, trajectory.source == "student"),
            "taken_N": taken,
            "sequence_N": np.full(num_rows, sequence, dtype=np.int64),
            "has_action_N": acts,
            "ends_N": ends,
            "dropped_N": dropped,
            "added_N": added,
            "over_budget": np.array([over_budget]),
        }

    def _sizes(self, sets: ActionSets) -> tuple[np.ndarray, bool]:
        """Sizes of the sets that are kept, and whether even the stored ones lose more than the budget."""
        if self.budget is None:
            assert self.p is not None
            return nested_sizes(sets, self.p), False
        nats, gamma = self.budget
        return budget_sizes(sets, nats, gamma), set_loss_nats(sets, np.diff(sets.offsets), gamma) > nats

    def _choose_text(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        if self.text is None:
            return []
        names = "\n".join(f"{t.prompt_id} {t.answer_index}" for t in trajectories)
        rng = np.random.default_rng([self.seed, zlib.crc32(names.encode())])
        chosen = rng.integers(len(self.text.sequences), size=self.text.per_batch)
        return [self.text.sequences[i] for i in chosen]
