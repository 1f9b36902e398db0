"""What a run's folder may hold when a recipe is started in it: its own, or what that recipe can go on from."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from tdistill.config import Recipe
from tdistill.errors import DataFileError, RunFolderError, TDistillError
from tdistill.files import publish, write_atomically
from tdistill.store.read import kept_jobs

SPLITS = ("train", "dev", "held_out")
# What a machine has room for; answers and students do not depend on it, but for the rounding of sums.
_HOW_IT_IS_ASKED = ("teacher.device_map:", "capture.batch_size:", "capture.shard_prompts:")
_HOW_IT_IS_TRAINED = re.compile(
    r"dataloader_|disable_tqdm|(gradient|activation)_checkpointing|logging_|report_to|run_name"
)


def folder_lock(folder: Path) -> FileLock:
    """The lock of a run's folder. Its file is hidden, as what says nothing about a run, and stays."""
    return FileLock(folder / ".lock", timeout=0)


@contextmanager
def only_process(lock: FileLock, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run's folder, which may be held by the same object already.

    Raises:
        RunFolderError: another process holds it.
    """
    folder = Path(lock.lock_file).parent
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFolderError(
            f"Another process works in {folder}. Wait for it, or choose another folder with output=FOLDER."
        ) from error
    except (OSError, NotImplementedError) as error:  # a read-only folder, a file system without locks
        say(f"{folder} cannot be locked ({error}); start no second process there")
    try:
        yield
    finally:
        lock.release()


def run_files(folder: Path) -> set[Path]:
    """Files of the run; raise RunFolderError if there are others only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Hidden files are the lock, and what a kill has left of something unfinished.
        files = {file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")}
    except OSError as error:
        raise RunFolderError(
            f"{folder} cannot be used: {error.strerror}. Choose another folder with output=FOLDER."
        ) from error
    if files and folder / "recipe.yaml" not in files:
        raise RunFolderError(f"{folder} exists and is no run of tdistill. Choose another folder with output=FOLDER.")
    return files


def claim_folder(folder: Path, recipe: Recipe, done: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Make a folder that of a recipe, or find that it is already.

    Args:
        folder: that this process has locked.
        recipe: that is started in it.
        done: whether the run is finished.
        say: receives what goes on from where, and what differs.
    Raises:
        RunFolderError: it holds another run, or things that are no run, or links to answers that are gone.
    """
    path, environment_path = folder / "recipe.yaml", folder / "environment.json"
    files = run_files(folder)
    if (stores := folder / "store").is_symlink() and not stores.exists():
        raise RunFolderError(
            f"{stores} leads to {stores.readlink()}, the answers of another run (capture.from_run), which are not "
            "there any more. Put that folder back, or choose another folder with output=FOLDER."
        )
    # A run that was refused before its first answer leaves these two; its recipe may be corrected.
    begun = bool(files) and files != {path, environment_path}
    differing = differing_lines(folder, recipe, begun) if files else []
    if not begun:
        link_stores(folder, recipe.capture.from_run)
    elif any(line.startswith("phases.") for line in differing):
        # A copy of what was the final phase.
        shutil.rmtree(folder / "student", ignore_errors=True)
    if not files or differing:
        write_atomically(path, recipe.to_yaml())
    if files and (begun or not differing):
        say("; ".join([f"{'reuses' if done() else 'resumes'} the run in {folder}", *differing]))
    if not environment_path.is_file():
        write_atomically(environment_path, json.dumps(environment(), indent=1) + "\n")


def differing_lines(folder: Path, recipe: Recipe, begun: bool) -> list[str]:
    """What differs between the recipe in a folder and this one, a line each; the folder's place is no difference.

    In a run that has begun the evaluation may differ, phases that are not trained, and what changes no answer and no
    student.

    Raises:
        RunFolderError: anything else differs, or the file is not readable.
    """
    path = folder / "recipe.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"{path} is not readable: {error}. Restore it, or choose another folder with output=FOLDER."
        ) from error
    if not isinstance(stored, dict):
        raise RunFolderError(f"{path} is no recipe. Restore it, or choose another folder with output=FOLDER.")
    stored, asked = _with_defaults(stored), yaml.safe_load(recipe.to_yaml())
    differing = _differences({**stored, "output": None}, {**asked, "output": None})
    before, phases = stored.get("phases") or {}, asked["phases"]
    trained = [name for name in phases if (folder / "phases" / name).is_dir()]
    others = [name for name in trained if _lineage(before, name) != _lineage(phases, name)]
    fixed = [line for line in differing if not line.startswith(("evaluation.", "phases.", *_HOW_IT_IS_ASKED))]
    if not begun or not (fixed or others):
        return differing
    remedies = ["Choose another folder with output=FOLDER", "delete this one"]
    if not any(line.startswith(("teacher.", "data.", "capture.")) for line in fixed):
        remedies[0] += f" (capture.from_run={folder} there reads this one's answers)"
    if not fixed:
        remedies[1] = "train again after deleting " + ", ".join(f"{folder}/phases/{name}" for name in others)
    raise RunFolderError(
        f"{folder} holds another run; it differs in:\n  " + "\n  ".join(differing) + "\n"
        f"{remedies[0]}, or {remedies[1]}."
    )


def link_stores(folder: Path, source: str | None) -> None:
    """Make the stores of ``capture.from_run`` those of this run.

    Raises:
        RunFolderError: one of them is not finished, or there is a link that the recipe does not ask for.
    """
    link = folder / "store"
    if source is None:
        if link.is_symlink():
            raise RunFolderError(
                f"{link} is a link to {link.readlink()}, and capture.from_run is not set. Set it to the run that "
                "the link leads to, or delete the link to ask the teacher."
            )
        return
    for split in SPLITS:
        if not (Path(source) / "store" / split / "manifest.json").is_file():
            raise RunFolderError(
                f"{source} (capture.from_run) has no finished store of {split}. Name the folder of a run, and "
                "finish it first: `tdistill capture` with its recipe."
            )
    link.unlink(missing_ok=True)  # of a recipe that was refused and is corrected now
    link.symlink_to((Path(source) / "store").resolve(), target_is_directory=True)


def check_asked(recipe: Recipe, path: Path, split: str, prompt_ids: Collection[str], num_answers: int = 0) -> None:
    """Raise unless a store, finished or not, is about the prompts that are asked for now.

    Args:
        recipe: that asks.
        path: of the store.
        split: of the prompts.
        prompt_ids: of the prompts, or of the conversations whose turns are prompts.
        num_answers: of each, that another run's store must hold; 0: of this run, which can still ask.
    Raises:
        DataFileError: the store has answers to other prompts, which would be trained on and measured.
        RunFolderError: another run's store lacks some.
    """
    jobs, asked = kept_jobs(path), set(prompt_ids)
    source = f"{getattr(recipe.data, split)} (data.{split})"
    gone = sorted({name for name, _ in jobs if not {name, name.rsplit("#turn-", 1)[0]} & asked})
    if gone:
        raise DataFileError(
            f"{source} has changed: {len(gone)} prompts that the store {path} has answers to are "
            f"not in it any more, such as '{gone[0]}'. Put them back, or choose another folder with output=FOLDER."
        )
    if recipe.capture.from_run is None:
        return
    lacking = [name for name in asked if any((name, k) not in jobs for k in range(num_answers))]
    if lacking:
        raise RunFolderError(
            f"{recipe.capture.from_run} (capture.from_run) lacks answers to {len(lacking)} prompts of "
            f"{source}, such as '{lacking[0]}'. Capture them there, or leave capture.from_run out."
        )


def note_time(folder: Path, stage: str, seconds: float, add: bool = False) -> None:
    """Write the seconds of a stage into ``times.json``, or add them to those that are there."""
    path = folder / "times.json"
    times = json.loads(path.read_text()) if path.is_file() else {}
    before = times.get(stage, 0.0) if add else 0.0
    write_atomically(path, json.dumps({**times, stage: round(before + seconds, 1)}, indent=1) + "\n")


def publish_copy(source: Path, target: Path) -> None:
    """Copy a folder so that it appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    publish(partial, target)


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


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the settings that came after it, at their defaults; as it is if it is no recipe now."""
    try:
        return dict(yaml.safe_load(Recipe.model_validate(stored).to_yaml()))
    except (ValidationError, TDistillError):
        return stored


def _differences(stored: Any, asked: Any, key: str = "") -> list[str]:
    """Lines ``key: stored X, asked Y`` for every leaf that differs."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for name in sorted({*stored, *asked}):
            lines += _differences(stored.get(name), asked.get(name), f"{key}.{name}" if key else str(name))
        return lines
    return [] if stored == asked else [f"{key}: stored {stored!r}, asked {asked!r}"]


def _lineage(phases: Mapping[str, Any], name: str) -> list[Any]:
    """What a phase's student was made by: its settings and those of the phases before it, from a stored recipe."""
    settings, before = {**phases.get(name, {}), "control": None}, "start"
    settings["args"] = {key: v for key, v in (settings.get("args") or {}).items() if not _HOW_IT_IS_TRAINED.match(key)}
    for other, phase in phases.items():
        if other == name:
            break
        before = before if phase.get("control") else other
    init = str(settings.get("init") or before)
    return [settings | {"init": init}, *(_lineage(phases, init) if init in phases else [])]
