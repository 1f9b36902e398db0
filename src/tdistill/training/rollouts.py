"""The student's own answers, scored by the teacher, mixed into training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tdistill.errors import ConfigError, StoreError
from tdistill.prompts import tokenizer_sha256
from tdistill.store import Store
from tdistill.store.capture import capture
from tdistill.teachers.base import SamplingSettings, Teacher
from tdistill.teachers.hf import HFTeacher
from tdistill.training.collate import PackedCollator
from tdistill.types import PromptTokens, Trajectory


@dataclass(frozen=True)
class RolloutSettings:
    """How often the student answers, and how many of its answers a micro-batch holds.

    Attributes:
        every: optimizer steps from one round to the next; the first is before the first step.
        prompts_per_round: prompts answered in a round, drawn anew for each, at most all.
        share: share of a micro-batch's trajectories that are the student's, in (0, 1], once the ramp is over.
        ramp_steps: steps over which the share rises linearly from 0.
        replay: share of them that is drawn from all earlier rounds; the others come from the newest round.
        temperature: the student's logits are divided by it.
        top_p: the student is truncated to this mass when it samples.
        teacher_mix: weight in [0, 1) of the teacher's policy in the one that answers are sampled from, the teacher
            running beside the student (MiniLLM, arXiv 2306.08543, eq. 6: 0.2); needs temperature 1 and top_p 1.
        batch_size: answers generated and scored at once.
        seed: every random number is a function of (seed, round, prompt, position) or (seed, step) alone; None takes the
            seed that the phase is trained with.
    """

    every: int = 50
    prompts_per_round: int = 64
    share: float = 0.5
    ramp_steps: int = 0
    replay: float = 0.5
    temperature: float = 1.0
    top_p: float = 1.0
    teacher_mix: float = 0.0
    batch_size: int = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "prompts_per_round", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollouts.{name} = {getattr(self, name)} must be at least 1.")
        if self.ramp_steps < 0:
            raise ConfigError(f"rollouts.ramp_steps = {self.ramp_steps} must not be negative.")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"rollouts.seed = {self.seed} must not be negative; null takes the phase's seed.")
        for name, low_open in (("share", True), ("replay", False), ("top_p", True)):
            value = getattr(self, name)
            if not (0 < value <= 1 if low_open else 0 <= value <= 1):
                raise ConfigError(f"rollouts.{name} = {value} is outside {'(' if low_open else '['}0, 1].")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"rollouts.temperature = {self.temperature} must be positive and finite.")
        if not 0 <= self.teacher_mix < 1:
            raise ConfigError(f"rollouts.teacher_mix = {self.teacher_mix} is outside [0, 1). The paper uses 0.2.")
        if self.teacher_mix > 0 and not self.samples_plainly:
            raise ConfigError(
                f"rollouts.teacher_mix = {self.teacher_mix} needs temperature 1 and top_p 1; they are "
                f"{self.temperature} and {self.top_p}."
            )

    @property
    def samples_plainly(self) -> bool:
        """Whether answers are sampled from the whole policy, as importance weights take it."""
        return self.temperature == 1.0 and self.top_p == 1.0

    def share_at(self, step: int) -> float:
        """Share of the student's trajectories at an optimizer step, counted from 0."""
        return self.share if step >= self.ramp_steps else self.share * (step + 1) / self.ramp_steps


def check_log_probs_sampled(objective: str, settings: RolloutSettings, sampling: SamplingSettings) -> None:
    """Raise ConfigError unless an objective can read how likely the answers of rounds were as they were sampled."""
    if not settings.samples_plainly:
        raise ConfigError(
            f"The objective '{objective}' weighs the student's answers by their probabilities; set "
            "rollouts.temperature and rollouts.top_p to 1."
        )
    if sampling.p_max == 1.0:
        raise ConfigError(
            f"The objective '{objective}' reads the teacher's probability of each token of the student's answers, "
            "which is not kept at capture.p_max = 1. Capture with p_max below 1."
        )
    if sampling.temperature != 1.0:
        raise ConfigError(
            f"The objective '{objective}' compares the teacher's probabilities with those that answers are sampled by, "
            f"at temperature 1; capture.temperature = {sampling.temperature}. Capture at temperature 1."
        )


