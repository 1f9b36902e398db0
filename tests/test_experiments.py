"""The benchmarks' experiments: what equal cost means, that a frozen recipe is looked at once, and their tables."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import tiny_llama

from tdistill.evaluation.divergence import divergences
from tdistill.prompts.read import Record
from tdistill.types import ActionSets, Trajectory

ROOT = Path(__file__).parent.parent


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The modules ``plan``, ``finals`` and ``tables``, with their results in an empty folder."""
    before = set(sys.modules)
    monkeypatch.chdir(ROOT)
    for folder in ("objectives", "experiments"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
    import accuracy
    import decoding
    import final_tables
    import finals
    import perplexity
    import plan
    import prefixes
    import rows
    import scores
    import tables

    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    monkeypatch.setattr(finals, "PATH", tmp_path / "tests.json")
    monkeypatch.setattr(prefixes, "PATH", tmp_path / "exposure.json")
    monkeypatch.setattr(decoding, "PATH", tmp_path / "decoding.json")
    monkeypatch.setattr(perplexity, "PATH", tmp_path / "perplexity.json")
    monkeypatch.setattr(accuracy, "PATH", tmp_path / "accuracy.json")
    monkeypatch.setattr(plan, "CHOSEN", {plan.OURS: 3e-4, "minillm": 5e-5})
    monkeypatch.setattr(plan, "FROZEN_WITH_CAPTURE", ())
    yield SimpleNamespace(accuracy=accuracy, decoding=decoding, final_tables=final_tables, finals=finals,
                          perplexity=perplexity, plan=plan, prefixes=prefixes, rows=rows, scores=scores,
                          tables=tables)  # fmt: skip
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write_times(plan: Any, ours: float, **step_s: float) -> None:
    (plan.RESULTS / "times.json").write_text(json.dumps({"step_s": {plan.BUDGET: ours, plan.OURS: ours, **step_s}}))


def test_a_method_whose_step_costs_four_times_as_much_takes_a_quarter_of_the_steps(modules):
    assert modules.plan.at_equal_cost() == {}  # nothing is measured yet
    write_times(modules.plan, 2.0, minillm=8.0)
    methods = modules.plan.at_equal_cost()
    steps = {name: method.args["max_steps"] for name, method in methods.items()}
    # Cost 1 of the sampled form is a row of the main table.
    assert steps == {
        "minillm, learning rate 5e-05, cost 1": 20,
        f"{modules.plan.OURS}, learning rate 0.0003, cost 0.25": 20,
        "minillm, learning rate 5e-05, cost 0.25": 5,
        f"{modules.plan.OURS}, learning rate 0.0003, cost 2": 160,
        "minillm, learning rate 5e-05, cost 2": 40,
        f"{modules.plan.OURS}, learning rate 0.0003, cost 0.125": 10,
        f"{modules.plan.OURS}, learning rate 0.0003, cost 0.0625": 5,
    }
    seeds = {name: method.num_seeds for name, method in methods.items()}
    cheap = [name for name in seeds if name.startswith(modules.plan.OURS) and not name.endswith("cost 2")]
    assert [name for name, num in seeds.items() if num == 3] == ["minillm, learning rate 5e-05, cost 1", *cheap]


def test_what_the_teacher_was_asked_for_buys_steps_of_the_methods_that_do_not_ask_it(modules, monkeypatch):
    write_times(modules.plan, 2.0, minillm=8.0, seqkd=4.0, **{"sft on references": 5.0})
    path = modules.plan.RESULTS / "times.json"
    asked = {"response_tokens": 10, "seconds": 1.0}
    captured = {"captured": asked | {"all_response_tokens": 4000}, "scored": asked | {"all_response_tokens": 1000}}
    path.write_text(json.dumps(json.loads(path.read_text()) | captured))
    plan, ours = modules.plan, modules.plan.OURS
    monkeypatch.setattr(plan, "CHOSEN", {ours: 3e-4, "sft on references": 3e-4, "minillm": 5e-5, "seqkd": 3e-4})
    found = {k: m.args["max_steps"] for k, m in plan.at_equal_cost().items() if "with capture" in k}
    # 80 steps of 2 s and 100 s of scores; the start that all share was healed on the answers.
    # MiniLLM has cost 2, which is more.
    assert found == {
        "sft on references, learning rate 0.0003, cost 1 with capture": 52,
        "seqkd, learning rate 0.0003, cost 1 with capture": 65,
    }
    measured = json.loads(path.read_text())
    of_ours = [plan.asked_s(plan.METHODS[ours], measured, steps) for steps in (1, 10)]
    assert of_ours == [51.2, 100.0]  # all scores cost 100 s
    assert plan.asked_s(plan.METHODS["seqkd"], measured, 10) == 0.0


def test_new_times_do_not_pass_old_rows_off_as_equal_cost(modules, monkeypatch):
    plan = modules.plan
    write_times(plan, 2.0, minillm=8.0)
    monkeypatch.setitem(plan.EXPERIMENTS, "e8", plan.Experiment("", {plan.BASE: plan.at_equal_cost()}))
    row = {"setup": "base", "method": "minillm, learning rate 5e-05, cost 1", "seed": 0, "steps": 20}
    monkeypatch.setattr(plan, "read", lambda name: {"rows": [row]})
    left = [(key, seed) for _, key, _, seed in plan.missing("e8", "cost 1$")]
    assert left == [(row["method"], 1), (row["method"], 2)]
    row["steps"] = 19
    with pytest.raises(SystemExit, match="seed 0 has 19 steps in its row and 20 by times"):
        plan.missing("e8")


def load_command() -> Any:
    spec = importlib.util.spec_from_file_location("experiments", ROOT / "benchmarks" / "experiments" / "__main__.py")
    assert spec is not None and spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    return main


def test_the_estimate_is_at_the_pace_of_the_rows_that_are_there(modules):
    main = load_command()
    answers = 200 * 2 * 50 / main.GENERATED_PER_S
    three = 3 * (80 * 512 / main.TRAINED_PER_S + answers)
    assert main.estimate_s("e6", "^seqkd$") == pytest.approx(three)
    assert main.estimate_s("e6", "^(seqkd|start)$") == pytest.approx(three + 3 * answers)
    row = {"setup": "answers-2", "method": "seqkd", "seed": 0, "steps": 80, "seconds": 100.0}
    (modules.plan.RESULTS / "e6.json").write_text(json.dumps({"rows": [row]}))
    assert main.estimate_s("e6", "^seqkd$") == 200.0
    # With the teacher in memory a step is slower, and the student's answers come on top.
    assert main.estimate_s("e1", "^forward_kl, store$") < main.estimate_s("e1", "^reverse_kl$")
    assert main.estimate_s("e1", "^reverse_kl$") < main.estimate_s("e1", "^distillm2$")


def test_no_method_goes_through_the_batches_of_the_start_in_their_order(modules, monkeypatch):
    main = load_command()
    setup, seen = SimpleNamespace(second_phase={}, stores={"train": "store"}), []
    monkeypatch.setattr(main.Experiments, "setup", lambda self, what: setup)
    monkeypatch.setattr(main.Experiments, "healed", lambda self, what: None)
    monkeypatch.setattr(main, "load_causal_lm", lambda folder, dtype: None)
    monkeypatch.setattr(main, "train", lambda setup, model, args, seed, *rest: seen.append(args.get("data_seed", seed)))
    plan, experiments = modules.plan, main.Experiments(Path(), Path())
    for name, seed in (("seqkd", 0), ("seqkd", 1), ("sft on references", 0)):
        experiments.train(plan.BASE, plan.METHODS[name], seed)
    assert seen == [plan.NUM_SEEDS, 1, 0]  # the start was healed in order 0, on the teacher's answers


def test_what_meets_the_test_sets_has_the_chosen_rate_and_cost_one(modules, monkeypatch):
    write_times(modules.plan, 2.0, minillm=8.0)
    monkeypatch.setattr(modules.plan, "FROZEN", (modules.plan.OURS, "minillm"))
    frozen = modules.plan.frozen()
    assert list(frozen) == [f"{modules.plan.OURS}, learning rate 0.0003", "minillm, learning rate 5e-05, cost 1"]
    steps = [method.args.get("max_steps", modules.plan.STEPS) for method in frozen.values()]
    assert steps == [80, 20] and all(method.num_seeds == 3 for method in frozen.values())


def look(
    method: str, seed: int, test_set: str, sampling_seed: int, recipe: str, rouge_l: list[float]
) -> dict[str, Any]:
    return {"method": method, "seed": seed, "set": test_set, "sampling_seed": sampling_seed, "recipe": recipe,
            "rouge_l": rouge_l}  # fmt: skip


def test_a_frozen_recipe_is_looked_at_once_and_does_not_change(modules, monkeypatch):
    finals = modules.finals
    write_times(modules.plan, 2.0)
    monkeypatch.setattr(modules.plan, "FROZEN", (modules.plan.OURS,))
    looks = finals.missing()
    num_models = modules.plan.NUM_SEEDS + 2  # and start and teacher
    assert len(looks) == len({(name, *rest) for name, _, *rest in looks}) == num_models * 3 * 5
    name, method, seed, test_set, sampling_seed = looks[0]

    def written(recipe: str) -> None:
        rows = [look(name, seed, test_set, sampling_seed, recipe, [0.5])]
        finals.PATH.write_text(json.dumps({"rows": rows}))

    written(finals.recipe_digest(method))
    assert finals.missing() == looks[1:]
    written("another")
    with pytest.raises(SystemExit, match=f"{name}, seed 0 was looked at on dolly with another recipe"):
        finals.missing()


def test_the_table_of_the_test_sets_weighs_sets_equally_and_pairs_prompts(modules, tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for test_set, num_prompts in (("dolly", 60), ("vicuna", 20)):
        scores = random.random((3, 2, num_prompts))  # trainings, sampling seeds, prompts
        for method, less, trainings in (
            (f"{modules.plan.OURS}, cost 1", 0.0, 3),
            ("seqkd, cost 1", 0.01, 3),
            ("sft on references, cost 1", 1.0, 3),
            ("forward_kl, references, cost 1", 0.5 if test_set == "dolly" else 0.0, 3),
            ("teacher", 0, 1),
        ):
            rows += [
                look(method, seed, test_set, draw, "", (scores[seed, draw] - less).tolist())
                for seed in range(trainings)
                for draw in range(2)
            ]
    path = tmp_path / "tests.json"
    rows.append(look("seqkd, cost 1", 3, "dolly", 0, "", [9.0] * 60))  # a training that is not done with is left out
    path.write_text(json.dumps({"dtype": "bfloat16", "rows": rows}))
    write_times(modules.plan, 2.0, seqkd=1.0, **{"sft on references": 1.0, "forward_kl, references": 2.0})
    times = modules.plan.RESULTS / "times.json"
    scored = {"response_tokens": 512, "seconds": 1.0, "all_response_tokens": 51200}
    times.write_text(json.dumps(json.loads(times.read_text()) | {"scored": scored}))
    screening = {"kl_sum": [3.0, 1.0], "num_tokens": [1, 1]}
    steps = {modules.plan.OURS: 80, "seqkd": 95, "sft on references": 68, "forward_kl, references": 45}
    trained = [
        {"method": f"{of}, cost 1", "seed": 0, "steps": number, "screening": screening} for of, number in steps.items()
    ]
    (tmp_path / "e8.json").write_text(json.dumps({"rows": trained}))
    lines = [
        line.strip("| ").split(" | ")
        for line in modules.final_tables.tests_section(path).splitlines()
        if line.startswith("|")
    ]
    name = f"{modules.plan.OURS}, cost 1"
    (ours, not_less), (scores, less, over), (_, far, _) = (
        [line for line in lines if line[0] == of] for of in (name, "seqkd, cost 1", "sft on references, cost 1")
    )
    means = [float(ours[i].split()[0].strip("*")) for i in (6, 7, 8)]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2, abs=1e-4)
    # Seed 0 of SeqKD has no order of its own, and the sampled form reads nothing that the start was healed on.
    assert ours[1:6] == ["3", "–", "80", "160", "240"] and scores[1:6] == ["3²", "vocabulary", "95", "95", "95"]
    assert ours[6].startswith("**")  # a student with three trainings, and no other is better
    # Every training and prompt is 0.01 lower; what differs between draws is which trainings are drawn.
    assert [cell.split()[0] for cell in less[1:4]] == ["-0.0100"] * 3
    # Forward KL is lower on one set alone.
    below = "sft on references*; forward_kl, references"
    assert [line[-1] for line in (not_less, less, far)] == [below, below, "none"]
    low, high = (float(end.strip("[],")) for end in less[3].split()[1:])
    # The other way round in the mean.
    value, *ends = (float(end.strip("[],")) for end in over[1].split())
    assert value == 0.01 and sorted(ends) == pytest.approx(sorted((-low, -high)), abs=1e-4)
    assert low < -0.01 < high
    short = [line.strip("| ").split(" | ") for line in modules.final_tables.test_scores(path).splitlines()]
    names = ["iq_learn on scored references", "teacher", "seqkd", "forward_kl, references", "sft on references"]
    assert [line[0] for line in short[2:]] == names
    assert short[0][-5] == "mean less that of iq_learn on scored references"
    assert short[-3][1:7] == ["3²", *scores[6:9], less[3], scores[9]]
    assert short[-3][7] == "2.00"  # KL on the dev prompts
    assert modules.final_tables.test_scores(tmp_path / "none.json") == ""


def test_a_method_at_both_budgets_meets_the_test_sets_under_two_names(modules, monkeypatch):
    plan, name = modules.plan, "sft on references, learning rate 0.0003, cost 1"
    write_times(plan, 2.0, **{"sft on references": 4.0})
    path = plan.RESULTS / "times.json"
    scored = {"response_tokens": 512, "seconds": 2.0, "all_response_tokens": 51200}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scored": scored}))
    monkeypatch.setattr(plan, "CHOSEN", {plan.OURS: 3e-4, "sft on references": 3e-4})
    monkeypatch.setattr(plan, "FROZEN", (plan.OURS, "sft on references"))
    monkeypatch.setattr(plan, "FROZEN_WITH_CAPTURE", ("sft on references",))
    # 160 s, and 160 s of scores of the references that 80 steps read.
    steps = {row: method.args["max_steps"] for row, method in plan.frozen().items() if row.startswith("sft")}
    assert steps == {name: 40, f"{name} with capture": 80}
    assert {method.num_seeds for method in plan.frozen().values()} == {3}
    assert modules.rows.short_name(f"{name} with capture") == "sft on references, cost 1 with capture"
    assert modules.rows.short_name(name) == "sft on references"
    studied = {row for row, _, _ in plan.studied()}
    assert name in studied and f"{name} with capture" not in studied
    monkeypatch.setattr(plan, "TAKEN_LAST", ("sft on references",))
    assert {row for row, _, _ in plan.studied()} == studied - {name}


def test_what_comes_before_the_first_step_is_in_its_time(modules, tmp_path):
    import time

    from torch import nn, tensor
    from training import StepTimes
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(tensor(1.0))

        def forward(self, x: Any) -> dict[str, Any]:
            return {"loss": (self.weight * x).mean()}

    class Answers(list):  # the first is made before a step, as a round of rollouts is
        def __getitem__(self, index: int) -> Any:
            if not times.marks[1:]:
                time.sleep(0.3)
            return super().__getitem__(index)

    times = StepTimes()
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, per_device_train_batch_size=1, report_to="none",
                             save_strategy="no", disable_tqdm=True)  # fmt: skip
    Trainer(Model(), args, train_dataset=Answers([{"x": 1.0}] * 4), callbacks=[times]).train()
    assert len(times.marks) == 3 and times.marks[1] - times.marks[0] >= 0.3


