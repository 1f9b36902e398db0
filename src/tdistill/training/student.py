"""Teach a Hugging Face causal language model to answer with action statistics instead of logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tdistill.errors import UnsupportedModelError
from tdistill.head import check_head, output_head
from tdistill.kernels.chunked import normaliser_and_argmax, normaliser_and_pairs
from tdistill.kernels.dense import Terms, dense_sums, shared_tokens
from tdistill.kernels.dispatch import Support, student_statistics

VALUE_HEAD = "value_head"


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher in memory, and what is made of its distribution and the student's at each position.

    Attributes:
        model: causal language model with the student's tokenizer.
        terms: summand over the tokens.
        num_tokens: tokens of the tokenizer, or None for all that both models have.
    """

    model: PreTrainedModel
    terms: Terms
    num_tokens: int | None = None

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states at the packed positions, [N, E]; plain text, which comes last, is not read."""
        answers = slice(int(inputs["sequence_N"][-1]) + 1)
        hidden_BTE = self.model.base_model(
            input_ids=inputs["input_ids"][answers], attention_mask=inputs["attention_mask"][answers], use_cache=False
        ).last_hidden_state
        return hidden_BTE.to(inputs["input_ids"].device).flatten(0, 1)[inputs["position_index_N"]]


def add_value_head(model: PreTrainedModel) -> None:
    """Give the model a scalar linear head on its last hidden state, zero at start; dropped at export."""
    width = model.get_output_embeddings().in_features
    head = nn.Linear(width, 1, device=model.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module(VALUE_HEAD, head)


def add_adapter(model: PreTrainedModel, peft_config: Any) -> Any:
    """Return the model in PEFT's wrapper, its value head, if it has one, trained beside the adapter.

    Raises:
        UnsupportedModelError: the adapter makes an output layer that is not read, or parts it from the input embedding.
    """
    from peft import get_peft_model

    if hasattr(model, VALUE_HEAD):
        extra = [*(peft_config.modules_to_save or []), VALUE_HEAD]
        peft_config = replace(peft_config, modules_to_save=extra)
    shared = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = get_peft_model(model, peft_config)
    output_head(model)
    if model.config.get_text_config().tie_word_embeddings and shared != (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    ):
        raise UnsupportedModelError(
            f"The adapter changes the output matrix of {type(model).__name__}, which is its input embedding too. "
            "Leave both out of target_modules and modules_to_save, or untie them (tie_word_embeddings: false)."
        )
    return adapted


def attach_statistics(
    model: PreTrainedModel,
    *,
    support: Support | None,
    q_max: bool = False,
    kernel: Literal["candidates", "reference"] = "candidates",
    teacher: LiveTeacher | None = None,
) -> None:
    """Let this instance's forward return statistics when it is given packed positions.

    The forward of the instance is replaced, not of the class, and the model stays what it is: wrappers (DDP, FSDP,
    PEFT) call it through their own forward, so that their hooks fire and the head is gathered when it is read.
    Without ``position_index_N`` the original forward runs (generation).

    Args:
        model: causal language model, not wrapped.
        support: tokens of the log-normaliser in training mode.
        q_max: whether to return the largest logit over the vocabulary in training mode.
        kernel: see :func:`tdistill.kernels.dispatch.student_statistics`.
        teacher: in training mode, ``divergence_N`` and the log-normaliser are then those of
            :func:`tdistill.kernels.dense.dense_sums`, from its hidden states ``teacher_hidden_NE`` in the inputs.
    Raises:
        UnsupportedModelError: the head would be computed wrongly.
    """
    check_head(model)
    original = model.forward

    # Generation decides by the signature whether to pass attention masks and position ids.
    @wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        if "position_index_N" not in inputs:
            return original(*args, **inputs)
        # A slow copy is asked for values only: of the sets, or at p = 1 of the whole vocabulary.
        for_targets = inputs.get("for_targets", False)
        wanted = support if self.training or (for_targets and not len(inputs["action_ids_M"])) else None
        hidden = self.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state.flatten(0, 1)
        head = output_head(self)
        hidden_ND = hidden[inputs["position_index_N"]]
        out = student_statistics(
            hidden_ND,
            head,
            offsets=inputs["offsets"],
            action_ids_M=inputs["action_ids_M"],
            taken_N=inputs["taken_N"],
            support=wanted,
            q_max=q_max and self.training,
            kernel=kernel,
        )
        if teacher is not None and self.training:
            out["divergence_N"], out["log_normaliser_N"] = dense_sums(
                hidden_ND,
                head,
                inputs["teacher_hidden_NE"],
                output_head(teacher.model),
                inputs["from_student_N"],
                teacher.terms,
                teacher.num_tokens,
            )
        value_head = getattr(self, VALUE_HEAD, None)
        if value_head is not None:
            # In float32 at least, also where a wrapper has cast its weights: values are differences of such.
            wide = torch.promote_types(next(value_head.parameters()).dtype, torch.float32)
            weights = {name: parameter.to(wide) for name, parameter in value_head.named_parameters()}
            with torch.autocast(hidden_ND.device.type, enabled=False):
                out["value_N"] = functional_call(value_head, weights, hidden_ND.to(wide)).squeeze(-1)
        if not self.training and not for_targets:
            if teacher is not None:  # the tokens that training normalises over
                head = head.first(shared_tokens(head, output_head(teacher.model), teacher.num_tokens))
            out["log_normaliser_N"], out["top_N"] = normaliser_and_argmax(hidden_ND, head)
        if len(inputs["text_index_L"]) and not for_targets:
            out["text_nll"] = _text_nll(hidden[inputs["text_index_L"]], head, inputs["text_target_L"])
        return {name: value for name, value in out.items() if value is not None}

    model.forward = MethodType(forward, model)


def _text_nll(hidden_LD: Tensor, head: Any, target_L: Tensor) -> Tensor:
    """Σ −log π_Q(token) of plain text over the whole vocabulary, nats."""
    one_each = torch.arange(len(hidden_LD) + 1, device=hidden_LD.device)
    normaliser_L, logit_L = normaliser_and_pairs(hidden_LD, head, one_each, target_L)
    return (normaliser_L - logit_L).sum()