@dataclass(frozen=True)
class _Round:
    """One round's store, and log-probabilities of all its tokens under the policy that sampled them, if kept."""

    store: Store
    log_probs: np.ndarray | None

    def answer(self, row: int) -> Trajectory:
        trajectory = replace(self.store[row], source="student")
        if self.log_probs is None:
            return trajectory
        start = int(self.store.response_lengths[:row].sum())
        return replace(trajectory, log_probs_sampled=self.log_probs[start : start + len(trajectory.response_ids)])


def _log_probs_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-log-probs.safetensors")


class Rollouts:
    """Rounds of the student's answers, each a store of given answers under ``folder``.

    A round is written before the step it belongs to and is whole or not there; training that goes on from a checkpoint
    finds the rounds it had, and makes again the one that is due at its first step.

    Args:
        settings: see :class:`RolloutSettings`.
        prompts: rendered prompts to draw from.
        load_teacher: returns a teacher that can score; called once per round, so that it need not stay in memory.
        sampling: p_max, cap and temperature of the recorded sets, and the length limit of an answer.
        template: names the prompt template, any JSON value.

    Attributes:
        seed: of all random numbers; the trainer fills in its own where the settings leave it open.
        keeps_log_probs: whether a round keeps the log-probabilities of its tokens under the policy that sampled them,
            which costs one forward pass of the student.
    """

    keeps_log_probs: bool = False

    def __init__(
        self,
        settings: RolloutSettings,
        prompts: Sequence[PromptTokens],
        load_teacher: Callable[[], Teacher],
        sampling: SamplingSettings,
        template: Any = None,
    ) -> None:
        self.settings, self.prompts, self.load_teacher = settings, prompts, load_teacher
        self.sampling, self.template, self.seed = sampling, template, settings.seed
        self._stores: dict[Path, _Round] = {}
        self._rounds: list[_Round] = []
        self._read: list[_Round] = []  # the latest last

    def prepare(self, step: int, model: Any, tokenizer: Any, folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
        """Make the round that is due at a step, and open those before it.

        Raises:
            StoreError: a round that an earlier process had made is gone.
        """
        number, since = divmod(step, self.settings.every)
        path = self._path(folder, number, rank)
        if since == 0:
            shutil.rmtree(path, ignore_errors=True)
            self._stores.pop(path, None)  # of an earlier training with the same rollouts
            # Loading a model and sampling must not move the generator that training draws from.
            with torch.random.fork_rng():
                self._capture(number, path, model, tokenizer, rank, num_ranks)
        # Without replay only the newest is read.
        first = 0 if self.settings.replay > 0 else number
        wanted = [self._path(folder, earlier, rank) for earlier in range(first, number + 1)]
        for path in wanted:
            if path not in self._stores:
                log_probs_path = _log_probs_path(path)
                if not path.is_dir() or (self.keeps_log_probs and not log_probs_path.is_file()):
                    raise StoreError(
                        f"Step {step} needs the student's answers in {path}, which is gone. Restore it, or train anew."
                    )
                log_probs = load_file(log_probs_path)["log_probs"].numpy() if self.keeps_log_probs else None
                self._stores[path] = _Round(Store.open(path), log_probs)
        self._stores = {path: self._stores[path] for path in wanted}
        self._rounds = [*self._stores.values()]

    def mix(self, trajectories: Sequence[Trajectory], step: int, micro_batch: int, rank: int = 0) -> list[Trajectory]:
        """Put answers of the student in the place of trajectories, each with the probability of the share."""
        rng = np.random.default_rng([self._seed(), step, micro_batch, rank])
        share = self.settings.share_at(step)
        return [self._draw(rng) if rng.random() < share else trajectory for trajectory in trajectories]

    def _seed(self) -> int:
        if self.seed is None:
            raise ConfigError("rollouts.seed is open, and no trainer has filled it in; set it.")
        return self.seed

    def _draw(self, rng: np.random.Generator) -> Trajectory:
        *earlier, newest = self._rounds
        chosen = newest
        if earlier and rng.random() < self.settings.replay:
            chosen = earlier[int(rng.integers(len(earlier)))]
        answer = chosen.answer(int(rng.integers(len(chosen.store))))
        # Each store keeps what it has decoded; there may be a thousand of them.
        self._read = [*(of for of in self._read if of is not chosen), chosen]
        while len(self._read) > 1 and sum(of.store.cached_bytes for of in self._read) > Store.cache_bytes:
            self._read.pop(0).store.drop_cache()
        return answer

    def _path(self, folder: Path, number: int, rank: int) -> Path:
        return folder / "rollouts" / f"round-{number:05d}" / f"rank-{rank}"

    def _capture(self, number: int, path: Path, model: Any, tokenizer: Any, rank: int, num_ranks: int) -> None:
        rng = np.random.default_rng([self._seed(), number])
        num_prompts = min(self.settings.prompts_per_round, len(self.prompts))
        if num_prompts < num_ranks:
            raise ConfigError(
                f"rollouts.prompts_per_round: {num_prompts} prompts cannot be shared out to {num_ranks} processes."
            )
        chosen = np.sort(rng.choice(len(self.prompts), num_prompts, replace=False))[rank::num_ranks]
        teacher = self.load_teacher()
        answers = self._answers([self.prompts[i] for i in chosen], number, model, tokenizer, teacher)
        store = capture(
            teacher,
            answers,
            path,
            self.sampling,
            mode="score",
            batch_size=self.settings.batch_size,
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            template=self.template,
            progress=False,
        )
        if self.keeps_log_probs:
            log_probs = np.concatenate(self._log_probs(store, model, tokenizer))
            save_file({"log_probs": torch.from_numpy(log_probs)}, _log_probs_path(path))

    def _log_probs(self, store: Store, model: Any, tokenizer: Any) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each answer under the policy that sampled them, in the store's order."""
        was_training = model.training
        weight, found = self.settings.teacher_mix, []
        model.eval()
        for at in range(0, len(store), self.settings.batch_size):
            rows = [store[i] for i in range(at, min(at + self.settings.batch_size, len(store)))]
            batch = PackedCollator(tokenizer.pad_token_id or 0)(rows)
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with torch.no_grad():
                out = model(**inputs)
            own_N = out["q_taken_N"] - out["log_normaliser_N"]
            if weight > 0:
                teachers_N = inputs["log_prob_taken_teacher_N"] + math.log(weight)
                own_N = torch.logaddexp(own_N + math.log1p(-weight), teachers_N)
            taken = own_N[inputs["has_action_N"]].float().cpu().numpy()
            found += np.split(taken, np.cumsum([len(row.response_ids) for row in rows])[:-1])
        model.train(was_training)
        return found

    def _answers(
        self, prompts: Sequence[PromptTokens], number: int, model: Any, tokenizer: Any, teacher: Teacher
    ) -> list[PromptTokens]:
        """Sample one answer per prompt from the student."""
        settings = SamplingSettings(
            self.settings.top_p, None, self.settings.temperature, self.sampling.max_new_tokens, self._seed()
        )
        # PEFT reads the settings of the model within, or hands its own on to it, as the kind of task is given or not.
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        was_training, generation = model.training, plain.generation_config
        student = HFTeacher(model, tokenizer, "the student in training", teacher.end_token_ids)
        plain.generation_config = model.generation_config
        mix = None
        if self.settings.teacher_mix > 0:
            mix = (teacher.model, self.settings.teacher_mix)  # type: ignore[attr-defined]
        answers = []
        try:
            for at in range(0, len(prompts), self.settings.batch_size):
                batch = prompts[at : at + self.settings.batch_size]
                answers += student.generate([(prompt, number) for prompt in batch], settings, mix)
        finally:
            model.generation_config = plain.generation_config = generation
            model.train(was_training)
        return [PromptTokens(a.prompt_id, a.prompt_ids, a.response_ids, a.ends) for a in answers]
