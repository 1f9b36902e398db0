"""The example of docs/adding-an-objective.md, added from outside the package, trains; broken additions are named."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import pytest
from builders import pack, random_episodes
from training_support import losses, settings

from tdistill.cli.listing import listing
from tdistill.config import load_recipe
from tdistill.errors import ConfigError, DomainError
from tdistill.objectives import IQLearn, objective_class, objective_names
from tdistill.training import TDistillTrainer

RECIPE = Path(__file__).parents[2] / "recipes" / "path_consistency.yaml"
PAGE = (Path(__file__).parents[2] / "docs" / "adding-an-objective.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)[1]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one module and one entry point on the path, as an installer would."""

    def make(code: str, entry: str, package: str = "my_package") -> None:
        site = tmp_path / package
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text("")
        (site / package / "focal.py").write_text(code)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tdistill.objectives]\n{entry}\n")
        monkeypatch.syspath_prepend(site)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()

    return make


def test_the_example_of_the_page_trains(install, load_start, tiny_stores, tiny_tokenizer, tmp_path):
    entry = re.search(r"^focal = .*$", block("toml"), flags=re.MULTILINE)[0].replace('"', "")
    install(block("python"), entry)
    assert "focal" in objective_names()
    (row,) = [row for row in listing("objectives") if row["name"] == "focal"]
    assert row["settings"] == "focus=2.0"
    args = settings(tmp_path / "out", objective={"name": "focal", "focus": 1.0}, max_steps=12)
    trainer = TDistillTrainer(load_start(), args, tiny_stores["train"], None, tiny_tokenizer)
    assert (trainer.objective.name, trainer.objective.focus) == ("focal", 1.0)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert "focal_weight" in trainer.state.log_history[0]
    with pytest.raises(DomainError, match="focus = -1"):
        settings(tmp_path, objective={"name": "focal", "focus": -1.0})
    stats = pack(random_episodes(0))
    plain = float(IQLearn(alpha=math.inf)(stats).loss)
    assert float(objective_class("focal")(focus=0.0)(stats).loss) == pytest.approx(plain, rel=1e-12)


def test_a_recipe_can_name_the_example(install, tmp_path):
    """The line of the page, in a recipe; settings and names are checked as those of the package's own."""
    install(block("python"), "focal = my_package.focal:Focal")
    line = block("yaml").strip().removeprefix("objective: ")
    recipe = load_recipe(RECIPE, [f"phases.sft.args.objective={line}"])
    objective = recipe.arguments("sft", str(tmp_path)).build_objective()
    assert objective == objective_class("focal")(focus=1.0)
    with pytest.raises(ConfigError, match="Did you mean 'focus'"):
        load_recipe(RECIPE, ["phases.sft.args.objective={name: focal, fokus: 1.0}"])
    with pytest.raises(ConfigError, match="Did you mean 'focal'"):
        load_recipe(RECIPE, ["phases.sft.args.objective=focall"])
    with pytest.raises(DomainError, match=r"phases.sft.args: focal: focus = -1"):
        load_recipe(RECIPE, ["phases.sft.args.objective={name: focal, focus: -1.0}"])


@pytest.mark.parametrize(
    ("code", "entry", "part"),
    [
        ("import no_such_module", "broken = my_package.focal:Focal", r"'broken'.*cannot be loaded.*no_such_module"),
        ("Focal = 3", "broken = my_package.focal:Focal", "no dataclass derived from"),
        (block("python").replace("@dataclass(frozen=True)", ""), "broken = my_package.focal:Focal", "no dataclass"),
        (block("python"), "broken = my_package.focal:Focal", "calls itself 'focal'"),
    ],
)
def test_a_broken_addition_is_named_when_it_is_asked_for(install, code, entry, part):
    install(code, entry, package="my_package")
    assert objective_class("iq_learn") is IQLearn
    with pytest.raises(ConfigError, match=part):
        objective_class("broken")
    assert [row for row in listing("objectives") if row["name"] == "broken"]


def test_a_name_that_is_taken_is_refused(install):
    install("", "sft = my_package.focal:Focal")
    with pytest.raises(ConfigError, match=r"Two objectives are called 'sft'.*my_package.*Rename"):
        objective_class("sft")


def test_two_packages_with_one_name_are_both_named(install):
    for package in ("my_package", "other_package"):
        install(block("python"), f"focal = {package}.focal:Focal", package)
    with pytest.raises(ConfigError, match="Two objectives are called 'focal'") as caught:
        objective_class("focal")
    assert "my_package.focal" in str(caught.value)
    assert "other_package.focal" in str(caught.value)
