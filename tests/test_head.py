"""The output head as plain tensors reproduces the models' own logits, or the model is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import random_trajectory, tiny_llama, tiny_model
from torch import nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tdistill import head as head_module
from tdistill.errors import UnsupportedModelError
from tdistill.head import (
    OutputHead,
    check_head,
    compute_dtype,
    float32_logits,
    output_head,
    takes_half_precision_only,
)
from tdistill.kernels.dispatch import student_statistics
from tdistill.training.collate import PackedCollator

COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama_tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    # A cap and scales far from 1, so that leaving one out cannot pass for rounding.
    "gemma2": Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=4.0),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=8, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(**COMMON, n_positions=64),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16),
    "cohere": CohereConfig(**COMMON, logit_scale=0.25),
    "granite": GraniteConfig(**COMMON, logits_scaling=4.0),
    "phi_with_bias": PhiConfig(**COMMON),
}


def last_hidden(model) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1), model(input_ids=ids).logits.flatten(
            0, 1
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name):
    model = tiny_model(CONFIGS[name])
    if output_head(model).bias_V is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    check_head(model)
    hidden, own = last_hidden(model)
    torch.testing.assert_close(output_head(model).logits(hidden), own, rtol=1e-5, atol=1e-5)


def test_the_configurations_above_exercise_every_part_of_the_head():
    heads = {name: output_head(tiny_model(config)) for name, config in CONFIGS.items()}
    assert heads["gemma2"].softcap == 4.0
    assert heads["cohere"].scale == 0.25
    assert heads["granite"].scale == 0.25
    assert heads["phi_with_bias"].bias_V is not None
    assert heads["opt"].weight_VD.shape == (48, 16)
    tied = tiny_model(CONFIGS["llama_tied"])
    assert output_head(tied).weight_VD is tied.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_accepted(dtype):
    check_head(tiny_llama().to(dtype))


def test_the_probe_leaves_the_mode_as_it_was():
    for training in (True, False):
        model = tiny_llama().train(training)
        check_head(model)
        assert model.training is training


class _Doubled(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(hidden)


class _QuantisedLinear(nn.Linear):
    """A subclass may compute anything."""


def test_a_wrapped_head_is_refused():
    model = tiny_llama()
    model.lm_head = _Doubled(model.lm_head)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is a _Doubled; tdistill needs a plain"):
        check_head(model)
    model.lm_head = _QuantisedLinear(32, 48, bias=False)
    with pytest.raises(UnsupportedModelError, match="_QuantisedLinear"):
        output_head(model)


@pytest.mark.parametrize(
    "alter",
    [
        lambda logits: 1.01 * logits,
        lambda logits: logits + nn.functional.one_hot(torch.tensor(5), 48) * 0.05,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.masked_fill(torch.arange(48) == 7, float("nan")),
    ],
    ids=["scaled", "one_token_raised", "capped", "nan"],
)
def test_altered_logits_are_refused(alter):
    model = tiny_llama()
    original = model.forward

    def forward(**inputs):
        outputs = original(**inputs)
        outputs.logits = alter(outputs.logits)
        return outputs

    model.forward = forward
    with pytest.raises(UnsupportedModelError, match="changes its logits"):
        check_head(model)


def test_a_setting_that_the_model_does_not_apply_is_noticed():
    model = tiny_llama()
    model.config.logit_scale = 0.5  # Llama's forward ignores it
    with pytest.raises(UnsupportedModelError, match="changes its logits"):
        check_head(model)


def test_weights_in_another_process_are_not_probed_and_those_that_are_not_in_memory_give_no_logits():
    model = tiny_llama().to("meta")
    check_head(model)
    with pytest.raises(UnsupportedModelError, match="The output layer is not in memory"):
        output_head(model).logits(torch.zeros(1, 32))


def test_attention_that_takes_no_float32_is_probed_under_autocast(monkeypatch):
    model, seen = tiny_llama(), []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    check_head(model)
    monkeypatch.setattr(head_module, "takes_half_precision_only", lambda model: True)
    check_head(model)
    assert seen == [False, False, True, True]
    for name, expected in {"flash_attention_2": True, "kernels-community/flash-attn2": True, "sdpa": False}.items():
        model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name))
        assert takes_half_precision_only(model) is expected


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_a_model_in_bfloat16_can_be_had_in_float32(name, autocast):
    """Its own are rounded to bfloat16; these are products of its states and weights, capped and scaled as its own."""
    model = tiny_model(CONFIGS[name])
    if output_head(model).bias_V is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    model = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, rounded = last_hidden(model)
        with float32_logits(model):
            _, found = last_hidden(model)
        assert torch.equal(last_hidden(model)[1], rounded)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, output_head(model).logits(hidden), rtol=1e-5, atol=1e-5)
    assert 1e-4 < (found - rounded.float()).abs().max() < 0.1


def test_a_float32_model_and_an_output_layer_that_is_not_read_keep_their_logits():
    model = tiny_llama()
    own = last_hidden(model)[1]
    with float32_logits(model):
        assert torch.equal(last_hidden(model)[1], own)
    model.lm_head = _Doubled(model.lm_head)
    with float32_logits(model):
        assert torch.equal(last_hidden(model)[1], 2 * own)


def test_head_by_hand():
    # h · W = (1·2 + 2·1, 1·0 + 2·3) = (4, 6); + b = (5, 4); · 0.5 = (2.5, 2); 3 tanh(·/3).
    head = OutputHead(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([1.0, -2.0]), scale=0.5, softcap=3.0)
    hidden = torch.tensor([[1.0, 2.0]])
    wanted = 3 * torch.tanh(torch.tensor([[2.5 / 3, 2.0 / 3]]))
    torch.testing.assert_close(head.logits(hidden), wanted)
    torch.testing.assert_close(head.select(torch.tensor([1])).logits(hidden), wanted[:, 1:])


def test_logits_are_computed_in_float32_at_least():
    assert compute_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert compute_dtype(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)) == torch.float64
    hidden, weight = torch.randn(6, 32), torch.randn(9, 32)
    exact = hidden.double() @ weight.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = OutputHead(weight).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("support", [None, "union"])
@pytest.mark.parametrize("name", CONFIGS)
def test_action_statistics_and_their_gradients_are_those_of_the_models_own_logits(name, support):
    """Of every parameter, for ragged sets: cap, scale, bias, projection and sharing included."""
    model = tiny_model(CONFIGS[name]).double()
    batch = PackedCollator(0)([random_trajectory(seed, 48, 4, 7) for seed in range(3)])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    at, ids, sizes = batch["position_index_N"], batch["action_ids_M"], batch["offsets"].diff()
    rows = torch.repeat_interleave(torch.arange(len(at)), sizes)
    found = student_statistics(
        model.base_model(**inputs).last_hidden_state.flatten(0, 1)[at],
        output_head(model),
        offsets=batch["offsets"],
        action_ids_M=ids,
        taken_N=batch["taken_N"],
        support=support,
    )
    logits_NV = model(**inputs).logits.flatten(0, 1)[at]
    wanted = {"q_M": logits_NV[rows, ids], "q_taken_N": logits_NV[torch.arange(len(at)), batch["taken_N"]]}
    if support == "union":
        wanted["log_normaliser_N"] = logits_NV[:, ids.unique()].logsumexp(-1)
    gradients = []
    for outputs in (found, wanted):
        model.zero_grad()
        sum(outputs[key].square().sum() for key in wanted).backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], value, rtol=1e-8, atol=1e-9, msg=key)
