"""Precision and checkpoints of a phase, where its arguments leave them open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.training_args
from cli.harness import recipe_tree, write_recipe
from training_support import settings
from transformers import TrainerCallback

from tdistill.config import load_recipe
from tdistill.errors import ConfigError, NoSpaceError
from tdistill.preflight import check_room, checkpoint_bytes
from tdistill.training import TDistillConfig, arguments
from tdistill.training.checkpoints import checkpoints_at_once
from tdistill.training.trainer import TDistillTrainer

# ---- precision ----


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets the arguments believe in a GPU, with bf16 or without."""

    def say(supported: bool) -> None:
        cuda = SimpleNamespace(
            is_available=lambda: True,
            is_bf16_supported=lambda including_emulation: supported and not including_emulation,
        )
        monkeypatch.setattr(arguments, "torch", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: supported)

    return say


@pytest.mark.parametrize(
    ("given", "supported", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"bf16": None}, True, True),
        ({"bf16": False}, True, False),
        ({"bf16": True}, True, True),
        ({"fp16": True}, True, False),
        ({"use_cpu": True}, True, False),
    ],
)
def test_bf16_is_chosen_only_where_it_is_left_open(tmp_path, on_gpu, given, supported, expected):
    on_gpu(supported)
    assert settings(tmp_path, **{"use_cpu": False, **given}).bf16 is expected


def test_kernels_of_liger_leave_the_objective_in_its_place(tmp_path):
    config = settings(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert config.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ConfigError, match="fused_linear_cross_entropy = true takes the place of the objective"):
        settings(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_arguments_are_read_from_a_command_line(tmp_path):
    parser = transformers.HfArgumentParser(TDistillConfig)
    common = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    (config,) = parser.parse_args_into_dataclasses([*common, "--p", "0.5", "--outside", "drop"])
    assert (config.objective, config.p, config.report_to) == ("iq_learn", 0.5, [])
    (config,) = parser.parse_args_into_dataclasses([*common, "--objective", '{"name": "iq_learn", "alpha": 10}'])
    assert config.build_objective().alpha == 10
    (config,) = parser.parse_args_into_dataclasses([*common, "--objective", "sft", "--off_support", "none"])
    assert config.build_objective().name == "sft"


def test_mappings_on_a_command_line_are_json_or_a_file_of_it(tmp_path):
    parser = transformers.HfArgumentParser(TDistillConfig)
    (tmp_path / "accelerator.json").write_text('{"non_blocking": true}')

    def parse(*words: str) -> TDistillConfig:
        return parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *words])[0]

    for given in ('{"non_blocking": true}', str(tmp_path / "accelerator.json")):
        config = parse("--accelerator_config", given).accelerator_config
        assert (config.non_blocking, config.even_batches) == (True, False)
    config = parse("--use_liger_kernel", "true", "--liger_kernel_config", '{"rope": false}')
    assert config.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    for given, reason in (("none.json", "neither JSON nor the path"), ("{rope: no}", "neither JSON nor the path")):
        with pytest.raises(ConfigError, match=f"accelerator_config = '{given}' is {reason}"):
            parse("--accelerator_config", given)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"list\.json' holds no mapping"):
        parse("--accelerator_config", str(tmp_path / "list.json"))


def test_without_a_gpu_bf16_is_off(tmp_path):
    assert settings(tmp_path).bf16 is False


def test_a_recipe_may_say_bf16_or_leave_it_open(tmp_path, on_gpu):
    on_gpu(True)
    tree = recipe_tree(Path("teacher"), {name: Path(name) for name in ("train", "dev", "held_out")}, tmp_path / "run")
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tree), ["phases.sft.args.bf16=false"])
    assert (recipe.arguments("sft", "x").bf16, recipe.arguments("bd", "x").bf16) == (False, True)
    assert load_recipe(tmp_path / "recipe.yaml", ["phases.sft.args.bf16=null"]).arguments("sft", "x").bf16 is True
    with pytest.raises(ConfigError, match=r"'bf16'.*given: 'half'"):
        load_recipe(tmp_path / "recipe.yaml", ["phases.sft.args.bf16=half"])


# ---- what nothing would read ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("average_tokens_across_devices", False),
        ("remove_unused_columns", True),
        ("label_names", ["labels"]),
        ("length_column_name", "width"),
        ("include_for_metrics", ["loss"]),
        ("batch_eval_metrics", True),
        ("eval_do_concat_batches", False),
        ("eval_use_gather_object", True),
        ("include_num_input_tokens_seen", "all"),
    ],
)
def test_an_argument_that_nothing_would_read_is_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"{name} = .* has no effect here: .*Leave it out"):
        settings(tmp_path, **{name: value})


def test_arguments_may_be_copied(tmp_path):
    config = settings(tmp_path, objective="sft", include_num_input_tokens_seen=False)
    assert replace(config, seed=3).to_dict() == {**config.to_dict(), "seed": 3}


# ---- checkpoints ----


