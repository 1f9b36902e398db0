"""The output head of a model as plain tensors, and the check that it reproduces the model's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
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
        low_rank: LoRA factors A [r, D] and B [V, r] and their scale, added to the matrix as scale · B A; or None.
        sparse_gradient: gather rows with a sparse gradient. For a matrix that is also the input embedding: the dense
            gradient from there takes it up in place, and no second one of the matrix' size is made.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[Tensor, Tensor, float] | None = None
    sparse_gradient: bool = False

    def finish(self, product: Tensor) -> Tensor:
        """Apply scale and cap to products h · W + b of any shape."""
        logits = product * self.scale if self.scale != 1.0 else product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of all rows of the matrix, [N, V], at least float32, under autocast too, on the matrix' device.

        Raises:
            UnsupportedModelError: the matrix is not in memory.
        """
        head = self.ready(hidden_ND.dtype)
        weight_VD = head.weight_VD
        with torch.autocast(weight_VD.device.type, enabled=False):
            return self.finish(
                nn.functional.linear(hidden_ND.to(weight_VD.device, weight_VD.dtype), weight_VD, head.bias_V)
            )

    def ready(self, dtype: torch.dtype) -> OutputHead:
        """The head with the low-rank factors multiplied out, in the dtype that it computes hidden states of one in."""
        head = self.merged()
        if head.weight_VD.is_meta:
            raise UnsupportedModelError(
                "The output layer is not in memory (device_map has put it on the disk or into the CPU's). Leave more "
                "room for it with max_memory, or load a smaller model."
            )
        weight_VD = head.weight_VD.to(torch.promote_types(compute_dtype(head.weight_VD), dtype))
        return replace(
            head, weight_VD=weight_VD, bias_V=None if head.bias_V is None else head.bias_V.to(weight_VD.dtype)
        )

    def merged(self) -> OutputHead:
        """The head with the low-rank factors multiplied out."""
        if self.low_rank is None:
            return self
        factor_A, factor_B, scale = self.low_rank
        return replace(self, weight_VD=_merge(self.weight_VD, factor_A, factor_B, scale), low_rank=None)

    def first(self, num_tokens: int | None) -> OutputHead:
        """The head without the rows that pad the vocabulary, low-rank factors multiplied out; None: all rows."""
        if num_tokens is None:
            return self
        head = self.merged()
        bias = None if head.bias_V is None else head.bias_V[:num_tokens]
        return replace(head, weight_VD=head.weight_VD[:num_tokens], bias_V=bias)

    def select(self, ids_U: Tensor) -> OutputHead:
        """The head restricted to some tokens, low-rank factors multiplied out."""
        rows_UD = embedding(ids_U, self.weight_VD, sparse=self.sparse_gradient)
        if self.low_rank is not None:
            factor_A, factor_B, scale = self.low_rank
            rows_UD = _merge(rows_UD, factor_A, embedding(ids_U, factor_B), scale)
        bias = None if self.bias_V is None else self.bias_V[ids_U]
        return replace(self, weight_VD=rows_UD, bias_V=bias, low_rank=None, sparse_gradient=False)


