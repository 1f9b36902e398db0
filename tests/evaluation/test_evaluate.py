import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tdistill.errors import ConfigError, DataFileError, EmptyPromptSetError
from tdistill.evaluation.evaluate import evaluate
from tdistill.evaluation.exposure import ExposureSettings
from tdistill.evaluation.generation import sample_answers
from tdistill.evaluation.records import METRICS, EvaluationSettings, Result, Results, Scores

ROOT = Path(__file__).parents[2]
SETTINGS = EvaluationSettings(
    seeds=(10, 20), max_new_tokens=6, batch_size=4, compare=(("bd", "sft"),), speed_tokens=3, num_shown_prompts=2
)


@pytest.fixture
def teacher(make_model):
    return make_model(0)


@pytest.fixture
def held_out(make_trajectory, teacher):
    """Answers of the teacher itself, so that its loss is below that of an unrelated model; two for p1 and p2."""
    blank = [make_trajectory(index, f"p{index}", 3 + index, 8) for index in range(6)]
    settings = {"end_token_ids": (0,), "vocab_size": 64, "max_new_tokens": 8, "seed": 1}
    sampled, _ = sample_answers(teacher, [t.prompt_ids for t in blank], **settings)
    trajectories = [
        make_trajectory(
            index,
            t.prompt_id,
            0,
            len(answer.token_ids),
            prompt_ids=t.prompt_ids,
            response_ids=answer.token_ids,
            ends="terminal" if answer.terminated else "truncated",
        )
        for index, (t, answer) in enumerate(zip(blank, sampled, strict=True))
    ]
    loop = {"response_ids": np.array([5, 6, 5, 6, 5, 6], np.int32), "prompt_ids": trajectories[2].prompt_ids}
    second = [replace(trajectories[1], answer_index=1), make_trajectory(9, "p2", 0, 6, answer_index=1, **loop)]
    return [*trajectories, *second]


@pytest.fixture
def subjects(make_model, teacher):
    start = make_model(1)
    return {"start": start, "sft": copy.deepcopy(start), "bd": copy.deepcopy(teacher)}


def run(subjects, teacher, tokenizer, held_out, references=None, settings=SETTINGS, **more):
    common = {"end_token_ids": (0,), "settings": settings, "progress": False}
    return evaluate(subjects, teacher, tokenizer, held_out, references, **common, **more)


def test_all_metrics_of_all_subjects(subjects, teacher, tokenizer, held_out):
    references = {trajectory.prompt_id: ["word5 word6"] for trajectory in held_out}
    results = run(subjects, teacher, tokenizer, held_out, references)
    found = {(r.metric, r.subject) for r in results.records if r.against is None}
    expected = {(metric, subject) for metric in METRICS for subject in ("teacher", *subjects)}
    expected -= {("gap_closed", "teacher"), ("gap_closed", "start")}
    expected -= {("rouge_l_teacher", "teacher"), ("teacher_nll_on_student_answers", "teacher")}
    assert found == expected
    for record in results.records:
        assert record.unit == METRICS[record.metric].unit
        assert record.low <= record.value <= record.high
    assert {r.num_items for r in results.records if r.level is not None} == {6}

    def value(metric, subject, against=None):
        return results.find(metric, subject, against).value

    # bd is a copy of the teacher, sft of the start.
    assert value("kl_teacher_student", "teacher") == value("kl_teacher_student", "bd") == 0.0
    assert value("agreement_top1", "bd") == 1.0
    assert value("gap_closed", "bd") == pytest.approx(1.0)
    assert value("gap_closed", "sft") == 0.0
    assert value("nll_teacher_answers", "bd") == value("nll_teacher_answers", "teacher")
    assert value("kl_teacher_student", "sft") > 0
    # A model that is the teacher finds its own samples likelier than another model's.
    assert value("teacher_nll_on_student_answers", "bd") < value("teacher_nll_on_student_answers", "start")
    # Stored answers stand for the teacher: inside a prompt, bigrams add up, lengths and ends are averaged.
    stored = [trajectory.response_ids.tolist() for trajectory in held_out]
    num_distinct = sum(len(set(pairwise(ids))) for ids in stored)
    num_bigrams = sum(len(ids) - 1 for ids in stored)
    assert num_distinct <= num_bigrams - 3  # 56 65 56 65 56
    assert value("distinct_2", "teacher") == pytest.approx(num_distinct / num_bigrams)
    by_prompt = [[t for t in held_out if t.prompt_id == f"p{index}"] for index in range(6)]
    assert value("response_length", "teacher") == pytest.approx(
        np.mean([np.mean([len(t.response_ids) for t in group]) for group in by_prompt])
    )
    assert value("terminated_share", "teacher") == pytest.approx(
        np.mean([np.mean([t.ends == "terminal" for t in group]) for group in by_prompt])
    )
    for metric in ("kl_teacher_student", "nll_teacher_answers", "rouge_l_teacher", "rouge_l"):
        assert value(metric, "bd", "sft") == pytest.approx(value(metric, "bd") - value(metric, "sft"))
    assert results.find("rouge_l_teacher", "bd").seeds == (10, 20)


