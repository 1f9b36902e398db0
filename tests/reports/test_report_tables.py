from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_run import make_results, record, write_run

from tdistill.errors import DataFileError
from tdistill.reports.load import Results, load_run
from tdistill.reports.tables import markdown_table, results_section, terminal_table

BOLD = (
    "Bold: the best student, separated from every other student (by their paired difference where it is measured, else "
    "by intervals that do not overlap)."
)
FIDELITY = f"""\
| | KL(teacher‖student) (nats/token) | Top-1 agreement (%) | Gap closed (%) |
|---|---:|---:|---:|
| start | 5.00 [4.60, 5.40] | 10.0 [8.0, 12.0] | – |
| sft | 1.30 [1.20, 1.40] | 55.0 [53.0, 57.0] | – |
| bd (final) | **1.00 [0.90, 1.10]** | 61.0 [59.0, 63.0] | 80.0 [78.0, 82.0] |
| sft_continued (control) | 1.10 [1.00, 1.20] | 60.0 [58.0, 62.0] | – |

Distance from the teacher; held_out split; 48 items; brackets are 95 % intervals. \
{BOLD}
"""

SIZE = """\
| | Parameters (M) | Weights (MB) | Decoding (tokens/s) |
|---|---:|---:|---:|
| teacher | 134.5 | – | – |
| bd (final) | 81.40 | 162.8 | 35.5 [34.0, 37.0] |

Size and speed; brackets are 95 % intervals.
"""


def test_markdown_tables() -> None:
    results = Results.model_validate(make_results())
    assert markdown_table(results) == FIDELITY
    assert markdown_table(results, "size") == SIZE
    assert markdown_table(results, "fidelity", "dev").splitlines()[2] == "| bd (final) | 0.77 [0.67, 0.87] |"
    assert markdown_table(results, "fidelity", "elsewhere") == ""


def test_markdown_cells_cannot_break_the_table() -> None:
    content = make_results()
    content["records"].append(record("kl_teacher_student", "a|b<i>\nc", 2.0, 0.1))
    assert "| a\\|b&lt;i> c | 2.00 [1.90, 2.10] |" in markdown_table(Results.model_validate(content))


def test_terminal_table_fits_its_width_and_loses_no_number(run_folder: Path) -> None:
    artifacts = load_run(run_folder)
    text = terminal_table(artifacts, width=60)
    table_lines = text.split("\n\n")[0].splitlines()[1:]
    assert max(map(len, table_lines)) <= 60
    for number in ("5.00 [4.60, 5.40]", "1.00 [0.90, 1.10] *", "60.0 [58.0, 62.0]", "80.0 [78.0, 82.0]", "134.5"):
        assert number in text
    assert "bd is closer to the teacher" in text


def test_results_section_names_file_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = {**make_results(), "name": "big", "command": "tdistill run recipes/bd.yaml seed=3"}
    write_run(tmp_path / "big", other)
    write_run(tmp_path / "demo", make_results())
    demo, big = results_section(tmp_path / "demo" / "results.json"), results_section(Path("big/results.json"))
    assert demo.startswith("## demo\n\nFrom `demo/results.json`, which `tdistill demo` makes again.")
    assert big.startswith("## big\n\nFrom `big/results.json`, which `tdistill run recipes/bd.yaml seed=3` makes again.")
    assert all(str(tmp_path) not in page and page.count(FIDELITY) == 1 for page in (demo, big))


def test_results_section_names_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"format": "something-else"}))
    with pytest.raises(DataFileError, match=r"results\.json: format"):
        results_section(path)


def test_what_is_measured_on_no_prompts_has_tables_of_its_own() -> None:
    content = make_results()
    text = {"split": "text", "unit": "", "num_items": 7, "higher_is_better": False}
    task = {"unit": "share", "higher_is_better": True, "num_items": 20}
    content["records"] += [
        record("text_perplexity", "teacher", 20.0, 2.0, **text),
        record("text_perplexity", "sft", 31.0, 2.0, **text),
        record("text_perplexity", "bd", 25.0, 2.0, **text),
        record("task_accuracy", "sft", 0.25, 0.1, split="gsm8k", **task),
        record("task_accuracy", "bd", 0.5, 0.1, split="gsm8k", **task),
        record("task_accuracy", "bd", 0.75, 0.1, split="capitals", **task),
        record("rouge_l", "teacher", 0.3, 0.01, split="b", unit="F1", higher_is_better=True, num_items=9),
        record("rouge_l", "bd", 0.2, 0.01, split="b", unit="F1", higher_is_better=True, num_items=9),
        record("rouge_l", "bd", 0.1, 0.01, split="a", unit="F1", higher_is_better=True, num_items=4),
        record("excess_accumulated_error", "bd", 0.2, 0.05, unit="share", higher_is_better=False),
    ]
    results = Results.model_validate(content)
    assert markdown_table(results, "text") == (
        "| | Perplexity per token |\n|---|---:|\n| teacher | 20.0 [18.0, 22.0] |\n| sft | 31.0 [29.0, 33.0] |\n"
        "| bd (final) | **25.0 [23.0, 27.0]** |\n\nPlain text; 7 items; brackets are 95 % intervals. "
        f"{BOLD}\n"
    )
    # One column for each task, and bold in its own one only.
    assert markdown_table(results, "tasks") == (
        "| | gsm8k (%) | capitals (%) |\n|---|---:|---:|\n| sft | 25 [15, 35] | – |\n"
        "| bd (final) | **50 [40, 60]** | 75 [65, 85] |\n\nTasks; 20 items; brackets are 95 % intervals. "
        f"{BOLD}\n"
    )
    assert markdown_table(results, "sets").splitlines() == [
        "| | b (F1) | a (F1) |",
        "|---|---:|---:|",
        "| teacher | 0.300 [0.290, 0.310] | – |",
        "| bd (final) | 0.200 [0.190, 0.210] | 0.100 [0.090, 0.110] |",
        "",
        "Rouge-L to the references of other prompts; 4 to 9 items; brackets are 95 % intervals.",
    ]
    own = make_results()
    own["records"].append(record("rouge_l", "bd", 0.4, 0.01, unit="F1", higher_is_better=True))
    assert markdown_table(Results.model_validate(own), "sets") == ""
    assert "| bd (final) | 20.0 [15.0, 25.0] |" in markdown_table(results, "exposure")
    # None of it changes the tables that were there, or adds one where nothing was measured.
    assert markdown_table(results) == FIDELITY and markdown_table(results, "size") == SIZE
    assert markdown_table(results, "judge") == markdown_table(Results.model_validate(make_results()), "text") == ""
