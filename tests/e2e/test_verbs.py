"""Verbs that look at a finished run, a store or a recipe, with and without --json."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from cli.harness import snapshot, strict_json, tdistill
from conftest import FinishedRun

from tdistill.objectives import OBJECTIVES
from tdistill.store import Store


def test_eval_again_prints_the_same_numbers_and_measures_nothing(finished: FinishedRun):
    before = snapshot(finished.folder)
    outcome = tdistill("eval", finished.recipe)
    assert outcome.code == 0
    assert "reuses the results" in outcome.err
    assert outcome.out.strip() in finished.outcome.out
    assert snapshot(finished.folder) == before


def test_train_again_trains_nothing(finished: FinishedRun):
    weights = {name: mark for name, mark in snapshot(finished.folder).items() if name.endswith(".safetensors")}
    outcome = tdistill("train", finished.recipe)
    assert outcome.code == 0
    assert [line for line in outcome.err.splitlines() if "phase" in line] == [
        f"tdistill: reuses phase {name}" for name in ("sft", "bd", "sft_continued")
    ]
    after = snapshot(finished.folder)
    assert {name: after[name] for name in weights} == weights


def test_report_writes_the_same_page_again(finished: FinishedRun, tmp_path: Path):
    shutil.copytree(finished.folder, tmp_path / "run")
    page, card = tmp_path / "run" / "report.html", tmp_path / "run" / "student" / "README.md"
    first = (page.read_bytes(), card.read_bytes())
    page.unlink()
    card.unlink()
    outcome = tdistill("report", tmp_path / "run")
    assert (outcome.code, outcome.out.strip()) == (0, str(page))
    assert (page.read_bytes(), card.read_bytes()) == first


@pytest.mark.parametrize("missing", ["results.json", "metrics.jsonl", "environment.json", "recipe.yaml", "student"])
def test_report_names_what_a_folder_lacks(finished: FinishedRun, tmp_path: Path, missing: str):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / missing).rename(tmp_path / "away")
    outcome = tdistill("report", folder)
    assert outcome.code == 3
    assert str(folder / missing) in outcome.err
    assert "tdistill run" in outcome.err


def test_report_of_no_folder_is_refused(tmp_path: Path):
    outcome = tdistill("report", tmp_path / "none")
    assert outcome.code == 3
    assert f"There is no run folder {tmp_path}/none" in outcome.err
    assert not (tmp_path / "none").exists()


# ---- ls ----


def _settings(objective: str) -> list[str]:
    return [field.name for field in fields(OBJECTIVES[objective])]


def test_ls_objectives_lists_every_objective_with_its_settings():
    text, rows = tdistill("ls", "objectives"), strict_json(tdistill("ls", "objectives", "--json").out)
    assert text.code == 0
    assert [row["name"] for row in rows] == sorted(OBJECTIVES)
    for row in rows:
        assert row["name"] in text.out and row["minimises"] in text.out
        assert all(f"{name}=" in row["settings"] for name in _settings(row["name"]))
        assert f"  {row['needs']}  " in text.out
    needs = {row["name"]: row["needs"] for row in rows}
    assert needs["iq_learn"] == "store" and needs["sft"] == "store, dense logits"
    assert needs["sampled_kl"] == "store, teacher in memory, dense logits"
    assert needs["minillm"] == "store, rollouts, dense logits"
    assert tdistill("ls").out == text.out


def test_ls_objectives_looks_in_no_folder(tmp_path: Path):
    outcome = tdistill("ls", "objectives", "--folder", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: --folder = {tmp_path} is for recipes and runs" in outcome.err


def test_ls_recipes_lists_files_below_a_folder(finished: FinishedRun):
    place = finished.recipe.parent
    text, rows = tdistill("ls", "recipes", "--folder", place), tdistill("ls", "recipes", "--folder", place, "--json")
    assert str(finished.recipe) in text.out.splitlines()
    assert {"path": str(finished.recipe)} in strict_json(rows.out)


def test_ls_runs_tells_finished_from_unfinished(finished: FinishedRun, tmp_path: Path):
    tdistill("train", finished.recipe, f"output={tmp_path}/begun")
    shutil.copytree(finished.folder, tmp_path / "done")
    (tmp_path / "foreign").mkdir()
    rows = strict_json(tdistill("ls", "runs", "--folder", tmp_path, "--json").out)
    assert rows == [
        {"path": str(tmp_path / "begun"), "state": "unfinished"},
        {"path": str(tmp_path / "done"), "state": "finished"},
    ]
    text = tdistill("ls", "runs", "--folder", tmp_path)
    assert text.out == f"{tmp_path}/begun  unfinished\n{tmp_path}/done  finished\n"


@pytest.mark.parametrize("what", ["recipes", "runs"])
def test_ls_of_nothing_says_where_it_looked(what: str, tmp_path: Path):
    said = f"tdistill: no {what} in {tmp_path}; --folder names another place\n"
    assert tdistill("ls", what, "--folder", tmp_path) == (0, "", said)
    assert tdistill("ls", what, "--folder", tmp_path / "none", "--json") == (0, "[]\n", "")


def test_ls_of_something_unknown_suggests_what_is_known():
    outcome = tdistill("ls", "objektives")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: Cannot list 'objektives'. Did you mean 'objectives'?\n"


# ---- check ----


def test_check_store_of_a_whole_store(finished: FinishedRun):
    path = finished.folder / "store" / "train"
    store = Store.open(path)
    text, report = tdistill("check", "store", path), strict_json(tdistill("check", "store", path, "--json").out)
    facts = {"answers": 60, "response_tokens": store.total_response_tokens, "p_max": 0.95}
    assert report == {"path": str(path), "problems": [], **facts}
    assert text.code == 0
    assert text.out.startswith(f"{path}: whole; ")
    assert all(f"{name} {value}" in text.out for name, value in facts.items())


def test_check_store_of_a_damaged_store(finished: FinishedRun, tmp_path: Path):
    path = tmp_path / "store"
    shutil.copytree(finished.folder / "store" / "dev", path)
    (shard,) = path.glob("shard-*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    text, outcome = tdistill("check", "store", path), tdistill("check", "store", path, "--json")
    assert (text.code, outcome.code) == (7, 7)
    report = strict_json(outcome.out)
    assert len(report["problems"]) == 1
    assert shard.name in report["problems"][0] and shard.name in text.out
    assert "SHA-256" in text.out


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_check_store_where_there_is_none(tmp_path: Path, flags: tuple[str, ...]):
    outcome = tdistill("check", "store", tmp_path / "none", *flags)
    assert outcome.code == 7
    assert outcome.err.startswith(f"error: {tmp_path}/none: expected a store")


def test_check_theory_finds_no_violation():
    outcome = tdistill("check", "theory", "--json", "--processes", "6")
    claims = strict_json(outcome.out)
    assert outcome.code == 0
    assert len(claims) >= 7
    assert all({"claim", "cases", "violations", "worst_margin"} <= claim.keys() for claim in claims)
    assert {(claim["cases"], claim["violations"]) for claim in claims} == {(6, 0)}
    assert "0 violations" in tdistill("check", "theory", "--processes", "1").out


def test_check_theory_refuses_a_seed_that_no_generator_takes():
    outcome = tdistill("check", "theory", "--processes", "1", "--seed", "-1")
    assert outcome.code == 2 and "than or equal to 0" in outcome.err


def test_check_theory_fails_where_a_claim_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tdistill.tabular.claims.contraction", lambda *_: -1.0)
    outcome = tdistill("check", "theory", "--processes", "2")
    assert outcome.code == 1
    assert "contraction: 2 violations in 2 cases" in outcome.out


def test_check_sparsity_shows_what_each_p_keeps(finished: FinishedRun, tmp_path: Path):
    path, figure = finished.folder / "store" / "train", tmp_path / "sparsity.svg"
    text = tdistill("check", "sparsity", path, "--plot", figure)
    outcome = tdistill("check", "sparsity", path, "--json", "--gamma", "1")
    assert (text.code, outcome.code) == (0, 0), text.err + outcome.err
    study = strict_json(outcome.out)
    assert study["path"] == str(path)
    assert [row["p"] for row in study["by_p"]][-1] == Store.open(path).p_max
    assert "bytes" in text.out
    assert figure.read_text(encoding="utf-8").lstrip().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [(["--gamma", "2"], 2, "gamma = 2"), (["--plot", "nowhere/figure.svg"], 2, "there is no folder nowhere")],
)
def test_check_sparsity_refuses_what_makes_no_sense(finished: FinishedRun, arguments: list[str], code: int, part: str):
    outcome = tdistill("check", "sparsity", finished.folder / "store" / "train", *arguments)
    assert outcome.code == code
    assert part in outcome.err


def test_check_batches_measures_how_many_answers_depend_on_the_batch(finished: FinishedRun, tmp_path: Path):
    overrides = [f"output={tmp_path}/run", "capture.max_new_tokens=6"]
    text = tdistill("check", "batches", finished.recipe, *overrides)
    outcome = tdistill("check", "batches", finished.recipe, *overrides, "--json")
    assert (text.code, outcome.code) == (0, 0)
    effect = strict_json(outcome.out)
    assert (effect["num_answers"], effect["batch_sizes"]) == (60, [1, 8, 32])
    # In float32 hardly a token hangs on the rounding of a sum.
    assert 0 <= effect["changed_share"] < 0.1
    assert text.out.splitlines() == [f"{key}: {value}" for key, value in effect.items()]
    assert not (tmp_path / "run").exists()
