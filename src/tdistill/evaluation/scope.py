"""What the records of one evaluation share."""

from __future__ import annotations

from dataclasses import dataclass

from tdistill.evaluation.bootstrap import Interval
from tdistill.evaluation.records import METRICS, OPTIONAL_METRICS, Result

TEACHER = "teacher"
"""Subject of the teacher's own numbers."""
LEVEL = 0.95
"""Confidence level of every interval."""


@dataclass(frozen=True)
class Scope:
    """What every record of one evaluation shares.

    Attributes:
        split: name of the prompt set.
        num_prompts: prompts in it.
        seed: of the resampling.
    """

    split: str
    num_prompts: int
    seed: int

    def record(self, metric: str, subject: str, interval: Interval, **fields: object) -> Result:
        """One record; ``fields`` stand for what is not shared."""
        unit, higher_is_better = (METRICS | OPTIONAL_METRICS)[metric]
        shared = {"split": self.split, "num_items": self.num_prompts, "level": LEVEL, "unit": unit}
        measured = {"metric": metric, "subject": subject, **interval._asdict(), "higher_is_better": higher_is_better}
        return Result.model_validate({**shared, **measured, **fields})
