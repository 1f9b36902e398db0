"""The table of objectives. A new one is a file here, a row in this table, a test, a page and a recipe."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from importlib.metadata import EntryPoint, entry_points

import torch

from tdistill.errors import ConfigError, did_you_mean
from tdistill.objectives.alpha_beta import AlphaBeta
from tdistill.objectives.base import Objective
from tdistill.objectives.bellman_distill_authors import BellmanDistillAuthors
from tdistill.objectives.distillm2 import DistiLLM2
from tdistill.objectives.divergence import Divergence
from tdistill.objectives.forward_kl import ForwardKL
from tdistill.objectives.gkd import GKD
from tdistill.objectives.iq_learn import IQLearn
from tdistill.objectives.ls_iq import LSIQ
from tdistill.objectives.minillm import MiniLLM
from tdistill.objectives.off_support import OffSupport
from tdistill.objectives.path_consistency import PathConsistency
from tdistill.objectives.reverse_kl import ReverseKL
from tdistill.objectives.sampled_kl import SampledKL
from tdistill.objectives.sft import SFT
from tdistill.objectives.skew_kl import SkewKL
from tdistill.objectives.sqil import SQIL
from tdistill.objectives.teacher_q import TeacherQ
from tdistill.objectives.total_variation import TotalVariation
from tdistill.types import ActionStats, Ends

__all__ = [
    "OBJECTIVES",
    "SFT",
    "Divergence",
    "IQLearn",
    "Objective",
    "OffSupport",
    "check_full_support",
    "objective_class",
    "objective_names",
]

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        *(IQLearn, PathConsistency, SQIL, LSIQ, TeacherQ, BellmanDistillAuthors),
        *(SFT, ForwardKL, ReverseKL, GKD, SkewKL, DistiLLM2, AlphaBeta, TotalVariation, SampledKL, MiniLLM),
    )
}
# Other packages add theirs under this group: name = "module:Class".
ENTRY_POINT_GROUP = "tdistill.objectives"


def objective_names() -> list[str]:
    """Names of the table, and of the entry points of installed packages."""
    return sorted({*OBJECTIVES, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))})


def objective_class(name: str) -> type[Objective]:
    """Look an objective up by name, in the table and among entry points.

    Raises:
        ConfigError: no such objective (suggests the closest name), two of that name, or one that cannot be loaded.
    """
    found = list(entry_points(group=ENTRY_POINT_GROUP, name=name))
    if found and (name in OBJECTIVES or len(found) > 1):
        rivals = [entry.value for entry in found] + ([OBJECTIVES[name].__module__] if name in OBJECTIVES else [])
        raise ConfigError(f"Two objectives are called '{name}': {' and '.join(rivals)}. Rename one, or uninstall it.")
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if not found:
        raise ConfigError(f"Unknown objective '{name}'.{did_you_mean(name, objective_names())}")
    return _load(found[0])


def _load(entry: EntryPoint) -> type[Objective]:
    where = f"The objective '{entry.name}' ({entry.value}, from an installed package)"
    try:
        cls = entry.load()
    except Exception as error:  # whatever another package's import may raise
        raise ConfigError(f"{where} cannot be loaded: {error!r}. Repair that package, or uninstall it.") from error
    if not (isinstance(cls, type) and issubclass(cls, Objective) and is_dataclass(cls)):
        raise ConfigError(f"{where} is no dataclass derived from tdistill.objectives.Objective; see its documentation.")
    if getattr(cls, "name", None) != entry.name:
        raise ConfigError(f"{where} calls itself '{getattr(cls, 'name', None)}'. Give both the same name.")
    return cls


def check_full_support(objective: Objective) -> None:
    """Try the objective on one terminal transition at p = 1, where no sets are listed, before anything is trained.

    Raises:
        DomainError: the objective needs listed sets; says what to set.
    """
    one_N, first_N = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    one = ActionStats(
        offsets=torch.zeros(2, dtype=torch.int64),
        q_M=torch.zeros(0),
        log_prob_teacher_M=torch.zeros(0),
        q_taken_N=one_N,
        sequence_N=first_N,
        has_action_N=torch.ones(1, dtype=torch.bool),
        ends_N=first_N + Ends.TERMINAL,
        log_normaliser_N=one_N,
        value_N=one_N,
        full_support=True,
    )
    objective(replace(one, target=one))
