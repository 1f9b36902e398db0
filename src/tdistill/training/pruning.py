"""A smaller start made from the teacher: keep some of its layers, everything else as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tdistill.errors import ConfigError, UnsupportedModelError

# Entries of a configuration that list one value per layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks.

    Raises:
        UnsupportedModelError: no list of modules as long as the configuration's number of layers.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return name, module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {wanted} layers to prune. Give a student folder instead."
    )


@torch.inference_mode()
def block_influence(model: PreTrainedModel, sequences: Iterable[Tensor]) -> list[float]:
    """How much each block changes the residual stream.

    BI_l = 1 − E[cos(x_l, x_{l+1})], x_l the input of block l, over all tokens of the sequences.
    Source: arXiv 2403.03853 (ShortGPT), §3.1.
    Differs from the source: nothing.

    Args:
        model: teacher.
        sequences: int64 [T] token ids each.
    Returns:
        One value in [0, 2] per block.
    """
    _, layers = decoder_layers(model)
    totals, count = [0.0] * len(layers), 0

    def hook(index: int) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            totals[index] += float((1 - cosine).sum())

        return measure

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for sequence in sequences:
            model.base_model(input_ids=sequence[None].to(model.device), use_cache=False)
            count += len(sequence)
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(count, 1) for total in totals]


def choose_layers(num_layers: int, keep: int, method: str, influence: Sequence[float] | None = None) -> list[int]:
    """Indices of the layers to keep, in order.

    Args:
        num_layers: layers of the teacher.
        keep: layers of the student.
        method: ``block_influence`` (the largest) or ``even`` (evenly spaced, first and last included).
        influence: from :func:`block_influence`, for that method.
    Raises:
        ConfigError: keep outside 1 … num_layers.
    """
    if not 1 <= keep <= num_layers:
        raise ConfigError(f"student.layers = {keep} must lie between 1 and the teacher's {num_layers} layers.")
    if method == "even":
        return sorted({round(i * (num_layers - 1) / max(keep - 1, 1)) for i in range(keep)})
    assert influence is not None
    return sorted(sorted(range(num_layers), key=lambda layer: (-influence[layer], layer))[:keep])


def prune_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Copy the model with only the given layers; embeddings stay tied where they were.

    Args:
        model: teacher, left unchanged.
        layers: indices to keep, increasing.
    Returns:
        A new model of the same class, in float32.
    Raises:
        UnsupportedModelError: the model's weights are quantised, or the student does not compute the composition of the
            kept layers.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are quantised, and a student made of its layers needs plain "
            "ones. Load the teacher without quantisation (teacher.model_kwargs), or give a student (student.model)."
        )
    name, _ = decoder_layers(model)
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = len(layers)
    for entry in _PER_LAYER:
        if values := getattr(text_config, entry, None):
            setattr(text_config, entry, [values[layer] for layer in layers])
    config.dtype = torch.float32
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    pattern = re.compile(rf"^{re.escape(name)}\.(\d+)\.")
    place = {layer: index for index, layer in enumerate(layers)}
    weights = {}
    for key, value in model.state_dict().items():
        match = pattern.match(key)
        if match is None:
            weights[key] = value
        elif int(match[1]) in place:
            weights[pattern.sub(f"{name}.{place[int(match[1])]}.", key)] = value
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(model.generation_config)
    _check_composition(model, student.eval(), layers)
    return student


@torch.inference_mode()
def _check_composition(model: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int]) -> None:
    """Compare the student with the teacher whose other layers are skipped, on a short probe.

    Guards against layers that depend on their index in a way unknown here, which would be silently wrong.
    """

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    probe = torch.arange(1, 17)[None] % model.config.get_text_config().vocab_size
    _, all_layers = decoder_layers(model)
    handles = [
        layer.register_forward_hook(skip, with_kwargs=True) for i, layer in enumerate(all_layers) if i not in layers
    ]
    was_training = model.training
    model.eval()
    try:
        wanted = model(input_ids=probe.to(model.device), use_cache=False).logits.float().cpu()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    # In the teacher's precision, so that only its rounding is left; the float32 student itself is not changed.
    twin = student if model.dtype == student.dtype else copy.deepcopy(student).to(model.dtype)  # type: ignore[arg-type]
    found = twin(input_ids=probe.to(student.device), use_cache=False).logits.float().cpu()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be pruned: its layers depend on their place, and the logits of the kept "
            f"layers {list(layers)} come out {error:.1%} off. Give a student folder instead."
        )
