"""One finished run, shared by the tests that look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cli.harness import Outcome, recipe_tree, tdistill, write_recipe


class FinishedRun(NamedTuple):
    """A run to the end: its recipe's tree and file, its folder, and what was printed."""

    tree: dict[str, Any]
    recipe: Path
    folder: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, tiny_prompt_files: dict[str, Path]
) -> FinishedRun:
    """Do not change anything in its folder."""
    root = tmp_path_factory.mktemp("finished")
    tree = recipe_tree(tiny_teacher_folder, tiny_prompt_files, root / "run")
    recipe = write_recipe(root / "recipe.yaml", tree)
    return FinishedRun(tree, recipe, root / "run", tdistill("run", recipe))
