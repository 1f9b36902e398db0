"""A small made-up run folder; every number in it is chosen so that the expected text can be read off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVIL = "<script>alert('x')</script> & <img src=https://evil.example/x.png>"


def record(metric: str, subject: str, value: float | None, half: float | None = None, **extra: Any) -> dict[str, Any]:
    interval = (
        {"low": value - half, "high": value + half, "level": 0.95} if half is not None and value is not None else {}
    )
    defaults = {"split": "held_out", "unit": "", "num_items": 48, "seeds": [0], "against": None, "note": ""}
    return {"metric": metric, "subject": subject, "value": value, **defaults, "low": None, "high": None,
            "level": None, "higher_is_better": None, **interval, **extra}  # fmt: skip


def make_results() -> dict[str, Any]:
    kl = {"unit": "nats/token", "higher_is_better": False}
    records = [
        record("kl_teacher_student", "start", 5.0, 0.4, **kl),
        record("kl_teacher_student", "sft", 1.3, 0.1, **kl),
        record("kl_teacher_student", "bd", 1.0, 0.1, **kl),
        record("kl_teacher_student", "sft_continued", 1.1, 0.1, **kl),
        record("kl_teacher_student", "bd", -0.3, 0.05, against="sft", **kl),
        record("kl_teacher_student", "bd", -0.1, 0.03, against="sft_continued", **kl),
        record("agreement_top1", "start", 0.1, 0.02, unit="share", higher_is_better=True),
        record("agreement_top1", "sft", 0.55, 0.02, unit="share", higher_is_better=True),
        record("agreement_top1", "bd", 0.61, 0.02, unit="share", higher_is_better=True),
        record("agreement_top1", "sft_continued", 0.6, 0.02, unit="share", higher_is_better=True),
        record("gap_closed", "bd", 0.8, 0.02, unit="share", higher_is_better=True, note="1 − KL / KL of the start."),
        record("distinct_2", "teacher", 0.8, 0.02),
        record("distinct_2", "bd", 0.7, 0.02),
        record("distinct_2", "sft_continued", 0.3, 0.02),
        record("response_length", "teacher", 81.25, 7.5, unit="tokens"),
        record("num_parameters", "teacher", 134_515_008, unit="parameters", split=""),
        record("num_parameters", "bd", 81_400_000, unit="parameters", split=""),
        record("weights_bytes", "bd", 162_800_000, unit="bytes", split=""),
        record("decode_tokens_per_s", "bd", 35.5, 1.5, unit="tokens/s", split=""),
        record("kl_teacher_student", "bd", 0.77, 0.1, **{**kl, "split": "dev", "num_items": 32}),
    ]
    phases = [
        {"name": "sft", "objective": "sft", "control": False, "response_tokens": 30000, "steps": 60, "init": "start"},
        {"name": "bd", "objective": "iq_learn", "control": False, "response_tokens": 20000, "steps": 40, "init": "sft"},
        {"name": "sft_continued", "objective": "sft", "control": True, "response_tokens": 20000, "steps": 40,
         "init": "sft"},
    ]  # fmt: skip
    return {
        "format": "tdistill-results",
        "version": 1,
        "name": "demo",
        "summary": {
            "teacher": {"name": "org/teacher-135M", "num_layers": 30, "num_parameters": 134_515_008},
            "student": {
                "name": "teacher-15L", "num_layers": 15, "kept_layers": [0, 2, 4], "num_parameters": 81_400_000,
            },
            "objective": {"name": "iq_learn", "alpha": 10, "gamma": 0.99},
            "final_phase": "bd",
            "num_prompts": {"train": 300, "dev": 32, "held_out": 48},
            "response_tokens": {"train": 14000},
            "times_s": {"capture": 181.25, "sft": 62.0},
            "phases": phases,
        },
        "sparsity": {
            "num_states": 14000,
            "top_k_mass": [{"k": 1, "mean": 0.53}, {"k": 7, "mean": 0.81}, {"k": 50, "mean": 0.93}],
            "set_size": [
                {"p": 0.5, "mean": 3.3, "median": 1, "p99": 40, "max": 300},
                {"p": 0.8, "mean": 19, "median": 4, "p99": 266, "max": 886},
            ],
            "note": "Measured on the stored states.",
        },
        "records": records,
        "answers": [
            {"prompt_id": f"held-out-{i:03d}", "prompt": f"{EVIL} {i}",
             "answers": {"teacher": "A fine answer.", "start": "", "sft": "Lone surrogate \ud800.", "bd": EVIL}}
            for i in range(14)
        ],
    }  # fmt: skip


def make_metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for phase, steps in (("sft", 60), ("bd", 40), ("sft_continued", 40)):
        for step in range(10, steps + 1, 10):
            line = {
                "phase": phase,
                "step": step,
                "loss": 3 - step / 50,
                "learning_rate": 1e-4,
                "tokens_per_second": 900,
            }
            if phase == "bd":
                line |= {"recovered_reward": -1 + step / 100, "value": -step / 20}
            lines.append(line)
            if step % 20 == 0:
                lines.append({"phase": phase, "step": step, "eval_kl_set_tail": 2 - step / 60})
    return lines


def write_run(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "student").mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("name: demo\nnote: <b>bold</b>\n", encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.2", "num_threads": 2}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in make_metrics()), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def write_scored_run(
    folder: Path,
    *,
    tokens: dict[str, int],
    kl_sums: dict[str, list[float]],
    rouge: dict[str, list[list[float]]] | None = None,
    recipe: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    times_s: dict[str, float] | None = None,
    teacher: str = "org/teacher-135M",
    prompt_sets: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """A run with values by prompt; ``tokens`` has the prompts, and every list their order."""
    subjects = list(kl_sums)
    trained = [name for name in subjects if name not in ("teacher", "start")]
    records = [record("num_parameters", name, 3e6 + i, unit="parameters") for i, name in enumerate(subjects)]
    records += [
        record("kl_teacher_student", name, 1.0, 0.1, unit="nats/token", higher_is_better=False) for name in subjects
    ]
    records += [record("rouge_l", name, 0.5, 0.1, unit="F1", higher_is_better=True) for name in rouge or {}]
    phases = [
        {"name": name, "objective": "sft", "init": trained[index - 1] if index else "start"}
        for index, name in enumerate(trained)
    ]
    results = {
        "format": "tdistill-results",
        "version": 1,
        "name": "made-up",
        "settings": settings or {},
        "summary": {"teacher": {"name": teacher}, "student": {"name": "s"}, "objective": {"name": "sft"},
                    "final_phase": trained[-1], "times_s": times_s or {}, "phases": phases},
        "records": records,
    }  # fmt: skip
    scores = {
        "format": "tdistill-scores",
        "version": 1,
        "split": "held_out",
        "prompt_ids": list(tokens),
        "num_tokens": list(tokens.values()),
        "token_sums": {"kl_teacher_student": kl_sums},
        "seeds": {name: list(range(len(rows[0]))) for name, rows in (rouge or {}).items()},
        "answer_scores": {"rouge_l": rouge} if rouge else {},
        "prompt_sets": prompt_sets or {},
    }
    folder.mkdir(parents=True)
    default = {"name": "made-up", "output": str(folder), "phases": {name: {"args": {"seed": 1}} for name in trained}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe or default), encoding="utf-8")  # JSON is YAML
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return folder
