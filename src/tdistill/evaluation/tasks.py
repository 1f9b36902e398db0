"""Tasks with right and wrong answers, such as GSM8K, through lm-eval, on data that lies on this machine."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tdistill.errors import ConfigError, DataFileError, EmptyPromptSetError
from tdistill.evaluation.batching import measured

_FILTER = "get-answer"
# The number that ends a solution of GSM8K.
_NUMBER = r"####\s*(\-?[0-9\.\,]*[0-9])"
_MARK = "####"


class TaskSettings(BaseModel):
    """One task on a local file of questions and answers.

    Attributes:
        data: path of a ``.jsonl`` file of objects with ``question`` and ``answer``.
        answer: ``number``: an answer ends with ``#### `` and a number, as in GSM8K, and only that number counts;
            ``text``: the whole answer counts, without regard to case.
        fewshot_data: file of the same form from which the solved examples before a question are taken, in its order.
        num_fewshot: how many of them.
        max_new_tokens: length limit of an answer, tokens.
        batch_size: questions of one forward pass.
        limit: only the first questions, or None for all.
        chat: put each question into the tokenizer's chat template.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(min_length=1)
    answer: Literal["number", "text"] = "number"
    fewshot_data: str | None = Field(default=None, min_length=1)
    num_fewshot: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    limit: int | None = Field(default=None, ge=1)
    chat: bool = False

    @model_validator(mode="after")
    def _examples_have_a_source(self) -> TaskSettings:
        if (self.fewshot_data is None) != (self.num_fewshot == 0):
            raise ValueError(
                f"fewshot_data = {self.fewshot_data} and num_fewshot = {self.num_fewshot} belong together: give a file "
                "and a number of at least 1, or neither"
            )
        return self


def check_task(name: str, settings: TaskSettings) -> None:
    """Find out before long work whether a task can run.

    Raises:
        ConfigError: lm-eval is not installed.
        DataFileError: a file is missing or malformed; names the line.
        EmptyPromptSetError: a file has no question, or too few examples.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluation.tasks.{name} needs the package lm-eval. pip install 'tdistill[tasks]', or leave the task out."
        )
    _count(settings.data, f"evaluation.tasks.{name}.data", settings.answer)
    if settings.fewshot_data is not None:
        where = f"evaluation.tasks.{name}.fewshot_data"
        found = _count(settings.fewshot_data, where, settings.answer)
        if found < settings.num_fewshot:
            raise EmptyPromptSetError(
                f"{settings.fewshot_data} ({where}) holds {found} examples, fewer than num_fewshot = "
                f"{settings.num_fewshot}. Add some, or lower num_fewshot."
            )


def task_config(name: str, settings: TaskSettings) -> dict[str, Any]:
    """The task as lm-eval's ``simple_evaluate`` takes it, which reads nothing but the local files.

    Exact match of the number after ``####``, commas and dollar signs left out.  Source: lm-eval's task ``gsm8k``
    (Cobbe et al. 2021, arXiv 2110.14168).
    Differs from the source: the examples before a question are the first ones of a file instead of drawn ones; an
    answer may have no space after ``####``; one that writes on is cut at its first empty line or next question.

    Args:
        name: what lm-eval calls it.
        settings: :class:`TaskSettings`.
    """
    files = {"test": str(Path(settings.data).resolve())}
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "num_fewshot": settings.num_fewshot,
        "generation_kwargs": {
            "until": ["\n\n", "Question:"],
            "do_sample": False,
            "max_gen_toks": settings.max_new_tokens,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", r"(?s).*####\s*", r"\.$", r"^\s+", r"\s+$"],
            }
        ],
        "filter_list": [{"name": _FILTER, "filter": _filters(settings.answer)}],
        "metadata": {"version": 1.0},
    }
    if settings.fewshot_data is not None:
        files["examples"] = str(Path(settings.fewshot_data).resolve())
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    return config | {"dataset_kwargs": {"data_files": files}}


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    settings: TaskSettings,
    *,
    end_token_ids: Sequence[int],
    seed: int = 0,
) -> np.ndarray:
    """Answer the questions of a task greedily and mark them.

    Args:
        model: causal language model; the model folder's own generation settings are not used.
        tokenizer: of the model.
        name: of the task.
        settings: :class:`TaskSettings`.
        end_token_ids: any of these ends an answer.
        seed: of lm-eval; nothing is drawn.
    Returns:
        1.0 for a right answer and 0.0 for a wrong one, float64 [questions], in the file's order.
    Raises:
        ConfigError, DataFileError, EmptyPromptSetError: see :func:`check_task`.
    """
    check_task(name, settings)
    # Seconds to import, and optional.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with measured(model):
        # Without it a row of a batch would write on after its end, and lm-eval drops end tokens from the text.
        model.generation_config = GenerationConfig(eos_token_id=list(end_token_ids), pad_token_id=end_token_ids[0])
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
            tasks=[task_config(name, settings)],
            task_manager=TaskManager(include_defaults=False),  # to read thousands of others takes seconds
            limit=settings.limit,
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat and settings.num_fewshot > 0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    samples: list[Mapping[str, Any]] = results["samples"][name]
    return np.array([float(sample["exact_match"]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])])


def _filters(answer: str) -> list[dict[str, Any]]:
    first = {"function": "take_first"}
    return [{"function": "regex", "regex_pattern": _NUMBER}, first] if answer == "number" else [first]


def _count(path: str, key: str, answer: str) -> int:
    """Number of questions of a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} ({key}) cannot be read: {error}. Name a .jsonl file in UTF-8.") from error
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [record["question"], record["answer"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataFileError(
                f'{path} ({key}), line {number}: expected an object such as {{"question": "2 + 2?", "answer": "#### '
                '4"}.'
            )
        if answer == "number" and _MARK not in texts[1]:
            raise DataFileError(
                f"{path} ({key}), line {number}: the answer {texts[1][:40]!r} has no '{_MARK}' before a number. Add "
                "it, or set answer: text."
            )
        found += 1
    if not found:
        raise EmptyPromptSetError(
            f'{path} ({key}) is empty. Add lines such as {{"question": "2 + 2?", "answer": "#### 4"}}.'
        )
    return found
