"""Error of the candidate kernel against float64, beside the dense float32 computation's own error."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from tdistill.bench.workload import Workload
from tdistill.head import OutputHead, output_head
from tdistill.kernels.dispatch import student_statistics
from tdistill.objectives import IQLearn, OffSupport
from tdistill.training.collate import STATS_FIELDS, PackedCollator
from tdistill.types import ActionStats

# Spread of the noise that turns the teacher's hidden states into a student's, of the states' own.
_NOISE = 0.3


def measure(workload: Workload, rounds: int = 5) -> dict[str, Any]:
    """Errors of loss and gradients on the teacher's matrix and its hidden states with noise.

    Of the loss the absolute error, of a gradient the root mean square over its elements.

    Returns:
        ``bare`` and ``default`` (with off-support control): for ``loss``, ``hidden`` and ``matrix`` the median over
        ``rounds`` draws of noise of ``candidates`` (error), ``dense`` (error) and ``ratio``.
    """
    model = workload.load_teacher().float()
    batch = PackedCollator(0)(workload.batch())
    with torch.no_grad():
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        states_ND = hidden.flatten(0, 1)[batch["position_index_N"]]
    head = output_head(model)
    found: dict[str, Any] = {"rounds": rounds}
    for name, control in (("bare", OffSupport("none")), ("default", OffSupport())):
        errors = [_errors(_with_noise(states_ND, seed), head, batch, control, seed) for seed in range(rounds)]
        found[name] = {
            what: {
                "candidates": statistics.median(ours[what] for ours, _ in errors),
                "dense": statistics.median(dense[what] for _, dense in errors),
                "ratio": statistics.median(ours[what] / dense[what] for ours, dense in errors),
            }
            for what in ("loss", "hidden", "matrix")
        }
    return found


def _with_noise(states_ND: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return states_ND + _NOISE * states_ND.std() * torch.randn(states_ND.shape, generator=generator)


def _errors(
    states_ND: Tensor, head: OutputHead, batch: dict[str, Tensor], control: OffSupport, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of candidates and of the dense float32 computation."""
    truth = _loss_and_gradients(states_ND.double(), head, batch, control, "reference", seed)
    found = []
    for kernel in ("candidates", "reference"):
        own = _loss_and_gradients(states_ND, head, batch, control, kernel, seed)
        found.append({name: float((own[name].double() - truth[name]).square().mean().sqrt()) for name in truth})
    return found[0], found[1]


def _loss_and_gradients(
    states_ND: Tensor, head: OutputHead, batch: dict[str, Tensor], control: OffSupport, kernel: Any, seed: int
) -> dict[str, Tensor]:
    hidden_ND = states_ND.clone().requires_grad_()
    weight_VD = head.weight_VD.detach().to(states_ND.dtype).clone().requires_grad_()
    own = OutputHead(weight_VD, None, head.scale, head.softcap)
    lists: dict[str, Any] = {key: batch[key] for key in ("offsets", "action_ids_M", "taken_N")}
    torch.manual_seed(seed)  # the same negatives for each kernel
    out = student_statistics(hidden_ND, own, **lists, support=control.support, kernel=kernel)
    known: dict[str, Any] = {key: batch[key] for key in STATS_FIELDS}
    stats = ActionStats(**{**known, **out, "value_N": hidden_ND.new_zeros(len(hidden_ND))})
    loss = IQLearn()(stats).loss
    if control.kind != "none":
        loss = loss + control(stats).loss
    loss.backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return {"loss": loss.detach(), "hidden": hidden_ND.grad, "matrix": weight_VD.grad}
