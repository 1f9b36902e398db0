"""The model card of a student."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from tdistill.errors import DataFileError
from tdistill.files import write_atomically
from tdistill.reports.findings import facts, verdict
from tdistill.reports.load import RunArtifacts, load_run
from tdistill.reports.tables import GROUP_TITLES, escape_markdown, markdown_table

# The hub refuses a card whose base_model is a path, so a name of any other form, and that of a folder, stays in the
# text alone.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# Markdown, not HTML: what templates print goes through escape_markdown.
_ENVIRONMENT = Environment(
    loader=PackageLoader("tdistill.reports", "templates"),
    autoescape=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["md"] = escape_markdown


def model_card(artifacts: RunArtifacts) -> str:
    """Markdown with YAML front matter, in the hub's format; the licence is left to whoever publishes."""
    results = artifacts.results
    summary = results.summary
    base = summary.student.name if summary.student.kept_layers is None else summary.teacher.name
    front = {"library_name": "transformers", "license": "other", "pipeline_tag": "text-generation"}
    if _HUB_ID.fullmatch(base) and not Path(base).is_dir():
        front["base_model"] = base
    tables = {title: markdown_table(results, group) for group, title in GROUP_TITLES.items()}
    return _ENVIRONMENT.get_template("card.md.j2").render(
        front_matter=yaml.safe_dump(front | {"tags": ["distillation", "tdistill"]}, sort_keys=False),
        results=results,
        facts=facts(results),
        verdict=" ".join(verdict(results)),
        tables={title: table for title, table in tables.items() if table},
    )


def write_model_card(run_folder: Path) -> Path:
    """Write ``student/README.md`` into a finished run's folder and return its path.

    Raises:
        DataFileError: an artifact or the student is missing, or an artifact is malformed.
    """
    student = run_folder / "student"
    if not student.is_dir():
        raise DataFileError(f"{student} is missing: there is no student to describe. `tdistill run RECIPE` makes it.")
    return write_atomically(student / "README.md", model_card(load_run(run_folder)))
