"""Trainers on the tiny stores with settings that make runs exactly comparable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import support
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback

from tdistill.store import Store
from tdistill.training.arguments import TDistillConfig
from tdistill.training.trainer import TDistillTrainer


class FixedBatches(Sampler[list[int]]):
    """The given micro-batches, in order, in every epoch."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = [list(batch) for batch in batches]

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class FixedBatchTrainer(TDistillTrainer):
    """Trains on micro-batches that the test chooses."""

    batches: Sequence[Sequence[int]]

    def _sampler(self, store: Store, seed: int | None) -> Any:
        return super()._sampler(store, seed) if seed is None else FixedBatches(self.batches)


def settings(output_dir: Path, **changes: Any) -> TDistillConfig:
    """Arguments for a short run on the processor that logs every step and saves nothing."""
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 10,
        "learning_rate": 2e-3,
        "response_tokens_per_batch": 160,
        "seed": 0,
    }
    values |= changes
    if values.get("objective", "iq_learn") == "iq_learn":  # a finite α, so that value head and φ take part
        values["objective"] = {"name": "iq_learn", "alpha": 100.0}
    return TDistillConfig(**values)


# Plain gradient descent with step length 1 and no clipping: the update is minus the gradient.
ONE_SGD_STEP: dict[str, Any] = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


# Trajectories of one step in four very unequal micro-batches, the order of lengths broken up.
PARTS = [[5], [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14], [30, 21], [15, 40, 41]]
ALL_PARTS = [row for part in PARTS for row in part]


class Crash(TrainerCallback):
    """Breaks training off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def plain_texts(tokenizer: Any) -> list[np.ndarray]:
    """Token sequences of 4 to 12 tokens."""
    texts = [record["answer"] for record in support.corpus()[:20]]
    return [np.array(tokenizer(text)["input_ids"][: 4 + index % 9]) for index, text in enumerate(texts)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def update(trainer: TDistillTrainer) -> dict[str, Tensor]:
    """Train, and return what training added to each parameter."""
    before = parameters(trainer.model)
    trainer.train()
    return {name: value - before[name] for name, value in parameters(trainer.model).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 100 * atol
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def untie(model: PreTrainedModel) -> None:
    """Give the model an output matrix of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def disturb_value_head(model: PreTrainedModel, seed: int = 7) -> None:
    """Give the value head weights as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.value_head.weight.normal_(0, 0.05, generator=generator)
        model.value_head.bias.fill_(0.3)


def losses(trainer: TDistillTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_clock(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Log entries without speeds, and without the Trainer's summary of the part of a run that this process did."""
    speeds = ("_per_second", "_runtime")
    return [
        {name: value for name, value in entry.items() if not name.endswith(speeds)}
        for entry in history
        if "train_loss" not in entry
    ]
