"""The student's own answers in training: whose they are, when they are made, and that a run with them can go on."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import support
import torch
from builders import tiny_llama
from peft import LoraConfig
from training_support import Crash, assert_same, losses, parameters, settings, without_clock

from tdistill.errors import ConfigError, RunFolderError, StoreError
from tdistill.objectives import OBJECTIVES
from tdistill.objectives.base import Objective, masked_sum, soft_q, teacher_rows
from tdistill.store import Store
from tdistill.teachers.base import SamplingSettings
from tdistill.teachers.hf import HFTeacher, uniforms
from tdistill.training import Rollouts, RolloutSettings, TDistillTrainer
from tdistill.training.slow_copy import SlowCopy
from tdistill.training.trainer import last_checkpoint
from tdistill.types import ActionStats, LossOutput

MIXTURE = {"name": "iq_learn", "student_value_weight": 0.5, "alpha": 1.0}


@dataclass(frozen=True)
class Follow(Objective):
    """Σ (log π_p(a|s) − the same under the slow copy)², to see the slow copy act."""

    name: ClassVar[str] = "follow"
    needs_target: ClassVar[bool] = True

    def __call__(self, stats: ActionStats) -> LossOutput:
        assert stats.target is not None
        gap_N = soft_q(stats, "raw").log_prob_taken_N - soft_q(stats.target, "raw").log_prob_taken_N
        likelihood = masked_sum(soft_q(stats, "raw").log_prob_taken_N, teacher_rows(stats))
        gap = masked_sum(gap_N.square(), teacher_rows(stats))
        return LossOutput(gap - likelihood, {"gap": (gap.detach(), teacher_rows(stats).sum())})


@pytest.fixture
def rollouts(tiny_teacher, tiny_prompt_files):
    prompts = support.tiny_prompts(tiny_teacher, tiny_prompt_files["train"], support.TINY_SAMPLING)

    def make(**changes: Any) -> Rollouts:
        values = {"every": 2, "prompts_per_round": 8, "batch_size": 4, **changes}
        return Rollouts(RolloutSettings(**values), prompts, lambda: tiny_teacher, support.TINY_SAMPLING)

    return make


@pytest.fixture
def train(load_start, tiny_stores, tiny_tokenizer, tmp_path):
    def start(
        output: str = "out",
        rollouts: Rollouts | None = None,
        callbacks: Any = None,
        peft_config: Any = None,
        **changes: Any,
    ):
        return TDistillTrainer(
            load_start(),
            settings(tmp_path / output, **changes),
            tiny_stores["train"],
            None,
            tiny_tokenizer,
            peft_config=peft_config,
            rollouts=rollouts,
            callbacks=callbacks,
        )

    return start


def test_a_round_holds_answers_of_the_student_scored_by_the_teacher(train, rollouts, tiny_teacher, tiny_stores):
    trainer = train(rollouts=rollouts(), objective=MIXTURE, max_steps=3)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "rollouts"
    assert sorted(path.name for path in folder.iterdir()) == ["round-00000", "round-00001"]
    store = Store.open(folder / "round-00000" / "rank-0")
    assert len(store) == 8
    own = {(t.prompt_id, tuple(t.response_ids)) for t in (store[i] for i in range(len(store)))}
    teachers = {(t.prompt_id, tuple(t.response_ids)) for t in (tiny_stores["train"][i] for i in range(60))}
    assert len(own - teachers) >= 4, "the start answers differently"
    for index in range(len(store)):
        trajectory = store[index]
        ids = torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64))
        with torch.no_grad():
            wanted = torch.log_softmax(tiny_teacher.model(ids[None]).logits[0].double(), -1)
        first = len(trajectory.prompt_ids) - 1
        for step, token in enumerate(trajectory.response_ids):
            start, stop = trajectory.sets.offsets[step : step + 2]
            place = start + int(np.flatnonzero(trajectory.sets.ids[start:stop] == token)[0])
            assert trajectory.sets.log_probs[place] == pytest.approx(float(wanted[first + step, token]), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_max": 1.0, "max_actions": None}, r"scored at p_max = 1.*p_max = 0\.95"),
        ({"p_max": 0.5}, r"scored at p_max = 0\.5"),
        ({"temperature": 0.7}, r"scored at temperature = 0\.7.*temperature = 1"),
    ],
)
def test_answers_that_would_be_scored_otherwise_than_the_stores_are_refused(train, rollouts, change, message):
    made = rollouts()
    made.sampling = replace(made.sampling, **change)
    with pytest.raises(ConfigError, match=message):
        train(rollouts=made, objective=MIXTURE)


def test_what_is_decoded_of_many_rounds_is_bounded(train, rollouts, monkeypatch):
    made = rollouts(every=1, replay=1.0, share=1.0)
    train(rollouts=made, objective=MIXTURE, max_steps=4).train()
    room = max(of.store.cached_bytes for of in made._rounds)
    monkeypatch.setattr(Store, "cache_bytes", room)
    rng = np.random.default_rng(0)
    answers = [made._draw(rng) for _ in range(40)]
    assert len({str(answer.response_ids) for answer in answers}) > 8
    assert 0 < sum(of.store.cached_bytes for of in made._rounds) <= room
    rng = np.random.default_rng(0)
    monkeypatch.undo()
    assert all(np.array_equal(made._draw(rng).response_ids, answer.response_ids) for answer in answers)


def test_rollouts_may_be_used_for_another_training(train, rollouts):
    made, answers = rollouts(), []
    for noise in (0.0, 0.3):
        trainer = train(rollouts=made, objective=MIXTURE, max_steps=1)
        with torch.no_grad():
            trainer.model.model.norm.weight += noise * torch.randn(64)
        trainer.train()
        store = Store.open(Path(trainer.args.output_dir) / "rollouts" / "round-00000" / "rank-0")
        answers.append([tuple(row.response_ids) for row in support.rows_of(store)])
        drawn = [tuple(made._rounds[0].answer(row).response_ids) for row in range(8)]
        assert drawn == answers[-1]
        shutil.rmtree(trainer.args.output_dir)
    assert answers[0] != answers[1]


def test_rollouts_without_a_tokenizer_are_refused(rollouts, load_start, tiny_stores, tmp_path):
    args = settings(tmp_path, objective=MIXTURE)
    with pytest.raises(ConfigError, match="give the trainer processing_class"):
        TDistillTrainer(load_start(), args, tiny_stores["train"], rollouts=rollouts())


def test_the_student_is_the_one_of_the_step(train, rollouts):
    """With a large step length the answers of a later round differ for most prompts that both rounds have."""
    trainer = train(rollouts=rollouts(prompts_per_round=60), objective=MIXTURE, max_steps=3, learning_rate=5e-2)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "rollouts"
    first, second = (Store.open(folder / f"round-0000{k}" / "rank-0") for k in range(2))
    answers = [{t.prompt_id: tuple(t.response_ids) for t in (s[i] for i in range(len(s)))} for s in (first, second)]
    assert sum(answers[0][name] != answers[1][name] for name in answers[0]) > 30


def test_the_logged_share_follows_the_ramp(train, rollouts):
    trainer = train(rollouts=rollouts(share=1.0, ramp_steps=4, every=10), objective={"name": "iq_learn"}, max_steps=6)
    trainer.train()
    shares = [entry["student_share"] for entry in trainer.state.log_history if "student_share" in entry]
    assert 0 < shares[0] < 0.6
    assert shares[3:] == [1.0, 1.0, 1.0]


def test_share_and_replay_choose_whose_answers_are_mixed_in(train, rollouts, tiny_stores, tiny_tokenizer, tmp_path):
    source = rollouts(share=0.25, replay=0.25, every=1, seed=0)
    model = train(objective="sft").model
    for step in range(3):
        source.prepare(step, model, tiny_tokenizer, tmp_path)
    rows = [tiny_stores["train"][i] for i in range(40)]
    mixed = [t for micro in range(50) for t in source.mix(rows, 2, micro)]
    own = [t for t in mixed if t.source == "student"]
    assert len(own) / len(mixed) == pytest.approx(0.25, abs=0.03)
    stores = [Store.open(tmp_path / "rollouts" / f"round-0000{k}" / "rank-0") for k in range(3)]
    of_round = {(s[i].prompt_id, tuple(s[i].response_ids)): k for k, s in enumerate(stores) for i in range(len(s))}
    rounds = Counter(of_round[t.prompt_id, tuple(t.response_ids)] for t in own)
    assert rounds[2] / len(own) == pytest.approx(0.75, abs=0.08)
    assert all(t is row or t.source == "student" for t, row in zip(mixed[:40], rows, strict=True))
    again = source.mix(rows, 2, 0)
    assert [t.response_ids.tolist() for t in again] == [t.response_ids.tolist() for t in mixed[:40]]


@pytest.mark.parametrize("own", [None, 7])
def test_the_seed_of_the_phase_is_that_of_its_rollouts_unless_they_have_their_own(train, rollouts, own):
    """Prompts, answers and the mixing all follow it."""
    made, seen = rollouts(seed=own, prompts_per_round=30), []
    for name, seed in (("a", 1), ("b", 2), ("again", 1)):
        trainer = train(name, made, objective=MIXTURE, max_steps=1, seed=seed, learning_rate=0.0)
        trainer.train()
        store = Store.open(Path(trainer.args.output_dir) / "rollouts" / "round-00000" / "rank-0")
        rows = support.rows_of(trainer.store)
        mixed = [t.source for t in made.mix(rows, 0, 0)]
        seen.append(({t.prompt_id: t.response_ids.tolist() for t in support.rows_of(store)}, mixed))
    first, other, again = seen
    assert first == again
    if own is not None:
        assert first == other
        return
    assert first[0].keys() != other[0].keys() and first[1] != other[1]
    shared = first[0].keys() & other[0].keys()
    assert any(first[0][prompt] != other[0][prompt] for prompt in shared)


def test_an_open_seed_without_a_trainer_is_named(rollouts):
    with pytest.raises(ConfigError, match=r"rollouts\.seed is open"):
        rollouts().mix([], 0, 0)


@pytest.mark.parametrize("crash", [2, 3, 5])
def test_training_with_rollouts_that_goes_on_ends_where_an_uninterrupted_one_does(train, rollouts, crash):
    common = {"objective": MIXTURE, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = train("whole", rollouts(), **common)
    whole.train()
    broken = train("broken", rollouts(), callbacks=[Crash(crash)], **common)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    # What a kill in the middle of a round leaves: a folder that is no whole store.
    due = Path(broken.args.output_dir) / "rollouts" / "round-00002" / "rank-0"
    shutil.rmtree(due, ignore_errors=True)
    due.mkdir(parents=True)
    (due / "shard-00000.parquet").write_bytes(b"half")
    resumed = train("broken", rollouts(), **common)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed.model), parameters(whole.model), atol=1e-7)
    assert losses(resumed) == losses(whole)


def test_a_lost_round_is_named(train, rollouts):
    common = {"objective": MIXTURE, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    broken = train("out", rollouts(), callbacks=[Crash(4)], **common)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    shutil.rmtree(Path(broken.args.output_dir) / "rollouts" / "round-00001")
    with pytest.raises(StoreError, match=r"round-00001.*gone\. Restore it, or train anew"):
        train("out", rollouts(), **common).train(resume_from_checkpoint=True)


def test_without_replay_only_the_newest_round_is_needed(train, rollouts):
    common = {"objective": MIXTURE, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    broken = train("out", rollouts(replay=0.0), callbacks=[Crash(4)], **common)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    shutil.rmtree(Path(broken.args.output_dir) / "rollouts" / "round-00000")
    again = train("out", rollouts(replay=0.0), **common)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_an_objective_that_needs_rollouts_says_so(train):
    with pytest.raises(ConfigError, match="`rollouts`"):
        train(objective=MIXTURE)


def test_an_objective_that_would_imitate_the_students_answers_refuses_them(train, rollouts):
    with pytest.raises(ConfigError, match="'sft' would imitate the student's own answers; leave rollouts out"):
        train(rollouts=rollouts(), objective="sft")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("every", 0),
        ("share", 0.0),
        ("share", 1.5),
        ("replay", -0.1),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("ramp_steps", -1),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"rollouts\.{field} = {value}"):
        RolloutSettings(**{field: value})


def test_generation_settings_of_the_student_stay(train, rollouts):
    trainer = train(rollouts=rollouts(), objective=MIXTURE, max_steps=1)
    trainer.model.generation_config.repetition_penalty = 1.25
    trainer.train()
    assert trainer.model.generation_config.repetition_penalty == 1.25


def test_a_round_ends_answers_where_the_teacher_does(train, rollouts, tiny_teacher, monkeypatch):
    """A student that knows a further end token, as base models do, would end answers that no store could hold."""
    trainer = train(rollouts=rollouts(), objective=MIXTURE, max_steps=1)
    common = 9
    trainer.model.generation_config.eos_token_id = [*tiny_teacher.end_token_ids, common]
    asked = []
    original = HFTeacher.generate
    monkeypatch.setattr(HFTeacher, "generate", lambda self, *a: asked.append(self.end_token_ids) or original(self, *a))
    trainer.train()
    assert set(asked) == {tiny_teacher.end_token_ids}


def test_sampling_settings_of_a_student_with_an_adapter_do_not_act(train, rollouts):
    """Without a task type PEFT's wrapper reads the settings of the model within."""

    def stored(**settings: Any) -> list[list[int]]:
        adapter = LoraConfig(r=2, target_modules=["q_proj"])
        trainer = train(str(settings), rollouts=rollouts(), objective=MIXTURE, max_steps=1, peft_config=adapter)
        for name, value in settings.items():
            setattr(trainer.model.get_base_model().generation_config, name, value)
        trainer.train()
        store = Store.open(Path(trainer.args.output_dir) / "rollouts" / "round-00000" / "rank-0")
        return [store[i].response_ids.tolist() for i in range(len(store))]

    assert stored() == stored(do_sample=True, temperature=0.5, top_k=3, repetition_penalty=2.0)


