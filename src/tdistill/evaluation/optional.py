"""Records of what an evaluation measures only when its settings ask for it; ``docs/evaluation.md`` describes it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdistill.errors import ConfigError, did_you_mean
from tdistill.evaluation.bootstrap import bootstrap_mean, bootstrap_mean_difference, bootstrap_ratio_difference
from tdistill.evaluation.exposure import ExposureCurve, PositionSums, exposure, kl_by_position
from tdistill.evaluation.generation import SampledAnswer
from tdistill.evaluation.judge import JudgeSettings, check_judge, judge_answers
from tdistill.evaluation.kept import Kept
from tdistill.evaluation.perplexity import (
    PerplexitySettings,
    check_window,
    perplexity,
    text_losses,
    tokenize_documents,
)
from tdistill.evaluation.records import EvaluationSettings, Result
from tdistill.evaluation.scope import LEVEL, TEACHER, Scope
from tdistill.evaluation.states import open_head
from tdistill.evaluation.tasks import TaskSettings, check_task, check_task_context, run_task
from tdistill.files import file_sha256
from tdistill.prompts import num_token_ids

_log = logging.getLogger(__name__)

TEXT = "text"
"""Split of the records on plain text."""

Pairs = Sequence[tuple[str, str]]
Answers = Mapping[str, Sequence[Sequence[SampledAnswer]]]


def check_inputs(settings: EvaluationSettings) -> None:
    """Find out what can be known without a model: whether files, packages and the judge's key are there.

    Raises:
        ConfigError: a package or an environment variable is missing.
        DataFileError, EmptyPromptSetError: a file is missing, malformed or empty.
    """
    if settings.perplexity is not None:
        settings.perplexity.read()
    if settings.judge is not None:
        settings.judge.api_key()
    for name, task in (settings.tasks or {}).items():
        check_task(name, task)


def check_optional(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    split: str = "held_out",
) -> None:
    """Find out before long work whether everything optional can be measured.

    Raises:
        ConfigError: ``judge.against`` is no subject; a window is too long for a model; a task or a prompt set has the
            name of another split; and see :func:`check_inputs`.
        PromptTooLongError: see :func:`~tdistill.evaluation.tasks.check_task_context`.
        JudgeError: the judge does not answer, or refuses.
        UnsupportedModelError, TokenizerMismatchError, ModelLogitsError: see
            :func:`~tdistill.evaluation.states.open_head`.
    """
    check_inputs(settings)
    configs = {f"model '{name}'": model.config for name, model in models.items()}
    tasks, prompt_sets = settings.tasks or {}, settings.prompt_sets or {}
    for kind, names, taken in (("tasks", tasks, ()), ("prompt_sets", prompt_sets, tasks)):
        for name in names:
            if name in (split, TEXT, *taken):
                raise ConfigError(f"evaluation.{kind}.{name}: '{name}' already names a set of records. Rename it.")
    for name, task in tasks.items():
        check_task_context(name, task, tokenizer, configs)
    if settings.perplexity is not None:
        for name, model in models.items():
            check_window(model, name, settings.perplexity.window_tokens)
    if settings.perplexity is not None or settings.exposure is not None:
        for name, model in models.items():
            open_head(model, name, num_token_ids(tokenizer))
    if settings.judge is not None:
        if settings.judge.against not in models:
            raise ConfigError(
                f"evaluation.judge.against = '{settings.judge.against}' is not evaluated."
                f"{did_you_mean(settings.judge.against, models)}"
            )
        check_judge(settings.judge)


def exposure_records(
    scope: Scope,
    models: Mapping[str, PreTrainedModel],
    prompts: Mapping[str, np.ndarray],
    teachers: Sequence[Sequence[SampledAnswer]],
    answers: Answers,
    vocab_size: int,
    settings: EvaluationSettings,
    teacher_temperature: float,
    progress: bool,
) -> tuple[list[Result], list[ExposureCurve]]:
    """Divergence of each student on its own prefixes and on the teacher's, and the excess accumulated error.

    Args:
        scope: of the records.
        models: all subjects, the teacher among them.
        prompts: prompt id → tokens, int [P] each.
        teachers: the teacher's answers to each prompt.
        answers: subject → sampled answers to each prompt.
        vocab_size: tokens of the tokenizer.
        settings: with ``exposure``.
        teacher_temperature: as in :func:`~tdistill.evaluation.divergence.divergences`.
        progress: show bars.
    """
    assert settings.exposure is not None
    teacher = models[TEACHER]
    students = {name: model for name, model in models.items() if name != TEACHER}

    def measure(whose: Mapping[str, PreTrainedModel], rows: Sequence[Sequence[SampledAnswer]], label: str) -> dict:
        prompt_of = [index for index, row in enumerate(rows) for _ in row]
        values = kl_by_position(
            teacher,
            whose,
            [(ids, answer.token_ids) for ids, row in zip(prompts.values(), rows, strict=True) for answer in row],
            vocab_size=vocab_size,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            teacher_temperature=teacher_temperature,
            names=answer_names(label, prompts, rows, settings.seeds if rows is not teachers else ()),
            progress=label if progress else None,
        )
        return {name: PositionSums.gather(found, prompt_of, len(rows)) for name, found in values.items()}

    records, curves = [], []
    on_teachers = measure(students, teachers, "the teacher's prefixes") if students else {}
    for name, model in students.items():
        own = measure({name: model}, answers[name], f"prefixes of {name}")[name]
        found = exposure(
            own, on_teachers[name], name, min_share=settings.exposure.min_share, seed=scope.seed, level=LEVEL
        )
        curves.append(found.curve)
        length = len(found.curve.excess)
        note = f"Over positions 1 to {length}; own prefixes are samples at top-p {settings.top_p:g}."
        values = {
            "kl_own_prefixes": found.kl_own,
            "kl_teacher_prefixes": found.kl_teacher,
            "excess_accumulated_error": found.excess,
        }
        records += [
            scope.record(metric, name, interval, seeds=settings.seeds, note=note)
            for metric, interval in values.items()
            if interval is not None
        ]
    return records, curves


def answer_names(
    whose: str, prompt_ids: Iterable[str], rows: Sequence[Sequence[SampledAnswer]], seeds: Sequence[int]
) -> list[str]:
    """What messages call the answers to each prompt; ``seeds`` of those of each row, empty where they have none."""
    return [
        f"{whose}: prompt '{prompt_id}'" + (f" with seed {seeds[index]}" if seeds else "")
        for prompt_id, row in zip(prompt_ids, rows, strict=True)
        for index in range(len(row))
    ]


def text_records(
    scope: Scope,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: PerplexitySettings,
    batch_size: int,
    pairs: Pairs,
    progress: bool,
) -> list[Result]:
    """Perplexity of plain text, and the paired difference in nats per token of the pairs (subject, against)."""
    documents = tokenize_documents(settings.read(), tokenizer)
    losses = text_losses(
        models,
        documents,
        vocab_size=num_token_ids(tokenizer),
        window_tokens=settings.window_tokens,
        stride_tokens=settings.stride_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    shared = {"split": TEXT, "num_items": len(documents), "note": f"Windows of {settings.window_tokens} tokens."}
    records = [
        scope.record(metric, name, interval, **shared)
        for name, found in losses.items()
        for metric, interval in perplexity(found, documents, scope.seed, LEVEL).items()
    ]
    tokens = [len(document.token_ids) - 1 for document in documents]
    for subject, against in dict.fromkeys(pairs):
        interval = bootstrap_ratio_difference(losses[subject], tokens, losses[against], tokens, scope.seed, LEVEL)
        records.append(scope.record("text_nll", subject, interval, against=against, **shared))
    return records


def judge_records(
    scope: Scope,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    settings: JudgeSettings,
    progress: bool,
    kept: Kept,
) -> list[Result]:
    """Win rate of every subject against one of them, and how far the judge can be relied on.

    Args:
        scope: of the records.
        prompts: texts.
        answers: subject → text of one answer to each prompt.
        settings: :class:`JudgeSettings`.
        progress: show bars.
        kept: where replies are kept.
    """
    asked = slice(settings.max_prompts)
    records = []
    for name, texts in answers.items():
        if name == settings.against:
            continue
        found = judge_answers(
            prompts[asked],
            texts[asked],
            answers[settings.against][asked],
            settings,
            progress=f"judge, {name}" if progress else None,
            keep=partial(kept.get, "judge", name),
        )
        num_prompts = len(found.score)
        note = (
            f"Against {settings.against}, by {settings.model}, both orders. Of {2 * num_prompts} requests "
            f"{found.num_malformed} had no readable verdict and {found.num_unanswered} no reply."
        )
        unread = (found.num_malformed + found.num_unanswered) / (2 * num_prompts)
        exact = {"low": None, "high": None, "level": None, "num_items": 2 * num_prompts}
        records.append(
            scope.record("judge_unread_share", name, bootstrap_mean([unread], scope.seed), **{**exact, "note": note})
        )
        score, agrees = found.score[found.judged], found.agrees[found.judged]
        if not len(score):
            _log.warning("The judge gave no verdict on %s in both orders, so no win rate is recorded.", name)
            continue
        rates = {"judge_win_rate": score, "judge_tie_share": score == 0.5, "judge_self_agreement": agrees}
        records += [
            scope.record(
                metric,
                name,
                bootstrap_mean(values, scope.seed, LEVEL, shares=True),
                num_items=int(found.judged.sum()),
                note=note,
            )
            for metric, values in rates.items()
        ]
    return records


def task_records(
    scope: Scope,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskSettings],
    end_token_ids: Sequence[int],
    pairs: Pairs,
    kept: Kept,
) -> list[Result]:
    """Share of right answers to each task, and its paired difference of the pairs (subject, against)."""
    records = []
    for task, settings in tasks.items():
        files = [file_sha256(Path(path)) for path in (settings.data, settings.fewshot_data) if path is not None]
        facts = {**settings.model_dump(), "files": files, "end_token_ids": list(end_token_ids)}

        def marks_of(model: PreTrainedModel, task: str = task, settings: TaskSettings = settings) -> list[float]:
            marks = run_task(model, tokenizer, task, settings, end_token_ids=end_token_ids, seed=scope.seed)
            return [float(mark) for mark in marks]

        marks = {
            name: np.array(kept.get("task", name, facts, partial(marks_of, model))) for name, model in models.items()
        }
        note = f"lm-eval, greedy, {settings.num_fewshot} examples before each question."
        for name, found in marks.items():
            shared = {"split": task, "num_items": len(found), "note": note}
            interval = bootstrap_mean(found, scope.seed, LEVEL, shares=True)
            records.append(scope.record("task_accuracy", name, interval, **shared))
        for subject, against in dict.fromkeys(pairs):
            interval = bootstrap_mean_difference(marks[subject], marks[against], scope.seed, LEVEL, shares=True)
            shared = {"split": task, "num_items": len(marks[subject]), "against": against, "note": note}
            records.append(scope.record("task_accuracy", subject, interval, **shared))
    return records
