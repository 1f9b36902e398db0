"""``tdistill compare`` on made-up runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cli.harness import strict_json, tdistill

sys.path.append(str(Path(__file__).parent.parent / "reports"))
from synthetic_run import write_scored_run


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        write_scored_run(
            tmp_path / name, tokens={"p0": 10, "p1": 30}, kl_sums={"teacher": [0, 0], "bd": sums}, times_s={"bd": 3.0}
        )
        for name, sums in (("a", [10.0, 60.0]), ("b", [0.0, 30.0]))
    ]


def test_a_table(folders: list[Path]):
    outcome = tdistill("compare", *folders, "--against", "a:bd")
    assert (outcome.code, outcome.err) == (0, "")
    assert "1.75 [1.00, 2.00]" in outcome.out and "minus a:bd" in outcome.out
    assert outcome.out.endswith("\n") and not outcome.out.endswith("\n\n")


def test_json(folders: list[Path]):
    found = strict_json(tdistill("compare", *folders, "--against", "a:bd", "--json").out)
    assert (found["format"], found["against"]) == ("tdistill-comparison", "a:bd")
    differences = {r["subject"]: r["value"] for r in found["records"] if r["against"]}
    assert differences == {"a:teacher": -1.75, "b:teacher": -1.75, "b:bd": -1.0}
    assert found["best"]["kl_teacher_student"]["label"] == "b:bd"


def test_files(folders: list[Path], tmp_path: Path):
    paths = [tmp_path / f"table{suffix}" for suffix in (".html", ".md", ".txt", ".json", ".svg")]
    options = [word for path in paths for word in ("--output", path)]
    outcome = tdistill("compare", *folders, *options, "--cost", "training_s")
    assert outcome.code == 0, outcome.err
    begins = [path.read_text(encoding="utf-8")[:14] for path in paths]
    assert begins[0] == "<!DOCTYPE html"
    assert begins[1].startswith("| | KL") and begins[2].startswith("held_out split") and begins[4].startswith("<svg")
    assert strict_json(paths[3].read_text(encoding="utf-8"))["num_prompts"] == 2
    assert paths[2].read_text(encoding="utf-8") == outcome.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--metric", "kl_teacher_studen"], 2, "--metric kl_teacher_studen is in none of the runs. Did you mean"),
        (["--cost", "training"], 2, "--cost training is in none of the runs. Did you mean 'training_s'?"),
        (["--output", "table.pdf"], 2, "--output table.pdf: unknown ending. Use one of .html, .md"),
        (["--output", "absent/table.md"], 2, "there is no folder absent. Make it, or name another file."),
        (["--against", "sft"], 2, "--against sft is none of the rows."),
        (["absent"], 3, "There is no run folder absent."),
    ],
)
def test_mistakes_are_one_line(folders: list[Path], words: list[str], code: int, message: str):
    outcome = tdistill("compare", *folders, *words)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err and len(outcome.err.splitlines()) == 1
