"""Seconds of a training step, against the transformer body alone and against what others run."""

from __future__ import annotations

from typing import Any

from tdistill.bench.peers import absent_peers
from tdistill.bench.steps import BD, build_head_step, build_step
from tdistill.bench.timing import interleaved_medians
from tdistill.bench.workload import Workload

PEERS = ("sft", "kd_live", "trl_chunked", "trl_gkd", "authors")
SMALL_VOCABULARY, LARGE_VOCABULARY, GEMMA_VOCABULARY = 2**15, 2**18, 262_144


def measure(workload: Workload, rounds: int = 5) -> dict[str, Any]:
    """Medians over ``rounds`` of everything in turns.

    Returns:
        ``body_s``, ``bd_s`` (cap 64), ``bd_uncapped_s``, ``bd_default_s``, ``sft_s``, ``kd_live_s``, ``trl_chunked_s``,
        ``trl_gkd_s``, ``authors_s``: forward and backward of one micro-batch, seconds; ``head``: of the output head
        alone; ``with_optimiser``: whole steps, by vocabulary; ``vocabulary``: body and BD at two sizes of it;
        ``absent``: peers that cannot run here, and why.
    """
    absent = absent_peers()
    names = ["body", *BD, *(name for name in PEERS if name not in absent)]
    steps = interleaved_medians({name: build_step(name, workload) for name in names}, rounds)
    head = interleaved_medians(
        {name: build_head_step(name, workload) for name in ("candidates", "default", "dense")}, rounds
    )
    own = workload.config.vocab_size
    found: dict[str, Any] = {f"{name}_s": seconds for name, seconds in steps.items()}
    found["head"] = {f"{name}_s": seconds for name, seconds in head.items()}
    found["with_optimiser"], found["vocabulary"] = {}, {}
    for size in (own, GEMMA_VOCABULARY):
        whole = {name: build_step(name, workload, vocab_size=size, optimiser=True) for name in ("bd_default", "sft")}
        found["with_optimiser"][str(size)] = _in_seconds(interleaved_medians(whole, rounds))
    for size in (SMALL_VOCABULARY, LARGE_VOCABULARY):
        grown = {name: build_step(name, workload, vocab_size=size) for name in ("body", "bd", "bd_default")}
        found["vocabulary"][str(size)] = _in_seconds(interleaved_medians(grown, rounds))
    return {**found, "absent": absent, "rounds": rounds}


def _in_seconds(medians: dict[str, float]) -> dict[str, float]:
    return {f"{name}_s": seconds for name, seconds in medians.items()}
