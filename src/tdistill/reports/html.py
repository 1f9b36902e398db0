"""The report of a run: one web page that needs no network."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tdistill.files import write_atomically
from tdistill.reports import plots
from tdistill.reports.findings import (
    DISTINCT_2_FLOOR,
    distinct_2_checks,
    distinct_2_floor,
    facts,
    paired_readings,
    verdict,
)
from tdistill.reports.load import RunArtifacts, load_run
from tdistill.reports.records import format_number, format_record, main_split, scale_of
from tdistill.reports.tables import GROUP_TITLES, build_table, columns_of_splits

# Names, prompts and answers are other people's text: everything that a template prints is escaped.
ENVIRONMENT = Environment(
    loader=PackageLoader("tdistill.reports", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def report_html(artifacts: RunArtifacts) -> str:
    """The report as one self-contained page; the same artifacts give the same text."""
    results = artifacts.results
    split = main_split(results)
    shown = {split, *(column.split for column in columns_of_splits(results))}
    other_splits = sorted({record.split for record in results.records if record.split} - shown)
    figures = {
        "loss": plots.loss_curves(artifacts),
        "dev_kl": plots.dev_kl_curves(artifacts),
        "temporal": plots.temporal_curves(artifacts),
        "sparsity": plots.sparsity_chart(results.sparsity),
    }
    return ENVIRONMENT.get_template("report.html.j2").render(
        results=results,
        facts=facts(results),
        verdict=" ".join(verdict(results)),
        split=split,
        tables={group: build_table(results, group) for group in GROUP_TITLES},
        optional_groups=("sets", "exposure", "judge", "text", "tasks"),
        other_tables=[
            table for name in other_splits for g in ("fidelity", "answers") if (table := build_table(results, g, name))
        ],
        paired=paired_readings(results),
        # Matplotlib and ElementTree have escaped these.
        figures={name: Markup(svg) if svg else None for name, svg in figures.items()},
        distinct_2_share=DISTINCT_2_FLOOR,
        distinct_2_floor=distinct_2_floor(results),
        distinct_2_checks=distinct_2_checks(results),
        answers=results.answers,
        recipe=artifacts.recipe,
        environment=artifacts.environment,
        number=format_number,
        record_text=lambda record: format_record(record, signed=record.against is not None),
        record_unit=lambda record: scale_of([record]).unit,
    )


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a finished run's folder and return its path.

    Raises:
        DataFileError: an artifact is missing or malformed.
    """
    return write_atomically(run_folder / "report.html", report_html(load_run(run_folder)))
