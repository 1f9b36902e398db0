from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_training
import numpy as np
import pytest
import support
import torch
from accelerate.parallelism_config import ParallelismConfig
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from training_support import (
    ALL_PARTS,
    ONE_SGD_STEP,
    PARTS,
    Crash,
    FixedBatchTrainer,
    assert_same,
    disturb_value_head,
    losses,
    parameters,
    plain_texts,
    settings,
    update,
    without_clock,
)
from transformers import TrainerCallback

from tdistill.actions import nested_sizes
from tdistill.errors import (
    ConfigError,
    DomainError,
    NonFiniteLossError,
    ProbabilityRangeError,
    RunFolderError,
    TDistillError,
    TokenizerMismatchError,
    UnsupportedModelError,
)
from tdistill.objectives import IQLearn
from tdistill.store import Store
from tdistill.teachers.base import SamplingSettings
from tdistill.training import Rollouts, RolloutSettings
from tdistill.training.arguments import DEV_METRICS, TDistillConfig
from tdistill.training.checks import keep_statistics_exact
from tdistill.training.trainer import TDistillTrainer, last_checkpoint
from tdistill.types import Trajectory

BC = {"name": "iq_learn", "alpha": math.inf, "first_order": "sampled", "coordinates": "raw"}


@pytest.fixture(scope="module")
def ragged_store(tmp_path_factory, tiny_teacher, tiny_prompt_files) -> Store:
    """Given answers of 1 to 16 words, scored: lengths differ widely, and some tokens lie outside their sets."""
    folder = tmp_path_factory.mktemp("ragged")
    records = [json.loads(line) for line in tiny_prompt_files["train"].read_text().splitlines()]
    for index, record in enumerate(records):
        record["answer"] = " ".join(record["answer"].split()[: 1 + (7 * index) % 16])
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return support.capture_tiny(
        tiny_teacher, folder / "prompts.jsonl", folder / "store", SamplingSettings(0.95, 16, max_new_tokens=14), "score"
    )


@pytest.fixture(scope="module")
def full_store(tmp_path_factory, tiny_teacher, tiny_prompt_files) -> Store:
    """Sampled from the whole vocabulary: no sets."""
    folder = tmp_path_factory.mktemp("full")
    return support.capture_tiny(
        tiny_teacher, tiny_prompt_files["train"], folder / "store", SamplingSettings(1.0, None, max_new_tokens=16)
    )


@pytest.fixture
def make_trainer(load_start, tiny_stores, tiny_tokenizer, tmp_path) -> Callable[..., Any]:
    """A trainer on a fresh copy of the start; keywords that it does not know are training arguments."""

    def make(
        *,
        cls: type = TDistillTrainer,
        batches: Any = None,
        model: Any = None,
        store: Store | None = None,
        dev: Store | None = None,
        tokenizer: Any = tiny_tokenizer,
        output: str = "out",
        **changes: Any,
    ) -> Any:
        names = ("peft_config", "text_dataset", "callbacks", "teacher", "rollouts")
        own = {name: changes.pop(name) for name in names if name in changes}
        if batches is not None:
            cls = type("Trainer", (FixedBatchTrainer,), {"batches": batches})
        return cls(
            model or load_start(),
            settings(tmp_path / output, **changes),
            store or tiny_stores["train"],
            dev,
            tokenizer,
            **own,
        )

    return make


# ---- the loss: one sum, one division ----


@pytest.mark.parametrize("objective", ["sft", "iq_learn"])
@pytest.mark.parametrize("off_support", ["none", "tail"])
@pytest.mark.parametrize("source", ["given", "sampled"])
def test_accumulated_micro_batches_give_the_update_of_one_batch(
    make_trainer, ragged_store, tiny_stores, objective, off_support, source
):
    common = {
        **ONE_SGD_STEP,
        "objective": objective,
        "off_support": off_support,
        "p": 0.7,
        "store": ragged_store if source == "given" else tiny_stores["train"],
    }
    parts = make_trainer(batches=PARTS, gradient_accumulation_steps=4, **common)
    whole = make_trainer(batches=[ALL_PARTS], **common)
    for trainer in (parts, whole):
        if objective == "iq_learn":
            disturb_value_head(trainer.model)
    sizes = [int(whole.data_collator([parts.store[i] for i in part])["has_action_N"].sum()) for part in PARTS]
    assert max(sizes) > 3 * min(sizes), "a mean of means would show"
    assert_same(update(parts), update(whole), atol=1e-6)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)


class MixedByPrompt(Rollouts):
    """The student's answer to every prompt of the newest round, in whichever micro-batch the teacher's would be."""

    def mix(self, trajectories: Any, step: int, micro_batch: int, rank: int = 0) -> list[Trajectory]:
        drawn = self._rounds[-1]
        answers = {answer.prompt_id: answer for answer in map(drawn.answer, range(len(drawn.store)))}
        return [answers.get(trajectory.prompt_id, trajectory) for trajectory in trajectories]


LIVE_GKD = {"name": "gkd", "source": "teacher"}


