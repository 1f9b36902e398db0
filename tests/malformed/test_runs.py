"""Every kind of bad input to a run: what is said, when, with which exit code, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import filelock
import pytest
import torch
import yaml
from cli.harness import (
    Outcome,
    changed,
    contents,
    recipe_tree,
    snapshot,
    strict_json,
    tdistill,
    write_recipe,
)
from safetensors.torch import load_file, save_file
from support import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import tdistill.pipeline as stages
from tdistill.errors import NoSpaceError
from tdistill.prompts import read_records
from tdistill.store import Store, verify_store

FINISHED = ("manifest.json", "results.json", "report.html", "metrics.jsonl")


class Project(NamedTuple):
    """A recipe that works, and the folder it writes to, which does not exist yet."""

    tree: dict[str, Any]
    root: Path
    folder: Path

    def write(self, **parts: Any) -> Path:
        return write_recipe(self.root / "recipe.yaml", changed(self.tree, **parts))

    def call(self, verb: str = "run", **parts: Any) -> Outcome:
        return tdistill(verb, self.write(**parts))


@pytest.fixture
def project(tmp_path: Path, tiny_teacher_folder: Path, tiny_prompt_files: dict[str, Path]) -> Project:
    # Copies, since most tests here spoil something.
    prompts = {split: Path(shutil.copy(path, tmp_path)) for split, path in tiny_prompt_files.items()}
    teacher = Path(shutil.copytree(tiny_teacher_folder, tmp_path / "teacher"))
    tree = recipe_tree(teacher, prompts, tmp_path / "run")
    return Project(changed(tree, phases={"sft": {"args": {"max_steps": 2}}}), tmp_path, tmp_path / "run")


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the teacher is already too late."""

    def too_late(self: stages.Run) -> None:
        raise AssertionError("found only after the teacher was loaded")

    monkeypatch.setattr(stages.Run, "load_teacher", too_late)


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher may be loaded; its first answer is too late."""

    def too_late(*args: Any) -> None:
        raise AssertionError("found only after the teacher had answered")

    monkeypatch.setattr(stages.HFTeacher, "generate", too_late)
    monkeypatch.setattr(stages.HFTeacher, "score", too_late)


def refused(outcome: Outcome, code: int, *parts: object) -> None:
    """One message with these parts, nothing else."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    message = outcome.err[outcome.err.index("error: ") :]
    assert "Traceback" not in outcome.err
    for part in parts:
        assert str(part) in message, message


def nothing_left(folder: Path) -> None:
    """Nothing that could be taken for a store, a model, results or a finished run."""
    left = list(folder.rglob("*")) if folder.exists() else []
    assert not [path for path in left if path.name in FINISHED or path.suffix == ".safetensors"]
    assert not [path for path in left if path.is_dir() and path.name in ("student", "start")]


# ---- prompt files ----


@pytest.mark.parametrize("split", ["train", "dev", "held_out"])
@pytest.mark.usefixtures("no_teacher")
def test_a_missing_prompt_file_is_found_before_the_teacher_is_loaded(project: Project, split: str):
    path = project.root / "none.jsonl"
    refused(project.call(data={split: str(path)}), 3, path, "does not exist", "Check the path")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_teacher")
def test_an_unreadable_prompt_file_is_named(project: Project):
    link, folder = project.root / "link.jsonl", project.root / "folder.jsonl"
    link.symlink_to(link)
    folder.mkdir()
    refused(project.call(data={"dev": str(link)}), 3, link, "cannot be read", "Check its permissions")
    refused(project.call(data={"dev": str(folder)}), 3, folder, "is a folder", "Name a file inside it")
    nothing_left(project.folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whose permissions count")
@pytest.mark.usefixtures("no_teacher")
def test_a_prompt_file_without_permission_is_named(project: Project):
    path = Path(project.tree["data"]["dev"])
    path.chmod(0)
    refused(project.call(), 3, path, "Permission denied", "Check its permissions")


@pytest.mark.parametrize("split", ["train", "dev", "held_out"])
@pytest.mark.usefixtures("no_teacher")
def test_a_malformed_line_is_named_by_its_number(project: Project, split: str):
    path = Path(project.tree["data"][split])
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] = lines[4][:-3]
    path.write_text("\n".join(lines), encoding="utf-8")
    refused(project.call(), 3, f"{path}, line 5: not valid JSON", "one complete JSON object")
    nothing_left(project.folder)


