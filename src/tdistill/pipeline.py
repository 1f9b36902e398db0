"""The stages of a run, each of which goes on where an earlier, interrupted one stopped."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tdistill.config import Recipe
from tdistill.errors import NoSpaceError, RunFolderError, StoreIdentityError
from tdistill.evaluation.evaluate import evaluate
from tdistill.evaluation.records import Results
from tdistill.evaluation.sparsity import sparsity
from tdistill.prompts import Record, choose_template, read_records, tokenize_prompts, tokenizer_sha256
from tdistill.reports.card import write_model_card
from tdistill.reports.html import write_report
from tdistill.reports.write import write_atomically
from tdistill.store import Store
from tdistill.store.capture import capture as capture_store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_tokenizer, resolve_model_folder
from tdistill.training.export import export_student
from tdistill.training.pruning import block_influence, choose_layers, prune_layers
from tdistill.training.trainer import TDistillTrainer

SPLITS = ("train", "dev", "held_out")
log = logging.getLogger(__name__)


class Run:
    """A run's folder and the recipe that made it.

    Args:
        recipe: resolved recipe.
        say: receives one line per step, for the terminal.
    Raises:
        RunFolderError: the folder holds another run, or things that are no run; names what differs.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = log.info) -> None:
        self.recipe, self.say, self.folder = recipe, say, Path(recipe.output)
        self._claim_folder()

    # ---- stages ----

    def run(self) -> Path:
        """Capture, train, evaluate and report; return the path of the report."""
        report = self.folder / "report.html"
        if report.is_file():
            return report
        # The recipe of this folder has not changed, so a whole store is the one asked for; `capture` looks closer.
        if not all((self.store_path(split) / "manifest.json").is_file() for split in SPLITS):
            self.capture()
        self.train()
        self.evaluate()
        return self.report()

    def capture(self) -> None:
        """Ask the teacher for the trajectories of all splits, and make the start of training from it."""
        started, teacher = time.perf_counter(), None
        capture = self.recipe.capture
        for split in SPLITS:
            teacher = teacher or self.load_teacher()
            template = choose_template(teacher.tokenizer, self.recipe.data.template)
            prompts = tokenize_prompts(
                self.records(split),
                teacher.tokenizer,
                template,
                end_token_ids=teacher.end_token_ids,
                max_prompt_tokens=self.recipe.data.max_prompt_tokens,
                max_new_tokens=capture.max_new_tokens,
                turns=self.recipe.data.turns,
                with_answers=capture.mode == "score",
                too_long=self.recipe.data.too_long,
            )
            capture_store(
                teacher,
                prompts,
                self.store_path(split),
                capture.sampling(),
                mode=capture.mode,
                answers_per_prompt=capture.answers_per_prompt if split == "train" else 1,
                batch_size=capture.batch_size,
                shard_prompts=capture.shard_prompts,
                log_prob_bits=capture.log_prob_bits,
                tokenizer_sha256=tokenizer_sha256(teacher.tokenizer),
                template={"kind": template.kind, "sha256": template.sha256},
            )
        self._make_start(teacher)
        self._note_time("capture", time.perf_counter() - started)

    def train(self) -> None:
        """Train every phase that is not trained yet. Needs the stores and the start, not the teacher."""
        stores = {split: Store.open(self.store_path(split)) for split in ("train", "dev")}
        self._make_start(None)
        for name in self.recipe.phases:
            self._train_phase(name, stores)
        if not (self.folder / "student").is_dir():
            _publish_copy(self.phase_path(self.recipe.final_phase), self.folder / "student")
        self._join_metrics()

    def evaluate(self) -> Results:
        """Measure teacher, start and phases on the held-out split; write ``results.json``."""
        path = self.folder / "results.json"
        if path.is_file():
            self.say(f"reuses the results in {path}")
            return Results.from_json(path.read_text(encoding="utf-8"))
        started = time.perf_counter()
        held_out, train = Store.open(self.store_path("held_out")), Store.open(self.store_path("train"))
        teacher = self.load_teacher()
        if teacher.identity["weights_sha256"] != held_out.identity["teacher"]["weights_sha256"]:
            raise StoreIdentityError(
                f"The teacher's weights have hash {teacher.identity['weights_sha256']}, the store {held_out.path} was "
                f"made by {held_out.identity['teacher']['weights_sha256']}. Point teacher.model to that teacher."
            )
        subjects = {"start": self._load(self.folder / "start")}
        subjects |= {name: self._load(self.phase_path(name)) for name in self.recipe.phases}
        pairs = tuple((self.recipe.final_phase, control) for control in self.recipe.controls)
        settings = self.recipe.evaluation.model_copy(update={"compare": self.recipe.evaluation.compare or pairs})
        results = evaluate(
            subjects,
            teacher.model,
            teacher.tokenizer,
            [held_out[i] for i in range(len(held_out))],
            self._references(),
            end_token_ids=held_out.end_token_ids,
            settings=settings,
        )
        self._note_time("evaluation", time.perf_counter() - started)
        content = {
            **json.loads(results.to_json()),
            "format": "tdistill-results",
            "version": 1,
            "name": self.recipe.name,
            "summary": self._summary(subjects, teacher),
            "sparsity": sparsity(train),
        }
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return results

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

    def load_teacher(self) -> HFTeacher:
        """Load the teacher."""
        config = self.recipe.teacher
        self.say(f"loads the teacher {config.model}")
        extra = {} if config.device_map is None else {"device_map": config.device_map}
        return HFTeacher.from_pretrained(
            config.model, gguf_file=config.gguf_file, dtype=config.dtype, **extra, **config.model_kwargs
        )

    def records(self, split: str) -> list[Record]:
        """Read the prompts of a split."""
        data = self.recipe.data
        return read_records(getattr(data, split), getattr(data, f"{split}_split"))

    def _claim_folder(self) -> None:
        path, text = self.folder / "recipe.yaml", self.recipe.to_yaml()
        if path.is_file():
            differing = _differences(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text))
            if differing:
                raise RunFolderError(
                    f"{self.folder} holds another run; it differs in:\n  " + "\n  ".join(differing) + "\n"
                    "Choose another folder with output=FOLDER, or delete this one."
                )
            done = (self.folder / "report.html").is_file()
            self.say(f"{'reuses' if done else 'resumes'} the run in {self.folder}")
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RunFolderError(
                f"{self.folder} exists and is no run of tdistill. Choose another folder with output=FOLDER."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
        write_atomically(path, text)

    def _make_start(self, teacher: HFTeacher | None) -> None:
        """Make the start once: a copy of the student folder, or the teacher with some of its layers."""
        path, config = self.folder / "start", self.recipe.student
        if path.is_dir():
            return
        facts: dict[str, Any]
        if config.model is not None:
            folder = resolve_model_folder(config.model)
            model, tokenizer = load_causal_lm(folder, dtype="float32"), load_tokenizer(folder)
            facts = {"name": config.model, "kept_layers": None}
        else:
            assert config.layers is not None
            teacher = teacher or self.load_teacher()
            store = Store.open(self.store_path("train"))
            rows = [store[i] for i in range(min(config.calibration_answers, len(store)))]
            tokens = [np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64) for row in rows]
            influence = block_influence(teacher.model, map(torch.from_numpy, tokens))
            layers = choose_layers(len(influence), config.layers, config.method, influence)
            self.say(f"keeps layers {layers} of {len(influence)} ({config.method})")
            model, tokenizer = prune_layers(teacher.model, layers), teacher.tokenizer
            facts = {"name": f"{self.recipe.teacher.model}, {len(layers)} layers", "kept_layers": layers}
            facts["block_influence"] = influence
        end_ids = Store.open(self.store_path("train"), verify=False).end_token_ids
        export_student(model, tokenizer, path, end_ids, extra={"start.json": json.dumps(facts, indent=1)})

    def _train_phase(self, name: str, stores: dict[str, Store]) -> None:
        path = self.phase_path(name)
        if path.is_dir():
            self.say(f"reuses phase {name}")
            return
        started = time.perf_counter()
        checkpoints = path.parent / "checkpoints"
        last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        self.say(f"trains phase {name}" + (f" on from {Path(last).name}" if last else ""))
        init = self.phase_path(self.recipe.init_of(name))
        model, tokenizer = self._load(init), load_tokenizer(init)
        args = self.recipe.arguments(name, str(checkpoints))
        _check_room(self.folder, model, args.save_total_limit or 3)
        adapter = None
        if self.recipe.peft is not None:
            from peft import LoraConfig

            adapter = LoraConfig(**self.recipe.peft)
        trainer = TDistillTrainer(
            model,
            args,
            stores["train"],
            stores["dev"],
            tokenizer,
            peft_config=adapter,
            text_dataset=self._plain_text(tokenizer),
            callbacks=[_MetricsFile(name, path.parent / "metrics.jsonl")],
        )
        trainer.train(resume_from_checkpoint=last)
        trainer.evaluate()
        facts = {
            "response_tokens": trainer.state.num_input_tokens_seen,
            "steps": trainer.state.global_step,
            "seconds": time.perf_counter() - started,
        }
        export_student(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            path,
            stores["train"].end_token_ids,
            extra={"phase.json": json.dumps(facts, indent=1)},
        )
        shutil.rmtree(checkpoints, ignore_errors=True)

    def _plain_text(self, tokenizer: Any) -> list[np.ndarray] | None:
        data = self.recipe.data
        if data.text is None:
            return None
        texts = [record.messages[0]["content"] for record in read_records(data.text)]
        return [
            np.array(
                tokenizer(text, truncation=True, max_length=data.text_tokens, add_special_tokens=False)["input_ids"]
            )
            for text in texts
        ]

    def _load(self, folder: Path) -> PreTrainedModel:
        attention = self.recipe.student.attn_implementation
        model: Any = load_causal_lm(folder, dtype="float32", attn_implementation=attention)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _references(self) -> dict[str, tuple[str, ...]] | None:
        found = {record.prompt_id: record.references for record in self.records("held_out") if record.references}
        return found or None

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
            "objective": {"name": objective.name, **vars(objective), "off_support": final.off_support, "p": final.p},
            "final_phase": self.recipe.final_phase,
            "num_prompts": {split: len({prompt for prompt, _ in store.jobs}) for split, store in stores.items()},
            "response_tokens": {split: store.total_response_tokens for split, store in stores.items()},
            "times_s": json.loads((self.folder / "times.json").read_text()),
            "phases": phases,
        }

    def _note_time(self, stage: str, seconds: float) -> None:
        path = self.folder / "times.json"
        times = json.loads(path.read_text()) if path.is_file() else {}
        write_atomically(path, json.dumps({**times, stage: times.get(stage, round(seconds, 1))}, indent=1) + "\n")


