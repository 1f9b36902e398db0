"""The table of objectives. A new one is a file here, a row in this table, a test, a page and a recipe."""

from __future__ import annotations

import torch

from tdistill.errors import ConfigError, did_you_mean
from tdistill.objectives.base import Objective
from tdistill.objectives.iq_learn import IQLearn
from tdistill.objectives.off_support import OffSupport
from tdistill.objectives.sft import SFT
from tdistill.types import ActionStats, Ends

__all__ = ["OBJECTIVES", "SFT", "IQLearn", "Objective", "OffSupport", "check_full_support", "objective_class"]


OBJECTIVES: dict[str, type] = {cls.name: cls for cls in (IQLearn, SFT)}


def objective_class(name: str) -> type:
    """Look an objective up by name.

    Raises:
        ConfigError: no such objective; suggests the closest name.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"Unknown objective '{name}'.{did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def check_full_support(objective: Objective) -> None:
    """Try the objective on one terminal transition at p = 1, where no sets are listed, before anything is trained.

    Raises:
        DomainError: the objective needs listed sets; says what to set.
    """
    one_N, first_N = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    objective(
        ActionStats(
            offsets=torch.zeros(2, dtype=torch.int64),
            q_M=torch.zeros(0),
            log_prob_teacher_M=torch.zeros(0),
            q_taken_N=one_N,
            sequence_N=first_N,
            has_action_N=torch.ones(1, dtype=torch.bool),
            ends_N=first_N + Ends.TERMINAL,
            log_normaliser_N=one_N,
            normaliser_support="vocabulary",
            value_N=one_N,
            full_support=True,
        )
    )
