"""A model that answers with action statistics, and what it must never allocate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builders import random_trajectory, statistics, tiny_llama, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, PreTrainedModel

from tdistill.errors import UnsupportedModelError
from tdistill.kernels import chunked
from tdistill.objectives import SFT, IQLearn, OffSupport
from tdistill.training.collate import PackedCollator, PlainText
from tdistill.training.student import VALUE_HEAD, add_value_head, attach_statistics

VOCAB = 48


def rows() -> list:
    return [
        random_trajectory(0, VOCAB, 3, 5),
        random_trajectory(1, VOCAB, 6, 9, ends="truncated"),
        random_trajectory(2, VOCAB, 1, 1),
    ]


def prepared(support: str | None, kernel: str = "candidates", **settings: Any) -> PreTrainedModel:
    model = tiny_llama(VOCAB, **settings)
    add_value_head(model)
    attach_statistics(model, support=support, kernel=kernel)
    return model.train()


def test_logits_are_those_that_the_model_predicts_each_token_with():
    """Row by row from the model's own logits of each trajectory alone, one place before the token."""
    model, plain = prepared("vocabulary"), tiny_llama(VOCAB)
    stats = statistics(model, PackedCollator(0)(rows()))
    q_taken, q_sets, normalisers = [], [], []
    for row in rows():
        tokens = np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64)
        with torch.no_grad():
            logits = plain(torch.from_numpy(tokens)[None]).logits[0]
        for t in range(len(row.sets)):
            own = logits[len(row.prompt_ids) - 1 + t]
            if t < len(row.response_ids):
                q_taken.append(own[row.response_ids[t]])
            q_sets += [own[token] for token in row.sets.ids[row.sets.offsets[t] : row.sets.offsets[t + 1]]]
            normalisers.append(torch.logsumexp(own, 0))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(stats.q_taken_N[stats.has_action_N], torch.stack(q_taken), **close)
    torch.testing.assert_close(stats.q_M, torch.stack(q_sets), **close)
    torch.testing.assert_close(stats.log_normaliser_N, torch.stack(normalisers), **close)


def test_sft_is_the_loss_of_transformers_on_response_tokens():
    model, plain = prepared("vocabulary"), tiny_llama(VOCAB)
    batch = PackedCollator(0)(rows())
    labels = torch.full_like(batch["input_ids"], -100)
    for b, row in enumerate(rows()):
        start = len(row.prompt_ids)
        labels[b, start : start + len(row.response_ids)] = torch.from_numpy(row.response_ids.astype(np.int64))
    SFT()(statistics(model, batch)).loss.backward()
    (plain(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss * 15).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_plain_text_term_is_the_loss_of_transformers():
    model, plain = prepared("union"), tiny_llama(VOCAB)
    text = torch.randint(0, VOCAB, (9,), generator=torch.Generator().manual_seed(0))
    batch = PackedCollator(0, text=PlainText([text.numpy()], per_batch=1))(rows())
    found = model(**batch)["text_nll"]
    assert found.item() == pytest.approx(8 * plain(text[None], labels=text[None]).loss.item(), rel=1e-5)
    assert "text_nll" not in model(**PackedCollator(0)(rows()))


@pytest.mark.parametrize("support", [None, "union", "negatives", "vocabulary"])
def test_both_kernels_give_the_same_statistics(support):
    batch = PackedCollator(0, p=0.6)(rows())
    results = []
    for kernel in ("candidates", "reference"):
        model = prepared(support, kernel)
        torch.manual_seed(0)  # the same negatives for both
        results.append(model(**batch))
    ours, dense = results
    assert ours.keys() == dense.keys()
    assert ("log_normaliser_N" in ours) is (support is not None)
    for name, value in dense.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def test_evaluation_normalises_over_the_vocabulary_and_names_the_most_likely_token():
    model = prepared("union").eval()
    batch = PackedCollator(0)(rows())
    with torch.no_grad():
        outputs = model(**batch)
        logits = tiny_llama(VOCAB)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    logits = logits[batch["position_index_N"]]
    torch.testing.assert_close(outputs["log_normaliser_N"], logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs["top_N"], logits.argmax(-1))


def test_evaluation_draws_no_random_numbers_so_that_it_does_not_change_the_training_after_it():
    batch = PackedCollator(0)(rows())
    model = prepared("negatives")
    before = torch.get_rng_state()
    model(**batch)
    assert not torch.equal(torch.get_rng_state(), before)
    before = torch.get_rng_state()
    model.eval()(**batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_value_head_starts_at_zero_and_reads_the_last_hidden_state():
    model = prepared(None)
    batch = PackedCollator(0)(rows())
    assert not model(**batch)["value_N"].any()
    torch.nn.init.normal_(model.value_head.weight)
    torch.nn.init.constant_(model.value_head.bias, 0.25)
    hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    wanted = hidden.flatten(0, 1)[batch["position_index_N"]] @ model.value_head.weight[0] + 0.25
    torch.testing.assert_close(model(**batch)["value_N"], wanted)
    bare = tiny_llama(VOCAB)
    attach_statistics(bare, support=None)
    assert not hasattr(bare, VALUE_HEAD)
    assert "value_N" not in bare(**batch)


def test_values_keep_their_precision_under_autocast_and_a_cast_of_the_weights():
    batch = PackedCollator(0)(rows())
    model = prepared("union")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch)
    assert {outputs[name].dtype for name in ("q_M", "q_taken_N", "log_normaliser_N", "value_N")} == {torch.float32}
    assert model.bfloat16()(**batch)["value_N"].dtype == torch.float32


def gpt2() -> PreTrainedModel:
    """Learnt absolute positions, so that a wrong position shows."""
    return tiny_model(
        GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
@pytest.mark.parametrize("with_mask", [True, False])
def test_generation_from_a_padded_batch_is_not_changed(make, with_mask):
    inputs = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [9, 8, 5, 6, 7]])}
    if with_mask:
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    plain, model = make(), make()
    attach_statistics(model, support=None)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), plain.generate(**inputs, **settings))


