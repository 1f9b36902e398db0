"""Documents say what the committed JSON and the code say."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tdistill.config import load_recipe
from tdistill.evaluation.exposure import ExposureSettings
from tdistill.evaluation.judge import JudgeSettings
from tdistill.evaluation.perplexity import PerplexitySettings
from tdistill.evaluation.records import METRICS, OPTIONAL_METRICS, EvaluationSettings
from tdistill.evaluation.tasks import TaskSettings
from tdistill.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def make_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    return runpy.run_path("benchmarks/make_results.py")


def test_the_results_page_is_made_from_the_committed_json(make_results):
    assert Path("docs/results.md").read_text(encoding="utf-8") == make_results["page"]()


def test_the_figures_show_the_committed_json(make_results):
    drawn = 0
    for name, (source, draw) in make_results["FIGURE_SOURCES"].items():
        if (path := Path("benchmarks/results/experiments") / source).is_file():
            # The description has every number; how lines are drawn depends on the version of matplotlib.
            told, now = (_description(svg) for svg in (Path("docs/figures", name).read_text("utf-8"), draw(path)))
            assert told == now
            drawn += 1
    assert drawn


def _description(svg: str) -> str:
    return re.search(r"<(?:\w+:)?desc[^>]*>(.*?)<", svg, re.DOTALL)[1]


def test_the_table_in_the_readme_is_made_from_the_committed_json(make_results):
    text = Path("README.md").read_text(encoding="utf-8")
    assert "kl" in text.lower() and text == make_results["readme"](text)


def test_the_tables_of_the_performance_page_are_made_from_the_committed_json(make_results):
    text = Path("docs/performance.md").read_text(encoding="utf-8")
    assert "| bar | measured |" in text and text == make_results["performance"](text)


def test_the_tables_of_the_store_format_are_made_from_the_committed_json(make_results):
    text = Path("docs/store-format.md").read_text(encoding="utf-8")
    assert "| p | cap 8 |" in text and text == make_results["store_format"](text)


def test_the_recipe_in_the_readme_is_valid(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## A recipe of your own\n\n((?: {4}.*\n)+)", text)[1]
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r"^ {4}", "", block, flags=re.MULTILINE))
    assert load_recipe(path).final_phase == "bd" and yaml.safe_load(path.read_text())["student"]["layers"] == 12


def test_links_in_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            path = page.parent / target if target else page
            assert path.exists(), f"{page}: {target}"
            assert not anchor or anchor in _anchors(path), f"{page}: {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_a_page_that_names_its_settings(name):
    page = (ROOT / "docs" / "objectives" / f"{name}.md").read_text(encoding="utf-8")
    for setting in fields(OBJECTIVES[name]):
        assert f"`{setting.name}`" in page


def test_the_page_on_evaluation_names_every_metric_and_setting_and_its_recipe_is_valid():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    optional = (ExposureSettings, PerplexitySettings, JudgeSettings, TaskSettings)
    names = {*METRICS, *OPTIONAL_METRICS, *(name for kind in optional for name in kind.model_fields)}
    assert [name for name in sorted(names) if not re.search(rf"[`.]{name}`", page)] == []
    block = re.search(r"((?: {4}.*\n)+)", page)[1]
    settings = EvaluationSettings.model_validate(yaml.safe_load(block)["evaluation"])
    assert None not in (settings.exposure, settings.perplexity, settings.judge, settings.tasks, settings.prompt_sets)