def test_a_row_of_one_training_is_not_compared_with_the_best(modules):
    from tdistill.resampling import Measured, resample

    def row(*trainings: float) -> Measured:
        return Measured(np.array(trainings)[:, None, None].repeat(4, 1), np.ones((len(trainings), 4)))

    values = {"start": row(0.9), "one": row(0.3), "best": row(0.2, 0.2), "near": row(0.1, 0.25), "far": row(0.1, 0.1)}

    def marks(names: tuple[str, ...]) -> dict[str, str]:
        chosen = {name: values[name] for name in names}
        draws = dict(zip(chosen, resample(list(chosen.values()), 0), strict=True))
        points = {name: of.value for name, of in chosen.items()}
        return modules.rows.marks_of(points, {name: len(of.sums_RPS) for name, of in chosen.items()}, draws, more=True)

    compared = tuple(name for name in values if name != "one")
    assert marks(compared) == {"best": "**{}**", "near": "≈ {}"}
    assert marks(tuple(values)) == marks(compared)
    values["other"] = row(0.2)
    assert marks(("start", "one", "other")) == {}


def test_what_a_score_costs_is_the_cheapest_row_of_the_default_separated_above_all_of_a_methods(modules, monkeypatch):
    plan, tables = modules.plan, modules.tables
    write_times(plan, 2.0, minillm=8.0, gkd=4.0, seqkd=4.0)
    monkeypatch.setattr(tables, "CHOSEN", {plan.OURS: 3e-4, "minillm": 5e-5, "gkd": 3e-4, "seqkd": 3e-4})

    def trained(method: str, steps: int, *scores: float) -> dict[str, Any]:
        return {"method": method, "steps": steps, "screening": {"rouge_l": [list(scores) * 4]}}

    def row(*args: Any) -> list[dict[str, Any]]:
        return [trained(*args)] * 2

    path = plan.RESULTS / "times.json"
    scored = {"scored": {"response_tokens": 1, "seconds": 1.0, "all_response_tokens": 60}}
    path.write_text(json.dumps(json.loads(path.read_text()) | scored))
    ours, others = f"{plan.OURS}, learning rate 0.0003", "learning rate 5e-05, cost"
    rows = [
        [trained("start", 0, 0.12, 0.12)],
        row(f"{ours}, cost 0.5", 40, 0.14, 0.14),
        row(ours, 80, 0.16, 0.16),
        row(f"minillm, {others} 1", 20, 0.11, 0.11),
        row(f"minillm, {others} 2", 40, 0.1, 0.1),
        row("gkd, learning rate 0.0003, cost 1", 40, 0.15, 0.15),
        row("gkd, learning rate 0.0003, cost 2", 80, 0.17, 0.17),
        row("gkd, learning rate 0.001, search", 80, 0.18, 0.18),  # not at the chosen rate
        row("seqkd, learning rate 0.0003, cost 1", 40, 0.0, 0.26),  # 0.13: below the cheaper, not separated from either
        row("seqkd, learning rate 0.0003, search", 30, 0.12, 0.12),
        [trained("minillm, learning rate 5e-05, cost 4", 80, 0.1, 0.1)],  # one training
    ]

    def cells() -> dict[str, list[str]]:
        flat = [trained for of in rows for trained in of]
        lines = [line.strip("| ").split(" | ") for line in tables._reach(flat)[2].splitlines()[2:]]
        return {line[0]: line[1:] for line in lines}

    assert list(cells()) == ["gkd", "seqkd", "minillm"]  # the better first
    assert cells()["gkd"] == ["160, 320", "0.1700", "+0.0500 [+0.0500, +0.0500]", "none", "–", "–", "–"]
    assert cells()["seqkd"][:2] == ["120, 160", "0.1300"] and cells()["seqkd"][3:] == ["none", "–", "–", "–"]
    # With capture: 60 s of scores at the cheaper.
    assert cells()["minillm"] == [
        *("160, 320", "0.1100", "-0.0100 [-0.0100, -0.0100]"),
        *("80", "+0.0300 [+0.0300, +0.0300]", "4.0", "2.3"),
    ]
    rows[-3] = row("seqkd, learning rate 0.0003, cost 1", 40, 0.149, 0.151)  # between the two
    assert [cells()["seqkd"][i] for i in (3, 5, 6)] == ["160", "1.0", "0.7"]


