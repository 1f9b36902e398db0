"""Resampling of prompts and training seeds together, in NumPy alone.

Sums and means over one level of data have better intervals, see :mod:`tdistill.evaluation.bootstrap`; this is for
numbers that more than one source of chance enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 9_999
# Numbers of one block of resamples, which bounds the memory at some 10 MB a row whatever the number of prompts.
_BLOCK_ELEMENTS = 1_000_000


class Interval(NamedTuple):
    """A point estimate and its interval; low and high are None where the data define none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measured:
    """What was measured of one subject. R trainings, P prompts, S sampling seeds.

    Attributes:
        sums_RPS: float [R, P, S].
        counts_RP: what the sums are divided by, such as tokens, float [R, P]; ones for a mean over prompts.
    """

    sums_RPS: np.ndarray
    counts_RP: np.ndarray

    @property
    def value(self) -> float:
        """1/R Σ_r (Σ_p 1/S Σ_s sums_rps / Σ_p counts_rp)."""
        return float((self.sums_RPS.mean(2).sum(1) / self.counts_RP.sum(1)).mean())


def resample(rows: Sequence[Measured], seed: int) -> np.ndarray:
    """Values of resampled data, the same prompts for every row of one resample.

    P prompts are drawn with replacement, each with the answers to all of its S seeds, and for each row R − 1 of its
    trainings (one where there is one). Which trainings are drawn depends on the seed, the row's place and R alone, so
    that the same rows on several sets of prompts have the same trainings in one resample.

    Source: Davison & Hinkley 1997, Bootstrap Methods and their Application, section 3.8: of nested data the outer level
    alone is drawn, and carries the noise of the inner one; drawing seeds too would count it twice. Rao & Wu 1988,
    J. Am. Stat. Assoc. 83, 231, for R − 1, with which the variance of a mean over few trainings is not underestimated.

    Args:
        rows: with the same prompts in the same order.
        seed: seed of the resampling.
    Returns:
        Float [rows, resamples]; not finite where a resample has no counts.
    """
    num_prompts = rows[0].counts_RP.shape[1]
    # A stream of its own for each source of chance: one source's draws do not depend on what else is compared.
    draw_prompts = np.random.default_rng([seed, 0])
    trainings = []
    for index, row in enumerate(rows):
        num_trainings = len(row.counts_RP)
        shape = (max(num_trainings - 1, 1), NUM_RESAMPLES)
        trainings.append(np.random.default_rng([seed, 1, index]).integers(num_trainings, size=shape))
    values = np.empty((len(rows), NUM_RESAMPLES))
    block = max(1, _BLOCK_ELEMENTS // num_prompts)
    for first in range(0, NUM_RESAMPLES, block):
        size = min(block, NUM_RESAMPLES - first)
        prompt_BP = draw_prompts.integers(num_prompts, size=(size, num_prompts))
        for index, row in enumerate(rows):
            with np.errstate(divide="ignore", invalid="ignore"):
                value_RB = np.stack(
                    [
                        sums_P[prompt_BP].sum(1) / counts_P[prompt_BP].sum(1)
                        for sums_P, counts_P in zip(row.sums_RPS.mean(2), row.counts_RP, strict=True)
                    ]
                )
            drawn = trainings[index][:, first : first + size]
            values[index, first : first + size] = np.take_along_axis(value_RB, drawn, axis=0).mean(0)
    return values


def percentile_interval(value: float, resampled: np.ndarray, level: float) -> Interval:
    """Interval between two percentiles of resampled values, or none where a value is not finite."""
    if not np.isfinite(resampled).all():
        return Interval(value, None, None)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
