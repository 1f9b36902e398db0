"""A whole tiny run through the command line: what it leaves, and that it goes on after any interruption."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli.harness import changed, contents, measured, snapshot, strict_json, tdistill, write_recipe
from conftest import FinishedRun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline

import tdistill.pipeline as stages
from tdistill.config import load_recipe
from tdistill.reports.load import load_run
from tdistill.reports.records import find, format_record
from tdistill.store import Store, verify_store
from tdistill.training.callbacks import Clock, MetricsFile

SUBJECTS = {"teacher", "start", "sft", "bd", "sft_continued"}


# ---- what a finished run leaves ----


def test_a_finished_run_exits_with_0_and_leaves_every_artifact(finished: FinishedRun):
    assert finished.outcome.code == 0, finished.outcome.err
    left = {path.name for path in finished.folder.iterdir()}
    assert left == {
        ".lock",
        "recipe.yaml",
        "environment.json",
        "store",
        "start",
        "phases",
        "student",
        "metrics.jsonl",
        "results.json",
        "scores.json",
        "report.html",
        "times.json",
        "evaluation",
    }
    assert not [name for name in snapshot(finished.folder) if name.endswith(".tmp") or "partial" in name]
    assert load_recipe(finished.folder / "recipe.yaml") == load_recipe(finished.recipe)
    for split, size in (("train", 60), ("dev", 12), ("held_out", 12)):
        assert verify_store(finished.folder / "store" / split) == []
        assert len(Store.open(finished.folder / "store" / split)) == size
    assert not list(finished.folder.rglob("*.bin")) + list(finished.folder.rglob("*.pt"))


def test_the_results_are_strict_json_and_about_every_subject(finished: FinishedRun):
    strict_json((finished.folder / "results.json").read_text(encoding="utf-8"))
    results = load_run(finished.folder).results
    assert {record.subject for record in results.records} == SUBJECTS
    assert results.summary.final_phase == "bd"
    assert results.summary.num_prompts == {"train": 60, "dev": 12, "held_out": 12}
    assert results.summary.student.num_layers == 2
    assert [(phase.name, phase.init, phase.control, phase.steps) for phase in results.summary.phases] == [
        ("sft", "start", False, 4),
        ("bd", "sft", False, 4),
        ("sft_continued", "sft", True, 4),
    ]
    kl = {}
    for subject in SUBJECTS:
        record = find(results, "kl_teacher_student", subject, "held_out")
        assert record is not None and record.value is not None
        kl[subject] = record.value
    assert kl["teacher"] == 0
    # Each phase learns: four steps of training bring a student closer to the teacher.
    assert kl["start"] > kl["sft"] > kl["bd"] > 0
    pair = find(results, "kl_teacher_student", "bd", "held_out", against="sft_continued")
    assert pair is not None and pair.value == pytest.approx(kl["bd"] - kl["sft_continued"])


def test_a_comparison_of_the_run_with_itself_finds_what_its_report_says(finished: FinishedRun, tmp_path: Path):
    outcome = tdistill("compare", finished.folder, "--against", "sft_continued", "--json")
    assert outcome.code == 0, outcome.err
    found = strict_json(outcome.out)
    assert (found["num_prompts"], found["notes"]) == (12, [])
    assert {row["subject"] for row in found["rows"]} == SUBJECTS
    results = load_run(finished.folder).results
    for metric in ("kl_teacher_student", "nll_teacher_answers", "rouge_l", "rouge_l_teacher"):
        pair = find(results, metric, "bd", "held_out", against="sft_continued")
        compared = [
            r
            for r in found["records"]
            if (r["metric"], r["subject"], r["against"]) == (metric, "run:bd", "run:sft_continued")
        ]
        assert pair is not None and compared[0]["value"] == pytest.approx(pair.value, abs=1e-6)


def test_an_older_run_is_measured_again_for_its_scores(finished: FinishedRun, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "scores.json").unlink()
    refused = tdistill("compare", folder)
    assert refused.code == 3
    command = f"tdistill eval {folder}/recipe.yaml output={folder}"
    assert command in refused.err
    again = tdistill(*command.split()[1:])
    assert again.code == 0, again.err
    assert "measures again" in again.err
    assert (folder / "scores.json").read_bytes() == (finished.folder / "scores.json").read_bytes()
    assert measured(folder) == measured(finished.folder)
    assert tdistill("compare", folder).code == 0


def test_the_metrics_of_all_phases_are_strict_json(finished: FinishedRun):
    lines = [strict_json(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    for phase in ("sft", "bd", "sft_continued"):
        own = [line for line in lines if line["phase"] == phase]
        assert [line["step"] for line in own if "loss" in line] == [1, 2, 3, 4]
        # At 2 and 4, and of what is kept at the end.
        assert [line["step"] for line in own if "eval_kl_set_tail" in line] == [2, 4, 4]
        seen = [line["response_tokens"] for line in own if "loss" in line]
        assert seen == sorted(seen) and seen[0] > 0
    assert all("recovered_reward" in line for line in lines if line["phase"] == "bd" and "loss" in line)


def test_the_student_is_a_plain_model_folder_that_answers_like_the_final_phase(finished: FinishedRun):
    student, final = finished.folder / "student", finished.folder / "phases" / "bd" / "student"
    assert contents(student, "*.safetensors") == contents(final, "*.safetensors")
    model = AutoModelForCausalLM.from_pretrained(student)
    assert model.config.num_hidden_layers == 2
    assert not [name for name in model.state_dict() if "value_head" in name]
    store = Store.open(finished.folder / "store" / "held_out")
    assert sorted(model.generation_config.eos_token_id) == sorted(store.end_token_ids)
    assert len(store.end_token_ids) == 2
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.chat_template
    answer = pipeline("text-generation", model=str(student))(
        [{"role": "user", "content": "where is the old fox ?"}], max_new_tokens=8, do_sample=False
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert answer[0]["generated_text"][-1]["content"].split()[0] in tokenizer.get_vocab()


def test_the_report_and_the_card_tell_what_was_measured(finished: FinishedRun):
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    card = (finished.folder / "student" / "README.md").read_text(encoding="utf-8")
    kl = find(load_run(finished.folder).results, "kl_teacher_student", "bd", "held_out")
    for text in (page, card, finished.outcome.out):
        assert "sft_continued" in text
        assert format_record(kl) in text
    assert str(finished.folder / "report.html") in finished.outcome.out


# ---- again, and otherwise ----


def test_a_second_run_says_that_it_reuses_and_changes_no_file(finished: FinishedRun, monkeypatch: pytest.MonkeyPatch):
    def no_work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr(stages.HFTeacher, "from_pretrained", no_work)
    monkeypatch.setattr(stages, "load_causal_lm", no_work)
    before = snapshot(finished.folder)
    outcome = tdistill("run", finished.recipe)
    assert outcome.code == 0
    assert f"reuses the run in {finished.folder}" in outcome.err
    assert outcome.out == finished.outcome.out
    assert snapshot(finished.folder) == before


@pytest.mark.parametrize("verb", ["run", "capture", "train", "eval"])
def test_another_recipe_in_the_same_folder_is_refused_and_harms_nothing(finished: FinishedRun, verb: str):
    before = snapshot(finished.folder)
    outcome = tdistill(verb, finished.recipe, "capture.seed=5", "phases.bd.args.learning_rate=0.5")
    assert outcome.code == 8
    assert "capture.seed: stored 0, asked 5" in outcome.err
    assert "phases.bd.args.learning_rate: stored 0.001, asked 0.5" in outcome.err
    assert "output=FOLDER" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 4
    assert snapshot(finished.folder) == before


def test_a_run_is_one_process_and_trains_on_one_device(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        outcome = tdistill("run", finished.recipe, f"output={folder}")
    assert outcome.code == 2 and "one of 2 (WORLD_SIZE)" in outcome.err and not folder.exists()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        outcome = tdistill("run", finished.recipe, f"output={folder}")
    assert outcome.code == 2 and "2 GPUs are visible" in outcome.err and not (folder / "store").exists()


def test_the_seconds_of_a_phase_are_those_of_all_its_processes(tmp_path: Path):
    (tmp_path / "checkpoint-4").mkdir()
    first = Clock(None)
    first.started -= 5.0
    first.on_save(SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=4), None)
    assert 5.0 <= Clock(tmp_path / "checkpoint-4").seconds() < 6.0


def test_a_run_that_was_moved_is_still_the_same_run(finished: FinishedRun, tmp_path: Path):
    shutil.copytree(finished.folder, tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    outcome = tdistill("run", finished.recipe, f"output={tmp_path}/elsewhere")
    assert outcome.code == 0
    assert "reuses" in outcome.err
    assert snapshot(tmp_path / "elsewhere") == before


# ---- interruptions ----


class Killed(BaseException):
    """Stands for anything that ends the process; no `except Exception` holds it up."""


def fails_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until its count-th call: that one ends the process."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return function(*args, **kwargs)

    return wrapped


def fails_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose count-th call still does its work and then ends the process."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == count:
            raise Killed
        return result

    return wrapped


# Where, which of the pipeline's parts ends the process, and what the second start must say.
INTERRUPTIONS = {
    "before the first answer": (stages.HFTeacher, "generate", fails_at, 1, "loads the teacher"),
    "in the middle of the capture": (stages.HFTeacher, "generate", fails_at, 3, "is whole and is kept"),
    "between two splits": (stages, "capture_store", fails_at, 2, "reused"),
    "before the start is made": (stages, "prune_layers", fails_at, 2, "keeps layers"),
    "after the capture": (stages.Run, "capture", fails_after, 1, "trains phase sft"),
    "in a phase before its first checkpoint": (MetricsFile, "on_log", fails_at, 1, "trains phase sft"),
    "in a phase after a checkpoint": (
        MetricsFile,
        "on_log",
        fails_at,
        4,
        "trains phase sft on from checkpoint-2",
    ),
    "between training and export": (stages, "export_student", fails_at, 2, "trains phase sft on from checkpoint-4"),
    "after a phase": (stages.Run, "_train_phase", fails_at, 2, "reuses phase sft"),
    "in the second phase": (MetricsFile, "on_log", fails_at, 13, "trains phase bd on from checkpoint-2"),
    "before the student is published": (stages, "_publish_copy", fails_at, 1, "reuses phase sft_continued"),
    "before the evaluation": (stages.Run, "evaluate", fails_at, 1, "reuses phase sft_continued"),
    "in the evaluation": (stages, "evaluate", fails_after, 1, "reuses phase sft_continued"),
    "before the report": (stages, "write_report", fails_at, 1, "reuses the results"),
}
FAST = {"in the middle of the capture", "in a phase after a checkpoint", "in the second phase", "before the report"}


@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in INTERRUPTIONS]
)
def test_a_run_interrupted_anywhere_ends_like_one_that_was_not(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    owner, name, how, count, said = INTERRUPTIONS[where]
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, how(count, getattr(owner, name)))
        with pytest.raises(Killed):
            tdistill("run", finished.recipe, f"output={folder}")
    assert not (folder / "report.html").exists()
    outcome = tdistill("run", finished.recipe, f"output={folder}")
    assert outcome.code == 0, outcome.err
    assert f"resumes the run in {folder}" in outcome.err
    assert said in outcome.err
    assert measured(folder) == measured(finished.folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.folder.iterdir()}


def test_a_checkpoint_that_was_cut_short_is_passed_over(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    for name in ("report.html", "results.json", "metrics.jsonl", "times.json"):
        (folder / name).unlink()
    for name in ("student", "phases/bd", "phases/sft_continued"):
        shutil.rmtree(folder / name)
    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "on_log", fails_at(4, MetricsFile.on_log))
        with pytest.raises(Killed):
            tdistill("run", finished.recipe, f"output={folder}")
    checkpoints = folder / "phases" / "bd" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    # A process killed while it wrote the next one: weights half there, and not yet any state.
    weights = (checkpoints / "checkpoint-2" / "model.safetensors").read_bytes()
    (checkpoints / "checkpoint-3").mkdir()
    (checkpoints / "checkpoint-3" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    outcome = tdistill("run", finished.recipe, f"output={folder}")
    assert outcome.code == 0, outcome.err
    assert "trains phase bd on from checkpoint-2" in outcome.err
    assert measured(folder) == measured(finished.folder)


@pytest.mark.parametrize(
    ("count", "best"),
    [
        pytest.param(4, True, id="after a checkpoint, best kept"),
        pytest.param(4, False, id="after a checkpoint", marks=pytest.mark.slow),
        pytest.param(7, True, id="after the training, best kept", marks=pytest.mark.slow),
        pytest.param(7, False, id="after the training"),
    ],
)
def test_an_interrupted_phase_with_an_adapter_ends_like_one_that_was_not(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, best: bool
):
    args = {"load_best_model_at_end": best, "learning_rate": 0.05}
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    phases = {"sft_continued": None, "sft": None, "bd": {"args": args}}
    tree = changed(finished.tree, peft=adapter, phases=phases)
    tree["phases"] = {"bd": tree["phases"]["bd"]}
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    for name in ("whole", "cut"):
        assert tdistill("capture", recipe, f"output={tmp_path / name}").code == 0
    assert tdistill("train", recipe, f"output={tmp_path / 'whole'}").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "on_log", fails_at(count, MetricsFile.on_log))
        with pytest.raises(Killed):
            tdistill("train", recipe, f"output={tmp_path / 'cut'}")
    # The folder was moved in between, so the path to the best checkpoint no longer holds.
    (tmp_path / "cut").rename(tmp_path / "moved")
    outcome = tdistill("train", recipe, f"output={tmp_path / 'moved'}")
    assert "trains phase bd on from checkpoint-" in outcome.err
    assert contents(tmp_path / "moved", "**/*.safetensors") == contents(tmp_path / "whole", "**/*.safetensors")


def test_a_phase_that_is_stopped_from_outside_is_not_taken_for_a_finished_one(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As transformers does on a signal with ``enable_jit_checkpoint``: it saves, stops, and returns."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 3

    class Stopped(stages.TDistillTrainer):
        def __init__(self, *args: Any, callbacks: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, Stop()], **kwargs)

    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    for name in ("phases/bd", "student"):
        shutil.rmtree(folder / name)
    with monkeypatch.context() as patched:
        patched.setattr(stages, "TDistillTrainer", Stopped)
        outcome = tdistill("train", finished.recipe, f"output={folder}")
    assert outcome.code == 1 and "Phase bd stopped at step 3 of 4" in outcome.err
    assert not (folder / "phases/bd/student").exists()
    outcome = tdistill("train", finished.recipe, f"output={folder}")
    assert outcome.code == 0 and "trains phase bd on from checkpoint-3" in outcome.err
    weights = "phases/bd/student/model.safetensors"
    assert (folder / weights).read_bytes() == (finished.folder / weights).read_bytes()


def test_logs_of_tensorboard_outlive_the_checkpoints(finished: FinishedRun, tmp_path: Path, monkeypatch):
    class Logging(stages.TDistillTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            (Path(self.args.output_dir) / "runs").mkdir(parents=True)
            (Path(self.args.output_dir) / "runs" / "events").write_text(self.args.run_name)
            return super().train(*args, **kwargs)

    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    for name in ("phases/bd", "student"):
        shutil.rmtree(folder / name)
    monkeypatch.setattr(stages, "TDistillTrainer", Logging)
    closed: list[bool] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object(), finish=lambda: closed.append(True)))
    assert tdistill("train", finished.recipe, f"output={folder}").code == 0
    assert (folder / "phases/bd/runs/events").read_text() == "tiny-bd" and closed == [True]


def test_an_interrupt_from_the_keyboard_says_how_to_go_on(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.HFTeacher, "generate", interrupted)
    outcome = tdistill("capture", finished.recipe, f"output={tmp_path}/run")
    assert outcome.code == 130
    assert "the same command goes on from here" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_kill_while_the_folder_is_claimed_leaves_a_folder_that_can_be_claimed(finished: FinishedRun, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".recipe.yaml.123.tmp").write_text("name: ti")
    outcome = tdistill("train", finished.recipe, f"output={folder}")
    assert "expected a store" in outcome.err  # claimed, and only the stores are missing
    (folder / "environment.json").unlink()
    tdistill("train", finished.recipe, f"output={folder}")
    assert strict_json((folder / "environment.json").read_text())["torch"] == torch.__version__


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    for name in ("report.html", "results.json", "metrics.jsonl", "times.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "student")
    with monkeypatch.context() as patched:
        patched.setattr(stages.shutil, "copytree", full)
        outcome = tdistill("train", finished.recipe, f"output={folder}")
    assert outcome.code == 9
    assert "disk is full" in outcome.err.splitlines()[-1]
    assert not (folder / "student").exists()
    assert tdistill("train", finished.recipe, f"output={folder}").code == 0
    assert contents(folder, "student/*.safetensors") == contents(finished.folder, "student/*.safetensors")


# ---- stages one by one ----


def test_the_stages_one_by_one_give_what_run_gives(finished: FinishedRun, tmp_path: Path):
    # The teacher is moved away for the training: only capture and evaluation need it.
    teacher = tmp_path / "teacher"
    shutil.copytree(finished.tree["teacher"]["model"], teacher)
    tree = changed(finished.tree, output=str(tmp_path / "run"), teacher={"model": str(teacher)})
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    assert tdistill("capture", recipe).code == 0
    teacher.rename(tmp_path / "away")
    assert tdistill("train", recipe).code == 0
    refused = tdistill("eval", recipe)
    assert refused.code == 4
    assert str(teacher) in refused.err
    (tmp_path / "away").rename(teacher)
    evaluated = tdistill("eval", recipe)
    assert evaluated.code == 0, evaluated.err
    assert "bd (final)" in evaluated.out
    reported = tdistill("report", tmp_path / "run")
    assert (reported.code, reported.out.strip()) == (0, str(tmp_path / "run" / "report.html"))
    here, there = measured(tmp_path / "run"), measured(finished.folder)
    for key in ("metrics", "weights", "stores"):
        assert here[key] == there[key]
    assert here["results"]["records"] == there["results"]["records"]


def test_stages_in_the_wrong_order_say_what_comes_first(finished: FinishedRun, tmp_path: Path):
    folder = tmp_path / "run"
    for verb in ("train", "eval"):
        outcome = tdistill(verb, finished.recipe, f"output={folder}")
        assert outcome.code == 7
        assert "run capture first" in outcome.err
    assert tdistill("capture", finished.recipe, f"output={folder}").code == 0
    outcome = tdistill("eval", finished.recipe, f"output={folder}")
    assert outcome.code == 4
    assert "sft is not trained yet. Run `tdistill train` first." in outcome.err
    assert "loads the teacher" not in outcome.err
    outcome = tdistill("report", folder)
    assert outcome.code == 3
    assert f"{folder}/metrics.jsonl is missing. `tdistill run RECIPE` makes it" in outcome.err


def test_capture_again_adds_the_prompts_that_were_added(finished: FinishedRun, tmp_path: Path):
    folder, train = tmp_path / "run", tmp_path / "train.jsonl"
    lines = Path(finished.tree["data"]["train"]).read_text(encoding="utf-8").splitlines(keepends=True)
    train.write_text("".join(lines[:20]), encoding="utf-8")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", changed(finished.tree, output=str(folder), data={"train": str(train)})
    )
    assert tdistill("capture", recipe).code == 0
    before, start = contents(folder, "store/train/shard-*"), contents(folder, "start/*")
    held = Store.open(folder / "store" / "train").jobs

    again = tdistill("capture", recipe)
    assert again.err.count("reused") == 3
    train.write_text("".join(lines[:30]), encoding="utf-8")
    grown = tdistill("capture", recipe)
    assert grown.code == 0
    store = Store.open(folder / "store" / "train")
    assert (len(held), len(store)) == (20, 30)
    assert before.items() <= contents(folder, "store/train/shard-*").items()
    assert contents(folder, "start/*") == start
    assert store.jobs[:20] == held
    # The added answers are those of a store captured at once, except for rounding in batches of other shape.
    whole = Store.open(finished.folder / "store" / "train")
    assert {prompt for prompt, _ in store.jobs} <= {prompt for prompt, _ in whole.jobs}

    assert tdistill("train", recipe).code == 0
    train.write_text("".join(lines[:32]), encoding="utf-8")
    late = tdistill("capture", recipe)
    assert "store of train has grown from 30 to 32 answers" in late.err
    assert f"Delete {folder}/phases" in late.err


# ---- other kinds of run ----


def run_changed(finished: FinishedRun, tmp_path: Path, verb: str = "run", **parts: Any) -> Path:
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(finished.tree, output=str(folder), **parts))
    outcome = tdistill("capture", recipe) if verb == "train" else None
    assert outcome is None or outcome.code == 0
    outcome = tdistill(verb, recipe)
    assert outcome.code == 0, outcome.err
    return folder


def test_an_adapter_changes_its_modules_only_and_is_merged(finished: FinishedRun, tmp_path: Path):
    folder = run_changed(
        finished, tmp_path, "train", peft={"r": 4, "target_modules": ["q_proj", "v_proj"]}, student={"layers": 2}
    )
    start = load_file(folder / "start" / "model.safetensors")
    for phase in ("sft", "bd", "sft_continued"):
        trained = load_file(folder / "phases" / phase / "student" / "model.safetensors")
        assert trained.keys() == start.keys()
        differing = {name for name in start if not torch.equal(start[name], trained[name])}
        assert differing == {name for name in start if "q_proj" in name or "v_proj" in name}
    assert not list(folder.rglob("adapter_*"))


def test_a_student_folder_is_the_start(finished: FinishedRun, tmp_path: Path, tiny_start_folder: Path):
    folder = run_changed(finished, tmp_path, student={"layers": None, "model": str(tiny_start_folder)})
    given = load_file(tiny_start_folder / "model.safetensors")
    start = load_file(folder / "start" / "model.safetensors")
    assert given.keys() == start.keys()
    assert all(torch.equal(given[name], start[name]) for name in given)
    student = load_run(folder).results.summary.student
    assert (student.name, student.kept_layers) == (str(tiny_start_folder), None)


def test_a_student_with_another_template_is_published_with_that_of_its_prompts(
    finished: FinishedRun, tmp_path: Path, tiny_start_folder: Path
):
    other = tmp_path / "other"
    shutil.copytree(tiny_start_folder, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(other)
    folder = run_changed(finished, tmp_path, student={"layers": None, "model": str(other)})
    teachers = AutoTokenizer.from_pretrained(finished.tree["teacher"]["model"])
    assert AutoTokenizer.from_pretrained(folder / "student").chat_template == teachers.chat_template
    (tmp_path / "raw").mkdir()
    raw = run_changed(finished, tmp_path / "raw", data={"template": "none"})
    messages = [{"role": "user", "content": "the fox"}]
    shown = AutoTokenizer.from_pretrained(raw / "student").apply_chat_template(messages, tokenize=False)
    assert shown.endswith("the fox") and "user" not in shown


def test_given_answers_are_scored(finished: FinishedRun, tmp_path: Path):
    folder = run_changed(finished, tmp_path, capture={"mode": "score", "max_new_tokens": 16})
    store = Store.open(folder / "store" / "held_out")
    lines = Path(finished.tree["data"]["held_out"]).read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(finished.tree["teacher"]["model"])
    for index, line in enumerate(lines):
        row, answer = store[index], tokenizer(strict_json(line)["answer"], add_special_tokens=False)["input_ids"]
        assert row.source == "given"
        assert row.response_ids[: len(answer)].tolist() == answer[:16]
        assert row.ends == ("terminal" if len(answer) < 16 else "truncated")
    # Losses are along what somebody wrote, and say so; answers are compared with those that the teacher is asked for.
    results = load_run(folder).results
    loss, likeness, teachers = (
        find(results, metric, subject, "held_out")
        for metric, subject in (("nll_teacher_answers", "bd"), ("rouge_l_teacher", "bd"), ("rouge_l", "teacher"))
    )
    assert loss is not None and "given" in loss.note
    assert likeness is not None and likeness.note.startswith("To its answers with seed")
    assert teachers is not None and teachers.seeds and teachers.value < 1


def test_p_1_runs_without_action_sets(finished: FinishedRun, tmp_path: Path):
    whole = {"objective": {"name": "iq_learn", "first_order": "sampled"}, "off_support": "none"}
    folder = run_changed(finished, tmp_path, capture={"p_max": 1.0}, phases={"bd": {"args": whole}})
    store = Store.open(folder / "store" / "train")
    assert store.p_max == 1
    assert all(len(store[index].sets.ids) == 0 for index in range(len(store)))
    metrics = load_run(folder).metrics
    for phase in ("sft", "bd"):
        nll = [line["eval_nll"] for line in metrics if line["phase"] == phase and "eval_nll" in line]
        assert len(nll) == 3
        assert nll[1] < nll[0]
    assert not [line for line in metrics if "eval_kl_set_tail" in line]
    objective = strict_json((folder / "results.json").read_text())["summary"]["objective"]
    assert (objective["name"], objective["first_order"], objective["off_support"]) == ("iq_learn", "sampled", "none")


@pytest.mark.parametrize("source", ["file", "package"])
def test_plain_text_adds_a_language_modelling_term(finished: FinishedRun, tmp_path: Path, source: str):
    address = "package:tdistill/demo/plain_text.jsonl"
    if source == "file":
        text = tmp_path / "text.jsonl"
        text.write_text('{"text": "the old fox is in the cold river ."}\n\n{"text": "mouse"}\n', encoding="utf-8")
        address = str(text)
    phases = {"bd": {"args": {"text_sequences_per_batch": 2}}}
    folder = run_changed(finished, tmp_path, "train", data={"text": address}, phases=phases)
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["text_nll"] for line in lines if line["phase"] == "bd" and "loss" in line]
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    with_text = load_file(folder / "phases" / "bd" / "student" / "model.safetensors")
    without = load_file(finished.folder / "phases" / "bd" / "student" / "model.safetensors")
    assert any(not torch.equal(with_text[name], without[name]) for name in without)


def test_a_phase_with_rollouts_asks_the_teacher_about_the_students_answers(finished: FinishedRun, tmp_path: Path):
    phases = {"bd": {"rollouts": {"every": 2, "prompts_per_round": 6, "share": 1.0, "replay": 0.0}}}
    folder = run_changed(finished, tmp_path, "train", phases=phases)
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["student_share"] for line in lines if line["phase"] == "bd" and "loss" in line] == [1.0] * 4
    own = load_file(folder / "phases" / "bd" / "student" / "model.safetensors")
    without = load_file(finished.folder / "phases" / "bd" / "student" / "model.safetensors")
    assert any(not torch.equal(own[name], without[name]) for name in without)
    assert load_recipe(folder / "recipe.yaml").phases["bd"].rollouts.prompts_per_round == 6


def test_a_phase_with_a_teacher_in_memory(finished: FinishedRun, tmp_path: Path):
    """MiniLLM has all of it: whole distributions, own answers, the teacher mixed into them and their probabilities."""
    rollouts = {"every": 2, "prompts_per_round": 6, "share": 1.0, "replay": 0.0, "teacher_mix": 0.2}
    objective = {"name": "minillm", "source": "teacher"}
    phases = {"bd": {"rollouts": rollouts, "args": {"objective": objective}}}
    folder = run_changed(finished, tmp_path, "train", phases=phases)
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "bd" and "reverse_kl_student" in line]
    assert len(steps) == 4 and all(line["reverse_kl_student"] > 0 for line in steps)
    # Of the answers to 0.8 of the student's own policy no token can be more than 1.25 times as likely under it.
    assert 0.5 < steps[0]["importance_weight"] <= 1.2501
    assert not any("off_support" in name for line in steps for name in line)


def test_an_infinite_alpha_is_kept_and_written_as_strict_json(finished: FinishedRun, tmp_path: Path):
    folder = run_changed(
        finished, tmp_path, phases={"bd": {"args": {"objective": {"name": "iq_learn", "alpha": float("inf")}}}}
    )
    assert strict_json((folder / "results.json").read_text())["summary"]["objective"]["alpha"] == "inf"
    assert load_recipe(folder / "recipe.yaml").phases["bd"].args["objective"]["alpha"] == float("inf")
    assert tdistill("run", tmp_path / "recipe.yaml").code == 0  # the same recipe, as far as it can tell
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phi_penalty"] for line in lines if "phi_penalty" in line] == [0, 0, 0, 0]


def test_every_turn_of_a_conversation_has_its_own_reference(finished: FinishedRun, tmp_path: Path):
    held_out = tmp_path / "held_out.jsonl"
    turns = ["where is the old fox ?", "it is in the river .", "what does the grey mouse eat ?", "it eats seeds ."]
    messages = ", ".join(
        f'{{"role": "{role}", "content": "{text}"}}'
        for role, text in zip(["user", "assistant"] * 2, turns, strict=True)
    )
    held_out.write_text(f'{{"id": "talk", "messages": [{messages}]}}\n', encoding="utf-8")
    folder = run_changed(finished, tmp_path, data={"held_out": str(held_out), "turns": "all"})
    assert Store.open(folder / "store" / "held_out").jobs == [("talk#turn-0", 0), ("talk#turn-1", 0)]
    record = find(load_run(folder).results, "rouge_l", "teacher", "held_out")
    assert record is not None and record.num_items == 2


def test_prompts_without_references_are_measured_against_the_teacher_alone(finished: FinishedRun, tmp_path: Path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "where is the old fox ?"}\n{"prompt": "where is the quiet mouse ?"}\n')
    folder = run_changed(finished, tmp_path, data={"held_out": str(held_out)})
    metrics = {record.metric for record in load_run(folder).results.records}
    assert "rouge_l_teacher" in metrics
    assert "rouge_l" not in metrics
