"""Several finished runs beside each other, over the prompts that all of them share."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from tdistill.errors import ConfigError, DataFileError, did_you_mean
from tdistill.reports.compare_notes import file_key, notes_on
from tdistill.reports.load import Record, Results, ScoredRun, load_scored_run
from tdistill.reports.tables import COLUMNS
from tdistill.resampling import Interval, Measured, percentile_interval, resample

LEVEL = 0.95
"""Confidence level of every interval."""
TEACHER = "teacher"
TRAINING_S = "training_s"
"""Seconds that a phase was trained, with the phases it starts from."""
COSTS = ("num_parameters", "weights_bytes", "decode_tokens_per_s", TRAINING_S)
"""What a student costs; no interval over prompts belongs to it."""

_SEED = 0
# Where a recipe gives no seed to a phase, transformers does.
_DEFAULT_TRAINING_SEED = 42


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComparedRow(_Frozen):
    """One subject.

    Attributes:
        label: its name, which the records have as subject.
        subject: its name in its run.
        runs: folders; several where runs of different training seeds are averaged.
    """

    label: str
    subject: str
    runs: tuple[str, ...]


class Best(_Frozen):
    """The best student in one metric, and those whose paired difference to it has an interval that includes 0."""

    label: str
    not_separable: tuple[str, ...]


class Comparison(_Frozen):
    """What ``tdistill compare --json`` prints.

    Attributes:
        format: what the text is.
        version: of its format.
        split: name of the prompt set.
        num_prompts: prompts that all rows share, and that every interval is over.
        against: label of the baseline, or None.
        rows: the subjects.
        records: the numbers, as in results.json; subject and against are labels.
        best: metric → best student.
        notes: what limits the comparison.
    """

    format: Literal["tdistill-comparison"] = "tdistill-comparison"
    version: Literal[1] = 1
    split: str
    num_prompts: int
    against: str | None
    rows: tuple[ComparedRow, ...]
    records: tuple[Record, ...]
    best: dict[str, Best]
    notes: tuple[str, ...]

    def find(self, metric: str, label: str, against: str | None = None) -> Record | None:
        """The record of this number, or None."""
        wanted = (metric, label, against)
        return next((r for r in self.records if (r.metric, r.subject, r.against) == wanted), None)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics with values by prompt, in the order of the tables."""
        measured = {record.metric for record in self.records} - {*COSTS}
        return tuple(column.metric for column in COLUMNS if column.metric in measured)

    @property
    def costs(self) -> tuple[str, ...]:
        """Costs that some row has."""
        measured = {record.metric for record in self.records}
        return tuple(cost for cost in COSTS if cost in measured)


@dataclass(frozen=True, eq=False)
class _Row:
    """One subject of one run, or of several that differ in their training seeds alone."""

    label: str
    subject: str
    runs: tuple[ScoredRun, ...]
    names: tuple[str, ...]

    def compared(self) -> ComparedRow:
        return ComparedRow(label=self.label, subject=self.subject, runs=tuple(str(run.folder) for run in self.runs))


def compare(
    addresses: Sequence[str], against: str | None = None, *, pool_seeds: bool = False, split: str | None = None
) -> Comparison:
    """Compare all subjects of finished runs.

    A value of a metric is that of the shared prompts; its interval, and that of a difference, is between percentiles of
    :func:`~tdistill.resampling.resample`, in which prompts and pooled trainings are drawn again.

    Args:
        addresses: folder of a run, or ``FOLDER:SUBJECT`` for one of its subjects.
        against: baseline of the differences: a label, ``FOLDER:SUBJECT``, or a subject that one run alone has.
        pool_seeds: average runs whose recipes differ in ``phases.*.args.seed``, ``name`` and ``output`` alone.
        split: name of one of the runs' ``evaluation.prompt_sets``, or None for their held-out prompts.
    Raises:
        DataFileError: a run has no results or no scores, one of them is malformed, or no prompt is shared.
        ConfigError: unknown or ambiguous subject, a subject named twice, pooled runs of the same training seeds, or a
            run was not measured on the split.
    """
    rows = _rows(addresses, split)
    if pool_seeds:
        rows = _pooled(rows)
    baseline = None if against is None else _find_row(rows, against)
    runs = list({run.folder: run for row in rows for run in row.runs}.values())
    shared = _shared_prompts(runs)
    records: list[Record] = []
    best: dict[str, Best] = {}
    for metric in (column.metric for column in COLUMNS):
        measured = {row: found for row in rows if (found := _measured(row, metric, shared)) is not None}
        if measured:
            of_metric, best_of_metric = _compare_metric(metric, measured, baseline, len(shared))
            records += of_metric
            best |= {} if best_of_metric is None else {metric: best_of_metric}
    records += [record for row in rows for record in _cost_records(row)]
    return Comparison(
        split=runs[0].split,
        num_prompts=len(shared),
        against=None if baseline is None else baseline.label,
        rows=tuple(row.compared() for row in rows),
        records=tuple(records),
        best=best,
        notes=tuple(notes_on(runs, shared)),
    )


