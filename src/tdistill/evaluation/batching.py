"""Batches of unequal sequences, and a model put into the state in which it is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


def length_sorted(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Indices in batches of like length, longest first: what runs out of memory does so at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(rows: Sequence[np.ndarray], pad_token_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Pad rows to one width.

    Returns:
        Token ids and attention mask, both int64 [B, width]; the mask is 0 exactly at padding.
    """
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), pad_token_id, dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, span], mask[index, span] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@contextmanager
def measured(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, no gradients, and none of the model folder's own generation settings, for the time of a block.

    ``generate`` fills every setting that the caller leaves open from ``model.generation_config``: a repetition penalty
    there would silently change what is measured.
    """
    training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
        model.generation_config = defaults
