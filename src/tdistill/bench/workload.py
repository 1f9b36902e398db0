"""What is timed: a student of a few of the teacher's layers, and a micro-batch with the teacher's own action sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tdistill.errors import ConfigError
from tdistill.prompts import choose_template, read_records, tokenize_prompts, tokenizer_sha256
from tdistill.store import Store
from tdistill.store.capture import capture
from tdistill.teachers.base import PromptTokens, SamplingSettings
from tdistill.teachers.hf import HFTeacher
from tdistill.types import ActionSets, Trajectory

NUM_SEQUENCES = 8
NUM_TOKENS = 128
MAX_ACTIONS = 64
P_MAX = 0.8


@dataclass(frozen=True)
class Workload:
    """A teacher's configuration, and trajectories that it sampled.

    Attributes:
        config: of the teacher.
        teacher: its address and how to load it, for steps that need it.
        store: store without a cap that the trajectories come from.
        trajectories: full ones, cut to one prompt token and the response, so that every position acts.
    """

    config: PretrainedConfig
    teacher: dict[str, Any]
    store: Store
    trajectories: Sequence[Trajectory]

    def student(self, layers: int, vocab_size: int | None = None) -> PreTrainedModel:
        """A random student; times do not depend on the weights."""
        config = type(self.config).from_dict(self.config.to_dict())
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        config.vocab_size = vocab_size or config.vocab_size
        config.dtype = torch.float32
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AutoModelForCausalLM.from_config(config).to(device).train()

    def load_teacher(self) -> PreTrainedModel:
        """The teacher itself."""
        return HFTeacher.from_pretrained(**self.teacher).model

    def batch(self, num_sequences: int = NUM_SEQUENCES, cap: int | None = MAX_ACTIONS) -> list[Trajectory]:
        """So many trajectories, repeated where there are fewer, with the first ``cap`` actions of each set."""
        chosen = [self.trajectories[i % len(self.trajectories)] for i in range(num_sequences)]
        return chosen if cap is None else [replace(t, sets=capped(t.sets, cap)) for t in chosen]


def capped(sets: ActionSets, cap: int) -> ActionSets:
    """Sets cut to their first actions, as a capture with that cap records them."""
    sizes = np.diff(sets.offsets)
    kept = np.arange(len(sets.ids)) - np.repeat(sets.offsets[:-1], sizes) < cap
    offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, cap))])
    mass = np.add.reduceat(np.exp(sets.log_probs[kept].astype(np.float64)), offsets[:-1])
    return replace(
        sets,
        offsets=offsets,
        ids=sets.ids[kept],
        log_probs=sets.log_probs[kept],
        covered_mass=np.minimum(mass, 1.0).astype(np.float32),
    )


def make_workload(teacher: dict[str, Any], folder: Path, num_tokens: int = NUM_TOKENS) -> Workload:
    """Capture answers of the full length once into ``folder``, or reuse them.

    Args:
        teacher: arguments of :meth:`HFTeacher.from_pretrained`, ``address`` among them.
        folder: where the store is kept.
        num_tokens: tokens of a sequence.
    Raises:
        ConfigError: no answer reaches the length.
    """
    loaded = HFTeacher.from_pretrained(**teacher)
    settings = SamplingSettings(p_max=P_MAX, max_actions=None, max_new_tokens=num_tokens - 1, seed=0)
    prompts = packaged_prompts(loaded, 4 * NUM_SEQUENCES, settings.max_new_tokens)
    store = capture(
        loaded,
        prompts,
        folder / f"store-{num_tokens}",
        settings,
        batch_size=len(prompts),
        tokenizer_sha256=tokenizer_sha256(loaded.tokenizer),
        template="as the demo's",
    )
    full = [t for t in (store[i] for i in range(len(store))) if len(t.response_ids) == num_tokens - 1]
    if not full:
        raise ConfigError(f"None of {len(store)} answers has {num_tokens - 1} tokens. Take another teacher.")
    cut = [replace(t, prompt_ids=t.prompt_ids[-1:]) for t in full[:NUM_SEQUENCES]]
    return Workload(loaded.model.config, teacher, store, cut)


def packaged_prompts(teacher: HFTeacher, number: int, max_new_tokens: int) -> list[PromptTokens]:
    """The first prompts of the demo, in the teacher's own template."""
    return tokenize_prompts(
        read_records("package:tdistill/demo/train.jsonl")[:number],
        teacher.tokenizer,
        choose_template(teacher.tokenizer),
        end_token_ids=teacher.end_token_ids,
        max_prompt_tokens=256,
        max_new_tokens=max_new_tokens,
    )
