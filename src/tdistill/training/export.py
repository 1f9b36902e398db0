"""A finished student as a normal Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from tdistill.files import publish
from tdistill.training.student import VALUE_HEAD

# Settings that act in sampling alone, and the values that transformers accepts without it.
_SAMPLING_ONLY = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def export_student(
    model: Any, tokenizer: Any, folder: Path, end_token_ids: Sequence[int], extra: Mapping[str, str] | None = None
) -> None:
    """Write weights (safetensors), configuration, tokenizer and generation settings; the folder appears whole or not.

    Adapters are merged, the value head is dropped, and ``generation_config`` names every end token of the store. Where
    it has settings of sampling and leaves open whether to sample, it says so.

    Args:
        model: student, or its PEFT wrapper; its value head is removed in place.
        tokenizer: saved beside it.
        folder: target, must not exist.
        end_token_ids: end tokens that the student has learnt to stop at.
        extra: further text files, name → content.
    """
    plain: PreTrainedModel = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    if hasattr(plain, VALUE_HEAD):
        delattr(plain, VALUE_HEAD)
    plain.config.use_cache = True  # which transformers' Trainer turns off
    plain.generation_config.eos_token_id = list(end_token_ids)
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    _settle_sampling(plain.generation_config)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, content in (extra or {}).items():
        (partial / name).write_text(content, encoding="utf-8")
    publish(partial, folder)


def _settle_sampling(config: GenerationConfig) -> None:
    """Resolve in place what transformers loads with a warning and refuses to save once end tokens have changed.

    Released models come with a temperature and no ``do_sample``, which means sampling. Settings that do nothing, of
    sampling beside ``do_sample: false`` and of beam search with one beam, are dropped.
    """
    sampling = [name for name, off in _SAMPLING_ONLY.items() if getattr(config, name, None) not in (None, off)]
    if config.do_sample is None and sampling:
        config.do_sample = True
    idle = [] if config.do_sample else sampling
    if config.num_beams in (None, 1):
        idle += ["early_stopping", "length_penalty"]
    for name in idle:
        setattr(config, name, None)
