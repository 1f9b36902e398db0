import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tdistill.errors import ConfigError, DataFileError, EmptyPromptSetError, ModelLogitsError
from tdistill.evaluation import states
from tdistill.evaluation.perplexity import (
    Document,
    PerplexitySettings,
    perplexity,
    text_losses,
    tokenize_documents,
    windows,
)


def random_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(np.concatenate([[0], rng.integers(2, 64, n)]), num_words=n, num_bytes=5 * n) for n in lengths]


def log_probs_by_hand(model, ids):
    with torch.no_grad():
        z = copy.deepcopy(model).double()(torch.tensor(ids, dtype=torch.long)[None]).logits[0, :, :64].numpy()
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def loss_by_hand(model, ids, window, stride):
    """Token by token: the window that scores token t begins where the loop of transformers' guide begins it."""
    total = 0.0
    for t in range(1, len(ids)):
        steps = max(0, math.ceil((t + 1 - window) / stride))
        begin = steps * stride
        total -= log_probs_by_hand(model, ids[begin:t])[-1, ids[t]]
    return total


@pytest.mark.parametrize(("window", "stride", "block"), [(64, 32, 256), (6, 3, 4), (5, 1, 256), (4, 3, 2)])
def test_the_loss_agrees_with_a_loop_over_tokens(make_model, monkeypatch, window, stride, block):
    monkeypatch.setattr(states, "_BLOCK", block)
    models, documents = {"a": make_model(0), "b": make_model(1)}, random_documents([1, 3, 17, 6, 5])
    found = text_losses(models, documents, vocab_size=64, window_tokens=window, stride_tokens=stride, batch_size=3)
    for name, model in models.items():
        expected = [loss_by_hand(model, document.token_ids, window, stride) for document in documents]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 8, 20])
@pytest.mark.parametrize(("window", "stride"), [(6, 3), (2, 1), (7, 6)])
def test_windows_score_every_token_once_and_are_no_longer_than_said(length, window, stride):
    ids = np.arange(length)
    pairs = windows(ids, window, stride)
    np.testing.assert_array_equal(np.concatenate([ids[:0], *(scored for _, scored in pairs)]), ids[1:])
    for context, scored in pairs:
        assert len(context) >= 1 and len(context) + len(scored) <= window
        assert context[-1] + 1 == scored[0]


def test_the_numbers_agree_with_a_calculation_by_hand():
    # 6 ln 2 nats over 3 tokens, 2 words and 4 bytes.
    documents = [Document(np.array([0, 5, 6]), 1, 1), Document(np.array([0, 7]), 1, 3)]
    found = perplexity(np.array([4 * math.log(2), 2 * math.log(2)]), documents, seed=0)
    assert found["text_nll"].value == pytest.approx(2 * math.log(2))
    assert found["text_perplexity"].value == pytest.approx(4.0)
    assert found["text_word_perplexity"].value == pytest.approx(8.0)
    assert found["text_bits_per_byte"].value == pytest.approx(1.5)


def test_the_ends_of_the_interval_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    documents = random_documents(rng.integers(5, 30, 20))
    found = perplexity(rng.gamma(5, 10, 20), documents, seed=1)
    nll, ppl = found["text_nll"], found["text_perplexity"]
    assert nll.low < nll.value < nll.high
    assert ppl == pytest.approx([math.exp(end) for end in nll])


def test_a_perplexity_that_no_number_can_hold_is_left_out():
    # Text without white space: one word of 1000 nats.
    found = perplexity(np.array([1000.0]), [Document(np.arange(401), 1, 1200)], seed=0)
    assert set(found) == {"text_nll", "text_bits_per_byte", "text_perplexity"}
    assert found["text_perplexity"].value == pytest.approx(math.exp(2.5)) and found["text_perplexity"].low is None


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(make_model):
    model = make_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    documents = [replace(d, token_ids=d.token_ids % 60) for d in random_documents([4, 9])]
    losses = text_losses({"m": model}, documents, vocab_size=60, window_tokens=64, stride_tokens=32)["m"]
    found = perplexity(losses, documents, seed=0)
    assert found["text_perplexity"].value == pytest.approx(60.0, rel=1e-5)  # padded rows get no probability


def test_documents_begin_with_a_token_that_is_not_scored(tokenizer):
    documents = tokenize_documents(["word5 word6  word7", "word9", "  "], tokenizer)
    assert [document.token_ids.tolist() for document in documents] == [[0, 5, 6, 7], [0, 9]]
    assert [(document.num_words, document.num_bytes) for document in documents] == [(3, 18), (1, 5)]
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        tokenize_documents(["word5"], bare)
    bare.bos_token = "word3"
    assert tokenize_documents(["word5"], bare)[0].token_ids.tolist() == [3, 5]
    with pytest.raises(EmptyPromptSetError, match="No text has a token"):
        tokenize_documents(["  "], tokenizer)


def test_bad_settings_and_files_are_named(tmp_path, make_model):
    with pytest.raises(ValidationError, match=r"stride_tokens = 8 .* window_tokens = 8"):
        PerplexitySettings(text="x", window_tokens=8, stride_tokens=8)
    path = tmp_path / "text.jsonl"
    with pytest.raises(DataFileError, match=r"text\.jsonl \(evaluation\.perplexity\.text\) cannot be read"):
        PerplexitySettings(text=str(path)).read()
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataFileError, match=r"evaluation\.perplexity\.text\), line 2"):
        PerplexitySettings(text=str(path)).read()
    path.write_text('{"text": " "}\n')
    with pytest.raises(EmptyPromptSetError, match="empty texts only"):
        PerplexitySettings(text=str(path)).read()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "a", "b", "c")))
    assert PerplexitySettings(text=str(path), max_documents=2).read() == ["a", "b"]
    with pytest.raises(ConfigError, match=r"window_tokens = 512, but model 'm' was made for 128 tokens"):
        text_losses({"m": make_model(0)}, random_documents([3]), vocab_size=64)


def test_a_broken_model_is_named(make_model):
    broken = make_model(0)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(ModelLogitsError, match="'bd' gives NaN"):
        text_losses({"bd": broken}, random_documents([3]), vocab_size=64, window_tokens=64, stride_tokens=32)
