"""The models that a recipe names: the teacher, and what training starts from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdistill.config import Recipe, TeacherConfig
from tdistill.errors import ConfigError, StoreIdentityError
from tdistill.head import check_head
from tdistill.prompts import check_same_tokenizer, check_vocabulary, choose_template, tokenizer_sha256
from tdistill.store import Store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_tokenizer, resolve_model_folder
from tdistill.training.export import export_student
from tdistill.training.pruning import block_influence, choose_layers, prune_layers


def load_teacher(config: TeacherConfig) -> HFTeacher:
    """Load the teacher that a recipe names.

    Raises:
        ConfigError: ``model_kwargs`` that ``from_pretrained`` does not know.
        ModelNotFoundError: see :func:`~tdistill.teachers.loading.resolve_model_folder`.
    """
    extra = {} if config.device_map is None else {"device_map": config.device_map}
    try:
        teacher = HFTeacher.from_pretrained(
            config.model, gguf_file=config.gguf_file, dtype=config.dtype, **extra, **config.model_kwargs
        )
    except TypeError as error:
        if not config.model_kwargs:
            raise
        raise ConfigError(
            f"teacher.model_kwargs = {config.model_kwargs} are refused: {error}. They are arguments of "
            "from_pretrained; what quantises goes into quantization_config."
        ) from error
    # A model with a device map is where that says; some kinds of quantisation choose a GPU themselves.
    if config.device_map is None and torch.cuda.is_available() and teacher.model.device.type == "cpu":
        teacher.model.to("cuda")
    return teacher


def check_teacher(recipe: Recipe, teacher: HFTeacher, store: Store) -> None:
    """Raise StoreIdentityError unless a store was captured from these weights."""
    found, stored = teacher.identity["weights_sha256"], store.identity["teacher"]["weights_sha256"]
    if found != stored:
        raise StoreIdentityError(
            f"The weights of the teacher {recipe.teacher.model} have hash {found}, the store {store.path} was "
            f"made by {stored}. Point teacher.model to that teacher, or capture again into another folder."
        )


def make_start(
    recipe: Recipe,
    folder: Path,
    train: Path,
    teacher: HFTeacher | None,
    load: Callable[[], HFTeacher],
    say: Callable[[str], None],
) -> None:
    """Make the start of training: a copy of the student's folder, or the teacher with some of its layers.

    Args:
        recipe: names both.
        folder: is made, whole or not at all; left alone if it is there.
        train: store whose first answers choose the layers, and whose tokenizer and end tokens the student must have.
        teacher: if it is in memory.
        load: loads it if it is needed and not in memory.
        say: receives one line for the terminal.
    Raises:
        StoreIdentityError: the store is another teacher's.
        TDistillError: see the checks of :mod:`tdistill.prompts.identity` and :mod:`tdistill.head`.
    """
    config = recipe.student
    if folder.is_dir():
        return
    facts: dict[str, Any]
    if config.model is not None:
        source = resolve_model_folder(config.model, revision=config.revision)
        model, tokenizer = load_causal_lm(source, dtype="float32"), load_tokenizer(source)
        if teacher is not None:
            expected, end_ids = tokenizer_sha256(teacher.tokenizer), teacher.end_token_ids
            teachers = teacher.tokenizer
        else:
            store = Store.open(train, verify=False)
            expected, end_ids = store.identity["tokenizer_sha256"], store.end_token_ids
            of = recipe.teacher
            place = resolve_model_folder(of.model, of.gguf_file, of.model_kwargs.get("revision"))
            teachers = load_tokenizer(place, gguf_file=of.gguf_file)
        check_same_tokenizer(expected, tokenizer, f"the student {config.model}")
        check_vocabulary(model.get_output_embeddings().weight.shape[0], tokenizer, f"The student {config.model}")
        check_head(model)
        facts = {"name": config.model, "kept_layers": None}
    else:
        assert config.layers is not None
        teacher = teacher or load()
        store = Store.open(train, verify=True)
        check_teacher(recipe, teacher, store)
        rows = [store[i] for i in range(min(config.calibration_answers, len(store)))]
        tokens = [np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64) for row in rows]
        influence = block_influence(teacher.model, map(torch.from_numpy, tokens))
        layers = choose_layers(len(influence), config.layers, config.method, influence)
        say(f"keeps layers {layers} of {len(influence)} ({config.method})")
        teachers = teacher.tokenizer
        model, tokenizer, end_ids = prune_layers(teacher.model, layers), copy.copy(teachers), store.end_token_ids
        facts = {"name": f"{recipe.teacher.model} (pruned)", "kept_layers": layers}
        facts["block_influence"] = influence
    # The student is to be asked as it was trained, and its own template, if it has one, may be another.
    tokenizer.chat_template = choose_template(
        teachers, recipe.data.template, recipe.data.template_kwargs
    ).for_tokenizer(tokenizer)
    export_student(model, tokenizer, folder, sorted(end_ids), extra={"start.json": json.dumps(facts, indent=1)})