@pytest.mark.parametrize("split", ["train", "dev", "held_out"])
@pytest.mark.usefixtures("no_teacher")
def test_an_empty_prompt_set_is_named(project: Project, split: str):
    path = Path(project.tree["data"][split])
    path.write_text("\n\n", encoding="utf-8")
    refused(project.call(), 3, path, "holds no record", "Add at least one line")
    nothing_left(project.folder)


@pytest.mark.parametrize("split", ["train", "dev", "held_out"])
@pytest.mark.usefixtures("no_answer")
def test_a_prompt_over_the_limit_is_named_with_its_file(project: Project, split: str):
    path = Path(project.tree["data"][split])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "long", "prompt": "fox " * 100, "answer": "fox"}) + "\n")
    outcome = project.call(data={"max_prompt_tokens": 40})
    refused(outcome, 3, f"{path} (data.{split})", "'long' has 105 tokens", "max_prompt_tokens = 40", "too_long = skip")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_a_set_whose_prompts_are_all_over_the_limit_is_named(project: Project):
    outcome = project.call(data={"max_prompt_tokens": 2, "too_long": "skip"})
    refused(outcome, 3, project.tree["data"]["train"], "All 60 prompts", "Raise max_prompt_tokens")
    nothing_left(project.folder)


def test_prompts_over_the_limit_are_left_out_when_asked(project: Project):
    path = Path(project.tree["data"]["dev"])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "long", "prompt": "fox " * 100, "answer": "fox"}) + "\n")
    assert project.call("capture", data={"max_prompt_tokens": 40, "too_long": "skip"}).code == 0
    jobs = Store.open(project.folder / "store" / "dev").jobs
    assert len(jobs) == 12
    assert ("long", 0) not in jobs


@pytest.mark.usefixtures("no_answer")
def test_prompts_that_leave_no_room_for_an_answer_are_named(project: Project):
    path = Path(project.tree["data"]["held_out"])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "long", "prompt": "fox " * 100, "answer": "fox"}) + "\n")
    outcome = project.call(data={"max_prompt_tokens": 120}, capture={"max_new_tokens": 30})
    refused(outcome, 3, "'long' has 105 tokens", "up to 30", project.tree["teacher"]["model"], "128", "max_new_tokens")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_prompts_that_leave_no_room_for_a_timed_answer_are_named(project: Project):
    outcome = project.call(evaluation={"speed_tokens": 125})
    refused(outcome, 3, "its answer up to 125", project.tree["teacher"]["model"], "128")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_teacher")
def test_references_to_some_held_out_prompts_only_are_found_before_anything_is_measured(project: Project):
    path = Path(project.tree["data"]["held_out"])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "bare", "prompt": "where is the old fox ?"}\n')
    refused(project.call(), 3, path, "'bare' has no reference answer", "12 others", "'output'")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_prompts_that_are_measured_and_trained_on_are_counted(project: Project):
    train, held_out = (Path(project.tree["data"][split]) for split in ("train", "held_out"))
    shared = train.read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    held_out.write_text(held_out.read_text(encoding="utf-8") + "".join(shared), encoding="utf-8")
    outcome = project.call("capture", student={"layers": 7})  # which is refused after it
    assert outcome.code == 2
    assert "3 of the 15 prompts of data.held_out are in data.train too" in outcome.err
    assert "data.dev" not in outcome.err


@pytest.mark.usefixtures("no_answer")
def test_a_prompt_without_an_answer_to_score_is_named(project: Project):
    path = Path(project.tree["data"]["dev"])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "bare", "prompt": "where is the old fox ?"}\n')
    refused(project.call(capture={"mode": "score"}), 3, f"{path} (data.dev)", "'bare' has no answer", "'output'")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_teacher")
