"""Tables of a run's records, and what is printed from them: Markdown, plain text, the results page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tdistill.reports.findings import facts, verdict
from tdistill.reports.load import Record, Results, RunArtifacts, read_results
from tdistill.reports.records import find, format_record, has_interval, main_split, scale_of, separated_best

Group = Literal["fidelity", "answers", "sets", "exposure", "judge", "text", "tasks", "size"]

TERMINAL_WIDTH = 100

GROUP_TITLES: dict[Group, str] = {
    "fidelity": "Distance from the teacher",
    "answers": "The answers",
    "sets": "Rouge-L to the references of other prompts",
    "exposure": "Exposure bias",
    "judge": "Answers compared by a judge",
    "text": "Plain text",
    "tasks": "Tasks",
    "size": "Size and speed",
}


@dataclass(frozen=True)
class Column:
    """A metric that has a place in a table; ``split`` where it is not measured on the prompts of the table."""

    metric: str
    title: str
    group: Group
    split: str | None = None


COLUMNS: tuple[Column, ...] = (
    Column("kl_teacher_student", "KL(teacher‖student)", "fidelity"),
    Column("nll_teacher_answers", "NLL of the teacher's answers", "fidelity"),
    Column("agreement_top1", "Top-1 agreement", "fidelity"),
    Column("mass_outside_set", "Mass outside the set", "fidelity"),
    Column("rouge_l_teacher", "Rouge-L to the teacher", "fidelity"),
    Column("rouge_l", "Rouge-L to the references", "fidelity"),
    Column("gap_closed", "Gap closed", "fidelity"),
    Column("distinct_2", "Distinct-2", "answers"),
    Column("response_length", "Length", "answers"),
    Column("terminated_share", "Ended by an end token", "answers"),
    Column("teacher_nll_on_student_answers", "Teacher's NLL of the answers", "answers"),
    Column("kl_own_prefixes", "KL on own prefixes", "exposure"),
    Column("kl_teacher_prefixes", "KL on the teacher's prefixes", "exposure"),
    Column("excess_accumulated_error", "Excess accumulated error", "exposure"),
    Column("judge_win_rate", "Win rate", "judge"),
    Column("judge_tie_share", "Ties", "judge"),
    Column("judge_self_agreement", "Judge agrees with itself", "judge"),
    Column("judge_unread_share", "Without a verdict", "judge"),
    Column("text_nll", "NLL", "text", "text"),
    Column("text_perplexity", "Perplexity per token", "text", "text"),
    Column("text_word_perplexity", "Perplexity per word", "text", "text"),
    Column("text_bits_per_byte", "Bits per byte", "text", "text"),
    Column("num_parameters", "Parameters", "size"),
    Column("weights_bytes", "Weights", "size"),
    Column("decode_tokens_per_s", "Decoding", "size"),
    Column("training_s", "Training", "size"),
)


def title_of(metric: str) -> str:
    """Title of a metric's column, or the metric where it has none.

    >>> title_of("decode_tokens_per_s"), title_of("mine")
    ('Decoding', 'mine')
    """
    return next((column.title for column in COLUMNS if column.metric == metric), metric)


@dataclass(frozen=True)
class Cell:
    """Text of one number, and whether it is the best student, separated from the others."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One subject."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows are subjects, columns are metrics; columns that nobody measured are left out.

    Attributes:
        caption: what is shown.
        headers: of the columns.
        rows: of the subjects.
        best_is: what the mark of a cell says.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[Row, ...]
    best_is: str = (
        "the best student, separated from every other student (by their paired difference where it is measured, else "
        "by intervals that do not overlap)"
    )

    @property
    def any_best(self) -> bool:
        """Whether some cell is marked."""
        return any(cell.best for row in self.rows for cell in row.cells)


def build_table(results: Results, group: Group = "fidelity", split: str | None = None) -> Table | None:
    """The table of one group of columns on one split, or None when nothing of it was measured."""
    split = main_split(results) if split is None else split
    columns: list[tuple[str, dict[str, Cell]]] = []
    shown: list[Record] = []
    for column in (*COLUMNS, *columns_of_splits(results)):
        if column.group != group:
            continue
        own_split = column.split or split
        found = {name: _lookup(results, column, name, own_split) for name in results.subjects}
        records = {name: record for name, record in found.items() if record is not None}
        if not records:
            continue
        scale = scale_of(list(records.values()))
        best = separated_best(results, column.metric, own_split)
        cells = {name: Cell(format_record(record, scale), name == best) for name, record in found.items()}
        header = f"{column.title} ({scale.unit})" if scale.unit not in ("", column.title.lower()) else column.title
        columns.append((header, cells))
        shown += records.values()
    if not columns:
        return None
    subjects = [name for name in results.subjects if any(record.subject == name for record in shown)]
    return Table(
        caption=_caption(group, split, shown),
        headers=tuple(header for header, _ in columns),
        rows=tuple(Row(_label(results, name), tuple(cells[name] for _, cells in columns)) for name in subjects),
    )