def test_a_share_without_exception_is_not_certain(teacher, tokenizer, held_out):
    ended = [replace(trajectory, ends="terminal") for trajectory in held_out]
    results = run({}, teacher, tokenizer, ended, settings=SETTINGS.model_copy(update={"compare": ()}))
    share = results.find("terminated_share", "teacher")
    assert (share.value, share.low, share.high) == pytest.approx((1, 0.025 ** (1 / 6), 1))
    # What follows from its definition is.
    distance = results.find("kl_teacher_student", "teacher")
    assert (distance.value, distance.low, distance.high) == (0, 0, 0)


def test_stored_answers_are_their_own_references(teacher, tokenizer, held_out):
    references: dict[str, list[str]] = {}
    for t in held_out:
        references.setdefault(t.prompt_id, []).append(tokenizer.decode(t.response_ids, skip_special_tokens=True))
    results = run({}, teacher, tokenizer, held_out, references, SETTINGS.model_copy(update={"compare": ()}))
    assert results.find("rouge_l", "teacher").value == 1.0


def test_a_copy_of_the_teacher_scores_as_the_sampled_teacher_does(subjects, teacher, tokenizer, held_out):
    settings = SETTINGS.model_copy(update={"teacher_seeds": (10, 20), "compare": (("bd", "teacher"),)})
    results = run({"bd": subjects["bd"]}, teacher, tokenizer, held_out, settings=settings)
    for metric in ("rouge_l_teacher", "distinct_2", "response_length", "teacher_nll_on_student_answers"):
        assert results.find(metric, "bd").value == results.find(metric, "teacher").value
    difference = results.find("rouge_l_teacher", "bd", "teacher")
    assert (difference.low, difference.value, difference.high) == (0.0, 0.0, 0.0)
    assert results.find("rouge_l", "bd") is None


def test_shown_answers(subjects, teacher, tokenizer, held_out):
    results = run(subjects, teacher, tokenizer, held_out)
    assert [shown.prompt_id for shown in results.answers] == ["p0", "p1"]
    shown = results.answers[0]
    assert set(shown.answers) == {"teacher", "start", "sft", "bd"}
    assert shown.answers["teacher"] == tokenizer.decode(held_out[0].response_ids, skip_special_tokens=True)
    sampled, _ = sample_answers(
        subjects["start"], [held_out[0].prompt_ids], end_token_ids=(0,), vocab_size=64, max_new_tokens=6, seed=10
    )
    assert shown.answers["start"] == tokenizer.decode(sampled[0].token_ids, skip_special_tokens=True)


def test_a_pair_named_twice_is_recorded_once(subjects, teacher, tokenizer, held_out):
    settings = SETTINGS.model_copy(update={"compare": (("bd", "sft"), ("bd", "sft"))})
    records = run(subjects, teacher, tokenizer, held_out, settings=settings).records
    keys = [(r.metric, r.subject, r.split, r.against) for r in records]
    assert len(keys) == len(set(keys))


def test_json_round_trip(subjects, teacher, tokenizer, held_out):
    results = run(subjects, teacher, tokenizer, held_out)
    assert Results.model_validate_json(results.to_json()) == results.model_copy(update={"scores": None})
    raw = json.loads(results.to_json())
    assert set(raw) == {"settings", "records", "answers"}
    assert set(raw["records"][0]) == set(Result.model_fields)


def test_scores_are_what_the_records_are_means_of(subjects, teacher, tokenizer, held_out):
    references = {trajectory.prompt_id: ["word5 word6"] for trajectory in held_out}
    results = run(subjects, teacher, tokenizer, held_out, references)
    scores = results.scores
    assert Scores.model_validate_json(scores.model_dump_json()) == scores
    assert (scores.split, scores.prompt_ids) == ("held_out", ("p0", "p1", "p2", "p3", "p4", "p5"))
    assert scores.seeds == {"teacher": (), "start": (10, 20), "sft": (10, 20), "bd": (10, 20)}
    # p2 has two answers: their tokens add up.
    assert scores.num_tokens[2] == sum(len(t.response_ids) for t in held_out if t.prompt_id == "p2")
    assert set(scores.token_sums) == {
        "kl_teacher_student", "nll_teacher_answers", "agreement_top1", "mass_outside_set",
    }  # fmt: skip
    for metric, of in scores.token_sums.items():
        for name, sums in of.items():
            mean = sum(sums) / sum(scores.num_tokens)
            assert mean == pytest.approx(results.find(metric, name).value, abs=1e-6), (metric, name)
    # Answers of the teacher are stored, and unequally many: one mean a prompt.
    shapes = {name: np.shape(rows) for name, rows in scores.answer_scores["rouge_l"].items()}
    assert shapes == {"teacher": (6, 1), "start": (6, 2), "sft": (6, 2), "bd": (6, 2)}
    assert set(scores.answer_scores["rouge_l_teacher"]) == {"start", "sft", "bd"}
    for metric, of in scores.answer_scores.items():
        for name, rows in of.items():
            assert np.mean(rows) == pytest.approx(results.find(metric, name).value, abs=1e-6), (metric, name)
    one_seed = run(subjects, teacher, tokenizer, held_out, references, SETTINGS.model_copy(update={"seeds": (20,)}))
    second = [[row[1]] for row in scores.answer_scores["rouge_l"]["start"]]
    assert np.array(one_seed.scores.answer_scores["rouge_l"]["start"]) == pytest.approx(np.array(second))


