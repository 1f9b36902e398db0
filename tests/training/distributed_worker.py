"""One of two processes: ``torchrun --nproc_per_node=2 distributed_worker.py FOLDER``, FOLDER as the test lays it out.

Writes, per case and rank, what training added to the parameters, the log and how often the wrapper was called.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import support
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from training_support import (
    ONE_SGD_STEP,
    PARTS,
    Crash,
    FixedBatchTrainer,
    disturb_value_head,
    plain_texts,
    settings,
    untie,
    update,
    without_clock,
)
from transformers import TrainerCallback

from tdistill.objectives import IQLearn
from tdistill.store import Store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_tokenizer
from tdistill.training.checks import keep_statistics_exact
from tdistill.training.collate import STATS_FIELDS, PackedCollator
from tdistill.training.rollouts import Rollouts, RolloutSettings
from tdistill.training.student import add_value_head, attach_statistics
from tdistill.training.trainer import TDistillTrainer, last_checkpoint
from tdistill.types import ActionStats, PromptTokens

torch.set_num_threads(1)


class CountCalls(TrainerCallback):
    """Counts the calls of the distributed wrapper."""

    def __init__(self) -> None:
        self.calls, self.wrapper, self.trainer = 0, "", None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrapped = self.trainer.model_wrapped
        self.wrapper = type(wrapped).__name__
        wrapped.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


def shard(model: Any, precision: str) -> Any:
    """FSDP2 in the groups that accelerate makes; itself it runs FSDP on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
        keep_statistics_exact(plugin)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=precision,
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["shards"]),
        torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shards",)),
    )
    return fsdp2_prepare_model(accelerator, model)


def main(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "start")
    stores = {split: Store.open(folder / split) for split in ("train", "dev")}
    result = folder / "results"

    def make(
        case: str, batches: Any = None, callbacks: Any = (), texts: Any = None, rollouts: Any = None, **changes: Any
    ) -> Any:
        cls = TDistillTrainer if batches is None else type("Trainer", (FixedBatchTrainer,), {"batches": batches})
        args = settings(folder / "out" / case, ddp_backend="gloo", **changes)
        model = load_causal_lm(folder / "start", dtype="float32")
        return cls(
            model,
            args,
            stores["train"],
            stores["dev"],
            tokenizer,
            text_dataset=texts,
            rollouts=rollouts,
            callbacks=list(callbacks),
        )

    def write(case: str, tensors: dict[str, torch.Tensor], **facts: Any) -> None:
        rank = dist.get_rank()
        save_file({name: value.contiguous() for name, value in tensors.items()}, result / f"{case}-{rank}.safetensors")
        (result / f"{case}-{rank}.json").write_text(json.dumps(facts))

    for objective in ("sft", "iq_learn"):
        counter = CountCalls()
        trainer = make(
            objective,
            PARTS,
            [counter],
            plain_texts(tokenizer),
            objective=objective,
            off_support="tail",
            p=0.7,
            gradient_accumulation_steps=2,
            **ONE_SGD_STEP,
        )
        counter.trainer = trainer
        if objective == "iq_learn":
            disturb_value_head(trainer.model)
        change = update(trainer)
        write(objective, change, log=trainer.state.log_history, calls=counter.calls, wrapper=counter.wrapper)

    common: dict[str, Any] = {"off_support": "tail", "p": 0.9, "eval_strategy": "steps", "eval_steps": 4}
    common |= {"save_strategy": "steps", "save_steps": 4}
    whole = make("whole", **common)
    write("whole", update(whole), log=without_clock(whole.state.log_history), tokens=whole.state.num_input_tokens_seen)
    try:
        make("killed", callbacks=[Crash(6)], **common).train()
    except KeyboardInterrupt:
        dist.barrier()
    resumed = make("killed", **common)
    before = {name: value.detach().clone() for name, value in resumed.model.named_parameters()}
    checkpoint = last_checkpoint(folder / "out" / "killed")
    resumed.train(resume_from_checkpoint=checkpoint)
    write(
        "resumed",
        {name: value.detach() - before[name] for name, value in resumed.model.named_parameters()},
        log=without_clock(resumed.state.log_history),
        tokens=resumed.state.num_input_tokens_seen,
        checkpoint=Path(checkpoint).name,
    )

    teacher = HFTeacher.from_pretrained(str(folder / "teacher"), dtype="float32")
    rows = [stores["train"][row] for row in range(20)]
    prompts = [PromptTokens(row.prompt_id, row.prompt_ids) for row in rows]
    rounds = Rollouts(RolloutSettings(every=2, prompts_per_round=9), prompts, lambda: teacher, support.TINY_SAMPLING)
    mixture = {"name": "iq_learn", "student_value_weight": 0.5}
    trainer = make("rollouts", rollouts=rounds, objective=mixture, **{**common, "max_steps": 3})
    write("rollouts", update(trainer), log=without_clock(trainer.state.log_history))

    for precision, tied in (("no", True), ("no", False), ("bf16", True)):
        model = load_causal_lm(folder / "start", dtype="float32")
        if not tied:
            untie(model)
        add_value_head(model)
        disturb_value_head(model)
        attach_statistics(model, support=None)
        model = shard(model, precision).train()
        inputs = PackedCollator(tokenizer.pad_token_id)([stores["train"][row] for row in PARTS[dist.get_rank()]])
        outputs = model(**inputs)
        stats = ActionStats(**{name: inputs[name] for name in STATS_FIELDS}, **outputs)
        IQLearn()(stats).loss.backward()
        facts = {
            "local": sum(value.to_local().numel() for value in model.parameters()),
            "total": sum(value.numel() for value in model.parameters()),
            "dtype": str(outputs["q_M"].dtype),
            "q_M": outputs["q_M"].tolist(),
        }
        gradients = {name: value.grad.full_tensor() for name, value in model.named_parameters()}
        write(f"sharded-{precision}-{tied}", gradients, **facts)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
