"""Which trajectories make up which micro-batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from tdistill.errors import ConfigError

# Trajectories are sorted by length inside windows of this many batches: little padding, yet shuffled.
_WINDOW = 8


class TokenBudgetSampler(Sampler[list[int]]):
    """Micro-batches of about the same number of response tokens, grouped by length.

    The number of batches is the same in every epoch and a multiple of ``num_replicas``; the order is a function of
    (seed, epoch) alone, so it survives resume and any number of workers.

    Args:
        response_lengths: int [rows], response tokens of each trajectory.
        total_lengths: int [rows], prompt and response tokens, for grouping.
        budget: response tokens of one micro-batch, at most on average unless single trajectories exceed it.
        seed: of the shuffling; None keeps the order of the lengths (evaluation).
        num_replicas: processes that share the batches.
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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = np.argsort(self.total_lengths, kind="stable")
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = rng.permutation(len(self.response_lengths))
            window = int(np.ceil(len(order) / self.num_batches * _WINDOW))
            order = np.concatenate(
                [
                    order[at : at + window][np.argsort(self.total_lengths[order[at : at + window]], kind="stable")]
                    for at in range(0, len(order), window)
                ]
            )
        lengths = self.response_lengths[order]
        middle = np.cumsum(lengths) - lengths / 2
        batch = np.minimum((middle * self.num_batches / max(lengths.sum(), 1)).astype(int), self.num_batches - 1)
        # Start at 0, never skip a number, end at the last one: no batch is empty, however long one trajectory is.
        place = np.arange(len(order))
        batch = np.minimum.accumulate(np.minimum(batch, place) - place) + place
        batch = np.maximum(batch, place - (len(order) - self.num_batches))
        batches = [order[batch == k].tolist() for k in range(self.num_batches)]
        if self.seed is not None:
            batches = [batches[k] for k in rng.permutation(self.num_batches)]
        yield from batches
