"""Recipes: one YAML file describes a whole run. Unknown keys are errors with a suggestion."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tdistill.actions import check_p
from tdistill.errors import ConfigError, ProbabilityRangeError, did_you_mean
from tdistill.evaluation.records import EvaluationSettings
from tdistill.teachers.base import SamplingSettings
from tdistill.training.arguments import TDistillConfig

# Set by the run itself, never by a recipe.
_RESERVED_ARGUMENTS = ("output_dir",)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TeacherConfig(_Strict):
    """Where the teacher is. ``model_kwargs`` is passed to ``from_pretrained`` (quantised loading and the like)."""

    kind: Literal["hf"] = "hf"
    model: str
    gguf_file: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    model_kwargs: dict[str, Any] = {}


class DataConfig(_Strict):
    """Prompt sets: paths, ``package:NAME/FILE`` or names of data sets. Dev chooses checkpoints, held-out reports."""

    train: str
    dev: str
    held_out: str
    train_split: str = "train"
    dev_split: str = "train"
    held_out_split: str = "train"
    text: str | None = None
    text_tokens: int = Field(128, ge=2)
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"
    turns: Literal["last", "all"] = "last"
    max_prompt_tokens: int = Field(512, ge=1)
    too_long: Literal["error", "skip"] = "error"


class CaptureConfig(_Strict):
    """How the teacher is asked; see :class:`~tdistill.teachers.base.SamplingSettings`."""

    mode: Literal["generate", "score"] = "generate"
    p_max: float = 0.95
    max_actions: int | None = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(256, ge=1)
    answers_per_prompt: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    shard_prompts: int = Field(64, ge=1)
    log_prob_bits: Literal[8, 16] = 16
    seed: int = Field(0, ge=0)

    @field_validator("p_max")
    @classmethod
    def _p_in_range(cls, value: float) -> float:
        check_p(value, "capture.p_max")
        return value

    def sampling(self) -> SamplingSettings:
        """Return the settings that a teacher takes."""
        return SamplingSettings(self.p_max, self.max_actions, self.temperature, self.max_new_tokens, self.seed)


class StudentConfig(_Strict):
    """The start of training: an existing ``model``, or the teacher with only ``layers`` of its layers."""

    model: str | None = None
    layers: int | None = Field(None, ge=1)
    method: Literal["block_influence", "even"] = "block_influence"
    calibration_answers: int = Field(32, ge=1)
    attn_implementation: str = "sdpa"

    @model_validator(mode="after")
    def _one_source(self) -> StudentConfig:
        if (self.model is None) == (self.layers is None):
            raise ValueError(
                "give either student.model (a folder or hub name) or student.layers (made from the teacher)"
            )
        return self


class PhaseConfig(_Strict):
    """One training phase; ``args`` are fields of TDistillConfig.

    ``init`` names the phase it starts from (default: the one before that is no control, or the start). A control is
    trained and evaluated for comparison and never becomes the student.
    """

    init: str | None = None
    control: bool = False
    args: dict[str, Any] = {}

    @field_validator("args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = {field.name for field in fields(TDistillConfig) if field.init} - set(_RESERVED_ARGUMENTS)
        for key in value:
            if key not in known:
                raise ConfigError(f"Unknown training argument '{key}'.{did_you_mean(key, known)}")
        return value


class Recipe(_Strict):
    """A complete run."""

    name: str
    output: str
    teacher: TeacherConfig
    data: DataConfig
    capture: CaptureConfig = CaptureConfig()
    student: StudentConfig
    phases: dict[str, PhaseConfig]
    peft: dict[str, Any] | None = None
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _answers_as_long_as_the_teachers(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("evaluation", {}), dict):
            length = CaptureConfig.model_fields["max_new_tokens"].default
            if isinstance(value.get("capture"), dict):
                length = value["capture"].get("max_new_tokens", length)
            value = {**value, "evaluation": {"max_new_tokens": length, **value.get("evaluation", {})}}
        return value

    @model_validator(mode="after")
    def _phases_in_order(self) -> Recipe:
        if not any(not phase.control for phase in self.phases.values()):
            raise ValueError("phases needs at least one phase that is no control")
        seen = ["start"]
        for name, phase in self.phases.items():
            if name in ("start", "teacher"):
                raise ValueError(f"phases: '{name}' is reserved; choose another name")
            if phase.init is not None and phase.init not in seen:
                raise ValueError(f"phases.{name}.init = '{phase.init}' is no earlier phase; earlier: {', '.join(seen)}")
            seen.append(name)
        return self

    @model_validator(mode="after")
    def _phases_can_start(self) -> Recipe:
        for name in self.phases:
            args = self.arguments(name, "unused")
            if args.p is not None and args.p > self.capture.p_max:
                raise ProbabilityRangeError(
                    f"phases.{name}.args.p = {args.p} is above capture.p_max = {self.capture.p_max}. Lower p or "
                    "raise p_max."
                )
        return self

    def arguments(self, name: str, output_dir: str) -> TDistillConfig:
        """Arguments of a phase.

        Raises:
            ConfigError: a value that transformers or an objective refuses; names the phase.
        """
        try:
            return TDistillConfig(output_dir=output_dir, **self.phases[name].args)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"phases.{name}.args: {error}") from error

    def init_of(self, name: str) -> str:
        """Phase that a phase starts from."""
        before = "start"
        for other, phase in self.phases.items():
            if other == name:
                return phase.init or before
            before = before if phase.control else other
        raise KeyError(name)

    @property
    def final_phase(self) -> str:
        """Phase whose student is the result."""
        return [name for name, phase in self.phases.items() if not phase.control][-1]

    @property
    def controls(self) -> list[str]:
        """Phases trained for comparison."""
        return [name for name, phase in self.phases.items() if phase.control]

    def to_yaml(self) -> str:
        """Return the resolved recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as ``capture.p_max=0.9``.

    Raises:
        ConfigError: unreadable file, malformed YAML or override, unknown key (with a suggestion), value out of range.
        ProbabilityRangeError: p_max outside (0, 1].
    """
    try:
        tree = OmegaConf.load(Path(path))
    except FileNotFoundError:
        raise ConfigError(
            f"No recipe at '{path}'. Recipes lie in recipes/; `tdistill ls recipes` lists them."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe '{path}' is not readable YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"The recipe '{path}' must be a mapping of keys to values.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"Override '{override}' must have the form key.subkey=value.")
        try:
            OmegaConf.update(tree, key, yaml.safe_load(value), force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"Override '{override}' cannot be applied: {error}") from None
    try:
        return Recipe.model_validate(OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"The recipe '{path}' does not resolve: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"The recipe '{path}' is not valid:\n" + "\n".join(map(_explain, error.errors()))) from None


def _explain(error: Any) -> str:
    """One line for one defect: where, what, and for an unknown key the closest known one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"  {where}: unknown key.{did_you_mean(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
    given = "" if error["type"] in ("missing", "value_error") else f" (given: {error['input']!r})"
    return f"  {where or 'recipe'}: {error['msg']}{given}"


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """Known keys of the part of a recipe at a location."""
    kind: Any = Recipe
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:
            kind = typing.get_args(kind)[-1]
        if isinstance(kind, types.UnionType):
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
    return list(kind.model_fields)
