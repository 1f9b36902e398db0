from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from synthetic_run import EVIL, write_scored_run

from tdistill.errors import ConfigError, DataFileError
from tdistill.reports.compare import Comparison, compare
from tdistill.reports.compare_page import comparison_html, comparison_markdown, comparison_text
from tdistill.reports.plots import comparison_chart

TOKENS = {"p0": 10, "p1": 30}
# 9 prompts of 10 tokens whose KL differs, so that only pairing tells bd and sft apart.
MANY = {f"p{index}": 10 for index in range(9)}
HARD = [1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 14.0, 18.0, 20.0]


def run(folder: Path, **changes: Any) -> Path:
    sums = {"teacher": [0.0] * 9, "sft": [x + 1.0 for x in HARD], "bd": HARD}
    return write_scored_run(folder, **{"tokens": MANY, "kl_sums": sums, **changes})


def recipe(seed: int | None, **changes: Any) -> dict[str, Any]:
    args = {"max_steps": 4} | ({} if seed is None else {"seed": seed})
    return {"name": f"s{seed}", "output": f"runs/{seed}", "phases": {"bd": {"args": args}}, **changes}


def interval(comparison: Comparison, metric: str, label: str, against: str | None = None) -> tuple[Any, ...]:
    record = comparison.find(metric, label, against)
    assert record is not None
    return record.value, record.low, record.high


def test_values_and_paired_differences(tmp_path: Path) -> None:
    one = write_scored_run(
        tmp_path / "one",
        tokens=TOKENS,
        kl_sums={"teacher": [0, 0], "bd": [10.0, 60.0]},
        rouge={"bd": [[0.2, 0.4], [0.6, 0.8]]},
    )
    # The same prompts in another order, and one that only this run has.
    two = write_scored_run(
        tmp_path / "two",
        tokens={"p1": 30, "p9": 5, "p0": 10},
        kl_sums={"bd": [30.0, 5.0, 0.0]},
        rouge={"bd": [[0.5, 0.7], [0.0, 0.0], [0.1, 0.3]]},
    )
    found = compare([str(one), str(two)], "one:bd")
    assert [row.label for row in found.rows] == ["one:teacher", "one:bd", "two:bd"]
    assert (found.split, found.num_prompts, found.against) == ("held_out", 2, "one:bd")
    # 70 / 40; p0 alone 1, p1 alone 2, and each is drawn twice in a quarter of the resamples.
    assert interval(found, "kl_teacher_student", "one:bd") == pytest.approx((1.75, 1, 2))
    # 30 / 40; p0 alone 0, p1 alone 1. Paired, the difference is −1 in every resample.
    assert interval(found, "kl_teacher_student", "two:bd") == pytest.approx((0.75, 0, 1))
    assert interval(found, "kl_teacher_student", "two:bd", "one:bd") == pytest.approx((-1, -1, -1))
    assert interval(found, "kl_teacher_student", "one:teacher", "one:bd") == pytest.approx((-1.75, -2, -1))
    assert found.find("kl_teacher_student", "one:bd", "one:bd") is None
    # Every score is 0.1 below: paired over prompts, each with all of its seeds.
    assert interval(found, "rouge_l", "one:bd")[0] == pytest.approx(0.5)
    assert interval(found, "rouge_l", "two:bd", "one:bd") == pytest.approx((-0.1, -0.1, -0.1))
    assert found.find("rouge_l", "one:teacher") is None
    record = found.find("rouge_l", "two:bd")
    assert record is not None and (record.seeds, record.num_items, record.level, record.unit) == ((0, 1), 2, 0.95, "F1")
    assert found.best["kl_teacher_student"].label == "two:bd"  # the teacher is no student
    assert found.best["rouge_l"].label == "one:bd"
    assert found.notes == (f"Only the 2 prompts that all runs share are compared; of {two} 3.",)


def test_the_best_and_what_is_not_separable_from_it(tmp_path: Path) -> None:
    sums = {"sft": [x + 1.0 for x in HARD], "bd": HARD, "noisy": [x + 0.2 * (-1) ** i for i, x in enumerate(HARD)]}
    found = compare([str(run(tmp_path / "run", kl_sums=sums))])
    # sft is worse by 0.1 a token for each prompt, although its own interval overlaps with that of bd.
    best = found.best["kl_teacher_student"]
    assert (best.label, best.not_separable) == ("run:bd", ("run:noisy",))
    high, low = interval(found, "kl_teacher_student", "run:bd")[2], interval(found, "kl_teacher_student", "run:sft")[1]
    assert high > low


def test_one_shared_prompt_has_no_interval(tmp_path: Path) -> None:
    folder = write_scored_run(tmp_path / "run", tokens={"p": 10}, kl_sums={"sft": [20.0], "bd": [10.0]})
    found = compare([str(folder)], "sft")
    assert interval(found, "kl_teacher_student", "run:bd") == (1.0, None, None)
    assert interval(found, "kl_teacher_student", "run:bd", "run:sft") == (-1.0, None, None)
    assert found.best["kl_teacher_student"].not_separable == ("run:sft",)


