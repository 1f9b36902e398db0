"""``tdistill bench`` prints one object, writes the same file, and says what is wrong before it measures."""

from __future__ import annotations

import json

import pytest
from cli.harness import tdistill

from tdistill.bench import scaling
from tdistill.bench.workload import make_workload


@pytest.fixture
def tiny(tiny_teacher_folder, tmp_path, monkeypatch):
    """A short workload of the tiny teacher in place of the full one."""
    monkeypatch.setattr("tdistill.bench.workload.make_workload", lambda t, folder: make_workload(t, folder, 9))
    monkeypatch.setattr(scaling, "NUM_SEQUENCES", (1, 2, 3))
    return ["--teacher", tiny_teacher_folder, "--work", tmp_path / "work", "--rounds", 1]


def test_json_is_one_object_and_the_file_holds_the_same(tiny, tmp_path):
    found = tdistill("bench", "scaling", *tiny, "--json", "--output", tmp_path / "scaling.json")
    assert found.code == 0
    content = json.loads(found.out)
    assert content["tokens"] == [9, 18, 27] and len(content["step_s"]) == 3
    assert content["machine"]["cpu_count"] >= 1
    assert json.loads((tmp_path / "scaling.json").read_text()) == content


def test_text_is_a_table(tiny):
    assert "| R² of a straight line |" in tdistill("bench", "scaling", *tiny).out


def test_a_folder_that_is_not_there_is_named_before_anything_is_measured(tiny, tmp_path):
    found = tdistill("bench", "scaling", *tiny, "--output", tmp_path / "nowhere" / "x.json")
    assert found.code != 0 and "there is no folder" in found.err and str(tmp_path / "nowhere") in found.err
    assert not (tmp_path / "work").exists()


def test_an_unknown_teacher_is_named(tmp_path):
    found = tdistill("bench", "step", "--teacher", tmp_path / "nobody", "--work", tmp_path)
    assert found.code != 0 and "nobody" in found.err
