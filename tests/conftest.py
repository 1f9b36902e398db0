"""Session fixtures: a tiny teacher that has learnt something, its stores, and a start made from its layers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

from collections.abc import Callable
from pathlib import Path

import pytest
import support
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tdistill.store import Store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of 4 layers that knows the tiny corpus, with its tokenizer and generation settings."""
    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    support.save_tiny_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_teacher_folder: Path) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the tiny teacher."""
    return load_tokenizer(tiny_teacher_folder)


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teacher_folder: Path) -> HFTeacher:
    """The tiny teacher, loaded. Shared: do not change its weights."""
    return HFTeacher.from_pretrained(str(tiny_teacher_folder), dtype="float32")


@pytest.fixture(scope="session")
def tiny_prompt_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompt sets ``train`` (60), ``dev`` (12) and ``held_out`` (12) as files; no prompt is in two of them."""
    return support.write_tiny_prompts(tmp_path_factory.mktemp("tiny_prompts"))


@pytest.fixture(scope="session")
def tiny_stores(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: HFTeacher, tiny_prompt_files: dict[str, Path]
) -> dict[str, Store]:
    """Stores of the three splits, sampled from the tiny teacher at p_max = 0.95, at most 16 actions per set."""
    root = tmp_path_factory.mktemp("tiny_stores")
    return {
        split: support.capture_tiny(tiny_teacher, file, root / split, support.TINY_SAMPLING)
        for split, file in tiny_prompt_files.items()
    }


@pytest.fixture(scope="session")
def tiny_start_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: HFTeacher, tiny_stores: dict[str, Store]
) -> Path:
    """Folder of a student that keeps the 2 of the teacher's 4 layers with the largest block influence."""
    folder = tmp_path_factory.mktemp("tiny_start") / "start"
    support.save_tiny_start(tiny_teacher, tiny_stores["train"], folder)
    return folder


@pytest.fixture
def load_start(tiny_start_folder: Path) -> Callable[[], PreTrainedModel]:
    """Loads a fresh copy of the start in float32."""
    return lambda: load_causal_lm(tiny_start_folder, dtype="float32")
