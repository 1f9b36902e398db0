"""The checkpoints of a phase: how many are on disk, and what a resume takes from one."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tdistill.store import Store
from tdistill.training.arguments import TDistillConfig
from tdistill.training.batches import TokenBudgetSampler


def checkpoints_at_once(args: TDistillConfig, store: Store) -> int:
    """Most checkpoints that one process has on disk at a time while it trains on a store.

    An old one is deleted after the next is written, so that there is one more than ``save_total_limit``.
    """
    if args.save_strategy == SaveStrategy.NO:
        return 0
    lengths = store.response_lengths
    num_batches = len(TokenBudgetSampler(lengths, lengths, args.response_tokens_per_batch, seed=None))
    steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    # `best` saves at evaluations.
    best = args.save_strategy == SaveStrategy.BEST
    strategy = args.eval_strategy if best else args.save_strategy
    steps = (args.eval_steps if best else args.save_steps) or num_steps
    if strategy == IntervalStrategy.EPOCH:
        steps = steps_per_epoch
    elif steps < 1:
        steps = math.ceil(num_steps * steps)
    written = math.ceil(num_steps / steps)
    limit = args.save_total_limit
    if limit is None or limit <= 0:
        return written
    # The last is never deleted, nor the best one where the dev split is measured.
    kept = max(limit, 1 if args.eval_strategy == IntervalStrategy.NO else 2)
    return min(written, kept + 1)


def adopt_state(checkpoint: Path) -> TrainerState:
    """State of a checkpoint, whose path to the best one before it is made to follow a run's folder that was moved."""
    path = checkpoint / TRAINER_STATE_NAME
    state = TrainerState.load_from_json(str(path))
    if state.best_model_checkpoint is not None:
        best = str(checkpoint.parent / Path(state.best_model_checkpoint).name)
        if best != state.best_model_checkpoint:
            state.best_model_checkpoint = best
            state.save_to_json(str(path))
    return state
