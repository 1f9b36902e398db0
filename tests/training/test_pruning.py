"""A pruned model computes the composition of the layers it keeps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_llama, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SmolLM3Config,
)

from tdistill.errors import ConfigError, UnsupportedModelError
from tdistill.training.pruning import block_influence, choose_layers, decoder_layers, prune_layers

COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama_tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    # The last two layers see a window of 3 tokens.
    "qwen2_sliding": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    "gemma2": Gemma2Config(**COMMON, **GEMMA),
    "gemma3": Gemma3TextConfig(**COMMON, **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2),
    # The last layer has no rotary positions.
    "smollm3": SmolLM3Config(**COMMON, no_rope_layers=[1, 1, 1, 0]),
    "gpt2": GPT2Config(**COMMON, n_positions=64),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
}
IDS = torch.randint(3, 48, (2, 20), generator=torch.Generator().manual_seed(0))


class _Identity(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states


def with_identities(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    _name, layers = decoder_layers(twin)
    for index in range(len(layers)):
        if index not in kept:
            layers[index] = _Identity()
    return twin


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kept", [[0, 3], [1, 3], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", CONFIGS)
def test_student_is_the_composition_of_the_kept_layers(name, kept, tmp_path):
    teacher = tiny_model(CONFIGS[name])
    before = copy.deepcopy(teacher.state_dict())
    student = prune_layers(teacher, kept)
    assert type(student) is type(teacher)
    assert len(decoder_layers(student)[1]) == len(kept)
    wanted = logits_of(with_identities(teacher, kept))
    torch.testing.assert_close(logits_of(student), wanted, rtol=1e-5, atol=1e-5)
    # What was saved is the same model.
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), wanted, rtol=1e-5, atol=1e-5
    )
    # The teacher is left as it was.
    assert teacher.config.get_text_config().num_hidden_layers == 4
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])


def test_pruning_these_models_matters():
    """Otherwise the comparison above would pass for a student that keeps everything."""
    for name, config in CONFIGS.items():
        teacher = tiny_model(config)
        assert (logits_of(teacher) - logits_of(with_identities(teacher, [1, 3]))).abs().max() > 0.05, name


def test_kinds_of_layers_go_with_their_layers():
    qwen2 = prune_layers(tiny_model(CONFIGS["qwen2_sliding"]), [1, 3])
    assert qwen2.config.layer_types == ["full_attention", "sliding_attention"]
    gemma3 = prune_layers(tiny_model(CONFIGS["gemma3"]), [0, 2, 3])
    assert gemma3.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert prune_layers(tiny_model(CONFIGS["smollm3"]), [0, 3]).config.no_rope_layers == [1, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_others_apart(tied):
    student = prune_layers(tiny_model(CONFIGS["llama_tied" if tied else "llama"]), [0, 3])
    same = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert same is tied
    assert student.config.tie_word_embeddings is tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_student_is_in_float32_with_the_teachers_numbers(dtype):
    teacher = tiny_model(CONFIGS["llama"]).to(dtype)
    student = prune_layers(teacher, [0, 3])
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert not student.training
    layers = decoder_layers(teacher)[1]
    for index, source in enumerate([0, 3]):
        for key, value in layers[source].named_parameters():
            assert torch.equal(decoder_layers(student)[1][index].get_parameter(key), value.float())


def test_generation_settings_are_copied_and_a_training_teacher_stays_one():
    teacher = tiny_model(CONFIGS["gpt2"]).train()  # with dropout, which must not disturb the comparison
    teacher.generation_config.eos_token_id = [2, 7]
    student = prune_layers(teacher, [0, 1])
    assert student.generation_config.eos_token_id == [2, 7]
    assert teacher.training
    student.generation_config.eos_token_id = 3
    assert teacher.generation_config.eos_token_id == [2, 7]


def test_layers_that_depend_on_their_place_are_refused():
    teacher = tiny_model(GPT2Config(**COMMON, n_positions=64, scale_attn_by_inverse_layer_idx=True))
    prune_layers(teacher, [0, 1])  # in their old places
    with pytest.raises(UnsupportedModelError, match="layers depend on their place"):
        prune_layers(teacher, [1, 3])


def test_a_quantised_model_is_refused():
    model = tiny_llama()
    model.hf_quantizer = object()  # which transformers leaves at a model that it has quantised
    with pytest.raises(UnsupportedModelError, match=r"are quantised.*teacher\.model_kwargs.*student\.model"):
        prune_layers(model, [0, 1])


def test_a_model_without_a_list_of_layers_is_refused():
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="no list of 5 layers"):
        decoder_layers(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_block_influence_is_the_mean_angle_of_the_residual_stream(name):
    model = tiny_model(CONFIGS[name])
    sequences = [torch.arange(3, 12), torch.arange(20, 25), torch.tensor([40])]
    found = block_influence(model, sequences)
    # Slowly: inputs of each block and output of the last one, recorded for one sequence at a time.
    angles: list[list[float]] = [[] for _ in range(4)]
    for sequence in sequences:
        streams: list[np.ndarray] = []
        layers = decoder_layers(model)[1]

        def record(module, args, kwargs, streams=streams):
            streams.append((args[0] if args else kwargs["hidden_states"])[0].detach().double().numpy())

        def record_last(module, args, output, streams=streams):
            streams.append(
                (output[0] if isinstance(output, tuple) else output).detach().reshape(-1, 32).double().numpy()
            )

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
        handles.append(layers[-1].register_forward_hook(record_last))
        model(input_ids=sequence[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for index in range(4):
            for before, after in zip(streams[index], streams[index + 1], strict=True):
                angles[index].append(1 - before @ after / (np.linalg.norm(before) * np.linalg.norm(after)))
    assert [len(a) for a in angles] == [15] * 4
    np.testing.assert_allclose(found, [np.mean(a) for a in angles], rtol=1e-4, atol=1e-6)
    assert not any(layer._forward_hooks for layer in decoder_layers(model)[1])


def test_a_block_that_does_nothing_has_no_influence():
    model = tiny_llama(num_hidden_layers=3)
    layer = decoder_layers(model)[1][1]
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    influence = block_influence(model, [torch.arange(3, 12)])
    assert influence[1] == pytest.approx(0.0, abs=1e-6)
    assert min(influence[0], influence[2]) > 0.01
    assert choose_layers(3, 2, "block_influence", influence) == [0, 2]


def test_choice_by_influence():
    influence = [0.5, 0.1, 0.3, 0.3, 0.9]
    assert choose_layers(5, 1, "block_influence", influence) == [4]
    assert choose_layers(5, 3, "block_influence", influence) == [0, 2, 4]  # of equals, the earlier one
    assert choose_layers(5, 5, "block_influence", influence) == [0, 1, 2, 3, 4]


def test_evenly_spaced_choice():
    assert choose_layers(12, 4, "even") == [0, 4, 7, 11]
    assert choose_layers(5, 3, "even") == [0, 2, 4]
    for num_layers in range(1, 41):
        for keep in range(1, num_layers + 1):
            layers = choose_layers(num_layers, keep, "even")
            assert len(layers) == keep
            assert layers[0] == 0
            assert keep == 1 or layers[-1] == num_layers - 1
            gaps = np.diff(layers)
            assert keep < 3 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("keep", [0, 13, -1])
def test_impossible_numbers_of_layers_are_refused(keep):
    with pytest.raises(ConfigError, match=f"student.layers = {keep} must lie between 1 and the teacher's 12"):
        choose_layers(12, keep, "even")
