"""The student's output head as plain tensors, and the check that it reproduces the model's own logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tdistill.errors import UnsupportedModelError


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap · tanh((h · W + b) · scale / softcap), the cap only where the model has one.

    Attributes:
        weight_VD: output matrix, [V, D].
        bias_V: output bias, [V], or None.
        scale: factor on the product (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: Gemma's ``final_logit_softcapping``, or None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, product: Tensor) -> Tensor:
        """Apply scale and cap to products h · W + b of any shape."""
        logits = product * self.scale if self.scale != 1.0 else product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of all rows of the matrix, [N, V], at least float32, under autocast too."""
        dtype = compute_dtype(hidden_ND, self.weight_VD)
        bias = None if self.bias_V is None else self.bias_V.to(dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.finish(nn.functional.linear(hidden_ND.to(dtype), self.weight_VD.to(dtype), bias))

    def select(self, ids_U: Tensor) -> OutputHead:
        """The head restricted to some tokens."""
        bias = None if self.bias_V is None else self.bias_V[ids_U]
        return replace(self, weight_VD=self.weight_VD.index_select(0, ids_U), bias_V=bias)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Common dtype of the tensors, at least float32: sums over D and over the vocabulary need it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def output_head(model: PreTrainedModel) -> OutputHead:
    """Read the output head of a causal language model.

    Raises:
        UnsupportedModelError: the head is not a plain linear layer (an adapter on it, a sharded vocabulary).
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise UnsupportedModelError(
            f"The output layer of {type(model).__name__} is a {type(layer).__name__}; tdistill needs a plain "
            "torch.nn.Linear. Remove adapters and quantisation from the output layer."
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the head computed here with the model's own logits on a short probe.

    Guards against architectures that change logits in a way unknown here, which would be silently wrong.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    was_training = model.training
    model.eval()
    probe = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    own = model(input_ids=probe).logits[0]
    hidden = model.base_model(input_ids=probe).last_hidden_state[0]
    ours = output_head(model).logits(hidden)
    model.train(was_training)
    tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) else 5e-2
    error, scale = float((own.float() - ours.float()).abs().max()), float(own.abs().max())
    if not error <= tolerance * scale:  # so that NaN is refused too
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits in a way tdistill does not know: on a probe they differ by "
            f"{error:.3g}. Use another architecture or report it with its config."
        )
