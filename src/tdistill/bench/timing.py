"""Wall-clock times that can be compared: all candidates in one process, in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(work: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each candidate; every round runs all of them once, so that a drift of the machine hits all.

    Args:
        work: name → what to time.
        rounds: timed rounds.
        warmup: rounds before them that do not count.
    Returns:
        Name → seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(warmup + rounds):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
