"""Settings of a training phase: transformers' TrainingArguments and what distillation adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from tdistill.actions import check_budget, check_discount, check_p
from tdistill.errors import ConfigError, did_you_mean
from tdistill.objectives import Objective, OffSupport, objective_class

KernelName = Literal["candidates", "reference"]
# A checkpoint holds the optimizer too, three times the weights: at most ten are written.
_SHARE_BETWEEN_CHECKPOINTS = 0.1
# What the dev split is measured by, and whether more is better; without action sets only the first exists.
DEV_METRICS = {"nll": False, "kl_set_tail": False, "mass_outside_set": False, "agreement_top1": True}
# Arguments of transformers that nothing would read, and why.
_WITHOUT_EFFECT = {
    "per_device_train_batch_size": "a micro-batch holds about response_tokens_per_batch tokens",
    "label_smoothing_factor": "the objective is the loss",
    "train_sampling_strategy": "micro-batches group answers by length",
    "per_device_eval_batch_size": "batches of the dev split hold about response_tokens_per_batch tokens too",
    "dataloader_drop_last": "a micro-batch of fewer tokens counts as what it holds",
    "prediction_loss_only": "the dev split's measures are summed as they come",
    "eval_accumulation_steps": "the dev split's measures are summed as they come",
    "bf16_full_eval": "the dev split is measured in the precision of training",
    "fp16_full_eval": "the dev split is measured in the precision of training",
    "include_num_input_tokens_seen": "response_tokens are counted and logged",
    "auto_find_batch_size": "it would change per_device_train_batch_size",
    "average_tokens_across_devices": "a step is divided by the tokens of all processes",
    "remove_unused_columns": "a store has no columns to remove",
    "label_names": "a store's tokens are the labels",
    "length_column_name": "a store knows the lengths of its answers",
    "include_for_metrics": "the dev split's measures are those of TDistillTrainer.evaluate",
    "batch_eval_metrics": "the dev split's measures are summed as they come",
    "eval_do_concat_batches": "the dev split's measures are summed as they come",
    "eval_use_gather_object": "the dev split's measures are summed as they come",
}


@dataclass
class TDistillConfig(TrainingArguments):
    """Arguments of :class:`TDistillTrainer`; every field of TrainingArguments keeps its meaning or is refused.

    ``per_device_train_batch_size`` is refused: micro-batches hold about ``response_tokens_per_batch`` tokens.

    Attributes:
        objective: name in the table of objectives, or a mapping with ``name`` and its hyperparameters.
        p: mass of the action sets, at most the store's p_max; None takes the store's.
        p_budget_nats: instead of p: loss of value per trajectory, nats. Each state keeps the smallest set such that the
            discounted sum of −log Z along the trajectory stays within it, or all that is stored.
        p_budget_gamma: discount of that sum.
        outside: what becomes of sampled transitions whose token is not in A_p: ``drop``, or ``keep`` for objectives
            that do not read the token taken, such as an expected first-order term alone.
        off_support: pressure outside the sets, used by objectives on sets only: ``none``, ``union``, ``negatives`` or
            ``tail``.
        off_support_weight: factor on it.
        off_support_target: mass that it asks for on the set: all of it (``set``), or the ``teacher``'s own.
        response_tokens_per_batch: response tokens of one micro-batch and process, on average.
        text_weight: factor on the language-modelling term on plain text (J_PT), used with ``text_dataset``.
        text_sequences_per_batch: plain-text sequences added to each micro-batch.
        slow_copy_rate: τ of the slow copy of the student that some objectives take their targets from.
        kernel: ``candidates``, or ``reference`` (dense, for comparison).
        bf16: None is true on a GPU that computes in bf16 (not one that emulates it), unless fp16 is; a bool from then
            on.
        save_steps: None writes a checkpoint at each evaluation with ``load_best_model_at_end``, else after each tenth
            of the phase's steps; a number from then on.
        save_total_limit: checkpoints that are kept, the best one among them; None keeps all.
        metric_for_best_model: ``eval_kl_set_tail`` unless given; ``eval_nll`` takes its place where the dev store
            lists no sets.
        greater_is_better: None is what holds for that metric, and anything else is refused; a bool from then on.
    """

    # Of what may be JSON on the command line.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "objective"]  # type: ignore[misc]

    # In this order for HfArgumentParser, which takes the second.
    objective: dict[str, Any] | str | None = "iq_learn"
    p: float | None = None
    p_budget_nats: float | None = None
    p_budget_gamma: float = 0.99
    outside: Literal["drop", "keep"] = "drop"
    off_support: Literal["none", "union", "negatives", "tail"] = "negatives"
    off_support_weight: float = 1.0
    off_support_target: Literal["teacher", "set"] = "set"
    response_tokens_per_batch: int = 1024
    text_weight: float = 1.0
    text_sequences_per_batch: int = 2
    slow_copy_rate: float = 0.05
    kernel: KernelName = "candidates"
    learning_rate: float = field(default=1e-4)
    max_grad_norm: float = field(default=1.0)
    bf16: bool | None = field(default=None)  # type: ignore[assignment]
    save_steps: float | None = field(default=None)  # type: ignore[assignment]
    save_total_limit: int | None = field(default=2)
    liger_kernel_config: dict[str, Any] | str | None = field(default=None)  # type: ignore[assignment]
    # A non-finite loss raises here; transformers would replace it by an average in the log.
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool = field(default=False)
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036 - HfArgumentParser takes the second
    metric_for_best_model: str | None = field(default="eval_kl_set_tail")
    greater_is_better: bool | None = field(default=None)

    def __post_init__(self) -> None:
        if self.p is not None:
            check_p(self.p)
        if self.p_budget_nats is not None:
            check_budget(self.p_budget_nats)
            check_discount(self.p_budget_gamma, "p_budget_gamma")
            if self.p is not None:
                raise ConfigError(
                    f"p = {self.p} and p_budget_nats = {self.p_budget_nats} exclude each other; drop one."
                )
        if self.response_tokens_per_batch < 1:
            raise ConfigError(f"response_tokens_per_batch = {self.response_tokens_per_batch} must be at least 1.")
        defaults = {of.name: of.default for of in fields(self)}
        for name, instead in _WITHOUT_EFFECT.items():
            value, default = getattr(self, name, None), defaults.get(name)
            left_out = value in (None, default) or (not value and default is not True)
            if not left_out:
                raise ConfigError(f"{name} = {value} has no effect here: {instead}. Leave it out.")
        evaluates, saves = (
            str(getattr(strategy, "value", strategy)) for strategy in (self.eval_strategy, self.save_strategy)
        )
        if self.load_best_model_at_end and evaluates != saves and not (saves == "best" and evaluates != "no"):
            raise ConfigError(
                f"load_best_model_at_end needs eval_strategy and save_strategy alike; they are {evaluates} and {saves}."
            )
        self._settle_metric()
        if not 0 < self.slow_copy_rate <= 1:
            raise ConfigError(f"slow_copy_rate = {self.slow_copy_rate} is outside (0, 1].")
        if self.kernel not in get_args(KernelName):
            raise ConfigError(f"kernel = '{self.kernel}' is unknown.{did_you_mean(self.kernel, get_args(KernelName))}")
        # Even batches would repeat some trajectories on some processes; the sampler already deals out full rounds.
        self.accelerator_config = {"even_batches": False, **_as_dict("accelerator_config", self.accelerator_config)}
        if self.bf16 is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available()
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.save_steps is None:
            best_by_steps = self.load_best_model_at_end and evaluates == "steps"
            # As transformers: logging_steps where eval_steps is left out, and below 1 a share of all steps, rounded up.
            self.save_steps = (self.eval_steps or self.logging_steps) if best_by_steps else _SHARE_BETWEEN_CHECKPOINTS
        if self.use_liger_kernel:
            # Their fused loss would take the place of the forward that returns statistics; the body's kernels stay.
            given = _as_dict("liger_kernel_config", self.liger_kernel_config)
            if given.get("fused_linear_cross_entropy"):
                raise ConfigError(
                    "liger_kernel_config.fused_linear_cross_entropy = true takes the place of the objective. Leave it "
                    "out; the kernels of the layers are used without it."
                )
            self.liger_kernel_config = {**given, "fused_linear_cross_entropy": False}
        super().__post_init__()
        if self.outside not in ("drop", "keep"):
            raise ConfigError(f"outside = '{self.outside}' is unknown; use drop or keep.")
        objective = self.build_objective()
        if self.outside == "keep" and objective.reads_action:
            raise ConfigError(
                f"outside = keep, but the objective '{objective.name}' reads the token taken, whose "
                "projected probability is 0 outside the set. Set outside to drop."
            )
        self.build_off_support()

    def _settle_metric(self) -> None:
        """Check the metric that chooses a checkpoint, and in which direction it is better."""
        given = self.metric_for_best_model = self.metric_for_best_model or "eval_kl_set_tail"
        metric = given.removeprefix("eval_")
        if metric not in DEV_METRICS:
            raise ConfigError(
                f"metric_for_best_model = '{given}' is not measured on the dev split."
                f"{did_you_mean(metric, DEV_METRICS)}"
            )
        if self.greater_is_better not in (None, DEV_METRICS[metric]):
            raise ConfigError(
                f"greater_is_better = {self.greater_is_better} would keep the worst {metric}. Leave it out."
            )
        self.greater_is_better = DEV_METRICS[metric]

    def build_objective(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: unknown objective or hyperparameter; suggests the closest name.
        """
        spec = {"name": self.objective} if isinstance(self.objective, str) else dict(self.objective or {})
        cls = objective_class(spec.pop("name", "iq_learn"))
        known = cls.__dataclass_fields__  # type: ignore[attr-defined]
        for key in spec:
            if key not in known:
                raise ConfigError(f"Objective '{cls.name}' has no '{key}'.{did_you_mean(key, known)}")
        return _validated(cls, spec, f"Objective '{cls.name}'")

    def build_off_support(self) -> OffSupport:
        """Return the off-support term.

        Raises:
            ConfigError: unknown kind.
        """
        values = {"kind": self.off_support, "weight": self.off_support_weight, "target": self.off_support_target}
        return _validated(OffSupport, values, "off_support")


def _validated(cls: type, values: dict[str, Any], who: str) -> Any:
    """Build a dataclass with its types checked: a misspelt choice would otherwise act like another one."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{who}: {name} = {first['input']!r} is not valid. {first['msg']}.") from error


def _as_dict(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or what stands for one on a command line: JSON, or the path of a file of it."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return dict(value) if isinstance(value, dict) else value.to_dict()
    try:
        found = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} = '{value}' is neither JSON nor the path of a JSON file: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name} = '{value}' holds no mapping; write {{\"key\": value}}.")
    return found
