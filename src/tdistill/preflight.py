"""What can be refused about models, disk and adapters before long work starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tdistill.errors import ConfigError, NoSpaceError, PromptTooLongError, TeacherLogitsError
from tdistill.teachers.hf import HFTeacher
from tdistill.training.student import add_adapter
from tdistill.training.trainer import TDistillTrainer
from tdistill.types import PromptTokens


def check_room(folder: Path, trainer: TDistillTrainer, num_checkpoints: int) -> None:
    """Raise NoSpaceError unless a folder has room for the checkpoints that are there at once and the finished weights.

    Checkpoints of the phase that are there already are replaced, so that their room counts as free.
    """
    model: Any = trainer.model
    needed = _bytes(model.parameters()) + num_checkpoints * checkpoint_bytes(trainer)
    there = Path(str(trainer.args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*/**/*")
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in there)
    if free < needed:
        raise NoSpaceError(
            f"Training needs up to {needed / 1e9:.1f} GB in {folder} for checkpoints; {free / 1e9:.1f} GB are free. "
            "Make room, choose another output folder, or lower save_total_limit."
        )


def checkpoint_bytes(trainer: TDistillTrainer) -> int:
    """Bytes of one checkpoint: weights (of an adapter alone), two moments of each trained one, and a slow copy."""
    model: Any = trainer.model
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kept = trained if hasattr(model, "merge_and_unload") else parameters
    moments = 0 if trainer.args.save_only_model else 2 * _bytes(trained)
    return _bytes(kept) + moments + (_bytes(trainer.slow_copy.model.parameters()) if trainer.slow_copy else 0)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def check_context(config: Any, who: str, prompts: Iterable[PromptTokens], max_new_tokens: int) -> None:
    """Raise PromptTooLongError if a prompt and its answer may be longer than what a model was made for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids))
    length = len(longest.prompt_ids)
    if limit is not None and length + max_new_tokens > limit:
        raise PromptTooLongError(
            f"Prompt '{longest.prompt_id}' has {length} tokens and its answer up to {max_new_tokens}; {who} was made "
            f"for {limit} in all. Lower capture.max_new_tokens, evaluation.max_new_tokens and evaluation.speed_tokens, "
            "or data.max_prompt_tokens with data.too_long: skip."
        )


@torch.inference_mode()
def check_finite(teacher: HFTeacher, prompt: PromptTokens) -> None:
    """Raise TeacherLogitsError if the teacher has no numbers for a prompt, or for the tokens it is pruned with."""
    for who, ids in ((f"prompt '{prompt.prompt_id}'", prompt.prompt_ids), ("tokens 1 to 16", np.arange(1, 17))):
        input_ids = torch.from_numpy(ids.astype(np.int64))[None].to(teacher.model.device)
        if not torch.isfinite(teacher.model(input_ids=input_ids, use_cache=False).logits).all():
            raise TeacherLogitsError(
                f"The teacher gave NaN or infinite logits for {who}. Load it in float32 or bfloat16 (teacher.dtype), "
                "or repair its weights."
            )


def check_adapter(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if an adapter does not fit the student, UnsupportedModelError if its output layer does not."""
    from peft import LoraConfig

    try:
        add_adapter(model, LoraConfig(**settings))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"peft = {dict(settings)} does not fit the student: {error}") from error