def test_the_search_of_gkd_and_minillm_and_what_ends_below_the_start(modules):
    tables, results = modules.tables, modules.plan.RESULTS

    def row(method: str, score: float, kl: float) -> dict[str, Any]:
        screening = {"rouge_l": [[score, score + 0.1]], "kl_sum": [2 * kl, 2 * kl], "num_tokens": [2, 2]}
        return {"method": method, "seed": 0, "steps": 80, "data_seed": 3, "screening": screening}

    gkd, minillm = "gkd, learning rate 0.0001", "minillm, learning rate 5e-05, cost 1"
    main = [row("start", 0.2, 1.5), row(gkd, 0.1, 1.25), row("reverse_kl", 0.15, 2.0), row("seqkd", 0.25, 1.5)]
    (results / "e1.json").write_text(json.dumps({"rows": main}))
    (results / "e8.json").write_text(json.dumps({"rows": [row(minillm, 0.3, 1.75)]}))
    write_times(modules.plan, 2.0)

    def cells(section: str) -> list[list[str]]:
        lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        return [[cell.split(" [")[0] for cell in line] for line in lines[2:]]

    assert cells(tables.own_answers_section(results / "e1.json")) == [
        [minillm, "1¹", "80", "+0.1000", "+0.2500"],
        [gkd, "1¹", "80", "-0.1000", "-0.2500"],
    ]
    below = cells(tables.not_better_section(results / "e1.json"))
    assert below == [[gkd, "1¹", "-0.1000"], ["reverse_kl", "1¹", "-0.0500"]]
    (results / "e8.json").unlink()
    (results / "e1.json").write_text(json.dumps({"rows": [main[0], main[3]]}))
    assert tables.own_answers_section(results / "e1.json") == tables.not_better_section(results / "e1.json") == ""


