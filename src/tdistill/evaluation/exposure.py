"""Exposure bias: how the gap to the teacher grows on the student's own prefixes, against the teacher's prefixes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tdistill.evaluation.batching import length_sorted
from tdistill.evaluation.bootstrap import Interval, bootstrap_weighted
from tdistill.evaluation.divergence import kl_rows, require_finite
from tdistill.evaluation.states import blocks, log_probs, open_head, response_states

_log = logging.getLogger(__name__)


class ExposureSettings(BaseModel):
    """How far along the answers exposure bias is measured.

    Attributes:
        min_share: the curve ends where answers of fewer than this share of the prompts are as long, be it the
            student's or the teacher's: the few longest answers are not like the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_share: float = Field(default=0.5, gt=0, le=1)


class ExposurePoint(BaseModel):
    """ExAccErr at one length, as a share, with its interval; low and high are None where the data define none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None


class ExposureCurve(BaseModel):
    """Divergence of one student over position; entry t − 1 of a list belongs to position t.

    Attributes:
        subject: name of the student.
        kl_own_prefixes: mean KL(teacher‖student) at position t of the student's own answers, nats.
        kl_teacher_prefixes: the same on the teacher's answers.
        excess: ExAccErr(t), as a share; None where the divergence on the teacher's prefixes is 0 so far.
        num_prompts_own: prompts with an answer of the student that has a position t.
        num_prompts_teacher: prompts with an answer of the teacher that has one.
        points: ExAccErr with intervals, at lengths 1, 2, 4, … and the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: str
    kl_own_prefixes: tuple[FiniteFloat, ...]
    kl_teacher_prefixes: tuple[FiniteFloat, ...]
    excess: tuple[FiniteFloat | None, ...]
    num_prompts_own: tuple[int, ...]
    num_prompts_teacher: tuple[int, ...]
    points: tuple[ExposurePoint, ...]


@dataclass(frozen=True)
class PositionSums:
    """Sums over the answers of each prompt, position by position; both float64 [prompts, positions].

    Attributes:
        kl_PT: Σ over answers of KL(π*‖π_Q) at the state before their token t, nats.
        count_PT: answers that have a token t.
    """

    kl_PT: np.ndarray
    count_PT: np.ndarray

    @classmethod
    def gather(cls, values: Sequence[np.ndarray], prompt_of: Sequence[int], num_prompts: int) -> PositionSums:
        """Sum values [T] of single answers over the answers of each prompt."""
        kl_PT = np.zeros((num_prompts, max(map(len, values))))
        count_PT = np.zeros_like(kl_PT)
        for value_T, prompt in zip(values, prompt_of, strict=True):
            kl_PT[prompt, : len(value_T)] += value_T
            count_PT[prompt, : len(value_T)] += 1
        return cls(kl_PT, count_PT)

    def means(self, weights_RP: np.ndarray) -> np.ndarray:
        """Mean divergence at each position over the answers that reach it, [R, positions]; 0 where none does."""
        count_RT = weights_RP @ self.count_PT
        return np.divide(weights_RP @ self.kl_PT, count_RT, out=np.zeros_like(count_RT), where=count_RT > 0)

    def means_without_each(self) -> np.ndarray:
        """:meth:`means` over all prompts but one, for each prompt, [prompts, positions]."""
        count_PT = self.count_PT.sum(0) - self.count_PT
        return np.divide(self.kl_PT.sum(0) - self.kl_PT, count_PT, out=np.zeros_like(count_PT), where=count_PT > 0)

    def reaching(self) -> np.ndarray:
        """Prompts with an answer that has each position, int [positions]."""
        return (self.count_PT > 0).sum(axis=0)


@dataclass(frozen=True)
class Exposure:
    """What :func:`exposure` measures: the curve, and three numbers at its end.

    Attributes:
        curve: the values at every position.
        kl_own: R(l)/l at the last length l.
        kl_teacher: ε(l).
        excess: ExAccErr(l) as a share, or None where ε(l) is 0.
    """

    curve: ExposureCurve
    kl_own: Interval
    kl_teacher: Interval
    excess: Interval | None


def kl_by_position(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    vocab_size: int,
    batch_size: int = 8,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    names: Sequence[str] | None = None,
    progress: str | None = None,
) -> dict[str, list[np.ndarray]]:
    """Divergence between teacher and students before every token of given answers.

    KL(π*‖π_Q)(s_t) = Σ_{a<V} π*(a|s_t) (log π*(a|s_t) − log π_Q(a|s_t)), as in
    :func:`~tdistill.evaluation.divergence.divergences`, but the logits are computed from the final hidden states, a
    block of positions at a time: of a batch only the hidden states are held, N · D numbers for each model.

    Args:
        teacher: causal language model.
        students: name → model.
        pairs: prompt and answer tokens, int [P] and [T] each; whoever wrote the answer chose the prefixes.
        vocab_size: tokens of the tokenizer.
        batch_size: answers of one forward pass.
        temperature: logits of both are divided by it.
        teacher_temperature: as in :func:`~tdistill.evaluation.divergence.divergences`.
        names: what messages call the answers; None: their numbers.
        progress: label of a progress bar, or None.
    Returns:
        Student name → float64 [T] for each answer, nats.
    Raises:
        UnsupportedModelError: a model changes its logits in a way that is not known.
        TokenizerMismatchError: a model has fewer output tokens than the tokenizer.
        ModelLogitsError: NaN or infinite; names the model and the answer.
    """
    teacher_head = open_head(teacher, "teacher", vocab_size)
    heads = {name: open_head(student, name, vocab_size) for name, student in students.items()}
    values: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] * len(pairs) for name in students}
    with tqdm(total=sum(len(r) for _, r in pairs), desc=progress, unit="token", disable=progress is None) as bar:
        for batch in length_sorted([len(prompt) + len(answer) for prompt, answer in pairs], batch_size):
            chosen = [pairs[index] for index in batch]
            teacher_ND = response_states(teacher, chosen)
            states = {name: response_states(student, chosen) for name, student in students.items()}
            rows: dict[str, list[Tensor]] = {name: [] for name in students}
            for block in blocks(len(teacher_ND)):
                teacher_CV = log_probs(teacher_head, teacher_ND[block], vocab_size, temperature * teacher_temperature)
                for name, states_ND in states.items():
                    student_CV = log_probs(heads[name], states_ND[block], vocab_size, temperature)
                    rows[name].append(kl_rows(teacher_CV, student_CV.to(teacher_CV.device)).cpu())
            ends = np.cumsum([len(answer) for _, answer in chosen])[:-1]
            for name, parts in rows.items():
                # float64 on the host: some accelerators have none.
                for index, value_T in zip(batch, np.split(torch.cat(parts).double().numpy(), ends), strict=True):
                    values[name][index] = value_T
            bar.update(len(teacher_ND))
    names = names or [f"answer {index}" for index in range(len(pairs))]
    for name, found in values.items():
        require_finite(np.array([value_T.sum() for value_T in found]), name, names)
    return values


