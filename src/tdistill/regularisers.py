"""Concave regularisers φ of the recovered reward, each with its scale and its continuation by a tangent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tdistill.errors import DomainError

PhiName = Literal["chi2", "reverse_kl", "hellinger", "jensen_shannon", "total_variation", "identity"]

# Slope beyond which a φ with a pole or an exponential goes on by its tangent, unless told otherwise.
_MAX_SLOPE = 4.0
# Half-width of the interval on which the total-variation type is linear with slope 1, in units of the scale.
_TV_HALF_WIDTH = 0.5


class _Phi(NamedTuple):
    """Base form at scale 1: the function, and the x at which its slope has a given value (None: no continuation)."""

    value: Callable[[Tensor], Tensor]
    at_slope: Callable[[float], float] | None
    default_max_slope: float | None


# φ(0) = 0 and φ'(0) = 1 in each.  Source: Garg et al. 2021 (arXiv 2106.12142), normalised.
_PHIS: dict[str, _Phi] = {
    "chi2": _Phi(lambda x: x - x.square() / 4, lambda slope: 2 * (1 - slope), None),
    "reverse_kl": _Phi(lambda x: -torch.expm1(-x), lambda slope: -math.log(slope), _MAX_SLOPE),
    "hellinger": _Phi(lambda x: x / (1 + x), lambda slope: slope**-0.5 - 1, _MAX_SLOPE),
    "jensen_shannon": _Phi(
        lambda x: torch.log1p(-torch.expm1(-x)), lambda slope: -math.log(2 * slope / (1 + slope)), _MAX_SLOPE
    ),
    "identity": _Phi(lambda x: x, None, None),
}


@dataclass(frozen=True)
class Regulariser:
    """φ_c(x) = c·φ(x/c) for x ≥ x₀, and its tangent φ_c(x₀) + φ_c'(x₀)(x − x₀) below, where φ_c'(x₀) = max_slope.

    ==================  =======================================  ==============  ==========================
    name                φ                                        domain          source
    ==================  =======================================  ==============  ==========================
    chi2                x − x²/4 (scale α gives x − x²/(4α))     all x           arXiv 2505.20335, §4
    reverse_kl          1 − e^{−x}                               all x           arXiv 2106.12142
    hellinger           x/(1 + x)                                x > −1          arXiv 2106.12142
    jensen_shannon      log(2 − e^{−x})                          x > −log 2      arXiv 2106.12142
    total_variation     slope 1 on |x| ≤ ½, 1+λ below, 1−λ above all x           arXiv 2106.12142
    identity            x                                        all x           behaviour cloning
    ==================  =======================================  ==============  ==========================

    Differs from the source: φ(0) = 0 and φ'(0) = 1 for all; the scale; the tangent, which keeps φ concave and defined
    for every reward; the total-variation type has a slope where the source has a constraint.

    Attributes:
        name: which φ.
        scale: c > 0, in nats; ``inf`` turns every φ into the identity.
        max_slope: slope above 1 at which the tangent takes over; None for the φ's own (4, none for ``chi2``).
        tv_slope: λ of the total-variation type, in [0, 1].

    Raises:
        DomainError: a field outside its domain.
    """

    name: PhiName = "chi2"
    scale: float = 1.0
    max_slope: float | None = None
    tv_slope: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in get_args(PhiName):
            raise DomainError(f"phi = '{self.name}' is unknown. Known: {', '.join(get_args(PhiName))}.")
        if not self.scale > 0:
            raise DomainError(f"The scale of phi, alpha = {self.scale}, must be positive; use .inf for the identity.")
        if self.max_slope is not None and not self.max_slope > 1:
            raise DomainError(f"max_slope = {self.max_slope} must be above 1, the slope of phi at 0.")
        if not 0 <= self.tv_slope <= 1:
            raise DomainError(f"tv_slope = {self.tv_slope} is outside [0, 1].")

    @property
    def is_identity(self) -> bool:
        """Whether φ(x) = x."""
        return self.name == "identity" or math.isinf(self.scale)

    @property
    def _slope(self) -> float | None:
        return self.max_slope or _PHIS[self.name].default_max_slope

    @property
    def tangent_point(self) -> float:
        """x₀ in nats; −inf where φ has no continuation."""
        if self.is_identity or self.name == "total_variation":
            return -math.inf
        phi = _PHIS[self.name]
        slope = self._slope
        return -math.inf if slope is None or phi.at_slope is None else self.scale * phi.at_slope(slope)

    def __call__(self, x_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return φ_c(x), float [N], and where the tangent is in use, bool [N]."""
        if self.is_identity:
            return x_N, torch.zeros_like(x_N, dtype=torch.bool)
        if self.name == "total_variation":
            bent_N = (x_N.abs() - self.scale * _TV_HALF_WIDTH).clamp(min=0)
            return x_N - self.tv_slope * bent_N, torch.zeros_like(x_N, dtype=torch.bool)
        scaled_N = x_N / self.scale
        phi, lowest = _PHIS[self.name], self.tangent_point
        if lowest == -math.inf:
            return self.scale * phi.value(scaled_N), torch.zeros_like(x_N, dtype=torch.bool)
        below_N = x_N < lowest
        on_curve_N = self.scale * phi.value(scaled_N.clamp(min=lowest / self.scale))
        return on_curve_N + torch.where(below_N, (self._slope or 1.0) * (x_N - lowest), torch.zeros_like(x_N)), below_N
