"""Training against a teacher in memory: what is compared, what is refused, and that the teacher stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import support
import torch
from training_support import ONE_SGD_STEP, losses, parameters, settings, update
from transformers import AutoModelForCausalLM

from tdistill.errors import ConfigError, StoreError
from tdistill.teachers.base import SamplingSettings
from tdistill.training import Rollouts, RolloutSettings, TDistillTrainer

LIVE_KL = {"name": "forward_kl", "source": "teacher"}


@pytest.fixture
def train(load_start, tiny_stores, tiny_tokenizer, tiny_teacher, tiny_prompt_files, tmp_path):
    prompts = support.tiny_prompts(tiny_teacher, tiny_prompt_files["train"], support.TINY_SAMPLING)

    def start(
        output: str = "out",
        teacher: Any = None,
        rollouts: dict[str, Any] | None = None,
        sampling: SamplingSettings = support.TINY_SAMPLING,
        padding_rows: int = 0,
        **changes: Any,
    ):
        student = load_start()
        if padding_rows:
            student.resize_token_embeddings(len(tiny_tokenizer) + padding_rows, mean_resizing=False)
        rounds = None
        if rollouts is not None:
            chosen = RolloutSettings(**{"every": 2, "prompts_per_round": 8, "batch_size": 4, "share": 1.0, **rollouts})
            rounds = Rollouts(chosen, prompts, lambda: tiny_teacher, sampling)
        return TDistillTrainer(
            student,
            settings(tmp_path / output, **changes),
            tiny_stores["train"],
            tiny_stores["dev"],
            tiny_tokenizer,
            rollouts=rounds,
            teacher=teacher,
        )

    return start


def test_the_loss_is_the_divergence_of_the_models_own_logits(train, tiny_teacher, load_start, tiny_stores):
    """First step, one micro-batch: token by token from plain forward passes of both models."""
    trainer = train(teacher=tiny_teacher.model, objective=LIVE_KL, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    total, count = 0.0, 0
    start = load_start()
    for b, mask in enumerate(batch["attention_mask"]):
        ids = batch["input_ids"][b, : int(mask.sum())][None]
        with torch.no_grad():
            log_p, log_q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (tiny_teacher.model, start))
        rows = batch["sequence_N"] == b
        places = batch["position_index_N"][rows & batch["has_action_N"]] - b * batch["input_ids"].shape[1]
        total += float((log_p.exp() * (log_p - log_q))[places].sum())
        count += len(places)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-4)


def test_many_draws_from_the_teacher_make_the_step_of_the_dense_divergence(
    train, tiny_teacher, load_start, tiny_stores
):
    """The loss within four standard errors of the draws, which plain forward passes give, and the update near it."""
    num_samples, updates, found = 10_000, [], []
    for objective in (LIVE_KL, {"name": "sampled_kl", "num_samples": num_samples}):
        trainer = train(teacher=tiny_teacher.model, objective=objective, **ONE_SGD_STEP)
        batch = next(iter(trainer.get_train_dataloader()))
        updates.append(torch.cat([change.flatten() for change in update(trainer).values()]))
        found += losses(trainer)
    models, variance, count = (tiny_teacher.model, load_start()), 0.0, int(batch["has_action_N"].sum())
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        places = batch["position_index_N"][batch["has_action_N"]]
        log_p, log_q = (m(**inputs).logits.flatten(0, 1)[places].double().log_softmax(-1) for m in models)
    for row, other in zip(log_p, log_q, strict=True):
        kl = float((row.exp() * (row - other)).sum())
        variance += float((row.exp() * (row - other - kl).square()).sum()) / num_samples
    error = variance**0.5 / count
    assert 0 < abs(found[1] - found[0]) < 4 * error < 0.02 * found[0]
    assert float((updates[1] - updates[0]).norm()) < 0.05 * float(updates[0].norm())


def test_the_teacher_is_not_trained_and_the_student_gets_closer(train, tiny_teacher):
    before = parameters(tiny_teacher.model)
    trainer = train(teacher=tiny_teacher.model, objective=LIVE_KL, max_steps=12)
    kl = trainer.evaluate()["eval_kl_set_tail"]
    trainer.train()
    assert trainer.evaluate()["eval_kl_set_tail"] < 0.8 * kl
    for name, weight in parameters(tiny_teacher.model).items():
        assert torch.equal(weight, before[name]), name


def test_a_teacher_that_is_partly_on_the_disk_stays_there(train, tiny_teacher, tiny_teacher_folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    teacher = AutoModelForCausalLM.from_pretrained(
        tiny_teacher_folder, device_map=places, offload_folder=tmp_path / "weights", dtype=torch.float32
    )
    first = []
    for model in (tiny_teacher.model, teacher):
        trainer = train(teacher=model, objective=LIVE_KL, max_steps=1)
        trainer.train()
        first += losses(trainer)
    assert {weight.device.type for weight in teacher.parameters()} == {"cpu", "meta"}
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_from_the_store_the_loss_is_a_lower_bound_of_that_with_the_teacher(train, tiny_teacher):
    first = {}
    for source in ("store", "teacher"):
        trainer = train(source, tiny_teacher.model, objective={"name": "forward_kl", "source": source}, max_steps=1)
        trainer.train()
        first[source] = losses(trainer)[0]
    assert 0.5 * first["teacher"] < first["store"] < first["teacher"]


def test_no_off_support_term_is_added(train):
    trainer = train(objective="forward_kl", max_steps=1)
    trainer.train()
    assert not any("off_support" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("objective", [LIVE_KL, {"name": "minillm", "source": "teacher"}], ids=str)
def test_without_a_teacher_it_is_refused_at_once(train, objective):
    with pytest.raises(ConfigError, match="compares whole distributions; give the trainer `teacher`"):
        train(objective=objective, rollouts={})


def test_gkd_with_the_students_own_answers(train, tiny_teacher):
    trainer = train(
        teacher=tiny_teacher.model,
        objective={"name": "gkd", "source": "teacher"},
        rollouts={"share": 0.5, "prompts_per_round": 24},
        max_steps=8,
    )
    kl = trainer.evaluate()["eval_kl_set_tail"]
    trainer.train()
    assert trainer.evaluate()["eval_kl_set_tail"] < kl


@pytest.mark.parametrize("source", ["store", "teacher"])
def test_minillm_lowers_the_reverse_kl_on_the_students_answers(train, tiny_teacher, source):
    trainer = train(
        teacher=tiny_teacher.model,
        objective={"name": "minillm", "source": source},
        rollouts={"teacher_mix": 0.2, "prompts_per_round": 48},
        max_steps=16,
    )
    trainer.train()
    curve = [entry["reverse_kl_student"] for entry in trainer.state.log_history if "reverse_kl_student" in entry]
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])


def test_rows_that_pad_the_vocabulary_are_in_no_importance_weight(train, tiny_teacher):
    """Before the first update the student is the policy that sampled: each weight is 1, padding or none."""
    trainer = train(
        teacher=tiny_teacher.model,
        objective={"name": "minillm", "source": "teacher"},
        rollouts={"every": 1, "replay": 0.0},
        max_steps=1,
        padding_rows=64,
    )
    trainer.train()
    (first,) = (entry for entry in trainer.state.log_history if "importance_weight" in entry)
    assert first["importance_weight"] == pytest.approx(1.0, abs=1e-4)


def test_minillm_refuses_truncated_sampling(train):
    with pytest.raises(ConfigError, match=r"set rollouts\.temperature and rollouts\.top_p to 1"):
        train(objective="minillm", rollouts={"top_p": 0.9})


def test_minillm_refuses_a_store_without_probabilities(train, tiny_teacher):
    with pytest.raises(
        ConfigError, match="reads the teacher's probability of each token of the student's answers, which is not kept"
    ):
        train(
            teacher=tiny_teacher.model,
            objective={"name": "minillm", "source": "teacher"},
            rollouts={},
            sampling=SamplingSettings(1.0, None, max_new_tokens=16),
        )


def test_a_round_without_its_probabilities_is_not_whole(train, tiny_teacher, tmp_path):
    """Killed between the two files, and started at a step in the middle of the round."""
    trainer = train(objective="minillm", rollouts={"every": 4}, max_steps=1)
    trainer.train()
    (kept,) = tmp_path.glob("out/rollouts/round-00000/*-log-probs.safetensors")
    kept.unlink()
    again = train(objective="minillm", rollouts={"every": 4}, max_steps=1)
    with pytest.raises(StoreError, match="Step 1 needs the student's answers"):
        again.rollouts.prepare(1, again.model, again.processing_class, tmp_path / "out")
