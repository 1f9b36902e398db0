"""TDistillTrainer: transformers.Trainer over a store of trajectories, with no teacher in the process."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tdistill.errors import ConfigError, NonFiniteLossError, ProbabilityRangeError, RunFolderError
from tdistill.head import check_head
from tdistill.kernels.dispatch import Support
from tdistill.objectives import Objective, OffSupport, check_full_support
from tdistill.prompts import check_same_tokenizer, check_vocabulary, num_token_ids
from tdistill.store import Store
from tdistill.training.arguments import TDistillConfig
from tdistill.training.batches import TokenBudgetSampler
from tdistill.training.checks import (
    check_finite_weights,
    check_precision,
    check_rollouts,
    check_whole,
    keep_statistics_exact,
)
from tdistill.training.collate import STATS_FIELDS, PackedCollator, PlainText
from tdistill.training.metrics import MeanMeter, set_tail_kl
from tdistill.training.rollouts import Rollouts, check_log_probs_sampled
from tdistill.training.slow_copy import SlowCopy
from tdistill.training.student import VALUE_HEAD, LiveTeacher, add_adapter, add_value_head, attach_statistics
from tdistill.types import ActionStats

_log = logging.getLogger(__name__)
# Arguments of transformers.Trainer that nothing would read, and what stands in their place.
_WITHOUT_EFFECT = {
    "compute_loss_func": "the objective is the loss; write one (docs/adding-an-objective.md)",
    "compute_metrics": "the dev split's measures are those of evaluate(); override it",
    "preprocess_logits_for_metrics": "no logits are kept",
}


class _EpochCallback(TrainerCallback):
    """Tells the sampler its epoch; the wrappers that accelerate puts around it do not always pass it on."""

    def __init__(self, sampler: TokenBudgetSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _Progress(ProgressCallback):
    """A bar of steps with time left, loss and tokens per second, instead of a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {"loss": "loss", "tokens_per_second": "tok/s", "eval_kl_set_tail": "dev KL"}
        if self.training_bar is not None:
            self.training_bar.set_postfix({shown[key]: f"{logs[key]:.4g}" for key in shown if key in logs})