def test_one_subject_of_a_run(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    found = compare([f"{tmp_path}/a:bd", f"{tmp_path}/b"], f"{tmp_path}/a:bd")
    assert [row.label for row in found.rows] == ["a:bd", "b:teacher", "b:sft", "b:bd"]
    assert found.against == "a:bd"
    assert interval(found, "kl_teacher_student", "b:bd", "a:bd") == (0, 0, 0)


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [str(run(tmp_path / name / "run")) for name in ("a", "b")]
    found = compare([f"{folder}:bd" for folder in folders])
    assert [row.label for row in found.rows] == [f"{folder}:bd" for folder in folders]


def test_runs_of_different_training_seeds_are_one_row(tmp_path: Path) -> None:
    for seed, shift in ((None, 0.0), (7, 20.0)):  # no seed is transformers' 42
        # The second has the answers of the first.
        capture = {"p_max": 0.8, "from_run": None if seed is None else "runs/first"}
        sums = {"bd": [x + shift for x in [10.0] * 9]}
        run(tmp_path / f"s{seed}", kl_sums=sums, recipe=recipe(seed, capture=capture))
    run(tmp_path / "other", kl_sums={"bd": [15.0] * 9}, recipe=recipe(7, student={"layers": 3}))
    folders = [str(tmp_path / name) for name in ("sNone", "s7", "other")]
    assert len(compare(folders).rows) == 3
    found = compare(folders, "other:bd", pool_seeds=True)
    assert [row.label for row in found.rows] == ["sNone:bd (2 seeds)", "other:bd"]
    assert found.rows[0].runs == tuple(folders[:2])
    assert "95 % intervals over prompts and training seeds; ≈" in comparison_markdown(found)
    # Trainings of 1 and 3 nats per token.
    assert interval(found, "kl_teacher_student", "sNone:bd (2 seeds)") == pytest.approx((2, 1, 3))
    difference = interval(found, "kl_teacher_student", "sNone:bd (2 seeds)", "other:bd")
    assert difference == pytest.approx((0.5, -0.5, 1.5))
    assert found.best["kl_teacher_student"].not_separable == ("sNone:bd (2 seeds)",)
    assert compare(folders, "s7:bd", pool_seeds=True).against == "sNone:bd (2 seeds)"


def test_what_no_other_seed_trained_is_not_several_seeds(tmp_path: Path) -> None:
    sums = {"teacher": [0.0] * 9, "sft": HARD, "bd": HARD}
    for seed in (1, 2):
        phases = {"sft": {"args": {"seed": 5}}, "bd": {"args": {"seed": seed}}}
        run(tmp_path / f"s{seed}", kl_sums=sums, recipe={"phases": phases})
    found = compare([str(tmp_path / "s1"), str(tmp_path / "s2")], "sft", pool_seeds=True)
    assert [row.label for row in found.rows] == ["s1:teacher", "s1:sft", "s1:bd (2 seeds)"]


def test_costs(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", times_s={"sft": 100.0, "bd": 20.0})
    found = compare([str(folder)])
    assert found.costs == ("num_parameters", "training_s")
    # bd starts from sft.
    assert [interval(found, "training_s", f"run:{name}")[0] for name in ("sft", "bd")] == [100, 120]
    assert found.find("training_s", "run:teacher") is None
    assert interval(found, "num_parameters", "run:bd") == (3_000_002, None, None)


def test_what_limits_a_comparison_is_noted(tmp_path: Path) -> None:
    run(tmp_path / "a", settings={"top_p": 0.8, "temperature": 1.0})
    run(tmp_path / "b", settings={"top_p": 0.9, "temperature": 1.0}, tokens={**MANY, "p3": 11}, teacher="org/other")
    notes = " ".join(compare([str(tmp_path / "a"), str(tmp_path / "b")]).notes)
    assert "different stored answers" in notes
    assert "different teachers" in notes
    assert "different evaluation.top_p: 0.8, 0.9" in notes
    assert "temperature" not in notes
    assert compare([str(tmp_path / "a")]).notes == ()


@pytest.mark.parametrize(
    ("key", "values", "shown"), [("p_max", (0.8, 0.95), "0.8, 0.95"), ("max_actions", (64, None), "64, null")]
)
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_other_action_sets_are_noted(tmp_path: Path, mode: str, key: str, values: tuple[Any, ...], shown: str) -> None:
    for name, value in zip("ab", values, strict=True):
        run(tmp_path / name, recipe=recipe(0, capture={"mode": mode, "seed": 0, key: value}))
    notes = " ".join(compare([str(tmp_path / "a"), str(tmp_path / "b")]).notes)
    assert f"made with different capture.{key}: {shown}. The mass outside the set" in notes
    # Answers that were given do not depend on the sets; those of the teacher do, even where they are as long.
    assert ("different stored answers" in notes) == (mode == "generate")


def test_answers_of_other_seeds_are_other_answers(tmp_path: Path) -> None:
    for mode, expected in (("generate", 1), ("score", 0)):
        for seed in (0, 1):
            run(tmp_path / f"{mode}{seed}", recipe=recipe(0, capture={"mode": mode, "p_max": 0.8, "seed": seed}))
        assert len(compare([str(tmp_path / f"{mode}{seed}") for seed in (0, 1)]).notes) == expected


def test_other_held_out_files_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, recipe=recipe(0, data={"held_out": f"{name}.jsonl"}))
    notes = " ".join(compare([str(tmp_path / "a"), str(tmp_path / "b")]).notes)
    assert "paired by their ids alone, of different files (data.held_out): a.jsonl, b.jsonl" in notes


def other_prompts(**scores: list[list[float]]) -> dict[str, Any]:
    seeds = {name: list(range(len(rows[0]))) for name, rows in scores.items()}
    return {"prompt_ids": ["q0", "q1", "q2"], "seeds": seeds, "answer_scores": {"rouge_l": scores}}


def test_further_prompts_of_the_runs(tmp_path: Path) -> None:
    low, high = [[0.1, 0.3], [0.2, 0.4], [0.6, 0.6]], [[0.2, 0.4], [0.3, 0.5], [0.7, 0.7]]
    for name, file, sets in (
        ("a", "q.jsonl", {"q": other_prompts(teacher=[[1.0]] * 3, bd=low), "r": other_prompts(bd=low)}),
        ("b", "other.jsonl", {"q": other_prompts(bd=high, sft=low)}),
    ):
        named = {"data": {"held_out": f"{name}.jsonl"}, "evaluation": {"prompt_sets": {"q": file}}}
        tokens = dict.fromkeys(MANY, 10 + (name == "b"))
        rouge = {"teacher": [[1.0]] * 9, "bd": [[0.9]] * 9}
        run(tmp_path / name, tokens=tokens, rouge=rouge, recipe=recipe(0, **named), prompt_sets=sets)
    folders = [str(tmp_path / name) for name in ("a", "b")]
    found = compare(folders, "a:bd", split="q")
    assert (found.split, found.num_prompts, found.metrics) == ("q", 3, ("rouge_l",))
    assert [row.label for row in found.rows] == ["a:teacher", "a:bd", "b:sft", "b:bd"]
    assert interval(found, "rouge_l", "a:bd")[0] == pytest.approx(2.2 / 6)
    assert interval(found, "rouge_l", "b:bd", "a:bd") == pytest.approx((0.1, 0.1, 0.1))
    record = found.find("rouge_l", "a:bd")
    assert record is not None and (record.seeds, record.split, record.unit) == ((0, 1), "q", "F1")
    assert (found.best["rouge_l"].label, found.best["rouge_l"].not_separable) == ("b:bd", ())
    assert "q split; 3 prompts" in comparison_text(found)
    # There are no stored answers to these prompts, and so none that differ.
    assert found.notes == (
        "Prompts are paired by their ids alone, of different files (evaluation.prompt_sets.q): q.jsonl, other.jsonl.",
    )
    held_out = compare(folders)
    assert held_out == compare(folders, split="held_out")
    assert held_out.num_prompts == 9 and interval(held_out, "rouge_l", "a:bd")[0] == pytest.approx(0.9)
    assert "different stored answers" in " ".join(held_out.notes)
    with pytest.raises(ConfigError, match=r"--split r: .*b was not measured on it; .*prompt_sets .*held_out, q"):
        compare(folders, split="r")
    assert [row.label for row in compare(folders[:1], split="r").rows] == ["a:bd"]


# ---- refusals ----


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"no run folder .*absent.*tdistill run"):
        compare([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataFileError, match=r"results\.json is missing.*tdistill run"):
        compare([str(tmp_path / "empty")])


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "scores.json").unlink()
    wanted = rf"scores\.json is missing.*older version.*`tdistill eval {folder}/recipe\.yaml output={folder}`"
    with pytest.raises(DataFileError, match=wanted):
        compare([str(folder)])


