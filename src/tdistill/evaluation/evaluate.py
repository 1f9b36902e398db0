"""Everything that is measured about a teacher and its students on one held-out set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdistill.errors import ConfigError, DataFileError, EmptyPromptSetError, did_you_mean
from tdistill.evaluation.answers import Sampler, rouge_scores
from tdistill.evaluation.bootstrap import (
    Interval,
    bootstrap_mean,
    bootstrap_mean_difference,
    bootstrap_ratio,
    bootstrap_ratio_difference,
)
from tdistill.evaluation.divergence import TokenTotals, divergences, teacher_loss_on
from tdistill.evaluation.exposure import ExposureCurve
from tdistill.evaluation.generation import SampledAnswer
from tdistill.evaluation.kept import Kept
from tdistill.evaluation.optional import (
    answer_names,
    check_optional,
    exposure_records,
    judge_records,
    task_records,
    text_records,
)
from tdistill.evaluation.prompt_sets import PromptSet, set_records
from tdistill.evaluation.records import AnswerScores, EvaluationSettings, Result, Results, Scores, ShownAnswers
from tdistill.evaluation.scope import TEACHER, Scope
from tdistill.evaluation.speed import decode_speed, num_parameters, weights_bytes
from tdistill.evaluation.text import distinct_bigrams
from tdistill.prompts import num_token_ids
from tdistill.types import Trajectory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Prompt:
    prompt_id: str
    prompt_ids: np.ndarray
    stored: list[SampledAnswer]


def evaluate(
    subjects: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Trajectory],
    references: Mapping[str, Sequence[str]] | None,
    *,
    end_token_ids: Sequence[int],
    settings: EvaluationSettings,
    teacher_temperature: float = 1.0,
    split: str = "held_out",
    progress: bool = True,
    kept: Kept | None = None,
    prompt_sets: Mapping[str, PromptSet] | None = None,
) -> Results:
    """Measure the teacher and its students on held-out prompts.

    Every interval is over prompts. On the stored teacher answers: divergence, losses, agreement, mass off the set, and
    the share of the gap that a student closed. On sampled answers: Rouge-L, distinct-2, length, termination, and the
    teacher's loss on them; of the teacher its stored answers, or sampled ones where the stored ones were given. Of the
    model itself: decoding speed, parameters, bytes. If the settings ask for it: exposure bias, perplexity of plain
    text, win rates by a judge, tasks with right answers, and Rouge-L on further prompts.

    Args:
        subjects: name → student; ``teacher`` is added by itself.
        teacher: the model that the trajectories come from.
        tokenizer: shared by all; its length is the vocabulary that is compared.
        held_out: trajectories of prompts that no student was trained on.
        references: prompt id → texts written by people, or None: then Rouge-L is against the teacher's answers only.
        end_token_ids: any of these ends an answer.
        settings: :class:`EvaluationSettings`.
        teacher_temperature: that of the policy which the teacher was asked for and the students learn; the teacher's
            logits are divided by it and by the settings' temperature, the students' by the latter alone.
        split: name of the prompt set, written into every record.
        progress: show bars with tokens per second.
        kept: answers, marks of tasks and the judge's replies that an earlier evaluation left are taken from here.
        prompt_sets: name → further prompts with references, on which Rouge-L alone is measured.
    Raises:
        EmptyPromptSetError: no trajectory.
        ConfigError: a pair in ``settings.compare`` names no subject, or a subject called teacher is another model; and
            see :func:`~tdistill.evaluation.optional.check_optional`, also for JudgeError and UnsupportedModelError.
        DataFileError: a prompt has no reference.
        TokenizerMismatchError: a model has fewer output tokens than the tokenizer.
        ModelLogitsError: a model returns NaN; names it.
    """
    models, kept = {TEACHER: teacher, **subjects}, kept or Kept()
    _check(models, teacher, held_out, references, settings)
    check_optional(models, tokenizer, settings, split)
    if (named := set(settings.prompt_sets or {})) != (sets := set(prompt_sets or {})):
        raise ConfigError(
            f"The settings name the prompt sets {sorted(named)}, and those of {sorted(sets)} were given. Give both."
        )
    prompts = _group(held_out)
    scope = Scope(split, len(prompts), settings.bootstrap_seed)
    vocab_size = num_token_ids(tokenizer)

    totals = divergences(
        teacher,
        models,
        held_out,
        vocab_size=vocab_size,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        teacher_temperature=teacher_temperature,
        progress=progress,
    )
    position = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
    prompt_of = np.array([position[trajectory.prompt_id] for trajectory in held_out])
    # Answers that were given are not the teacher's, so it answers here, once if nothing else is asked for.
    given = any(trajectory.source == "given" for trajectory in held_out)
    teacher_seeds = settings.teacher_seeds or (settings.seeds[:1] if given else ())
    teachers_own = settings.temperature * teacher_temperature
    seeds = {name: teacher_seeds if name == TEACHER else settings.seeds for name in models}
    how = dict.fromkeys(models, settings)
    how[TEACHER] = settings.model_copy(update={"temperature": teachers_own})

    def by_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(prompt_of, weights=values, minlength=len(prompts))

    sample = Sampler(models, how, end_token_ids, vocab_size, kept, progress)
    prompts_ids = [prompt.prompt_ids for prompt in prompts]
    answers = {name: sample(name, prompts_ids, of) for name, of in seeds.items() if of}
    stored = [prompt.stored for prompt in prompts]
    teachers = answers[TEACHER] if given else stored

    def text(answer: SampledAnswer) -> str:
        return str(tokenizer.decode(answer.token_ids, skip_special_tokens=True))

    given_note = "The held-out answers were given, not sampled from the teacher." if given else None
    sampled_note = f"To its answers with seed {', '.join(map(str, teacher_seeds))}." if given else None
    compared = {name: rows for name, rows in answers.items() if rows is not teachers}
    scores = {"rouge_l_teacher": rouge_scores(compared, [[text(answer) for answer in row] for row in teachers], text)}
    if references is not None:
        by_people = [list(references[prompt.prompt_id]) for prompt in prompts]
        scores["rouge_l"] = rouge_scores({TEACHER: stored, **answers}, by_people, text)

    records: list[Result] = []
    for name, model in models.items():
        records += _divergence_records(scope, name, totals[name], by_prompt, given_note)
        records += _gap_closed(scope, name, totals, by_prompt, settings.start, given_note)
        is_stored = name not in answers
        stored_note = "Stored answers, as they were captured." if is_stored else None
        records += [
            scope.record(
                metric,
                name,
                bootstrap_mean(of[name], scope.seed),
                seeds=seeds[name],
                note=stored_note or (sampled_note if metric == "rouge_l_teacher" else None),
            )
            for metric, of in scores.items()
            if name in of
        ]
        records += _answer_records(scope, name, stored if is_stored else answers[name], seeds[name], stored_note)
        if not is_stored:
            flat = [(prompt, answer) for prompt, row in zip(prompts, answers[name], strict=True) for answer in row]
            sums, counts = teacher_loss_on(
                teacher,
                [prompt.prompt_ids for prompt, _ in flat],
                [answer.token_ids for _, answer in flat],
                vocab_size=vocab_size,
                batch_size=settings.batch_size,
                temperature=teachers_own,
                names=answer_names(f"answers of {name}", position, answers[name], seeds[name]),
                progress=f"teacher on {name}" if progress else None,
            )
            shape = (len(prompts), -1)
            loss = bootstrap_ratio(sums.reshape(shape), counts.reshape(shape), scope.seed)
            records.append(scope.record("teacher_nll_on_student_answers", name, loss, seeds=seeds[name]))
        records += _cost_records(scope, name, model, prompts_ids, settings.speed_tokens)
    for subject, against in dict.fromkeys(settings.compare):
        records += _differences(scope, subject, against, totals, scores, by_prompt, settings.seeds, given_note)
    curves: list[ExposureCurve] = []
    if settings.exposure is not None:
        by_id = {prompt.prompt_id: prompt.prompt_ids for prompt in prompts}
        found, curves = exposure_records(
            scope, models, by_id, teachers, answers, vocab_size, settings, teacher_temperature, progress
        )
        records += found
    if settings.perplexity is not None:
        records += text_records(
            scope, models, tokenizer, settings.perplexity, settings.batch_size, settings.compare, progress
        )
    asked_seeds = {**seeds, TEACHER: settings.teacher_seeds or settings.seeds[:1]}
    of_sets, scores_of_sets = set_records(scope, sample, prompt_sets or {}, asked_seeds, settings.compare, text)
    records += of_sets
    if settings.tasks is not None:
        records += task_records(scope, models, tokenizer, settings.tasks, end_token_ids, settings.compare, kept)
    asked = [str(tokenizer.decode(prompt.prompt_ids, skip_special_tokens=True)) for prompt in prompts]
    first_answers = {TEACHER: [text(row[0]) for row in teachers]}
    first_answers |= {name: [text(row[0]) for row in rows] for name, rows in answers.items() if name != TEACHER}
    if settings.judge is not None:
        records += judge_records(scope, asked, first_answers, settings.judge, progress, kept)
    shown = [
        ShownAnswers(
            prompt_id=prompt.prompt_id,
            prompt=asked[index],
            answers={name: texts[index] for name, texts in first_answers.items()},
        )
        for index, prompt in enumerate(prompts[: settings.num_shown_prompts])
    ]
    return Results(
        settings=settings,
        records=tuple(records),
        answers=tuple(shown),
        exposure=tuple(curves),
        scores=_scores(
            split, prompts, totals, scores, by_prompt, {name: seeds[name] for name in answers}, scores_of_sets
        ),
    )


def _check(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    held_out: Sequence[Trajectory],
    references: Mapping[str, Sequence[str]] | None,
    settings: EvaluationSettings,
) -> None:
    if not held_out:
        raise EmptyPromptSetError(
            "There is no held-out trajectory to evaluate on. Capture at least one held-out prompt."
        )
    if models[TEACHER] is not teacher:
        raise ConfigError(f"A subject is called '{TEACHER}' but is another model than the teacher. Rename it.")
    for pair in settings.compare:
        for name in pair:
            if name not in models:
                raise ConfigError(
                    f"compare names the subject '{name}', which is not evaluated.{did_you_mean(name, models)}"
                )
    for trajectory in held_out:
        if references is not None and not references.get(trajectory.prompt_id):
            raise DataFileError(
                f"Held-out prompt '{trajectory.prompt_id}' has no reference answer. Add one, or give no references."
            )


def _group(held_out: Sequence[Trajectory]) -> list[_Prompt]:
    """Prompts in order of first appearance, each with its stored answers."""
    prompts: dict[str, _Prompt] = {}
    for trajectory in held_out:
        prompt = prompts.setdefault(
            trajectory.prompt_id, _Prompt(trajectory.prompt_id, trajectory.prompt_ids, stored=[])
        )
        prompt.stored.append(SampledAnswer(trajectory.response_ids, trajectory.ends == "terminal"))
    return list(prompts.values())


def _divergence_records(
    scope: Scope, name: str, total: TokenTotals, by_prompt: Callable[[np.ndarray], np.ndarray], note: str | None
) -> list[Result]:
    counts = by_prompt(total.num_tokens)
    return [
        scope.record(metric, name, bootstrap_ratio(by_prompt(sums), counts, scope.seed), note=note)
        for metric, sums in _per_token(total).items()
    ]


def _per_token(total: TokenTotals) -> dict[str, np.ndarray]:
    """Metric → sums over the tokens of each answer."""
    sums = {
        "kl_teacher_student": total.kl_teacher_student,
        "nll_teacher_answers": total.nll,
        "agreement_top1": total.agreement_top1,
        "mass_outside_set": total.mass_outside_set,
    }
    return {metric: of for metric, of in sums.items() if of is not None}


def _scores(
    split: str,
    prompts: Sequence[_Prompt],
    totals: Mapping[str, TokenTotals],
    answer_scores: Mapping[str, Mapping[str, np.ndarray]],
    by_prompt: Callable[[np.ndarray], np.ndarray],
    seeds: Mapping[str, tuple[int, ...]],
    prompt_sets: Mapping[str, AnswerScores],
) -> Scores:
    """What was measured of each prompt; ``seeds`` of the subjects whose answers were sampled."""
    token_sums: dict[str, dict[str, list[float]]] = {}
    for name, total in totals.items():
        for metric, sums in _per_token(total).items():
            token_sums.setdefault(metric, {})[name] = by_prompt(sums).round(6).tolist()

    def rows(name: str, scores: np.ndarray) -> list[list[float]]:
        # Stored answers are not seeds of each other.
        return (scores if name in seeds else scores.mean(1, keepdims=True)).round(6).tolist()

    return Scores.model_validate(
        {
            "split": split,
            "prompt_ids": [prompt.prompt_id for prompt in prompts],
            "num_tokens": by_prompt(totals[TEACHER].num_tokens).astype(int).tolist(),
            "token_sums": token_sums,
            "seeds": {name: seeds.get(name, ()) for name in totals},
            "answer_scores": {
                metric: {name: rows(name, scores) for name, scores in of.items()}
                for metric, of in answer_scores.items()
            },
            "prompt_sets": prompt_sets,
        }
    )


def _gap_closed(
    scope: Scope,
    name: str,
    totals: Mapping[str, TokenTotals],
    by_prompt: Callable[[np.ndarray], np.ndarray],
    start: str,
    given_note: str | None,
) -> list[Result]:
    """Share of the start's excess loss that a student lost: (L_start − L_student) / (L_start − L_teacher).

    L is the loss on the held-out teacher answers; all three are over the same tokens, so their number cancels.
    """
    if name in (TEACHER, start) or start not in totals:
        return []
    gap = by_prompt(totals[start].nll - totals[start].nll_teacher)
    if gap.sum() <= 0:
        _log.warning("gap_closed of %s is not recorded: the loss of %s is not above the teacher's.", name, start)
        return []
    interval, note = bootstrap_ratio(by_prompt(totals[start].nll - totals[name].nll), gap, scope.seed), given_note
    low = bootstrap_mean(gap, scope.seed).low
    if low is not None and low <= 0:
        interval = Interval(interval.value, None, None)
        why = f"No interval: that {start} has a higher loss than the teacher is itself not certain."
        note = " ".join(filter(None, [given_note, why]))
    return [scope.record("gap_closed", name, interval, note=note)]


def _answer_records(
    scope: Scope, name: str, rows: Sequence[Sequence[SampledAnswer]], seeds: tuple[int, ...], note: str | None
) -> list[Result]:
    lengths = [float(np.mean([len(answer.token_ids) for answer in row])) for row in rows]
    terminated = [float(np.mean([answer.terminated for answer in row])) for row in rows]
    intervals = {
        "response_length": bootstrap_mean(lengths, scope.seed),
        "terminated_share": bootstrap_mean(terminated, scope.seed, shares=True),
    }
    bigrams = np.array([np.sum([distinct_bigrams(answer.token_ids) for answer in row], axis=0) for row in rows])
    if bigrams[:, 1].any():
        intervals["distinct_2"] = bootstrap_ratio(bigrams[:, 0], bigrams[:, 1], scope.seed)
    return [scope.record(metric, name, interval, seeds=seeds, note=note) for metric, interval in intervals.items()]


def _cost_records(
    scope: Scope, name: str, model: PreTrainedModel, prompts_ids: list[np.ndarray], speed_tokens: int
) -> list[Result]:
    parameters, size = float(num_parameters(model)), float(weights_bytes(model))
    exact = {"level": None, "num_items": 1}
    return [
        scope.record(
            "decode_tokens_per_s",
            name,
            decode_speed(model, prompts_ids, speed_tokens),
            level=None,
            num_items=3,
            note=f"Greedy, batch 1, {speed_tokens} tokens, {model.device.type}. Low and high: slowest and fastest run.",
        ),
        scope.record("num_parameters", name, Interval(parameters, parameters, parameters), **exact),
        scope.record("weights_bytes", name, Interval(size, size, size), note=f"In {model.dtype}.", **exact),
    ]


def _differences(
    scope: Scope,
    subject: str,
    against: str,
    totals: Mapping[str, TokenTotals],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    by_prompt: Callable[[np.ndarray], np.ndarray],
    seeds: tuple[int, ...],
    given_note: str | None,
) -> list[Result]:
    """Paired differences subject − against over the same prompts."""
    a, b = totals[subject], totals[against]
    counts = by_prompt(a.num_tokens)
    per_token = {
        "kl_teacher_student": (a.kl_teacher_student, b.kl_teacher_student),
        "nll_teacher_answers": (a.nll, b.nll),
    }
    records = [
        scope.record(
            metric,
            subject,
            bootstrap_ratio_difference(by_prompt(x), counts, by_prompt(y), counts, scope.seed),
            against=against,
            note=given_note,
        )
        for metric, (x, y) in per_token.items()
    ]
    return records + [
        scope.record(
            metric,
            subject,
            bootstrap_mean_difference(of[subject], of[against], scope.seed),
            against=against,
            seeds=seeds,
        )
        for metric, of in scores.items()
        if subject in of and against in of
    ]