def test_generation_settings_of_a_student_with_an_adapter_stay(train, rollouts):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = train(rollouts=rollouts(), objective=MIXTURE, max_steps=1, peft_config=adapter)
    trainer.model.get_base_model().generation_config.repetition_penalty = 1.25
    trainer.train()
    assert trainer.model.get_base_model().generation_config.repetition_penalty == 1.25


# ---- the slow copy ----


def test_a_slow_copy_computes_in_the_precision_of_the_student(train, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "follow", Follow)
    trainer, seen = train(objective="follow", max_steps=1, bf16=True), []
    trainer.slow_copy.model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    trainer.train()
    assert set(seen) == {True}


def test_a_slow_copy_leaves_frozen_weights_alone():
    quantised = tiny_llama().requires_grad_(False)
    quantised.lm_head.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    copy = SlowCopy(quantised, 0.05)
    copy.on_step_end(None, None, None, model=quantised)  # nothing to follow, and nothing that cannot be averaged


@pytest.mark.parametrize("writes", [True, False])
def test_one_process_writes_the_slow_copy(train, monkeypatch, tmp_path, writes):
    monkeypatch.setitem(OBJECTIVES, "follow", Follow)
    trainer, saved = train(objective="follow", max_steps=1), []
    monkeypatch.setattr(trainer.slow_copy, "save", saved.append)
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: writes))
    (folder := tmp_path / "checkpoint-1").mkdir()
    trainer._save(str(folder))
    assert saved == [folder] * writes