def test_a_data_set_that_does_not_exist_is_named(project: Project):
    for name in ("package:tdistill/demo/none.jsonl", "package:nosuchpackage/x.jsonl", "some where/else.x"):
        refused(project.call(data={"dev": name}), 3, name)
    nothing_left(project.folder)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["cannot be read", ".jsonl"]),
        ("", ["is empty", '{"text": "Hello."}']),
        ('{"text": "a"}\n{"text": 3}\n', ["line 2", '{"text": "Hello."}']),
        ('{"text": "a"}\n\n{"txt": "b"}\n', ["line 3"]),
        ('{"text": "a"}\n["b"]\n', ["line 2"]),
        ('{"text": "a"', ["line 1"]),
        ('{"text": "a"}\n{"text": "b \\udc00"}', ["line 2: 'text' holds half of a surrogate pair", "whole character"]),
        ('{"text": "\xe4"}', ["cannot be read", "UTF-8"]),
    ],
)
@pytest.mark.usefixtures("no_teacher")
def test_a_malformed_plain_text_file_is_named_before_the_capture(
    project: Project, content: str | None, parts: list[str]
):
    path = project.root / "text.jsonl"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    refused(project.call(data={"text": str(path)}), 3, f"{path} (data.text)", *parts)
    nothing_left(project.folder)


# ---- models ----


def test_an_unknown_teacher_is_named(project: Project):
    for model in (str(project.root / "none"), "./none", "org/none", "package:nosuchpackage"):
        refused(project.call(teacher={"model": model}), 4, f"'{model}'")
    nothing_left(project.folder)


def test_a_teacher_folder_without_weights_is_named(project: Project):
    teacher = Path(project.tree["teacher"]["model"])
    (teacher / "model.safetensors").unlink()
    refused(project.call(), 4, teacher, "holds no *.safetensors", "save_pretrained")
    (teacher / "model.Q4.gguf").touch()
    refused(project.call(), 4, teacher, "holds no *.safetensors", "It has model.Q4.gguf", "gguf_file")
    (teacher / "adapter_config.json").touch()
    refused(project.call(), 4, teacher, "holds no *.safetensors", "adapter", "merge_and_unload")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_a_student_folder_without_safetensors_is_found_before_the_capture(project: Project):
    student = Path(shutil.copytree(project.tree["teacher"]["model"], project.root / "student_model"))
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    refused(project.call(student={"layers": None, "model": str(student)}), 4, student, "convert", "save_pretrained")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_an_unknown_student_is_found_before_the_capture(project: Project):
    for model in (str(project.root / "none"), "org/none"):
        refused(project.call(student={"layers": None, "model": model}), 4, f"'{model}'")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_a_damaged_student_is_found_before_the_capture(project: Project):
    student = Path(shutil.copytree(project.tree["teacher"]["model"], project.root / "student_model"))
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(project.call(student={"layers": None, "model": str(student)}), 4, student, "not a loadable")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_more_layers_than_the_teacher_has_are_refused_before_the_capture(project: Project):
    refused(project.call(student={"layers": 5}), 2, "student.layers = 5", "between 1 and the teacher's 4")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_settings_of_a_model_that_transformers_refuses_are_named(project: Project):
    refused(project.call(teacher={"dtype": "float31"}), 2, "float31", "float32")
    refused(project.call(teacher={"model_kwargs": {"colour": "red"}}), 2, "teacher.model_kwargs", "colour")
    attention = project.call(student={"attn_implementation": "slow"})
    refused(attention, 2, "student.attn_implementation = slow")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
