"""The stages of a run, each of which goes on where an earlier, interrupted one stopped."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from tdistill.config import Recipe, TeacherConfig
from tdistill.errors import (
    ConfigError,
    DataFileError,
    EmptyPromptSetError,
    ModelNotFoundError,
    ProbabilityRangeError,
    RunFolderError,
    StoreIdentityError,
    TrainingStoppedError,
    UnsupportedModelError,
)
from tdistill.evaluation.evaluate import evaluate
from tdistill.evaluation.kept import Kept
from tdistill.evaluation.optional import check_inputs
from tdistill.evaluation.scope import TEACHER
from tdistill.evaluation.sparsity import sparsity
from tdistill.evaluation.tasks import check_task_context
from tdistill.files import write_atomically
from tdistill.head import check_head
from tdistill.preflight import check_adapter, check_context, check_finite, check_room
from tdistill.prompts import (
    Record,
    Template,
    check_same_tokenizer,
    check_vocabulary,
    choose_template,
    count_shared,
    read_records,
    read_texts,
    tokenize_prompts,
    tokenizer_sha256,
)
from tdistill.reports.card import write_model_card
from tdistill.reports.html import write_report
from tdistill.run_folder import (
    SPLITS,
    check_asked,
    differing_lines,
    environment,
    folder_lock,
    link_stores,
    only_process,
)
from tdistill.store import Store
from tdistill.store.capture import capture as capture_store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_config, load_tokenizer, resolve_model_folder, weights_sha256
from tdistill.training.callbacks import Clock, MetricsFile
from tdistill.training.checkpoints import adopt_state, checkpoints_at_once
from tdistill.training.export import export_student
from tdistill.training.pruning import block_influence, choose_layers, prune_layers
from tdistill.training.rollouts import Rollouts
from tdistill.training.trainer import TDistillTrainer, last_checkpoint
from tdistill.types import PromptTokens

log = logging.getLogger(__name__)
# Share of cut answers from which on a capture says so.
_MANY_CUT = 0.1
T = TypeVar("T")


def _alone(stage: Callable[[Run], T]) -> Callable[[Run], T]:
    """A stage during which no other process works in the run's folder."""

    @functools.wraps(stage)
    def locked(run: Run) -> T:
        with only_process(run.lock, run.say):
            return stage(run)

    return locked


