"""docs/theory.md says what the committed JSON says, and the JSON is that of the code."""

import itertools
import json
import runpy
from pathlib import Path

import pytest

from tdistill.tabular.check import process_claims, tree_claims
from tdistill.tabular.horizon import SETTINGS, default_methods
from tdistill.tabular.measure import measure_policy_error, measure_tightness

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.chdir(ROOT)
    return runpy.run_path("benchmarks/theory.py")


@pytest.fixture
def content(benchmark):
    return json.loads(benchmark["RESULTS"].read_text(encoding="utf-8"))


def test_the_tables_are_made_from_the_committed_json(benchmark):
    text = benchmark["PAGE"].read_text(encoding="utf-8")
    assert benchmark["page"](text) == text
    emptied = text.replace("| `sandwich` |", "| nothing |")
    assert emptied != text and benchmark["page"](emptied) == text
    with pytest.raises(SystemExit, match="marker <!-- control -->"):
        benchmark["page"](text.replace("<!-- control -->", ""))


def test_the_committed_check_is_of_every_claim_and_found_no_violation(content):
    names = [claim.name for claim in [*process_claims(0), *tree_claims()]]
    assert [row["claim"] for row in content["claims"]] == names
    for row in content["claims"]:
        assert row["cases"] >= 300 and row["violations"] == 0 and row["worst_margin"] >= -row["tolerance"]
        assert row["gamma"] == [0.9, 0.99] and row["num_actions"] == [10, 1000] and row["p"] == [0.3, 0.99]


def test_the_committed_experiment_has_every_setting_and_method(content):
    found = [(row["process"], row["student"], row["method"]) for row in content["horizon"]]
    assert found == [(*setting, method.name) for setting in SETTINGS for method in default_methods()]


def test_the_committed_tightness_is_what_the_code_measures(content, benchmark):
    again = measure_tightness(content["num_processes"], content["seed"])
    for old, new in zip(content["tightness"], again, strict=True):
        for key in ("loss_share", "optimum_share"):
            assert new.pop(key) == pytest.approx(old.pop(key), rel=1e-4)
        assert new.pop("perplexity") == pytest.approx(old.pop("perplexity"), rel=1e-4)
        assert new == old


def test_the_policy_error_of_a_few_trees_falls_as_one_over_alpha():
    rows = measure_policy_error(5)
    assert [row["alpha"] for row in rows] == [0.1, 1.0, 10.0, 100.0, 1e3, 1e4]
    for before, after in itertools.pairwise(rows[3:]):
        assert after["total_variation"] == pytest.approx(before["total_variation"] / 10, rel=0.02)
        assert after["divergence"] == pytest.approx(before["divergence"] / 100, rel=0.02)


def test_floats_are_rounded_and_rows_have_a_line_each(benchmark):
    value = {"seed": 0, "rows": [{"x": 1.23456789e-7, "y": [True, None, "é"]}, {"x": 2.0}]}
    text = benchmark["as_json"](benchmark["rounded"](value))
    assert json.loads(text) == {"seed": 0, "rows": [{"x": 1.23457e-7, "y": [True, None, "é"]}, {"x": 2.0}]}
    assert len(text.splitlines()) == 7
