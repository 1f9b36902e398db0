"""What others would run in place of a step of Bellman Distill, on the same models and batch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel


def absent_peers() -> dict[str, str]:
    """Peers that are not measured → why."""
    trl = dict.fromkeys(("trl_chunked", "trl_gkd"), "trl is not installed: pip install 'tdistill[bench]'")
    return {"liger": "its kernels are written in Triton, which has no CPU"} | ({} if find_spec("trl") else trl)


def supervised(student: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor) -> Tensor:
    """Cross-entropy of transformers, as SFT uses it."""
    return student(**inputs, labels=labels_BT, use_cache=False).loss


def forward_kl(student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """KL(teacher‖student) over the vocabulary with the teacher in memory, mean per position.

    Source: arXiv 1503.02531, with the teacher's full distribution as target.
    """
    with torch.no_grad():
        log_probs_teacher = teacher(**inputs, use_cache=False).logits.log_softmax(-1)
    log_probs = student(**inputs, use_cache=False).logits.log_softmax(-1)
    return kl_div(log_probs, log_probs_teacher, reduction="sum", log_target=True) / log_probs.shape[:2].numel()


def trl_gkd(student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor) -> Tensor:
    """The loss of TRL's GKDTrainer at its default β = ½ (arXiv 2306.13649)."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        logits_teacher = teacher(**inputs, use_cache=False).logits[:, :-1]
    logits = student(**inputs, use_cache=False).logits[:, :-1]
    return GKDTrainer.generalized_jsd_loss(logits, logits_teacher, labels=labels_BT[:, 1:], beta=0.5)


def trl_chunked(
    student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor
) -> Tensor:
    """The loss path of TRL's DistillationTrainer: heads applied on tiles, generalised JSD at its default β = ½."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    with torch.no_grad():
        hidden_teacher = teacher.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    hidden = student.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    heads: list[Any] = [model.get_output_embeddings() for model in (student, teacher)]
    mask = (labels_BT[:, 1:] != -100).long()
    loss, _, _ = _chunked_divergence_loss(hidden, hidden_teacher, heads[0].weight, heads[1].weight, mask, beta=0.5)
    return loss


def released_formulation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: dict[str, Tensor],
    p: float,
    alpha: float = 0.1,
    gamma: float = 0.99,
    floor: float = -10.0,
    epsilon: float = 1e-8,
) -> Tensor:
    """The released code's step: dense [B, T, V] tensors of student and teacher, the first term over all |V| entries.

    Source: the released scripts of arXiv 2505.20335, rebuilt from their description; two of their definitions are
    missing, so they do not run themselves.
    """
    with torch.no_grad():
        probs = teacher(**inputs, use_cache=False).logits.softmax(-1)
        ranked, order = probs.sort(-1, descending=True)
        inside = torch.zeros_like(probs).scatter(-1, order, (ranked.cumsum(-1) - ranked < p).to(probs.dtype))
    q = student(**inputs, use_cache=False).logits
    q = (q - q.amax(-1, keepdim=True)).clamp(min=floor)
    policy = q.softmax(-1) * inside + epsilon
    policy = policy / policy.sum(-1, keepdim=True)
    value = (policy * (q - policy.log())).sum(-1)
    later = gamma * value[:, 1:]
    reward = inside[:, :-1] * q[:, :-1] - later[..., None]
    first = (reward - reward.square() / (4 * alpha)).mean(-1)
    return (value[:, :-1] - later - first).mean()