def test_the_slow_copy_follows_by_its_rate(train, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "follow", Follow)
    trainer = train(objective="follow", max_steps=1, slow_copy_rate=0.25)
    start = parameters(trainer.model)
    assert trainer.slow_copy.model is not trainer.model
    trainer.train()
    slow, fast = parameters(trainer.slow_copy.model), parameters(trainer.model)
    assert_same(slow, {name: 0.75 * start[name] + 0.25 * fast[name] for name in start}, atol=1e-6)
    gaps = [entry["gap"] for entry in trainer.state.log_history if "gap" in entry]
    assert gaps == pytest.approx([0.0], abs=1e-10), "before the first step student and slow copy are the same"


def test_training_with_a_slow_copy_that_goes_on_ends_where_an_uninterrupted_one_does(train, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "follow", Follow)
    common = {"objective": "follow", "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = train("whole", **common)
    whole.train()
    broken = train("broken", callbacks=[Crash(5)], **common)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = train("broken", **common)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed.model), parameters(whole.model), atol=1e-7)
    assert_same(parameters(resumed.slow_copy.model), parameters(whole.slow_copy.model), atol=1e-7)
    assert without_clock(resumed.state.log_history) == without_clock(whole.state.log_history)
    Path(last_checkpoint(resumed.args.output_dir), "slow_copy.safetensors").unlink()
    with pytest.raises(RunFolderError, match="slow_copy"):
        train("broken", **common).train(resume_from_checkpoint=True)


