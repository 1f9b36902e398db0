"""The command itself: help, usage errors, exit codes, and the entry point as it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cli.harness import tdistill
from tdistill import errors
from tdistill.cli.main import DEMO_RECIPE
from tdistill.config import load_recipe

VERBS = ("demo", "run", "capture", "train", "eval", "report", "compare", "check", "ls")


def test_the_installed_command_prints_every_verb():
    command = Path(sys.executable).parent / "tdistill"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert all(f" {verb} " in done.stdout for verb in VERBS)
    assert done.stderr == ""


def test_the_installed_command_refuses_a_recipe_in_one_line(tmp_path: Path):
    command = Path(sys.executable).parent / "tdistill"
    done = subprocess.run([command, "run", tmp_path / "none.yaml"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: No recipe at '{tmp_path}/none.yaml'.")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str):
    outcome = tdistill(verb, "--help")
    assert outcome.code == 0
    assert "Usage:" in outcome.out


@pytest.mark.parametrize(
    "words", [("distil",), ("run",), ("report",), ("compare",), ("run", "a.yaml", "--dryrun"), ("check", "stores")]
)
def test_a_usage_error_exits_with_2(words: tuple[str, ...]):
    outcome = tdistill(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert "Usage:" in outcome.err


def test_the_demo_is_a_recipe_that_takes_overrides(tmp_path: Path):
    overrides = [f"output={tmp_path}/run", "capture.max_new_tokens=8"]
    outcome = tdistill("demo", *overrides, "--dry-run")
    assert outcome.code == 0
    recipe = load_recipe(DEMO_RECIPE, overrides)
    assert yaml.safe_load(outcome.out) == yaml.safe_load(recipe.to_yaml())
    assert recipe.output == f"{tmp_path}/run"
    assert not (tmp_path / "run").exists()


def test_every_kind_of_error_has_an_exit_code_other_than_0():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TDistillError)
    ]
    assert len(kinds) > 10
    assert all(0 < kind.exit_code < 128 for kind in kinds)
