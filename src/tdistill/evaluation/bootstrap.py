"""Bootstrap intervals over prompts.

Prompts are the unit that is resampled: tokens of one answer, and answers of one prompt to several seeds, depend on
each other, so they are summed or averaged inside their prompt first. Intervals are bias-corrected and accelerated
(BCa; Efron 1987, J. Am. Stat. Assoc. 82, 171), which are closer to their level than percentile intervals for the
skewed ratios at hand.

A bootstrap of shares that are all the same, such as no right answer of 20, would say that the share is certain. They
get an exact interval instead, where the caller says that the data are shares.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from tdistill.resampling import NUM_RESAMPLES, Interval

# Elements of one block of resamples, which bounds the memory at some 10 MB whatever the number of prompts.
_BLOCK_ELEMENTS = 1_000_000
# Leaving any prompt out moves a statistic of constant data by rounding only. The acceleration of BCa is 0/0 there.
_CONSTANT_RTOL, _CONSTANT_ATOL = 1e-12, 1e-15


def bootstrap_mean(values_items: ArrayLike, seed: int, level: float = 0.95, *, shares: bool = False) -> Interval:
    """Mean over prompts and its interval.

    Args:
        values_items: float [prompts], or [prompts, seeds]: seeds are averaged inside each prompt.
        seed: seed of the resampling.
        level: confidence level.
        shares: the values are shares of yes-or-no items, in [0, 1].
    Returns:
        Constant data give low = high = value, and with ``shares`` an exact interval; a single prompt gives none.
    """
    return _mean(_per_prompt(values_items, np.mean), seed, level, (0.0, 1.0) if shares else None)


def bootstrap_ratio(sums_items: ArrayLike, counts_items: ArrayLike, seed: int, level: float = 0.95) -> Interval:
    """Ratio of sums and its interval: a mean per token over prompts of unequal length.

    Σ_i sums_i / Σ_i counts_i, prompts i resampled.

    Args:
        sums_items: float [prompts] or [prompts, seeds]: seeds are summed inside each prompt.
        counts_items: the same shape; its sum is not 0.
        seed: seed of the resampling.
        level: confidence level.
    """
    sums, counts = _per_prompt(sums_items, np.sum), _per_prompt(counts_items, np.sum)

    def ratio(s: np.ndarray, c: np.ndarray, axis: int = -1) -> np.ndarray:
        return s.sum(axis) / c.sum(axis)

    return _interval((sums, counts), ratio, _ratios_left_out(sums, counts), seed, level)


def bootstrap_mean_difference(
    a_items: ArrayLike, b_items: ArrayLike, seed: int, level: float = 0.95, *, shares: bool = False
) -> Interval:
    """Mean paired difference a − b over the same prompts; arguments as in :func:`bootstrap_mean`."""
    differences = _per_prompt(a_items, np.mean) - _per_prompt(b_items, np.mean)
    return _mean(differences, seed, level, (-1.0, 1.0) if shares else None)


def bootstrap_ratio_difference(
    sums_a: ArrayLike, counts_a: ArrayLike, sums_b: ArrayLike, counts_b: ArrayLike, seed: int, level: float = 0.95
) -> Interval:
    """Paired difference Σ sums_a / Σ counts_a − Σ sums_b / Σ counts_b over the same prompts, resampled together."""
    data = tuple(_per_prompt(items, np.sum) for items in (sums_a, counts_a, sums_b, counts_b))

    def difference(sa: np.ndarray, ca: np.ndarray, sb: np.ndarray, cb: np.ndarray, axis: int = -1) -> np.ndarray:
        return sa.sum(axis) / ca.sum(axis) - sb.sum(axis) / cb.sum(axis)

    left_out = _ratios_left_out(*data[:2]) - _ratios_left_out(*data[2:])
    return _interval(data, difference, left_out, seed, level)


def bootstrap_weighted(
    statistic: Callable[[np.ndarray], np.ndarray], left_out: np.ndarray, seed: int, level: float = 0.95
) -> Interval:
    """Any statistic of the prompts and its interval.

    Args:
        statistic: float [R, prompts], how often each prompt counts in each of R resamples → float [R].
        left_out: the statistic of all prompts but one, for each, float [prompts].
        seed: seed of the resampling.
        level: confidence level.
    """

    num_prompts = len(left_out)

    def of_indices(index: np.ndarray, axis: int = -1) -> np.ndarray:
        rows_RN = index.astype(np.int64).reshape(-1, index.shape[-1])
        cells = rows_RN + num_prompts * np.arange(len(rows_RN))[:, None]
        counts = np.bincount(cells.ravel(), minlength=len(rows_RN) * num_prompts)
        return statistic(counts.reshape(len(rows_RN), num_prompts).astype(np.float64)).reshape(index.shape[:-1])

    return _interval((np.arange(num_prompts),), of_indices, left_out, seed, level)


def _ratios_left_out(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ratio of all prompts but one, for each; NaN where the others have no counts."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums.sum() - sums) / (counts.sum() - counts)


def _per_prompt(items: ArrayLike, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    values = np.asarray(items, dtype=np.float64)
    return values if values.ndim == 1 else reduce(values, axis=1)


def _mean(values: np.ndarray, seed: int, level: float, bounds: tuple[float, float] | None) -> Interval:
    if bounds is not None and len(values) > 1 and np.ptp(values) == 0:
        return _interval_of_equals(float(values[0]), len(values), level, bounds)
    return bootstrap_ratio(values, np.ones_like(values), seed, level)


def _interval_of_equals(value: float, num_items: int, level: float, bounds: tuple[float, float]) -> Interval:
    """Interval of the mean of items in [low, high], n of which were seen and all had one value.

    With confidence (1 + level)/2 at most q = 1 − ((1 − level)/2)^(1/n) of all items have another value, each of them
    at most at a bound: value − q (value − low), value + q (high − value).  Source: at 0 and 1 of [0, 1] it is the exact
    interval of Clopper & Pearson 1934, Biometrika 26, 404.
    Differs from the source: the same argument for values between the bounds, such as ties alone.
    """
    low, high = bounds
    others = 1 - ((1 - level) / 2) ** (1 / num_items)
    return Interval(value, value - others * (value - low), value + others * (high - value))


def _interval(
    data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], left_out: np.ndarray, seed: int, level: float
) -> Interval:
    value = float(statistic(*data))
    num_prompts = len(left_out)
    if num_prompts < 2:
        return Interval(value, None, None)
    if np.allclose(left_out, value, rtol=_CONSTANT_RTOL, atol=_CONSTANT_ATOL):
        return Interval(value, value, value)
    # What cannot be computed shows as NaN and is answered below.
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        # SciPy's own BCa leaves each prompt out of a copy of the data, which is quadratic in their number.
        resampled = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=NUM_RESAMPLES,
            batch=max(1, _BLOCK_ELEMENTS // num_prompts),
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
        quantiles = _bca_quantiles(value, resampled, left_out, level)
        low, high = np.quantile(resampled, quantiles) if np.isfinite(quantiles).all() else (np.nan, np.nan)
    if not (np.isfinite(low) and np.isfinite(high)):
        return Interval(value, None, None)
    return Interval(value, float(low), float(high))


def _bca_quantiles(value: float, resampled: np.ndarray, left_out: np.ndarray, level: float) -> np.ndarray:
    """Which quantiles of the resampled values end the interval.

    Φ(z + (z + z_α) / (1 − a (z + z_α))) for α = (1 ∓ level)/2, the bias z = Φ⁻¹(share of resampled values below the
    value), the acceleration a = Σ_i d_i³ / (6 (Σ_i d_i²)^{3/2}), d_i = mean of left_out − left_out_i.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sections 14.3 and 15.4.
    Differs from the source: resampled values that equal the value count half, as in SciPy.
    """
    bias = special.ndtri((np.mean(resampled < value) + np.mean(resampled <= value)) / 2)
    away = left_out.mean() - left_out
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    shifted = bias + special.ndtri([(1 - level) / 2, (1 + level) / 2])
    return special.ndtr(bias + shifted / (1 - acceleration * shifted))