def test_no_gap_no_share_of_it(subjects, teacher, tokenizer, held_out, caplog):
    settings = SETTINGS.model_copy(update={"compare": ()})
    results = run({"start": subjects["bd"], "sft": subjects["sft"]}, teacher, tokenizer, held_out, settings=settings)
    assert results.find("gap_closed", "sft") is None
    assert "gap_closed of sft" in caplog.text


def test_given_answers_are_noted(subjects, teacher, tokenizer, held_out):
    given = [replace(trajectory, source="given") for trajectory in held_out]
    results = run(subjects, teacher, tokenizer, given)
    assert "given" in results.find("nll_teacher_answers", "bd").note
    assert "given" in results.find("gap_closed", "bd").note
    assert "given" in results.find("kl_teacher_student", "bd", "sft").note


def test_given_answers_do_not_stand_for_the_teachers(subjects, teacher, tokenizer, held_out):
    one_each = {t.prompt_id: replace(t, source="given") for t in reversed(held_out)}
    given = [one_each[f"p{index}"] for index in range(6)]
    references = {t.prompt_id: [tokenizer.decode(t.response_ids, skip_special_tokens=True)] for t in given}
    settings = SETTINGS.model_copy(update={"num_shown_prompts": 6})
    results = run(subjects, teacher, tokenizer, given, references, settings)
    # Given answers are the references; "bd" is a copy of the teacher, which answers with the first of the two seeds.
    assert results.find("rouge_l", "teacher").value < 1.0
    assert results.find("rouge_l", "teacher").seeds == (10,)
    scores = results.scores.answer_scores
    assert [row[0] for row in scores["rouge_l"]["teacher"]] == [row[0] for row in scores["rouge_l"]["bd"]]
    assert "teacher" not in scores["rouge_l_teacher"]
    has_text = [float(bool(shown.answers["teacher"])) for shown in results.answers]
    assert [row[0] for row in scores["rouge_l_teacher"]["bd"]] == has_text and 1.0 in has_text
    assert results.find("rouge_l_teacher", "bd").note == "To its answers with seed 10."
    assert all(shown.answers["teacher"] == shown.answers["bd"] for shown in results.answers)
    assert results.find("teacher_nll_on_student_answers", "teacher") is not None


def test_mistakes_are_named_before_any_work(subjects, teacher, tokenizer, held_out):
    with pytest.raises(EmptyPromptSetError):
        run(subjects, teacher, tokenizer, [])
    typo = SETTINGS.model_copy(update={"compare": (("bd", "stf"),)})
    with pytest.raises(ConfigError, match=r"'stf'.*Did you mean 'sft'"):
        run(subjects, teacher, tokenizer, held_out, settings=typo)
    with pytest.raises(DataFileError, match="'p1' has no reference"):
        run(subjects, teacher, tokenizer, held_out, {"p0": ["word5"]})
    with pytest.raises(ConfigError, match="another model than the teacher"):
        run({**subjects, "teacher": subjects["start"]}, teacher, tokenizer, held_out)


def test_the_teacher_is_measured_at_the_temperature_that_it_was_asked_at(teacher, tokenizer, held_out):
    """The student that learnt this policy exactly, the teacher with its logits doubled, is at no distance from it."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.lm_head.weight.mul_(2)
    settings = SETTINGS.model_copy(update={"compare": (), "teacher_seeds": (10, 20), "exposure": ExposureSettings()})
    results = run({"bd": student}, teacher, tokenizer, held_out, settings=settings, teacher_temperature=0.5)
    for metric in ("kl_teacher_student", "kl_own_prefixes", "kl_teacher_prefixes"):
        assert results.find(metric, "bd").value == pytest.approx(0, abs=1e-4)
    assert results.find("kl_teacher_student", "bd").value == pytest.approx(0, abs=1e-5)
    for metric in ("nll_teacher_answers", "response_length", "distinct_2"):
        assert results.find(metric, "bd").value == pytest.approx(results.find(metric, "teacher").value, rel=1e-4)
    plain = run({"bd": student}, teacher, tokenizer, held_out, settings=SETTINGS.model_copy(update={"compare": ()}))
    assert plain.find("kl_teacher_student", "bd").value > 0.01


def test_what_a_run_adds_to_results_is_passed_over():
    content = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    assert {"format", "summary", "sparsity"} <= content.keys()
    assert Results.model_validate_json(json.dumps(content)).find("kl_teacher_student", "bd").value > 0


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(ValidationError, match="bootstrap_seed"):
        EvaluationSettings(bootstrap_seed=-1)


def test_a_record_never_holds_nan():
    with pytest.raises(ValidationError, match="finite"):
        Result(
            metric="rouge_l", subject="a", split="b", value=float("nan"), low=0, high=0, level=0.95, unit="F1",
            num_items=1, higher_is_better=True,
        )  # fmt: skip
