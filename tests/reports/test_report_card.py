from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tdistill.reports.card import model_card, write_model_card
from tdistill.reports.findings import verdict
from tdistill.reports.load import load_run
from tdistill.reports.tables import markdown_table


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter(run_folder: Path) -> None:
    artifacts = load_run(run_folder)
    assert front_matter(model_card(artifacts)) == {
        "library_name": "transformers",
        "license": "other",
        "pipeline_tag": "text-generation",
        "base_model": "org/teacher-135M",  # the student is made of the teacher's layers
        "tags": ["distillation", "tdistill"],
    }
    assert "No licence was given" in model_card(artifacts)


def test_base_model_is_the_students_own_unless_it_is_a_path(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_folder / "results.json"
    content = json.loads(path.read_text())
    content["summary"]["student"].update(kept_layers=None, name="org/small")
    path.write_text(json.dumps(content))
    assert front_matter(model_card(load_run(run_folder)))["base_model"] == "org/small"
    # A folder may be called as a model of the hub is.
    monkeypatch.chdir(run_folder)
    (run_folder / "org" / "small").mkdir(parents=True)
    assert "base_model" not in front_matter(model_card(load_run(run_folder)))
    content["summary"]["student"]["name"] = "./models/with: colon"
    path.write_text(json.dumps(content))
    assert "base_model" not in front_matter(model_card(load_run(run_folder)))


def test_card_holds_the_facts_of_the_report_and_the_two_lines(run_folder: Path) -> None:
    path = write_model_card(run_folder)
    assert path == run_folder / "student" / "README.md"
    card = path.read_text(encoding="utf-8")
    results = load_run(run_folder).results
    assert markdown_table(results) in card and markdown_table(results, "size") in card
    assert " ".join(verdict(results)) in card
    assert (
        'from transformers import pipeline\ngenerate = pipeline("text-generation", model="path/to/this/folder")' in card
    )
    assert "layers 0, 2, 4" in card
    assert write_model_card(run_folder).read_text(encoding="utf-8") == card