@pytest.mark.parametrize(
    ("objective", "mixed"),
    [
        (LIVE_GKD, False),
        (LIVE_GKD, True),
        ({"name": "distillm2"}, True),
        ({"name": "iq_learn", "alpha": 1.0, "student_value_weight": 0.5}, True),
    ],
    ids=["teacher in memory", "teacher in memory, student's answers", "student's answers", "both in one value term"],
)
def test_accumulated_micro_batches_with_a_teacher_or_the_students_answers(
    make_trainer, tiny_teacher, tiny_stores, tiny_prompt_files, objective, mixed
):
    prompts = support.tiny_prompts(tiny_teacher, tiny_prompt_files["train"], support.TINY_SAMPLING)

    def make(batches: Any, **more: Any) -> Any:
        chosen = RolloutSettings(prompts_per_round=30)
        rounds = MixedByPrompt(chosen, prompts, lambda: tiny_teacher, support.TINY_SAMPLING) if mixed else None
        common = {**ONE_SGD_STEP, "objective": objective, "off_support": "tail", "teacher": tiny_teacher.model}
        trainer = make_trainer(batches=batches, rollouts=rounds, **common, **more)
        if trainer.objective.needs_value_head:
            disturb_value_head(trainer.model)
        return trainer

    parts, whole = make(PARTS, gradient_accumulation_steps=4), make([ALL_PARTS])
    assert_same(update(parts), update(whole), atol=2e-6)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    logged = [trainer.state.log_history[0] for trainer in (parts, whole)]
    assert logged[0]["response_tokens"] == logged[1]["response_tokens"]
    if mixed and "student_share" in logged[0]:
        assert 0.2 < logged[0]["student_share"] < 0.8


def test_the_last_incomplete_accumulation_of_an_epoch_is_divided_by_its_own_tokens(make_trainer, ragged_store):
    common = {**ONE_SGD_STEP, "store": ragged_store, "objective": "sft", "max_steps": -1, "num_train_epochs": 1}
    five = make_trainer(batches=[*PARTS, [50, 51]], gradient_accumulation_steps=4, **common)
    two = make_trainer(batches=[ALL_PARTS, [50, 51]], **common)
    assert_same(update(five), update(two), atol=1e-6)
    assert len(losses(five)) == 2


