"""Everything that an evaluation measures only when asked, through ``evaluate``."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_judge import parts, serving

from tdistill.errors import ConfigError, DataFileError, JudgeError, ModelLogitsError, PromptTooLongError
from tdistill.evaluation import evaluate as module
from tdistill.evaluation.evaluate import evaluate
from tdistill.evaluation.exposure import kl_by_position
from tdistill.evaluation.generation import SampledAnswer, sample_answers
from tdistill.evaluation.kept import Kept
from tdistill.evaluation.optional import task_records
from tdistill.evaluation.prompt_sets import PromptSet
from tdistill.evaluation.records import METRICS, OPTIONAL_METRICS, EvaluationSettings, Results
from tdistill.evaluation.rouge import rouge_l
from tdistill.evaluation.scope import Scope
from tdistill.evaluation.tasks import TaskSettings
from tdistill.types import PromptTokens

SETTINGS = EvaluationSettings(
    seeds=(10, 20), max_new_tokens=6, batch_size=4, compare=(("bd", "sft"),), speed_tokens=3, num_shown_prompts=2
)


@pytest.fixture
def teacher(make_model):
    return make_model(0)


@pytest.fixture
def held_out(make_trajectory):
    return [make_trajectory(index, f"p{index}", 3 + index, 5) for index in range(6)]


@pytest.fixture
def subjects(make_model, teacher):
    return {"start": make_model(1), "sft": make_model(2), "bd": copy.deepcopy(teacher)}


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def run(subjects, teacher, tokenizer, held_out, **settings):
    settings = EvaluationSettings.model_validate({**SETTINGS.model_dump(), **settings})
    return evaluate(subjects, teacher, tokenizer, held_out, None, end_token_ids=(0,), settings=settings, progress=False)


def found_metrics(results):
    return {record.metric for record in results.records}


def test_nothing_optional_is_measured_by_default(subjects, teacher, tokenizer, held_out):
    results = run(subjects, teacher, tokenizer, held_out)
    assert not found_metrics(results) & set(OPTIONAL_METRICS)
    assert not set(METRICS) & set(OPTIONAL_METRICS)
    assert set(json.loads(results.to_json())) == {"settings", "records", "answers"}


def test_exposure(subjects, teacher, tokenizer, held_out):
    results = run(subjects, teacher, tokenizer, held_out, exposure={"min_share": 1.0})
    assert [curve.subject for curve in results.exposure] == ["start", "sft", "bd"]
    # The teacher's copy is at no distance on any prefix.
    assert results.find("kl_own_prefixes", "bd").value == results.find("kl_teacher_prefixes", "bd").value == 0.0
    assert results.find("excess_accumulated_error", "bd") is None
    assert results.find("kl_own_prefixes", "teacher") is None
    # On its own prefixes: what the start says with both seeds, in a loop of its own.
    model, sums, counts = subjects["start"], np.zeros(6), np.zeros(6)
    for seed in (10, 20):
        for trajectory in held_out:
            answer = sample_answers(
                model, [trajectory.prompt_ids], end_token_ids=(0,), vocab_size=64, max_new_tokens=6, seed=seed
            )[0][0].token_ids
            value_T = kl_by_position(teacher, {"m": model}, [(trajectory.prompt_ids, answer)], vocab_size=64)["m"][0]
            sums[: len(answer)] += value_T
            counts[: len(answer)] += 1
    curve = results.exposure[0]
    length = len(curve.excess)
    assert 1 <= length <= 5
    np.testing.assert_allclose(curve.kl_own_prefixes, (sums / np.maximum(counts, 1))[:length], rtol=1e-4)
    # On the teacher's: the stored answers, all 5 tokens long, as in the records that are always there.
    own, stored = results.find("kl_own_prefixes", "start"), results.find("kl_teacher_prefixes", "start")
    if length == 5:
        assert stored.value == pytest.approx(results.find("kl_teacher_student", "start").value, rel=1e-4)
    excess = results.find("excess_accumulated_error", "start")
    assert excess.value == pytest.approx(own.value / stored.value - 1, rel=1e-6)
    assert excess.low < excess.value < excess.high
    assert f"Over positions 1 to {length}; own prefixes are samples at top-p 0.8." in excess.note
    again = Results.model_validate_json(results.to_json())
    assert again.exposure == results.exposure


@pytest.mark.parametrize(("broken", "said"), [("teacher", "answers of start"), ("start", "prefixes of start")])
def test_the_answer_on_which_a_model_has_no_numbers_is_named(
    subjects, teacher, tokenizer, held_out, monkeypatch, broken, said
):
    held_out = [replace(t, prompt_ids=t.prompt_ids % 50, response_ids=t.response_ids % 50) for t in held_out]
    with torch.no_grad():
        {"teacher": teacher, **subjects}[broken].model.embed_tokens.weight[60] = torch.nan

    def sampled(model, prompts_ids, *, seed, **_):
        answers = [SampledAnswer(np.array([5, 6], np.int32), False) for _ in prompts_ids]
        if model is subjects["start"] and seed == 20:
            answers[3] = SampledAnswer(np.array([60, 6], np.int32), False)
        return answers, None

    monkeypatch.setattr("tdistill.evaluation.answers.sample_answers", sampled)
    with pytest.raises(ModelLogitsError, match=f"^Model '{broken}' .* on {said}: prompt 'p3' with seed 20"):
        run(subjects, teacher, tokenizer, held_out, exposure={})


def test_perplexity(subjects, teacher, tokenizer, held_out, tmp_path):
    path = tmp_path / "text.jsonl"
    texts = ["word2 word3 word4", "word5 word5", "word9 word8 word7 word6"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    window = {"text": str(path), "window_tokens": 16, "stride_tokens": 8}
    results = run(subjects, teacher, tokenizer, held_out, perplexity=window)

    def nll(model):
        total = 0.0
        for text in texts:
            ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        return total / 9

    for name, model in (("teacher", teacher), ("sft", subjects["sft"])):
        record = results.find("text_nll", name)
        assert record.value == pytest.approx(nll(model), rel=1e-5)
        assert (record.split, record.num_items) == ("text", 3)
    assert results.find("text_perplexity", "bd") == results.find("text_perplexity", "teacher").model_copy(
        update={"subject": "bd"}
    )
    difference = results.find("text_nll", "bd", "sft")
    assert difference.value == pytest.approx(nll(teacher) - nll(subjects["sft"]), rel=1e-4)


def test_further_prompt_sets(subjects, teacher, tokenizer, held_out):
    sets = {
        name: PromptSet(
            [PromptTokens(f"{name}{i}", np.arange(2 + i, 6 + i, dtype=np.int32)) for i in range(number)],
            {f"{name}{i}": (f"word{7 + i} word3", "word5") for i in range(number)},
        )
        for name, number in (("a", 4), ("b", 2))
    }
    settings = SETTINGS.model_copy(update={"prompt_sets": {name: f"{name}.jsonl" for name in sets}})
    how = {"end_token_ids": (0,), "vocab_size": 64, "max_new_tokens": 6, "top_p": 0.8}
    results = evaluate(subjects, teacher, tokenizer, held_out, None, end_token_ids=(0,), settings=settings,
                       progress=False, prompt_sets=sets)  # fmt: skip

    def scores(model, name, seeds):
        of = sets[name]
        answers = [sample_answers(model, [p.prompt_ids for p in of.prompts], seed=seed, **how)[0] for seed in seeds]
        return [
            rouge_l(tokenizer.decode(answer.token_ids, skip_special_tokens=True), of.references[p.prompt_id])
            for row in answers
            for p, answer in zip(of.prompts, row, strict=True)
        ]

    for name, number in (("a", 4), ("b", 2)):
        for subject, seeds in (("teacher", (10,)), ("sft", (10, 20)), ("bd", (10, 20))):
            record = results.find("rouge_l", subject, split=name)
            model = {**subjects, "teacher": teacher}[subject]
            assert record.value == pytest.approx(np.mean(scores(model, name, seeds)), abs=1e-9)
            assert (record.num_items, record.seeds) == (number, seeds)
            by_prompt = results.scores.prompt_sets[name]
            assert by_prompt.prompt_ids == tuple(prompt.prompt_id for prompt in sets[name].prompts)
            rows = np.array(by_prompt.answer_scores["rouge_l"][subject])
            assert by_prompt.seeds[subject] == seeds and rows.shape == (number, len(seeds))
            np.testing.assert_allclose(rows.T.ravel(), scores(model, name, seeds), atol=1e-6)
        own, other = (results.find("rouge_l", subject, split=name).value for subject in ("bd", "sft"))
        assert results.find("rouge_l", "bd", "sft", split=name).value == pytest.approx(own - other)
    assert any(results.find("rouge_l", "sft", split=name).value > 0 for name in sets)
    assert results.find("rouge_l", "sft", split="held_out") is None
    with pytest.raises(ConfigError, match=r"name the prompt sets \['a', 'b'\], and those of \['a'\] were given"):
        evaluate(subjects, teacher, tokenizer, held_out, None, end_token_ids=(0,), settings=settings,
                 prompt_sets={"a": sets["a"]})  # fmt: skip


def test_judge(subjects, teacher, tokenizer, held_out):
    def reply(body):
        if "[Request]" not in body["messages"][-1]["content"]:
            return "yes"
        _, first, second = parts(body)
        return "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"

    with serving(reply) as server:
        judge = {"base_url": server.base_url, "model": "m", "against": "start", "max_prompts": 4}
        results = run(subjects, teacher, tokenizer, held_out, judge=judge, num_shown_prompts=6)
    shown = results.answers[:4]
    for name in ("teacher", "sft", "bd"):
        pairs = [(answers.answers[name], answers.answers["start"]) for answers in shown]
        scores = [0.5 if a == b else float(a > b) for a, b in pairs]
        record = results.find("judge_win_rate", name)
        assert record.value == pytest.approx(np.mean(scores)) and record.num_items == 4
        agreement = results.find("judge_self_agreement", name)
        assert (agreement.value, agreement.low, agreement.high) == pytest.approx((1, 0.025 ** (1 / 4), 1))
        assert results.find("judge_unread_share", name).value == 0.0
        assert "Against start, by m, both orders. Of 8 requests 0 had no readable" in record.note
    assert results.find("judge_win_rate", "start") is None
    assert len(server.requests) == 1 + 3 * 8
    assert {parts(body)[0] for _, _, body in server.requests[1:]} == {answers.prompt for answers in shown}


def test_a_judge_without_verdicts_gives_no_win_rate(subjects, teacher, tokenizer, held_out, caplog):
    with serving(lambda body: "hm") as server:
        results = run(subjects, teacher, tokenizer, held_out, judge={"base_url": server.base_url, "model": "m"})
    assert found_metrics(results) & set(OPTIONAL_METRICS) == {"judge_unread_share"}
    assert results.find("judge_unread_share", "bd").value == 1.0
    assert "no verdict on bd" in caplog.text


def test_tasks(subjects, teacher, tokenizer, held_out, tmp_path):
    pytest.importorskip("lm_eval")
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"question": f"word{i}", "answer": "word2"}) + "\n" for i in range(3, 6)))
    task = {"data": str(path), "answer": "text", "max_new_tokens": 2}
    results = run({"sft": subjects["sft"], "bd": subjects["bd"]}, teacher, tokenizer, held_out, tasks={"words": task},
                  start="sft")  # fmt: skip
    found = [r for r in results.records if r.metric == "task_accuracy"]
    assert [(r.subject, r.against, r.split, r.num_items) for r in found] == [
        ("teacher", None, "words", 3),
        ("sft", None, "words", 3),
        ("bd", None, "words", 3),
        ("bd", "sft", "words", 3),
    ]


def test_no_right_answer_is_not_certainty(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr("tdistill.evaluation.optional.run_task", lambda *args, **kwargs: np.zeros(20))
    (tmp_path / "x").touch()
    scope, tasks, models = Scope("held_out", 6, 0), {"sums": TaskSettings(data=str(tmp_path / "x"))}, ("bd", "sft")
    kept = Kept(tmp_path / "kept", dict.fromkeys(models, "hash"))
    first = task_records(scope, dict.fromkeys(models), tokenizer, tasks, (0,), [models], kept)
    monkeypatch.setattr("tdistill.evaluation.optional.run_task", lambda *args, **kwargs: pytest.fail("marked before"))
    own, other, difference = task_records(scope, dict.fromkeys(models), tokenizer, tasks, (0,), [models], kept)
    assert [own, other, difference] == first
    for record in (own, other):
        assert (record.value, record.low, record.high) == pytest.approx((0, 0, 0.16843), abs=1e-5)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0, -0.16843, 0.16843), abs=1e-5)


def test_mistakes_are_named_before_any_work(subjects, teacher, tokenizer, held_out, monkeypatch, tmp_path):
    def no_work(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(module, "divergences", no_work)
    world = (subjects, teacher, tokenizer, held_out)
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "max_attempts": 1}
    with pytest.raises(ConfigError, match=r"judge\.against = 'sfft'.*Did you mean 'sft'"):
        run(*world, judge={**judge, "against": "sfft"})
    with pytest.raises(JudgeError, match="does not answer"):
        run(*world, judge=judge)
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        run(*world, judge={**judge, "api_key_env": "JUDGE_KEY"})
    with pytest.raises(DataFileError, match=r"evaluation\.perplexity\.text"):
        run(*world, perplexity={"text": str(tmp_path / "none.jsonl")})
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "word2"}\n')
    with pytest.raises(ConfigError, match=r"window_tokens = 512, but model 'teacher' was made for 128"):
        run(*world, perplexity={"text": str(path)})
    monkeypatch.setattr("tdistill.evaluation.tasks._check_installed", lambda name: None)
    path.write_text('{"question": "word2", "answer": "#### 2"}\n')
    for name in ("text", "held_out"):
        with pytest.raises(ConfigError, match=f"'{name}' already names"):
            run(*world, tasks={name: {"data": str(path)}})
        with pytest.raises(ConfigError, match=rf"prompt_sets\.{name}: '{name}' already names"):
            run(*world, prompt_sets={name: str(path)})
    with pytest.raises(ConfigError, match=r"prompt_sets\.sums: 'sums' already names"):
        run(*world, tasks={"sums": {"data": str(path)}}, prompt_sets={"sums": str(path)})
    with pytest.raises(
        PromptTooLongError, match=r"evaluation\.tasks\.sums: .* model 'teacher' was made for 128 in all"
    ):
        run(*world, tasks={"sums": {"data": str(path)}})
    torch.nn.init.constant_(subjects["sft"].lm_head.weight, torch.nan)
    with pytest.raises(ModelLogitsError, match="'sft' gives NaN"):
        run(*world, exposure={})


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_a_damaged_measurement_is_made_again(tmp_path, caplog, content):
    kept, values = Kept(tmp_path, {"bd": "hash"}), iter([1, 2])
    assert kept.get("task", "bd", {}, lambda: next(values)) == 1
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert kept.get("task", "bd", {}, lambda: next(values)) == 2
    assert f"{file} is damaged" in caplog.text
    assert kept.get("task", "bd", {}, lambda: next(values)) == 2