class Run:
    """A run's folder and the recipe that made it.

    Args:
        recipe: resolved recipe.
        say: receives one line per step, for the terminal.
    Raises:
        ConfigError: one of several processes.
        RunFolderError: the folder holds another run, or things that are no run; names what differs. Also where another
            process works in it, now or when a stage is called.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = log.info) -> None:
        self.recipe, self.say, self.folder = recipe, say, Path(recipe.output)
        self.lock = folder_lock(self.folder)
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(
                f"A run is one process, and this is one of {processes} (WORLD_SIZE). Start tdistill without torchrun "
                "and accelerate; to train in several processes, use TDistillTrainer on the run's stores."
            )
        self._files()  # before the lock leaves its file in somebody's folder
        self._claim_folder()

    # ---- stages ----

    @_alone
    def run(self) -> Path:
        """Capture, train, evaluate and report; return the path of the report."""
        report = self.folder / "report.html"
        asks = not self._has_asked()
        if not asks and report.is_file() and self._is_evaluated():
            return report
        _check_one_device()
        if asks:
            self.capture()
        self.train()
        self.evaluate()
        return self.report()

    def _has_asked(self) -> bool:
        """Whether all stores are whole, and have answers to all prompts that there are now.

        Raises:
            DataFileError: a store has answers to prompts that are not there any more.
        """
        # The recipe says the same as when a whole store was captured; another run's may not be what is asked for here.
        if self.recipe.capture.from_run is not None and not (self.folder / "start").is_dir():
            return False
        if not all((self.store_path(split) / "manifest.json").is_file() for split in SPLITS):
            return False
        whole = True
        for split in SPLITS:
            asked = {record.prompt_id for record in self.records(split)}
            check_asked(self.recipe, self.store_path(split), split, asked)
            stored = {name for name, _ in Store.open(self.store_path(split), verify=False).jobs}
            added = asked - stored - {name.rsplit("#turn-", 1)[0] for name in stored}
            # Prompts that are skipped for their length are in no store.
            whole = whole and (self.recipe.data.too_long == "skip" or not added)
        return whole

    @_alone
    def capture(self) -> None:
        """Ask the teacher for the trajectories of all splits, and make the start of training from it.

        Everything that can be refused is refused before the first answer, which may be hours before the last one.
        """
        capture = self.recipe.capture
        records = {split: self.records(split) for split in SPLITS}
        for split in ("dev", "held_out"):
            if shared := count_shared(records[split], records["train"]):
                self.say(
                    f"{shared} of the {len(records[split])} prompts of data.{split} are in data.train too; measured on "
                    "them, a student looks better than it is"
                )
        self._references(records["held_out"])
        self._texts()
        check_inputs(self.recipe.evaluation)
        teacher = self.load_teacher()
        template = self._template(teacher.tokenizer)
        prompts = {split: self._prompts(split, records[split], teacher, template) for split in SPLITS}
        self._check_models(teacher, [prompt for split in SPLITS for prompt in prompts[split]])
        num_answers = {split: capture.answers_per_prompt if split == "train" else 1 for split in SPLITS}
        for split in SPLITS:
            check_asked(
                self.recipe,
                self.store_path(split),
                split,
                {prompt.prompt_id for prompt in prompts[split]},
                num_answers[split],
            )
        for split in SPLITS:
            before, started = self._captured(split), time.perf_counter()
            try:
                store = capture_store(
                    teacher,
                    prompts[split],
                    self.store_path(split),
                    capture.sampling(),
                    mode=capture.mode,
                    answers_per_prompt=num_answers[split],
                    batch_size=capture.batch_size,
                    shard_prompts=capture.shard_prompts,
                    log_prob_bits=capture.log_prob_bits,
                    tokenizer_sha256=tokenizer_sha256(teacher.tokenizer),
                    template={"kind": template.kind, "sha256": template.sha256},
                )
            finally:  # an interrupted capture has taken its time too
                if before is None or before != self._captured(split):
                    self._note_time("capture", time.perf_counter() - started, add=True)
            self._warn_of_cut_answers(split, store)
            if before is not None and len(store) > before and (self.folder / "phases").is_dir():
                self.say(
                    f"the store of {split} has grown from {before} to {len(store)} answers; what was trained and "
                    f"measured before stays as it is. Delete {self.folder}/phases, student, results.json and "
                    "report.html to do it again."
                )
        self._make_start(teacher)

    @_alone
    def train(self) -> None:
        """Train every phase that is not trained yet.

        Needs the stores and the start; the teacher only for rollouts and for objectives that need it in memory.
        """
        _check_one_device()
        stores = {split: Store.open(self.store_path(split), verify=True) for split in ("train", "dev")}
        for name in self.recipe.phases:
            if (p := self.recipe.arguments(name, "unused").p) is not None and p > stores["train"].p_max:
                raise ProbabilityRangeError(
                    f"phases.{name}.args.p = {p} is above p_max = {stores['train'].p_max} of the store "
                    f"{stores['train'].path}. Lower p, or capture again into another folder."
                )
        self._make_start(None)
        for name in self.recipe.phases:
            self._train_phase(name, stores)
        if not (self.folder / "student").is_dir():
            _publish_copy(self.phase_path(self.recipe.final_phase), self.folder / "student")
        self._join_metrics()

    @_alone
    def evaluate(self) -> Path:
        """Measure teacher, start and phases on the held-out split; return the path of ``results.json``.

        Writes ``scores.json`` too, the values of each prompt; a run that has none, of an older version, is measured
        again.
        """
        path, scores_path, report = (self.folder / name for name in ("results.json", "scores.json", "report.html"))
        if self._is_evaluated():
            self.say(f"reuses the results in {path}")
            return path
        if path.is_file():
            why = "the recipe has changed" if scores_path.is_file() else f"{scores_path} is missing"
            self.say(f"measures again: {why}. `tdistill report` then makes the report again")
        started = time.perf_counter()
        held_out, train = (Store.open(self.store_path(split), verify=True) for split in ("held_out", "train"))
        for name in ("start", *self.recipe.phases):
            if not self.phase_path(name).is_dir():
                raise ModelNotFoundError(
                    f"{self.phase_path(name)} is missing: {name} is not trained yet. Run `tdistill train` first."
                )
        references = self._references(self.records("held_out"))
        teacher = self.load_teacher()
        self._check_teacher(teacher, held_out)
        folders = {name: self.phase_path(name) for name in ("start", *self.recipe.phases)}
        attention = self.recipe.student.attn_implementation
        # FlashAttention takes no float32, which students are measured in.
        attention = "sdpa" if "flash" in attention else attention
        subjects = {name: self._load(folder, attention) for name, folder in folders.items()}
        weights = {name: weights_sha256(folder) for name, folder in folders.items()}
        weights[TEACHER] = teacher.identity["weights_sha256"]
        asked = [PromptTokens(row.prompt_id, row.prompt_ids) for row in map(held_out.__getitem__, range(len(held_out)))]
        for name, model in {TEACHER: teacher.model, **subjects}.items():
            check_context(model.config, name, asked, self._longest_measured())
        pairs = tuple((self.recipe.final_phase, control) for control in self.recipe.controls)
        settings = self.recipe.evaluation.model_copy(update={"compare": self.recipe.evaluation.compare or pairs})
        results = evaluate(
            subjects,
            teacher.model,
            teacher.tokenizer,
            [held_out[i] for i in range(len(held_out))],
            references,
            end_token_ids=held_out.end_token_ids,
            settings=settings,
            teacher_temperature=held_out.identity["sampling"]["temperature"],
            kept=Kept(self.folder / "evaluation", weights),
        )
        self._note_time("evaluation", time.perf_counter() - started)
        content = {
            **json.loads(results.to_json()),
            "format": "tdistill-results",
            "version": 1,
            "name": self.recipe.name,
            "recipe_sha256": self._measured_sha256(),
            "summary": self._summary(subjects, teacher),
            "sparsity": sparsity(train),
        }
        report.unlink(missing_ok=True)  # of earlier results
        if results.scores is not None:
            write_atomically(scores_path, results.scores.model_dump_json() + "\n")
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @_alone
    def report(self) -> Path:
        """Write ``report.html`` and the student's model card from the run's JSON files."""
        write_model_card(self.folder)
        return write_report(self.folder)

    # ---- places ----

    def store_path(self, split: str) -> Path:
        """Folder of a split's store."""
        return self.folder / "store" / split

    def phase_path(self, name: str) -> Path:
        """Model folder that a finished phase leaves; ``start`` is where training begins."""
        return self.folder / "start" if name == "start" else self.folder / "phases" / name / "student"

    # ---- parts ----

    def _template(self, tokenizer: Any) -> Template:
        return choose_template(tokenizer, self.recipe.data.template, self.recipe.data.template_kwargs)

    def _warn_of_cut_answers(self, split: str, store: Store) -> None:
        longest = self.recipe.capture.max_new_tokens
        cut = int((store.response_lengths >= longest).sum())
        if self.recipe.capture.mode == "generate" and cut > _MANY_CUT * len(store):
            self.say(f"{cut:,} of the {len(store):,} answers of {split} are cut: capture.max_new_tokens = {longest}")

    def _is_evaluated(self) -> bool:
        """Whether the results are there, and those that the recipe asks for."""
        path, scores_path = self.folder / "results.json", self.folder / "scores.json"
        if not (path.is_file() and scores_path.is_file()):
            return False
        return bool(json.loads(path.read_text(encoding="utf-8")).get("recipe_sha256") == self._measured_sha256())

    def _measured_sha256(self) -> str:
        """Hash of the parts of the recipe that may change after the capture and that results depend on."""
        parts = yaml.safe_dump(self.recipe.model_dump(include={"evaluation", "phases"}))
        return hashlib.sha256(parts.encode()).hexdigest()

    def load_teacher(self) -> HFTeacher:
        """Load the teacher."""
        self.say(f"loads the teacher {self.recipe.teacher.model}")
        return load_teacher(self.recipe.teacher)

    def records(self, split: str) -> list[Record]:
        """Read the prompts of a split."""
        data = self.recipe.data
        return read_records(getattr(data, split), getattr(data, f"{split}_split"), getattr(data, f"{split}_config"))

    def _files(self) -> set[Path]:
        """Files of the run; raise RunFolderError if there are others only."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Hidden files are the lock, and what a kill has left of something unfinished.
            files = {file for file in self.folder.rglob("*") if file.is_file() and not file.name.startswith(".")}
        except OSError as error:
            raise RunFolderError(
                f"{self.folder} cannot be used: {error.strerror}. Choose another folder with output=FOLDER."
            ) from error
        if files and self.folder / "recipe.yaml" not in files:
            raise RunFolderError(
                f"{self.folder} exists and is no run of tdistill. Choose another folder with output=FOLDER."
            )
        return files

    @_alone
    def _claim_folder(self) -> None:
        path, environment_path = self.folder / "recipe.yaml", self.folder / "environment.json"
        files = self._files()
        if (stores := self.folder / "store").is_symlink() and not stores.exists():
            raise RunFolderError(
                f"{stores} leads to {stores.readlink()}, the answers of another run (capture.from_run), which are not "
                "there any more. Put that folder back, or choose another folder with output=FOLDER."
            )
        # A run that was refused before its first answer leaves these two; its recipe may be corrected.
        begun = bool(files) and files != {path, environment_path}
        differing = differing_lines(self.folder, self.recipe, begun) if files else []
        if not begun:
            link_stores(self.folder, self.recipe.capture.from_run)
        elif any(line.startswith("phases.") for line in differing):
            # A copy of what was the final phase.
            shutil.rmtree(self.folder / "student", ignore_errors=True)
        if not files or differing:
            write_atomically(path, self.recipe.to_yaml())
        if files and (begun or not differing):
            done = (self.folder / "report.html").is_file() and self._is_evaluated()
            self.say("; ".join([f"{'reuses' if done else 'resumes'} the run in {self.folder}", *differing]))
        if not environment_path.is_file():
            write_atomically(environment_path, json.dumps(environment(), indent=1) + "\n")

    def _captured(self, split: str) -> int | None:
        """Answers in a finished store, or None."""
        path = self.store_path(split)
        return len(Store.open(path, verify=False)) if (path / "manifest.json").is_file() else None

    def _prompts(
        self, split: str, records: Sequence[Record], teacher: HFTeacher, template: Template
    ) -> list[PromptTokens]:
        """Tokenise the prompts of a split.

        Raises:
            DataFileError and its children: see :func:`tokenize_prompts`; names the source.
        """
        data, capture = self.recipe.data, self.recipe.capture
        try:
            return tokenize_prompts(
                records,
                teacher.tokenizer,
                template,
                end_token_ids=teacher.end_token_ids,
                max_prompt_tokens=data.max_prompt_tokens,
                max_new_tokens=capture.max_new_tokens,
                turns=data.turns,
                with_answers=capture.mode == "score",
                too_long=data.too_long,
            )
        except DataFileError as error:
            raise type(error)(f"{getattr(data, split)} (data.{split}): {error}") from error

    def _check_models(self, teacher: HFTeacher, prompts: Sequence[PromptTokens]) -> None:
        """Find out before the capture whether teacher and student can do what comes after it."""
        recipe = self.recipe
        check_vocabulary(teacher.identity["vocab_size"], teacher.tokenizer, f"The teacher {recipe.teacher.model}")
        config = teacher.model.config
        max_new_tokens = max(recipe.capture.max_new_tokens, self._longest_measured())
        configs = {f"the teacher {recipe.teacher.model}": config}
        check_context(config, f"the teacher {recipe.teacher.model}", prompts, max_new_tokens)
        if recipe.student.layers is not None:
            num_layers = config.get_text_config().num_hidden_layers
            choose_layers(num_layers, recipe.student.layers, "even")
            try:
                # Some architectures cannot be pruned or have another head; any two layers tell.
                prune_layers(teacher.model, choose_layers(num_layers, min(num_layers, 2), "even"))
                check_head(teacher.model)
            except UnsupportedModelError:
                check_finite(teacher, prompts[0])
                raise
        else:
            assert recipe.student.model is not None
            config = load_config(resolve_model_folder(recipe.student.model, revision=recipe.student.revision))
            configs[f"the student {recipe.student.model}"] = config
            check_context(config, f"the student {recipe.student.model}", prompts, max_new_tokens)
        for name, task in (recipe.evaluation.tasks or {}).items():
            check_task_context(name, task, teacher.tokenizer, configs)
        attention = recipe.student.attn_implementation
        try:
            with torch.device("meta"):
                student = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"student.attn_implementation = {attention}: {error}") from error
        if recipe.peft is not None:
            check_adapter(student, recipe.peft)
        if recipe.student.model is not None:
            self._make_start(teacher)

    def _longest_measured(self) -> int:
        """Tokens of the longest answer of an evaluation; timed ones do not end before."""
        return max(self.recipe.evaluation.max_new_tokens, self.recipe.evaluation.speed_tokens)

    def _check_teacher(self, teacher: HFTeacher, store: Store) -> None:
        found, stored = teacher.identity["weights_sha256"], store.identity["teacher"]["weights_sha256"]
        if found != stored:
            raise StoreIdentityError(
                f"The weights of the teacher {self.recipe.teacher.model} have hash {found}, the store {store.path} was "
                f"made by {stored}. Point teacher.model to that teacher, or capture again into another folder."
            )

    def _make_start(self, teacher: HFTeacher | None) -> None:
        """Make the start once: a copy of the student folder, or the teacher with some of its layers."""
        path, config = self.folder / "start", self.recipe.student
        if path.is_dir():
            return
        facts: dict[str, Any]
        if config.model is not None:
            folder = resolve_model_folder(config.model, revision=config.revision)
            model, tokenizer = load_causal_lm(folder, dtype="float32"), load_tokenizer(folder)
            if teacher is not None:
                expected, end_ids = tokenizer_sha256(teacher.tokenizer), teacher.end_token_ids
                teachers = teacher.tokenizer
            else:
                store = Store.open(self.store_path("train"), verify=False)
                expected, end_ids = store.identity["tokenizer_sha256"], store.end_token_ids
                of = self.recipe.teacher
                place = resolve_model_folder(of.model, of.gguf_file, of.model_kwargs.get("revision"))
                teachers = load_tokenizer(place, gguf_file=of.gguf_file)
            check_same_tokenizer(expected, tokenizer, f"the student {config.model}")
            check_vocabulary(model.get_output_embeddings().weight.shape[0], tokenizer, f"The student {config.model}")
            check_head(model)
            facts = {"name": config.model, "kept_layers": None}
        else:
            assert config.layers is not None
            teacher = teacher or self.load_teacher()
            store = Store.open(self.store_path("train"), verify=True)
            self._check_teacher(teacher, store)
            rows = [store[i] for i in range(min(config.calibration_answers, len(store)))]
            tokens = [np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64) for row in rows]
            influence = block_influence(teacher.model, map(torch.from_numpy, tokens))
            layers = choose_layers(len(influence), config.layers, config.method, influence)
            self.say(f"keeps layers {layers} of {len(influence)} ({config.method})")
            teachers = teacher.tokenizer
            model, tokenizer, end_ids = prune_layers(teacher.model, layers), copy.copy(teachers), store.end_token_ids
            facts = {"name": f"{self.recipe.teacher.model} (pruned)", "kept_layers": layers}
            facts["block_influence"] = influence
        # The student is to be asked as it was trained, and its own template, if it has one, may be another.
        tokenizer.chat_template = self._template(teachers).for_tokenizer(tokenizer)
        export_student(model, tokenizer, path, sorted(end_ids), extra={"start.json": json.dumps(facts, indent=1)})

    def _train_phase(self, name: str, stores: dict[str, Store]) -> None:
        path = self.phase_path(name)
        if path.is_dir():
            self.say(f"reuses phase {name}")
            return
        checkpoints = path.parent / "checkpoints"
        args = self.recipe.arguments(name, str(checkpoints))
        # Without the optimizer's state the phase would go on as another one.
        last = None if args.save_only_model else last_checkpoint(checkpoints)
        state = None if last is None else adopt_state(Path(last))
        self.say(f"trains phase {name}" + (f" on from {Path(last).name}" if last else ""))
        init = self.phase_path(self.recipe.init_of(name))
        model, tokenizer = self._load(init, self.recipe.student.attn_implementation), load_tokenizer(init)
        adapter = None
        if self.recipe.peft is not None:
            from peft import LoraConfig

            adapter = LoraConfig(**self.recipe.peft)
        set_seed(args.seed)  # adapters are drawn at random, whatever this process did before
        teacher = self._scorer(stores["train"]) if args.build_objective().needs_teacher else None
        metrics = MetricsFile(name, path.parent / "metrics.jsonl")
        clock = Clock(None if last is None else Path(last))
        trainer = TDistillTrainer(
            model,
            args,
            stores["train"],
            stores["dev"],
            tokenizer,
            peft_config=adapter,
            text_dataset=self._plain_text(tokenizer),
            rollouts=self._rollouts(name, stores["train"], teacher),
            teacher=None if teacher is None else teacher.model,
            callbacks=[metrics, clock],
        )
        check_room(self.folder, trainer, checkpoints_at_once(args, stores["train"]))
        if state is not None and state.global_step >= state.max_steps:
            # Only the export was missing. transformers would train one more step from here.
            trainer.state = state
            best = state.best_model_checkpoint if args.load_best_model_at_end else None
            trainer._load_from_checkpoint(str(best or last))
            metrics.begin(state)
        else:
            trainer.train(resume_from_checkpoint=last)
            if trainer.state.global_step < trainer.state.max_steps:
                raise TrainingStoppedError(
                    f"Phase {name} stopped at step {trainer.state.global_step} of {trainer.state.max_steps} (a signal "
                    "asked for it, or a callback). Start again: it goes on from its last checkpoint."
                )
        trainer.evaluate()
        facts = {
            "response_tokens": trainer.state.num_input_tokens_seen,
            "steps": trainer.state.global_step,
            "seconds": clock.seconds(),
        }
        export_student(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            path,
            stores["train"].end_token_ids,
            extra={"phase.json": json.dumps(facts, indent=1)},
        )
        if (logs := checkpoints / "runs").is_dir():  # TensorBoard's
            shutil.rmtree(path.parent / "runs", ignore_errors=True)
            logs.rename(path.parent / "runs")
        shutil.rmtree(checkpoints, ignore_errors=True)
        if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
            wandb.finish()  # or the next phase would go on in this one's run

    def _rollouts(self, name: str, store: Store, teacher: HFTeacher | None) -> Rollouts | None:
        """Rounds of the student's answers to the prompts of the store, for a phase that asks for them.

        A teacher that is in memory scores them; else one is loaded for each round.
        """
        settings = self.recipe.phases[name].rollouts
        if settings is None:
            return None

        rows = (store[i] for i, (_, answer_index) in enumerate(store.jobs) if answer_index == 0)
        prompts = [PromptTokens(row.prompt_id, row.prompt_ids) for row in rows]
        template = store.identity["template"]
        sampling = self.recipe.capture.sampling()
        return Rollouts(settings, prompts, lambda: teacher or self._scorer(store), sampling, template)

    def _scorer(self, store: Store) -> HFTeacher:
        """The teacher that a store was captured from."""
        teacher = self.load_teacher()
        self._check_teacher(teacher, store)
        return teacher

    def _texts(self) -> list[str] | None:
        data = self.recipe.data
        return None if data.text is None else read_texts(data.text)

    def _plain_text(self, tokenizer: Any) -> list[np.ndarray] | None:
        texts, length = self._texts(), self.recipe.data.text_tokens
        if texts is None:
            return None
        rows = [
            np.array(tokenizer(text, truncation=True, max_length=length, add_special_tokens=False)["input_ids"])
            for text in texts
        ]
        # A single token has nothing before it that could predict it.
        if not (rows := [row.astype(np.int64) for row in rows if len(row) > 1]):
            raise EmptyPromptSetError(f"{self.recipe.data.text} (data.text) holds no text of two tokens or more.")
        return rows

    def _load(self, folder: Path, attention: str) -> PreTrainedModel:
        model: Any = load_causal_lm(folder, dtype="float32", attn_implementation=attention)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _references(self, records: Sequence[Record]) -> dict[str, tuple[str, ...]] | None:
        """Texts written by people, by the ids that the store has; None where there are none.

        Raises:
            DataFileError: some prompts have one and others have not; names one of the latter.
        """
        found: dict[str, tuple[str, ...]] = {}
        for record in records:
            given = [message["content"] for message in record.messages if message["role"] == "assistant"]
            open_turn = record.messages[-1]["role"] == "user"
            if self.recipe.data.turns == "all" and given:
                found |= {f"{record.prompt_id}#turn-{turn}": (text,) for turn, text in enumerate(given)}
                if open_turn and self.recipe.capture.mode == "generate":
                    found[f"{record.prompt_id}#turn-{len(given)}"] = record.references
            elif self.recipe.capture.mode == "score" and given:
                found[record.prompt_id] = (given[-1],)
            else:
                found[record.prompt_id] = record.references
        without = [prompt_id for prompt_id, texts in found.items() if not texts]
        if without and len(without) < len(found):
            raise DataFileError(
                f"{self.recipe.data.held_out} (data.held_out): prompt '{without[0]}' has no reference answer, and "
                f"{len(found) - len(without)} others have one. Add one to each prompt under 'output', or to none."
            )
        return None if without else found

    def _join_metrics(self) -> None:
        lines = [
            line
            for name in self.recipe.phases
            for line in (self.folder / "phases" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True)
        ]
        write_atomically(self.folder / "metrics.jsonl", "".join(lines))

    def _summary(self, subjects: dict[str, PreTrainedModel], teacher: HFTeacher) -> dict[str, Any]:
        start = json.loads((self.folder / "start" / "start.json").read_text())
        stores = {split: Store.open(self.store_path(split), verify=False) for split in SPLITS}
        phases = []
        for name, phase in self.recipe.phases.items():
            facts = json.loads((self.phase_path(name) / "phase.json").read_text())
            self._note_time(name, facts.pop("seconds"))
            objective = phase.args.get("objective", "iq_learn")
            phases.append(
                {
                    "name": name,
                    "objective": objective if isinstance(objective, str) else objective["name"],
                    "control": phase.control,
                    "init": self.recipe.init_of(name),
                    **facts,
                }
            )
        final = self.recipe.arguments(self.recipe.final_phase, str(self.folder))
        objective = final.build_objective()
        return {
            "teacher": {
                "name": self.recipe.teacher.model,
                "num_layers": teacher.model.config.get_text_config().num_hidden_layers,
                "num_parameters": teacher.model.num_parameters(),
            },
            "student": {
                "name": start["name"],
                "num_layers": subjects["start"].config.get_text_config().num_hidden_layers,
                "kept_layers": start["kept_layers"],
                "num_parameters": subjects["start"].num_parameters(),
            },
            "objective": {
                "name": objective.name,
                **_json_values(vars(objective)),
                "off_support": final.off_support,
                "p": final.p,
            },
            "final_phase": self.recipe.final_phase,
            "num_prompts": {split: len({prompt for prompt, _ in store.jobs}) for split, store in stores.items()},
            "response_tokens": {split: store.total_response_tokens for split, store in stores.items()},
            "times_s": json.loads((self.folder / "times.json").read_text()),
            "phases": phases,
        }

    def _note_time(self, stage: str, seconds: float, add: bool = False) -> None:
        path = self.folder / "times.json"
        times = json.loads(path.read_text()) if path.is_file() else {}
        before = times.get(stage, 0.0) if add else 0.0
        write_atomically(path, json.dumps({**times, stage: round(before + seconds, 1)}, indent=1) + "\n")


def load_teacher(config: TeacherConfig) -> HFTeacher:
    """Load the teacher that a recipe names.

    Raises:
        ConfigError: ``model_kwargs`` that ``from_pretrained`` does not know.
        ModelNotFoundError: see :func:`~tdistill.teachers.loading.resolve_model_folder`.
    """
    extra = {} if config.device_map is None else {"device_map": config.device_map}
    try:
        teacher = HFTeacher.from_pretrained(
            config.model, gguf_file=config.gguf_file, dtype=config.dtype, **extra, **config.model_kwargs
        )
    except TypeError as error:
        if not config.model_kwargs:
            raise
        raise ConfigError(
            f"teacher.model_kwargs = {config.model_kwargs} are refused: {error}. They are arguments of "
            "from_pretrained; what quantises goes into quantization_config."
        ) from error
    # A model with a device map is where that says; some kinds of quantisation choose a GPU themselves.
    if config.device_map is None and torch.cuda.is_available() and teacher.model.device.type == "cpu":
        teacher.model.to("cuda")
    return teacher


def _check_one_device() -> None:
    """Raise ConfigError where transformers would train on several GPUs at once in one process."""
    if (count := torch.cuda.device_count()) > 1:
        raise ConfigError(
            f"{count} GPUs are visible, and a run trains on one. Set CUDA_VISIBLE_DEVICES=0; a teacher that needs more "
            "is asked first with all of them: `tdistill capture`, and then `tdistill run` with one."
        )


def _publish_copy(source: Path, target: Path) -> None:
    """Copy a folder so that it appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Infinity as text: JSON has no such number."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def batch_size_effect(
    recipe: Recipe, num_prompts: int = 64, batch_sizes: tuple[int, ...] = (1, 8, 32)
) -> dict[str, Any]:
    """Share of sampled answers that differ between batch sizes: sums of floats depend on the shape of a batch.

    Returns:
        ``num_answers``, ``batch_sizes`` and ``changed_share``, the share of answers that are not the same in all.
    """
    teacher = load_teacher(recipe.teacher)
    data, capture = recipe.data, recipe.capture
    prompts = tokenize_prompts(
        read_records(data.train, data.train_split, data.train_config)[:num_prompts],
        teacher.tokenizer,
        choose_template(teacher.tokenizer, data.template, data.template_kwargs),
        end_token_ids=teacher.end_token_ids,
        max_prompt_tokens=data.max_prompt_tokens,
        max_new_tokens=capture.max_new_tokens,
        turns=data.turns,
        too_long=data.too_long,
    )
    answers = []
    for size in batch_sizes:
        batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        drawn = [t for batch in batches for t in teacher.generate([(p, 0) for p in batch], capture.sampling())]
        answers.append([trajectory.response_ids.tolist() for trajectory in drawn])
    changed = sum(len({str(row) for row in rows}) > 1 for rows in zip(*answers, strict=True))
    return {"num_answers": len(prompts), "batch_sizes": list(batch_sizes), "changed_share": changed / len(prompts)}
