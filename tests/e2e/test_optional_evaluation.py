"""A tiny run whose recipe asks for exposure bias and perplexity: through the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.harness import ARGUMENTS, changed, recipe_tree, strict_json, tdistill, write_recipe

from tdistill.reports.load import load_run
from tdistill.reports.records import find


def test_what_a_recipe_asks_for_is_measured_and_reported(
    tmp_path: Path, tiny_teacher_folder: Path, tiny_prompt_files: dict[str, Path]
):
    text = tmp_path / "text.jsonl"
    prompts = [json.loads(line)["prompt"] for line in tiny_prompt_files["held_out"].read_text().splitlines()]
    text.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    tree = recipe_tree(tiny_teacher_folder, tiny_prompt_files, tmp_path / "run")
    tree["phases"] = {"sft": {"args": {**ARGUMENTS, "objective": "sft", "max_steps": 2}}}
    answered = tmp_path / "answered.jsonl"
    answered.write_text("".join(json.dumps({"prompt": prompt, "output": prompt}) + "\n" for prompt in prompts[:3]))
    tree = changed(
        tree,
        evaluation={
            "exposure": {},
            "perplexity": {"text": str(text), "window_tokens": 32, "stride_tokens": 16},
            "prompt_sets": {"echo": str(answered)},
        },
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)

    # A missing text is found before the teacher answers.
    refused = tdistill("run", recipe, "evaluation.perplexity.text=none.jsonl")
    assert refused.code == 3 and "none.jsonl (evaluation.perplexity.text)" in refused.err
    assert not (tmp_path / "run" / "store").exists()
    # So are prompts without references, and those that are too long.
    for text_of, said in (({"prompt": "word5"}, "no prompt has a reference answer"),
                          ({"prompt": " ".join(prompts * 9), "output": "word5"}, "max_prompt_tokens = ")):  # fmt: skip
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps(text_of) + "\n")
        refused = tdistill("run", recipe, f"evaluation.prompt_sets.echo={other}")
        assert refused.code == 3 and said in refused.err
        assert f"{other} (evaluation.prompt_sets.echo): " in " ".join(refused.err.split())
        assert not (tmp_path / "run" / "store").exists()

    outcome = tdistill("run", recipe)
    assert outcome.code == 0, outcome.err
    results = load_run(tmp_path / "run").results
    assert find(results, "excess_accumulated_error", "sft", "held_out") is not None
    teacher, start, sft = (find(results, "text_perplexity", name, "text") for name in ("teacher", "start", "sft"))
    assert teacher is not None and start is not None and sft is not None
    assert teacher.value is not None and start.value is not None and teacher.value < start.value
    assert teacher.num_items == len(prompts)
    echo = find(results, "rouge_l", "sft", "echo")
    assert echo is not None and (echo.num_items, echo.seeds) == (3, (10,))
    compared = tdistill("compare", tmp_path / "run", "--split", "echo", "--against", "start")
    assert compared.code == 0 and "echo split; 3 prompts" in compared.out and "run:sft" in compared.out
    refused = tdistill("compare", tmp_path / "run", "--split", "eco")
    assert refused.code == 2 and "was not measured on it" in refused.err and "'echo'" in refused.err
    raw = strict_json((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [curve["subject"] for curve in raw["exposure"]] == ["start", "sft"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for place in (page, outcome.out, (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8")):
        assert "Excess accumulated error" in place and "Perplexity per word" in place
        assert "Rouge-L to the references of other prompts" in place and "echo (F1)" in place


def test_a_task_that_does_not_fit_is_found_before_the_teacher_answers(
    tmp_path: Path, tiny_teacher_folder: Path, tiny_prompt_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tdistill.evaluation.tasks._check_installed", lambda name: None)
    data = tmp_path / "sums.jsonl"
    data.write_text('{"question": "2 + 2 ?", "answer": "#### 4"}\n')
    tree = recipe_tree(tiny_teacher_folder, tiny_prompt_files, tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(tree, evaluation={"tasks": {"sums": {"data": str(data)}}}))
    refused = tdistill("run", recipe)
    assert refused.code == 3 and "evaluation.tasks.sums: question 1 of" in refused.err
    assert f"the teacher {tiny_teacher_folder} was made for 128 in all" in " ".join(refused.err.split())
    assert not (tmp_path / "run" / "store").exists()
