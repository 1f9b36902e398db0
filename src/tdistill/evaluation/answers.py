"""Sampled answers by prompt and seed, and their Rouge-L."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from tdistill.evaluation.generation import SampledAnswer, sample_answers
from tdistill.evaluation.kept import Kept
from tdistill.evaluation.records import EvaluationSettings
from tdistill.evaluation.rouge import has_words, rouge_l

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampler:
    """Samples answers from models, or takes those that an earlier evaluation left.

    Attributes:
        models: name → model.
        settings: name → how its answers are sampled.
        end_token_ids: any of these ends an answer.
        vocab_size: tokens of the tokenizer.
        kept: where answers are kept.
        progress: show bars.
    """

    models: Mapping[str, PreTrainedModel]
    settings: Mapping[str, EvaluationSettings]
    end_token_ids: Sequence[int]
    vocab_size: int
    kept: Kept
    progress: bool

    def __call__(
        self, name: str, prompts_ids: Sequence[np.ndarray], seeds: Sequence[int], where: str = ""
    ) -> list[list[SampledAnswer]]:
        """Answers of a model by prompt, inside it by seed; ``where`` stands on its bar."""
        how = {
            "end_token_ids": list(self.end_token_ids),
            "vocab_size": self.vocab_size,
            **self.settings[name].model_dump(include={"max_new_tokens", "temperature", "top_p", "batch_size"}),
        }

        def sample(seed: int) -> list[tuple[list[int], bool]]:
            label = f"{name}{where}, seed {seed}" if self.progress else None
            answers, _ = sample_answers(self.models[name], prompts_ids, seed=seed, progress=label, **how)
            return [(answer.token_ids.tolist(), answer.terminated) for answer in answers]

        asked = hashlib.sha256(json.dumps([ids.tolist() for ids in prompts_ids]).encode()).hexdigest()
        by_seed = [
            self.kept.get("answers", name, {**how, "prompts": asked, "seed": seed}, partial(sample, seed))
            for seed in seeds
        ]
        return [
            [SampledAnswer(np.array(token_ids, np.int32), terminated) for token_ids, terminated in row]
            for row in zip(*by_seed, strict=True)
        ]


def rouge_scores(
    answers: Mapping[str, Sequence[Sequence[SampledAnswer]]],
    references: Sequence[Sequence[str]],
    text: Callable[[SampledAnswer], str],
) -> dict[str, np.ndarray]:
    """Subject → Rouge-L F1 [prompts, answers]; where prompts have unequally many, [prompts, 1]: the mean of each."""
    unread = [texts for texts in references if any(texts) and not any(map(has_words, texts))]
    if unread:
        _log.warning(
            "Rouge-L reads words of a to z and 0 to 9 only; %d of %d references have none and score 0, for example %r.",
            len(unread),
            len(references),
            unread[0][0][:40],
        )
    found = {}
    for name, rows in answers.items():
        scores = [[rouge_l(text(answer), texts) for answer in row] for row, texts in zip(rows, references, strict=True)]
        unequal = len({len(row) for row in scores}) > 1
        found[name] = np.array([[np.mean(row)] for row in scores] if unequal else scores)
    return found
