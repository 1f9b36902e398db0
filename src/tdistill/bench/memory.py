"""Peak memory of a training step, on the GPU where there is one, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tdistill.bench.steps import build_step
from tdistill.bench.workload import Workload

STEPS = ("body", "bd", "bd_default", "sft")


VOCABULARIES = (2**15, 49_152, 2**17)


def measure(workload: Workload, rounds: int = 5, vocab_sizes: Sequence[int] = VOCABULARIES) -> dict[str, Any]:
    """Median peak of the memory over ``rounds`` processes, bytes, by vocabulary and step.

    On a GPU what PyTorch has allocated there, else the resident memory of the process.

    Two steps without an optimiser, so that what is compared is what a step allocates on top of model and gradients.
    """
    found: dict[str, Any] = {}
    for size in vocab_sizes:
        found[str(size)] = {
            f"{name}_bytes": statistics.median(_peak_bytes(name, workload, size) for _ in range(rounds))
            for name in STEPS
        }
    return {"vocabulary": found, "rounds": rounds}


def _peak_bytes(name: str, workload: Workload, vocab_size: int) -> int:
    return in_own_process(_run, name, workload, vocab_size)


def _run(name: str, workload: Workload, vocab_size: int) -> int:
    step = build_step(name, workload, vocab_size=vocab_size)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def in_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """Result of a function in a fresh process; an error if the process dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of a fresh process starts at its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
