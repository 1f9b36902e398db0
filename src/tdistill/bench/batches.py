"""Whether answers depend on the size of the batch that they are drawn in."""

from __future__ import annotations

from typing import Any

from tdistill.config import Recipe
from tdistill.models import load_teacher
from tdistill.prompts import choose_template, read_records, tokenize_prompts


def batch_size_effect(
    recipe: Recipe, num_prompts: int = 64, batch_sizes: tuple[int, ...] = (1, 8, 32)
) -> dict[str, Any]:
    """Share of sampled answers that differ between batch sizes: sums of floats depend on the shape of a batch.

    Returns:
        ``num_answers``, ``batch_sizes`` and ``changed_share``, the share of answers that are not the same in all.
    """
    teacher = load_teacher(recipe.teacher)
    data, capture = recipe.data, recipe.capture
    prompts = tokenize_prompts(
        read_records(data.train, data.train_split, data.train_config)[:num_prompts],
        teacher.tokenizer,
        choose_template(teacher.tokenizer, data.template, data.template_kwargs),
        end_token_ids=teacher.end_token_ids,
        max_prompt_tokens=data.max_prompt_tokens,
        max_new_tokens=capture.max_new_tokens,
        turns=data.turns,
        too_long=data.too_long,
    )
    answers = []
    for size in batch_sizes:
        batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        drawn = [t for batch in batches for t in teacher.generate([(p, 0) for p in batch], capture.sampling())]
        answers.append([trajectory.response_ids.tolist() for trajectory in drawn])
    changed = sum(len({str(row) for row in rows}) > 1 for rows in zip(*answers, strict=True))
    return {"num_answers": len(prompts), "batch_sizes": list(batch_sizes), "changed_share": changed / len(prompts)}
