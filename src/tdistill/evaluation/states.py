"""Distributions along given answers, a block of positions at a time: never a table of all positions × vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tdistill.errors import DataFileError, ModelLogitsError, TokenizerMismatchError, UnsupportedModelError
from tdistill.evaluation.batching import measured, pad
from tdistill.head import OutputHead, check_head, float32_logits, output_head

# Positions whose float32 distributions are held at once, per model.
_BLOCK = 256


def open_head(model: PreTrainedModel, name: str, vocab_size: int) -> OutputHead:
    """The output head of a model, after a check that it reproduces the model's own logits.

    Args:
        model: causal language model.
        name: what messages call it.
        vocab_size: tokens of the tokenizer.
    Raises:
        ModelLogitsError: the model gives NaN or infinite logits on a probe.
        UnsupportedModelError: the model changes its logits in a way that is not known.
        TokenizerMismatchError: fewer output tokens than the tokenizer has.
    """
    with measured(model):
        probe = torch.arange(1, 9, device=model.device)[None] % vocab_size
        if not torch.isfinite(model(input_ids=probe, use_cache=False).logits).all():
            raise ModelLogitsError(
                f"Model '{name}' gives NaN or infinite logits. If it was trained in this run, lower the learning "
                "rate; otherwise load it in float32."
            )
    try:
        check_head(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"Model '{name}': {error} Or leave out evaluation.exposure and evaluation.perplexity, which compute logits "
            "a block at a time."
        ) from error
    head = output_head(model)
    check_size(len(head.weight_VD), name, vocab_size)
    return head


def check_size(num_outputs: int, name: str, vocab_size: int) -> None:
    """Raise TokenizerMismatchError if a model has fewer output tokens than the tokenizer has."""
    if num_outputs < vocab_size:
        raise TokenizerMismatchError(
            f"Model '{name}' has {num_outputs} output tokens, fewer than the tokenizer's {vocab_size}. "
            "Load the tokenizer that it was trained with."
        )


def response_states(
    model: PreTrainedModel, pairs: Sequence[tuple[np.ndarray, np.ndarray]], own_logits: bool = False
) -> Tensor:
    """Final hidden states before each response token of one batch.

    Args:
        model: causal language model; only its body runs.
        pairs: prompt and response tokens, int [P] and [T] each.
        own_logits: run the whole model, and return its logits in place of the states.
    Returns:
        Float [N, D], answers one after another; logits [N, V].
    Raises:
        DataFileError: a prompt has no tokens.
    """
    if any(len(prompt) == 0 for prompt, _ in pairs):
        raise DataFileError("A prompt has no tokens, so its answer's first token has no state. Remove that prompt.")
    ids, mask = pad([np.concatenate(pair) for pair in pairs], pad_token_id=0, side="right")
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    first = min(len(prompt) for prompt, _ in pairs) - 1 if own_logits else 0
    with measured(model):
        if own_logits:
            kept = torch.arange(first, ids.shape[1] - 1, device=model.device)
            with float32_logits(model):
                hidden_BTD = model(**inputs, logits_to_keep=kept).logits
        else:
            hidden_BTD = model.base_model(**inputs).last_hidden_state
        rows = [
            hidden_TD[len(prompt) - 1 - first :][: len(response)]
            for hidden_TD, (prompt, response) in zip(hidden_BTD, pairs, strict=True)
        ]
        return torch.cat(rows)


def blocks(num_positions: int) -> Iterator[slice]:
    """Positions in blocks whose distributions may be held at once."""
    for start in range(0, num_positions, _BLOCK):
        yield slice(start, min(start + _BLOCK, num_positions))


@torch.inference_mode()
def log_probs(head: OutputHead, states_CD: Tensor, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over the first ``vocab_size`` tokens at the states of one block, at least float32 [C, V]."""
    return torch.log_softmax(head.logits(states_CD)[:, :vocab_size] / temperature, dim=-1)
