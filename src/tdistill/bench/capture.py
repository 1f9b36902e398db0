"""Time of a capture against plain generation of the same answers, and against a plain forward pass in score mode."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import linregress
from torch import Tensor
from transformers import LogitsProcessor

from tdistill.bench.timing import interleaved_medians
from tdistill.errors import ConfigError
from tdistill.evaluation.batching import measured, pad
from tdistill.evaluation.generation import decode
from tdistill.store import Store
from tdistill.store.capture import capture
from tdistill.teachers.base import PromptTokens, SamplingSettings
from tdistill.teachers.hf import HFTeacher
from tdistill.types import Trajectory


def measure(
    teacher: HFTeacher, prompts: Sequence[PromptTokens], settings: SamplingSettings, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Time captures of ``prompts`` in both modes, and what else one would run for the same answers; medians, in turns.

    A capture here is all of it, the writing of the store included. *Plain generation* decodes the same answers in the
    same batches under a processor that forces the next known token; a capture decodes one step more where an answer was
    cut, for the state after its last token. The *plain forward pass* is the model's own, with logits at all positions
    of prompts and answers.

    Args:
        teacher: the teacher.
        prompts: rendered prompts, at least three batches of them: a line through fewer points fits by itself.
        settings: how answers are drawn and sets are cut.
        batch_size: answers that the teacher is asked for at once.
        rounds: timed rounds, after one that does not count.
    Returns:
        ``capture_s``, ``plain_generate_s``, ``score_s`` and ``plain_forward_s``; the ratios
        ``capture_per_plain_generate`` and ``score_per_plain_forward``;
        ``response_tokens`` and ``response_tokens_per_s`` of the capture; ``wasted_row_steps``, the share of decoded
        rows whose answer had ended; ``growth`` with ``num_prompts``, ``capture_s`` for each and ``r_squared`` of the
        least-squares line through them.
    Raises:
        ConfigError: fewer than three batches of prompts.
    """
    if len(prompts) < 3 * batch_size:
        raise ConfigError(
            f"{len(prompts)} prompts are fewer than 3 batches of {batch_size}, and the growth of the time with their "
            "number cannot be measured. Use more prompts or a smaller batch_size."
        )
    asked = _Asked(teacher)
    generated = _captured(asked, prompts, settings, batch_size)
    decoded = [[generated[name] for name in batch] for batch in asked.generated]
    replays = [_Replay(teacher, batch) for batch in decoded]
    given = [
        replace(prompt, response_ids=answer.response_ids, ends=answer.ends)
        for prompt in prompts
        for answer in [generated[prompt.prompt_id]]
    ]
    _captured(asked, given, settings, batch_size, "score")
    forwards = [[generated[name] for name in batch] for batch in asked.scored]
    sizes = [batch_size * n for n in range(1, len(prompts) // batch_size)]

    seconds = interleaved_medians(
        {
            "capture": partial(_capture, teacher, prompts, settings, batch_size),
            "plain_generate": lambda: [replay.run() for replay in replays],
            "score": partial(_capture, teacher, given, settings, batch_size, "score"),
            "plain_forward": lambda: [_forward(teacher, batch) for batch in forwards],
            **{str(size): partial(_capture, teacher, prompts[:size], settings, batch_size) for size in sizes},
        },
        rounds,
    )
    growth = [seconds.pop(str(size)) for size in sizes] + [seconds["capture"]]
    sizes = [*sizes, len(prompts)]
    tokens = sum(len(answer.response_ids) for answer in generated.values())
    row_steps = sum(len(batch) * max(len(answer.sets) for answer in batch) for batch in decoded)
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "capture_per_plain_generate": seconds["capture"] / seconds["plain_generate"],
        "score_per_plain_forward": seconds["score"] / seconds["plain_forward"],
        "response_tokens": tokens,
        "response_tokens_per_s": tokens / seconds["capture"],
        "wasted_row_steps": 1 - sum(len(answer.sets) for answer in generated.values()) / row_steps,
        "growth": {
            "num_prompts": sizes,
            "capture_s": growth,
            "r_squared": float(linregress(sizes, growth).rvalue ** 2),
        },
        "batch_size": batch_size,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "device": str(teacher.model.device),
    }


class _Asked:
    """A teacher, and the prompt ids of the batches that a capture asked it for."""

    def __init__(self, teacher: HFTeacher) -> None:
        self.teacher = teacher
        self.generated: list[list[str]] = []
        self.scored: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def generate(self, requests: Sequence[tuple[PromptTokens, int]], settings: SamplingSettings) -> list[Trajectory]:
        self.generated.append([prompt.prompt_id for prompt, _ in requests])
        return self.teacher.generate(requests, settings)

    def score(self, requests: Sequence[PromptTokens], settings: SamplingSettings) -> list[Trajectory]:
        self.scored.append([prompt.prompt_id for prompt in requests])
        return self.teacher.score(requests, settings)


def _captured(
    teacher: Any, prompts: Sequence[PromptTokens], settings: SamplingSettings, batch_size: int, mode: Any = "generate"
) -> dict[str, Trajectory]:
    """What a capture stores, by prompt."""
    with tempfile.TemporaryDirectory() as folder:
        store = _capture(teacher, prompts, settings, batch_size, mode, folder)
        answers = [store[row] for row in range(len(store))]
    return {answer.prompt_id: answer for answer in answers}


def _capture(
    teacher: Any,
    prompts: Sequence[PromptTokens],
    settings: SamplingSettings,
    batch_size: int,
    mode: Any = "generate",
    folder: str | None = None,
) -> Store:
    """Capture into a folder, or into one that is removed at once."""
    with tempfile.TemporaryDirectory() as scratch:
        return capture(
            teacher,
            prompts,
            folder or scratch,
            settings,
            mode=mode,
            batch_size=batch_size,
            shard_prompts=len(prompts),
            tokenizer_sha256="",
            template=None,
            progress=False,
        )


class _Replay(LogitsProcessor):
    """Plain generation of one batch whose answers are known."""

    def __init__(self, teacher: HFTeacher, answers: Sequence[Trajectory]) -> None:
        self.teacher, self.answers = teacher, answers
        self.num_tokens = max(len(answer.response_ids) for answer in answers)
        forced_BT = np.full((len(answers), self.num_tokens), teacher.end_token_ids[0])
        for row, answer in enumerate(answers):
            forced_BT[row, : len(answer.response_ids)] = answer.response_ids
        self.forced = torch.from_numpy(forced_BT).to(teacher.model.device).unbind(1)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced_B = self.forced[self.step]
        self.step += 1
        return scores.scatter_(1, forced_B[:, None], torch.inf)

    def run(self) -> np.ndarray:
        """Tokens, int64 [B, steps]. Copying them to the host waits for the accelerator."""
        self.step = 0
        prompts_ids = [answer.prompt_ids for answer in self.answers]
        with measured(self.teacher.model):
            return decode(self.teacher.model, prompts_ids, self.teacher.end_token_ids, self.num_tokens, self)


@torch.inference_mode()
def _forward(teacher: HFTeacher, answers: Sequence[Trajectory]) -> float:
    """One forward pass over prompts and answers, logits everywhere."""
    rows = [np.concatenate([answer.prompt_ids, answer.response_ids]) for answer in answers]
    input_ids, mask = pad(rows, teacher.tokenizer.pad_token_id, side="right")
    device = teacher.model.device
    logits_BTV = teacher.model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return float(logits_BTV[0, -1, 0])
