"""Reading a finished run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tdistill.errors import ConfigError, DataFileError, did_you_mean

_REMEDY = "`tdistill run RECIPE` makes it; the same command goes on with an unfinished run."


class _Frozen(BaseModel):
    # A writer may add facts without breaking older reports; what a report relies on is declared.
    model_config = ConfigDict(frozen=True, extra="allow")


class Record(_Frozen):
    """One measured number.

    Attributes:
        metric: what was measured.
        subject: ``teacher``, ``start`` or a phase.
        split: prompts it was measured on; empty for what no prompt enters (sizes).
        value: the number in ``unit``; None where it is undefined.
        low: lower end of the interval, or None.
        high: upper end of the interval, or None.
        level: coverage of the interval, in (0, 1).
        unit: ``share`` is a number in [0, 1] and shown in per cent; ``bytes`` is shown in MB.
        num_items: number of prompts or tokens behind the number.
        seeds: seeds of the sampling behind the number.
        against: when set, the record is the paired difference subject − against.
        higher_is_better: None where neither direction is better.
        note: how the number is defined or what limits it.
    """

    metric: str
    subject: str
    split: str = ""
    value: float | None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    unit: str = ""
    num_items: int | None = None
    seeds: tuple[int, ...] | int | None = None
    against: str | None = None
    higher_is_better: bool | None = None
    note: str = ""

    @field_validator("split", "unit", "note", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return "" if value is None else value


class ModelFacts(_Frozen):
    """Teacher or student."""

    name: str
    num_layers: int | None = None
    kept_layers: tuple[int, ...] | None = None
    num_parameters: int | None = None


class Phase(_Frozen):
    """One training phase; a control spends the same budget on another objective."""

    name: str
    objective: str
    control: bool = False
    response_tokens: int | None = None
    steps: int | None = None
    init: str | None = None


class Summary(_Frozen):
    """What was distilled from what, and how."""

    teacher: ModelFacts
    student: ModelFacts
    objective: dict[str, Any]
    final_phase: str
    num_prompts: dict[str, int] = Field(default_factory=dict)
    response_tokens: dict[str, int] = Field(default_factory=dict)
    times_s: dict[str, float] = Field(default_factory=dict)
    phases: tuple[Phase, ...]


class TopKMass(_Frozen):
    """Mean teacher mass of the k most probable tokens."""

    k: int
    mean: float


class SetSize(_Frozen):
    """Sizes of the sets A_p."""

    p: float
    mean: float
    median: float | None = None
    p99: float | None = None
    max: float | None = None


class Sparsity(_Frozen):
    """How few tokens hold the teacher's mass."""

    num_states: int | None = None
    top_k_mass: tuple[TopKMass, ...] = ()
    set_size: tuple[SetSize, ...] = ()
    note: str | None = None


class Answer(_Frozen):
    """One prompt and the answers to it, by subject."""

    prompt_id: str
    prompt: str
    answers: dict[str, str]


class Results(_Frozen):
    """The content of results.json."""

    format: Literal["tdistill-results"]
    version: Literal[1]
    name: str
    summary: Summary
    sparsity: Sparsity | None = None
    records: tuple[Record, ...]
    answers: tuple[Answer, ...] = ()
    command: str | None = None

    @property
    def subjects(self) -> tuple[str, ...]:
        """Teacher, start, the phases in order, then whatever else was measured."""
        measured = dict.fromkeys(record.subject for record in self.records)
        known = ["teacher", "start", *(phase.name for phase in self.summary.phases)]
        return (*(name for name in known if name in measured), *(name for name in measured if name not in known))


class PromptScores(_Frozen):
    """What was measured of each prompt of one set.

    Attributes:
        prompt_ids: the prompts; every list below has their order.
        num_tokens: tokens of each prompt's stored answers; empty where none are stored.
        token_sums: metric → subject → sums over those tokens.
        seeds: subject → seeds of its sampled answers; none for stored answers.
        answer_scores: metric → subject → by prompt, one score per seed.
    """

    prompt_ids: tuple[str, ...] = Field(min_length=1)
    num_tokens: tuple[int, ...] = ()
    token_sums: dict[str, dict[str, tuple[float, ...]]] = Field(default_factory=dict)
    seeds: dict[str, tuple[int, ...]]
    answer_scores: dict[str, dict[str, tuple[tuple[float, ...], ...]]]

    @model_validator(mode="after")
    def _one_entry_per_prompt(self) -> PromptScores:
        listed: dict[str, Sequence[Any]] = {"num_tokens": self.num_tokens} if self.num_tokens else {}
        for kind, metrics in (("token_sums", self.token_sums), ("answer_scores", self.answer_scores)):
            listed |= {f"{kind}.{m}.{name}": rows for m, of in metrics.items() for name, rows in of.items()}
        for place, rows in listed.items():
            if len(rows) != len(self.prompt_ids):
                raise ValueError(f"{place} has {len(rows)} entries for {len(self.prompt_ids)} prompts")
        if self.token_sums and not self.num_tokens:
            raise ValueError("token_sums has values, and num_tokens none")
        for metric, of in self.answer_scores.items():
            for name, rows in of.items():
                if len({len(row) for row in rows}) > 1 or not rows[0]:
                    raise ValueError(f"answer_scores.{metric}.{name} has not equally many scores for each prompt")
        if len(set(self.prompt_ids)) < len(self.prompt_ids):
            raise ValueError("a prompt is listed twice")
        return self