def test_setups_that_differ_in_the_student_alone_share_the_teachers_row_and_its_scores(modules):
    from claims import references_of

    plan, tables = modules.plan, modules.tables
    smaller, other_p = (replace(plan.BASE, name="small", layers=10), replace(plan.BASE, name="p", p_max=0.5))
    assert references_of(smaller) == references_of(plan.BASE) != references_of(other_p)
    teacher = {"setup": "base", "method": "teacher", "seed": 0}
    (plan.RESULTS / "e1.json").write_text(json.dumps({"rows": [teacher, teacher | {"method": "start"}]}))
    begun = [{"setup": "small"}, {"setup": "p"}]
    found = tables.teacher_rows(plan.RESULTS / "e1.json", begun, [plan.BASE, smaller, other_p])
    assert found == [teacher | {"setup": "small"}]
    assert tables.teacher_rows(plan.RESULTS / "e1.json", begun[1:], [plan.BASE, smaller, other_p]) == []


def test_the_papers_figures_stand_beside_ours(modules, tmp_path):
    ours = f"{modules.plan.OURS}, learning rate 0.0003"
    names = (ours, "bellman_distill, learning rate 0.0003", "seqkd, learning rate 0.0003, cost 1")
    names = (*names, "seqkd, learning rate 0.0003, cost 1 with capture")  # the paper has one budget
    scores = dict(zip(names, (0.2, 0.9, 0.1, 0.5), strict=True))
    rows = [
        look(name, 0, test_set, 10, "", [score, score + 0.02])
        for name, score in scores.items()
        for test_set in ("dolly", "selfinst", "vicuna")
    ]
    (tmp_path / "tests.json").write_text(json.dumps({"rows": rows}))
    paper = ROOT / "benchmarks" / "results" / "experiments" / "paper.json"
    lines = modules.final_tables.paper_section(paper, tmp_path / "tests.json").splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip(" |").split(" | ") for line in lines if line.startswith("|")}
    assert cells["Bellman Distill"][1:] == ["24.7 / 13.3 / 16.2", "25.1 / 11.4 / 14.8", "27.8 / 19.5 / 20.7", "–"]
    assert cells["iq_learn on scored references, not in the paper"][1:] == ["–", "–", "–", "21.0 / 21.0 / 21.0"]
    assert cells["SeqKD"][-1] == "11.0 / 11.0 / 11.0" and cells["MiniLLM"][-1] == "–"


