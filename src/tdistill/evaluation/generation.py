"""Answers sampled from a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tdistill.actions import check_p, sample_from_sets, top_p_sets
from tdistill.errors import DomainError, ModelLogitsError
from tdistill.evaluation.batching import length_sorted, measured, pad
from tdistill.head import float32_logits


@dataclass(frozen=True)
class SampledAnswer:
    """One answer.

    Attributes:
        token_ids: int32 [T], cut at the first end token, which is included.
        terminated: an end token was produced within the length limit.
    """

    token_ids: np.ndarray
    terminated: bool


class _TopPSampler(LogitsProcessor):
    """Leave one token per row: the one that a given uniform number draws from the row's top-p set.

    Sorting the whole vocabulary, as the warpers of transformers do, takes more than half of the decoding time on a CPU.
    """

    def __init__(self, uniform_BT: np.ndarray, prompt_width: int, top_p: float, temperature: float, vocab_size: int):
        self.uniform_BT, self.prompt_width, self.vocab_size = uniform_BT, prompt_width, vocab_size
        self.top_p, self.temperature = top_p, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ModelLogitsError(
                "The model returned NaN logits while it answered. Lower the learning rate, or load float32."
            )
        sets = top_p_sets(scores[:, : self.vocab_size], self.top_p, temperature=self.temperature)
        token_B = sample_from_sets(sets, self.uniform_BT[:, input_ids.shape[1] - self.prompt_width])
        index_B1 = torch.from_numpy(token_B).to(scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, index_B1, 0.0)


def sample_answers(
    model: PreTrainedModel,
    prompts_ids: Sequence[np.ndarray],
    *,
    end_token_ids: Sequence[int],
    vocab_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 0.8,
    seed: int,
    batch_size: int = 16,
    progress: str | None = None,
) -> tuple[list[SampledAnswer], float]:
    """Sample one answer to each prompt from the model's top-p policy.

    a_t ~ proj_p π(·|s_t).  Source: arXiv 2505.20335, evaluation (temperature 1, top-p 0.8, no top-k).

    Every random number is a function of (seed, tokens of the prompt, position) and nothing else. An answer therefore
    does not depend on the batch that its prompt is in, as far as the model's logits do not (they differ by rounding),
    and two models answer with common random numbers, which narrows paired differences.

    Args:
        model: a causal language model; the model folder's own generation settings are not used.
        prompts_ids: int [P] each, template applied. Equal prompts get equal answers.
        end_token_ids: any of these ends an answer.
        vocab_size: tokens of the tokenizer; rows of a padded output matrix beyond it are never drawn.
        max_new_tokens: length limit, tokens.
        temperature: logits are divided by it first.
        top_p: mass of the sets, in (0, 1].
        seed: non-negative.
        batch_size: prompts decoded together.
        progress: label of a progress bar, or None for no bar.
    Returns:
        Answers in the order of the prompts, and tokens of answers per second, reading of the prompts included.
    Raises:
        DomainError: temperature is not positive.
        ProbabilityRangeError: top_p outside (0, 1].
        ModelLogitsError: NaN logits.
    """
    check_p(top_p, "top_p")
    if not temperature > 0:
        raise DomainError(
            f"temperature = {temperature} is not positive. Use 1, or a small top_p for the likeliest token."
        )
    answers: dict[int, SampledAnswer] = {}
    num_tokens, start = 0, time.perf_counter()
    bar = tqdm(total=len(prompts_ids), desc=progress, unit="answer", disable=progress is None)
    with measured(model), float32_logits(model), bar:
        for batch in length_sorted([len(ids) for ids in prompts_ids], batch_size):
            prompts = [prompts_ids[index] for index in batch]
            uniform_BT = np.stack(
                [np.random.default_rng([seed, *map(int, ids)]).random(max_new_tokens) for ids in prompts]
            )
            width = max(len(ids) for ids in prompts)
            sampler = _TopPSampler(uniform_BT, width, top_p, temperature, vocab_size)
            for index, row in zip(batch, decode(model, prompts, end_token_ids, max_new_tokens, sampler), strict=True):
                is_end = np.isin(row, end_token_ids)
                length = int(is_end.argmax()) + 1 if is_end.any() else len(row)
                answers[int(index)] = SampledAnswer(row[:length].astype(np.int32), bool(is_end.any()))
                num_tokens += length
            bar.update(len(batch))
            bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s")
    return [answers[index] for index in range(len(prompts_ids))], num_tokens / (time.perf_counter() - start)


def decode(
    model: PreTrainedModel,
    prompts_ids: Sequence[np.ndarray],
    end_token_ids: Sequence[int],
    max_new_tokens: int,
    processor: LogitsProcessor | None = None,
) -> np.ndarray:
    """Decode one batch with ``transformers``, the likeliest token each time after ``processor``.

    Call it inside :func:`~tdistill.evaluation.batching.measured`.

    Returns:
        int64 [B, steps]; what follows the first end token of a row is padding.
    """
    # An end token may serve as padding: the mask hides it in the prompt, and rows are cut at their first end token.
    pad_token_id = end_token_ids[0] if end_token_ids else 0
    ids, mask = pad(prompts_ids, pad_token_id, side="left")
    generated = model.generate(  # type: ignore[operator]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_token_ids) or None,
            pad_token_id=pad_token_id,
        ),
        logits_processor=LogitsProcessorList([processor] if processor else []),
    )
    return generated[:, ids.shape[1] :].cpu().numpy()