class _MetricsFile(TrainerCallback):
    """Appends each log line to a file; after a resume the file first goes back to what the checkpoint knows."""

    def __init__(self, phase: str, path: Path) -> None:
        self.phase, self.path = phase, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(self._line(entry) for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(state.log_history[-1]))

    def _line(self, entry: dict[str, Any]) -> str:
        return json.dumps({"phase": self.phase, **entry}) + "\n"


def environment() -> dict[str, Any]:
    """Versions and machine, for ``environment.json``."""
    packages = ("tdistill", "torch", "transformers", "accelerate", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _differences(stored: Any, asked: Any, key: str = "") -> list[str]:
    """Lines ``key: stored X, asked Y`` for every leaf that differs."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for name in sorted({*stored, *asked}):
            lines += _differences(stored.get(name), asked.get(name), f"{key}.{name}" if key else str(name))
        return lines
    return [] if stored == asked else [f"{key}: stored {stored!r}, asked {asked!r}"]


def _publish_copy(source: Path, target: Path) -> None:
    """Copy a folder so that it appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def _check_room(folder: Path, model: PreTrainedModel, num_checkpoints: int) -> None:
    """Weights with two optimizer moments per checkpoint, one being written, and the finished weights.

    Raises:
        NoSpaceError: less room than that; names both figures.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed, free = weights * (3 * (num_checkpoints + 1) + 1), shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpaceError(
            f"Training needs up to {needed / 1e9:.1f} GB in {folder} for checkpoints; {free / 1e9:.1f} GB are free. "
            "Make room, choose another output folder, or lower save_total_limit."
        )


def batch_size_effect(
    recipe: Recipe, num_prompts: int = 64, batch_sizes: tuple[int, ...] = (1, 8, 32)
) -> dict[str, Any]:
    """Share of sampled answers that differ between batch sizes: sums of floats depend on the shape of a batch.

    Returns:
        ``num_answers``, ``batch_sizes`` and ``changed_share``, the share of answers that are not the same in all.
    """
    teacher = HFTeacher.from_pretrained(
        recipe.teacher.model,
        gguf_file=recipe.teacher.gguf_file,
        dtype=recipe.teacher.dtype,
        **recipe.teacher.model_kwargs,
    )
    data, capture = recipe.data, recipe.capture
    prompts = tokenize_prompts(
        read_records(data.train, data.train_split)[:num_prompts],
        teacher.tokenizer,
        choose_template(teacher.tokenizer, data.template),
        end_token_ids=teacher.end_token_ids,
        max_prompt_tokens=data.max_prompt_tokens,
        max_new_tokens=capture.max_new_tokens,
        too_long=data.too_long,
    )
    answers = []
    for size in batch_sizes:
        batches = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        drawn = [t for batch in batches for t in teacher.generate([(p, 0) for p in batch], capture.sampling())]
        answers.append([trajectory.response_ids.tolist() for trajectory in drawn])
    changed = sum(len({str(row) for row in rows}) > 1 for rows in zip(*answers, strict=True))
    return {"num_answers": len(prompts), "batch_sizes": list(batch_sizes), "changed_share": changed / len(prompts)}