def test_scores_on_teacher_answers_are_the_sums_of_divergences(modules):
    random, teacher, student = np.random.default_rng(0), tiny_llama(seed=0), tiny_llama(seed=1)
    none = ActionSets(*(np.zeros(20, dtype) for dtype in ("i8", "i4", "f4", "f4", "f4")))
    answers = [
        Trajectory(str(i), 0, *(random.integers(1, 48, n + i) for n in (3, 5)), "truncated", "teacher", none)
        for i in range(10)
    ]
    setup = SimpleNamespace(tokenizer=range(48), teacher=SimpleNamespace(model=teacher), stores={"held_out": answers})
    setup.held_out_pairs = modules.scores.Setup.held_out_pairs.func(setup)
    setup.held_out_states = modules.scores.Setup.held_out_states.func(setup)
    expected = divergences(teacher, {"student": student}, answers, vocab_size=48)["student"]
    found = modules.scores.on_teacher_answers(setup, student)
    np.testing.assert_allclose(found["kl_sum"], expected.kl_teacher_student, rtol=1e-4)
    np.testing.assert_allclose(found["nll_sum"], expected.nll, rtol=1e-4)
    assert found["agreement_sum"] == expected.agreement_top1.tolist()
    assert found["num_tokens"] == expected.num_tokens.tolist()


