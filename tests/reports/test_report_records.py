from __future__ import annotations

from typing import Any

import pytest
from synthetic_run import make_results, record

from tdistill.reports.load import Record, Results
from tdistill.reports.records import format_record, paired_difference, separated_best, sign_of_interval


def results_of(records: list[dict[str, Any]]) -> Results:
    return Results.model_validate({**make_results(), "records": records})


def kl(subject: str, value: float, half: float | None, **extra: Any) -> dict[str, Any]:
    return record("kl_teacher_student", subject, value, half, higher_is_better=False, **extra)


def best(records: list[dict[str, Any]]) -> str | None:
    return separated_best(results_of(records), "kl_teacher_student", "held_out")


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (1.0312, 0.9812, 1.0812, "1.031 [0.981, 1.081]"),  # half-width 0.05 keeps two digits: 3 decimals
        (81.25, 73.75, 88.75, "81.2 [73.8, 88.8]"),
        (35123.4, 34000.0, 36000.0, "35,123 [34,000, 36,000]"),
        (-0.12, -0.15, -0.09, "−0.120 [−0.150, −0.090]"),
        (134_515_008, None, None, "134.5"),  # millions
        (0.123456, None, None, "0.1235"),
        (300, None, None, "300"),
        (None, None, None, "–"),
        (float("nan"), None, None, "not finite"),
        (0.5, 0.5, 0.5, "0.5000 [0.5000, 0.5000]"),
    ],
)
def test_digits_follow_the_interval(value: float | None, low: float | None, high: float | None, text: str) -> None:
    assert format_record(Record(metric="m", subject="s", value=value, low=low, high=high)) == text


def test_shares_are_shown_in_per_cent_and_differences_with_their_sign() -> None:
    share = Record(metric="m", subject="s", value=0.61, low=0.59, high=0.63, unit="share")
    assert format_record(share, signed=True) == "+61.0 [+59.0, +63.0]"


def test_a_reversed_pair_swaps_and_negates_its_ends() -> None:
    results = results_of([kl("sft", 0.3, 0.1, against="bd")])
    pair = paired_difference(results, "kl_teacher_student", "bd", "sft", "held_out")
    assert pair is not None
    assert (pair.subject, pair.against) == ("bd", "sft")
    assert (pair.value, pair.low, pair.high) == pytest.approx((-0.3, -0.4, -0.2))
    assert sign_of_interval(pair) == -1


@pytest.mark.parametrize(("low", "high", "sign"), [(0.0, 1.0, 0), (-1.0, 0.0, 0), (1e-9, 1.0, 1), (-1.0, -1e-9, -1)])
def test_an_end_at_zero_is_not_separated(low: float, high: float, sign: int) -> None:
    assert sign_of_interval(Record(metric="m", subject="s", value=0.5, low=low, high=high)) == sign


def test_paired_interval_separates_where_own_intervals_overlap() -> None:
    assert best([kl("sft", 1.1, 0.2), kl("bd", 1.0, 0.2), kl("bd", -0.1, 0.05, against="sft")]) == "bd"


def test_paired_interval_with_zero_wins_over_disjoint_own_intervals() -> None:
    assert best([kl("sft", 2.0, 0.1), kl("bd", 1.0, 0.1), kl("bd", -1.0, 1.5, against="sft")]) is None


def test_without_a_pair_own_intervals_must_not_overlap() -> None:
    assert best([kl("sft", 2.0, 0.1), kl("bd", 1.0, 0.1)]) == "bd"
    assert best([kl("sft", 1.15, 0.1), kl("bd", 1.0, 0.1)]) is None
    assert best([kl("sft", 2.0, None), kl("bd", 1.0, 0.1)]) is None


def test_one_close_rival_is_enough_to_leave_the_column_unmarked() -> None:
    rows = [kl("start", 5.0, 0.1), kl("sft", 1.05, 0.1), kl("bd", 1.0, 0.1), kl("bd", -0.05, 0.1, against="sft")]
    assert best(rows) is None


def test_the_teacher_a_lone_student_and_metrics_without_direction_are_never_marked() -> None:
    assert best([kl("teacher", 0.0, 0.01), kl("bd", 1.0, 0.1)]) is None
    undirected = [kl("sft", 2.0, 0.1), kl("bd", 1.0, 0.1)]
    assert best([{**row, "higher_is_better": None} for row in undirected]) is None


def test_higher_is_better_turns_the_order_round() -> None:
    rows = [
        record("rouge_l_teacher", "sft", 0.2, 0.01, higher_is_better=True),
        record("rouge_l_teacher", "bd", 0.3, 0.01, higher_is_better=True),
    ]
    assert separated_best(results_of(rows), "rouge_l_teacher", "held_out") == "bd"
