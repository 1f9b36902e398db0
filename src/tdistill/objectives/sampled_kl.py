"""Forward KL estimated from tokens that are sampled from the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdistill.errors import DomainError
from tdistill.objectives.divergence import Divergence


@dataclass(frozen=True)
class SampledKL(Divergence):
    """Σ_s Σ_v ŵ(v|s) log π*(v|s)/π_Q(v|s),  ŵ(v|s) the share of n draws from π*(·|s) that are v.

    E ŵ = π*, so value and gradient are unbiased estimates of ``forward_kl``'s, which those over the top k tokens alone
    are not. Draws come from torch's global generator.
    Source: Anshumann et al. 2025 (Sparse Logit Sampling), arXiv 2503.16870, §3.
    Differs from the source: tokens are drawn anew in each step from a teacher in memory, not once into a cache; at the
    teacher's own temperature.

    Attributes:
        source: ``teacher``; a store lists the likeliest tokens, not drawn ones.
        num_samples: n ≥ 1. The paper: 50.

    Raises:
        DomainError: n below 1.
    Reduces to: ``forward_kl`` as n grows.
    """

    name: ClassVar[str] = "sampled_kl"

    source: Literal["teacher"] = "teacher"
    num_samples: int = 50

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DomainError(f"sampled_kl: num_samples = {self.num_samples} must be at least 1. The paper uses 50.")

    def terms(self, log_probs_teacher: Tensor, log_probs_student: Tensor, from_student: Tensor) -> Tensor:
        """ŵ log π*/π_Q, for [C, V]: whole distributions along the last axis."""
        drawn = torch.multinomial(log_probs_teacher.exp(), self.num_samples, replacement=True)
        shares = torch.zeros_like(log_probs_teacher)
        shares.scatter_add_(-1, drawn, torch.full_like(drawn, 1.0, dtype=shares.dtype) / self.num_samples)
        return shares * (log_probs_teacher - log_probs_student)