def test_exposure_bias_of_each_frozen_student_is_measured_once(modules, monkeypatch):
    # Another form of iq_learn meets the test sets alone.
    monkeypatch.setattr(modules.plan, "FROZEN", (modules.plan.OURS, modules.plan.BUDGET))
    monkeypatch.setitem(modules.plan.CHOSEN, modules.plan.BUDGET, 3e-4)
    prefixes, random, teacher = modules.prefixes, np.random.default_rng(0), tiny_llama(seed=0)
    pairs = [(random.integers(1, 48, 3 + i), random.integers(1, 48, 5)) for i in range(6)]
    setup = SimpleNamespace(
        tokenizer=range(48),
        teacher=SimpleNamespace(model=teacher),
        stores={"train": SimpleNamespace(end_token_ids=(0,))},
        held_out_pairs=pairs,
        recipe=SimpleNamespace(capture=SimpleNamespace(max_new_tokens=5)),
    )
    loaded = []

    def load(name: str, method: Any, seed: int, dtype: str) -> Any:
        loaded.append((name, seed, dtype))
        return tiny_llama(seed=1 + len(loaded))

    ours = f"{modules.plan.OURS}, learning rate 0.0003"
    prefixes.run(setup, load)
    prefixes.run(setup, load)  # goes on from the JSON
    assert loaded == [("start", 0, "float32"), (ours, 1, "float32"), (ours, 2, "float32")]
    assert prefixes.missing() == []
    curves = json.loads(prefixes.PATH.read_text())["curves"]
    assert all(len(curve["kl_own_prefixes"]) == len(curve["kl_teacher_prefixes"]) > 0 for curve in curves)
    lines = prefixes.section(prefixes.PATH, "exposure.svg").splitlines()
    cells = next(line for line in lines if line.startswith(f"| {ours}")).strip("| ").split(" | ")
    own, on_teachers, excess = float(cells[3]), float(cells[4]), float(cells[5].split()[0])
    assert own > 0 and excess == pytest.approx(own / on_teachers - 1, abs=2e-3)
    assert "iq_learn on scored references" in prefixes.chart(prefixes.PATH)


