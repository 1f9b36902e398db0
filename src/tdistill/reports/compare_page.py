"""A comparison of runs as a table, and as Markdown, plain text or a web page."""

from __future__ import annotations

from markupsafe import Markup

from tdistill.reports.compare import Comparison
from tdistill.reports.html import ENVIRONMENT
from tdistill.reports.load import Record
from tdistill.reports.plots import comparison_chart
from tdistill.reports.records import Scale, format_record, scale_of
from tdistill.reports.tables import Cell, Row, Table, escape_markdown, title_of, to_markdown, to_text


def comparison_table(comparison: Comparison) -> Table:
    """A row for each subject; for each metric its value and, with a baseline, the difference to it; then the costs."""
    labels = [row.label for row in comparison.rows]
    pooled = any(len(row.runs) > 1 for row in comparison.rows)
    columns: list[tuple[str, list[Cell]]] = []
    for metric in (*comparison.metrics, *comparison.costs):
        found = [comparison.find(metric, label) for label in labels]
        scale = scale_of([record for record in found if record is not None])
        title = f"{title_of(metric)} ({scale.unit})" if scale.unit else title_of(metric)
        columns.append((title, [_cell(comparison, record, scale) for record in found]))
        differences = [comparison.find(metric, label, comparison.against) for label in labels]
        if comparison.against is not None and any(differences):
            cells = [Cell(format_record(record, scale, signed=True)) for record in differences]
            columns.append((f"minus {comparison.against}", cells))
    return Table(
        caption=f"{comparison.split} split; {comparison.num_prompts:,} prompts; brackets are 95 % intervals over "
        f"prompts{' and training seeds' if pooled else ''}; ≈ is not separable from the best student of its column",
        headers=tuple(header for header, _ in columns),
        rows=tuple(Row(label, tuple(cells[index] for _, cells in columns)) for index, label in enumerate(labels)),
        best_is="the best student of its column",
    )


def _cell(comparison: Comparison, record: Record | None, scale: Scale) -> Cell:
    best = None if record is None else comparison.best.get(record.metric)
    if record is None or best is None:
        return Cell(format_record(record, scale))
    tied = record.subject in best.not_separable
    return Cell(format_record(record, scale) + (" ≈" if tied else ""), best=record.subject == best.label)


def comparison_text(comparison: Comparison) -> str:
    """The table and the notes as plain text."""
    return "\n".join([to_text(comparison_table(comparison)), *comparison.notes]) + "\n"


def comparison_markdown(comparison: Comparison) -> str:
    """The table and the notes as GitHub Markdown."""
    notes = "".join(f"\n{escape_markdown(note)}\n" for note in comparison.notes)
    return to_markdown(comparison_table(comparison)) + notes


def comparison_html(comparison: Comparison, metric: str, cost: str | None = None) -> str:
    """The table, the figure of one metric and the notes as one self-contained page."""
    return ENVIRONMENT.get_template("compare.html.j2").render(
        comparison=comparison,
        table=comparison_table(comparison),
        # Matplotlib and ElementTree have escaped it.
        chart=Markup(comparison_chart(comparison, metric, cost)),
    )
