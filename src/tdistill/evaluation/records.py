"""The one record type that evaluation writes, and the artifact that holds the records."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_serializer

from tdistill.evaluation.exposure import ExposureCurve, ExposureSettings
from tdistill.evaluation.judge import JudgeSettings
from tdistill.evaluation.perplexity import PerplexitySettings
from tdistill.evaluation.tasks import TaskSettings


class Metric(NamedTuple):
    """Unit of a metric and whether more is better; None where neither direction is, and the teacher's own value is."""

    unit: str
    higher_is_better: bool | None


METRICS = {
    "kl_teacher_student": Metric("nats/token", False),
    "nll_teacher_answers": Metric("nats/token", False),
    "agreement_top1": Metric("share", True),
    "mass_outside_set": Metric("share", False),
    "gap_closed": Metric("share", True),
    "rouge_l_teacher": Metric("F1", True),
    "rouge_l": Metric("F1", True),
    "distinct_2": Metric("share", None),
    "response_length": Metric("tokens", None),
    "terminated_share": Metric("share", None),
    "teacher_nll_on_student_answers": Metric("nats/token", None),
    "decode_tokens_per_s": Metric("tokens/s", True),
    "num_parameters": Metric("parameters", False),
    "weights_bytes": Metric("bytes", False),
}
"""What every evaluation measures."""

OPTIONAL_METRICS = {
    "kl_own_prefixes": Metric("nats/token", False),
    "kl_teacher_prefixes": Metric("nats/token", False),
    "excess_accumulated_error": Metric("share", False),
    "text_nll": Metric("nats/token", False),
    "text_perplexity": Metric("", False),
    "text_word_perplexity": Metric("", False),
    "text_bits_per_byte": Metric("bits/byte", False),
    "judge_win_rate": Metric("share", True),
    "judge_tie_share": Metric("share", None),
    "judge_self_agreement": Metric("share", None),
    "judge_unread_share": Metric("share", None),
    "task_accuracy": Metric("share", True),
}
"""What an evaluation measures when its settings ask for it."""


class EvaluationSettings(BaseModel):
    """How answers are sampled and what is compared.

    Attributes:
        seeds: one sampled answer per prompt and seed. Source: arXiv 2505.20335, evaluation.
        teacher_seeds: seeds for which the teacher is sampled too, which measures how close two of its own answers are.
            With none, its stored answers stand for it, which costs nothing; where those were given and are not its
            own, it answers with the first of ``seeds``.
        max_new_tokens: length limit of an answer, tokens.
        temperature: of sampling, and of every divergence.
        top_p: mass of the sets that answers are sampled from.
        batch_size: sequences of one forward pass.
        bootstrap_seed: seed of the resampling of prompts.
        compare: pairs (subject, against) whose paired difference is recorded.
        start: subject that a student's gain is measured from, in ``gap_closed``.
        num_shown_prompts: prompts whose answers are kept as text.
        speed_tokens: tokens of one timed generation.
        exposure: measure exposure bias, or None.
        perplexity: measure the perplexity of plain text, or None.
        judge: have a language model compare the answers, or None.
        tasks: name → task with right and wrong answers, or None.
        prompt_sets: name → source of further prompts with references, on which Rouge-L alone is measured, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    teacher_seeds: tuple[int, ...] = ()
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.8, gt=0, le=1)
    batch_size: int = Field(default=16, ge=1)
    bootstrap_seed: int = Field(default=0, ge=0)
    compare: tuple[tuple[str, str], ...] = ()
    start: str = "start"
    num_shown_prompts: int = Field(default=12, ge=0)
    speed_tokens: int = Field(default=64, ge=1)
    exposure: ExposureSettings | None = None
    perplexity: PerplexitySettings | None = None
    judge: JudgeSettings | None = None
    tasks: dict[str, TaskSettings] | None = None
    prompt_sets: dict[str, str] | None = None


class Result(BaseModel):
    """One measured number.

    Attributes:
        metric: a key of :data:`METRICS` or :data:`OPTIONAL_METRICS`.
        subject: name of the model, such as ``teacher``, ``start``, ``sft`` or ``bd``.
        split: name of the prompt set; ``text`` for plain text, and the name of a task.
        value: point estimate; with ``against``, the paired difference subject − against.
        low: lower end of the interval, or None where the data define none (a single prompt).
        high: upper end.
        level: confidence level of a bootstrap interval over prompts; None where low and high are not one.
        unit: unit of value, low and high.
        num_items: prompts (or timed runs, documents, questions) behind the value.
        seeds: sampling seeds averaged inside each prompt; empty for what is not sampled.
        against: the other subject of a paired difference, or None.
        higher_is_better: None where neither direction is.
        note: what a reader must know about this number, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    subject: str
    split: str
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    level: float | None
    unit: str
    num_items: int
    seeds: tuple[int, ...] = ()
    against: str | None = None
    higher_is_better: bool | None
    note: str | None = None


class ShownAnswers(BaseModel):
    """Answers to one prompt as text: subject → answer of the first seed; the teacher's is stored if it has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str
    prompt: str
    answers: dict[str, str]


class AnswerScores(BaseModel):
    """Scores of the answers to one prompt set.

    Attributes:
        prompt_ids: the prompts; every list below has their order.
        seeds: subject → seeds of its sampled answers; none for stored answers.
        answer_scores: metric → subject → by prompt, one score per seed, or the mean over the stored answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_ids: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    answer_scores: dict[str, dict[str, tuple[tuple[FiniteFloat, ...], ...]]]


class Scores(AnswerScores):
    """Content of ``scores.json``: what the intervals of ``results.json`` are over, prompt by prompt.

    Two runs that share prompts can be compared pair by pair with it. Numbers are rounded to 1e-6.

    Attributes:
        format: what the file is.
        version: of its format.
        split: name of the prompt set.
        num_tokens: tokens of each prompt's stored answers.
        token_sums: metric → subject → sums over those tokens.
        prompt_sets: name → scores on these further prompts, of which there are no stored answers.
    """

    format: Literal["tdistill-scores"] = "tdistill-scores"
    version: Literal[1] = 1
    split: str
    num_tokens: tuple[int, ...]
    token_sums: dict[str, dict[str, tuple[FiniteFloat, ...]]]
    prompt_sets: dict[str, AnswerScores] = Field(default_factory=dict)


class Results(BaseModel):
    """Content of ``results.json``; what a run adds there (its name, summary and sparsity) is left out in reading.

    Attributes:
        settings: how it was measured.
        records: the numbers.
        answers: texts of some prompts.
        exposure: curves over position; left out of the file where none was measured.
        scores: content of ``scores.json``; never in this file.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    settings: EvaluationSettings
    records: tuple[Result, ...]
    answers: tuple[ShownAnswers, ...]
    exposure: tuple[ExposureCurve, ...] = ()
    scores: Scores | None = Field(default=None, exclude=True)

    @model_serializer(mode="wrap")
    def _without_what_was_not_measured(self, handler: Any) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return content if self.exposure else {key: value for key, value in content.items() if key != "exposure"}

    def to_json(self) -> str:
        """Return the JSON text of ``results.json``."""
        return self.model_dump_json(indent=2) + "\n"

    def find(self, metric: str, subject: str, against: str | None = None, split: str | None = None) -> Result | None:
        """Return the record of a metric and subject, or None; without a split the first one."""
        wanted = (metric, subject, against)
        found = (r for r in self.records if (r.metric, r.subject, r.against) == wanted)
        return next((r for r in found if split in (None, r.split)), None)
