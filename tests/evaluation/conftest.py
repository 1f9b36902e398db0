"""Tiny models, a word-level tokenizer and hand-made trajectories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tdistill.types import ActionSets, Trajectory

VOCAB = 64


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model():
    def make(seed: int, vocab_size: int = VOCAB, scale: float = 0.3, **settings) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            **{"initializer_range": scale, **settings},
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def make_trajectory():
    """A trajectory with random tokens and random sets; truncated ones record the state after the last token too."""

    def make(seed: int, prompt_id: str, prompt_len: int, response_len: int, **fields) -> Trajectory:
        rng = np.random.default_rng(seed)
        ends = fields.pop("ends", "terminal")
        sizes = rng.integers(1, 6, size=response_len + (ends == "truncated"))
        ids = np.concatenate([rng.choice(VOCAB, size=size, replace=False) for size in sizes])
        sets = ActionSets(
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            ids=ids.astype(np.int32),
            log_probs=np.full(len(ids), -1.0, np.float32),
            covered_mass=np.full(len(sizes), 0.9, np.float32),
            log_sum_exp=np.zeros(len(sizes), np.float32),
        )
        values = {
            "prompt_id": prompt_id,
            "answer_index": 0,
            "prompt_ids": rng.integers(0, VOCAB, prompt_len).astype(np.int32),
            "response_ids": rng.integers(0, VOCAB, response_len).astype(np.int32),
            "ends": ends,
            "source": "teacher",
            "sets": sets,
        }
        return Trajectory(**{**values, **fields})

    return make


@pytest.fixture
def trajectories(make_trajectory):
    return [
        make_trajectory(0, "a", 3, 7),
        make_trajectory(1, "b", 9, 2, ends="truncated"),
        make_trajectory(2, "c", 1, 11),
        make_trajectory(3, "d", 5, 5, ends="truncated"),
    ]


@pytest.fixture(scope="session")
def tokenizer():
    words = {"<end>": 0, "<unk>": 1, **{f"word{index}": index for index in range(2, VOCAB)}}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
