from __future__ import annotations

from typing import Any

from synthetic_run import make_results, record

from tdistill.reports.findings import DISTINCT_2_FLOOR, distinct_2_checks, distinct_2_floor, paired_readings, verdict
from tdistill.reports.load import Results


def edited(**changes: Any) -> Results:
    """The made-up results, with the paired KL record of bd against its control changed."""
    content = make_results()
    pair = next(r for r in content["records"] if r["against"] == "sft_continued")
    pair.update(changes)
    return Results.model_validate(content)


def test_verdict_of_a_separated_run() -> None:
    assert verdict(edited()) == (
        "bd ends with a KL(teacher‖student) of 1.00 [0.90, 1.10] nats/token on the held_out prompts.",
        "Against the control sft_continued the KL differs by −0.100 [−0.130, −0.070] nats/token "
        "(paired 95 % interval): bd is closer to the teacher.",
        "It closes 80.0 [78.0, 82.0] % of the gap (1 − KL / KL of the start).",
    )


def test_verdict_says_plainly_that_an_interval_includes_zero() -> None:
    sentence = verdict(edited(low=-0.21, high=0.01))[1]
    assert sentence.endswith("the interval includes 0, so the run shows no difference between them.")


def test_verdict_says_when_the_control_is_better() -> None:
    sentence = verdict(edited(value=0.1, low=0.05, high=0.15))[1]
    assert "+0.100 [+0.050, +0.150]" in sentence
    assert sentence.endswith("bd is farther from the teacher than its control.")


def test_verdict_claims_nothing_that_was_not_measured() -> None:
    assert "nothing is claimed" in verdict(edited(low=None, high=None))[1]
    assert "nothing is claimed" in verdict(edited(metric="rouge_l"))[1]
    content = make_results()
    content["summary"]["phases"] = content["summary"]["phases"][:2]
    assert any("has no control" in sentence for sentence in verdict(Results.model_validate(content)))
    content["records"] = [r for r in content["records"] if r["subject"] != "bd"]
    assert verdict(Results.model_validate(content)) == (
        "No finite KL(teacher‖student) of bd was recorded on the held_out prompts: there is no verdict.",
    )


def test_distinct_2_floor_is_half_the_teachers_and_a_collapse_is_told() -> None:
    assert DISTINCT_2_FLOOR == 0.5
    assert distinct_2_floor(edited()) == 0.4
    assert [(check.subject, check.passes) for check in distinct_2_checks(edited())] == [
        ("bd", True),
        ("sft_continued", False),
    ]
    content = make_results()
    next(r for r in content["records"] if r["metric"] == "distinct_2" and r["subject"] == "bd")["value"] = 0.39
    assert "repetitive" in verdict(Results.model_validate(content))[-1]
    content["records"] = [r for r in content["records"] if r["subject"] != "teacher"]
    assert distinct_2_checks(Results.model_validate(content)) == ()


def test_paired_readings() -> None:
    readings = {row.comparison: row.reading for row in paired_readings(edited(low=-0.21, high=0.01))}
    assert readings == {"bd − sft": "separated, better", "bd − sft_continued": "includes 0: not separated"}


def test_paired_readings_of_tasks_and_texts_are_among_them() -> None:
    content = make_results()
    content["records"] += [
        record("task_accuracy", "bd", 0.2, 0.1, against="sft", split="sums", unit="share", higher_is_better=True),
        record("text_nll", "bd", 0.2, 0.1, against="sft", split="text", higher_is_better=False),
    ]
    rows = paired_readings(Results.model_validate(content))
    assert [(row.metric, row.split, row.reading) for row in rows[-2:]] == [
        ("task_accuracy", "sums", "separated, better"),
        ("text_nll", "text", "separated, worse"),
    ]
    assert {row.split for row in rows[:-2]} == {"held_out"}
