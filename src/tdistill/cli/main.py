"""The ``tdistill`` command."""

from __future__ import annotations

import errno
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tdistill.cli.bench import bench
from tdistill.cli.compare import compare
from tdistill.cli.output import require_folder
from tdistill.errors import NoSpaceError, TDistillError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a language model into a smaller one by temporal-difference imitation learning on the teacher's "
    "reduced action space.",
)
check = typer.Typer(no_args_is_help=True, help="Check stores, captures and the theory.")
app.add_typer(check, name="check")
app.add_typer(bench, name="bench")

RecipePath = Annotated[Path, typer.Argument(help="YAML recipe; recipes/ has complete ones.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: capture.p_max=0.9 output=runs/mine", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

DEMO_RECIPE = Path(__file__).parent.parent / "demo" / "recipe.yaml"


def _say(line: str) -> None:
    typer.echo(f"tdistill: {line}", err=True)


def _stage(recipe: Path, overrides: list[str] | None, dry_run: bool, work: Callable[[Any], None]) -> None:
    from tdistill.config import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        typer.echo(resolved.to_yaml(), nl=False)
        return
    from tdistill.pipeline import Run

    try:
        work(Run(resolved, _say))
    except KeyboardInterrupt:  # typer would end without a word
        typer.echo("\ninterrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


def _print_results(run: Any) -> None:
    from tdistill.reports.load import load_run
    from tdistill.reports.tables import terminal_table

    typer.echo(terminal_table(load_run(run.folder)))


def _whole_run(run: Any) -> None:
    report = run.run()
    _print_results(run)
    student = run.folder / "student"
    typer.echo(f"\nReport: {report}\nStudent: {student}. To load it:\n")
    typer.echo("    from transformers import pipeline")
    typer.echo(f'    pipe = pipeline("text-generation", model="{student}")')


@app.command()
def demo(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Distil SmolLM2-135M-Instruct into half of its layers, on the packaged prompts (10 to 14 minutes on 2 cores)."""
    _stage(DEMO_RECIPE, overrides, dry_run, _whole_run)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Capture, train, evaluate and report; started again it goes on where it stopped."""
    _stage(recipe, overrides, dry_run, _whole_run)


@app.command()
def capture(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Ask the teacher once: write the stores, and the student's start if it is made from the teacher."""
    _stage(recipe, overrides, dry_run, lambda run: run.capture())


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train every phase on finished stores; the teacher is needed only by phases with rollouts or with objectives that
    compare whole distributions."""
    _stage(recipe, overrides, dry_run, lambda run: run.train())


@app.command("eval")
def evaluate(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure teacher, start and trained phases on the held-out split."""

    def work(run: Any) -> None:
        run.evaluate()
        _print_results(run)

    _stage(recipe, overrides, dry_run, work)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
) -> None:
    """Write report.html and the model card again from a run's JSON files."""
    from tdistill.reports.card import write_model_card
    from tdistill.reports.html import write_report
    from tdistill.reports.load import load_run

    load_run(folder)  # of what is missing, names what comes first
    write_model_card(folder)
    typer.echo(str(write_report(folder)))


app.command()(compare)


@check.command("store")
def check_store(
    path: Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)], as_json: AsJson = False
) -> None:
    """Check a store against every rule of docs/store-format.md."""
    from tdistill.store import Store, verify_store

    problems = verify_store(path)
    if not problems:
        store = Store.open(path, verify=False)
        facts = {"answers": len(store), "response_tokens": store.total_response_tokens, "p_max": store.p_max}
    if as_json:
        typer.echo(json.dumps({"path": str(path), "problems": problems} | ({} if problems else facts)))
    else:
        typer.echo(
            "\n".join(problems) if problems else f"{path}: whole; " + ", ".join(f"{k} {v}" for k, v in facts.items())
        )
    raise typer.Exit(7 if problems else 0)


@check.command("sparsity")
def check_sparsity(
    path: Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)],
    as_json: AsJson = False,
    gamma: Annotated[float, typer.Option(help="Discount of the loss of value.")] = 0.99,
    plot: Annotated[Path | None, typer.Option(help="Write a figure to this SVG file.", show_default=False)] = None,
) -> None:
    """Show what each p, cap and budget keeps, loses and costs (docs/choosing-p.md)."""
    from tdistill.evaluation.sparsity import sparsity_study
    from tdistill.files import write_atomically
    from tdistill.reports.plots import sparsity_study_chart
    from tdistill.reports.sparsity import study_text
    from tdistill.store import Store

    if plot is not None:
        require_folder("--plot", plot)
    study = sparsity_study(Store.open(path), gamma)
    if plot is not None:
        write_atomically(plot, sparsity_study_chart(study) + "\n")
    typer.echo(json.dumps({"path": str(path), **study}) if as_json else f"{path}\n{study_text(study)}", nl=as_json)


@check.command("theory")
def check_theory(
    as_json: AsJson = False,
    processes: Annotated[int, typer.Option(help="Decision processes, and trees, that are solved.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the processes.")] = 0,
) -> None:
    """Check the claims of docs/theory.md on exact random processes; exit code 1 if one is violated."""
    from tqdm import tqdm

    from tdistill import tabular

    with tqdm(desc="processes", file=sys.stderr, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        claims = tabular.check_theory(processes, seed, show)
    if as_json:
        typer.echo(json.dumps(claims))
    else:
        for claim in claims:
            typer.echo(
                f"{claim['claim']}: {claim['violations']} violations in {claim['cases']} cases, worst margin "
                f"{claim['worst_margin']:.2e} (tolerance {claim['tolerance']:.1e})\n    {claim['statement']}"
            )
    raise typer.Exit(1 if any(claim["violations"] for claim in claims) else 0)


@check.command("batches")
def check_batches(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure which share of the teacher's answers changes with the batch size (sums of floats do)."""
    from tdistill.bench.batches import batch_size_effect
    from tdistill.config import load_recipe

    effect = batch_size_effect(load_recipe(recipe, overrides or []))
    typer.echo(json.dumps(effect) if as_json else "\n".join(f"{key}: {value}" for key, value in effect.items()))


@app.command("ls")
def list_known(
    what: Annotated[str, typer.Argument(help="objectives, recipes or runs")] = "objectives",
    folder: Annotated[Path | None, typer.Option(help="Where to look for recipes or runs.")] = None,
    as_json: AsJson = False,
) -> None:
    """List objectives with what they need (by default) and their settings, recipes, or runs."""
    from tdistill.cli.listing import listing

    rows = listing(what, folder)
    if not rows and not as_json:
        _say(f"no {what} in {folder or what}; --folder names another place")
    typer.echo(
        json.dumps(rows) + "\n" if as_json else "".join("  ".join(row.values()) + "\n" for row in rows), nl=False
    )


def main() -> None:
    """Run the command; a known error is one message and its exit code."""
    from transformers import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of reading weights, a second or two
    warnings.filterwarnings("ignore", module="torch.*")
    # Its new name is unknown to older releases that are supported.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    try:
        app()
    except TDistillError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        typer.echo(f"error: the disk is full ({error}). Make room; the same command goes on from here.", err=True)
        sys.exit(NoSpaceError.exit_code)
