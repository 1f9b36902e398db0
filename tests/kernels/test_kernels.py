"""The kernels against float64: root mean square error no larger than twice that of the dense float32 computation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from builders import random_trajectory, tiny_llama
from peft import LoraConfig, get_peft_model
from references.sets import log_sum_exp
from torch import Tensor

from tdistill.errors import UnsupportedModelError
from tdistill.head import OutputHead, output_head
from tdistill.kernels import candidates, chunked
from tdistill.kernels.dispatch import draw_negatives, student_statistics
from tdistill.training.collate import PackedCollator

N, D, V = 60, 48, 300
FACTOR = 2.0
NAMES = ("q_M", "q_taken_N", "log_normaliser_N")


@dataclass(frozen=True)
class Problem:
    """Inputs of a kernel, and a random weight for each output so that one backward pass tests all gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    offsets: Tensor
    ids: Tensor
    taken: Tensor
    cotangents: dict[str, Tensor]

    def run(
        self, kernel: str, support: str | None, dtype: torch.dtype | None = None, autocast: bool = False
    ) -> dict[str, Tensor]:
        """Outputs and gradients; with ``dtype``, everything is converted to it first."""
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_()
            for name, value in [("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)]
            if value is not None
        }
        torch.manual_seed(0)  # the same negatives for every kernel
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = student_statistics(
                leaves["hidden"],
                OutputHead(leaves["weight"], leaves.get("bias"), self.scale, self.softcap),
                offsets=self.offsets,
                action_ids_M=self.ids,
                taken_N=self.taken,
                support=support,
                kernel=kernel,
            )
        got = {name: value for name, value in outputs.items() if value is not None}
        sum((value * self.cotangents[name].to(value.dtype)).sum() for name, value in got.items()).backward()
        return {**got, **{f"grad_{name}": leaf.grad for name, leaf in leaves.items()}}


def problem(bias: bool = False, scale: float = 1.0, softcap: float | None = None, dtype=torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 9, (N,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    num_slots = int(offsets[-1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Problem(
        hidden=(normal(N, D) * 3).to(dtype),
        weight=normal(V, D),
        bias=normal(V) * 5 if bias else None,
        scale=scale,
        softcap=softcap,
        offsets=offsets,
        # Few distinct tokens: rows of the output matrix collect gradients from many pairs.
        ids=torch.randint(0, V, (num_slots,), generator=generator) // 4,
        taken=torch.randint(0, V, (N,), generator=generator),
        cotangents={name: normal(num_slots if name == "q_M" else N) for name in NAMES},
    )


def normaliser(hidden: Tensor, head: OutputHead, log_weight: Tensor | None = None) -> Tensor:
    """The chunked log-normaliser, with no pairs listed."""
    nothing = torch.zeros(len(hidden) + 1, dtype=torch.long)
    return chunked.normaliser_and_pairs(hidden, head, nothing, nothing[:0], log_weight)[0]


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 30.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 12.0},
    "bfloat16_hidden": {"dtype": torch.bfloat16, "bias": True},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("support", [None, "vocabulary", "union", "negatives"])
def test_errors_of_values_and_gradients(head, support, monkeypatch):
    monkeypatch.setattr(chunked, "_MAX_ELEMENTS", 7 * (V + 4096 * (support == "negatives")))
    case = problem(**HEADS[head])
    truth = case.run("reference", support, torch.float64)
    dense = case.run("reference", support)
    ours = case.run("candidates", support)
    assert set(ours) == set(truth)
    for name in truth:
        own_error = (dense[name].double() - truth[name]).square().mean().sqrt()
        error = (ours[name].double() - truth[name]).square().mean().sqrt()
        assert error <= FACTOR * own_error + 1e-30, name
        assert ours[name].dtype == dense[name].dtype, name
    assert ours["q_M"].dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_the_dense_kernel_is_the_formula(head):
    """softcap · tanh((h · W + b) · scale / softcap), gathered and log-summed in NumPy."""
    case = problem(**HEADS[head])
    got = case.run("reference", "vocabulary", torch.float64)
    logits = case.hidden.double().numpy() @ case.weight.double().numpy().T
    if case.bias is not None:
        logits = logits + case.bias.double().numpy()
    logits = logits * case.scale
    if case.softcap is not None:
        logits = case.softcap * np.tanh(logits / case.softcap)
    offsets = case.offsets.tolist()
    wanted = [logits[row, case.ids[slot]] for row in range(N) for slot in range(offsets[row], offsets[row + 1])]
    np.testing.assert_allclose(got["q_M"].detach(), wanted, rtol=1e-9)
    np.testing.assert_allclose(got["q_taken_N"].detach(), logits[np.arange(N), case.taken], rtol=1e-9)
    np.testing.assert_allclose(got["log_normaliser_N"].detach(), [log_sum_exp(row) for row in logits], rtol=1e-9)


def test_pair_products_pass_gradcheck():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    offsets, ids = torch.tensor([0, 3, 4, 4, 7]), torch.tensor([5, 5, 0, 0, 2, 1, 5])

    def logits(hidden, weight, bias):
        return candidates.pair_logits(hidden, OutputHead(weight, bias, 0.5, 3.0), offsets, ids)

    assert torch.autograd.gradcheck(logits, (hidden, weight, bias))


@pytest.mark.parametrize("rows_per_chunk", [1, 7, N, 10 * N])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_chunked_normaliser_equals_the_dense_one(rows_per_chunk, head, monkeypatch):
    monkeypatch.setattr(chunked, "_MAX_ELEMENTS", rows_per_chunk * V)
    assert len(list(chunked.chunk_slices(N, V))) == -(-N // rows_per_chunk)
    case = problem(**HEADS[head])
    dense = case.run("reference", "vocabulary", torch.float64)
    ours = case.run("candidates", "vocabulary", torch.float64)
    for name in ("log_normaliser_N", "grad_hidden", "grad_weight"):
        torch.testing.assert_close(ours[name], dense[name], rtol=1e-10, atol=1e-12)


def test_no_chunk_of_logits_is_kept_for_the_backward_pass(monkeypatch):
    """Chunks bound the peak only if each is thrown away: together they would be positions × vocabulary."""
    monkeypatch.setattr(chunked, "_MAX_ELEMENTS", 7 * V)
    case = problem()
    head, hidden = OutputHead(case.weight.requires_grad_()), case.hidden.requires_grad_()

    def kept_columns(normaliser) -> set[int]:
        kept = set()

        def pack(tensor: Tensor) -> Tensor:
            kept.add(tensor.shape[-1] if tensor.dim() else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            normaliser()
        return kept

    assert V in kept_columns(lambda: head.logits(hidden).logsumexp(-1))  # the dense computation keeps its logits
    assert V not in kept_columns(lambda: normaliser(hidden, head))


def test_chunks_cover_every_row_once_even_when_a_row_exceeds_the_bound(monkeypatch):
    monkeypatch.setattr(chunked, "_MAX_ELEMENTS", 10)
    for columns in (1, 3, 10, 11, 1000):
        rows = [row for chunk in chunked.chunk_slices(23, columns) for row in range(23)[chunk]]
        assert rows == list(range(23))


def test_normaliser_and_argmax(monkeypatch):
    monkeypatch.setattr(chunked, "_MAX_ELEMENTS", 7 * V)
    case = problem(**HEADS["all"])
    head = OutputHead(case.weight, case.bias, case.scale, case.softcap)
    normaliser, top = chunked.normaliser_and_argmax(case.hidden, head)
    logits = head.logits(case.hidden)
    assert torch.equal(top, logits.argmax(-1))
    torch.testing.assert_close(normaliser, torch.logsumexp(logits, -1))


def test_no_positions_give_no_normaliser():
    assert normaliser(torch.zeros(0, D), OutputHead(torch.zeros(V, D))).shape == (0,)


@pytest.mark.parametrize("kernel", ["candidates", "reference"])
def test_union_is_over_the_tokens_of_the_sets_alone(kernel):
    # Sets {1, 3} and {3, 4}: the normaliser of both rows runs over 1, 3, 4. The id in a row without an action says
    # nothing, so it must not change the support.
    logits = torch.log(torch.tensor([[9.0, 1.0, 9.0, 2.0, 3.0], [9.0, 4.0, 9.0, 5.0, 6.0]], dtype=torch.float64))
    for spare in (0, 2, 4):
        out = student_statistics(
            torch.eye(2, dtype=torch.float64),
            OutputHead(logits.T.contiguous()),
            offsets=torch.tensor([0, 2, 4]),
            action_ids_M=torch.tensor([1, 3, 3, 4]),
            taken_N=torch.tensor([3, spare]),
            support="union",
            kernel=kernel,
        )
        np.testing.assert_allclose(out["log_normaliser_N"], np.log([6.0, 15.0]), rtol=1e-12)


def test_negatives_give_every_token_the_weight_of_one_on_average():
    """Listed tokens exactly, the others within the spread of 2,000 draws per token: so the normaliser is unbiased."""
    torch.manual_seed(0)
    vocab, listed = 11, torch.tensor([3, 7, 3, 0])
    drawn, log_weight = draw_negatives(torch.unique(listed), vocab, num_negatives=2000 * vocab)
    total = torch.zeros(vocab).index_add(0, drawn, log_weight.exp())
    assert total[[0, 3, 7]].tolist() == [0.0, 0.0, 0.0]
    total[[0, 3, 7]] = 1.0
    torch.testing.assert_close(total, torch.ones(vocab), rtol=0, atol=5 / 2000**0.5)


def test_weighted_normaliser_by_hand():
    # Listed {1}; draws 0, 2, 1 of 4 tokens, each worth 4/3: 1 is listed already, so e^1 + 4/3 (e^0 + e^2).
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    weights = torch.log(torch.tensor([1.0, 4 / 3, 4 / 3, 0.0], dtype=torch.float64))
    head = OutputHead(logits.T[[1, 0, 2, 1]])
    found = normaliser(torch.ones(1, 1, dtype=torch.float64), head, weights)
    assert found.item() == pytest.approx(np.log(np.e + 4 / 3 * (1 + np.e**2)))


def test_negatives_change_from_call_to_call():
    draws = [draw_negatives(torch.tensor([0]), 1000, 50)[0] for _ in range(2)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("support", ["vocabulary", "union", "negatives"])
def test_autocast_does_not_lower_the_precision(support):
    case = problem()
    truth = case.run("reference", support, torch.float64)
    ours = case.run("candidates", support, autocast=True)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_through_a_model_reach_embeddings_once_or_twice(tied):
    """Candidates and dense logits give the same gradients to all parameters, the shared matrix included."""
    model = tiny_llama(tie_word_embeddings=tied).double()
    batch = PackedCollator(0)([random_trajectory(seed, 48, 4, 7) for seed in range(3)])
    results = {}
    for kernel in ("candidates", "reference"):
        model.zero_grad()
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        out = student_statistics(
            hidden.flatten(0, 1)[batch["position_index_N"]],
            output_head(model),
            offsets=batch["offsets"],
            action_ids_M=batch["action_ids_M"],
            taken_N=batch["taken_N"],
            support="union",
            kernel=kernel,
        )
        weights = torch.linspace(-1, 1, len(out["q_M"]), dtype=torch.float64)
        ((out["q_M"] * weights).sum() + out["q_taken_N"].sum() + out["log_normaliser_N"].square().sum()).backward()
        results[kernel] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in results["reference"]) is not tied
    for name, wanted in results["reference"].items():
        torch.testing.assert_close(results["candidates"][name], wanted, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("support", [None, "union", "negatives", "vocabulary"])
def test_lora_on_the_head_equals_the_adapted_models_logits(support):
    """PEFT's own logits of the same model, and the gradients of its factors."""
    model = tiny_llama(tie_word_embeddings=False).double()
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False))
    batch = PackedCollator(0)([random_trajectory(seed, 48, 4, 7) for seed in range(3)])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    at, sizes = batch["position_index_N"], batch["offsets"].diff()
    out = student_statistics(
        model.base_model(**inputs).last_hidden_state.flatten(0, 1)[at],
        output_head(model),
        offsets=batch["offsets"],
        action_ids_M=batch["action_ids_M"],
        taken_N=batch["taken_N"],
        support=support,
    )
    dense = adapted(**inputs).logits.flatten(0, 1)[at]
    wanted = dense[torch.repeat_interleave(torch.arange(len(at)), sizes), batch["action_ids_M"]]
    torch.testing.assert_close(out["q_M"], wanted, rtol=1e-10, atol=1e-12)
    factors = [p for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(factors) == 2
    for ours, theirs in zip(
        torch.autograd.grad(out["q_M"].square().sum(), factors),
        torch.autograd.grad(wanted.square().sum(), factors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    if support == "vocabulary":
        torch.testing.assert_close(out["log_normaliser_N"], dense.logsumexp(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_on_the_head_are_refused(settings):
    model = tiny_llama(tie_word_embeddings=False)
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], **settings))
    with pytest.raises(UnsupportedModelError, match="single LoRA adapter"):
        output_head(model)


@pytest.mark.parametrize("support", [None, "union", "negatives"])
def test_a_shared_matrix_gets_one_dense_gradient(support):
    """The rows' gradient is sparse until the embedding's dense one takes it up, so it costs no second matrix."""
    model = tiny_llama(tie_word_embeddings=True)
    batch = PackedCollator(0)([random_trajectory(seed, 48, 4, 7) for seed in range(3)])
    weight, seen = model.get_output_embeddings().weight, []
    head = output_head(model)
    assert head.weight_VD is weight is model.get_input_embeddings().weight
    hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    select = OutputHead.select

    def watched(self: OutputHead, ids: Tensor) -> OutputHead:
        # The function that hands the rows' gradient to the matrix.
        part = select(self, ids)
        part.weight_VD.grad_fn.register_hook(lambda given, received: seen.append(given[0].is_sparse))
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputHead, "select", watched)
        out = student_statistics(
            hidden.flatten(0, 1)[batch["position_index_N"]],
            head,
            offsets=batch["offsets"],
            action_ids_M=batch["action_ids_M"],
            taken_N=batch["taken_N"],
            support=support,
        )
    sum(value.square().sum() for value in out.values() if value is not None).backward()
    assert seen == [True]
    assert not weight.grad.is_sparse
