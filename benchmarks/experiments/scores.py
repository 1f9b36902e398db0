"""What is measured of a student, prompt by prompt, so that any two rows can be compared with paired intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from setups import Setup

from tdistill.evaluation.divergence import divergences
from tdistill.evaluation.generation import sample_answers
from tdistill.evaluation.rouge import rouge_l
from tdistill.evaluation.text import distinct_bigrams
from tdistill.types import PromptTokens

# As in the paper: temperature 1, top-p 0.8. Its five seeds are 10, 20, 30, 40 and 50.
TOP_P = 0.8


def on_teacher_answers(setup: Setup, model: Any) -> dict[str, list[float]]:
    """Sums over the tokens of each held-out prompt's answer by the teacher: KL(teacher‖student), loss, tokens."""
    store = setup.stores["held_out"]
    rows = [store[i] for i in range(len(store))]
    vocab_size = len(setup.tokenizer)
    total = divergences(setup.teacher.model, {"student": model}, rows, vocab_size=vocab_size)["student"]
    return {
        "kl_sum": _rounded(total.kl_teacher_student),
        "nll_sum": _rounded(total.nll),
        "agreement_sum": _rounded(total.agreement_top1),
        "num_tokens": [int(n) for n in total.num_tokens],
    }


def of_answers(
    setup: Setup,
    model: Any,
    prompts: list[PromptTokens],
    references: dict[str, tuple[str, ...]],
    teachers: dict[str, str],
    seeds: tuple[int, ...],
) -> dict[str, list[list[float]]]:
    """Of sampled answers, a list per seed, in it a number per prompt.

    Args:
        setup: its tokenizer and length limit.
        model: the student.
        prompts: rendered prompts.
        references: prompt id → texts by people.
        teachers: prompt id → the teacher's stored answer, or none.
        seeds: sampling seeds.
    Returns:
        ``rouge_l`` (F1 to the references), ``rouge_l_teacher`` (to the teacher's answer, where there are any),
        ``length`` (tokens), ``terminated`` (0 or 1) and ``distinct_2`` (share of the bigrams; 1 where there are none).
    """
    found: dict[str, list[list[float]]] = {}
    for seed in seeds:
        answers, _ = sample_answers(
            model,
            [prompt.prompt_ids for prompt in prompts],
            end_token_ids=setup.stores["train"].end_token_ids,
            vocab_size=len(setup.tokenizer),
            max_new_tokens=setup.recipe.capture.max_new_tokens,
            top_p=TOP_P,
            seed=seed,
            batch_size=64,
        )
        texts = {
            prompt.prompt_id: setup.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            for prompt, answer in zip(prompts, answers, strict=True)
        }
        measured = {
            "rouge_l": [rouge_l(text, references[name]) for name, text in texts.items()],
            "length": [float(len(answer.token_ids)) for answer in answers],
            "terminated": [float(answer.terminated) for answer in answers],
            "distinct_2": [_distinct(answer.token_ids) for answer in answers],
        }
        if teachers:
            measured["rouge_l_teacher"] = [rouge_l(text, [teachers[name]]) for name, text in texts.items()]
        for name, values in measured.items():
            found.setdefault(name, []).append(_rounded(np.array(values)))
    return found


def screening(setup: Setup, model: Any, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Everything that is measured on the screening prompts."""
    store = setup.stores["held_out"]
    rows = [store[i] for i in range(len(store))]
    teachers = {row.prompt_id: setup.tokenizer.decode(row.response_ids, skip_special_tokens=True) for row in rows}
    prompts = [PromptTokens(row.prompt_id, row.prompt_ids) for row in rows]
    references = {record.prompt_id: record.references for record in setup.run.records("held_out")}
    return on_teacher_answers(setup, model) | of_answers(setup, model, prompts, references, teachers, seeds)


def _distinct(token_ids: np.ndarray) -> float:
    distinct, total = distinct_bigrams(token_ids)
    return distinct / total if total else 1.0


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
