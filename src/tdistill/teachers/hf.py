"""The local teacher: any causal language model of transformers, GGUF included."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tdistill.actions import sample_from_sets, top_p_sets
from tdistill.errors import TeacherLogitsError
from tdistill.head import float32_logits, output_head
from tdistill.prompts import end_token_ids, num_token_ids
from tdistill.teachers.base import Capability, PromptTokens, SamplingSettings
from tdistill.teachers.loading import load_causal_lm, load_tokenizer, resolve_model_folder, weights_sha256
from tdistill.types import ActionSets, Trajectory, widest

# Elements of the largest block of logits in score mode, 16 Mi: 64 MiB in float32.
_MAX_ELEMENTS = 2**24
# Share of a batch's rows that must go on, or the ended ones are taken out of the batch and its cache.
_COMPACT_BELOW = 0.75


class HFTeacher:
    """A causal language model in this process that generates, scores and gives full logits.

    Args:
        model: loaded model; its generation settings are reset so that nothing but the truncated policy acts.
        tokenizer: its tokenizer.
        weights_sha256: hash that names the weights.
        end_ids: tokens that end an answer; None takes those of the model and the tokenizer.
    """

    capabilities: frozenset[Capability] = frozenset({"generate", "score", "logits"})

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, weights_sha256: str, end_ids: tuple[int, ...] | None = None
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.end_token_ids = end_ids or end_token_ids(model.generation_config, tokenizer)
        self.num_tokens = num_token_ids(tokenizer)
        # Masked wherever it stands, so an end token serves.
        padding = tokenizer.pad_token_id
        self._pad_id = self.end_token_ids[0] if padding is None else padding
        self._weights_sha256 = weights_sha256
        # Inherited settings such as a repetition penalty would change the logits that are recorded.
        model.generation_config = GenerationConfig(
            eos_token_id=list(self.end_token_ids),
            pad_token_id=self._pad_id,
            bos_token_id=tokenizer.bos_token_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        address: str,
        *,
        gguf_file: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> HFTeacher:
        """Load by folder, hub name or ``package:NAME``; see :mod:`tdistill.teachers.loading`."""
        folder = resolve_model_folder(address, gguf_file, revision)
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
            **self._quantization(),
        }

    def _quantization(self) -> dict[str, Any]:
        """How the weights were rounded when they were loaded; nothing where they are as stored, or dequantised."""
        if getattr(self.model, "hf_quantizer", None) is None:
            return {}
        settings: Any = self.model.config.quantization_config
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        return {"quantization": json.loads(json.dumps(settings, default=str))}

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[tuple[PromptTokens, int]],
        settings: SamplingSettings,
        mix: tuple[PreTrainedModel, float] | None = None,
    ) -> list[Trajectory]:
        """Sample one answer per (prompt, answer index) from the teacher truncated at p_max, as one batch.

        The state after the last token of a cut answer is recorded too, which costs one decoding step more.

        Args:
            requests: prompts and answer indices.
            settings: how answers are drawn and sets are cut.
            mix: another model and the weight of its policy; what is drawn from and recorded is then the mixture.
        Raises:
            TeacherLogitsError: NaN or infinite logits; names the prompt.
        """
        recorder = _Recorder(requests, settings, self.end_token_ids, self.num_tokens)
        rows = [torch.as_tensor(prompt.prompt_ids, dtype=torch.long) for prompt, _ in requests]
        input_ids = pad_sequence(rows, True, self._pad_id, "left").to(self.model.device)
        mask = pad_sequence([torch.ones_like(r) for r in rows], True, 0, "left").to(self.model.device)
        cache: Any = None
        cache_argument = _cache_argument(self.model)
        mixture = None if mix is None else _Mixture(*mix, mask, self.num_tokens, settings.temperature)
        while len(recorder.alive):
            with float32_logits(self.model):
                decoded = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=mask,
                    **({} if cache is None else {cache_argument: cache}),
                    generation_config=GenerationConfig(
                        **{
                            **self.model.generation_config.to_diff_dict(),
                            "max_new_tokens": settings.max_new_tokens + 1 - len(recorder.steps),
                            "return_dict_in_generate": True,
                        }
                    ),
                    logits_processor=LogitsProcessorList([recorder] if mixture is None else [mixture, recorder]),
                    stopping_criteria=StoppingCriteriaList([_FewRowsLeft(recorder)]),
                )
            keep = torch.from_numpy(recorder.compact()).to(self.model.device)
            if len(keep):
                grown = (0, decoded.sequences.shape[1] - mask.shape[1])
                input_ids, mask = decoded.sequences[keep], torch.nn.functional.pad(mask, grown, value=1)[keep]
                cache = getattr(decoded, cache_argument)
                cache.reorder_cache(keep)  # of all that rows are taken from, the one that every kind of layer has
                if mixture is not None:
                    mixture.select(keep)
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
            input_ids=pad_sequence(rows, True, self._pad_id).to(self.model.device),
            attention_mask=pad_sequence([torch.ones_like(r) for r in rows], True, 0).to(self.model.device),
            use_cache=False,
        ).last_hidden_state
        # Rows that pad the vocabulary stand for no token.
        head = output_head(self.model).ready(hidden_BTD.dtype).first(self.num_tokens)
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
        self.uniform_BT = np.stack([uniforms(settings, prompt.prompt_id, index) for prompt, index in requests])
        self.taken_BT = np.zeros(self.uniform_BT.shape, dtype=np.int32)
        self.rows = self.alive = np.arange(len(requests))  # requests in the batch, and those that go on
        self.steps: list[tuple[np.ndarray, ActionSets]] = []  # rows that were alive, and the set of each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced_B = np.full(len(self.requests), self.end_ids[0])
        if len(alive := self.alive):
            rows = scores if len(alive) == len(scores) else scores[torch.from_numpy(self._places()).to(scores.device)]
            logits_NV = rows[:, : self.num_tokens]
            sets = _checked_sets(logits_NV, self.settings, [self.requests[int(b)][0] for b in alive])
            step = len(self.steps)
            self.steps.append((alive, sets))
            if step == self.settings.max_new_tokens:  # the state after the last token: recorded, not acted in
                self.alive = alive[:0]
            else:
                drawn_N = _draw(sets, logits_NV, self.uniform_BT[alive, step], self.settings)
                self.taken_BT[alive, step] = forced_B[alive] = drawn_N
                self.alive = alive[~np.isin(drawn_N, self.end_ids)]
        # In place: the scores are a copy that generation only searches for its largest entry.
        return scores.scatter_(1, torch.from_numpy(forced_B[self.rows]).to(scores.device)[:, None], torch.inf)

    def _places(self) -> np.ndarray:
        return np.flatnonzero(np.isin(self.rows, self.alive))

    def compact(self) -> np.ndarray:
        """Forget the requests that have ended; the places in the batch of those that go on."""
        places = self._places()
        self.rows = self.rows[places]
        return places

    def trajectories(self) -> list[Trajectory]:
        """Assemble what was recorded, in the order of the requests."""
        row_R = np.concatenate([alive for alive, _ in self.steps])
        sets = _take(concatenate([sets for _, sets in self.steps]), np.argsort(row_R, kind="stable"))
        num_states_B = np.bincount(row_R, minlength=len(self.requests))
        limit = self.settings.max_new_tokens
        return [
            Trajectory(
                prompt.prompt_id,
                index,
                prompt.prompt_ids,
                taken_T[: min(num_states, limit)].copy(),
                "terminal" if taken_T[min(num_states, limit) - 1] in self.end_ids else "truncated",
                "teacher",
                own,
            )
            for (prompt, index), taken_T, num_states, own in zip(
                self.requests, self.taken_BT, num_states_B, _split(sets, num_states_B), strict=True
            )
        ]


class _Mixture(LogitsProcessor):
    """Logits of (1 − w) · softmax(scores) + w · the policy of another model with the same tokenizer."""

    def __init__(
        self, model: PreTrainedModel, weight: float, mask: Tensor, num_tokens: int, temperature: float
    ) -> None:
        self.model, self.weight, self.mask = model, weight, mask
        self.num_tokens, self.temperature = num_tokens, temperature
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = 0 if self.cache is None else self.cache.get_seq_length()
        self.mask = torch.nn.functional.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        name = _cache_argument(self.model.base_model)
        out = self.model.base_model(
            input_ids=input_ids[:, seen:],
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, seen:],
            use_cache=True,
            **({} if self.cache is None else {name: self.cache}),
        )
        self.cache = getattr(out, name)
        other = output_head(self.model).logits(out.last_hidden_state[:, -1])[:, : self.num_tokens]
        own, other = (
            (logits.float() / self.temperature).log_softmax(-1) for logits in (scores[:, : self.num_tokens], other)
        )
        mixed = torch.logaddexp(own + math.log1p(-self.weight), other + math.log(self.weight)) * self.temperature
        # Columns that only pad the vocabulary are never drawn.
        return torch.full_like(scores, -torch.inf).index_copy_(
            1, torch.arange(mixed.shape[1], device=mixed.device), mixed.to(scores.dtype)
        )

    def select(self, keep: Tensor) -> None:
        """Keep these rows of the batch."""
        self.mask = self.mask[keep]
        self.cache.reorder_cache(keep)


def _cache_argument(model: Any) -> str:
    """What a model calls the cache that it goes on with: transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _FewRowsLeft(StoppingCriteria):
    """Stops the whole batch when too few of its rows go on."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stop = len(self.recorder.alive) < _COMPACT_BELOW * len(self.recorder.rows)
        return torch.full((len(input_ids),), stop, device=input_ids.device)


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
    if settings.p_max < 1.0:
        sets = top_p_sets(logits_NV, settings.p_max, settings.max_actions, settings.temperature)
    else:
        num_rows = len(logits_NV)
        sets = ActionSets(
            offsets=np.zeros(num_rows + 1, dtype=np.int64),
            ids=np.zeros(0, dtype=np.int32),
            log_probs=np.zeros(0, dtype=np.float32),
            covered_mass=np.ones(num_rows, dtype=np.float32),
            log_sum_exp=torch.logsumexp(logits_NV.float() / settings.temperature, -1).cpu().numpy(),
        )
    bad_N = ~np.isfinite(sets.log_sum_exp)
    if bad_N.any():
        row = int(bad_N.argmax())
        raise TeacherLogitsError(
            f"The teacher gave NaN or infinite logits for prompt '{owners[row].prompt_id}' "
            f"(log-sum-exp {float(sets.log_sum_exp[row])}). Load it in float32 or bfloat16, or leave that prompt out."
        )
    return sets


def _draw(sets: ActionSets, logits_NV: Tensor, uniform_N: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    if settings.p_max < 1.0:
        return sample_from_sets(sets, uniform_N)
    mass_NV = torch.softmax(logits_NV.to(widest(logits_NV.device)) / settings.temperature, -1).cumsum(-1)
    at = torch.as_tensor(uniform_N, device=mass_NV.device)[:, None] * mass_NV[:, -1:]
    drawn = torch.searchsorted(mass_NV, at, right=True).squeeze(1)
    return drawn.clamp(max=mass_NV.shape[1] - 1).cpu().numpy()


def _with_taken(sets: ActionSets, taken: np.ndarray, logits_NV: Tensor, settings: SamplingSettings) -> ActionSets:
    """Add each taken token that its set lacks, as the last slot; states beyond ``taken`` stay as they are."""
    if settings.p_max == 1.0:
        return sets
    row_M = np.repeat(np.arange(len(sets)), np.diff(sets.offsets))
    absent_N = np.arange(len(sets)) < len(taken)
    acted_in_M = absent_N[row_M]
    absent_N[row_M[acted_in_M][sets.ids[acted_in_M] == taken[row_M[acted_in_M]]]] = False
    rows = np.flatnonzero(absent_N)
    index = (torch.from_numpy(rows).to(logits_NV.device), torch.from_numpy(taken[rows]).to(logits_NV.device))
    log_prob = logits_NV[index].cpu().double().numpy() / settings.temperature - sets.log_sum_exp[rows].astype(float)
    after = sets.offsets[rows + 1]
    return replace(
        sets,
        offsets=sets.offsets + np.concatenate([[0], np.cumsum(absent_N)]),
        ids=np.insert(sets.ids, after, taken[rows].astype(np.int32)),
        log_probs=np.insert(sets.log_probs, after, log_prob.astype(np.float32)),
    )


def _take(sets: ActionSets, rows: np.ndarray) -> ActionSets:
    """The given states, in the given order."""
    size_R = np.diff(sets.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(size_R)]).astype(np.int64)
    slot_M = np.arange(offsets[-1]) + np.repeat(sets.offsets[rows] - offsets[:-1], size_R)
    return ActionSets(
        offsets, sets.ids[slot_M], sets.log_probs[slot_M], sets.covered_mass[rows], sets.log_sum_exp[rows]
    )


def _split(sets: ActionSets, num_states: np.ndarray) -> Iterator[ActionSets]:
    """Consecutive parts of so many states each."""
    for stop, num in zip(np.cumsum(num_states), num_states, strict=True):
        offsets = sets.offsets[stop - num : stop + 1]
        slots = slice(offsets[0], offsets[-1])
        rows = slice(stop - num, stop)
        yield ActionSets(
            offsets - offsets[0],
            sets.ids[slots],
            sets.log_probs[slots],
            sets.covered_mass[rows],
            sets.log_sum_exp[rows],
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
