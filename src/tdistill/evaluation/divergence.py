"""Distance between teacher and student over the full vocabulary, on given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tdistill.errors import ModelLogitsError, UnsupportedModelError
from tdistill.evaluation.batching import length_sorted
from tdistill.evaluation.states import blocks, check_size, log_probs, response_states
from tdistill.head import OutputHead, check_head, output_head
from tdistill.types import Trajectory


@dataclass(frozen=True)
class TokenTotals:
    """Sums over the tokens of each answer, in the order of the answers; every array is float64 [answers].

    Attributes:
        num_tokens: response tokens.
        kl_teacher_student: Σ_t KL(π*‖π_Q)(s_t), nats.
        nll: −Σ_t log π_Q(a_t|s_t), nats.
        nll_teacher: −Σ_t log π*(a_t|s_t), nats: the teacher's own loss.
        agreement_top1: positions where student and teacher have the same likeliest token.
        mass_outside_set: Σ_t of the student's mass off the stored set; None when the store lists no sets (p_max = 1).
    """

    num_tokens: np.ndarray
    kl_teacher_student: np.ndarray
    nll: np.ndarray
    nll_teacher: np.ndarray
    agreement_top1: np.ndarray
    mass_outside_set: np.ndarray | None


def divergences(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    trajectories: Sequence[Trajectory],
    *,
    vocab_size: int,
    batch_size: int = 8,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    progress: bool = False,
) -> dict[str, TokenTotals]:
    """Sum divergences and losses over the tokens of held-out answers, for all students in one pass of the teacher.

    KL(π*‖π_Q)(s) = Σ_{a<V} π*(a|s) (log π*(a|s) − log π_Q(a|s)), both softmaxes over the first V tokens.

    Logits and log-softmax are computed from the final hidden states in float32, a block of positions at a time: of a
    batch only the hidden states are held, N · D numbers for each model. A model whose output layer cannot be read holds
    the logits of the batch instead.

    Args:
        teacher: causal language model.
        students: name → model. The teacher itself may be among them: it is not run again.
        trajectories: prompts with answers; only the states before response tokens count.
        vocab_size: V, tokens of the tokenizer. Output matrices may be padded to different sizes beyond it.
        batch_size: answers of one forward pass.
        temperature: logits of both are divided by it.
        teacher_temperature: the teacher's are divided by this one too, that of the policy which it was asked for.
        progress: show a bar with tokens per second.
    Returns:
        Student name → :class:`TokenTotals`.
    Raises:
        TokenizerMismatchError: a model has fewer than V tokens.
        ModelLogitsError: a model's loss is NaN or infinite; names the model and the prompt.
    """
    totals = {name: {field.name: np.zeros(len(trajectories)) for field in fields(TokenTotals)} for name in students}
    has_sets = any(len(trajectory.sets.ids) for trajectory in trajectories)
    pairs = [(trajectory.prompt_ids, trajectory.response_ids) for trajectory in trajectories]
    teachers = _Policy(teacher, "teacher", vocab_size, temperature * teacher_temperature)
    policies = {
        name: _Policy(student, name, vocab_size, temperature)
        for name, student in students.items()
        if student is not teacher
    }
    with tqdm(total=sum(len(r) for _, r in pairs), desc="divergences", unit="token", disable=not progress) as bar:
        for batch in length_sorted([len(prompt) + len(response) for prompt, response in pairs], batch_size):
            chosen = [pairs[index] for index in batch]
            taken_N = torch.from_numpy(np.concatenate([response for _, response in chosen]).astype(np.int64))
            answer_N = np.repeat(batch, [len(response) for _, response in chosen])
            row_M, id_M = _set_slots([trajectories[index] for index in batch])
            teachers_NX = teachers.states(chosen)
            states = {name: policy.states(chosen) for name, policy in policies.items()}
            for block in blocks(len(taken_N)):
                teacher_CV = teachers.log_probs(teachers_NX[block])
                slots = slice(*np.searchsorted(row_M, [block.start, block.stop]))
                for name in students:
                    student_CV = teacher_CV
                    if name in policies:
                        student_CV = policies[name].log_probs(states[name][block]).to(teacher_CV.device)
                    rows = _token_values(teacher_CV, student_CV, taken_N[block])
                    rows["mass_outside_set"] = _mass_outside(student_CV, row_M[slots] - block.start, id_M[slots])
                    for quantity, value_C in rows.items():
                        _add_by_answer(totals[name][quantity], answer_N[block], value_C)
            bar.update(len(taken_N))
    prompt_names = [f"prompt '{trajectory.prompt_id}'" for trajectory in trajectories]
    for name, total in totals.items():
        require_finite(total["nll_teacher"], "teacher", prompt_names)
        require_finite(total["nll"] + total["kl_teacher_student"], name, prompt_names)
    complete = {name: TokenTotals(**total) for name, total in totals.items()}
    return complete if has_sets else {name: replace(of, mass_outside_set=None) for name, of in complete.items()}


def teacher_loss_on(
    teacher: PreTrainedModel,
    prompts_ids: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    vocab_size: int,
    batch_size: int = 8,
    temperature: float = 1.0,
    names: Sequence[str] | None = None,
    progress: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood under the teacher of answers that somebody else gave.

    −Σ_t log π*(a_t|s_t).  An estimate of the cross-entropy of the student's sampling policy against the teacher.

    Args:
        teacher: causal language model.
        prompts_ids: int [P] each.
        answers: int [T] each, one per prompt.
        vocab_size: tokens of the tokenizer.
        batch_size: as in :func:`divergences`.
        temperature: as in :func:`divergences`.
        names: what messages call the answers; None: their numbers.
        progress: label of a progress bar, or None.
    Returns:
        Sums, nats, and counts of tokens, both float64 [answers].
    Raises:
        ModelLogitsError: the teacher's loss is NaN or infinite; names the answer.
    """
    pairs = list(zip(prompts_ids, answers, strict=True))
    sums = np.zeros(len(pairs))
    counts = np.array([len(answer) for answer in answers], dtype=np.float64)
    policy = _Policy(teacher, "teacher", vocab_size, temperature)
    with tqdm(total=int(counts.sum()), desc=progress, unit="token", disable=progress is None) as bar:
        for batch in length_sorted([len(prompt) + len(answer) for prompt, answer in pairs], batch_size):
            chosen = [pairs[index] for index in batch]
            taken_N = torch.from_numpy(np.concatenate([answer for _, answer in chosen]).astype(np.int64))
            answer_N = np.repeat(batch, [len(answer) for _, answer in chosen])
            states_NX = policy.states(chosen)
            for block in blocks(len(taken_N)):
                log_probs_CV = policy.log_probs(states_NX[block])
                taken_C1 = taken_N[block].to(log_probs_CV.device)[:, None]
                _add_by_answer(sums, answer_N[block], -log_probs_CV.gather(1, taken_C1).squeeze(1))
            bar.update(len(taken_N))
    require_finite(sums, "teacher", names or [f"answer {index}" for index in range(len(pairs))])
    return sums, counts