def dense_log_probs(model: nn.Module, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Log-softmax [R, V] and last hidden states [R, D] of the recorded states, float64."""
    ids = torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64))[None]
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    first, num_states = len(trajectory.prompt_ids) - 1, len(trajectory.sets)
    states = slice(first, first + num_states)
    return (
        torch.log_softmax(out.logits[0, states].double(), -1).numpy(),
        out.hidden_states[-1][0, states].double().numpy(),
    )


def test_the_logged_loss_of_sft_is_the_cross_entropy_per_response_token(make_trainer, ragged_store, load_start):
    rows = ALL_PARTS
    trainer = make_trainer(
        batches=PARTS, gradient_accumulation_steps=4, objective="sft", store=ragged_store, max_steps=1
    )
    trainer.train()
    total = count = 0
    for trajectory in (ragged_store[row] for row in rows):
        log_probs, _ = dense_log_probs(load_start(), trajectory)
        for step, token in enumerate(trajectory.response_ids):
            total, count = total - log_probs[step, token], count + 1
    assert losses(trainer) == [pytest.approx(total / count, abs=1e-5)]
    assert trainer.state.num_input_tokens_seen == count


@pytest.mark.parametrize("target", ["set", "teacher"])
def test_the_logged_loss_of_iq_learn_is_its_formula_per_response_token(make_trainer, tiny_stores, load_start, target):
    """Written from arXiv 2505.20335 (§3, §4) with V_p(s) = v(s), step by step, from dense logits."""
    p, alpha, gamma, weight = 0.7, 2.0, 0.9, 0.5
    store, rows = tiny_stores["train"], ALL_PARTS
    trainer = make_trainer(
        batches=PARTS,
        gradient_accumulation_steps=4,
        objective={"name": "iq_learn", "alpha": alpha, "gamma": gamma},
        p=p,
        off_support="tail",
        off_support_weight=weight,
        off_support_target=target,
        max_steps=1,
    )
    disturb_value_head(trainer.model)
    head = trainer.model.value_head.weight.detach().double().numpy()[0], trainer.model.value_head.bias.item()
    trainer.train()

    model, total, count, dropped, slots, states = load_start(), 0.0, 0, 0, 0, 0
    for trajectory in (store[row] for row in rows):
        log_probs, hidden = dense_log_probs(model, trajectory)
        values = hidden @ head[0] + head[1]
        sizes = nested_sizes(trajectory.sets, p)
        slots, states = slots + sizes.sum(), states + len(sizes)
        for step, token in enumerate(trajectory.response_ids):
            start = trajectory.sets.offsets[step]
            ids = trajectory.sets.ids[start : start + sizes[step]]
            if token not in ids:
                dropped += 1
                continue
            teacher = np.exp(trajectory.sets.log_probs[start : start + sizes[step]].astype(np.float64))
            student = np.exp(log_probs[step, ids])
            log_projected = np.log(student / student.sum())
            last = step + 1 == len(trajectory.response_ids)
            next_value = 0.0 if last and trajectory.ends == "terminal" else values[step + 1]
            reward = log_projected[ids.tolist().index(token)] + values[step] - gamma * next_value
            first_order = (teacher / teacher.sum() * log_projected).sum()
            mass = 1.0 if target == "set" else teacher.sum()
            tail = mass * np.log(student.sum()) + (1 - mass) * np.log1p(-student.sum())
            total += -first_order + reward**2 / (4 * alpha) - weight * tail
            count += 1
    assert dropped > 0
    assert losses(trainer) == [pytest.approx(total / count, abs=2e-5)]
    entry = trainer.state.log_history[0]
    assert entry["response_tokens"] == count
    assert entry["dropped_share"] == pytest.approx(dropped / (count + dropped))
    assert entry["set_size"] == pytest.approx(slots / states)


def test_given_tokens_outside_the_set_are_added_and_counted(make_trainer, ragged_store):
    trainer = make_trainer(store=ragged_store, p=0.5, max_steps=1, response_tokens_per_batch=100_000)
    trainer.train()
    outside = total = 0
    for trajectory in support.rows_of(ragged_store):
        sizes = nested_sizes(trajectory.sets, 0.5)
        for step, token in enumerate(trajectory.response_ids):
            start = trajectory.sets.offsets[step]
            outside += token not in trajectory.sets.ids[start : start + sizes[step]]
            total += 1
    entry = trainer.state.log_history[0]
    assert entry["added_share"] == pytest.approx(outside / total)
    assert 0 < outside < total
    assert entry["dropped_share"] == 0
    assert entry["response_tokens"] == total == ragged_store.total_response_tokens


def test_both_kernels_train_alike(make_trainer, tiny_stores):
    updates = [
        update(make_trainer(kernel=kernel, off_support="tail", **ONE_SGD_STEP))
        for kernel in ("candidates", "reference")
    ]
    assert_same(*updates, atol=1e-6)


# ---- resume ----


def assert_same_end(resumed: TDistillTrainer, whole: TDistillTrainer) -> None:
    expected = parameters(whole.model)
    for name, value in parameters(resumed.model).items():
        assert torch.equal(value, expected[name]), name
    assert without_clock(resumed.state.log_history) == without_clock(whole.state.log_history)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


# The store makes 6 micro-batches: checkpoints in the first and in the second epoch, at its end, and with an
# accumulation that leaves a remainder at each epoch's end.
RESUMES = {
    "within the first epoch": {"save_steps": 4, "crash": 6},
    "within the second epoch": {"save_steps": 4, "crash": 9},
    "at the end of an epoch": {"save_steps": 6, "crash": 7},
    "right before the end of an epoch": {"save_steps": 5, "crash": 6},
    "accumulating": {"save_steps": 3, "crash": 5, "gradient_accumulation_steps": 4},
    "with workers": {"save_steps": 4, "crash": 6, "dataloader_num_workers": 2},
}


@pytest.mark.parametrize("case", RESUMES.values(), ids=RESUMES)
@pytest.mark.parametrize("objective", ["iq_learn", "sft"])
def test_a_resumed_run_ends_exactly_like_an_uninterrupted_one(make_trainer, tiny_stores, tmp_path, case, objective):
    case = dict(case)
    crash = case.pop("crash")
    common = {"objective": objective, "save_strategy": "steps", "dev": tiny_stores["dev"], **case}
    common |= {"eval_strategy": "steps", "eval_steps": 3, "p": 0.9}
    whole = make_trainer(output="whole", **common)
    assert len(whole.get_train_dataloader()) == 6
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output="killed", callbacks=[Crash(crash)], **common).train()
    last = last_checkpoint(tmp_path / "killed")
    assert last is not None and int(last.rpartition("-")[2]) < crash
    torch.manual_seed(99)  # resuming does not rely on the state of the generators
    np.random.seed(99)
    resumed = make_trainer(output="killed", **common)
    resumed.train(resume_from_checkpoint=last)
    assert_same_end(resumed, whole)
    if objective == "iq_learn":
        assert resumed.model.value_head.weight.abs().max() > 0


def test_speed_after_a_resume_counts_only_tokens_seen_since(make_trainer, tmp_path, monkeypatch):
    make_trainer(save_strategy="steps", save_steps=4, max_steps=4).train()
    resumed = make_trainer(max_steps=6)
    ticks = iter(range(1000))
    monkeypatch.setattr("tdistill.training.trainer.time.perf_counter", lambda: float(next(ticks)))
    resumed.train(resume_from_checkpoint=True)
    tokens = [0, *(entry["response_tokens"] for entry in resumed.state.log_history if "loss" in entry)]
    speeds = [entry["tokens_per_second"] for entry in resumed.state.log_history if "loss" in entry]
    assert speeds[4:] == np.diff(tokens)[4:].tolist(), "one tick of the clock per logged step"


def test_speed_is_that_of_training_without_evaluation(make_trainer, tiny_stores, monkeypatch):
    now = [0.0]

    class OneSecondPerStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 1

    trainer = make_trainer(
        dev=tiny_stores["dev"], callbacks=[OneSecondPerStep()], eval_strategy="steps", eval_steps=1, max_steps=4
    )
    loader = trainer.get_eval_dataloader()

    def slow(dataset: Any = None) -> Any:
        now[0] += 100
        return loader

    monkeypatch.setattr("tdistill.training.trainer.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer, "get_eval_dataloader", slow)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = np.diff([0, *(entry["response_tokens"] for entry in steps)])
    assert [entry["tokens_per_second"] for entry in steps] == tokens.tolist()
    assert [e["eval_runtime"] for e in trainer.state.log_history if "eval_runtime" in e] == [100.0] * 4


@pytest.mark.parametrize("objective", ["sft", {"name": "sqil", "target": "slow", "student_weight": 0.0}])
def test_going_on_from_a_checkpoint_that_is_not_there_is_refused(make_trainer, tmp_path, objective):
    with pytest.raises(RunFolderError, match=f"{tmp_path}/out has no complete checkpoint"):
        make_trainer(objective=objective).train(resume_from_checkpoint=True)


class _Kill(TrainerCallback):
    """Kills the process when a file of the second checkpoint has been written, and the rest has not."""

    def __init__(self, method: str) -> None:
        self.method = method

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original = getattr(TDistillTrainer, self.method)

        def killing(trainer: TDistillTrainer, *rest: Any) -> None:
            original(trainer, *rest)
            if trainer.state.global_step == 8:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(TDistillTrainer, self.method, killing)


@pytest.mark.parametrize("after", ["_save_optimizer_and_scheduler", "_save", "_save_rng_state"])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(make_trainer, tmp_path, after):
    common = {"save_strategy": "steps", "save_steps": 4}
    pid = os.fork()
    if pid == 0:
        try:
            make_trainer(output="killed", callbacks=[_Kill(after)], **common).train()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    last = last_checkpoint(tmp_path / "killed")
    assert last is not None and last.endswith("checkpoint-4")
    resumed = make_trainer(output="killed", **common)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(output="whole", **common)
    whole.train()
    assert_same_end(resumed, whole)


def test_checkpoints_hold_no_pickle_but_the_state_of_optimizer_and_generators(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=5, max_steps=5).train()
    names = {file.name for file in (tmp_path / "out" / "checkpoint-5").iterdir()}
    pickles = {name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert "model.safetensors" in names


class _Damage(TrainerCallback):
    """Adds noise to the weights after a step, so that the best checkpoint is not the last."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for value in filter(lambda value: value.requires_grad, kwargs["model"].parameters()):
                    value += 0.1 * torch.randn(value.shape, generator=generator)


def test_the_checkpoint_with_the_lowest_divergence_is_kept(make_trainer, tiny_stores, tmp_path):
    trainer = make_trainer(
        dev=tiny_stores["dev"],
        callbacks=[_Damage(8)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    history = {e["step"]: e["eval_kl_set_tail"] for e in trainer.state.log_history if "eval_kl_set_tail" in e}
    best = min(history, key=history.__getitem__)
    assert 1 < best < 8, "neither the first nor the last checkpoint, else this test says nothing"
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == history[best]
    assert trainer.evaluate()["eval_kl_set_tail"] == history[best]
    assert (tmp_path / "out" / f"checkpoint-{best}").is_dir()


# ---- where it runs and how ----


def test_gradient_checkpointing_changes_no_gradient(make_trainer):
    plain = make_trainer(off_support="tail", **ONE_SGD_STEP)
    saving = make_trainer(off_support="tail", activation_checkpointing=True, **ONE_SGD_STEP)
    disturb_value_head(plain.model)
    disturb_value_head(saving.model)
    calls = []
    layer = saving.model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(update(saving), update(plain), atol=1e-7)
    assert len(calls) == 2, "the layer runs again in the backward pass"


@pytest.mark.parametrize("objective", ["sft", "iq_learn"])
def test_bfloat16_autocast_is_near_float32(make_trainer, tiny_stores, objective):
    runs = {}
    for bf16 in (False, True):
        trainer = make_trainer(bf16=bf16, objective=objective, dev=tiny_stores["dev"], max_steps=20)
        trainer.train()
        assert trainer.model.dtype == torch.float32
        runs[bf16] = np.array(losses(trainer)), trainer.evaluate()["eval_kl_set_tail"]
    np.testing.assert_allclose(runs[True][0], runs[False][0], rtol=0.03)
    assert runs[True][1] == pytest.approx(runs[False][1], rel=0.05)
    assert (runs[True][0] != runs[False][0]).any(), "autocast was on"


def test_the_dev_split_is_measured_in_the_precision_of_training_before_it_too(make_trainer, tiny_stores):
    def measured(trainer: TDistillTrainer) -> dict[str, float]:
        found = trainer.evaluate()
        return {name: found[f"eval_{name}"] for name in DEV_METRICS}

    common = {"dev": tiny_stores["dev"], "learning_rate": 0.0, "max_steps": 1}
    trainer = make_trainer(bf16=True, **common)
    before = measured(trainer)
    trainer.train()
    assert measured(trainer) == before != measured(make_trainer(**common))


def test_deepspeed_rounds_no_log_probability(make_trainer, monkeypatch):
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    batch = trainer.data_collator([trainer.store[0]])
    for name, tensor in trainer._prepare_inputs(batch).items():
        assert tensor.dtype == batch[name].dtype and torch.equal(tensor, batch[name]), name


def test_weights_or_sequences_that_no_process_has_whole_are_refused(make_trainer, monkeypatch):
    for name in ("cp_size", "sp_size"):
        with pytest.raises(ConfigError, match=rf"parallelism_config\.{name} = 2 is not supported.*Leave it out"):
            make_trainer(parallelism_config=ParallelismConfig(**{name: 2}))
    monkeypatch.setattr("tdistill.training.checks.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"ZeRO stage 3 is not supported.*stage 1 or 2, or FSDP2"):
        make_trainer()


def test_every_micro_batch_passes_through_the_wrapped_model(make_trainer):
    calls = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.model_wrapped.register_forward_hook(lambda *_: calls.append("wrapped"))

    trainer = make_trainer(callbacks=[Watch()], gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    assert calls == ["wrapped"] * 6


def test_worker_processes_change_no_batch(make_trainer):
    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        loader = make_trainer(dataloader_num_workers=workers).get_train_dataloader()
        found = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            found += list(loader)
        return found

    alone, workers = batches(0), batches(2)
    assert len(alone) == len(workers) == 12
    for one, other in zip(alone, workers, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert torch.equal(values, other[name]), name
    first, second = alone[:6], alone[6:]
    assert any(one["input_ids"].shape != two["input_ids"].shape for one, two in zip(first, second, strict=True))


def test_the_dev_split_is_read_by_the_same_workers_each_time(make_trainer, tiny_stores):
    trainer = make_trainer(
        dev=tiny_stores["dev"],
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    seen: list[set[int]] = []
    original = trainer.callback_handler.on_evaluate

    def noting(*args: Any) -> Any:
        loader = trainer.get_eval_dataloader()
        seen.append({worker.pid for worker in loader._iterator._workers})
        return original(*args)

    trainer.callback_handler.on_evaluate = noting
    trainer.train()
    assert len(seen) == 4 and all(pids == seen[0] for pids in seen)
    assert trainer.get_eval_dataloader(tiny_stores["held_out"]) is not trainer.get_eval_dataloader()


def test_loaders_are_made_as_the_arguments_say(make_trainer, tiny_stores):
    given = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False}
    trainer = make_trainer(dev=tiny_stores["dev"], **given)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.multiprocessing_context.get_start_method() == "spawn"
        assert not loader.in_order


def test_evaluation_without_a_store_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"no store to evaluate on.*eval_dataset"):
        make_trainer().evaluate()


def test_every_epoch_visits_every_trajectory_once_in_another_order(make_trainer):
    seen: list[list[tuple[int, ...]]] = []

    class Watch(TDistillTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            epoch = int(self.state.epoch or 0)
            seen.extend([] for _ in range(epoch + 1 - len(seen)))
            seen[epoch] += [tuple(row.tolist()) for row in inputs["input_ids"]]
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(cls=Watch, max_steps=-1, num_train_epochs=3)
    trainer.train()
    pad = trainer.processing_class.pad_token_id
    stripped = [[tuple(t for t in row if t != pad) for row in epoch] for epoch in seen]
    assert [len(epoch) for epoch in stripped] == [60, 60, 60]
    assert sorted(stripped[0]) == sorted(stripped[1]) == sorted(stripped[2])
    assert stripped[0] != stripped[1] != stripped[2]


def test_training_twice_with_one_seed_is_bit_identical(make_trainer):
    runs = []
    for seed in (0, 0, 1):
        runs.append(make_trainer(seed=seed))
        runs[-1].train()
    one, two, other = runs
    assert losses(one) == losses(two)
    assert losses(one) != losses(other)
    assert all(torch.equal(value, parameters(two.model)[name]) for name, value in parameters(one.model).items())


@pytest.mark.parametrize("off_support", ["union", "negatives"])
def test_evaluating_and_saving_change_no_weight(make_trainer, tiny_stores, off_support):
    plain = make_trainer(off_support=off_support)
    plain.train()
    watched = make_trainer(
        off_support=off_support,
        dev=tiny_stores["dev"],
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=2,
    )
    watched.train()
    assert losses(watched) == losses(plain)


# ---- adapters ----


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def test_with_an_adapter_only_adapter_and_value_head_are_trained(make_trainer):
    trainer = make_trainer(peft_config=lora(), learning_rate=1e-2)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "value_head.modules_to_save" in name for name in trainable)
    assert sum("value_head" in name for name in trainable) == 2
    changes = update(trainer)
    for name, change in changes.items():
        assert (float(change.abs().max()) > 0) == (name in trainable), name


def test_a_resumed_adapter_run_keeps_adapter_and_value_head(make_trainer, tmp_path):
    common = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    torch.manual_seed(3)  # adapters start at random
    whole = make_trainer(output="whole", peft_config=lora(), **common)
    whole.train()
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output="killed", peft_config=lora(), callbacks=[Crash(6)], **common).train()
    resumed = make_trainer(output="killed", peft_config=lora(), **common)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "killed"))
    assert_same_end(resumed, whole)
    head = {name: value for name, value in parameters(resumed.model).items() if "value_head" in name}
    assert any(value.abs().max() > 0 for value in head.values())


def test_the_best_adapter_is_loaded_with_its_value_head(make_trainer, tiny_stores):
    trainer = make_trainer(
        peft_config=lora(),
        dev=tiny_stores["dev"],
        learning_rate=1e-2,
        callbacks=[_Damage(8)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    history = {e["step"]: e["eval_kl_set_tail"] for e in trainer.state.log_history if "eval_kl_set_tail" in e}
    best = min(history, key=history.__getitem__)
    assert 1 < best < 8
    assert trainer.evaluate()["eval_kl_set_tail"] == pytest.approx(history[best], abs=1e-6)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_shared_output_matrix_is_refused_before_training(make_trainer, target):
    with pytest.raises(UnsupportedModelError, match="output matrix"):
        make_trainer(peft_config=lora(target_modules=["q_proj", target]))


def test_gradient_checkpointing_reaches_an_adapter(make_trainer):
    updates = []
    for checkpointing in (True, False):
        torch.manual_seed(3)  # adapters start at random
        trainer = make_trainer(peft_config=lora(), activation_checkpointing=checkpointing, **ONE_SGD_STEP)
        updates.append(update(trainer))
    assert_same(*updates, atol=1e-7)


# ---- p ----


def test_p_above_the_stores_is_refused_with_both_values(make_trainer):
    with pytest.raises(ProbabilityRangeError, match=r"0\.97.*0\.95"):
        make_trainer(p=0.97)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1])
def test_p_outside_its_range_is_refused(make_trainer, p):
    with pytest.raises(ProbabilityRangeError, match=str(p)):
        make_trainer(p=p)


def test_p_below_one_on_a_store_without_sets_is_refused(make_trainer, full_store):
    with pytest.raises(ProbabilityRangeError, match="p_max = 1"):
        make_trainer(p=0.8, store=full_store, off_support="none", objective=BC)


@pytest.mark.parametrize("p", [None, 1.0])
def test_at_p_of_one_behaviour_cloning_is_sft(make_trainer, full_store, p):
    common = {**ONE_SGD_STEP, "store": full_store}
    cloning = make_trainer(objective=BC, off_support="none", p=p, **common)
    sft = make_trainer(objective="sft", **common)
    assert_same(update(cloning), update(sft), atol=1e-6)
    assert losses(cloning) == pytest.approx(losses(sft), abs=1e-6)


def test_at_p_of_one_the_temporal_term_trains_too(make_trainer, full_store):
    objective = {"name": "iq_learn", "first_order": "sampled", "coordinates": "value_head", "alpha": 1.0}
    trainer = make_trainer(objective=objective, off_support="none", store=full_store)
    trainer.train()
    assert trainer.model.value_head.weight.abs().max() > 0
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_at_p_of_one_the_defaults_are_refused_with_a_remedy(make_trainer, full_store):
    with pytest.raises(ConfigError, match="none"):
        make_trainer(store=full_store)


@pytest.mark.parametrize("change", [{}, {"first_order": "sampled", "coordinates": "max_set"}])
def test_at_p_of_one_what_needs_sets_is_refused_before_training(make_trainer, full_store, change):
    with pytest.raises(DomainError, match=r"p = 1.*first_order"):
        make_trainer(store=full_store, off_support="none", objective={"name": "iq_learn", **change})


@pytest.mark.parametrize("metric", [None, "eval_nll"])
def test_a_run_at_p_of_one_can_be_evaluated_and_saved(make_trainer, full_store, metric):
    extra = {} if metric is None else {"metric_for_best_model": metric, "load_best_model_at_end": True}
    trainer = make_trainer(
        store=full_store,
        dev=full_store,
        objective=BC,
        off_support="none",
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        **extra,
    )
    trainer.train()
    assert trainer.evaluate().keys() >= {"eval_nll"}


# ---- tokenizer and vocabulary ----


def test_another_tokenizer_is_refused(make_trainer):
    other = support.tiny_tokenizer()
    other.add_tokens(["elephant"])
    with pytest.raises(TokenizerMismatchError, match="86 tokens"):
        make_trainer(tokenizer=other)


def test_a_path_in_place_of_a_store_is_refused(load_start, tiny_stores):
    for stores in (("folder", None), (tiny_stores["train"], "folder")):
        with pytest.raises(ConfigError, match=r"_dataset must be a store and is a str.*Store\.open"):
            TDistillTrainer(load_start(), TDistillConfig("out"), *stores)


def test_a_student_with_fewer_rows_than_tokens_is_refused(make_trainer, load_start):
    model = load_start()
    model.resize_token_embeddings(80)
    with pytest.raises(TokenizerMismatchError, match=r"80.*85"):
        make_trainer(model=model)


def test_a_student_with_more_rows_than_tokens_learns_to_leave_them_alone(make_trainer, load_start, tiny_stores):
    model = load_start()
    model.resize_token_embeddings(128, mean_resizing=False)
    trainer = make_trainer(model=model, dev=tiny_stores["dev"], off_support="tail", max_steps=40)
    before = trainer.evaluate()["eval_kl_set_tail"]
    trainer.train()
    assert trainer.evaluate()["eval_kl_set_tail"] < before / 3
    ids = torch.from_numpy(support.sequence_of(tiny_stores["dev"], 0))[None]
    with torch.inference_mode():
        probs = trainer.model(input_ids=ids).logits[0, 12:].softmax(-1)
    assert probs.shape[-1] == 128
    assert probs[:, 85:].sum(-1).mean() < 0.02


# ---- settings ----


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("iq_lern", r"iq_lern.*iq_learn"),
        ("SFT", r"SFT.*sft"),
        ({"name": "iq_learn", "alhpa": 1.0}, r"alhpa.*alpha"),
        ({"name": "sft", "gamma": 0.9}, r"sft.*gamma"),
        ({"name": "iq_learn", "coordinates": "valuehead"}, r"coordinates = 'valuehead'.*value_head"),
        ({"name": "iq_learn", "first_order": "expect"}, r"first_order = 'expect'.*expected"),
        ({"name": "iq_learn", "alpha": "much"}, r"alpha = 'much'.*number"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(make_trainer, objective, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(objective=objective)


def test_at_the_stores_p_the_sets_are_those_stored(make_trainer, tiny_teacher, tiny_prompt_files, tmp_path):
    """In 8 bits a first token of a mass just below p counts as p, and the set would be cut after it."""
    sampling = SamplingSettings(0.95, 16, max_new_tokens=14)
    store = support.capture_tiny(
        tiny_teacher, tiny_prompt_files["train"], tmp_path / "store", sampling, log_prob_bits=8
    )
    rows = [store[i] for i in range(len(store))]
    row = next(row for row in rows if (nested_sizes(row.sets, 0.95) < np.diff(row.sets.offsets)).any())
    for p in (0.95, None):
        batch = make_trainer(store=store, p=p)._train_collator([row])
        assert batch["offsets"].diff().tolist() == np.diff(row.sets.offsets).tolist() and not batch["dropped_N"].any()


def test_the_dev_split_may_be_rounded_where_training_must_not_be(
    make_trainer, tiny_teacher, tiny_prompt_files, tiny_stores, tmp_path
):
    rounded = support.capture_tiny(
        tiny_teacher, tiny_prompt_files["dev"], tmp_path / "dev", support.TINY_SAMPLING, log_prob_bits=8
    )
    objective = {"name": "reverse_kl", "source": "store"}
    trainer = make_trainer(dev=rounded, objective=objective)
    assert trainer.evaluate()["eval_kl_set_tail"] > 0
    with pytest.raises(ConfigError, match=r"needs log-probabilities of 16 bits, and the store .* has 8"):
        make_trainer(store=rounded, objective=objective)


def test_a_normaliser_that_the_off_support_term_does_not_have_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(IQLearn, "support", "vocabulary")
    with pytest.raises(
        ConfigError, match=r"needs the normaliser over its support 'vocabulary'.*Set off_support to tail"
    ):
        make_trainer(off_support="negatives")
    make_trainer(off_support="tail")


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_what_the_trainer_would_not_call_is_refused(load_start, tiny_stores, tiny_tokenizer, tmp_path, name):
    args = load_start(), settings(tmp_path), tiny_stores["train"], None, tiny_tokenizer
    with pytest.raises(ConfigError, match=f"{name} has no effect here"):
        TDistillTrainer(*args, **{name: print})


def test_p_beside_an_objective_that_reads_no_sets_is_warned_of(make_trainer, caplog):
    make_trainer(objective="iq_learn", p=0.5)
    make_trainer(objective="sft")
    assert not caplog.records
    make_trainer(objective="sft", p=0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "p = 0.5 has no effect: the objective 'sft' reads no action sets with these settings."
    ]


def test_an_unknown_kind_of_off_support_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"tial.*tail"):
        make_trainer(off_support="tial")


def test_an_unknown_kernel_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"referense.*reference"):
        make_trainer(kernel="referense")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(make_trainer, accumulation):
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].model.norm.weight.fill_(math.nan)

    trainer = make_trainer(callbacks=[Poison()], gradient_accumulation_steps=accumulation)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 3.*learning_rate"):
        trainer.train()
    assert isinstance(NonFiniteLossError("x"), TDistillError)
    assert trainer.state.global_step == 2


def test_weights_that_are_not_finite_are_not_saved(make_trainer):
    """A loss says so only at the next step, after the checkpoint."""

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kwargs["model"].model.norm.weight.grad.fill_(math.nan)

    trainer = make_trainer(callbacks=[Poison()], save_strategy="steps", save_steps=1, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLossError, match=r"norm.* is not finite after step 2.*learning_rate"):
        trainer.train()
    assert Path(last_checkpoint(trainer.args.output_dir)).name == "checkpoint-1"


def test_a_student_that_would_be_trained_in_bfloat16_is_refused(make_trainer, load_start):
    with pytest.raises(ConfigError, match=r"trained in torch\.bfloat16.*dtype='float32'"):
        make_trainer(model=load_start().bfloat16())
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make_trainer(model=load_start().bfloat16(), peft_config=adapter)


def test_gradients_of_shards_add_up_in_float32():
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(*[torch.bfloat16] * 3))
    keep_statistics_exact(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_values_are_in_float32_where_weights_are_cast(make_trainer, tiny_stores):
    trainer = make_trainer(dev=tiny_stores["dev"])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    disturb_value_head(trainer.model)
    stats, _ = trainer._statistics(trainer.model.bfloat16(), batch)
    assert stats.value_N.dtype == torch.float32 and float(stats.value_N.abs().max()) > 0
    assert not torch.equal(stats.value_N, stats.value_N.bfloat16().float())


def test_before_training_shards_are_not_evaluated(make_trainer, tiny_stores, monkeypatch):
    trainer = make_trainer(dev=tiny_stores["dev"])
    trainer.accelerator._models.clear()
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", property(lambda self: True))
    with pytest.raises(ConfigError, match=r"FSDP2.*eval_on_start"):
        trainer.evaluate()


@pytest.mark.parametrize("metric", ["mass_outside_set", "eval_agreement_top1"])
def test_a_best_metric_that_the_dev_store_has_not_is_refused_at_once(make_trainer, full_store, metric):
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 5}
    with pytest.raises(ConfigError, match=rf"'{metric}' is not measured.*eval_nll"):
        make_trainer(dev=full_store, save_strategy="steps", save_steps=5, **best)


