"""Looking records up, comparing them, and writing them as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tdistill.reports.load import Record, Results

HELD_OUT = "held_out"
MISSING = "–"
NOT_FINITE = "not finite"

_MAX_DECIMALS = 4
_INTERVAL_DIGITS = 2
_PLAIN_DIGITS = 4


@dataclass(frozen=True)
class Scale:
    """What a number is multiplied by before it is shown, and the unit it then has."""

    factor: float = 1.0
    unit: str = ""


def finite(record: Record | None) -> bool:
    """Whether the record exists and holds a finite number."""
    return record is not None and record.value is not None and math.isfinite(record.value)


def has_interval(record: Record) -> bool:
    """Whether both ends of the interval are finite numbers."""
    return all(end is not None and math.isfinite(end) for end in (record.low, record.high))


def find(results: Results, metric: str, subject: str, split: str, against: str | None = None) -> Record | None:
    """The record of this number, or None."""
    for record in results.records:
        if (record.metric, record.subject, record.split, record.against) == (metric, subject, split, against):
            return record
    return None


def main_split(results: Results) -> str:
    """The split that the main table shows: ``held_out`` if anything was measured on it, else the first one named."""
    splits = list(dict.fromkeys(record.split for record in results.records if record.split))
    return HELD_OUT if HELD_OUT in splits or not splits else splits[0]


def paired_difference(results: Results, metric: str, subject: str, against: str, split: str) -> Record | None:
    """The paired difference subject − against, from a record in either direction, or None."""
    record = find(results, metric, subject, split, against)
    if record is not None:
        return record
    opposite = find(results, metric, against, split, subject)
    if opposite is None:
        return None

    def negated(number: float | None) -> float | None:
        return None if number is None else -number

    return opposite.model_copy(
        update={
            "subject": subject,
            "against": against,
            "value": negated(opposite.value),
            "low": negated(opposite.high),
            "high": negated(opposite.low),
        }
    )


def sign_of_interval(record: Record) -> int:
    """+1 or −1 where the whole interval lies on one side of 0; 0 where it includes 0 or does not exist."""
    if not has_interval(record):
        return 0
    assert record.low is not None and record.high is not None
    return int(record.low > 0) - int(record.high < 0)


def separated_best(results: Results, metric: str, split: str) -> str | None:
    """The student that is best in a metric and separated from every other student, or None.

    Two students are separated when their paired interval excludes 0; where no paired record exists, when their own
    intervals do not overlap, which asks for more.
    """
    students = [name for name in results.subjects if name != "teacher"]
    measured = {name: record for name in students if finite(record := find(results, metric, name, split))}
    directions = {record.higher_is_better for record in measured.values() if record is not None}
    if len(measured) < 2 or len(directions) != 1 or None in directions:
        return None
    direction = 1 if directions == {True} else -1
    best = max(measured, key=lambda name: direction * measured[name].value)  # type: ignore[union-attr,operator]
    rivals = [name for name in measured if name != best]
    return best if all(_is_better(results, metric, best, name, split, direction) for name in rivals) else None


def _is_better(results: Results, metric: str, subject: str, rival: str, split: str, direction: int) -> bool:
    pair = paired_difference(results, metric, subject, rival, split)
    if pair is not None:
        return sign_of_interval(pair) == direction
    better, worse = find(results, metric, subject, split), find(results, metric, rival, split)
    if better is None or worse is None or not (has_interval(better) and has_interval(worse)):
        return False
    if direction < 0:
        better, worse = worse, better
    return better.low > worse.high  # type: ignore[operator]


def scale_of(records: Sequence[Record]) -> Scale:
    """One scale for all records of a column."""
    unit = next((record.unit for record in records if record.unit), "")
    if unit == "share":
        return Scale(100.0, "%")
    if unit == "bytes":
        return Scale(1e-6, "MB")
    largest = max((abs(record.value) for record in records if finite(record)), default=0.0)  # type: ignore[arg-type]
    return Scale(1e-6, "M") if largest >= 1e6 else Scale(1.0, unit)


def format_record(record: Record | None, scale: Scale | None = None, *, signed: bool = False) -> str:
    """``value [low, high]``, with as many digits as the interval supports; a dash where there is no number.

    The half-width of the interval keeps two significant digits; a number without one keeps four.
    """
    if record is None or record.value is None:
        return MISSING
    if not math.isfinite(record.value):
        return NOT_FINITE
    factor = (scale or scale_of([record])).factor
    value = record.value * factor
    if not has_interval(record):
        return format_number(value, signed=signed)
    low, high = record.low * factor, record.high * factor  # type: ignore[operator]
    # Rounded first: 2 and 1.9999999 are the same width.
    half_width = float(f"{(high - low) / 2:.6g}")
    decimals = _decimals(half_width, _INTERVAL_DIGITS) if half_width > 0 else _plain_decimals(value)
    shown = [format_number(number, decimals, signed=signed) for number in (value, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def format_number(value: float, decimals: int | None = None, *, signed: bool = False) -> str:
    """A number with a true minus sign, thousands marked, and no sign on a rounded zero.

    >>> format_number(-0.0001, 3), format_number(1234.5, 0), format_number(0.25, 2, signed=True)
    ('0.000', '1,234', '+0.25')
    """
    if not math.isfinite(value):
        return NOT_FINITE
    places = _plain_decimals(value) if decimals is None else decimals
    text = f"{value:{'+' if signed else ''},.{places}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _plain_decimals(value: float) -> int:
    return 0 if float(value).is_integer() else _decimals(value, _PLAIN_DIGITS)


def _decimals(value: float, digits: int) -> int:
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), _MAX_DECIMALS)
