"""What may change in the recipe of a run that has begun, and another run on its answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.harness import changed, contents, measured, snapshot, tdistill, write_recipe
from conftest import FinishedRun

import tdistill.evaluation.evaluate as evaluation
import tdistill.pipeline as stages
from tdistill.config import load_recipe
from tdistill.errors import JudgeError
from tdistill.store import Store


def no_work(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("this was done before")


@pytest.fixture
def copied(finished: FinishedRun, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    return folder


# ---- the evaluation ----


def test_another_evaluation_measures_again_and_trains_nothing(
    finished: FinishedRun, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "TDistillTrainer", no_work)
    words = (finished.recipe, f"output={copied}", "evaluation.exposure={}")
    weights = contents(copied, "**/*.safetensors")
    outcome = tdistill("run", *words)
    assert outcome.code == 0, outcome.err
    assert "evaluation.exposure: stored None, asked" in outcome.err
    assert "measures again: the recipe has changed" in outcome.err
    results = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    assert {record["metric"] for record in results["records"]} >= {"excess_accumulated_error", "rouge_l"}
    assert "Excess accumulated error" in (copied / "report.html").read_text(encoding="utf-8")
    assert contents(copied, "**/*.safetensors") == weights
    before = snapshot(copied)
    assert tdistill("run", *words).code == 0
    assert snapshot(copied) == before


def test_an_evaluation_goes_on_from_the_answers_that_were_sampled(
    finished: FinishedRun, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("results.json", "scores.json", "report.html"):
        (copied / name).unlink()
    shutil.rmtree(copied / "evaluation")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "check_optional", lambda *_: None)
        patched.setattr(evaluation, "judge_records", lambda *_: (_ for _ in ()).throw(JudgeError("no key")))
        judge = "evaluation.judge={base_url: 'http://localhost:1', model: m}"
        outcome = tdistill("eval", finished.recipe, f"output={copied}", judge)
    assert outcome.code == 10 and not (copied / "results.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("tdistill.evaluation.answers.sample_answers", no_work)
        outcome = tdistill("run", finished.recipe, f"output={copied}")
    assert outcome.code == 0, outcome.err
    assert measured(copied)["results"]["records"] == measured(finished.folder)["results"]["records"]


def test_answers_of_other_weights_or_settings_are_not_taken(
    finished: FinishedRun, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tdistill.evaluation.answers.sample_answers", no_work)
    with pytest.raises(AssertionError, match="done before"):
        tdistill("eval", finished.recipe, f"output={copied}", "evaluation.top_p=0.7")
    shutil.copy(copied / "start/model.safetensors", copied / "phases/bd/student/model.safetensors")
    (copied / "results.json").unlink()
    with pytest.raises(AssertionError, match="done before"):
        tdistill("eval", finished.recipe, f"output={copied}")


# ---- phases ----


def test_a_phase_is_added_and_the_others_stay(finished: FinishedRun, copied: Path):
    before = contents(copied, "phases/*/student/*.safetensors")
    tree = changed(finished.tree, output=str(copied), phases={"more": finished.tree["phases"]["bd"]})
    outcome = tdistill("run", write_recipe(copied.parent / "recipe.yaml", tree))
    assert outcome.code == 0, outcome.err
    assert "more (final)" in outcome.out and outcome.err.count("reuses phase") == 3
    after = contents(copied, "phases/*/student/*.safetensors")
    assert before.items() < after.items()
    final = (copied / "student" / "model.safetensors").read_bytes()
    assert final == after["phases/more/student/model.safetensors"] != before["phases/bd/student/model.safetensors"]


def test_a_trained_phase_is_trained_otherwise_when_its_folder_is_deleted(finished: FinishedRun, copied: Path):
    change = "phases.bd.args.learning_rate=0.002"
    before = snapshot(copied)
    refused = tdistill("run", finished.recipe, f"output={copied}", change)
    assert refused.code == 8 and snapshot(copied) == before
    assert f"train again after deleting {copied}/phases/bd." in refused.err
    shutil.rmtree(copied / "phases" / "bd")
    outcome = tdistill("run", finished.recipe, f"output={copied}", change)
    assert outcome.code == 0, outcome.err
    weights = (copied / "student" / "model.safetensors").read_bytes()
    assert weights != (finished.folder / "student" / "model.safetensors").read_bytes()


def test_a_phase_that_starts_from_a_changed_one_is_trained_otherwise_too(finished: FinishedRun, copied: Path):
    shutil.rmtree(copied / "phases" / "sft")
    refused = tdistill("train", finished.recipe, f"output={copied}", "phases.sft.args.learning_rate=0.002")
    assert refused.code == 8
    assert f"deleting {copied}/phases/bd, {copied}/phases/sft_continued." in refused.err


# ---- the machine ----


def test_what_a_machine_has_room_for_may_change(finished: FinishedRun, copied: Path, monkeypatch: pytest.MonkeyPatch):
    """After an out-of-memory error the cure must not cost what is there."""
    monkeypatch.setattr(stages, "TDistillTrainer", no_work)
    monkeypatch.setattr(stages, "capture_store", no_work)
    change = ("capture.batch_size=4", "capture.shard_prompts=8", "phases.bd.args.gradient_checkpointing=true")
    outcome = tdistill("run", finished.recipe, f"output={copied}", *change, "phases.sft.args.dataloader_num_workers=1")
    assert outcome.code == 0, outcome.err
    assert "capture.batch_size: stored 16, asked 4" in outcome.err
    refused = tdistill("run", finished.recipe, f"output={copied}", *change, "capture.seed=5")
    assert refused.code == 8 and "capture.seed: stored 0, asked 5" in refused.err


def test_a_run_asks_about_prompts_that_were_added(finished: FinishedRun, copied: Path, tmp_path: Path):
    train = tmp_path / "train.jsonl"
    added = {"prompt_id": "added", "prompt": "what does the fox do", "answer": "the fox runs"}
    lines = Path(finished.tree["data"]["train"]).read_text(encoding="utf-8")
    train.write_text(lines + json.dumps(added) + "\n", encoding="utf-8")
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["train"] = str(train)
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    tree = changed(finished.tree, output=str(copied), data={"train": str(train)})
    before = len(Store.open(copied / "store" / "train"))
    outcome = tdistill("run", write_recipe(tmp_path / "recipe.yaml", tree))
    assert outcome.code == 0, outcome.err
    assert f"store of train has grown from {before} to {before + 1} answers" in outcome.err


def test_flash_attention_trains_and_another_one_measures(finished: FinishedRun, copied: Path, monkeypatch):
    """It takes no float32, in which students are measured."""
    asked: list[str] = []
    original = stages.load_causal_lm

    def load(folder: Path, *, attn_implementation: str, **settings: Any) -> Any:
        asked.append(attn_implementation)
        return original(folder, attn_implementation="eager", **settings)

    monkeypatch.setattr(stages, "load_causal_lm", load)
    recipe = load_recipe(finished.recipe, [f"output={copied}"])
    recipe = recipe.model_copy(
        update={"student": recipe.student.model_copy(update={"attn_implementation": "flash_attention_2"})}
    )
    run = stages.Run(load_recipe(finished.recipe, [f"output={copied}"]))
    run.recipe = recipe
    for name in ("phases/bd", "student"):
        shutil.rmtree(copied / name)
    run.train()
    assert asked == ["flash_attention_2"]
    (copied / "results.json").unlink()
    run.evaluate()
    assert asked[1:] == ["sdpa"] * 4


# ---- another run's answers ----


def test_a_run_reads_the_answers_of_another(finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages.HFTeacher, "generate", no_work)
    folder, before = tmp_path / "run", snapshot(finished.folder)
    words = (f"output={folder}", f"capture.from_run={finished.folder}", "phases.bd.args.seed=7")
    outcome = tdistill("run", finished.recipe, *words)
    assert outcome.code == 0, outcome.err
    assert contents(folder, "start/*.safetensors") == contents(finished.folder, "start/*.safetensors")
    assert contents(folder, "student/*.safetensors") != contents(finished.folder, "student/*.safetensors")
    assert "capture" not in json.loads((folder / "times.json").read_text(encoding="utf-8"))
    assert snapshot(finished.folder) == before
    again = tdistill("run", finished.recipe, *words)
    assert again.code == 0 and f"reuses the run in {folder}" in again.err
    (folder / "store").unlink()
    (folder / "store").symlink_to(tmp_path / "gone")
    lost = tdistill("train", finished.recipe, *words)
    assert lost.code == 8 and f"leads to {tmp_path}/gone" in lost.err


def test_a_run_refuses_answers_that_it_would_not_ask_for(finished: FinishedRun, tmp_path: Path):
    folder, source = tmp_path / "run", f"capture.from_run={finished.folder}"
    before = snapshot(finished.folder)
    nothing = tdistill("capture", finished.recipe, f"output={folder}", f"capture.from_run={tmp_path}/none")
    assert nothing.code == 8 and "none (capture.from_run) has no finished store of train" in nothing.err
    more = tdistill("capture", finished.recipe, f"output={folder}", source, "capture.answers_per_prompt=2")
    assert more.code == 8 and "lacks answers to 60 prompts" in more.err
    other = tdistill("capture", finished.recipe, f"output={folder}", source, "capture.p_max=0.9")
    assert other.code == 7 and "p_max" in other.err
    # Refused before anything was made, so the recipe may be corrected; by itself it would write into the other's store.
    assert not (folder / "start").exists()
    alone = tdistill("capture", finished.recipe, f"output={folder}")
    assert alone.code == 8 and f"{folder}/store is a link" in alone.err
    assert tdistill("capture", finished.recipe, f"output={folder}", source).code == 0
    assert snapshot(finished.folder) == before


@pytest.mark.parametrize(("verb", "done"), [("run", True), ("capture", True), ("capture", False)])
def test_prompts_that_were_taken_away_are_named(finished: FinishedRun, tmp_path: Path, verb: str, done: bool):
    train = tmp_path / "train.jsonl"
    lines = Path(finished.tree["data"]["train"]).read_text(encoding="utf-8").splitlines(keepends=True)
    train.write_text("".join(lines), encoding="utf-8")
    words = (finished.recipe, f"output={tmp_path}/other", f"data.train={train}")
    assert tdistill("capture", *words).code == 0
    if not done:  # killed between the last shard and the manifest
        (tmp_path / "other/store/train/manifest.json").unlink()
    before = snapshot(tmp_path / "other")
    train.write_text("".join(lines[1:]), encoding="utf-8")
    outcome = tdistill(verb, *words)
    assert outcome.code == 3
    assert f"{train} (data.train) has changed: 1 prompts" in outcome.err and "output=FOLDER" in outcome.err
    assert snapshot(tmp_path / "other") == before
