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
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from tdistill.bench.timing import interleaved_medians
from tdistill.errors import ConfigError
from tdistill.store import Store
from tdistill.store.capture import capture
from tdistill.teachers.base import PromptTokens, SamplingSettings
from tdistill.teachers.hf import HFTeacher
from tdistill.types import Trajectory

# Numbers of whole batches, from one to all of them, at which the growth of the time is measured.
_NUM_SIZES = 4


def measure(
    teacher: HFTeacher, prompts: Sequence[PromptTokens], settings: SamplingSettings, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Time captures of ``prompts`` in both modes, and what else one would run for the same answers; medians, in turns.

    A capture here is all of it, the writing of the store included. *Plain generation* decodes the same answers in the
    same batches with the same number of steps under a processor that forces the next known token. A capture decodes one
    step more than its answers need where an answer was cut, for the state after its last token;
    ``plain_generate_answers_s`` leaves that step out. The *plain forward pass* is the model's own, with logits at all
    positions of prompts and answers.

    Args:
        teacher: the teacher.
        prompts: rendered prompts, at least three batches of them: a line through fewer points fits by itself.
        settings: how answers are drawn and sets are cut.
        batch_size: answers that the teacher is asked for at once.
        rounds: timed rounds, after one that does not count.
    Returns:
        ``capture_s``, ``plain_generate_s``, ``plain_generate_answers_s``, ``score_s`` and ``plain_forward_s``; the
        ratios ``capture_per_plain_generate``, ``capture_per_plain_generate_answers`` and ``score_per_plain_forward``;
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
    generated = _capture(asked, prompts, settings, batch_size)
    replays = [_Replay(teacher, [generated[name] for name in batch]) for batch in asked.generated]
    given = [
        replace(prompt, response_ids=answer.response_ids, ends=answer.ends)
        for prompt in prompts
        for answer in [generated[prompt.prompt_id]]
    ]
    _capture(asked, given, settings, batch_size, "score")
    forwards = [[generated[name] for name in batch] for batch in asked.scored]
    whole = len(prompts) // batch_size
    sizes = (batch_size * np.unique(np.linspace(1, whole, min(whole, _NUM_SIZES)).astype(int))).tolist()

    seconds = interleaved_medians(
        {
            "capture": partial(_capture, teacher, prompts, settings, batch_size),
            "plain_generate": lambda: [replay.run(replay.num_states) for replay in replays],
            "plain_generate_answers": lambda: [replay.run(replay.num_tokens) for replay in replays],
            "score": partial(_capture, teacher, given, settings, batch_size, "score"),
            "plain_forward": lambda: [_forward(teacher, batch) for batch in forwards],
            **{str(size): partial(_capture, teacher, prompts[:size], settings, batch_size) for size in sizes},
        },
        rounds,
    )
    growth = [seconds.pop(str(size)) for size in sizes]
    tokens = sum(len(answer.response_ids) for answer in generated.values())
    row_steps = sum(len(replay.answers) * replay.num_states for replay in replays)
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "capture_per_plain_generate": seconds["capture"] / seconds["plain_generate"],
        "capture_per_plain_generate_answers": seconds["capture"] / seconds["plain_generate_answers"],
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


def _capture(
    teacher: Any, prompts: Sequence[PromptTokens], settings: SamplingSettings, batch_size: int, mode: Any = "generate"
) -> dict[str, Trajectory]:
    """Capture into a folder that is removed at once."""
    with tempfile.TemporaryDirectory() as folder:
        store: Store = capture(
            teacher,
            prompts,
            folder,
            settings,
            mode=mode,
            batch_size=batch_size,
            tokenizer_sha256="",
            template=None,
            progress=False,
        )
        return {store[row].prompt_id: store[row] for row in range(len(store))}


class _Replay(LogitsProcessor):
    """Plain generation of one batch whose answers are known."""

    def __init__(self, teacher: HFTeacher, answers: Sequence[Trajectory]) -> None:
        self.teacher, self.answers = teacher, answers
        self.num_tokens = max(len(answer.response_ids) for answer in answers)
        self.num_states = max(len(answer.sets) for answer in answers)
        forced_BT = np.full((len(answers), self.num_states), teacher.end_token_ids[0])
        for row, answer in enumerate(answers):
            forced_BT[row, : len(answer.response_ids)] = answer.response_ids
        self.forced = torch.from_numpy(forced_BT).to(teacher.model.device).unbind(1)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced_B = self.forced[self.step]
        self.step += 1
        return scores.scatter_(1, forced_B[:, None], torch.inf)

    def run(self, num_steps: int) -> np.ndarray:
        """Tokens, int64 [B, num_steps]. Copying them to the host waits for the accelerator."""
        self.step = 0
        return self.teacher.decode([answer.prompt_ids for answer in self.answers], self, num_steps).cpu().numpy()


@torch.inference_mode()
def _forward(teacher: HFTeacher, answers: Sequence[Trajectory]) -> float:
    """One forward pass over prompts and answers, logits everywhere."""
    rows = [torch.as_tensor(np.concatenate([a.prompt_ids, a.response_ids]), dtype=torch.long) for a in answers]
    device = teacher.model.device
    logits_BTV = teacher.model(
        input_ids=pad_sequence(rows, True, teacher.tokenizer.pad_token_id).to(device),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], True, 0).to(device),
        use_cache=False,
    ).logits
    return float(logits_BTV[0, -1, 0])
