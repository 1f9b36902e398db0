"""Tasks with right and wrong answers, such as GSM8K, through lm-eval, on data that lies on this machine."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tdistill.errors import ConfigError, DataFileError, EmptyPromptSetError, PromptTooLongError
from tdistill.evaluation.batching import measured
from tdistill.prompts.read import check_characters

_FILTER = "get-answer"
# The number that ends a solution of GSM8K.
_NUMBER = r"####\s*(\-?[0-9\.\,]*[0-9])"
_MARK = "####"
# What ends an answer beside the end tokens: those of lm-eval's task gsm8k. An empty line does not, for solutions have
# paragraphs.
_STOPS = ("Question:", "</s>", "<|im_end|>")


class _Solved(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


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
    _check_installed(name)
    _read(name, settings)


def check_task_context(
    name: str, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase, configs: Mapping[str, PreTrainedConfig]
) -> None:
    """Find out before long work whether the prompts of a task, and the answers to them, fit into the models.

    lm-eval would cut a longer prompt from the left, and with it the examples.

    Args:
        name: of the task.
        settings: :class:`TaskSettings`.
        tokenizer: of all models.
        configs: what a model is called in the message → its configuration.
    Raises:
        PromptTooLongError: the longest prompt and its answer may be longer than what a model was made for.
        ConfigError: the tokenizer has no chat template, or its template refuses the conversation.
        DataFileError, EmptyPromptSetError: see :func:`check_task`.
    """
    lengths = [_num_tokens(prompt, tokenizer) for prompt in task_prompts(name, settings, tokenizer)]
    longest = int(np.argmax(lengths))
    for who, config in configs.items():
        limit = _context_tokens(config)
        if limit is not None and lengths[longest] + settings.max_new_tokens > limit:
            raise PromptTooLongError(
                f"evaluation.tasks.{name}: question {longest + 1} of {settings.data} has {lengths[longest]} tokens "
                f"with its num_fewshot = {settings.num_fewshot} examples, and its answer up to max_new_tokens = "
                f"{settings.max_new_tokens}; {who} was made for {limit} in all. Lower num_fewshot or max_new_tokens, "
                "or leave the question out."
            )


def task_prompts(name: str, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts as lm-eval makes them of :func:`task_config`, in the file's order.

    Raises:
        ConfigError, DataFileError, EmptyPromptSetError: see :func:`check_task_context`.
    """
    examples, questions = _read(name, settings)
    if not settings.chat:
        before = "".join(f"{_asked(shown)} {shown.answer}\n\n" for shown in examples)
        return [before + _asked(question) for question in questions]
    where = f"evaluation.tasks.{name}.chat = true"
    if not tokenizer.chat_template:
        raise ConfigError(f"{where}, but the tokenizer has no chat template. Set it to false, or give it a template.")
    turns = [
        turn
        for shown in examples
        for turn in ({"role": "user", "content": _asked(shown)}, {"role": "assistant", "content": shown.answer})
    ]
    try:
        return [
            str(
                tokenizer.apply_chat_template(
                    [*turns, {"role": "user", "content": _asked(question)}], tokenize=False, add_generation_prompt=True
                )
            )
            for question in questions
        ]
    except (ValueError, TemplateError) as error:
        raise ConfigError(f"{where}, but the chat template refuses the question: {error}. Set it to false.") from error


def _asked(question: _Solved) -> str:
    return f"Question: {question.question}\nAnswer:"