def exposure(
    own: PositionSums,
    teacher: PositionSums,
    subject: str,
    *,
    min_share: float = 0.5,
    seed: int = 0,
    level: float = 0.95,
) -> Exposure:
    """Excess accumulated error: the part of a student's error that comes from its own prefixes.

    ExAccErr(l) = (R(l) − l ε(l)) / (l ε(l)),
    R(l) = Σ_{t≤l} E_{y_<t ~ π_Q} KL(π*‖π_Q)(y_<t),   ε(l) = 1/l Σ_{t≤l} E_{y_<t ~ π*} KL(π*‖π_Q)(y_<t).
    Source: MiniLLM, arXiv 2306.08543, the section on exposure bias and its appendix, after Arora et al. 2022,
    arXiv 2204.01171. The divergence is the forward one: the next token is drawn from the teacher, also after the
    student's prefix.
    Differs from the source: a share instead of per cent; the expectation over the next token is the exact sum over
    the vocabulary instead of a sample; the mean at position t is over the answers that are as long, and the curve ends
    where too few are; prefixes are the answers at hand, which may come from truncated policies.

    Args:
        own: divergences along the student's own answers.
        teacher: divergences along the teacher's answers to the same prompts, in the same order.
        subject: name of the student.
        min_share: see :class:`ExposureSettings`.
        seed: seed of the resampling of prompts; both parts of a prompt are drawn together.
        level: confidence level.
    Returns:
        :class:`Exposure`; positive ``excess`` means that the student is farther from the teacher on its own prefixes.
    """
    num_prompts = len(own.kl_PT)
    width = min(own.kl_PT.shape[1], teacher.kl_PT.shape[1])
    reach_own, reach_teacher = own.reaching()[:width], teacher.reaching()[:width]
    enough = np.minimum(reach_own, reach_teacher) >= min_share * num_prompts
    # The first token of every answer exists, so the curve has one position at least.
    length = max(1, int(np.logical_and.accumulate(enough).sum()))

    def accumulated(part: PositionSums, weights_RP: np.ndarray, end: int) -> np.ndarray:
        return PositionSums(part.kl_PT[:, :end], part.count_PT[:, :end]).means(weights_RP).sum(axis=1)

    def excess_at(end: int) -> Interval | None:
        def statistic(weights_RP: np.ndarray) -> np.ndarray:
            return accumulated(own, weights_RP, end) / accumulated(teacher, weights_RP, end) - 1.0

        if sums_teacher[end - 1] <= 0:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            left_out = own_left_out[:, end - 1] / teacher_left_out[:, end - 1] - 1.0
        return bootstrap_weighted(statistic, left_out, seed, level)

    def mean_of(part: PositionSums, left_out_PT: np.ndarray) -> Interval:
        def statistic(weights_RP: np.ndarray) -> np.ndarray:
            return accumulated(part, weights_RP, length) / length

        return bootstrap_weighted(statistic, left_out_PT[:, -1] / length, seed, level)

    own_left_out, teacher_left_out = (
        np.cumsum(part.means_without_each()[:, :length], axis=1) for part in (own, teacher)
    )
    everyone = np.ones((1, num_prompts))
    kl_own, kl_teacher = own.means(everyone)[0, :length], teacher.means(everyone)[0, :length]
    sums_own, sums_teacher = np.cumsum(kl_own), np.cumsum(kl_teacher)
    lengths = sorted({*(2**i for i in range(length.bit_length())), length})
    points = [(end, at) for end in lengths if (at := excess_at(end)) is not None]
    if not points or points[-1][0] != length:
        _log.warning("The excess accumulated error of %s is not recorded: it is the teacher on its prefixes.", subject)
    curve = ExposureCurve(
        subject=subject,
        kl_own_prefixes=tuple(kl_own.tolist()),
        kl_teacher_prefixes=tuple(kl_teacher.tolist()),
        excess=tuple(
            float(r / e - 1.0) if e > 0 else None for r, e in zip(sums_own.tolist(), sums_teacher.tolist(), strict=True)
        ),
        num_prompts_own=tuple(reach_own[:length].tolist()),
        num_prompts_teacher=tuple(reach_teacher[:length].tolist()),
        points=tuple(ExposurePoint(length=end, **at._asdict()) for end, at in points),
    )
    last = points[-1][1] if points and points[-1][0] == length else None
    return Exposure(curve, mean_of(own, own_left_out), mean_of(teacher, teacher_left_out), last)