def test_perplexity_is_of_the_documents_of_the_test_split_and_of_each_student_once(modules, monkeypatch, tmp_path):
    perplexity, plan = modules.perplexity, modules.plan
    write_times(plan, 2.0)
    monkeypatch.setattr(plan, "FROZEN", (plan.OURS,))
    monkeypatch.setattr(perplexity, "NUM_DOCUMENTS", 2)
    texts = "".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "b c a b", "left out"))
    (tmp_path / perplexity.FILE).write_text(texts)

    class Words:
        bos_token_id = 1

        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": [2 + ord(word) - ord("a") for word in text.split()]}

        def __len__(self) -> int:
            return 8

    setup = SimpleNamespace(text=tmp_path / "training.jsonl", tokenizer=Words())
    loaded = []

    def load(name: str, method: Any, seed: int, dtype: str) -> Any:
        loaded.append((name, seed, dtype))
        return tiny_llama(seed=seed, vocab_size=8, max_position_embeddings=512)

    perplexity.run(setup, load)
    perplexity.run(setup, load)  # goes on from the JSON
    assert len(loaded) == len(set(loaded)) == len(plan.STUDIED_SEEDS) + 2 and perplexity.missing() == []
    rows = json.loads(perplexity.PATH.read_text())["rows"]
    assert all(row["num_tokens"] == [3, 4] for row in rows)
    lines = [line.strip("| ").split(" | ") for line in perplexity.section(perplexity.PATH).splitlines()]
    (start,) = (line for line in lines if line[0] == "start")
    untrained = next(row for row in rows if row["method"] == "start")
    assert start[1] == "–" and float(start[4]) == pytest.approx(math.exp(sum(untrained["nll_sum"]) / 7), abs=0.06)