def test_forward_without_positions_is_the_models_own():
    model, plain = tiny_llama(VOCAB), tiny_llama(VOCAB)
    attach_statistics(model, support="union")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)


def test_attaching_twice_takes_the_second_support():
    model = tiny_llama(VOCAB)
    attach_statistics(model, support="vocabulary")
    attach_statistics(model, support=None)
    model.train()
    assert "log_normaliser_N" not in model(**PackedCollator(0)(rows()))


def test_a_model_with_an_unknown_head_is_refused():
    model = tiny_llama(VOCAB)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="Sequential"):
        attach_statistics(model, support=None)


# ---- no vocabulary-sized tensor ----

LARGE_VOCAB, WIDTH, POSITIONS = 20_000, 16, 200


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def largest_tensor(kernel: str, support: str | None, loss: Callable, tied: bool = True) -> int:
    """Of one training step on 200 positions with a large vocabulary."""
    model = tiny_llama(
        LARGE_VOCAB, hidden_size=WIDTH, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied
    )
    add_value_head(model)
    attach_statistics(model, support=support, kernel=kernel)
    model.train()
    batch = PackedCollator(0)([random_trajectory(seed, LARGE_VOCAB, 5, 40, largest_set=20) for seed in range(5)])
    assert len(batch["taken_N"]) == POSITIONS
    with _Largest() as largest:
        loss(statistics(model, batch)).backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0
    return largest.elements


def default_loss(stats) -> Tensor:
    return IQLearn()(stats).loss + OffSupport()(stats).loss


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_of_the_default_objective_forms_nothing_of_the_size_positions_times_vocabulary(tied):
    largest = largest_tensor("candidates", OffSupport().support, default_loss, tied)
    assert largest >= LARGE_VOCAB * WIDTH  # the gradient of the output matrix: the recording reaches the backward pass
    assert largest < POSITIONS * LARGE_VOCAB / 2


def test_without_an_off_support_term_nothing_exceeds_the_output_matrix():
    assert largest_tensor("candidates", None, lambda stats: IQLearn()(stats).loss) == LARGE_VOCAB * WIDTH


def test_the_recording_sees_the_dense_kernel():
    assert largest_tensor("reference", OffSupport().support, default_loss) >= POSITIONS * LARGE_VOCAB


@pytest.mark.parametrize("chunk", [50, 5])
def test_the_whole_vocabulary_is_visited_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(chunked, "_MAX_ELEMENTS", chunk * LARGE_VOCAB)
    largest = largest_tensor("candidates", "vocabulary", lambda stats: SFT()(stats).loss)
    assert largest == max(chunk, WIDTH) * LARGE_VOCAB


def test_attaching_survives_a_copy_of_the_weights_only():
    """A copy of the state dict into a fresh model gives the same statistics: nothing hides outside of the weights."""
    model = prepared("union")
    torch.nn.init.normal_(model.value_head.weight)
    other = prepared("union", seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    batch = PackedCollator(0)(rows())
    for name, value in model(**batch).items():
        assert torch.equal(other(**batch)[name], value), name
