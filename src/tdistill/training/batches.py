"""Which trajectories make up which micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch.utils.data import Sampler

from tdistill.errors import ConfigError

# Trajectories are sorted by length inside spans of this many batches: little padding, yet shuffled.
_SPAN = 8


class TokenBudgetSampler(Sampler[list[int]]):
    """Micro-batches of about the same number of response tokens, grouped by length.

    The number of batches is the same in every epoch and a multiple of ``num_replicas``; the order is a function of
    (seed, epoch) alone, so it survives resume and any number of workers.

    Shuffling keeps to *windows*: as many row groups as are decoded and in memory at a time. Row groups are shuffled,
    then the trajectories of each window, then its batches, so that every row group is decoded about once per epoch. A
    store of one window is shuffled as a whole.

    Args:
        response_lengths: int [rows], response tokens of each trajectory.
        total_lengths: int [rows], prompt and response tokens, for grouping.
        budget: response tokens of one micro-batch, at most on average unless single trajectories exceed it.
        seed: of the shuffling; None keeps the order of the lengths, inside windows of row groups in their own order
            (evaluation).
        num_replicas: processes that share the batches.
        row_groups: int [rows], row group of each trajectory, not falling (:attr:`tdistill.store.Store.row_groups`);
            None for a data set without any.
        window_row_groups: row groups of a window (:attr:`tdistill.store.Store.row_groups_in_memory`).
    Raises:
        ConfigError: fewer trajectories than processes.
    """

    def __init__(
        self,
        response_lengths: np.ndarray,
        total_lengths: np.ndarray,
        budget: int,
        seed: int | None,
        num_replicas: int = 1,
        row_groups: np.ndarray | None = None,
        window_row_groups: int = 1,
    ) -> None:
        self.response_lengths, self.total_lengths = response_lengths, total_lengths
        self.seed, self.epoch = seed, 0
        # Never more batches than trajectories, or some would be empty.
        most = len(response_lengths) // num_replicas
        if most == 0:
            raise ConfigError(
                f"{len(response_lengths)} trajectories cannot be shared out to {num_replicas} processes. Capture more, "
                "or start fewer processes."
            )
        rounds = int(np.ceil(response_lengths.sum() / (budget * num_replicas)))
        self.num_batches = max(1, min(rounds, most)) * num_replicas
        groups = np.zeros(len(response_lengths), dtype=np.int64) if row_groups is None else row_groups
        self.group_starts = np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [len(groups)]])
        self.window_row_groups = window_row_groups

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        windows = self._windows(rng)
        order = np.concatenate([self._order(rows, rng) for rows in windows])
        starts = self._batch_starts(order)
        # Batches of a window are those that begin in it.
        edges = np.searchsorted(starts[:-1], np.cumsum([0, *map(len, windows)]))
        for first, stop in pairwise(edges):
            for k in range(first, stop) if rng is None else first + rng.permutation(stop - first):
                yield order[starts[k] : starts[k + 1]].tolist()

    def _windows(self, rng: np.random.Generator | None) -> list[np.ndarray]:
        """Trajectories of each window, rising."""
        num_groups = len(self.group_starts) - 1
        groups = np.arange(num_groups)
        if rng is not None and num_groups > self.window_row_groups:
            groups = rng.permutation(num_groups)
        windows = []
        for at in range(0, num_groups, self.window_row_groups):
            inside = np.sort(groups[at : at + self.window_row_groups])
            windows.append(np.concatenate([np.arange(*self.group_starts[group : group + 2]) for group in inside]))
        return windows

    def _order(self, rows: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if rng is None:
            return rows[np.argsort(self.total_lengths[rows], kind="stable")]
        order = rows[rng.permutation(len(rows))]
        span = int(np.ceil(len(self.response_lengths) / self.num_batches * _SPAN))
        parts = [order[at : at + span] for at in range(0, len(order), span)]
        return np.concatenate([part[np.argsort(self.total_lengths[part], kind="stable")] for part in parts])

    def _batch_starts(self, order: np.ndarray) -> np.ndarray:
        """Places in the order where each batch begins, and its end, int64 [num_batches + 1]."""
        lengths = self.response_lengths[order]
        middle = np.cumsum(lengths) - lengths / 2
        batch = np.minimum((middle * self.num_batches / max(lengths.sum(), 1)).astype(int), self.num_batches - 1)
        # Start at 0, never skip a number, end at the last one: no batch is empty, however long one trajectory is.
        place = np.arange(len(order))
        batch = np.minimum.accumulate(np.minimum(batch, place) - place) + place
        batch = np.maximum(batch, place - (len(order) - self.num_batches))
        return np.searchsorted(batch, np.arange(self.num_batches + 1))