class Scores(PromptScores):
    """The content of scores.json.

    Attributes:
        split: name of the held-out set, which the values are of.
        prompt_sets: name → values of further prompts.
    """

    format: Literal["tdistill-scores"]
    version: Literal[1]
    split: str
    prompt_sets: dict[str, PromptScores] = Field(default_factory=dict)


@dataclass(frozen=True)
class ScoredRun:
    """What a comparison reads of a run.

    Attributes:
        folder: where it was read from.
        recipe: content of recipe.yaml.
        results: content of results.json.
        split: name of the prompts that are compared.
        scores: what scores.json has of them.
    """

    folder: Path
    recipe: dict[str, Any]
    results: Results
    split: str
    scores: PromptScores

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that have values by prompt, in the order of the results."""
        scored = {name for of in (self.scores.token_sums, self.scores.answer_scores) for m in of.values() for name in m}
        return tuple(name for name in self.results.subjects if name in scored)


@dataclass(frozen=True)
class RunArtifacts:
    """All that a report may read of a run.

    Attributes:
        folder: where it was read from.
        recipe: text of recipe.yaml.
        environment: versions and machine, by name.
        metrics: log lines in order; each has ``phase`` and ``step``.
        results: content of results.json.
    """

    folder: Path
    recipe: str
    environment: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    results: Results


def load_run(folder: Path) -> RunArtifacts:
    """Read recipe.yaml, environment.json, metrics.jsonl and results.json of a finished run.

    Raises:
        DataFileError: a file is missing or malformed; names it, the place in it and the verb that makes it.
    """
    _require_folder(folder)
    environment_path = folder / "environment.json"
    environment = _parse_json(_read_text(environment_path), str(environment_path))
    if not isinstance(environment, dict):
        raise DataFileError(f"{environment_path} holds no JSON object. {_REMEDY}")
    return RunArtifacts(
        folder=folder,
        recipe=_read_text(folder / "recipe.yaml"),
        environment=environment,
        metrics=_read_metrics(folder / "metrics.jsonl"),
        results=read_results(folder / "results.json"),
    )


def load_scored_run(folder: Path, split: str | None = None) -> ScoredRun:
    """Read recipe.yaml, results.json and scores.json of an evaluated run.

    Args:
        folder: of the run.
        split: name of one of its prompt sets, or None for its held-out set.
    Raises:
        DataFileError: a file is missing or malformed; names it, and the verb that makes it.
        ConfigError: the run was not measured on the split.
    """
    _require_folder(folder)
    results = read_results(folder / "results.json")
    recipe_path, scores_path = folder / "recipe.yaml", folder / "scores.json"
    try:
        recipe = yaml.safe_load(_read_text(recipe_path))
    except yaml.YAMLError as error:
        raise DataFileError(f"{recipe_path} is not YAML: {error}. {_REMEDY}") from error
    if not isinstance(recipe, dict):
        raise DataFileError(f"{recipe_path} is no recipe. {_REMEDY}")
    if not scores_path.is_file():
        raise DataFileError(
            f"{scores_path} is missing: the run was evaluated by an older version, which kept no values by prompt. "
            f"`tdistill eval {recipe_path} output={folder}` measures again and writes it."
        )
    scores = _validate(Scores, _parse_json(_read_text(scores_path), str(scores_path)), scores_path)
    by_split = {scores.split: scores, **scores.prompt_sets}
    if split is not None and split not in by_split:
        raise ConfigError(
            f"--split {split}: {folder} was not measured on it; evaluation.prompt_sets of a recipe names further "
            f"prompts.{did_you_mean(split, by_split)}"
        )
    split = split or scores.split
    return ScoredRun(folder, recipe, results, split, by_split[split])


def read_results(path: Path) -> Results:
    """Read one results.json.

    Raises:
        DataFileError: missing, malformed, of another version, or with two records of one number.
    """
    results = _validate(Results, _parse_json(_read_text(path), str(path)), path)
    phases = [phase.name for phase in results.summary.phases]
    if results.summary.final_phase not in phases:
        raise DataFileError(f"{path}: final_phase {results.summary.final_phase!r} is none of {phases}. {_REMEDY}")
    seen: set[tuple[str, str, str, str | None]] = set()
    for record in results.records:
        key = (record.metric, record.subject, record.split, record.against)
        if key in seen:
            raise DataFileError(f"{path} holds two records of (metric, subject, split, against) = {key}. {_REMEDY}")
        seen.add(key)
    return results


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataFileError(f"There is no run folder {folder}. {_REMEDY}")


def _read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    lines = []
    for number, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        line = _parse_json(text, f"{path}, line {number}")
        if not (
            isinstance(line, dict) and isinstance(line.get("phase"), str) and isinstance(line.get("step"), int | float)
        ):
            raise DataFileError(f"{path}, line {number}: no object with a text `phase` and a number `step`. {_REMEDY}")
        lines.append(line)
    return tuple(lines)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataFileError(f"{path} is missing. {_REMEDY}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} cannot be read: {error}. {_REMEDY}") from error


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataFileError(f"{place} is not JSON: {error}. {_REMEDY}") from error


_Model = TypeVar("_Model", bound=BaseModel)


def _validate(model: type[_Model], content: Any, path: Path) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataFileError(f"{path}: {place}: {first['msg']}. {_REMEDY}") from error
