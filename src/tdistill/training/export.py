"""A finished student as a normal Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tdistill.training.student import VALUE_HEAD


def export_student(
    model: Any, tokenizer: Any, folder: Path, end_token_ids: Sequence[int], extra: Mapping[str, str] | None = None
) -> None:
    """Write weights (safetensors), configuration, tokenizer and generation settings; the folder appears whole or not.

    Adapters are merged, the value head is dropped, and ``generation_config`` names every end token of the store.

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
    plain.generation_config.eos_token_id = list(end_token_ids)
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, content in (extra or {}).items():
        (partial / name).write_text(content, encoding="utf-8")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