def _merge(weight_UD: Tensor, factor_A: Tensor, factor_B: Tensor, scale: float) -> Tensor:
    dtype = compute_dtype(weight_UD, factor_A)
    with torch.autocast(weight_UD.device.type, enabled=False):
        return torch.addmm(weight_UD.to(dtype), factor_B.to(dtype), factor_A.to(dtype), alpha=scale)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Common dtype of the tensors, at least float32: sums over D and over the vocabulary need it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def output_head(model: PreTrainedModel) -> OutputHead:
    """Read the output head of a causal language model.

    Raises:
        UnsupportedModelError: the head is not a linear layer, plain or with LoRA (a sharded vocabulary, quantisation).
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "unshard"):
        layer.unshard()  # FSDP: whole already, unless the layer is a group of its own, whose forward nobody calls
    low_rank = None
    if not _is_linear(layer):
        layer, low_rank = _lora(layer, type(model).__name__)
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(
        layer.weight,
        layer.bias,
        scale,
        getattr(config, "final_logit_softcapping", None),
        low_rank,
        sparse_gradient=getattr(model.get_input_embeddings(), "weight", None) is layer.weight,
    )


def _is_linear(layer: Any) -> bool:
    """A linear layer and nothing derived from one, but for the class that FSDP gives to a layer that it shards."""
    return next(kind for kind in type(layer).__mro__ if not kind.__name__.startswith("FSDP")) is nn.Linear


def _lora(layer: Any, model_name: str) -> tuple[nn.Linear, tuple[Tensor, Tensor, float] | None]:
    """Base layer and low-rank factors of PEFT's LoRA on a linear layer.

    Raises:
        UnsupportedModelError: it is anything else, or computes more than h (W + scale · B A).
    """
    base: Any = getattr(layer, "base_layer", None)
    active = getattr(layer, "active_adapters", [])
    plain = (
        _is_linear(base)
        and hasattr(layer, "lora_A")
        and len(active) == 1
        and not layer.merged
        and not layer.use_dora.get(active[0], False)
        and type(layer.lora_dropout[active[0]]) is nn.Identity
        and layer.lora_B[active[0]].bias is None
    )
    if not plain:
        raise UnsupportedModelError(
            f"The output layer of {model_name} is a {type(layer).__name__}; tdistill needs a plain torch.nn.Linear, or "
            "one with a single LoRA adapter without dropout, bias and DoRA. Remove other adapters and quantisation "
            "from the output layer."
        )
    name = active[0]
    factors = (layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
    return base, None if layer.disable_adapters else factors


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the head computed here with the model's own logits on a short probe.

    Guards against architectures that change logits in a way unknown here, which would be silently wrong. Weights that
    are not loaded in this process (FSDP with RAM-efficient loading, which loads them in one) are not looked at.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    if model.device.type == "meta":
        return
    was_training = model.training
    model.eval()
    probe = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.autocast(model.device.type, torch.bfloat16, enabled=takes_half_precision_only(model)):
        own = model(input_ids=probe).logits[0]
        hidden = model.base_model(input_ids=probe).last_hidden_state[0]
    ours = output_head(model).logits(hidden).to(own.device)
    model.train(was_training)
    tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) else 5e-2
    error, scale = float((own.float() - ours.float()).abs().max()), float(own.abs().max())
    if not error <= tolerance * scale:  # so that NaN is refused too
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits in a way tdistill does not know: on a probe they differ by "
            f"{error:.3g}. Use another architecture or report it with its config."
        )


def takes_half_precision_only(model: PreTrainedModel) -> bool:
    """Whether the model's attention refuses float32 (FlashAttention), so that it runs under autocast alone."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


@contextmanager
def float32_logits(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's own forward form its logits in float32, whatever it is loaded or run in.

    Rounded to bfloat16, logits of 16 to 32 are off by up to 0.06 nats, and many are equal. An output layer that
    :func:`output_head` does not read (quantised, for one), or that is not kept in memory, stays as it is.

    Cost: where the weights are below float32, the output matrix once more, in float32.
    """
    try:
        head = output_head(model)
    except UnsupportedModelError:
        yield
        return
    ready: list[OutputHead] = []

    def precise(layer: nn.Module, inputs: tuple[Tensor, ...], product: Tensor) -> Tensor | None:
        if product.dtype.itemsize >= torch.float32.itemsize or head.weight_VD.is_meta:
            return None
        if not ready:  # without scale and cap, which the model applies itself
            ready.append(replace(head, scale=1.0, softcap=None).ready(inputs[0].dtype))
        return ready[0].logits(inputs[0]).to(product.device)

    handle = model.get_output_embeddings().register_forward_hook(precise)
    try:
        yield
    finally:
        handle.remove()