# ---- plain text ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_text_adds_its_cross_entropy_per_token(make_trainer, load_start, tiny_tokenizer, accumulation):
    batches = [[0, 1, 2], [3, 4, 5, 6, 7, 8]]
    common = {
        **ONE_SGD_STEP,
        "objective": "sft",
        "batches": batches if accumulation == 2 else [batches[0] + batches[1]],
        "gradient_accumulation_steps": accumulation,
        "text_dataset": plain_texts(tiny_tokenizer),
        "text_sequences_per_batch": 3,
    }
    weight = 0.7
    with_text, without = make_trainer(text_weight=weight, **common), make_trainer(text_weight=0.0, **common)
    chosen = []
    for batch in common["batches"]:
        rows = with_text.data_collator([with_text.store[index] for index in batch])
        mask = rows["attention_mask"][len(batch) :].bool()
        chosen += [ids[keep] for ids, keep in zip(rows["input_ids"][len(batch) :], mask, strict=True)]
    assert len(chosen) == 3 * accumulation
    assert all(any(np.array_equal(ids.numpy(), text) for text in common["text_dataset"]) for ids in chosen)

    model = load_start()
    num_tokens = sum(len(ids) - 1 for ids in chosen)
    logits = [model(input_ids=ids[None]).logits[0, :-1] for ids in chosen]
    nll = nn.functional.cross_entropy(torch.cat(logits), torch.cat([ids[1:] for ids in chosen]), reduction="sum")
    (weight * nll / num_tokens).backward()
    plain = update(without)
    added = {name: change - plain[name] for name, change in update(with_text).items()}
    assert_same(added, {name: -value.grad for name, value in model.named_parameters()}, atol=2e-6)
    entry = with_text.state.log_history[0]
    assert entry["text_nll"] == pytest.approx(nll.item() / num_tokens, abs=1e-5)
    assert losses(with_text)[0] - losses(without)[0] == pytest.approx(weight * nll.item() / num_tokens, abs=1e-5)
    assert entry["response_tokens"] == without.state.log_history[0]["response_tokens"]


# ---- end to end, pinned ----


@pytest.mark.parametrize(("name", "factor"), [("sft", 5), ("default", 15)])
def test_the_pinned_run_brings_the_student_near_the_teacher_along_the_pinned_curve(tmp_path, name, factor):
    found = golden_training.run(golden_training.RUNS[name], tmp_path)
    assert found["after"]["eval_kl_set_tail"] * factor < found["before"]["eval_kl_set_tail"]
    # A change of the last bit of every weight moves these numbers by less than 1e-6.
    pinned = json.loads(golden_training.NUMBERS.read_text())[name]
    assert found["loss"] == pytest.approx(pinned["loss"], abs=1e-4)
    for when in ("before", "after"):
        assert found[when] == pytest.approx(pinned[when], abs=1e-4)