@pytest.mark.parametrize(
    "change", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_on_the_output_layer_that_is_not_read_is_refused_before_the_capture(
    project: Project, change: dict[str, Any]
):
    outcome = project.call(peft={"r": 4, "target_modules": ["q_proj"], **change})
    refused(outcome, 4, "LlamaForCausalLM", "output")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_an_adapter_that_fits_no_module_is_refused_before_the_capture(project: Project):
    outcome = project.call(peft={"r": 4, "target_modules": ["no_proj"]})
    refused(outcome, 2, "peft", "no_proj", "does not fit the student")
    nothing_left(project.folder)


def with_other_tokenizer(source: Path, target: Path) -> Path:
    """The model with two words of its tokenizer exchanged: as many tokens, other ids."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["fox"], vocabulary["mouse"] = vocabulary["mouse"], vocabulary["fox"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return target


def with_rows(
    source: Path, target: Path, rows: int, fill: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Path:
    """The model with an embedding of so many rows; added ones are filled from the old ones, or zero."""
    model = AutoModelForCausalLM.from_pretrained(source)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        if rows > len(old):
            added = torch.zeros(rows - len(old), old.shape[1]) if fill is None else fill(old)[: rows - len(old)]
            model.get_input_embeddings().weight[len(old) :] = added
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@pytest.mark.usefixtures("no_answer")
def test_a_student_with_another_tokenizer_is_refused_before_the_capture(project: Project, tiny_start_folder: Path):
    student = with_other_tokenizer(tiny_start_folder, project.root / "other")
    outcome = project.call(student={"layers": None, "model": str(student)})
    refused(outcome, 5, student, "is not the expected one", "take models that share it")
    nothing_left(project.folder)


@pytest.mark.usefixtures("no_answer")
def test_a_model_with_fewer_rows_than_tokens_is_refused_before_the_capture(project: Project, tiny_start_folder: Path):
    student = with_rows(tiny_start_folder, project.root / "small", 80)
    outcome = project.call(student={"layers": None, "model": str(student)})
    refused(outcome, 5, f"The student {student} has 80 vocabulary rows", "85 tokens", "resize")
    teacher = with_rows(Path(project.tree["teacher"]["model"]), project.root / "small_teacher", 80)
    outcome = project.call(teacher={"model": str(teacher)})
    refused(outcome, 5, f"The teacher {teacher} has 80 vocabulary rows", "85 tokens", "resize")
    nothing_left(project.folder)


def test_a_start_with_another_tokenizer_than_the_stores_is_refused_at_training(project: Project):
    assert project.call("capture").code == 0
    start = project.folder / "start"
    other = with_other_tokenizer(start, project.root / "other")
    shutil.rmtree(start)
    other.rename(start)
    refused(project.call("train"), 5, project.folder / "store" / "train", "is not the expected one")
    assert not (project.folder / "phases" / "sft" / "student").exists()
    assert not (project.folder / "student").exists()


def test_a_store_with_another_tokenizer_than_the_student_is_refused_at_training(
    project: Project, tiny_start_folder: Path
):
    student = Path(shutil.copytree(tiny_start_folder, project.root / "model"))
    parts = {"student": {"layers": None, "model": str(student)}}
    assert project.call("capture", **parts).code == 0
    # The start was not made yet, and the student's folder was exchanged since the capture.
    shutil.rmtree(project.folder / "start")
    shutil.rmtree(student)
    with_other_tokenizer(tiny_start_folder, student)
    refused(project.call("train", **parts), 5, student, "is not the expected one")
    assert not (project.folder / "start").exists()


def test_padded_vocabularies_of_one_family_work_together(project: Project, tiny_start_folder: Path):
    teacher = with_rows(Path(project.tree["teacher"]["model"]), project.root / "padded_teacher", 128)
    student = with_rows(tiny_start_folder, project.root / "padded_student", 96)
    parts = {"teacher": {"model": str(teacher)}, "student": {"layers": None, "model": str(student)}}
    outcome = project.call(**parts)
    assert outcome.code == 0, outcome.err
    exported = AutoModelForCausalLM.from_pretrained(project.folder / "student")
    assert exported.get_output_embeddings().weight.shape[0] == 96
    results = strict_json((project.folder / "results.json").read_text(encoding="utf-8"))
    kl = {
        r["subject"]: r["value"] for r in results["records"] if r["metric"] == "kl_teacher_student" and not r["against"]
    }
    assert kl["teacher"] == 0
    assert kl["start"] > kl["bd"] > 0


def test_padding_is_never_in_a_set_nor_an_answer(project: Project, tiny_start_folder: Path):
    # Rows that were never trained may hold anything; here they score as high as real words.
    lively = with_rows(
        Path(project.tree["teacher"]["model"]), project.root / "lively", 128, fill=lambda old: old[20:85]
    )
    student = with_rows(tiny_start_folder, project.root / "padded_student", 96)
    parts = {"teacher": {"model": str(lively)}, "student": {"layers": None, "model": str(student)}}
    assert project.call("capture", **parts).code == 0
    for row in rows_of(Store.open(project.folder / "store" / "train")):
        assert row.response_ids.max() < 85
        assert row.sets.ids.max() < 85
    assert project.call("train", **parts).code == 0


# ---- p ----


@pytest.mark.parametrize("p", [0, -0.5, 1.01, float("nan")])
@pytest.mark.usefixtures("no_teacher")
def test_p_outside_its_range_is_refused(project: Project, p: float):
    refused(project.call(capture={"p_max": p}), 2, f"capture.p_max = {p}", "(0, 1]")
    refused(project.call(phases={"bd": {"args": {"p": p}}}), 2, f"phases.bd.args: p = {p}", "(0, 1]")
    assert not project.folder.exists()


@pytest.mark.usefixtures("no_teacher")
def test_p_above_the_recipes_p_max_is_refused(project: Project):
    refused(project.call(phases={"bd": {"args": {"p": 0.96}}}), 2, "p = 0.96", "p_max = 0.95", "Lower p or raise p_max")
    assert not project.folder.exists()


def test_p_above_the_stores_p_max_is_refused_before_any_training(project: Project):
    assert project.call("capture", capture={"p_max": 0.6}).code == 0
    # A store from elsewhere, put into the folder of a recipe that expects a larger p_max.
    (project.folder / "recipe.yaml").unlink()
    (project.folder / "store").rename(project.root / "store")
    shutil.rmtree(project.folder)
    assert project.call("train", phases={"bd": {"args": {"p": 0.9}}}).code == 7
    (project.root / "store").rename(project.folder / "store")
    outcome = project.call("train", phases={"bd": {"args": {"p": 0.9}}})
    refused(outcome, 2, "phases.bd.args.p = 0.9", "p_max = 0.6", project.folder / "store" / "train", "Lower p")
    assert not (project.folder / "phases").exists()


# ---- the teacher's logits ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_logits_that_are_not_finite_name_the_prompt(project: Project, tiny_start_folder: Path, value: float, mode: str):
    # Only a word outside the vocabulary is spoilt on input, and only one prompt has one.
    teacher = project.root / "poisoned"
    model = AutoModelForCausalLM.from_pretrained(project.tree["teacher"]["model"])
    tokenizer = AutoTokenizer.from_pretrained(project.tree["teacher"]["model"])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.unk_token_id] = value
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    with Path(project.tree["data"]["train"]).open("a", encoding="utf-8") as file:
        file.write('{"id": "bad", "prompt": "where is the unheard-of fox ?", "answer": "there ."}\n')
    parts = {"teacher": {"model": str(teacher)}, "student": {"layers": None, "model": str(tiny_start_folder)}}
    outcome = project.call(capture={"mode": mode}, **parts)
    assert outcome.code == 6, outcome.err
    error = outcome.err[outcome.err.index("error: ") :]
    assert error.startswith("error: The teacher gave NaN or infinite logits for prompt 'bad' (log-sum-exp ")
    assert "Load it in float32 or bfloat16, or leave that prompt out." in error
    assert not list(project.folder.rglob("manifest.json"))
    # The remedy works, and what was captured before is kept.
    path = Path(project.tree["data"]["train"])
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    resumed = project.call("capture", capture={"mode": mode}, **parts)
    assert resumed.code == 0
    assert "is whole and is kept" in resumed.err


@pytest.mark.usefixtures("no_answer")
def test_a_teacher_without_any_finite_logit_is_no_teacher_to_prune(project: Project):
    teacher = Path(project.tree["teacher"]["model"])
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    first = read_records(project.tree["data"]["train"])[0].prompt_id
    refused(project.call(), 6, "NaN or infinite logits", f"prompt '{first}'", "teacher.dtype")
    nothing_left(project.folder)


# ---- stores ----


@pytest.fixture
def captured(project: Project) -> Project:
    assert project.call("capture").code == 0
    return project


def shard_of(project: Project, split: str, number: int = 0) -> Path:
    return sorted((project.folder / "store" / split).glob("shard-*"))[number]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (flip, "expected SHA-256"),
    "truncated": (lambda path: os.truncate(path, 1000), "found 1,000"),
    "missing": (lambda path: path.unlink(), "found no file"),
}


@pytest.mark.parametrize(
    ("damage", "split"), [("changed", "train"), ("truncated", "train"), ("missing", "train"), ("changed", "dev")]
)
def test_a_damaged_shard_is_refused_at_training_and_the_remedy_that_is_named_works(
    captured: Project, damage: str, split: str
):
    spoil, said = DAMAGES[damage]
    whole = contents(captured.folder, "store/*/*")
    shard = shard_of(captured, split)
    spoil(shard)
    refused(captured.call("train"), 7, shard, said, "delete manifest.json and run capture again")
    assert not (captured.folder / "phases").exists()
    (shard.parent / "manifest.json").unlink()
    assert captured.call("capture").code == 0
    assert contents(captured.folder, "store/*/*") == whole
    assert captured.call("train").code == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_held_out_shard_is_refused_at_evaluation(
    captured: Project, damage: str, request: pytest.FixtureRequest
):
    request.getfixturevalue("no_teacher")  # from here on
    spoil, said = DAMAGES[damage]
    shard = shard_of(captured, "held_out")
    spoil(shard)
    refused(captured.call("eval"), 7, shard, said)
    assert not (captured.folder / "results.json").exists()


def test_a_damaged_manifest_is_refused(captured: Project):
    manifest = captured.folder / "store" / "train" / "manifest.json"
    flip(manifest)
    refused(captured.call("train"), 7, manifest)
    manifest.unlink()
    refused(captured.call("train"), 7, manifest.parent, "its capture did not finish", "Run capture again")
    assert captured.call("capture").code == 0
    assert verify_store(manifest.parent) == []


def test_a_damaged_shard_of_an_unfinished_capture_is_captured_again(captured: Project):
    whole = contents(captured.folder, "store/*/*")
    (captured.folder / "store" / "train" / "manifest.json").unlink()
    flip(shard_of(captured, "train", 1))
    outcome = captured.call("capture")
    assert outcome.code == 0
    assert "is damaged and is captured again" in outcome.err
    assert contents(captured.folder, "store/*/*") == whole


def other_weights(teacher: Path) -> None:
    """The same model in the same place, one number changed."""
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})


def test_a_store_of_another_teacher_is_refused_at_capture(captured: Project):
    before = snapshot(captured.folder)
    stored = Store.open(captured.folder / "store" / "train").identity["teacher"]["weights_sha256"]
    other_weights(Path(captured.tree["teacher"]["model"]))
    outcome = captured.call("capture")
    refused(outcome, 7, "teacher.weights_sha256", f'stored "{stored}"', "asked", "another folder")
    assert snapshot(captured.folder) == before


def test_a_store_of_another_teacher_is_refused_at_evaluation(captured: Project):
    assert captured.call("train").code == 0
    stored = Store.open(captured.folder / "store" / "held_out").identity["teacher"]["weights_sha256"]
    other_weights(Path(captured.tree["teacher"]["model"]))
    refused(captured.call("eval"), 7, captured.tree["teacher"]["model"], stored, "Point teacher.model to that teacher")
    assert not (captured.folder / "results.json").exists()


def test_a_start_is_not_made_from_another_teacher_than_the_stores(captured: Project):
    shutil.rmtree(captured.folder / "start")
    other_weights(Path(captured.tree["teacher"]["model"]))
    refused(captured.call("train"), 7, captured.tree["teacher"]["model"], "Point teacher.model to that teacher")
    assert not (captured.folder / "start").exists()


def test_a_prompt_that_changed_under_its_id_is_refused(project: Project):
    path = Path(project.tree["data"]["dev"])
    path.write_text('{"id": "a", "prompt": "where is the old fox ?"}\n', encoding="utf-8")
    assert project.call("capture").code == 0
    path.write_text('{"id": "a", "prompt": "where is the quiet mouse ?"}\n', encoding="utf-8")
    refused(project.call("capture"), 7, project.folder / "store" / "dev", "'a' has other tokens", "another id")


# ---- output folders ----


@pytest.mark.usefixtures("no_teacher")
def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(project: Project):
    project.folder.mkdir()
    (project.folder / "thesis.tex").write_text("years of work")
    refused(project.call(), 8, project.folder, "is no run of tdistill", "output=FOLDER")
    assert [path.name for path in project.folder.iterdir()] == ["thesis.tex"]
    assert (project.folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.usefixtures("no_teacher")
def test_a_recipe_that_somebody_wrote_into_the_folder_is_not_overwritten(project: Project):
    project.folder.mkdir()
    own = project.folder / "recipe.yaml"
    own.write_text("# mine\nname: mine\n")
    refused(project.call(), 8, project.folder, "name: stored 'mine', asked 'tiny'")
    assert own.read_text() == "# mine\nname: mine\n"


@pytest.mark.usefixtures("no_teacher")
def test_a_place_that_cannot_be_a_folder_is_refused(project: Project):
    file = project.root / "file"
    file.write_text("text")
    refused(project.call(output=str(file)), 8, file, "cannot be used", "output=FOLDER")
    refused(project.call(output=str(file / "below")), 8, file / "below", "cannot be used", "output=FOLDER")
    assert file.read_text() == "text"


@pytest.mark.usefixtures("no_teacher")
def test_a_folder_in_which_another_process_works_is_refused_until_that_ends(project: Project):
    project.folder.mkdir()
    hold = "lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", f"import filelock, sys; {hold}", str(project.folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for verb in ("run", "capture", "train", "eval"):
            refused(project.call(verb), 8, "Another process works in", project.folder, "Wait", "output=FOLDER")
        other.kill()
    assert [path.name for path in project.folder.iterdir()] == [".lock"]
    refused(project.call("train"), 7, "run capture first")


def test_a_stage_holds_the_folder_and_lets_it_go(project: Project, monkeypatch: pytest.MonkeyPatch):
    captured, second = stages.capture_store, []

    def tried(*args: Any, **kwargs: Any) -> Store:
        second.append(project.call("train"))
        return captured(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "capture_store", tried)
        assert project.call("capture").code == 0
    assert len(second) == 3
    for outcome in second:
        refused(outcome, 8, "Another process works in")
    assert project.call("train").code == 0


@pytest.mark.usefixtures("no_answer")
def test_a_folder_that_cannot_be_locked_is_used_nevertheless(project: Project, monkeypatch: pytest.MonkeyPatch):
    def cannot(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", cannot)
    outcome = project.call(student={"layers": 7})
    refused(outcome, 2, "student.layers = 7")
    assert f"{project.folder} cannot be locked" in outcome.err and "No locks available" in outcome.err


def test_another_run_is_refused_with_each_difference(captured: Project):
    before = snapshot(captured.folder)
    outcome = captured.call(
        name="other", capture={"max_actions": None}, phases={"bd": {"args": {"learning_rate": 1.0}}}
    )
    refused(
        outcome,
        8,
        captured.folder,
        "name: stored 'tiny', asked 'other'",
        "capture.max_actions: stored 16, asked None",
        "phases.bd.args.learning_rate: stored 0.001, asked 1.0",
    )
    assert snapshot(captured.folder) == before


@pytest.mark.parametrize("text", ["name: [", "- a\n", "", "\xff"])
def test_a_damaged_recipe_in_the_folder_is_refused(captured: Project, text: str):
    (captured.folder / "recipe.yaml").write_bytes(text.encode("latin-1"))
    refused(captured.call("train"), 8, captured.folder / "recipe.yaml", "output=FOLDER")
    assert not (captured.folder / "phases").exists()


def test_a_run_of_a_version_that_had_fewer_settings_goes_on(captured: Project):
    recipe = captured.folder / "recipe.yaml"
    before = yaml.safe_load(recipe.read_text())
    del before["data"]["template_kwargs"], before["capture"]["temperature"]
    recipe.write_text(yaml.safe_dump(before))
    refused(captured.call(capture={"temperature": 0.5}), 8, "capture.temperature: stored 1.0, asked 0.5")
    assert captured.call("train").code == 0


def test_a_recipe_that_was_refused_before_the_first_answer_can_be_corrected(project: Project):
    assert project.call("capture", data={"dev": "none.jsonl"}).code == 3
    assert project.call("capture", student={"layers": 7}).code == 2
    assert project.call("capture").code == 0
    assert strict_json((project.folder / "start" / "start.json").read_text())["kept_layers"]


# ---- room ----


def test_a_capture_for_which_there_is_no_room_is_refused_before_the_first_answer(
    project: Project, monkeypatch: pytest.MonkeyPatch, no_answer: None
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(project.call(), 9, project.folder / "store" / "train", "1,000 bytes are free", "Free some room")
    nothing_left(project.folder)


def test_a_training_for_which_there_is_no_room_is_refused_before_its_first_step(
    captured: Project, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        patched.setattr(stages.TDistillTrainer, "train", lambda *args, **kwargs: pytest.fail("trained without room"))
        outcome = captured.call("train")
    refused(outcome, NoSpaceError.exit_code, captured.folder, "0.0 GB are free", "save_total_limit")
    assert not list(captured.folder.glob("phases/*/student"))
    assert not (captured.folder / "student").exists()
    needed: list[int] = []
    check_room = stages.check_room

    def noting(folder: Path, trainer: Any, num_checkpoints: int) -> None:
        needed.append(num_checkpoints)
        check_room(folder, trainer, num_checkpoints)

    monkeypatch.setattr(stages, "check_room", noting)
    assert captured.call("train").code == 0
    assert needed == [1, 2, 2], "checkpoints of each phase: at 2 of 2 steps, and at 2 and 4 of 4"
