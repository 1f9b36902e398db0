"""Random episodes and the packed statistics made from them; tiny models of several architectures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from references.losses import Episode, State
from references.sets import log_sum_exp
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from tdistill.training.collate import STATS_FIELDS
from tdistill.types import ActionSets, ActionStats, Ends, Trajectory

FLOAT_FIELDS = ("q_M", "q_taken_N", "log_normaliser_N", "value_N", "q_max_N", "divergence_N")
VOCAB_SIZE = 12


def random_state(rng: np.random.Generator, size: int, acts: bool = True) -> State:
    """A state whose set leaves mass outside for teacher and student, and has no two logits closer than 0.01."""
    logits = rng.permutation(np.arange(size) * 0.05) + rng.normal() + rng.uniform(-0.02, 0.02, size)
    logits = logits + rng.normal(size=size).round()
    teacher = np.sort(rng.normal(size=size + 1))[::-1]
    teacher = (teacher - log_sum_exp(teacher))[:size]
    taken = int(rng.integers(size)) if acts else None
    every_logit = np.append(logits, rng.normal(size=3))
    extra = np.random.default_rng(
        rng.bit_generator.state["state"]["state"] % 2**63
    )  # leaves the other draws as they are
    return State(
        logits=logits,
        teacher_log_probs=teacher,
        taken=taken,
        normaliser=log_sum_exp(every_logit),
        value_head=float(rng.normal()),
        q_max=float(every_logit.max()),
        teacher_log_sum_exp=float(rng.normal()),
        divergence=float(extra.exponential()),
        log_prob_sampled=float(-extra.exponential()),
        slow_logits=logits + rng.normal(size=size),
        slow_value_head=float(rng.normal()),
    )


def random_episodes(seed: int, copies: int = 1, with_student: bool = False) -> list[Episode]:
    """Every kind of ending, single-token sets, and transitions dropped at the start, in the middle and at the end.

    ``with_student`` adds episodes whose actions the student took.
    """
    rng = np.random.default_rng(seed)

    def states(*sizes: int, idle: tuple[int, ...] = ()) -> list[State]:
        return [random_state(rng, size, t not in idle) for t, size in enumerate(sizes)]

    episodes = []
    for _ in range(copies):
        episodes += [
            Episode(states(3, 1, 5, 2), "terminal"),
            Episode(states(4, 2, 6, 3, idle=(3,)), "truncated", bootstrap=True),
            Episode(states(2, 1, 4), "truncated"),
            Episode(states(3, 4, 2, 5, 3, idle=(0, 2)), "terminal"),
            Episode(states(6, 2, idle=(1,)), "terminal"),
            Episode(states(1), "terminal"),
        ]
        if with_student:
            episodes += [
                Episode(states(2, 5, 1, 3), "terminal", from_student=True),
                Episode(states(3, 2, 4, idle=(2,)), "truncated", bootstrap=True, from_student=True),
                Episode(states(2, 4), "truncated", from_student=True),
            ]
    return episodes


def pack(episodes: list[Episode], dtype: torch.dtype = torch.float64) -> ActionStats:
    """Episodes → packed statistics, with every optional field filled in."""
    states = [state for episode in episodes for state in episode.states]
    last = {"terminal": Ends.TERMINAL, "truncated": Ends.TRUNCATED}
    ends = [
        last[episode.ends] if t + 1 == len(episode.states) else Ends.NEXT
        for episode in episodes
        for t in range(len(episode.states))
    ]

    def floats(values: Iterable[float]) -> Tensor:
        return torch.tensor([float(v) for v in values], dtype=dtype)

    stats = ActionStats(
        offsets=torch.tensor(np.cumsum([0] + [len(s.logits) for s in states])),
        q_M=floats(x for s in states for x in s.logits),
        log_prob_teacher_M=floats(x for s in states for x in s.teacher_log_probs),
        # Where no action counts the field is arbitrary, so it is far off here.
        q_taken_N=floats(123.0 if s.taken is None else s.logits[s.taken] for s in states),
        log_prob_taken_teacher_N=floats(0.0 if s.taken is None else s.teacher_log_probs[s.taken] for s in states),
        teacher_log_sum_exp_N=floats(s.teacher_log_sum_exp for s in states),
        from_student_N=torch.tensor([episode.from_student for episode in episodes for _ in episode.states]),
        sequence_N=torch.tensor([b for b, episode in enumerate(episodes) for _ in episode.states]),
        has_action_N=torch.tensor([s.taken is not None for s in states]),
        ends_N=torch.tensor([int(e) for e in ends]),
        log_normaliser_N=floats(s.normaliser for s in states),
        value_N=floats(s.value_head for s in states),
        q_max_N=floats(s.q_max for s in states),
        divergence_N=floats(s.divergence for s in states),
        log_prob_sampled_N=floats(s.log_prob_sampled if e.from_student else 0.0 for e in episodes for s in e.states),
        vocab_size=VOCAB_SIZE,
    )
    if any(s.slow_logits is None for s in states):
        return stats
    slow = replace(
        stats,
        q_M=floats(x for s in states for x in s.slow_logits),
        q_taken_N=floats(123.0 if s.taken is None else s.slow_logits[s.taken] for s in states),
        value_N=floats(s.slow_value_head for s in states),
        # A slow copy is asked for values only.
        log_normaliser_N=None,
        q_max_N=None,
        divergence_N=None,
    )
    return replace(stats, target=slow)


def with_leaves(stats: ActionStats) -> ActionStats:
    """The same statistics, whose floating fields of the student are leaves that collect gradients."""
    given = {name: getattr(stats, name) for name in FLOAT_FIELDS if getattr(stats, name) is not None}
    leaves = {name: field.detach().clone().requires_grad_() for name, field in given.items()}
    return replace(stats, **leaves)


def gradients(stats: ActionStats) -> dict[str, Tensor]:
    """What the leaves collected; zero where nothing arrived."""
    return {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name in FLOAT_FIELDS
        if (leaf := getattr(stats, name)) is not None
    }


def tiny_llama(vocab_size: int = 48, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random two-layer Llama in evaluation mode, with weights large enough for uneven logits."""
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return tiny_model(LlamaConfig(**{**fields, **settings}), seed)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of a configuration, in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def random_trajectory(
    seed: int,
    vocab_size: int,
    prompt_length: int,
    response_length: int,
    ends: str = "terminal",
    source: str = "teacher",
    largest_set: int = 6,
) -> Trajectory:
    """A trajectory with random tokens; sets of up to ``largest_set`` tokens that hold the token taken."""
    rng = np.random.default_rng(seed)
    response = rng.integers(vocab_size, size=response_length).astype(np.int32)
    ids, log_probs, sizes = [], [], []
    for t in range(response_length + (ends == "truncated")):
        own = rng.choice(vocab_size, size=int(rng.integers(1, largest_set + 1)), replace=False)
        if t < response_length and response[t] not in own:
            own[rng.integers(len(own))] = response[t]
        scores = np.sort(rng.normal(size=len(own) + 1))[::-1]
        ids.append(own)
        log_probs.append((scores - log_sum_exp(scores))[: len(own)])
        sizes.append(len(own))
    flat = np.concatenate(log_probs)
    offsets = np.cumsum([0, *sizes]).astype(np.int64)
    return Trajectory(
        prompt_id=f"prompt-{seed}",
        answer_index=0,
        prompt_ids=rng.integers(vocab_size, size=prompt_length).astype(np.int32),
        response_ids=response,
        ends=ends,  # type: ignore[arg-type]
        source=source,  # type: ignore[arg-type]
        sets=ActionSets(
            offsets=offsets,
            ids=np.concatenate(ids).astype(np.int32),
            log_probs=flat.astype(np.float32),
            covered_mass=np.add.reduceat(np.exp(flat), offsets[:-1]).astype(np.float32),
            log_sum_exp=np.zeros(len(sizes), dtype=np.float32),
        ),
    )


def statistics(model: PreTrainedModel, batch: dict[str, Tensor], full_support: bool = False) -> ActionStats:
    """Run a model prepared with ``attach_statistics`` on a collated batch."""
    outputs = model(**batch)
    stats = ActionStats(
        **{name: batch[name] for name in STATS_FIELDS},
        q_M=outputs["q_M"],
        q_taken_N=outputs["q_taken_N"],
        log_normaliser_N=outputs.get("log_normaliser_N"),
        value_N=outputs.get("value_N"),
        q_max_N=outputs.get("q_max_N"),
        divergence_N=outputs.get("divergence_N"),
        vocab_size=model.get_output_embeddings().weight.shape[0],
        full_support=full_support,
    )
    slow = {name: getattr(stats, name) for name in ("q_M", "q_taken_N", "value_N")}
    return replace(
        stats, target=replace(stats, **{name: None if x is None else 0.9 * x.detach() for name, x in slow.items()})
    )
