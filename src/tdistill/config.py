"""Recipes: one YAML file describes a whole run. Unknown keys are errors with a suggestion."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tdistill.actions import check_p
from tdistill.errors import ConfigError, ProbabilityRangeError, TDistillError, did_you_mean
from tdistill.evaluation.records import EvaluationSettings
from tdistill.objectives import check_full_support, objective_class, objective_names
from tdistill.prompts import is_file
from tdistill.teachers.base import SamplingSettings
from tdistill.training.arguments import TDistillConfig
from tdistill.training.rollouts import RolloutSettings, check_log_probs_sampled

# Set by the run itself, never by a recipe.
_RESERVED_ARGUMENTS = ("output_dir",)
# Subjects of every evaluation; phases get other names.
_RESERVED_PHASES = ("start", "teacher")
# Key of a recipe file that names the one it extends; it is gone once the file is read.
_BASE = "base"
# What OmegaConf says of `${oc.env:NAME}`.
_UNSET_VARIABLE = re.compile(r"Environment variable '([^']+)' not found")
# Names of folders.
_PHASE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

_Text = Annotated[str, StringConstraints(min_length=1)]
_VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TeacherConfig(_Strict):
    """Where the teacher is. ``model_kwargs`` is passed to ``from_pretrained`` (``revision``, quantised loading, …)."""

    kind: Literal["hf"] = "hf"
    model: _Text
    gguf_file: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    model_kwargs: dict[str, Any] = {}

    @field_validator("model_kwargs")
    @classmethod
    def _nothing_secret_or_remote(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "trust_remote_code" in value:
            raise ValueError("trust_remote_code stays off: code of a model's folder is not run; leave it out")
        _refuse_keys_of_the_hub(value)
        return value


class DataConfig(_Strict):
    """Prompt sets: paths, ``package:NAME/FILE`` or names of data sets.

    Dev is measured in training and chooses the checkpoint with ``load_best_model_at_end`` only; held-out reports.
    ``*_split`` and ``*_config`` are those of a data set; a file has neither. ``template_kwargs`` are variables of the
    chat template, such as ``enable_thinking: false``.
    """

    train: _Text
    dev: _Text
    held_out: _Text
    train_split: str = "train"
    dev_split: str = "train"
    held_out_split: str = "train"
    train_config: _Text | None = None
    dev_config: _Text | None = None
    held_out_config: _Text | None = None
    text: _Text | None = None
    text_tokens: int = Field(128, ge=2)
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"
    template_kwargs: dict[_VariableName, bool | int | float | str] = {}
    turns: Literal["last", "all"] = "last"
    max_prompt_tokens: int = Field(512, ge=1)
    too_long: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _sets_apart(self) -> DataConfig:
        seen: dict[tuple[Any, ...], str] = {}
        for name in ("train", "dev", "held_out"):
            source, split, config = (getattr(self, name + end) for end in ("", "_split", "_config"))
            if is_file(source) and config is not None:
                raise ValueError(
                    f"{name}_config = '{config}', but data.{name} is the file {source}, which has no configurations; "
                    "leave it out"
                )
            place = (source,) if is_file(source) else (source, config, f"split {split}")
            if (other := seen.setdefault(place, name)) != name:
                remedy = "name another file" if is_file(source) else f"name another data set, or a {name}_split"
                raise ValueError(
                    f"{other} and {name} are the same prompts ({', '.join(filter(None, place))}), and what is trained "
                    f"on or chosen by is no measure of a student; {remedy}"
                )
        return self


class CaptureConfig(_Strict):
    """How the teacher is asked; see :class:`~tdistill.teachers.base.SamplingSettings`.

    ``from_run`` is the folder of another run that has asked the same: its stores are read, and nothing is asked.
    """

    from_run: _Text | None = None
    mode: Literal["generate", "score"] = "generate"
    p_max: float = 0.8
    max_actions: int | None = Field(64, ge=1)
    temperature: _Positive = 1.0
    max_new_tokens: int = Field(256, ge=1)
    answers_per_prompt: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    # A shard is cut into batches by length: the more batches, the less padding (docs/performance.md).
    shard_prompts: int = Field(256, ge=1)
    log_prob_bits: Literal[8, 16] = 8
    seed: int = Field(0, ge=0)

    @field_validator("p_max")
    @classmethod
    def _p_in_range(cls, value: float) -> float:
        check_p(value, "capture.p_max")
        return value

    @model_validator(mode="after")
    def _given_answers_are_scored_once(self) -> CaptureConfig:
        if self.mode == "score" and self.answers_per_prompt != 1:
            raise ValueError(
                f"answers_per_prompt = {self.answers_per_prompt}, but mode: score scores each given answer once; use 1"
            )
        return self

    def sampling(self) -> SamplingSettings:
        """Return the settings that a teacher takes."""
        return SamplingSettings(self.p_max, self.max_actions, self.temperature, self.max_new_tokens, self.seed)


class StudentConfig(_Strict):
    """The start of training: an existing ``model``, or the teacher with only ``layers`` of its layers.

    ``revision`` is a branch, tag or commit of a model on the hub.
    """

    model: _Text | None = None
    revision: _Text | None = None
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
        if self.revision is not None and self.model is None:
            raise ValueError(f"revision = '{self.revision}' is that of student.model, which is not given; leave it out")
        return self


class PhaseConfig(_Strict):
    """One training phase; ``args`` are fields of TDistillConfig.

    ``init`` names the phase it starts from (default: the one before that is no control, or the start). A control is
    trained and evaluated for comparison and never becomes the student.
    """

    init: str | None = None
    control: bool = False
    rollouts: RolloutSettings | None = None
    args: dict[str, Any] = {}

    @field_validator("rollouts", mode="wrap")
    @classmethod
    def _rollouts_of_phase(cls, value: Any, handler: Any) -> RolloutSettings | None:
        try:
            return typing.cast("RolloutSettings | None", handler(value))
        except TDistillError as error:  # which knows no phase
            raise ValueError(str(error)) from error

    @field_validator("args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_keys_of_the_hub(value)
        for name in value:
            if name == "push_to_hub" or name.startswith("hub_"):
                raise ValueError(
                    f"{name}: a phase's checkpoints are no student, and lie beside prompts; send what the run leaves "
                    "with `hf upload ORG/NAME OUTPUT/student`"
                )
        checked = _checked_fields(TDistillConfig, value, "training argument '{}'", without=_RESERVED_ARGUMENTS)
        objective = checked.get("objective")
        if isinstance(objective, str):
            _objective_class(objective)
        elif objective is not None:
            settings = {key: setting for key, setting in objective.items() if key != "name"}
            # Without this, `objective.alpha=1` over `objective: sft` would quietly become another objective.
            if "name" not in objective:
                raise ValueError(f"objective = {objective} has no name. Known: {', '.join(objective_names())}.")
            name = objective["name"]
            settings = _checked_fields(_objective_class(name), settings, f"setting '{{}}' of objective {name}")
            checked["objective"] = {"name": name, **settings}
        return checked


class Recipe(_Strict):
    """A complete run."""

    name: _Text
    output: _Text
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

    @field_validator("peft")
    @classmethod
    def _known_adapter_settings(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError(
                f"adapters need the package peft ({error}); pip install 'tdistill[peft]', or leave this empty"
            ) from error
        checked = _checked_fields(LoraConfig, value, "setting '{}' of peft.LoraConfig")
        try:
            LoraConfig(**checked)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return checked

    @model_validator(mode="after")
    def _phases_in_order(self) -> Recipe:
        if not any(not phase.control for phase in self.phases.values()):
            raise ValueError("phases needs at least one phase that is no control")
        seen = ["start"]
        for name, phase in self.phases.items():
            if name in _RESERVED_PHASES:
                raise ValueError(f"phases: '{name}' is reserved; choose another name")
            if not _PHASE_NAME.fullmatch(name):
                raise ValueError(
                    f"phases: '{name}' is to be a folder's name; use letters, digits, '_', '-' and '.', and begin with "
                    "a letter or digit"
                )
            if phase.init is not None and phase.init not in seen:
                raise ValueError(f"phases.{name}.init = '{phase.init}' is no earlier phase; earlier: {', '.join(seen)}")
            seen.append(name)
        return self

    @model_validator(mode="after")
    def _phases_can_start(self) -> Recipe:
        p_max = self.capture.p_max
        for name in self.phases:
            where, args = f"phases.{name}.args", self.arguments(name, "unused")
            if args.p is not None and args.p > p_max:
                raise ProbabilityRangeError(
                    f"{where}.p = {args.p} is above capture.p_max = {p_max}. Lower p or raise p_max."
                )
            if p_max == 1.0:
                _check_without_sets(args, where)
            objective, rollouts = args.build_objective(), self.phases[name].rollouts
            if self.capture.log_prob_bits < (least := objective.least_log_prob_bits):
                raise ConfigError(
                    f"{where}.objective needs capture.log_prob_bits: {least} with source: store, and the recipe has "
                    f"{self.capture.log_prob_bits}. Set it, or set source to teacher or set."
                )
            if objective.needs_log_probs_sampled and rollouts is not None:
                try:
                    check_log_probs_sampled(objective.name, rollouts, self.capture.sampling())
                except ConfigError as error:
                    raise ConfigError(f"phases.{name}: {error}") from error
            if objective.needs_rollouts and rollouts is None:
                raise ConfigError(
                    f"{where}.objective learns from the student's own answers with these settings; add "
                    f"phases.{name}.rollouts, for example {{every: 50, share: 0.5}}."
                )
            if rollouts is not None and not objective.takes_rollouts:
                raise ConfigError(
                    f"{where}.objective = {objective.name} would imitate the student's own answers. Leave "
                    f"phases.{name}.rollouts out, or take an objective that compares the student with the teacher "
                    "there, such as gkd."
                )
        return self

    @model_validator(mode="after")
    def _evaluation_can_run(self) -> Recipe:
        subjects = ["start", *self.phases]
        if self.evaluation.start not in subjects:
            raise ValueError(
                f"evaluation.start = '{self.evaluation.start}' is not evaluated."
                f"{did_you_mean(self.evaluation.start, subjects)}"
            )
        for subject in (name for pair in self.evaluation.compare for name in pair):
            if subject not in ("teacher", *subjects):
                raise ValueError(
                    f"evaluation.compare names '{subject}', which is not evaluated."
                    f"{did_you_mean(subject, ['teacher', *subjects])}"
                )
        judge = self.evaluation.judge
        if judge is not None and judge.against not in ("teacher", *subjects):
            raise ValueError(
                f"evaluation.judge.against = '{judge.against}' is not evaluated."
                f"{did_you_mean(judge.against, ['teacher', *subjects])}"
            )
        for key in ("seeds", "teacher_seeds"):
            seeds = getattr(self.evaluation, key)
            if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
                raise ValueError(f"evaluation.{key} = {list(seeds)} must be different numbers from 0 on")
        if not math.isfinite(self.evaluation.temperature):
            raise ValueError(f"evaluation.temperature = {self.evaluation.temperature} must be finite; use 1")
        return self

    def arguments(self, name: str, output_dir: str) -> TDistillConfig:
        """Arguments of a phase.

        Raises:
            ConfigError: a value that transformers or an objective refuses; names the phase.
        """
        try:
            # Left open, transformers turns its bar off with its log and prints a line per log instead.
            own = {"disable_tqdm": False, "run_name": f"{self.name}-{name}"}
            args = TDistillConfig(output_dir=output_dir, **{**own, **self.phases[name].args})
            if args.data_seed is None:
                # Not the batches of the phase before in their order again; the same as those of a control beside it.
                args.data_seed = args.seed + self._num_phases_before(name)
            return args
        except TDistillError as error:
            raise type(error)(f"phases.{name}.args: {error}") from error
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

    def _num_phases_before(self, name: str) -> int:
        init = self.init_of(name)
        return 0 if init == "start" else 1 + self._num_phases_before(init)

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
        # Not in JSON mode, which has no infinity.
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, and the one that it extends, and apply dotted overrides such as ``capture.p_max=0.9``.

    Raises:
        ConfigError: unreadable file, malformed YAML or override, unknown key (with a suggestion), value out of range, a
            base that is missing or has a base itself, an environment variable that is not set.
        ProbabilityRangeError: p_max outside (0, 1].
    """
    tree = _with_base(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"Override '{override}' must have the form key.subkey=value.")
        parts = key.strip().split(".")
        if parts[0] == "phases" and len(parts) > 2 and parts[1] not in (phases := tree.get("phases") or {}):
            # It would add a phase, and a last one makes the student.
            raise ConfigError(
                f"Override '{override}': the recipe has no phase '{parts[1]}'."
                f"{did_you_mean(parts[1], map(str, phases))}"
            )
        try:
            # By the same rules as the file: 5e-4 is a number.
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
            OmegaConf.update(tree, key.strip(), value, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"Override '{override}' cannot be applied: {reason}.") from None
    try:
        return Recipe.model_validate(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        if unset := _UNSET_VARIABLE.search(str(error)):
            raise ConfigError(
                f"The recipe '{path}' takes {error.full_key} from the environment variable {unset[1]}, which is not "
                f"set. Set it (export {unset[1]}=...), or give the value itself: {error.full_key}=..."
            ) from None
        raise ConfigError(f"The recipe '{path}' does not resolve: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"The recipe '{path}' is not valid:\n" + "\n".join(map(_explain, error.errors()))) from None


def _with_base(path: Path) -> DictConfig:
    """Tree of a recipe, over that of the recipe that its key ``base`` names, from its own folder."""
    tree = _read(path)
    if _BASE not in tree:
        return tree
    base = OmegaConf.to_container(tree, resolve=False)[_BASE]  # type: ignore[index,call-overload]
    if not isinstance(base, str) or not base:
        raise ConfigError(f"The recipe '{path}': base = {base!r} must be the path of a recipe, from this one's folder.")
    try:
        base_tree = _read(path.parent / base)
    except ConfigError as error:
        raise ConfigError(f"The recipe '{path}' extends another one (base: {base}). {error}") from None
    if _BASE in base_tree:
        raise ConfigError(
            f"The recipe '{path}' extends '{path.parent / base}', which extends a further one itself. A base stands on "
            "its own: name that further one as base, or write out what it says."
        )
    del tree[_BASE]
    try:
        return OmegaConf.merge(base_tree, tree)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"The recipe '{path}' cannot be laid over '{path.parent / base}' (base): {reason}. Give a list where the "
            "base has a list, and a mapping where it has a mapping."
        ) from None


def _read(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(
            f"No recipe at '{path}'. A clone of tdistill has some in recipes/; `tdistill ls recipes --folder FOLDER` "
            "lists those of a folder."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe '{path}' is not readable YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"The recipe '{path}' must be a mapping of keys to values.")
    return tree


def _checked_fields(cls: type, values: Mapping[str, Any], what: str, without: Collection[str] = ()) -> dict[str, Any]:
    """Values for fields of a dataclass, which itself does not look at types, converted to the types it declares.

    Args:
        cls: the dataclass.
        values: of some of its fields.
        what: names a field in a message, '{}' standing for its key.
        without: fields that may not be given.
    Raises:
        ValueError: unknown field (with a suggestion), or a value of another type.
    """
    known = {field.name for field in fields(cls) if field.init} - set(without)
    kinds = typing.get_type_hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"unknown {what.format(key)}.{did_you_mean(str(key), known)}")
        try:
            checked[key] = TypeAdapter(kinds[key]).validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(reason["msg"] for reason in error.errors())
            # YAML reads a bare no as false.
            hint = "; put no in quotes" if value is False and "'no'" in str(reasons) else ""
            raise ValueError(f"{what.format(key)}: {'; or '.join(reasons)} (given: {value!r}{hint})") from None
    return checked


def _refuse_keys_of_the_hub(values: Collection[str]) -> None:
    """Raise ValueError for what would be written with the recipe into the run's folder and its report."""
    for name in ("token", "use_auth_token", "hub_token"):
        if name in values:
            raise ValueError(f"{name}: a key is kept in no recipe; set HF_TOKEN, or log in with `hf auth login`")


def _objective_class(name: Any) -> type:
    if not isinstance(name, str):
        raise ValueError(f"the name of an objective must be a text (given: {name!r})")
    try:
        return objective_class(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _check_without_sets(args: TDistillConfig, where: str) -> None:
    """Raise ConfigError unless a phase can train on trajectories without action sets."""
    # The trainer puts nll in the place of its own default.
    if args.metric_for_best_model not in ("eval_kl_set_tail", "eval_nll", "nll"):
        raise ConfigError(
            f"{where}.metric_for_best_model = '{args.metric_for_best_model}' is not measured at capture.p_max = 1, "
            "which keeps no action sets. Known: nll."
        )
    objective = args.build_objective()
    if not objective.uses_sets:
        return
    if args.p not in (None, 1.0):
        raise ProbabilityRangeError(
            f"{where}.p = {args.p}, but capture.p_max = 1 keeps no action sets. Leave p empty, or lower p_max."
        )
    if args.p_budget_nats is not None:
        raise ProbabilityRangeError(
            f"{where}.p_budget_nats = {args.p_budget_nats} needs action sets, and capture.p_max = 1 keeps none. Lower "
            "p_max, or drop the budget."
        )
    if args.off_support != "none":
        raise ConfigError(
            f"{where}.off_support = {args.off_support} has nothing to act on at capture.p_max = 1. Set it to none."
        )
    try:
        check_full_support(objective)
    except TDistillError as error:
        raise type(error)(f"{where}, capture.p_max = 1: {error}") from error


def _explain(error: Any) -> str:
    """One line for one defect: where, what, and for an unknown key the closest known one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"  {where}: unknown key.{did_you_mean(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
    if error["type"] == "value_error":
        return f"  {where or 'recipe'}: {error['ctx']['error']}"
    given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
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
    return list(kind.model_fields if issubclass(kind, BaseModel) else kind.__dataclass_fields__)
