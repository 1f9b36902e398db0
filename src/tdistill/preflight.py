"""What can be refused about models, disk and adapters before long work starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tdistill.config import Recipe
from tdistill.errors import ConfigError, NoSpaceError, PromptTooLongError, TeacherLogitsError, UnsupportedModelError
from tdistill.evaluation.tasks import check_task_context
from tdistill.head import check_head
from tdistill.prompts import check_vocabulary
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_config, resolve_model_folder
from tdistill.training.pruning import choose_layers, prune_layers
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


def check_models(recipe: Recipe, teacher: HFTeacher, prompts: Sequence[PromptTokens]) -> None:
    """Find out before the capture whether teacher and student can do what comes after it.

    Args:
        recipe: names both, and what is measured.
        teacher: the teacher.
        prompts: of all splits.
    Raises:
        TDistillError: names the model and the setting that do not go together.
    """
    check_vocabulary(teacher.identity["vocab_size"], teacher.tokenizer, f"The teacher {recipe.teacher.model}")
    config = teacher.model.config
    max_new_tokens = max(recipe.capture.max_new_tokens, longest_measured(recipe))
    configs = {f"the teacher {recipe.teacher.model}": config}
    check_context(config, f"the teacher {recipe.teacher.model}", prompts, max_new_tokens)
    if recipe.student.layers is not None:
        num_layers = config.get_text_config().num_hidden_layers
        choose_layers(num_layers, recipe.student.layers, "even")
        try:
            # Some architectures cannot be pruned or have another head; any two layers tell.
            prune_layers(teacher.model, choose_layers(num_layers, min(num_layers, 2), "even"))
            check_head(teacher.model)
        except UnsupportedModelError:
            check_finite(teacher, prompts[0])
            raise
    else:
        assert recipe.student.model is not None
        config = load_config(resolve_model_folder(recipe.student.model, revision=recipe.student.revision))
        configs[f"the student {recipe.student.model}"] = config
        check_context(config, f"the student {recipe.student.model}", prompts, max_new_tokens)
    for name, task in (recipe.evaluation.tasks or {}).items():
        check_task_context(name, task, teacher.tokenizer, configs)
    attention = recipe.student.attn_implementation
    try:
        with torch.device("meta"):
            student = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"student.attn_implementation = {attention}: {error}") from error
    if recipe.peft is not None:
        check_adapter(student, recipe.peft)


def longest_measured(recipe: Recipe) -> int:
    """Tokens of the longest answer of an evaluation; timed ones do not end before."""
    return max(recipe.evaluation.max_new_tokens, recipe.evaluation.speed_tokens)


def check_one_device() -> None:
    """Raise ConfigError where transformers would train on several GPUs at once in one process."""
    if (count := torch.cuda.device_count()) > 1:
        raise ConfigError(
            f"{count} GPUs are visible, and a run trains on one. Set CUDA_VISIBLE_DEVICES=0; with a teacher that "
            "needs more, only for `tdistill train`, and all of them for `tdistill capture` before and `eval` after it."
        )