def columns_of_splits(results: Results) -> list[Column]:
    """One column for each task, and for each further prompt set, which the records have as their split."""
    groups: dict[str, Group] = {"task_accuracy": "tasks", "rouge_l": "sets"}
    found = dict.fromkeys((record.metric, record.split) for record in results.records if record.metric in groups)
    own = main_split(results)
    return [Column(metric, split, groups[metric], split) for metric, split in found if split != own]


def _lookup(results: Results, column: Column, subject: str, split: str) -> Record | None:
    record = find(results, column.metric, subject, split)
    if record is None and column.group == "size":
        # No prompt enters a size, so any split will do.
        candidates = (r for r in results.records if (r.metric, r.subject, r.against) == (column.metric, subject, None))
        return next(candidates, None)
    return record


def _label(results: Results, subject: str) -> str:
    if subject == results.summary.final_phase:
        return f"{subject} (final)"
    controls = {phase.name for phase in results.summary.phases if phase.control}
    return f"{subject} (control)" if subject in controls else subject


def _caption(group: Group, split: str, records: Sequence[Record]) -> str:
    parts = [GROUP_TITLES[group]]
    if group != "size":
        if group not in ("sets", "text", "tasks"):
            parts.append(f"{split} split")
        items = sorted({record.num_items for record in records if record.num_items is not None})
        if items:
            parts.append(f"{items[0]:,} items" if len(items) == 1 else f"{items[0]:,} to {items[-1]:,} items")
    levels = sorted({record.level for record in records if has_interval(record) and record.level is not None})
    if levels:
        parts.append(f"brackets are {' and '.join(f'{100 * level:g} %' for level in levels)} intervals")
    return "; ".join(parts)


def escape_markdown(text: str) -> str:
    """Text that neither breaks a table nor opens an HTML tag.

    >>> escape_markdown("a|b <i>")
    'a\\\\|b &lt;i>'
    """
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def markdown_table(results: Results, group: Group = "fidelity", split: str | None = None) -> str:
    """The table of one group as GitHub Markdown with its caption below, or an empty string when there is none."""
    table = build_table(results, group, split)
    return "" if table is None else to_markdown(table)


def to_markdown(table: Table) -> str:
    """A table as GitHub Markdown with its caption below."""
    lines = ["| | " + " | ".join(escape_markdown(header) for header in table.headers) + " |"]
    lines.append("|---" + "|---:" * len(table.headers) + "|")
    for row in table.rows:
        cells = [f"**{cell.text}**" if cell.best else cell.text for cell in row.cells]
        lines.append(f"| {escape_markdown(row.label)} | " + " | ".join(cells) + " |")
    legend = f" Bold: {table.best_is}." if table.any_best else ""
    return "\n".join([*lines, "", f"{escape_markdown(table.caption)}.{legend}", ""])


def terminal_table(artifacts: RunArtifacts, width: int = TERMINAL_WIDTH) -> str:
    """All groups as plain text, no line wider than ``width`` unless one column alone is, then the verdict."""
    tables = [build_table(artifacts.results, group) for group in GROUP_TITLES]
    blocks = [to_text(table, width) for table in tables if table is not None]
    blocks.append("\n".join(verdict(artifacts.results)))
    return "\n\n".join(blocks) + "\n"


def to_text(table: Table, width: int = TERMINAL_WIDTH) -> str:
    """A table as plain text below its caption, no line of it wider than ``width`` unless one column alone is."""
    legend = f" (* = {table.best_is})" if table.any_best else ""
    return "\n".join([f"{table.caption}{legend}", *_text_lines(table, width)])


def _text_lines(table: Table, width: int) -> list[str]:
    labels = ["", *(row.label for row in table.rows)]
    columns = [
        [header, *(row.cells[index].text + (" *" if row.cells[index].best else "") for row in table.rows)]
        for index, header in enumerate(table.headers)
    ]
    label_width = max(map(len, labels))
    blocks: list[list[list[str]]] = [[]]
    used = label_width
    for column in columns:
        needed = 2 + max(map(len, column))
        if blocks[-1] and used + needed > width:
            blocks.append([])
            used = label_width
        blocks[-1].append(column)
        used += needed
    lines = []
    for block in blocks:
        widths = [max(map(len, column)) for column in block]
        for index, label in enumerate(labels):
            cells = "".join(f"  {column[index]:>{w}}" for column, w in zip(block, widths, strict=True))
            lines.append(f"{label:<{label_width}}{cells}")
    return lines


def results_section(path: Path) -> str:
    """The section of docs/results.md about one results file.

    Raises:
        DataFileError: the file is missing or malformed.
    """
    results = read_results(path)
    command = results.command or (
        "tdistill demo" if results.name == "demo" else f"tdistill run recipes/{results.name}.yaml"
    )
    lines = [f"## {escape_markdown(results.name)}", "", f"From `{_shown(path)}`, which `{command}` makes again.", ""]
    lines += [f"- {name}: {escape_markdown(text)}" for name, text in facts(results)]
    lines += ["", escape_markdown(" ".join(verdict(results))), ""]
    for group, title in GROUP_TITLES.items():
        table = markdown_table(results, group)
        if table:
            lines += [f"### {title}", "", table]
    return "\n".join(lines).rstrip() + "\n"


def _shown(path: Path) -> str:
    # A page that is published must not name a folder of the machine it was made on.
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name
