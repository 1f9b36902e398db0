"""Rouge-L to the references of further prompts, such as the three sets that the literature reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tdistill.errors import DataFileError
from tdistill.evaluation.answers import Sampler, rouge_scores
from tdistill.evaluation.bootstrap import bootstrap_mean, bootstrap_mean_difference
from tdistill.evaluation.generation import SampledAnswer
from tdistill.evaluation.records import AnswerScores, Result
from tdistill.evaluation.scope import LEVEL, Scope
from tdistill.prompts.read import Record, read_records
from tdistill.prompts.references import references_by_id
from tdistill.prompts.tokenise import Turns
from tdistill.types import PromptTokens


class PromptSet(NamedTuple):
    """Prompts, and texts by people: prompt id → references."""

    prompts: Sequence[PromptTokens]
    references: Mapping[str, Sequence[str]]


def read_prompt_set(name: str, source: str, turns: Turns) -> tuple[list[Record], dict[str, tuple[str, ...]]]:
    """Records of a set, and the references by prompt id.

    Args:
        name: of the set, for messages.
        source: file, ``package:NAME/FILE`` or data set name.
        turns: which assistant turns of a conversation count.
    Raises:
        DataFileError: unreadable, or a prompt has no reference.
    """
    records, where = read_records(source), f"{source} (evaluation.prompt_sets.{name})"
    references = references_by_id(records, where, turns=turns, scored=False)
    if references is None:
        raise DataFileError(f"{where}: no prompt has a reference answer. Add one to each under 'output'.")
    return records, references


def set_records(
    scope: Scope,
    sample: Sampler,
    prompt_sets: Mapping[str, PromptSet],
    seeds: Mapping[str, Sequence[int]],
    pairs: Sequence[tuple[str, str]],
    text: Callable[[SampledAnswer], str],
) -> tuple[list[Result], dict[str, AnswerScores]]:
    """Rouge-L of every subject on each set, with its paired difference of the pairs (subject, against); and by prompt.

    Args:
        scope: of the records; their split is the name of the set.
        sample: of all subjects.
        prompt_sets: name → set.
        seeds: subject → sampling seeds.
        pairs: whose differences are recorded.
        text: decodes an answer.
    """
    records, by_prompt = [], {}
    for name, (prompts, references) in prompt_sets.items():
        prompts_ids = [prompt.prompt_ids for prompt in prompts]
        answers = {subject: sample(subject, prompts_ids, of, f" on {name}") for subject, of in seeds.items()}
        scores = rouge_scores(answers, [references[prompt.prompt_id] for prompt in prompts], text)
        by_prompt[name] = AnswerScores(
            prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
            seeds={subject: tuple(of) for subject, of in seeds.items()},
            answer_scores={"rouge_l": {subject: found.round(6).tolist() for subject, found in scores.items()}},
        )
        shared = {"split": name, "num_items": len(prompts)}
        for subject, found in scores.items():
            interval = bootstrap_mean(found, scope.seed, LEVEL)
            records.append(scope.record("rouge_l", subject, interval, seeds=seeds[subject], **shared))
        for subject, against in dict.fromkeys(pairs):
            interval = bootstrap_mean_difference(scores[subject], scores[against], scope.seed, LEVEL)
            records.append(scope.record("rouge_l", subject, interval, seeds=seeds[subject], against=against, **shared))
    return records, by_prompt
