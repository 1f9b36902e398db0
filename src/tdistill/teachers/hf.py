"""The local teacher: any causal language model of transformers, GGUF included."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tdistill.actions import sample_from_sets, top_p_sets
from tdistill.errors import TeacherLogitsError
from tdistill.head import output_head
from tdistill.prompts import end_token_ids
from tdistill.teachers.base import Capability, PromptTokens, SamplingSettings
from tdistill.teachers.loading import load_causal_lm, load_tokenizer, resolve_model_folder, weights_sha256
from tdistill.types import ActionSets, Trajectory

# Elements of the largest block of logits in score mode, 16 Mi: 64 MiB in float32.
_MAX_ELEMENTS = 2**24


class HFTeacher:
    """A causal language model in this process that generates, scores and gives full logits.

    Args:
        model: loaded model; its generation settings are reset so that nothing but the truncated policy acts.
        tokenizer: its tokenizer.
        weights_sha256: hash that names the weights.
    """

    capabilities: frozenset[Capability] = frozenset({"generate", "score", "logits"})

    def __init__(self, model: PreTrainedModel, tokenizer: Any, weights_sha256: str) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.end_token_ids = end_token_ids(model.generation_config, tokenizer)
        self._weights_sha256 = weights_sha256
        # Inherited settings such as a repetition penalty would change the logits that are recorded.
        model.generation_config = GenerationConfig(
            eos_token_id=list(self.end_token_ids),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )

    @classmethod
    def from_pretrained(
        cls, address: str, *, gguf_file: str | None = None, dtype: str = "auto", **model_kwargs: Any
    ) -> HFTeacher:
        """Load by folder, hub name or ``package:NAME``; see :mod:`tdistill.teachers.loading`."""
        folder = resolve_model_folder(address, gguf_file)
        digest = weights_sha256(folder, gguf_file)
        tokenizer = load_tokenizer(folder, gguf_file=gguf_file)
        return cls(load_causal_lm(folder, gguf_file=gguf_file, dtype=dtype, **model_kwargs), tokenizer, digest)

    @property
    def identity(self) -> dict[str, Any]:
        """Facts that name this teacher in a store."""
        return {
            "weights_sha256": self._weights_sha256,
            "model_type": self.model.config.model_type,
            "vocab_size": self.model.get_output_embeddings().weight.shape[0],
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @torch.inference_mode()
    def generate(self, requests: Sequence[tuple[PromptTokens, int]], settings: SamplingSettings) -> list[Trajectory]:
        """Sample one answer per (prompt, answer index) from the teacher truncated at p_max, as one batch.

        The state after the last token of a cut answer is recorded too, which costs one decoding step more.

        Raises:
            TeacherLogitsError: NaN or infinite logits; names the prompt.
        """
        recorder = _Recorder(requests, settings, self.end_token_ids, len(self.tokenizer))
        prompts = [torch.as_tensor(prompt.prompt_ids, dtype=torch.long) for prompt, _ in requests]
        pad = self.tokenizer.pad_token_id
        self.model.generate(
            input_ids=pad_sequence(prompts, True, pad, "left").to(self.model.device),
            attention_mask=pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left").to(self.model.device),
            # Greedy: the recorder has already drawn the token and leaves no other choice.
            generation_config=GenerationConfig(
                **{**self.model.generation_config.to_diff_dict(), "max_new_tokens": settings.max_new_tokens + 1}
            ),
            logits_processor=LogitsProcessorList([recorder]),
        )
        return recorder.trajectories()

    @torch.inference_mode()
    def score(self, requests: Sequence[PromptTokens], settings: SamplingSettings) -> list[Trajectory]:
        """Record the action sets along the given answers, as one batch; only response positions pass the head.

        A taken token outside its set is added at the end: a set is a prefix of the ranking, so its order holds.

        Raises:
            TeacherLogitsError: NaN or infinite logits; names the prompt.
        """
        rows = [torch.as_tensor(np.concatenate([r.prompt_ids, r.response_ids]), dtype=torch.long) for r in requests]
        hidden_BTD = self.model.base_model(
            input_ids=pad_sequence(rows, True, self.tokenizer.pad_token_id).to(self.model.device),
            attention_mask=pad_sequence([torch.ones_like(r) for r in rows], True, 0).to(self.model.device),
            use_cache=False,
        ).last_hidden_state
        head = output_head(self.model)
        # Rows that pad the vocabulary stand for no token.
        num_tokens = len(self.tokenizer)
        bias_V = None if head.bias_V is None else head.bias_V[:num_tokens]
        head = replace(head, weight_VD=head.weight_VD[:num_tokens], bias_V=bias_V)
        trajectories = []
        for request, hidden_TD in zip(requests, hidden_BTD, strict=True):
            assert request.response_ids is not None
            first = len(request.prompt_ids) - 1
            num_rows = len(request.response_ids) + (request.ends == "truncated")
            states = hidden_TD[first : first + num_rows]
            chunk = max(1, _MAX_ELEMENTS // len(head.weight_VD))
            parts = []
            for at in range(0, num_rows, chunk):
                logits_NV = head.logits(states[at : at + chunk])
                taken = request.response_ids[at : at + chunk].astype(np.int64)
                parts.append(
                    _with_taken(
                        _checked_sets(logits_NV, settings, [request] * len(logits_NV)), taken, logits_NV, settings
                    )
                )
            trajectories.append(
                Trajectory(
                    request.prompt_id,
                    0,
                    request.prompt_ids,
                    request.response_ids,
                    request.ends,
                    "given",
                    concatenate(parts),
                )
            )
        return trajectories


class _Recorder(LogitsProcessor):
    """Draws each next token from the truncated teacher, keeps its action set, and forces the token."""

    def __init__(
        self,
        requests: Sequence[tuple[PromptTokens, int]],
        settings: SamplingSettings,
        end_ids: tuple[int, ...],
        num_tokens: int,
    ) -> None:
        self.requests, self.settings, self.end_ids = requests, settings, end_ids
        self.num_tokens = num_tokens  # further columns of the logits only pad the vocabulary
        self.uniforms = [uniforms(settings, prompt.prompt_id, index) for prompt, index in requests]
        self.taken: list[list[int]] = [[] for _ in requests]
        self.sets: list[list[ActionSets]] = [[] for _ in requests]
        self.alive = np.ones(len(requests), dtype=bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        alive = np.flatnonzero(self.alive)
        forced = torch.full((len(scores),), self.end_ids[0], dtype=torch.long)
        if len(alive):
            logits_NV = scores[torch.as_tensor(alive, device=scores.device), : self.num_tokens]
            sets = _checked_sets(logits_NV, self.settings, [self.requests[int(b)][0] for b in alive])
            for b, own in zip(alive, split(sets), strict=True):
                self.sets[b].append(own)
            step = len(self.taken[alive[0]])
            if step == self.settings.max_new_tokens:  # the state after the last token: recorded, not acted in
                self.alive[:] = False
            else:
                uniform_N = np.array([self.uniforms[b][step] for b in alive])
                drawn = _draw(sets, logits_NV, uniform_N, self.settings)
                for b, token in zip(alive, drawn, strict=True):
                    self.taken[b].append(int(token))
                    forced[b] = int(token)
                    self.alive[b] = token not in self.end_ids
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, forced.to(scores.device)[:, None], 0.0)

    def trajectories(self) -> list[Trajectory]:
        """Assemble what was recorded, in the order of the requests."""
        return [
            Trajectory(
                prompt.prompt_id,
                index,
                prompt.prompt_ids,
                np.array(taken, dtype=np.int32),
                "terminal" if taken[-1] in self.end_ids else "truncated",
                "teacher",
                concatenate(sets),
            )
            for (prompt, index), taken, sets in zip(self.requests, self.taken, self.sets, strict=True)
        ]


def uniforms(settings: SamplingSettings, prompt_id: str, answer_index: int) -> np.ndarray:
    """Uniform numbers in [0, 1), one per position: a function of (seed, prompt id, answer index, position) alone.

    Raw output of a counter-based generator (Philox, SC 2011), which NumPy keeps stable across versions.

    Returns:
        float64 [max_new_tokens].
    """
    name = f"{settings.seed}\0{prompt_id}\0{answer_index}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(settings.max_new_tokens)
    return (raw >> np.uint64(11)) * 2.0**-53


def _checked_sets(logits_NV: Tensor, settings: SamplingSettings, owners: Sequence[PromptTokens]) -> ActionSets:
    """Sets of the rows; empty ones at p_max = 1, where only mass and log-sum-exp are kept."""
    lse_N = torch.logsumexp(logits_NV.float() / settings.temperature, -1)
    bad = ~torch.isfinite(lse_N)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise TeacherLogitsError(
            f"The teacher gave NaN or infinite logits for prompt '{owners[row].prompt_id}' "
            f"(log-sum-exp {float(lse_N[row])}). Load it in float32 or bfloat16, or leave that prompt out."
        )
    if settings.p_max < 1.0:
        return top_p_sets(logits_NV, settings.p_max, settings.max_actions, settings.temperature)
    num_rows = len(logits_NV)
    return ActionSets(
        offsets=np.zeros(num_rows + 1, dtype=np.int64),
        ids=np.zeros(0, dtype=np.int32),
        log_probs=np.zeros(0, dtype=np.float32),
        covered_mass=np.ones(num_rows, dtype=np.float32),
        log_sum_exp=lse_N.cpu().numpy(),
    )


def _draw(sets: ActionSets, logits_NV: Tensor, uniform_N: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    if settings.p_max < 1.0:
        return sample_from_sets(sets, uniform_N)
    mass_NV = torch.softmax(logits_NV.double() / settings.temperature, -1).cumsum(-1)
    at = torch.as_tensor(uniform_N, device=mass_NV.device)[:, None] * mass_NV[:, -1:]
    drawn = torch.searchsorted(mass_NV, at, right=True).squeeze(1)
    return drawn.clamp(max=mass_NV.shape[1] - 1).cpu().numpy()


def _with_taken(sets: ActionSets, taken: np.ndarray, logits_NV: Tensor, settings: SamplingSettings) -> ActionSets:
    if settings.p_max == 1.0:
        return sets
    parts = []
    for row, own in enumerate(split(sets)):
        if row < len(taken) and taken[row] not in own.ids:
            log_prob = float(logits_NV[row, int(taken[row])]) / settings.temperature - float(own.log_sum_exp[0])
            own = ActionSets(
                offsets=own.offsets + np.array([0, 1]),
                ids=np.append(own.ids, np.int32(taken[row])),
                log_probs=np.append(own.log_probs, np.float32(log_prob)),
                covered_mass=own.covered_mass,
                log_sum_exp=own.log_sum_exp,
            )
        parts.append(own)
    return concatenate(parts)


def split(sets: ActionSets) -> Iterator[ActionSets]:
    """One :class:`ActionSets` per state."""
    for row, (start, stop) in enumerate(zip(sets.offsets[:-1], sets.offsets[1:], strict=True)):
        yield ActionSets(
            offsets=np.array([0, stop - start]),
            ids=sets.ids[start:stop],
            log_probs=sets.log_probs[start:stop],
            covered_mass=sets.covered_mass[row : row + 1],
            log_sum_exp=sets.log_sum_exp[row : row + 1],
        )


def concatenate(parts: Sequence[ActionSets]) -> ActionSets:
    """The states of all parts, in order."""
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    return ActionSets(
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        ids=np.concatenate([part.ids for part in parts]),
        log_probs=np.concatenate([part.log_probs for part in parts]),
        covered_mass=np.concatenate([part.covered_mass for part in parts]),
        log_sum_exp=np.concatenate([part.log_sum_exp for part in parts]),
    )
