"""Training of one variant, with the times of its steps."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
from setups import Setup
from transformers import TrainerCallback, set_seed

from tdistill.store import Store
from tdistill.training import Rollouts, RolloutSettings, TDistillConfig, TDistillTrainer


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step; what is done before the first, such as a round of rollouts, is in the first."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when training begins: the trainer asks for the first batch, and the answers in it, before a step."""
        self.marks.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when a step ends."""
        self.marks.append(time.perf_counter())

    @property
    def median_s(self) -> float:
        """Median over the steps."""
        return float(np.median(np.diff(self.marks)))

    @property
    def mean_s(self) -> float:
        """Mean over the steps; rounds of rollouts are in it."""
        return float(np.diff(self.marks).mean())


def train(
    setup: Setup,
    model: Any,
    args: dict[str, Any],
    seed: int,
    own_answers: dict[str, Any] | None = None,
    store: Store | None = None,
    text: bool = False,
) -> tuple[Any, Any]:
    """Train a model on a store, by default the train split, and on plain text if that is asked for.

    Returns:
        The trainer and the times of its steps.
    """
    set_seed(seed)
    times = StepTimes()
    rollouts = None
    if own_answers is not None:
        settings = RolloutSettings(**{**setup.rollouts, **own_answers, "seed": seed})
        sampling = setup.recipe.capture.sampling()
        rollouts = Rollouts(settings, setup.prompts("train"), lambda: setup.teacher, sampling)
    with tempfile.TemporaryDirectory() as scratch:
        config = TDistillConfig(scratch, seed=seed, **args)
        trainer = TDistillTrainer(
            model,
            config,
            store or setup.stores["train"],
            setup.stores["dev"],
            setup.tokenizer,
            text_dataset=setup.plain_text if text else None,
            rollouts=rollouts,
            teacher=setup.teacher.model if config.build_objective().needs_teacher else None,
            callbacks=[times],
        )
        trainer.train()
    return trainer, times