def test_no_shared_prompt(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", tokens={f"q{index}": 10 for index in range(9)})
    with pytest.raises(DataFileError, match=r"share no prompt of held_out \(.*a has 9, .*b has 9\).*data\.held_out"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")])


def test_unknown_subjects(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"no subject 'sftt'.*Did you mean 'sft'"):
        compare([f"{tmp_path}/a:sftt"])
    with pytest.raises(ConfigError, match=r"--against a:db is none of the rows.*Did you mean 'a:bd'"):
        compare([f"{tmp_path}/a"], "a:db")
    with pytest.raises(ConfigError, match=r"--against bd is ambiguous: a:bd, b:bd\. Name one"):
        compare([f"{tmp_path}/a", f"{tmp_path}/b"], "bd")


@pytest.mark.parametrize("again", ["{0}", "{0}:bd", "{0}/../run"])
def test_a_row_named_twice(tmp_path: Path, again: str) -> None:
    folder = run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run:\w+ is named twice"):
        compare([str(folder), again.format(folder)])


def test_two_copies_of_one_training_are_no_two_seeds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, kl_sums={"bd": HARD}, recipe=recipe(7, output=name))
    with pytest.raises(ConfigError, match=r"a and .*b cannot be averaged.*same training seeds"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")], pool_seeds=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=2), r"scores\.json: version"),
        (lambda s: s["num_tokens"].pop(), "num_tokens has 8 entries for 9 prompts"),
        (lambda s: s["token_sums"]["kl_teacher_student"]["bd"].pop(), r"kl_teacher_student\.bd has 8 entries for 9"),
        (lambda s: s.update(answer_scores={"rouge_l": {"bd": [[1.0]] * 8 + [[]]}}), "not equally many scores"),
        (lambda s: s["prompt_ids"].__setitem__(1, "p0"), "a prompt is listed twice"),
        (lambda s: s.update(num_tokens=[]), "token_sums has values, and num_tokens none"),
        (lambda s: s.update(prompt_sets={"q": {**other_prompts(bd=[[1.0]])}}), r"q.*bd has 1 entries for 3 prompts"),
        (lambda s: s.update(token_sums={}), r"No subject of .* is in its scores\.json"),
    ],
)
def test_malformed_scores(tmp_path: Path, change, message: str) -> None:
    path = run(tmp_path / "run") / "scores.json"
    scores = json.loads(path.read_text())
    change(scores)
    path.write_text(json.dumps(scores))
    with pytest.raises(DataFileError, match=message):
        compare([str(path.parent)])