def test_right_answers_are_marked_of_screening_prompts_after_solved_training_prompts(modules, monkeypatch):
    accuracy = modules.accuracy
    records = {
        "train": [Record("t", ({"role": "user", "content": "1 + 1?"},), ("2\n#### 2",))],
        "held_out": [
            Record(f"h{i}", ({"role": "user", "content": f"{i} + 1?"},), (f"#### {i + 1}",)) for i in range(4)
        ],
    }
    setup = SimpleNamespace(name="gsm8k", tokenizer=None, run=SimpleNamespace(records=records.get),
                            stores={"train": SimpleNamespace(end_token_ids=(2,))})  # fmt: skip
    asked = []

    def run_task(model: str, tokenizer: Any, name: str, settings: Any, *, end_token_ids: Any) -> np.ndarray:
        files = (settings.data, settings.fewshot_data)
        questions, solved = ([json.loads(line) for line in Path(of).read_text().splitlines()] for of in files)
        assert (solved, end_token_ids) == ([{"question": "1 + 1?", "answer": "2\n#### 2"}], (2,))
        asked.append((model, [of["question"] for of in questions]))
        return np.array([0.0, float(model == "teacher"), 0.0, 0.0])

    monkeypatch.setattr(accuracy, "run_task", run_task)
    for _ in range(2):  # goes on from the JSON
        accuracy.run(setup, lambda name, *_: name)
    questions = ["0 + 1?", "1 + 1?", "2 + 1?", "3 + 1?"]
    assert asked == [("teacher", questions), ("start", questions)] and accuracy.missing() == []
    lines = accuracy.section(accuracy.PATH).splitlines()
    assert "| teacher | 4 | 1 | 0.2500 [0.0063, 0.8059] |" in lines
    assert "| start | 4 | 0 | 0.0000 [0.0000, 0.6024] |" in lines


def test_each_student_is_compared_at_its_best_top_p(modules, monkeypatch):
    decoding, plan = modules.decoding, modules.plan
    monkeypatch.setattr(plan, "FROZEN", (plan.OURS, "minillm"))
    monkeypatch.setattr(plan, "TAKEN_LAST", ())
    write_times(plan, 2.0, minillm=8.0)
    ours, other = f"{plan.OURS}, learning rate 0.0003", "minillm, learning rate 5e-05, cost 1"
    scores = {(ours, 0.8): 0.2, (ours, 0.2): 0.3, (ours, 0.01): 0.25, (other, 0.8): 0.1, (other, 0.2): 0.2,
              (other, 0.01): 0.28}  # fmt: skip

    def answers(setup: Any, model: str, seeds: Any, top_p: float) -> dict[str, Any]:
        score = scores.get((model, top_p), 0.0)
        return {"rouge_l": [[score, score + 0.1]] * 2, "distinct_2": [[0.5, 0.7]] * 2}

    monkeypatch.setattr(decoding, "screened_answers", answers)
    loaded = []

    def load(name: str, *which: Any) -> str:
        loaded.append((name, *which[1:]))
        return name

    decoding.run(None, load)
    assert decoding.missing() == []
    assert loaded == [
        ("start", 0, "bfloat16"),
        ("teacher", 0, "bfloat16"),
        *((name, seed, "bfloat16") for name in (ours, other) for seed in (1, 2)),
    ]
    lines = [line.strip("| ").split(" | ") for line in decoding.section(decoding.PATH).splitlines()]
    cells = {line[0]: line[1:] for line in lines if len(line) > 3}
    assert [cell.split()[0] for cell in cells[ours][:4]] == ["2", "0.2500", "0.3500", "0.3000"]
    assert cells[ours][4] == "–"
    # 0.28 at 0.01 against 0.3 at 0.2, the same for every prompt.
    assert "is +0.1000 [+0.1000, +0.1000] at top-p 0.8, and +0.0200" in decoding.lead(decoding.PATH, "minillm")
    assert decoding.lead(decoding.PATH, "seqkd") == "" == decoding.lead(decoding.PATH.with_name("none.json"), "minillm")
    assert cells[other][4] == "-0.0200 [-0.0200, -0.0200]" and cells[other][5] == "0.60"
