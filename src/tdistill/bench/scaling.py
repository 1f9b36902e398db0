"""How the time of a step grows with its tokens."""

from __future__ import annotations

from typing import Any

from scipy import stats

from tdistill.bench.steps import build_step
from tdistill.bench.timing import interleaved_medians
from tdistill.bench.workload import Workload

NUM_SEQUENCES = (2, 4, 8, 12, 16)


def measure(workload: Workload, rounds: int = 5) -> dict[str, Any]:
    """Median seconds of the default step by tokens, and the straight line through them.

    Returns:
        ``tokens``, ``step_s``, and of the least-squares line ``s_per_token``, ``intercept_s`` and ``r_squared``.
    """
    steps = {str(n): build_step("bd_default", workload, num_sequences=n) for n in NUM_SEQUENCES}
    seconds = interleaved_medians(steps, rounds)
    tokens = [int(n) * _tokens(workload) for n in seconds]
    return {
        "tokens": tokens,
        "step_s": list(seconds.values()),
        **line(tokens, list(seconds.values())),
        "rounds": rounds,
    }


def line(x: list[int], seconds: list[float]) -> dict[str, float]:
    """Least-squares line of seconds over x, and its R²."""
    fit = stats.linregress(x, seconds)
    return {"s_per_token": fit.slope, "intercept_s": fit.intercept, "r_squared": fit.rvalue**2}


def _tokens(workload: Workload) -> int:
    first = workload.trajectories[0]
    return len(first.prompt_ids) + len(first.response_ids)