# ---- table, page and figure ----


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    folder = write_scored_run(
        tmp_path / "one",
        tokens=TOKENS,
        kl_sums={"teacher": [0, 0], "bd": [10.0, 60.0], "sft": [10.0, 90.0]},
        times_s={"bd": 10, "sft": 5},
    )
    return compare([str(folder)], "sft")


def test_the_table(compared: Comparison) -> None:
    lines = comparison_markdown(compared).splitlines()
    assert lines[0] == "| | KL(teacher‖student) (nats/token) | minus one:sft | Parameters (M) | Training (s) |"
    assert lines[2:5] == [
        "| one:teacher | 0 [0, 0] | −2.5 [−3.0, −1.0] | 3 | – |",
        # 70 / 40 and 100 / 40; of p0 alone they are the same, which a quarter of the resamples is.
        "| one:bd | **1.75 [1.00, 2.00]** | −0.75 [−1.00, 0.00] | 3.000 | 10 |",
        "| one:sft | 2.5 [1.0, 3.0] ≈ | – | 3.000 | 15 |",
    ]
    # Sampling seeds are not drawn, and without pooling no training seeds either.
    assert "held_out split; 2 prompts; brackets are 95 % intervals over prompts; ≈" in lines[-1]
    assert lines[-1].endswith("Bold: the best student of its column.")
    text = comparison_text(compared)
    assert "1.75 [1.00, 2.00] *" in text and "2.5 [1.0, 3.0] ≈" in text


def test_the_page_is_self_contained_and_escaped(compared: Comparison) -> None:
    rows = tuple(row.model_copy(update={"runs": (EVIL,)}) for row in compared.rows)
    page = comparison_html(compared.model_copy(update={"rows": rows, "notes": (EVIL,)}), "kl_teacher_student")
    assert "<script" not in page and "<img" not in page and "http-equiv" in page
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") == 1
    assert '<strong class="best">1.75 [1.00, 2.00]</strong>' in page


def test_the_figure(compared: Comparison) -> None:
    svg = comparison_chart(compared, "kl_teacher_student", "training_s")
    texts = {"".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter()}
    assert {"one:teacher", "one:bd", "one:sft"} <= texts
    assert {
        "KL(teacher‖student), nats/token",
        "KL(teacher‖student), nats/token, difference to one:sft",
        "Training, s",
    } <= texts
    assert "one:bd 1.75 [1.00, 2.00]" in svg
    assert svg == comparison_chart(compared, "kl_teacher_student", "training_s")
    # Without a cost, one panel less.
    assert len(re.findall('id="comparison-axes_', comparison_chart(compared, "kl_teacher_student"))) == 2


def test_json_round_trip(compared: Comparison) -> None:
    assert Comparison.model_validate_json(compared.model_dump_json()) == compared