class _Policy:
    """A model's distributions at the states of a batch.

    They come from the final hidden states, a block of positions at a time. A model whose output layer cannot be read
    (quantised, offloaded, logits changed in an unknown way) forms the logits of the whole batch itself.
    """

    def __init__(self, model: PreTrainedModel, name: str, vocab_size: int, temperature: float) -> None:
        self.model, self.name, self.vocab_size, self.temperature = model, name, vocab_size, temperature
        self.head: OutputHead | None = None
        try:
            check_head(model)
            self.head = output_head(model).ready(model.dtype)
            check_size(len(self.head.weight_VD), name, vocab_size)
        except UnsupportedModelError:
            pass

    def states(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
        """What :meth:`log_probs` needs of the states before each response token, answers one after another, [N, …]."""
        states_NX = response_states(self.model, pairs, own_logits=self.head is None)
        if self.head is None:
            check_size(states_NX.shape[1], self.name, self.vocab_size)
        return states_NX

    def log_probs(self, states_CX: Tensor) -> Tensor:
        """Log-probabilities of a block, at least float32 [C, V]."""
        if self.head is not None:
            return log_probs(self.head, states_CX, self.vocab_size, self.temperature)
        return torch.log_softmax(states_CX[:, : self.vocab_size].float() / self.temperature, dim=-1)


def _token_values(teacher_NV: Tensor, student_NV: Tensor, taken_N: Tensor) -> dict[str, Tensor]:
    """Per-token quantities [N] from two tables of log-probabilities on one device."""
    taken_N1 = taken_N.to(teacher_NV.device)[:, None]
    return {
        "num_tokens": torch.ones(len(taken_N)),
        "kl_teacher_student": kl_rows(teacher_NV, student_NV),
        "nll": -student_NV.gather(1, taken_N1).squeeze(1),
        "nll_teacher": -teacher_NV.gather(1, taken_N1).squeeze(1),
        "agreement_top1": teacher_NV.argmax(-1) == student_NV.argmax(-1),
    }


def kl_rows(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher‖student) of each row of two tables of log-probabilities, nats, [N]."""
    probs_NV = teacher_NV.exp()
    # A token that the teacher excludes (log-probability −∞) adds nothing: 0 · log 0 = 0.
    return (probs_NV * (teacher_NV - student_NV)).masked_fill_(probs_NV == 0, 0.0).sum(-1)


def _set_slots(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
    """Row of the packed answers and token id of every slot of the sets before response tokens, both int64 [M]."""
    rows, ids, base = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for trajectory in trajectories:
        num_states = len(trajectory.response_ids)
        offsets = trajectory.sets.offsets[: num_states + 1]
        rows.append(base + np.repeat(np.arange(num_states), np.diff(offsets)))
        ids.append(trajectory.sets.ids[: offsets[-1]].astype(np.int64))
        base += num_states
    return np.concatenate(rows), np.concatenate(ids)


def _mass_outside(student_NV: Tensor, row_M: np.ndarray, id_M: np.ndarray) -> Tensor:
    device = student_NV.device
    inside_M = student_NV[torch.from_numpy(row_M).to(device), torch.from_numpy(id_M).to(device)].exp()
    inside_N = torch.zeros(len(student_NV), dtype=torch.float64).index_add_(
        0, torch.from_numpy(row_M), inside_M.cpu().double()
    )
    return (1.0 - inside_N).clamp_(min=0.0)


def _add_by_answer(total: np.ndarray, answer_N: np.ndarray, value_N: Tensor) -> None:
    # float64 on the host: some accelerators have none.
    total += np.bincount(answer_N, weights=value_N.cpu().double().numpy(), minlength=len(total))


def require_finite(sums: np.ndarray, model: str, names: Sequence[str]) -> None:
    """Raise ModelLogitsError unless the sums are finite; names the model and the first of ``names`` that is not."""
    if not np.isfinite(sums).all():
        raise ModelLogitsError(
            f"Model '{model}' gives NaN or an infinite loss on {names[int(np.argmin(np.isfinite(sums)))]}. "
            "If it was trained in this run, lower the learning rate; otherwise load it in float32."
        )