def _compare_metric(
    metric: str, measured: dict[_Row, Measured], baseline: _Row | None, num_prompts: int
) -> tuple[list[Record], Best | None]:
    """Values, differences to the baseline, and the best student of one metric."""
    rows = list(measured)
    drawn = dict(zip(rows, resample([*measured.values()], _SEED), strict=True))
    facts = {**_facts(rows[0], metric), "num_items": num_prompts, "level": LEVEL}

    def estimate(row: _Row, other: _Row | None = None) -> Interval:
        value, resampled = measured[row].value, drawn[row]
        if other is not None:
            value, resampled = value - measured[other].value, resampled - drawn[other]
        return percentile_interval(value, resampled, LEVEL) if num_prompts > 1 else Interval(value, None, None)

    def record(row: _Row, other: _Row | None = None) -> Record:
        against = None if other is None else other.label
        own = {"subject": row.label, "against": against, "seeds": _seeds(row, metric)}
        return Record(metric=metric, **facts, **own, **estimate(row, other)._asdict())

    records = [record(row) for row in rows]
    if baseline in measured:
        records += [record(row, baseline) for row in rows if row is not baseline]
    students = [row for row in rows if row.subject != TEACHER]
    if facts["higher_is_better"] is None or len(students) < 2:
        return records, None
    sign = 1 if facts["higher_is_better"] else -1
    first = max(students, key=lambda row: sign * measured[row].value)
    ties = [row.label for row in students if row is not first and not _separated(estimate(row, first))]
    return records, Best(label=first.label, not_separable=tuple(ties))


def _rows(addresses: Sequence[str], split: str | None) -> list[_Row]:
    """One row for each subject that is asked for."""
    asked = [_parse(address) for address in addresses]
    folders = dict.fromkeys(folder for folder, _ in asked)
    runs = {folder.resolve(): load_scored_run(folder, split) for folder in folders}
    names = [path.name for path in runs]
    rows: dict[tuple[Path, str], _Row] = {}
    for folder, subject in asked:
        run = runs[folder.resolve()]
        if subject is not None and subject not in run.subjects:
            raise ConfigError(
                f"The run {folder} has no subject '{subject}' in its scores.json.{did_you_mean(subject, run.subjects)}"
            )
        short = folder.resolve().name
        name = short if names.count(short) == 1 else str(folder)
        for chosen in run.subjects if subject is None else (subject,):
            key = (folder.resolve(), chosen)
            if key in rows:
                raise ConfigError(f"{name}:{chosen} is named twice. Name each run or subject once.")
            label = f"{name}:{chosen}"
            rows[key] = _Row(label, chosen, (run,), (label, f"{folder}:{chosen}"))
    if not rows:
        raise DataFileError(f"No subject of {', '.join(addresses)} is in its scores.json. Evaluate the run again.")
    return list(rows.values())


def _parse(address: str) -> tuple[Path, str | None]:
    folder, colon, subject = address.rpartition(":")
    return (Path(address), None) if not colon or Path(address).is_dir() else (Path(folder), subject)


def _pooled(rows: Iterable[_Row]) -> list[_Row]:
    """Rows of the same subject and of recipes that differ in training seeds alone, as one."""
    groups: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        groups.setdefault((_recipe_without_seeds(row.runs[0].recipe), row.subject), []).append(row)
    pooled = []
    for members in groups.values():
        whole = [tuple(_training_seeds(row.runs[0].recipe).values()) for row in members]
        if len(set(whole)) < len(whole):
            raise ConfigError(
                f"{' and '.join(str(row.runs[0].folder) for row in members)} cannot be averaged: two of them have the "
                "same recipe and the same training seeds, so they are one training. Leave one out, or leave "
                "--pool-seeds out."
            )
        # Teacher, start, and phases before the first that has another seed are the same in several runs.
        distinct: dict[tuple[int, ...], ScoredRun] = {}
        for row in members:
            run, seeds = row.runs[0], _training_seeds(row.runs[0].recipe)
            distinct.setdefault(tuple(seeds[name] for name in _chain(run.results, row.subject) if name in seeds), run)
        label = members[0].label + (f" ({len(distinct)} seeds)" if len(distinct) > 1 else "")
        names = tuple(name for row in members for name in row.names)
        pooled.append(_Row(label, members[0].subject, tuple(distinct.values()), names))
    return pooled


