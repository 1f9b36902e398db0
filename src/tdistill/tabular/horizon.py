"""An experiment, not a claim: how the errors of behaviour cloning and of χ²-BD grow with the horizon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from tdistill.errors import DomainError
from tdistill.tabular.processes import Floats
from tdistill.tabular.students import (
    HorizonProcess,
    ValueHead,
    draw_horizon_process,
    residual_form,
    rollout_measures,
    train_student,
)

HORIZONS = (8, 16, 32, 64, 128, 256, 512)
GROWTH_RANGES = ((8, 64), (64, 512))
"""Ranges of H over which a growth exponent is fitted."""
ALPHAS = (0.1, 1.0, 10.0, 100.0)
GAMMAS = (0.0, 0.9, 0.99)
"""At γ = 0 the χ² term links no two steps: what it does there is not temporal."""
STATIONARY_ALPHAS = (0.1, 1.0)
SETTINGS = (
    ("forgiving", "aliased"),
    ("forgiving", "low_rank"),
    ("unforgiving", "aliased"),
    ("unforgiving", "low_rank"),
)

_NO_ERROR = 1e-6  # nats
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Method:
    """A way of training: behaviour cloning (α = ∞), or χ²-BD."""

    alpha: float
    gamma: float
    head: ValueHead

    @property
    def name(self) -> str:
        """``bc``, or ``bd`` with its settings."""
        return "bc" if np.isinf(self.alpha) else f"bd alpha={self.alpha:g} gamma={self.gamma:g} {self.head}"


def default_methods() -> list[Method]:
    """Behaviour cloning first; χ²-BD at every α and γ; a stationary value head at the largest γ."""
    cloning = Method(np.inf, 0.0, "per_step")
    per_step = [Method(alpha, gamma, "per_step") for gamma in GAMMAS for alpha in ALPHAS]
    return [cloning, *per_step, *(Method(alpha, GAMMAS[-1], "stationary") for alpha in STATIONARY_ALPHAS)]


def measure_methods(process: HorizonProcess, methods: Sequence[Method], horizons: Sequence[int]) -> dict[str, Floats]:
    """Measures of every method at every horizon: names of :func:`rollout_measures` to float64 [methods, horizons].

    χ²-BD starts at the weights of behaviour cloning, as a second phase of training does.
    """
    found: dict[str, Floats] = {}
    for column, horizon in enumerate(horizons):
        cloned_FA = train_student(process, horizon)
        forms: dict[tuple[float, str], Floats] = {}
        for row, method in enumerate(methods):
            weights_FA = cloned_FA
            if np.isfinite(method.alpha):
                key = (method.gamma, method.head)
                if key not in forms:
                    forms[key] = residual_form(process, horizon, method.gamma, method.head)
                weights_FA = train_student(process, horizon, forms[key], method.alpha, cloned_FA)
            for name, value in rollout_measures(process, weights_FA, horizon).items():
                found.setdefault(name, np.empty((len(methods), len(horizons))))[row, column] = value
    return found


def growth_exponents(gaps_XH: Floats, horizons: Sequence[int], between: tuple[int, int]) -> Floats:
    """Slope of log gap against log H over the horizons within ``between``, [...]."""
    inside = (np.array(horizons) >= between[0]) & (np.array(horizons) <= between[1])
    log_horizon = np.log(np.array(horizons)[inside])
    centred = log_horizon - log_horizon.mean()
    return np.log(gaps_XH[..., inside]) @ centred / (centred @ centred)


def interval(values_X: Floats) -> list[float]:
    """Mean and the ends of its 95 % t-interval over independent processes."""
    mean, error = float(values_X.mean()), float(stats.sem(values_X))
    if error == 0.0:
        return [mean, mean, mean]
    low, high = stats.t.interval(_CONFIDENCE, len(values_X) - 1, loc=mean, scale=error)
    return [mean, float(low), float(high)]


def horizon_experiment(
    num_seeds: int = 20,
    seed: int = 0,
    settings: Sequence[tuple[str, str]] = SETTINGS,
    methods: Sequence[Method] | None = None,
    horizons: Sequence[int] = HORIZONS,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Growth of errors with the horizon, for behaviour cloning and χ²-BD on the same random processes.

    Args:
        num_seeds: random processes per setting, at least 2.
        seed: seed of all random numbers.
        settings: pairs of a kind of process and a kind of student.
        methods: ways of training; behaviour cloning must come first.
        horizons: values of H.
        progress: called with (processes done, processes in all).
    Returns:
        One object per setting and method: ``process``, ``student``, ``method``, ``alpha`` (None for behaviour
        cloning), ``gamma``, ``head``; ``means`` (of each of :func:`rollout_measures`, over processes, at each
        horizon); and for ``student_teacher`` and ``teacher_student``, each with mean and 95 % interval
        over processes: ``exponents`` for each of ``GROWTH_RANGES``, ``exponents_cloning_minus_this`` (paired) and
        ``log_ratio_to_cloning`` at each horizon. Exponents are left out where behaviour cloning has no error to grow.
    Raises:
        DomainError: fewer than two processes, or another method than behaviour cloning first.
    """
    methods = default_methods() if methods is None else methods
    if num_seeds < 2:
        raise DomainError(f"num_seeds = {num_seeds}: an interval needs at least 2 processes.")
    if not methods or np.isfinite(methods[0].alpha):
        raise DomainError("methods: behaviour cloning (alpha = inf) must come first; the others are compared with it.")
    rows = []
    for number, (kind, student) in enumerate(settings):
        measured = []
        for index in range(num_seeds):
            process = draw_horizon_process(np.random.default_rng([seed, 2, index]), kind, student)
            measured.append(measure_methods(process, methods, horizons))
            if progress is not None:
                progress(number * num_seeds + index + 1, len(settings) * num_seeds)
        found = {name: np.stack([values[name] for values in measured]) for name in measured[0]}
        rows += [
            {"process": kind, "student": student, **_summary(method, row, found, horizons)}
            for row, method in enumerate(methods)
        ]
    return rows


def _summary(method: Method, row: int, found: dict[str, Floats], horizons: Sequence[int]) -> dict[str, Any]:
    cloning = np.isinf(method.alpha)
    summary: dict[str, Any] = {
        "method": method.name,
        "alpha": None if cloning else method.alpha,
        "gamma": None if cloning else method.gamma,
        "head": None if cloning else method.head,
        "horizons": list(horizons),
        "means": {name: values[:, row].mean(0).tolist() for name, values in found.items()},
    }
    for name in ("student_teacher", "teacher_student"):
        own, cloned = found[name][:, row], found[name][:, 0]
        # What optimisation leaves of an error that can be 0 has no growth to speak of.
        if cloned.min() < _NO_ERROR:
            continue
        exponents = [growth_exponents(own, horizons, between) for between in GROWTH_RANGES]
        reference = [growth_exponents(cloned, horizons, between) for between in GROWTH_RANGES]
        summary[name] = {
            "exponents": [interval(slopes) for slopes in exponents],
            "exponents_cloning_minus_this": [
                interval(base - slopes) for base, slopes in zip(reference, exponents, strict=True)
            ],
            "log_ratio_to_cloning": [interval(column) for column in np.log(own / cloned).T],
        }
    return summary
