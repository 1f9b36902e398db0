"""Two processes on one machine against one process with the same global batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_support import (
    ONE_SGD_STEP,
    PARTS,
    FixedBatchTrainer,
    assert_same,
    disturb_value_head,
    plain_texts,
    settings,
    untie,
    update,
    without_clock,
)

from tdistill.objectives import IQLearn
from tdistill.store import Store
from tdistill.teachers.loading import load_causal_lm
from tdistill.training.collate import STATS_FIELDS, PackedCollator
from tdistill.training.student import add_value_head, attach_statistics
from tdistill.training.trainer import TDistillTrainer
from tdistill.types import ActionStats

pytestmark = pytest.mark.slow

Result = Callable[[str, int], tuple[dict[str, torch.Tensor], dict[str, Any]]]


@pytest.fixture(scope="module")
def worker_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def result(worker_folder, tiny_start_folder, tiny_teacher_folder, tiny_stores) -> Result:
    """Tensors and facts that a rank wrote for a case."""
    folder = worker_folder
    shutil.copytree(tiny_start_folder, folder / "start")
    shutil.copytree(tiny_teacher_folder, folder / "teacher")
    for split in ("train", "dev"):
        shutil.copytree(tiny_stores[split].path, folder / split)
    (folder / "results").mkdir()
    worker = Path(__file__).with_name("distributed_worker.py")
    paths = [str(worker.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, folder]
    run = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-9000:]

    def read(case: str, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        file = folder / "results" / f"{case}-{rank}"
        return load_file(f"{file}.safetensors"), json.loads(Path(f"{file}.json").read_text())

    return read


@pytest.mark.parametrize("objective", ["sft", "iq_learn"])
def test_two_processes_make_the_update_of_one(result, load_start, tiny_stores, tiny_tokenizer, tmp_path, objective):
    trainer = type("Trainer", (FixedBatchTrainer,), {"batches": PARTS})(
        load_start(),
        settings(
            tmp_path, objective=objective, off_support="tail", p=0.7, gradient_accumulation_steps=4, **ONE_SGD_STEP
        ),
        tiny_stores["train"],
        None,
        tiny_tokenizer,
        text_dataset=plain_texts(tiny_tokenizer),
    )
    if objective == "iq_learn":
        disturb_value_head(trainer.model)
    expected = update(trainer)
    (entry, *_) = without_clock(trainer.state.log_history)
    for rank in (0, 1):
        found, facts = result(objective, rank)
        assert_same(found, expected, atol=1e-6)
        (logged, *_) = without_clock(facts["log"])
        assert logged == pytest.approx(entry, abs=1e-5)
        assert (facts["wrapper"], facts["calls"]) == ("DistributedDataParallel", 2)


def test_a_run_on_two_processes_follows_one_that_accumulates_their_batches(
    result, load_start, tiny_stores, tiny_tokenizer, tmp_path
):
    args = settings(
        tmp_path, off_support="tail", p=0.9, eval_strategy="steps", eval_steps=4, gradient_accumulation_steps=2
    )
    trainer = TDistillTrainer(load_start(), args, tiny_stores["train"], tiny_stores["dev"], tiny_tokenizer)
    trainer.train()
    (_, first), (_, second) = result("whole", 0), result("whole", 1)
    expected = without_clock(trainer.state.log_history)
    assert first["tokens"] == second["tokens"] == trainer.state.num_input_tokens_seen
    assert len(first["log"]) == len(expected)
    for found, entry in zip(first["log"], expected, strict=True):
        assert found == pytest.approx(entry, rel=1e-3, abs=1e-4)


def test_both_processes_end_with_the_same_weights(result):
    (one, _), (two, _) = result("whole", 0), result("whole", 1)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_on_two_processes_ends_like_an_uninterrupted_one(result):
    for rank in (0, 1):
        (whole, whole_facts), (resumed, facts) = result("whole", rank), result("resumed", rank)
        assert facts.pop("checkpoint") == "checkpoint-4"
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert facts == whole_facts


def test_each_process_has_its_part_of_the_students_answers(result, worker_folder):
    (one, _), (two, facts) = result("rollouts", 0), result("rollouts", 1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(0 < entry["student_share"] < 1 for entry in facts["log"] if "loss" in entry)
    for number in (0, 1):
        parts = [
            Store.open(worker_folder / "out" / "rollouts" / "rollouts" / f"round-0000{number}" / f"rank-{rank}")
            for rank in (0, 1)
        ]
        assert [len(part) for part in parts] == [5, 4]
        assert not set(parts[0].jobs) & set(parts[1].jobs)


def whole(folder: Path, stores: Any, tokenizer: Any, tied: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gradients of one process, and the logits of the sets of both parts."""
    model = load_causal_lm(folder, dtype="float32")
    if not tied:
        untie(model)
    add_value_head(model)
    disturb_value_head(model)
    attach_statistics(model, support=None)
    model.train()
    logits = []
    for part in PARTS[:2]:
        inputs = PackedCollator(tokenizer.pad_token_id)([stores["train"][row] for row in part])
        outputs = model(**inputs)
        stats = ActionStats(**{name: inputs[name] for name in STATS_FIELDS}, **outputs)
        (IQLearn()(stats).loss / 2).backward()
        logits.append(outputs["q_M"].detach())
    return {name: value.grad for name, value in model.named_parameters()}, logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_fully_sharded_student_has_the_gradients_of_a_whole_one(
    result, tiny_start_folder, tiny_stores, tiny_tokenizer, tied
):
    """FSDP2 in accelerate's groups: the head, which has a group with the last norm, is whole where it is read."""
    expected, _ = whole(tiny_start_folder, tiny_stores, tiny_tokenizer, tied)
    shards = []
    for rank in (0, 1):
        found, facts = result(f"sharded-no-{tied}", rank)
        assert_same(found, expected, atol=1e-4)
        shards.append(facts["local"])
    assert sum(shards) == facts["total"]
    assert max(shards) < 0.6 * facts["total"]


def test_statistics_of_a_sharded_student_are_not_rounded_to_bfloat16(
    result, tiny_start_folder, tiny_stores, tiny_tokenizer
):
    _, logits = whole(tiny_start_folder, tiny_stores, tiny_tokenizer, tied=True)
    for rank in (0, 1):
        _, facts = result("sharded-bf16-True", rank)
        assert facts["dtype"] == "torch.float32"
        found = torch.tensor(facts["q_M"])
        assert (found.bfloat16().float() != found).float().mean() > 0.9
        torch.testing.assert_close(found, logits[rank], rtol=0.05, atol=0.3)  # weights and activations in bfloat16
