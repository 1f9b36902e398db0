"""What is measured of a student, prompt by prompt, so that any two rows can be compared with paired intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from setups import Setup

from tdistill.evaluation.divergence import kl_rows
from tdistill.evaluation.generation import sample_answers
from tdistill.evaluation.rouge import rouge_l
from tdistill.evaluation.states import blocks, log_probs, open_head, response_states
from tdistill.evaluation.text import distinct_bigrams
from tdistill.types import PromptTokens

# As in the paper: temperature 1, top-p 0.8. Its five seeds are 10, 20, 30, 40 and 50.
TOP_P = 0.8


def on_teacher_answers(setup: Setup, model: Any) -> dict[str, list[float]]:
    """Sums over the tokens of each held-out prompt's answer by the teacher: KL(teacher‖student), loss, tokens.

    The teacher's hidden states are kept between models; only its output head runs again.
    """
    pairs = setup.held_out_pairs
    vocab_size = len(setup.tokenizer)
    heads = [open_head(of, name, vocab_size) for name, of in (("teacher", setup.teacher.model), ("student", model))]
    sums = {name: np.zeros(len(pairs)) for name in ("kl_sum", "nll_sum", "agreement_sum")}
    for batch, teacher_ND in setup.held_out_states:
        states_ND = response_states(model, [pairs[i] for i in batch])
        taken_N = torch.from_numpy(np.concatenate([pairs[i][1] for i in batch]).astype(np.int64))
        answer_N = np.repeat(batch, [len(pairs[i][1]) for i in batch])
        for block in blocks(len(taken_N)):
            teacher_CV, student_CV = (
                log_probs(head, of[block], vocab_size) for head, of in zip(heads, (teacher_ND, states_ND), strict=True)
            )
            values = {
                "kl_sum": kl_rows(teacher_CV, student_CV),
                "nll_sum": -student_CV.gather(1, taken_N[block, None]).squeeze(1),
                "agreement_sum": (teacher_CV.argmax(-1) == student_CV.argmax(-1)).double(),
            }
            for name, value_C in values.items():
                sums[name] += np.bincount(answer_N[block], weights=value_C.double().numpy(), minlength=len(pairs))
    return {name: _rounded(of) for name, of in sums.items()} | {"num_tokens": [len(answer) for _, answer in pairs]}


def of_answers(
    setup: Setup,
    model: Any,
    prompts: list[PromptTokens],
    references: dict[str, tuple[str, ...]],
    teachers: dict[str, str],
    seeds: tuple[int, ...],
    top_p: float = TOP_P,
) -> dict[str, list[list[float]]]:
    """Of sampled answers, a list per seed, in it a number per prompt.

    Args:
        setup: its tokenizer and length limit.
        model: the student.
        prompts: rendered prompts.
        references: prompt id → texts by people.
        teachers: prompt id → the teacher's stored answer, or none.
        seeds: sampling seeds.
        top_p: mass of the sets that answers are sampled from.
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
            top_p=top_p,
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
    return on_teacher_answers(setup, model) | screened_answers(setup, model, seeds)


def screened_answers(
    setup: Setup, model: Any, seeds: tuple[int, ...], top_p: float = TOP_P
) -> dict[str, list[list[float]]]:
    """What is measured of sampled answers to the screening prompts."""
    store = setup.stores["held_out"]
    rows = [store[i] for i in range(len(store))]
    teachers = {row.prompt_id: setup.tokenizer.decode(row.response_ids, skip_special_tokens=True) for row in rows}
    prompts = [PromptTokens(row.prompt_id, row.prompt_ids) for row in rows]
    references = {record.prompt_id: record.references for record in setup.run.records("held_out")}
    return of_answers(setup, model, prompts, references, teachers, seeds, top_p)


def _distinct(token_ids: np.ndarray) -> float:
    distinct, total = distinct_bigrams(token_ids)
    return distinct / total if total else 1.0


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
