"""``tdistill compare``: finished runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdistill.cli.output import require_folder
from tdistill.errors import ConfigError, did_you_mean

_FORMATS = (".html", ".md", ".txt", ".json", ".svg")

Runs = Annotated[
    list[str], typer.Argument(help="Folders of finished runs, or FOLDER:SUBJECT.", metavar="RUN", show_default=False)
]
Against = Annotated[str | None, typer.Option(help="Subject whose difference to each row is shown.", show_default=False)]
PoolSeeds = Annotated[
    bool, typer.Option("--pool-seeds", help="Average runs that differ in their training seeds alone.")
]
Split = Annotated[
    str | None,
    typer.Option(help="One of the runs' evaluation.prompt_sets, in place of the held-out prompts.", show_default=False),
]
Metric = Annotated[
    str | None, typer.Option(help="Metric of the figure; by default the first of the table.", show_default=False)
]
Cost = Annotated[
    str | None,
    typer.Option(
        help="Draw the metric over num_parameters, weights_bytes, decode_tokens_per_s or training_s, too.",
        show_default=False,
    ),
]
Output = Annotated[
    list[Path] | None,
    typer.Option(help="Write to this file, too: .html, .md, .txt, .json or .svg (the figure).", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def compare(
    runs: Runs,
    against: Against = None,
    pool_seeds: PoolSeeds = False,
    split: Split = None,
    metric: Metric = None,
    cost: Cost = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs in one table, over the prompts that they share (docs/comparing.md)."""
    outputs = output or []
    for path in outputs:
        if path.suffix not in _FORMATS:
            raise ConfigError(f"--output {path}: unknown ending. Use one of {', '.join(_FORMATS)}.")
        require_folder("--output", path)
    from tdistill.files import write_atomically
    from tdistill.reports.compare import compare as compare_runs
    from tdistill.reports.compare_page import comparison_html, comparison_markdown, comparison_text
    from tdistill.reports.plots import comparison_chart

    comparison = compare_runs(runs, against, pool_seeds=pool_seeds, split=split)
    metric = metric or comparison.metrics[0]
    if metric not in comparison.metrics:
        raise ConfigError(f"--metric {metric} is in none of the runs.{did_you_mean(metric, comparison.metrics)}")
    if cost is not None and cost not in comparison.costs:
        raise ConfigError(f"--cost {cost} is in none of the runs.{did_you_mean(cost, comparison.costs)}")
    text = {
        ".html": lambda: comparison_html(comparison, metric, cost),
        ".md": lambda: comparison_markdown(comparison),
        ".txt": lambda: comparison_text(comparison),
        ".json": lambda: comparison.model_dump_json(indent=1) + "\n",
        ".svg": lambda: comparison_chart(comparison, metric, cost) + "\n",
    }
    for path in outputs:
        write_atomically(path, text[path.suffix]())
    typer.echo(comparison.model_dump_json() if as_json else comparison_text(comparison), nl=as_json)
