"""What is measured of a trained student, at both scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from setups import Setup

from tdistill.evaluation.divergence import divergences, teacher_loss_on
from tdistill.evaluation.generation import sample_answers
from tdistill.evaluation.rouge import rouge_l
from tdistill.evaluation.text import distinct_bigrams


def measure(setup: Setup, model: Any, seed: int) -> dict[str, float]:
    """Means over the held-out split.

    Returns:
        Per token of the teacher's answers: ``kl_teacher_student`` and ``nll`` (nats), ``agreement_top1``,
        ``mass_outside_set``. Of answers sampled from the student at temperature 1, untruncated:
        ``kl_student_teacher`` (E[log π_Q − log π*] per token, nats), ``distinct_2``. At the real scale, of answers
        truncated at top-p 0.8: ``rouge_l_teacher`` and ``rouge_l_reference`` (F1).
    """
    store = setup.stores["held_out"]
    rows = [store[i] for i in range(len(store))]
    vocab_size = len(setup.tokenizer)
    totals = divergences(setup.teacher.model, {"student": model}, rows, vocab_size=vocab_size)["student"]
    num_tokens = totals.num_tokens.sum()
    assert totals.mass_outside_set is not None
    found = {
        "kl_teacher_student": totals.kl_teacher_student.sum() / num_tokens,
        "nll": totals.nll.sum() / num_tokens,
        "agreement_top1": totals.agreement_top1.sum() / num_tokens,
        "mass_outside_set": totals.mass_outside_set.sum() / num_tokens,
    }
    prompts = setup.prompts("held_out")
    common: dict[str, Any] = {
        "end_token_ids": store.end_token_ids,
        "vocab_size": vocab_size,
        "max_new_tokens": setup.recipe.capture.max_new_tokens,
        "batch_size": 64,
    }
    ids = [prompt.prompt_ids for prompt in prompts]
    answers, _ = sample_answers(model, ids, **common, top_p=1.0, seed=seed)
    given = [answer.token_ids for answer in answers]
    own, count = (part.sum() for part in teacher_loss_on(model, ids, given, vocab_size=vocab_size))
    of_teacher = teacher_loss_on(setup.teacher.model, ids, given, vocab_size=vocab_size)[0].sum()
    distinct = np.array([distinct_bigrams(answer.token_ids) for answer in answers]).sum(0)
    found |= {"kl_student_teacher": (of_teacher - own) / count, "distinct_2": distinct[0] / max(distinct[1], 1)}
    if setup.reference_texts:
        found |= _rouge(setup, model, prompts, rows, common)
    return {name: float(value) for name, value in found.items()}


def _rouge(setup: Setup, model: Any, prompts: list[Any], rows: list[Any], common: dict[str, Any]) -> dict[str, float]:
    answers, _ = sample_answers(model, [p.prompt_ids for p in prompts], **common, top_p=0.8, seed=10)
    texts = [setup.tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in answers]
    teachers = {r.prompt_id: setup.tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rows}
    written = {record.prompt_id: record.references for record in setup.run.records("held_out")}
    pairs = [(text, prompt.prompt_id) for text, prompt in zip(texts, prompts, strict=True)]
    return {
        "rouge_l_teacher": float(np.mean([rouge_l(text, [teachers[name]]) for text, name in pairs])),
        "rouge_l_reference": float(np.mean([rouge_l(text, written[name]) for text, name in pairs])),
    }
