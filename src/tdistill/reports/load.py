"""Reading a finished run's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tdistill.errors import DataFileError

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
    if not folder.is_dir():
        raise DataFileError(f"There is no run folder {folder}. {_REMEDY}")
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
