"""One training step of each kind, ready to be timed or weighed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdistill.bench import peers
from tdistill.bench.workload import MAX_ACTIONS, NUM_SEQUENCES, P_MAX, Workload
from tdistill.head import output_head
from tdistill.kernels.dispatch import student_statistics
from tdistill.training import TDistillConfig, TDistillTrainer
from tdistill.training.collate import PackedCollator
from tdistill.training.student import VALUE_HEAD
from tdistill.types import ActionStats

STUDENT_LAYERS = 10
BD = {"bd": "none", "bd_uncapped": "none", "bd_default": "negatives"}
"""Steps of Bellman Distill with the library's default objective → their off-support control."""

Step = Callable[[], None]


def build_step(
    name: str,
    workload: Workload,
    *,
    vocab_size: int | None = None,
    num_sequences: int = NUM_SEQUENCES,
    optimiser: bool = False,
) -> Step:
    """A function that runs one step: gradients cleared, forward, backward, and the optimiser's update if asked for.

    Args:
        name: ``body`` (the transformer without its head, the floor of any step), ``bd``, ``bd_uncapped``,
            ``bd_default``, ``sft``, ``kd_live``, ``trl_chunked``, ``trl_gkd`` or ``authors``.
        workload: models and trajectories.
        vocab_size: of the student, if not the teacher's; token ids are taken modulo it.
        num_sequences: of the micro-batch.
        optimiser: AdamW with clipped gradients on top.
    """
    student = workload.student(STUDENT_LAYERS, vocab_size)
    trajectories = workload.batch(num_sequences, None if name == "bd_uncapped" else MAX_ACTIONS)
    batch = PackedCollator(0)(trajectories)
    size = student.get_output_embeddings().weight.shape[0]
    batch = {key: value.to(student.device) for key, value in batch.items()}
    for key in ("input_ids", "action_ids_M", "taken_N"):
        batch[key] = batch[key] % size
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    loss = _bd_loss(student, workload, BD[name], batch) if name in BD else _other_loss(name, student, workload, inputs)
    update = torch.optim.AdamW(student.parameters(), lr=1e-5) if optimiser else None

    def step() -> None:
        student.zero_grad(set_to_none=True)
        loss().backward()
        if update is not None:
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            update.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def _bd_loss(student: Any, workload: Workload, off_support: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    args = TDistillConfig(
        tempfile.mkdtemp(), off_support=off_support, use_cpu=not torch.cuda.is_available(), save_strategy="no"
    )
    trainer = TDistillTrainer(student, args, workload.store)
    counts = torch.tensor([int(batch["has_action_N"].sum()), 0])
    return lambda: trainer.compute_loss(student, batch, num_items_in_batch=counts)


def _other_loss(name: str, student: Any, workload: Workload, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    labels_BT = inputs["input_ids"].clone()
    labels_BT[:, 0] = -100
    if name == "body":
        return lambda: student.base_model(**inputs, use_cache=False).last_hidden_state.sum()
    if name == "sft":
        return lambda: peers.supervised(student, inputs, labels_BT)
    teacher = workload.load_teacher().to(student.device)
    return {
        "kd_live": lambda: peers.forward_kl(student, teacher, inputs),
        "trl_chunked": lambda: peers.trl_chunked(student, teacher, inputs, labels_BT),
        "trl_gkd": lambda: peers.trl_gkd(student, teacher, inputs, labels_BT),
        "authors": lambda: peers.released_formulation(student, teacher, inputs, P_MAX),
    }[name]


def build_head_step(name: str, workload: Workload, *, num_sequences: int = NUM_SEQUENCES) -> Step:
    """The output head alone, forward and backward to hidden states and matrix, on random hidden states.

    Args:
        name: ``candidates`` (sets only), ``default`` (with the default off-support control) or ``dense``
            (cross-entropy of all logits).
        workload: models and trajectories.
        num_sequences: of the micro-batch.
    """
    student = workload.student(1)
    args = TDistillConfig(
        tempfile.mkdtemp(),
        off_support="negatives" if name == "default" else "none",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
    )
    trainer = TDistillTrainer(student, args, workload.store)
    value_head = getattr(student, VALUE_HEAD)
    batch = PackedCollator(0)(workload.batch(num_sequences))
    batch = {key: value.to(student.device) for key, value in batch.items()}
    num_rows, width = len(batch["taken_N"]), student.config.hidden_size
    hidden_ND = torch.randn(num_rows, width, device=student.device, requires_grad=True)
    head = output_head(student)
    lists: dict[str, Any] = {key: batch[key] for key in ("offsets", "action_ids_M", "taken_N")}
    # The embedding's dense gradient, which takes up the rows' sparse one.
    embedding_gradient = torch.zeros_like(head.weight_VD)

    def step() -> None:
        hidden_ND.grad, head.weight_VD.grad = None, None if name == "dense" else embedding_gradient
        if name == "dense":
            loss = nn.functional.cross_entropy(head.logits(hidden_ND), batch["taken_N"], reduction="sum")
        else:
            out = student_statistics(hidden_ND, head, **lists, support=trainer.support)
            known: dict[str, Any] = {key: batch[key] for key in ActionStats.__dataclass_fields__ if key in batch}
            stats = ActionStats(**{**known, **out, "value_N": value_head(hidden_ND).squeeze(-1)})
            loss = trainer.objective(stats).loss
            if trainer.uses_off_support:
                loss = loss + trainer.off_support(stats).loss
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step