def _recipe_without_seeds(recipe: dict[str, Any]) -> str:
    same = {key: value for key, value in copy.deepcopy(recipe).items() if key not in ("name", "output")}
    for phase in _phases(same).values():
        if isinstance(phase.get("args"), dict):
            phase["args"].pop("seed", None)
    if isinstance(same.get("capture"), dict):  # where answers to the same request lie
        same["capture"].pop("from_run", None)
    return json.dumps(same, sort_keys=True, default=str)


def _training_seeds(recipe: dict[str, Any]) -> dict[str, int]:
    return {
        name: (phase.get("args") or {}).get("seed", _DEFAULT_TRAINING_SEED) for name, phase in _phases(recipe).items()
    }


def _phases(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: phase for name, phase in (recipe.get("phases") or {}).items() if isinstance(phase, dict)}


def _chain(results: Results, subject: str) -> list[str]:
    """The phase and those it starts from, its own last; none for what no phase of the run trained."""
    phases, chain, name = {phase.name: phase for phase in results.summary.phases}, [], subject
    while name in phases and name not in chain:
        chain.append(name)
        name = phases[name].init or ""
    return chain[::-1]


def _find_row(rows: Sequence[_Row], name: str) -> _Row:
    found = [row for row in rows if name in (row.label, row.subject, *row.names)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"--against {name} is ambiguous: {', '.join(row.label for row in found)}. Name one of these.")
    raise ConfigError(f"--against {name} is none of the rows.{did_you_mean(name, [row.label for row in rows])}")


def _shared_prompts(runs: Sequence[ScoredRun]) -> list[str]:
    common = set.intersection(*(set(run.scores.prompt_ids) for run in runs))
    if not common:
        counts = ", ".join(f"{run.folder} has {len(run.scores.prompt_ids)}" for run in runs)
        raise DataFileError(
            f"The runs share no prompt of {runs[0].split} ({counts}), so nothing can be paired. Compare runs whose "
            f"{file_key(runs[0])} is the same."
        )
    return [prompt_id for prompt_id in runs[0].scores.prompt_ids if prompt_id in common]


def _measured(row: _Row, metric: str, shared: Sequence[str]) -> Measured | None:
    """Values of the shared prompts, or None where a run has none of this metric and subject."""
    sums, counts = [], []
    for run in row.runs:
        position = {prompt_id: index for index, prompt_id in enumerate(run.scores.prompt_ids)}
        chosen = [position[prompt_id] for prompt_id in shared]
        of_tokens = run.scores.token_sums.get(metric, {}).get(row.subject)
        of_answers = run.scores.answer_scores.get(metric, {}).get(row.subject)
        if of_tokens is not None:
            sums.append(np.array(of_tokens)[chosen, None])
            counts.append(np.array(run.scores.num_tokens, float)[chosen])
        elif of_answers is not None:
            sums.append(np.array(of_answers)[chosen])
            counts.append(np.ones(len(chosen)))
        else:
            return None
    return Measured(np.stack(sums), np.stack(counts))


def _seeds(row: _Row, metric: str) -> tuple[int, ...]:
    scores = row.runs[0].scores
    return scores.seeds.get(row.subject, ()) if metric in scores.answer_scores else ()


def _facts(row: _Row, metric: str) -> dict[str, Any]:
    """Unit, direction and split of a metric."""
    run = row.runs[0]
    found = (r for r in run.results.records if (r.metric, r.subject, r.against) == (metric, row.subject, None))
    record = next(found, None)
    unit, higher_is_better = ("", None) if record is None else (record.unit, record.higher_is_better)
    return {"unit": unit, "higher_is_better": higher_is_better, "split": run.split}


def _separated(interval: Interval) -> bool:
    return interval.low is not None and interval.high is not None and (interval.low > 0 or interval.high < 0)


def _cost_records(row: _Row) -> list[Record]:
    records = []
    for cost in COSTS:
        found = [_cost(run.results, cost, row.subject) for run in row.runs]
        known = [record for record in found if record is not None and record.value is not None]
        if known and len(known) == len(row.runs):
            mean = float(np.mean([record.value for record in known]))
            update = {"subject": row.label, "value": mean, "low": None, "high": None, "level": None}
            records.append(known[0].model_copy(update=update))
    return records


def _cost(results: Results, cost: str, subject: str) -> Record | None:
    if cost != TRAINING_S:
        found = (r for r in results.records if (r.metric, r.subject, r.against) == (cost, subject, None))
        return next(found, None)
    chain, times = _chain(results, subject), results.summary.times_s
    if not chain or any(name not in times for name in chain):
        return None
    return Record(metric=TRAINING_S, subject=subject, value=sum(times[name] for name in chain), unit="s")
