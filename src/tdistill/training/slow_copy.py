"""A copy of the student that follows it slowly: where bootstrapped targets come from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback

from tdistill.errors import RunFolderError

_FILE = "slow_copy.safetensors"


class SlowCopy(TrainerCallback):
    """w̄ ← (1 − τ) w̄ + τ w after every optimizer step.

    Source: Polyak averaging of target networks (Lillicrap et al. 2016, arXiv 1509.02971, §3).
    Cost: the student's weights once more in memory, and one forward pass more per micro-batch.

    Args:
        model: student at the start of training.
        rate: τ in (0, 1].
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model, self.rate = copy.deepcopy(model).eval().requires_grad_(False), rate

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move every weight a little; buffers are copied."""
        for slow, fast in zip(self.model.parameters(), model.parameters(), strict=True):
            if fast.requires_grad:  # frozen weights may be of a quantised kind
                slow.lerp_(fast.detach().to(slow.dtype), self.rate)
        for slow_buffer, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            slow_buffer.copy_(buffer)

    def save(self, folder: Path) -> None:
        """Write the weights beside a checkpoint's."""
        save_model(self.model, str(folder / _FILE))

    def load(self, folder: Path) -> None:
        """Read the weights of a checkpoint.

        Raises:
            RunFolderError: the checkpoint has none.
        """
        if not (folder / _FILE).is_file():
            raise RunFolderError(
                f"{folder} has no {_FILE}, which this objective's targets come from. Start from another checkpoint."
            )
        load_model(self.model, str(folder / _FILE))
