"""Write recipes for the tiny teacher, call the command line in this process, and look at what a run left."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import yaml

from tdistill.cli.main import main

ARGUMENTS = {
    "max_steps": 4,
    "response_tokens_per_batch": 128,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "dataloader_pin_memory": False,
}


class Outcome(NamedTuple):
    """Exit status and what was printed."""

    code: int
    out: str
    err: str


def tdistill(*words: object) -> Outcome:
    """Call the entry point as if it had been given these words; an exception that is no exit comes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["tdistill", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def recipe_tree(teacher: Path, prompts: dict[str, Path], output: Path) -> dict[str, Any]:
    """Recipe of a whole tiny run: two phases, one control, 2 of the teacher's 4 layers."""
    return {
        "name": "tiny",
        "output": str(output),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "data": {**{split: str(path) for split, path in prompts.items()}, "max_prompt_tokens": 64},
        "capture": {"p_max": 0.95, "max_actions": 16, "max_new_tokens": 12, "batch_size": 16, "shard_prompts": 16},
        "student": {"layers": 2},
        "phases": {
            "sft": {"args": {**ARGUMENTS, "objective": "sft"}},
            "bd": {"args": {**ARGUMENTS, "objective": "iq_learn"}},
            "sft_continued": {"init": "sft", "control": True, "args": {**ARGUMENTS, "objective": "sft"}},
        },
        "evaluation": {"seeds": [10], "speed_tokens": 4, "num_shown_prompts": 2},
    }


def changed(tree: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A copy in which mappings are merged at every depth and anything else is replaced."""
    tree = copy.deepcopy(tree)
    for key, value in parts.items():
        tree[key] = (
            changed(tree[key], **value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        )
    return tree


def write_recipe(path: Path, tree: Any) -> Path:
    """Write a recipe and return its path."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Name → (SHA-256, time of change) of every file of a folder."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    """Name → bytes of the files that match a pattern."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob(pattern))}


def strict_json(text: str) -> Any:
    """Parse JSON; NaN and Infinity, which Python writes but JSON does not have, are refused."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def measured(folder: Path) -> dict[str, Any]:
    """All that a run measured and trained, without what depends on the clock."""
    results = strict_json((folder / "results.json").read_text(encoding="utf-8"))
    del results["summary"]["times_s"]
    results["records"] = [record for record in results["records"] if record["metric"] != "decode_tokens_per_s"]
    clock = ("runtime", "per_second")
    metrics = [
        {key: value for key, value in strict_json(line).items() if not any(word in key for word in clock)}
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    weights = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder, "**/*.safetensors").items()}
    return {"results": results, "metrics": metrics, "weights": weights, "stores": contents(folder, "store/*/*")}
