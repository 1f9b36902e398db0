"""A test double for a teacher, and what the store tests share."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdistill.store import Store
from tdistill.store.capture import capture
from tdistill.teachers.base import PromptTokens, SamplingSettings
from tdistill.types import ActionSets, Trajectory

VOCAB_SIZE, END_TOKEN = 50, 1


class FakeTeacher:
    """Test double: answers and sets are random numbers seeded by the request alone."""

    capabilities = frozenset({"generate", "score"})
    tokenizer = None
    end_token_ids = (END_TOKEN,)

    def __init__(self, **identity: Any) -> None:
        self.identity = {
            "weights_sha256": "aa" * 32,
            "model_type": "fake",
            "vocab_size": VOCAB_SIZE,
            "dtype": "float32",
            **identity,
        }
        self.batches: list[list[tuple[str, int]]] = []
        self.before_batch: Callable[[int], None] = lambda number: None

    def generate(self, requests: Sequence[tuple[PromptTokens, int]], settings: SamplingSettings) -> list[Trajectory]:
        self.before_batch(len(self.batches))
        self.batches.append([(prompt.prompt_id, index) for prompt, index in requests])
        return [self._answer(prompt, index, settings) for prompt, index in requests]

    def score(self, requests: Sequence[PromptTokens], settings: SamplingSettings) -> list[Trajectory]:
        self.before_batch(len(self.batches))
        self.batches.append([(prompt.prompt_id, 0) for prompt in requests])
        return [self._answer(prompt, 0, settings) for prompt in requests]

    def _answer(self, prompt: PromptTokens, index: int, settings: SamplingSettings) -> Trajectory:
        seed = hashlib.sha256(
            f"{prompt.prompt_id} {prompt.prompt_ids.tolist()} {index} {settings.seed}".encode()
        ).digest()
        rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        if prompt.response_ids is None:
            response = rng.integers(2, VOCAB_SIZE, size=rng.integers(1, settings.max_new_tokens + 1))
            ends = "truncated" if len(response) == settings.max_new_tokens else "terminal"
            if ends == "terminal":
                response[-1] = END_TOKEN
        else:
            response, ends = prompt.response_ids, prompt.ends
        return random_trajectory(
            rng,
            prompt_id=prompt.prompt_id,
            answer_index=index,
            prompt_ids=prompt.prompt_ids,
            response_ids=np.asarray(response, dtype=np.int32),
            ends=ends,
            source="teacher" if prompt.response_ids is None else "given",
            with_lists=settings.p_max < 1.0,
        )


def random_trajectory(rng: np.random.Generator, *, with_lists: bool, max_size: int = 6, **facts: Any) -> Trajectory:
    """A trajectory with random sets around the taken tokens. The last state of a truncated one is recorded."""
    response = facts["response_ids"]
    num_states = len(response) + (facts["ends"] == "truncated")
    ids, log_probs, covered, sizes = [], [], [], []
    for state in range(num_states):
        size = int(rng.integers(1, max_size + 1)) if with_lists else 0
        taken = response[state] if state < len(response) else 7
        others = rng.permutation(np.setdiff1d(np.arange(VOCAB_SIZE), [taken]))[: max(size - 1, 0)]
        probs = np.sort(rng.dirichlet(np.ones(size + 1)))[::-1][:size]
        ids.append(rng.permutation(np.append(others, taken))[:size])
        log_probs.append(np.log(probs))
        covered.append(probs.sum() if with_lists else 1.0)
        sizes.append(size)
    return Trajectory(
        **facts,
        sets=ActionSets(
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            ids=np.concatenate(ids).astype(np.int32),
            log_probs=np.concatenate(log_probs).astype(np.float32),
            covered_mass=np.array(covered, dtype=np.float32),
            log_sum_exp=rng.normal(10, 3, num_states).astype(np.float32),
        ),
    )


def make_prompts(count: int, first: int = 0) -> list[PromptTokens]:
    return [
        PromptTokens(f"prompt-{number}", np.arange(3 + number * 7 % 5, dtype=np.int32) + number % 20)
        for number in range(first, first + count)
    ]


SETTINGS = SamplingSettings(p_max=0.9, max_actions=8, max_new_tokens=5)
FACTS: dict[str, Any] = {
    "batch_size": 2,
    "shard_prompts": 3,
    "tokenizer_sha256": "bb" * 32,
    "template": {"kind": "chat", "sha256": "cc" * 32},
    "progress": False,
}


def capture_fake(
    path: Path, prompts: Sequence[PromptTokens], teacher: FakeTeacher | None = None, **changes: Any
) -> Store:
    settings = changes.pop("settings", SETTINGS)
    return capture(teacher or FakeTeacher(), prompts, path, settings, **{**FACTS, **changes})


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def assert_same_trajectory(found: Trajectory, expected: Trajectory, bits: int) -> None:
    """Equal but for the quantisation; among tokens of one code only the first has to be the teacher's."""
    for name in ("prompt_id", "answer_index", "ends", "source"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("prompt_ids", "response_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    for name in ("offsets", "ids", "log_probs", "covered_mass", "log_sum_exp"):
        assert getattr(found.sets, name).dtype == getattr(expected.sets, name).dtype
    np.testing.assert_array_equal(found.sets.offsets, expected.sets.offsets)
    np.testing.assert_allclose(found.sets.covered_mass, expected.sets.covered_mass, rtol=0, atol=MASS_ERROR[bits])
    np.testing.assert_allclose(found.sets.log_sum_exp, expected.sets.log_sum_exp, rtol=0, atol=LSE_ERROR[bits])
    for start, stop in itertools.pairwise(expected.sets.offsets):
        ids, wanted_ids = found.sets.ids[start:stop], expected.sets.ids[start:stop]
        assert ids[:1].tolist() == wanted_ids[:1].tolist()
        assert sorted(ids) == sorted(wanted_ids)
        log_probs = found.sets.log_probs[start:stop]
        assert (np.diff(log_probs) <= 0).all()
        by_id, wanted_by_id = np.argsort(ids), np.argsort(wanted_ids)
        assert_near(log_probs[by_id], expected.sets.log_probs[start:stop][wanted_by_id], bits)


def assert_near(found: np.ndarray, exact: np.ndarray, bits: int) -> None:
    """Log-probabilities within the errors of docs/store-format.md: half a step of log p, or of √p where it is finer."""
    exact = np.maximum(exact.astype(np.float64), FLOOR[bits])
    error, room = np.abs(found - exact), 1e-6  # room for float32
    if bits == 16:
        assert (error <= 1 / 4096 + room).all()
    else:
        root_error = np.abs(np.exp(found / 2.0) - np.exp(exact / 2.0))
        assert (np.where(exact > np.log(1 / 400), root_error <= 1 / 80 + room, error <= 0.5 + room)).all()


# The smallest log-probability: code 255 is 217 steps of 1 nat below p = 1/400, and code 65535 is 65535 of 1/2048 nat.
FLOOR = {8: np.log(1 / 400) - 217, 16: -65535 / 2048}
MASS_ERROR = {8: 1 / 128 + 1e-6, 16: 0.0}
LSE_ERROR = {8: 1 / 32 + 1e-6, 16: 0.0}