def _num_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase) -> int:
    # Chat templates write the BOS token themselves, and lm-eval then adds none.
    has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    return len(tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"])


def _context_tokens(config: PreTrainedConfig) -> int | None:
    """Tokens that a model was made for, or None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_installed(name: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluation.tasks.{name} needs the package lm-eval. pip install 'tdistill[tasks]', or leave the task out."
        )


def _read(name: str, settings: TaskSettings) -> tuple[list[_Solved], list[_Solved]]:
    """The solved examples and the questions of a task."""
    questions = _read_file(settings.data, f"evaluation.tasks.{name}.data", settings.answer)
    examples: list[_Solved] = []
    if settings.fewshot_data is not None:
        where = f"evaluation.tasks.{name}.fewshot_data"
        examples = _read_file(settings.fewshot_data, where, settings.answer)
        if len(examples) < settings.num_fewshot:
            raise EmptyPromptSetError(
                f"{settings.fewshot_data} ({where}) holds {len(examples)} examples, fewer than num_fewshot = "
                f"{settings.num_fewshot}. Add some, or lower num_fewshot."
            )
    return examples[: settings.num_fewshot], questions[: settings.limit]


def task_config(name: str, settings: TaskSettings) -> dict[str, Any]:
    """The task as lm-eval's ``simple_evaluate`` takes it, which reads nothing but the local files.

    Exact match of the number after the first ``####``, commas and dollar signs left out; an answer that writes on is
    cut at its next question.  Source: lm-eval's task ``gsm8k``, version 3, ``strict-match`` (Cobbe et al. 2021,
    arXiv 2110.14168).
    Differs from the source: the examples before a question are the first ones of a file instead of drawn ones; an
    answer may have no space after ``####``. With ``answer: text`` and without ``chat``, an empty line ends an answer
    too: it stands after every example.

    Args:
        name: what lm-eval calls it.
        settings: :class:`TaskSettings`.
    """
    files = {"test": str(Path(settings.data).resolve())}
    until = [*_STOPS, "\n\n"] if settings.answer == "text" and not settings.chat else [*_STOPS]
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "num_fewshot": settings.num_fewshot,
        "generation_kwargs": {
            "until": until,
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
        PromptTooLongError: see :func:`check_task_context`.
    """
    check_task(name, settings)
    check_task_context(name, settings, tokenizer, {"the model": model.config})
    # Seconds to import, and optional.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, measured(model):
        config = task_config(name, _with_plain_files(name, settings, Path(folder)))
        config["dataset_kwargs"]["cache_dir"] = folder  # or a copy would stay for every run
        # Without it a row of a batch would write on after its end, and lm-eval drops end tokens from the text.
        model.generation_config = GenerationConfig(eos_token_id=list(end_token_ids), pad_token_id=end_token_ids[0])
        results = simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                # Where a configuration names no limit, lm-eval assumes one and cuts longer prompts.
                max_length=_context_tokens(model.config) or sys.maxsize,
            ),
            tasks=[config],
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


def _with_plain_files(name: str, settings: TaskSettings, folder: Path) -> TaskSettings:
    """The task on copies of its files, in which every record has the two fields that count and no other.

    Of records with other fields, ``datasets`` wants the same ones in all files.
    """
    paths = {}
    for field, records in zip(("fewshot_data", "data"), _read(name, settings), strict=True):
        if records:
            path = folder / f"{field}.jsonl"
            path.write_text("".join(json.dumps(record._asdict()) + "\n" for record in records), encoding="utf-8")
            paths[field] = str(path)
    return settings.model_copy(update=paths)


def _filters(answer: str) -> list[dict[str, Any]]:
    first = {"function": "take_first"}
    return [{"function": "regex", "regex_pattern": _NUMBER}, first] if answer == "number" else [first]


def _read_file(path: str, key: str, answer: str) -> list[_Solved]:
    """The questions of a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} ({key}) cannot be read: {error}. Name a .jsonl file in UTF-8.") from error
    found: list[_Solved] = []
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
        for field, text in zip(_Solved._fields, texts, strict=True):
            check_characters(text, field, f"{path} ({key}), line {number}")
        found.append(_Solved(*texts))
    if not found:
        raise EmptyPromptSetError(
            f'{path} ({key}) is empty. Add lines such as {{"question": "2 + 2?", "answer": "#### 4"}}.'
        )
    return found
