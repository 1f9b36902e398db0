"""The stages of a run, each of which goes on where an earlier, interrupted one stopped."""

from __future__ import annotations

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
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, set_seed

from tdistill.config import Recipe
from tdistill.errors import (
    ConfigError,
    DataFileError,
    ModelNotFoundError,
    ProbabilityRangeError,
    TrainingStoppedError,
)
from tdistill.evaluation.evaluate import evaluate
from tdistill.evaluation.kept import Kept
from tdistill.evaluation.optional import check_inputs
from tdistill.evaluation.prompt_sets import PromptSet, read_prompt_set
from tdistill.evaluation.scope import TEACHER
from tdistill.evaluation.sparsity import sparsity
from tdistill.files import write_atomically
from tdistill.models import check_teacher, load_teacher, make_start
from tdistill.preflight import check_context, check_models, check_one_device, check_room, longest_measured
from tdistill.prompts import (
    Record,
    Template,
    choose_template,
    count_shared,
    read_records,
    read_texts,
    references_by_id,
    tokenize_prompts,
    tokenize_texts,
    tokenizer_sha256,
)
from tdistill.reports.card import write_model_card
from tdistill.reports.html import write_report
from tdistill.run_folder import (
    SPLITS,
    check_asked,
    claim_folder,
    folder_lock,
    note_time,
    only_process,
    publish_copy,
    run_files,
)
from tdistill.store import Store
from tdistill.store.capture import capture as capture_store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_tokenizer, weights_sha256
from tdistill.training.callbacks import Clock, MetricsFile
from tdistill.training.checkpoints import adopt_state, checkpoints_at_once
from tdistill.training.export import export_student
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
        run_files(self.folder)  # before the lock leaves its file in somebody's folder
        with only_process(self.lock, self.say):
            claim_folder(self.folder, recipe, self._is_done, say)

    # ---- stages ----

    @_alone
    def run(self) -> Path:
        """Capture, train, evaluate and report; return the path of the report."""
        asks = not self._has_asked()
        if not asks and self._is_done():
            return self.folder / "report.html"
        check_one_device()
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
            self._say_shared(f"data.{split}", records[split], records["train"])
        for name, source in self._set_sources().items():
            records_of_set, _ = read_prompt_set(name, source, self.recipe.data.turns)
            self._say_shared(f"evaluation.prompt_sets.{name}", records_of_set, records["train"])
        self._references(records["held_out"])
        self._texts()
        check_inputs(self.recipe.evaluation)
        teacher = self.load_teacher()
        template = self._template(teacher.tokenizer)
        prompts = {
            split: self._prompts(
                f"{getattr(self.recipe.data, split)} (data.{split})",
                records[split],
                teacher,
                template,
                with_answers=capture.mode == "score",
            )
            for split in SPLITS
        }
        sets = [of.prompts for of in self._prompt_sets(teacher, template).values()]
        check_models(self.recipe, teacher, list(chain(*prompts.values(), *sets)))
        if self.recipe.student.model is not None:
            self._make_start(teacher)
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
                    note_time(self.folder, "capture", time.perf_counter() - started, add=True)
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
        check_one_device()
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
            publish_copy(self.phase_path(self.recipe.final_phase), self.folder / "student")
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
        check_teacher(self.recipe, teacher, held_out)
        folders = {name: self.phase_path(name) for name in ("start", *self.recipe.phases)}
        attention = self.recipe.student.attn_implementation
        # FlashAttention takes no float32, which students are measured in.
        attention = "sdpa" if "flash" in attention else attention
        subjects = {name: self._load(folder, attention) for name, folder in folders.items()}
        weights = {name: weights_sha256(folder) for name, folder in folders.items()}
        weights[TEACHER] = teacher.identity["weights_sha256"]
        asked = [PromptTokens(row.prompt_id, row.prompt_ids) for row in map(held_out.__getitem__, range(len(held_out)))]
        prompt_sets = self._prompt_sets(teacher, self._template(teacher.tokenizer))
        asked += chain.from_iterable(of.prompts for of in prompt_sets.values())
        for name, model in {TEACHER: teacher.model, **subjects}.items():
            check_context(model.config, name, asked, longest_measured(self.recipe))
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
            prompt_sets=prompt_sets,
        )
        note_time(self.folder, "evaluation", time.perf_counter() - started)
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

    def _is_done(self) -> bool:
        return (self.folder / "report.html").is_file() and self._is_evaluated()

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

    def _captured(self, split: str) -> int | None:
        """Answers in a finished store, or None."""
        path = self.store_path(split)
        return len(Store.open(path, verify=False)) if (path / "manifest.json").is_file() else None

    def _say_shared(self, name: str, records: Sequence[Record], train: Sequence[Record]) -> None:
        if shared := count_shared(records, train):
            self.say(
                f"{shared} of the {len(records)} prompts of {name} are in data.train too; measured on them, a student "
                "looks better than it is"
            )

    def _set_sources(self) -> dict[str, str]:
        return self.recipe.evaluation.prompt_sets or {}

    def _prompt_sets(self, teacher: HFTeacher, template: Template) -> dict[str, PromptSet]:
        """Further prompts to measure on, with their references."""
        sets = {}
        for name, source in self._set_sources().items():
            records, references = read_prompt_set(name, source, self.recipe.data.turns)
            where = f"{source} (evaluation.prompt_sets.{name})"
            sets[name] = PromptSet(self._prompts(where, records, teacher, template, with_answers=False), references)
        return sets

    def _prompts(
        self, where: str, records: Sequence[Record], teacher: HFTeacher, template: Template, with_answers: bool
    ) -> list[PromptTokens]:
        """Tokenise prompts.

        Raises:
            DataFileError and its children: see :func:`tokenize_prompts`; names where they come from.
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
                with_answers=with_answers,
                too_long=data.too_long,
            )
        except DataFileError as error:
            raise type(error)(f"{where}: {error}") from error

    def _make_start(self, teacher: HFTeacher | None) -> None:
        make_start(
            self.recipe, self.phase_path("start"), self.store_path("train"), teacher, self.load_teacher, self.say
        )

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
        check_teacher(self.recipe, teacher, store)
        return teacher

    def _texts(self) -> list[str] | None:
        data = self.recipe.data
        return None if data.text is None else read_texts(data.text)

    def _plain_text(self, tokenizer: Any) -> list[np.ndarray] | None:
        texts, data = self._texts(), self.recipe.data
        return None if texts is None else tokenize_texts(texts, tokenizer, data.text_tokens, f"{data.text} (data.text)")

    def _load(self, folder: Path, attention: str) -> PreTrainedModel:
        model: Any = load_causal_lm(folder, dtype="float32", attn_implementation=attention)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _references(self, records: Sequence[Record]) -> dict[str, tuple[str, ...]] | None:
        data, scored = self.recipe.data, self.recipe.capture.mode == "score"
        return references_by_id(records, f"{data.held_out} (data.held_out)", turns=data.turns, scored=scored)

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
            note_time(self.folder, name, facts.pop("seconds"))
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


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Infinity as text: JSON has no such number."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