# ---- the teacher mixed into the policy that answers ----


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_log_probs_are_those_of_the_policy_that_sampled(
    train, rollouts, tiny_teacher, load_start, tiny_tokenizer, weight
):
    """log (w π*(a|s) + (1 − w) π_Q(a|s)) of every token, from plain forward passes over each answer alone."""
    trainer = train(rollouts=(made := rollouts(teacher_mix=weight)), objective="minillm", max_steps=1)
    trainer.train()
    start = load_start()
    drawn = made._rounds[0]
    for row in range(len(drawn.store)):
        answer = drawn.answer(row)
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.response_ids]).astype(np.int64))[None]
        places = torch.arange(len(answer.prompt_ids) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            probs = [m(input_ids=ids).logits[0].double().softmax(-1)[places, ids[0, places + 1]]
                     for m in (tiny_teacher.model, start)]  # fmt: skip
        wanted = torch.log(weight * probs[0] + (1 - weight) * probs[1])
        np.testing.assert_allclose(answer.log_probs_sampled, wanted.numpy(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("batch_size", [1, 12])
def test_answers_are_drawn_from_the_mixture(tiny_teacher, load_start, tiny_prompt_files, tiny_tokenizer, batch_size):
    """With the same uniform numbers: token by token from the inverse distribution function of the mixed policy."""
    prompts = support.tiny_prompts(tiny_teacher, tiny_prompt_files["dev"], support.TINY_SAMPLING)[:12]
    sampling = SamplingSettings(1.0, None, max_new_tokens=40, seed=5)
    student = HFTeacher(load_start(), tiny_tokenizer, "student")
    answers = []
    for at in range(0, 12, batch_size):
        batch = [(prompt, 0) for prompt in prompts[at : at + batch_size]]
        answers += student.generate(batch, sampling, (tiny_teacher.model, 0.7))
    assert len({len(answer.response_ids) for answer in answers}) > 1, "some rows end before others"
    for answer in answers:
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.response_ids]).astype(np.int64))[None]
        with torch.no_grad():
            teacher, own = (
                m(input_ids=ids).logits[0].double().softmax(-1) for m in (tiny_teacher.model, student.model)
            )
        mixed = (0.7 * teacher + 0.3 * own)[len(answer.prompt_ids) - 1 : -1].cumsum(-1).numpy()
        for row, token, uniform in zip(
            mixed, answer.response_ids, uniforms(sampling, answer.prompt_id, 0), strict=False
        ):
            below = row[token - 1] if token else 0.0
            assert below - 1e-4 <= uniform <= row[token] + 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_mix": 1.0}, r"rollouts.teacher_mix = 1.0 is outside \[0, 1\)"),
        ({"teacher_mix": 0.2, "top_p": 0.9}, "needs temperature 1 and top_p 1"),
    ],
)
def test_a_mixture_that_makes_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        RolloutSettings(**changes)
