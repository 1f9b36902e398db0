from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdistill.errors import DataFileError
from tdistill.reports.card import write_model_card
from tdistill.reports.load import load_run


def test_reads_every_artifact(run_folder: Path) -> None:
    artifacts = load_run(run_folder)
    assert artifacts.recipe.startswith("name: demo")
    assert artifacts.environment["python"] == "3.11.2"
    assert artifacts.metrics[0] == {
        "phase": "sft", "step": 10, "loss": 2.8, "learning_rate": 1e-4, "tokens_per_second": 900,
    }  # fmt: skip
    assert artifacts.results.subjects == ("teacher", "start", "sft", "bd", "sft_continued")
    with pytest.raises(AttributeError):
        artifacts.recipe = "x"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl", "results.json"])
def test_a_missing_file_is_named_with_the_verb_that_makes_it(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    with pytest.raises(DataFileError, match=rf"{name} is missing.*tdistill run"):
        load_run(run_folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"no run folder .*absent.*tdistill run"):
        load_run(tmp_path / "absent")


def test_a_card_without_a_student_is_refused(run_folder: Path) -> None:
    (run_folder / "student").rmdir()
    with pytest.raises(DataFileError, match=r"student is missing.*tdistill run"):
        write_model_card(run_folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("environment.json", b"[1]", "environment.json holds no JSON object"),
        ("environment.json", b'{"a": ', "environment.json is not JSON"),
        ("recipe.yaml", b"\xff\xfe\xff", "recipe.yaml cannot be read"),
        ("metrics.jsonl", b'{"phase": "sft", "step": 1}\n{"phase": "sf', "metrics.jsonl, line 2 is not JSON"),
        ("metrics.jsonl", b'{"step": 1}\n', "metrics.jsonl, line 1: no object"),
        ("results.json", b"{}", "results.json: format: Field required"),
    ],
)
def test_a_malformed_file_is_named(run_folder: Path, name: str, content: bytes, message: str) -> None:
    (run_folder / name).write_bytes(content)
    with pytest.raises(DataFileError, match=message) as caught:
        load_run(run_folder)
    assert "tdistill run" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=2), "results.json: version"),
        (lambda r: r["summary"].update(final_phase="dpo"), "final_phase 'dpo' is none of"),
        (lambda r: r["records"].append(r["records"][0]), "two records of .*kl_teacher_student.*start"),
        (lambda r: r["records"][3].update(value="high"), r"records\.3\.value"),
    ],
)
def test_defects_of_results(run_folder: Path, change, message: str) -> None:
    path = run_folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    with pytest.raises(DataFileError, match=message):
        load_run(run_folder)
