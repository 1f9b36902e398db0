"""What tdistill asks of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tdistill.types import PromptTokens, Trajectory

__all__ = ["Capability", "PromptTokens", "SamplingSettings", "Teacher"]

Capability = Literal["generate", "score", "logits"]


@dataclass(frozen=True)
class SamplingSettings:
    """How trajectories are drawn and how their action sets are cut.

    Attributes:
        p_max: mass of the recorded sets; every p <= p_max can be trained on later.
        max_actions: cap on the size of a set, or None.
        temperature: logits are divided by it before everything else.
        max_new_tokens: length limit of an answer, in tokens.
        seed: every random number is a function of (seed, prompt id, answer index, position) and nothing else.
    """

    p_max: float = 0.8
    max_actions: int | None = 64
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


class Teacher(Protocol):
    """A model that can be asked for answers or for action sets.

    ``capabilities`` says what this one can do: ``generate`` (sample answers from the truncated policy), ``score``
    (record the sets along given answers), ``logits`` (full logits, needed by evaluation only).
    """

    capabilities: frozenset[Capability]
    tokenizer: Any
    end_token_ids: tuple[int, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able facts that name this teacher: ``weights_sha256``, ``model_type``, ``vocab_size``, ``dtype``."""

    def generate(self, requests: Sequence[tuple[PromptTokens, int]], settings: SamplingSettings) -> list[Trajectory]:
        """Sample one answer per (prompt, answer index) as one batch.

        Raises:
            TeacherLogitsError: NaN or infinite logits; names the prompt.
        """

    def score(self, requests: Sequence[PromptTokens], settings: SamplingSettings) -> list[Trajectory]:
        """Record the sets along the given answers as one batch. A taken token outside its set is added at the end.

        Raises:
            TeacherLogitsError: NaN or infinite logits; names the prompt.
        """
