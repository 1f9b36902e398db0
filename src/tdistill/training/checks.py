"""What a trainer refuses: ways of training whose result would be wrong without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from tdistill.errors import ConfigError, NonFiniteLossError
from tdistill.store import Store
from tdistill.teachers.base import SamplingSettings


def check_whole(parallelism: Any) -> None:
    """Raise ConfigError where a process would hold a part of the weights or of a sequence, and nothing the whole."""
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "DeepSpeed's ZeRO stage 3 is not supported: the output matrix is read outside of its forward, where the "
            "weights are not gathered. Use stage 1 or 2, or FSDP2."
        )
    for name in ("cp_size", "sp_size"):
        if (getattr(parallelism, name, None) or 1) > 1:
            raise ConfigError(
                f"parallelism_config.{name} = {getattr(parallelism, name)} is not supported: an answer's positions are "
                "packed on one process. Leave it out; response_tokens_per_batch bounds the memory of a micro-batch."
            )


def check_rollouts(sampling: SamplingSettings, store: Store, p: float | None) -> None:
    """Raise ConfigError where the student's answers would be scored otherwise than the answers of the store."""
    stored = store.identity["sampling"]
    least = store.p_max if p is None else p
    if sampling.temperature != stored["temperature"]:
        name, found, remedy = "temperature", sampling.temperature, f"{stored['temperature']:g}, the store's"
    elif (sampling.p_max == 1.0) != (store.p_max == 1.0) or sampling.p_max < least:
        name, found, remedy = "p_max", sampling.p_max, f"{store.p_max:g}, the store's"
    else:
        return
    raise ConfigError(
        f"The student's answers would be scored at {name} = {found:g}, and the store {store.path} is of another. Give "
        f"the rollouts sampling with {name} = {remedy}."
    )


def check_finite_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Raise NonFiniteLossError in the place of a checkpoint that nothing can go on from."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise NonFiniteLossError(
                f"{name} is not finite after step {step}; no checkpoint of it is written, and earlier ones are intact. "
                "Lower learning_rate, or set max_grad_norm."
            )


def check_precision(model: nn.Module) -> None:
    """Raise ConfigError where an optimizer's steps would be lost in the rounding of the weights."""
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if low := [kind for kind in trained if kind.itemsize < torch.float32.itemsize]:
        raise ConfigError(
            f"The student would be trained in {low[0]}, whose rounding is larger than most steps of the optimizer. "
            "Load it with dtype='float32'; bf16: true computes in bfloat16 all the same. The base of an adapter may "
            "stay as it is."
        )


def keep_statistics_exact(plugin: Any) -> None:
    """Have a sharded model's outputs, which are sums, and its gradients, which add up, in float32."""
    policy = plugin.mixed_precision_policy
    changes = {"output_dtype": None, "reduce_dtype": torch.float32}
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = replace(policy, **changes)