class _Seen(TrainerCallback):
    """Steps at which a checkpoint was written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({"max_steps": 20}, [*range(2, 21, 2)]),
        ({"max_steps": 23}, [*range(3, 22, 3), 23]),
        ({"max_steps": 3}, [1, 2, 3]),
        ({"max_steps": 1}, [1]),
        ({"max_steps": 6, "save_steps": 4}, [4, 6]),
        ({"max_steps": 6, "save_steps": 0.5}, [3, 6]),
        ({"max_steps": 6, **BEST, "eval_steps": 3}, [3, 6]),
        ({"max_steps": 6, **BEST, "eval_steps": 0.5}, [3, 6]),
        ({"max_steps": 6, **BEST, "logging_steps": 2}, [2, 4, 6]),
        ({"max_steps": 6, **BEST, "eval_steps": 2, "save_steps": 4}, [4, 6]),
        ({"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}, [*range(1, 7)]),
    ],
)
def test_checkpoints_are_written_at_evaluations_or_at_each_tenth(
    load_start, tiny_stores, tiny_tokenizer, tmp_path, given, saved
):
    seen, args = _Seen(), settings(tmp_path, objective="sft", **{"save_strategy": "steps", **given})
    stores = tiny_stores["train"], tiny_stores["dev"]
    trainer = TDistillTrainer(load_start(), args, *stores, tiny_tokenizer, callbacks=[seen])
    trainer.train()
    assert seen.steps == saved
    assert len(list(tmp_path.glob("checkpoint-*"))) == min(2, len(saved))


@pytest.mark.parametrize(
    ("metric", "greater"),
    [(None, False), ("eval_kl_set_tail", False), ("nll", False), ("agreement_top1", True)],
)
def test_what_is_better_follows_from_the_metric(tmp_path, metric, greater):
    assert settings(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    with pytest.raises(ConfigError, match=f"greater_is_better = {not greater} would keep the worst"):
        settings(tmp_path, metric_for_best_model=metric, greater_is_better=not greater)


def test_a_metric_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"metric_for_best_model = 'eval_loss' is not measured.*nll"):
        settings(tmp_path, metric_for_best_model="eval_loss")


def test_the_best_checkpoint_may_be_the_only_one_that_is_written(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "best"}
    assert settings(tmp_path, eval_strategy="steps", eval_steps=2, **best).load_best_model_at_end
    with pytest.raises(ConfigError, match="they are no and best"):
        settings(tmp_path, **best)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({"save_strategy": "no"}, 0),
        ({"max_steps": 20}, 3),  # two, and the one being written
        ({"max_steps": 2}, 2),
        ({"max_steps": 20, "save_total_limit": None}, 10),
        ({"max_steps": 20, "save_total_limit": None, "save_steps": 3}, 7),
        ({"max_steps": 20, "save_total_limit": 1}, 2),
        ({"max_steps": 20, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 10}, 3),
        ({"max_steps": 20, "save_total_limit": 7}, 8),
        ({"max_steps": 4, "save_total_limit": None, "save_strategy": "best", "eval_strategy": "steps"}, 4),
    ],
)
def test_the_checkpoints_that_need_room_are_counted(tiny_stores, tmp_path, given, number):
    args = settings(tmp_path, **{"save_strategy": "steps", **given})
    assert checkpoints_at_once(args, tiny_stores["train"]) == number


def test_the_checkpoints_of_epochs_are_those_that_training_leaves(load_start, tiny_stores, tiny_tokenizer, tmp_path):
    for strategy, expected in (("epoch", 3), ("steps", 4)):  # 4 steps are an epoch
        args = settings(
            tmp_path / strategy,
            objective="sft",
            max_steps=-1,
            num_train_epochs=2.5,
            save_strategy=strategy,
            save_steps=3,
            save_total_limit=None,
            response_tokens_per_batch=256,
        )
        trainer = TDistillTrainer(load_start(), args, tiny_stores["train"], None, tiny_tokenizer)
        trainer.train()
        left = len(list((tmp_path / strategy).glob("checkpoint-*")))
        assert checkpoints_at_once(args, tiny_stores["train"]) == left == expected


SLOW = {"name": "sqil", "target": "slow", "student_weight": 0.0}


def lora(rank: int) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])


@pytest.mark.parametrize(
    ("given", "adapter"),
    [({}, False), ({"save_only_model": True}, False), ({}, True), ({"objective": SLOW}, False)],
    ids=["all weights", "weights alone", "adapter", "slow copy"],
)
def test_a_checkpoint_takes_the_room_that_is_asked_for(
    load_start, tiny_stores, tiny_tokenizer, tmp_path, monkeypatch, given, adapter
):
    """With room for that and the finished weights training may begin, with a little less not, unless it goes on."""
    args = settings(tmp_path, **{"max_steps": 1, "save_strategy": "steps", "save_steps": 1, **given})
    trainer = TDistillTrainer(
        load_start(), args, tiny_stores["train"], None, tiny_tokenizer, peft_config=lora(32) if adapter else None
    )
    weights = sum(parameter.numel() * 4 for parameter in trainer.model.parameters())
    asked = checkpoint_bytes(trainer)

    def with_free(room: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=room))
        check_room(tmp_path, trainer, 1)

    with_free(asked + weights)
    with pytest.raises(NoSpaceError, match=r"checkpoints; .* GB are free"):
        with_free(asked + weights - 1)
    trainer.train()
    files = list((tmp_path / "checkpoint-1").iterdir())
    tensors = sum(file.stat().st_size for file in files if file.name == "optimizer.pt" or file.suffix == ".safetensors")
    assert asked == pytest.approx(tensors, rel=0.1)
    with_free(int(weights + 0.1 * asked))
