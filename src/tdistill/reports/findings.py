"""What a run's records say, in words."""

from __future__ import annotations

from dataclasses import dataclass

from tdistill.reports.load import ModelFacts, Record, Results
from tdistill.reports.records import (
    MISSING,
    find,
    finite,
    format_number,
    format_record,
    has_interval,
    main_split,
    paired_difference,
    scale_of,
    sign_of_interval,
)

KL = "kl_teacher_student"

DISTINCT_2_FLOOR = 0.5
"""Answers whose distinct-2 is below this share of the teacher's count as repetitive."""


@dataclass(frozen=True)
class Distinct2Check:
    """One student's distinct-2 beside the floor."""

    subject: str
    value: str
    passes: bool


@dataclass(frozen=True)
class PairedReading:
    """One paired difference and what it shows."""

    metric: str
    split: str
    comparison: str
    difference: str
    reading: str


def facts(results: Results) -> tuple[tuple[str, str], ...]:
    """(name, text) pairs: what was distilled from what."""
    summary = results.summary
    objective = dict(summary.objective)
    objective_name = str(objective.pop("name", MISSING))
    settings = ", ".join(f"{key} = {value}" for key, value in objective.items())
    student = _model(summary.student)
    if summary.student.kept_layers is not None:
        student += f"; starts from the teacher's layers {', '.join(map(str, summary.student.kept_layers))}"
    return (
        ("Teacher", _model(summary.teacher)),
        ("Student", student),
        ("Objective", f"{objective_name} ({settings})" if settings else objective_name),
        ("Phases", " · ".join(f"{p.name}{' (control)' if p.control else ''}" for p in summary.phases)),
        ("Prompts", _counts(summary.num_prompts)),
        ("Response tokens", _counts(summary.response_tokens)),
    )


def verdict(results: Results) -> tuple[str, ...]:
    """Sentences on the final phase: its KL, the paired difference to each control, the share of the gap closed."""
    final, split = results.summary.final_phase, main_split(results)
    kl = find(results, KL, final, split)
    if kl is None or not finite(kl):
        return (f"No finite KL(teacher‖student) of {final} was recorded on the {split} prompts: there is no verdict.",)
    sentences = [f"{final} ends with a KL(teacher‖student) of {_with_unit(kl)} on the {split} prompts."]
    controls = [phase.name for phase in results.summary.phases if phase.control and phase.name != final]
    sentences += [_against_control(results, final, control, split) for control in controls]
    if not controls:
        sentences.append("The run has no control, so it cannot tell what the objective itself contributed.")
    gap = find(results, "gap_closed", final, split)
    if gap is not None and finite(gap):
        note = f" ({gap.note.rstrip('.')})" if gap.note else ""
        sentences.append(f"It closes {_with_unit(gap)} of the gap{note}.")
    check = {check.subject: check for check in distinct_2_checks(results)}.get(final)
    if check is not None and not check.passes:
        sentences.append(f"Its answers are repetitive: distinct-2 is {check.value}, below the floor.")
    return tuple(sentences)


def _against_control(results: Results, final: str, control: str, split: str) -> str:
    pair = paired_difference(results, KL, final, control, split)
    if pair is None or not finite(pair):
        return f"No paired difference to the control {control} was recorded, so nothing is claimed about it."
    difference = f"Against the control {control} the KL differs by {_with_unit(pair, signed=True)}"
    if not has_interval(pair):
        return f"{difference}, without an interval, so nothing is claimed about it."
    level = "" if pair.level is None else f"{pair.level:.0%} ".replace("%", " %")
    difference += f" (paired {level}interval)"
    match sign_of_interval(pair):
        case 0:
            return f"{difference}: the interval includes 0, so the run shows no difference between them."
        case -1:
            return f"{difference}: {final} is closer to the teacher."
        case _:
            return f"{difference}: {final} is farther from the teacher than its control."


def paired_readings(results: Results) -> tuple[PairedReading, ...]:
    """Every paired difference, in the order of the file."""
    readings = []
    for record in results.records:
        if record.against is None:
            continue
        sign = sign_of_interval(record)
        if not has_interval(record):
            reading = "no interval"
        elif sign == 0:
            reading = "includes 0: not separated"
        elif record.higher_is_better is None:
            reading = "excludes 0"
        else:
            reading = "separated, better" if (sign > 0) == record.higher_is_better else "separated, worse"
        readings.append(
            PairedReading(
                metric=record.metric,
                split=record.split,
                comparison=f"{record.subject} − {record.against}",
                difference=_with_unit(record, signed=True),
                reading=reading,
            )
        )
    return tuple(readings)


def distinct_2_checks(results: Results) -> tuple[Distinct2Check, ...]:
    """Each student's distinct-2 against the floor; empty where the teacher's is not recorded."""
    split = main_split(results)
    floor = distinct_2_floor(results)
    if floor is None:
        return ()
    checks = []
    for subject in results.subjects:
        record = find(results, "distinct_2", subject, split)
        if subject != "teacher" and record is not None and record.value is not None and finite(record):
            checks.append(Distinct2Check(subject, format_record(record), passes=record.value >= floor))
    return tuple(checks)


def distinct_2_floor(results: Results) -> float | None:
    """The floor in distinct-2: a fixed share of the teacher's, or None where that is not recorded."""
    teacher = find(results, "distinct_2", "teacher", main_split(results))
    if teacher is None or teacher.value is None or not finite(teacher):
        return None
    return DISTINCT_2_FLOOR * teacher.value


def _with_unit(record: Record, *, signed: bool = False) -> str:
    scale = scale_of([record])
    return f"{format_record(record, scale, signed=signed)} {scale.unit}".rstrip()


def _model(model: ModelFacts) -> str:
    parts = [model.name]
    if model.num_layers is not None:
        parts.append(f"{model.num_layers} layers")
    if model.num_parameters is not None:
        parts.append(f"{format_number(model.num_parameters / 1e6)} M parameters")
    return ", ".join(parts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_number(count)}" for name, count in counts.items()) or MISSING