class TDistillTrainer(Trainer):
    """Train a student on stored trajectories with an objective on action statistics.

    Args:
        model: student, a causal language model of transformers. Its forward is extended in place.
        args: see :class:`TDistillConfig`.
        train_dataset: store to train on.
        eval_dataset: store of the dev split, or None.
        processing_class: the tokenizer; must be the store's. None leaves that unchecked; rollouts need it.
        peft_config: adapter to train instead of all weights, or None.
        text_dataset: token sequences of plain text for the language-modelling term, or None.
        rollouts: the student's own answers to mix in, or None.
        teacher: the model that the store was captured from, for objectives that need it in memory; others leave it out.
        **kwargs: passed to transformers.Trainer (callbacks, optimizers, …).
    Raises:
        ProbabilityRangeError: p above the store's p_max.
        TokenizerMismatchError: tokenizer or vocabulary differ from the store's.
        UnsupportedModelError: the model's head is not a plain linear layer.
        ConfigError: the objective needs rollouts and there are none, or takes none, or a way of training that they do
            not work with; weights or sequences in parts that are not put together (ZeRO-3, context parallelism); an
            argument of transformers.Trainer that nothing would read.
    """

    args: TDistillConfig
    objective: Objective
    off_support: OffSupport
    support: Support | None

    def __init__(
        self,
        model: PreTrainedModel,
        args: TDistillConfig,
        train_dataset: Store,
        eval_dataset: Store | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        text_dataset: Sequence[np.ndarray] | None = None,
        rollouts: Rollouts | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective, self.off_support = args.build_objective(), args.build_off_support()
        self.store, self.meter, self.rollouts = train_dataset, MeanMeter(), rollouts
        for name, instead in _WITHOUT_EFFECT.items():
            if kwargs.get(name) is not None:
                raise ConfigError(f"{name} has no effect here: {instead}. Leave it out.")
        for name in ("p", "p_budget_nats"):
            if getattr(args, name) is not None and not self.objective.uses_sets:
                _log.warning(
                    "%s = %s has no effect: the objective '%s' reads no action sets with these settings.",
                    *(name, getattr(args, name), self.objective.name),
                )
        if self.objective.needs_rollouts and rollouts is None:
            raise ConfigError(
                f"The objective '{self.objective.name}' with these settings learns from the student's own answers; "
                "give the phase `rollouts`."
            )
        if rollouts is not None and not self.objective.takes_rollouts:
            raise ConfigError(
                f"The objective '{self.objective.name}' would imitate the student's own answers; leave rollouts out, "
                "or take an objective that compares the student with the teacher there, such as gkd."
            )
        if rollouts is not None and processing_class is None:
            raise ConfigError("Rollouts are written with the tokenizer; give the trainer processing_class.")
        if rollouts is not None and rollouts.settings.seed is None:
            rollouts.seed = args.seed
        if self.objective.needs_log_probs_sampled:
            assert rollouts is not None
            check_log_probs_sampled(self.objective.name, rollouts.settings, rollouts.sampling)
            rollouts.keeps_log_probs = True
        if self.objective.needs_teacher and teacher is None:
            raise ConfigError(
                f"The objective '{self.objective.name}' with these settings compares whole distributions; give the "
                "trainer `teacher`, or set source to store."
            )
        check_whole(args.parallelism_config)
        for name, store in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if store is None:
                continue
            if not isinstance(store, Store):
                raise ConfigError(
                    f"{name} must be a store and is a {type(store).__name__}. Open one: Store.open(folder)."
                )
            self._check_store(store, args, processing_class, model)
        if rollouts is not None:
            check_rollouts(rollouts.sampling, train_dataset, args.p)
        self.full_support = self.objective.uses_sets and train_dataset.p_max == 1.0
        self.uses_off_support = self.objective.uses_off_support and self.off_support.kind != "none"
        if self.full_support and self.uses_off_support:
            raise ConfigError("off_support has nothing to act on at p = 1; set it to none.")
        self.support = "vocabulary" if self.full_support else self.objective.support
        if self.uses_off_support:
            wanted = self.off_support.support
            if self.objective.support not in (None, wanted):
                raise ConfigError(
                    f"The objective '{self.objective.name}' needs the normaliser over its support "
                    f"'{self.objective.support}', and off_support = {args.off_support} has that over '{wanted}'. Set "
                    f"off_support to {'tail' if self.objective.support == 'vocabulary' else 'none'}."
                )
            self.support = wanted
        if self.full_support:
            check_full_support(self.objective)
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        if eval_dataset is not None and eval_dataset.p_max == 1.0 and best != "nll":
            if best != "kl_set_tail" and args.load_best_model_at_end:
                raise ConfigError(
                    f"metric_for_best_model = '{args.metric_for_best_model}' is not measured on {eval_dataset.path}, "
                    "which was captured at p_max = 1 and keeps no action sets. Use eval_nll."
                )
            args.metric_for_best_model = "eval_nll"  # the default is of sets

        if self.objective.needs_value_head and not hasattr(model, VALUE_HEAD):
            add_value_head(model)
        self.teacher = self._live_teacher(teacher, processing_class)
        attach_statistics(
            model,
            # With a teacher in memory the dense kernel gives the normaliser too.
            support=None if self.teacher else self.support,
            q_max=self.objective.needs_q_max,
            kernel=args.kernel,
            teacher=self.teacher,
        )
        self._vocab_size = model.get_output_embeddings().weight.shape[0]
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        self.slow_copy = SlowCopy(model, args.slow_copy_rate) if self.objective.needs_target else None
        text = PlainText(text_dataset, args.text_sequences_per_batch) if text_dataset is not None else None
        pad = getattr(processing_class, "pad_token_id", None) or 0
        # At the store's p the sets are those stored: their rounded masses would cut some of them shorter.
        p = args.p if self.objective.uses_sets and args.p != train_dataset.p_max else None
        self._eval_collator = PackedCollator(pad)
        self._eval_loaders: dict[int, DataLoader] = {}
        budget = None
        if self.objective.uses_sets and args.p_budget_nats is not None:
            budget = (args.p_budget_nats, args.p_budget_gamma)
        scored = None
        if rollouts is not None and rollouts.sampling.p_max < 1.0:
            scored = (rollouts.sampling.p_max, rollouts.sampling.max_actions)
        self._train_collator = PackedCollator(pad, p, budget, text, args.seed, args.outside == "keep", scored)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=self._train_collator,
            **kwargs,
        )
        check_whole(getattr(self.accelerator, "parallelism_config", None))  # which may come from the launcher
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # these keep weights in float32 beside
            check_precision(model)
        if eval_dataset is not None:
            self._sampler(eval_dataset, seed=None)  # which refuses a store that is too small for the processes
        if self.args.n_gpu > 1:
            raise ConfigError("DataParallel is not supported; start with `accelerate launch` or `torchrun`.")
        if (self.slow_copy or rollouts) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError("Rollouts and slow copies need whole weights in each process; train without sharding.")
        if self.is_fsdp_enabled:
            keep_statistics_exact(self.accelerator.state.fsdp_plugin)
        if self.teacher is not None:
            live: Any = self.teacher.model
            # What a device map has spread, perhaps over the disk too, stays where it is.
            places = set((getattr(live, "hf_device_map", None) or {}).values())
            if len(places) <= 1 and live.device != self.args.device:
                live.to(self.args.device)
        if self.slow_copy is not None:
            self.slow_copy.model.to(self.args.device)
            self.add_callback(self.slow_copy)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress)
        # Losses are sums divided here by the tokens of the whole step, so the Trainer must not divide again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self._logged_at, self._tokens_since = time.perf_counter(), 0

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches by response tokens; the order is a function of (seed, epoch) alone."""
        sampler = self._sampler(self.store, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        self.add_callback(_EpochCallback(sampler))
        # With rollouts, which trajectories a micro-batch holds is known only at its step.
        return self._loader(self.store, sampler, self._train_collator if self.rollouts is None else list)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Micro-batches of one optimizer step, and their tokens."""
        samples, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rollouts is None or not samples:
            return samples, counts
        step, rank = self.state.global_step, self.args.process_index
        student = self.accelerator.unwrap_model(self.model)
        self.rollouts.prepare(
            step, student, self.processing_class, Path(str(self.args.output_dir)), rank, self.args.world_size
        )
        mixed = [self._train_collator(self.rollouts.mix(batch, step, at, rank)) for at, batch in enumerate(samples)]
        return mixed, self._get_num_items_in_batch(mixed, device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every trajectory once, in order of length; the same loader for the same store, and so the same workers.

        Raises:
            ConfigError: there is no store to evaluate on.
        """
        store: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if store is None:
            raise ConfigError(
                "There is no store to evaluate on; give the trainer eval_dataset, or evaluate one: evaluate(store)."
            )
        if id(store) not in self._eval_loaders:  # each keeps its store, so that no other takes its id
            self._eval_loaders[id(store)] = self._loader(store, self._sampler(store, seed=None), self._eval_collator)
        return self._eval_loaders[id(store)]

    def _sampler(self, store: Store, seed: int | None) -> TokenBudgetSampler:
        total = store.response_lengths + store.prompt_lengths
        return TokenBudgetSampler(
            store.response_lengths,
            total,
            self.args.response_tokens_per_batch,
            seed,
            self.args.world_size,
            store.row_groups,
            store.row_groups_in_memory,
        )

    def _loader(self, store: Any, sampler: TokenBudgetSampler, collator: Any) -> DataLoader:
        loader = DataLoader(
            store,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Of later versions of transformers than the oldest that will do.
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
            in_order=getattr(self.args, "dataloader_in_order", True),
            # Its own, or each pass over a loader, evaluation included, would move the one that training draws from.
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def _prepare_input(self, data: Any) -> Any:
        # transformers would cast log-probabilities to DeepSpeed's dtype.
        return send_to_device(data, self.args.device)

    # ---- loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Response tokens and plain-text tokens of the whole step, over accumulation and processes: float [2]."""
        if not batch_samples or isinstance(batch_samples[0], list):  # trajectories, not mixed and collated yet
            return None
        # One number leaves the device per step, not one per micro-batch.
        acts = torch.stack([batch["has_action_N"].sum() for batch in batch_samples]).sum().to(device)
        text = sum(len(batch["text_target_L"]) for batch in batch_samples)
        counts = self.accelerator.reduce(torch.stack([acts, torch.full_like(acts, text)]), "sum")
        num_tokens = int(counts[0])
        self.state.num_input_tokens_seen += num_tokens
        self._tokens_since += num_tokens
        return counts

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss: objective and off-support term, and J_PT, each per token.

        Raises:
            NonFiniteLossError: names the step.
        """
        stats, outputs = self._statistics(model, inputs)
        result = self.objective(stats)
        loss, metrics = result.loss, dict(result.metrics)
        if self.uses_off_support:
            extra = self.off_support(stats)
            loss, metrics = loss + extra.loss, {**metrics, **extra.metrics}
        # Gradients are averaged over processes; the counts are of all of them.
        num_tokens, num_text = num_items_in_batch.clamp(min=1) / self.accelerator.num_processes
        loss = loss / num_tokens
        if "text_nll" in outputs:
            loss = loss + self.args.text_weight * outputs["text_nll"] / num_text
            metrics["text_nll"] = (outputs["text_nll"].detach(), torch.tensor(len(inputs["text_target_L"])))
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Lower learning_rate, raise alpha, or "
                "use coordinates: value_head; the last checkpoint is intact."
            )
        self.meter.add({**metrics, **self._set_metrics(inputs)})
        return (loss, outputs) if return_outputs else loss

    def _statistics(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[ActionStats, dict[str, Tensor]]:
        extra = {}
        if self.teacher is not None and model.training:
            extra["teacher_hidden_NE"] = self.teacher.hidden(inputs)
        outputs = model(**inputs, **extra)
        stats = ActionStats(
            **{name: inputs[name] for name in STATS_FIELDS},
            q_M=outputs["q_M"],
            q_taken_N=outputs["q_taken_N"],
            log_normaliser_N=outputs.get("log_normaliser_N"),
            value_N=outputs.get("value_N"),
            q_max_N=outputs.get("q_max_N"),
            divergence_N=outputs.get("divergence_N"),
            vocab_size=self._vocab_size,
            full_support=self.full_support,
        )
        if self.slow_copy is not None and model.training:
            stats = replace(stats, target=self._slow_statistics(stats, inputs))
        return stats, outputs

    @torch.no_grad()
    def _slow_statistics(self, stats: ActionStats, inputs: dict[str, Any]) -> ActionStats:
        assert self.slow_copy is not None
        with self.accelerator.autocast():  # which accelerate builds into the student's forward only
            outputs = self.slow_copy.model(**inputs, for_targets=True)
        return replace(
            stats,
            q_M=outputs["q_M"],
            q_taken_N=outputs["q_taken_N"],
            log_normaliser_N=outputs.get("log_normaliser_N"),
            value_N=outputs.get("value_N"),
            q_max_N=None,
        )

    def _set_metrics(self, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        if not self.objective.uses_sets:
            return {}
        acts = inputs["has_action_N"].sum()
        transitions = acts + inputs["dropped_N"].sum()
        num_trajectories = inputs["sequence_N"][-1] + 1
        return {
            "over_budget_share": (inputs["num_over_budget"], num_trajectories),
            "student_share": ((inputs["from_student_N"] & inputs["has_action_N"]).sum(), acts),
            "set_size": (inputs["offsets"][-1], torch.tensor(len(inputs["has_action_N"]))),
            "dropped_share": (inputs["dropped_N"].sum(), transitions),
            "added_share": (inputs["added_N"].sum(), transitions),
        }

    # ---- evaluation and logging ----

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means per response token on a store: ``nll``, ``agreement_top1``, ``kl_set_tail`` and ``mass_outside_set``.

        ``kl_set_tail`` takes all tokens outside the set as one: a lower bound on KL(teacher‖student), from the store
        alone. Store with p_max = 1: ``nll`` only.
        """
        meter, started = MeanMeter(), time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        self._place_for_evaluation()
        model: Any = self.model
        model.eval()
        for inputs in loader:
            inputs = self._prepare_inputs(inputs)
            with self.accelerator.autocast():  # which accelerate builds into the forward when training begins
                stats, outputs = self._statistics(model, inputs)
            meter.add(_evaluation_sums(stats, outputs["top_N"], inputs["action_ids_M"]))
        model.train()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.pop(self.accelerator).items()}
        metrics[f"{metric_key_prefix}_runtime"] = seconds = time.perf_counter() - started
        self._logged_at += seconds  # the speed is that of training
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _place_for_evaluation(self) -> None:
        """Shard a model that no training has sharded, or move it: with a plain one transformers has done so."""
        model: Any = self.model
        if self.accelerator._models:
            return
        if getattr(self.accelerator, "is_fsdp2", False):
            raise ConfigError(
                "With FSDP2 weights are sharded together with their optimizer, when training begins. Evaluate after "
                "train(), or before its first step with eval_on_start: true."
            )
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped = self.accelerator.prepare(model)
        elif self.is_deepspeed_enabled:
            model.to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's terms, tokens seen and tokens per second to training logs."""
        if "loss" in logs:
            now = time.perf_counter()
            logs |= self.meter.pop(self.accelerator)
            logs["response_tokens"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = self._tokens_since / (now - self._logged_at)
            self._logged_at, self._tokens_since = now, 0
        super().log(logs, start_time)

    # ---- saving and resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint of the output folder.

        Raises:
            RunFolderError: there is none.
        """
        if resume_from_checkpoint is True:
            folder = self.args.output_dir or "."
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise RunFolderError(
                    f"{folder} has no complete checkpoint to go on from. Leave resume_from_checkpoint out to begin."
                )
        if self.slow_copy is not None and resume_from_checkpoint:
            self.slow_copy.load(Path(str(resume_from_checkpoint)))
        self._logged_at, self._tokens_since = time.perf_counter(), 0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model: Any = self.model
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        check_finite_weights(state_dict or trained, self.state.global_step)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # transformers calls this in every process
            return
        # The pickled arguments are not needed to resume, and nothing here writes pickles that it can avoid.
        folder = Path(str(output_dir or self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.slow_copy is not None and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.slow_copy.save(folder)

    # ---- checks ----

    def _check_store(self, store: Store, args: TDistillConfig, tokenizer: Any, model: PreTrainedModel) -> None:
        if args.p is not None and args.p > store.p_max:
            raise ProbabilityRangeError(
                f"p = {args.p} is above the store's p_max = {store.p_max} ({store.path}). Train at p <= {store.p_max}, "
                "or capture again with a larger p_max."
            )
        if args.p_budget_nats is not None and store.p_max == 1.0:
            raise ProbabilityRangeError(
                f"p_budget_nats = {args.p_budget_nats} needs action sets, which the store {store.path} does not keep "
                "at p_max = 1. Capture with p_max below 1, or drop the budget."
            )
        bits, least = store.identity["log_prob_bits"], self.objective.least_log_prob_bits
        if store is self.store and bits < least:  # a dev split is measured alike whatever the objective
            raise ConfigError(
                f"The objective '{self.objective.name}' needs log-probabilities of {least} bits, and the store "
                f"{store.path} has {bits}. Capture again with log_prob_bits = {least}, or set source to teacher or set."
            )
        if args.p is not None and args.p < 1.0 == store.p_max:
            raise ProbabilityRangeError(
                f"The store {store.path} was captured at p_max = 1 and keeps no action sets; leave p empty, or capture "
                "again with p_max below 1."
            )
        if tokenizer is not None:
            check_same_tokenizer(store.identity["tokenizer_sha256"], tokenizer, str(store.path))
            check_vocabulary(model.get_output_embeddings().weight.shape[0], tokenizer, "the student")

    def _live_teacher(self, teacher: PreTrainedModel | None, tokenizer: Any) -> LiveTeacher | None:
        if not self.objective.needs_teacher:
            return None
        assert teacher is not None
        check_head(teacher)
        terms = self.objective.terms  # type: ignore[attr-defined]
        frozen = teacher.eval().requires_grad_(False)
        return LiveTeacher(frozen, terms, None if tokenizer is None else num_token_ids(tokenizer))


def last_checkpoint(folder: str | Path) -> str | None:
    """Newest complete checkpoint in a folder. A run that is killed while it writes one leaves it without its state."""
    complete = []
    for state in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except ValueError:
            continue
    return max(complete)[1] if complete else None


def _evaluation_sums(stats: ActionStats, top_N: Tensor, action_ids_M: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    act_N = stats.has_action_N
    count = act_N.sum()
    assert stats.log_normaliser_N is not None
    sums = {"nll": ((stats.log_normaliser_N - stats.q_taken_N)[act_N].sum(), count)}
    if len(stats.q_M):
        first_M = stats.offsets[:-1]
        rows = torch.repeat_interleave(torch.arange(len(act_N), device=act_N.device), stats.offsets.diff())
        inside_N = torch.zeros_like(stats.log_normaliser_N).index_add(
            0, rows, (stats.q_M - stats.log_normaliser_N[rows]).exp()
        )
        sums["agreement_top1"] = ((action_ids_M[first_M] == top_N)[act_N].sum(), count)
        sums["kl_set_tail"] = (set_tail_kl(stats)[act_N].sum(), count)
        sums["mass_outside_set"] = ((1 - inside_N)[act_N].sum(), count)
    return sums
