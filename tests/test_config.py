"""Recipes: what is accepted, what is refused, and whether the refusal helps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.harness import tdistill, write_recipe

from tdistill import pipeline
from tdistill.config import Recipe, load_recipe
from tdistill.errors import ConfigError, DomainError, ProbabilityRangeError, TDistillError
from tdistill.objectives import OBJECTIVES, IQLearn
from tdistill.training.arguments import TDistillConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*(ROOT / "recipes").glob("**/*.yaml"), ROOT / "src" / "tdistill" / "demo" / "recipe.yaml"])

PLAIN = {
    "name": "plain",
    "output": "runs/plain",
    "teacher": {"model": "org/teacher"},
    "data": {"train": "train.jsonl", "dev": "dev.jsonl", "held_out": "held_out.jsonl"},
    "capture": {"p_max": 0.9},
    "student": {"layers": 2},
    "phases": {
        "sft": {"args": {"objective": "sft", "max_steps": 10}},
        "bd": {"args": {"objective": {"name": "iq_learn", "alpha": 2}, "max_steps": 10}},
        "more": {"control": True, "init": "sft", "args": {"objective": "sft"}},
    },
    "evaluation": {"seeds": [1, 2]},
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", PLAIN)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def write(tmp_path: Path, place: str, value: Any) -> Path:
    """The plain recipe with the value at a dotted place replaced by another."""
    tree = copy.deepcopy(PLAIN)
    part: Any = tree
    *way, last = place.split(".")
    for key in way:
        part = part.setdefault(key, {})
    part[last] = value
    return write_recipe(tmp_path / "changed.yaml", tree)


# ---- what is accepted ----


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_of_the_project_parses_and_survives_a_round_trip(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TDISTILL_DATA", str(tmp_path))
    recipe = load_recipe(path)
    assert path.parent.name != "paper" or recipe.name == path.stem
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_there_are_recipes():
    assert [path.name for path in RECIPES].count("demo.yaml") == 1
    assert load_recipe(ROOT / "recipes" / "demo.yaml") == load_recipe(RECIPES[-1])


PAPER = {
    "gpt2_120m": ("gpt2", "teacher_gpt2_1.5b", "gpt2-xl"),
    "gpt2_340m": ("gpt2-medium", "teacher_gpt2_1.5b", "gpt2-xl"),
    "gpt2_760m": ("gpt2-large", "teacher_gpt2_1.5b", "gpt2-xl"),
    "opt_125m": ("facebook/opt-125m", "teacher_opt_6.7b", "facebook/opt-6.7b"),
    "opt_350m": ("facebook/opt-350m", "teacher_opt_6.7b", "facebook/opt-6.7b"),
    "opt_1.3b": ("facebook/opt-1.3b", "teacher_opt_6.7b", "facebook/opt-6.7b"),
    "qwen2.5_0.5b": ("Qwen/Qwen2.5-0.5B", "teacher_qwen2.5_3b", "Qwen/Qwen2.5-3B"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_the_papers_settings(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TDISTILL_DATA", "/data")
    student, teacher, model = PAPER[name]
    recipe, fine_tuning = (load_recipe(ROOT / "recipes" / "paper" / f"{file}.yaml") for file in (name, teacher))
    assert recipe.student.model == student
    # The teacher is what its own recipe leaves.
    assert recipe.teacher.model == f"{fine_tuning.output}/student"
    assert (fine_tuning.teacher.model, fine_tuning.student.model, fine_tuning.capture.mode) == (model, model, "score")
    assert recipe.output != fine_tuning.output
    for data in (recipe.data, fine_tuning.data):
        assert (data.train, data.template, data.max_prompt_tokens) == ("/data/train/dolly_train.jsonl", "alpaca", 256)
    assert (recipe.capture.p_max, recipe.capture.answers_per_prompt, recipe.capture.max_actions) == (0.8, 8, None)
    assert recipe.data.max_prompt_tokens + recipe.capture.max_new_tokens == 512
    evaluation = recipe.evaluation
    assert (evaluation.seeds, evaluation.temperature, evaluation.top_p) == ((10, 20, 30, 40, 50), 1, 0.8)
    assert [recipe.init_of(phase) for phase in recipe.phases] == ["start", "sft", "sft"]
    assert (list(recipe.phases), recipe.controls, recipe.final_phase) == (["sft", "bd_paper", "bd"], ["bd_paper"], "bd")

    args = recipe.arguments("bd_paper", "unused")
    loss = args.build_objective()
    assert (loss.alpha, loss.gamma, loss.phi, loss.coordinates, loss.first_order, loss.q_floor, loss.steps) == (
        *(0.1, 0.99, "chi2", "raw", "sampled", -10, 1),
    )
    assert args.p == (0.5 if name == "opt_1.3b" else None)
    assert (args.learning_rate, args.off_support, args.text_weight) == (5e-6, "none", 1)
    assert args.text_sequences_per_batch > 0
    # 64 answers of the 69 tokens that Dolly's have.
    assert args.response_tokens_per_batch * args.gradient_accumulation_steps == 64 * 69
    assert recipe.arguments("sft", "unused").build_objective().name == "sft"

    own = recipe.arguments("bd", "unused")
    assert own.build_objective() == IQLearn()
    assert own.off_support == TDistillConfig("unused").off_support != "none"
    for key in ("learning_rate", "num_train_epochs", "response_tokens_per_batch", "gradient_accumulation_steps"):
        assert getattr(own, key) == getattr(args, key)


def test_the_papers_student_can_be_made_the_student(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TDISTILL_DATA", "/data")
    roles = ["phases.bd_paper.control=false", "phases.bd.control=true"]
    recipe = load_recipe(ROOT / "recipes" / "paper" / "gpt2_120m.yaml", roles)
    assert (recipe.final_phase, recipe.controls) == ("bd_paper", ["bd"])
    assert [recipe.init_of(phase) for phase in recipe.phases] == ["start", "sft", "sft"]


def test_an_environment_variable_that_is_not_set_is_named_with_where_it_is_needed(
    plain: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TDISTILL_DATA", raising=False)
    message = refusal(ROOT / "recipes" / "paper" / "gpt2_120m.yaml")
    assert "gpt2_120m.yaml' takes data.train from the environment variable TDISTILL_DATA, which is not set." in message
    assert "export TDISTILL_DATA=" in message and "data.train=..." in message
    assert "name from the environment variable TDISTILL_NAME" in refusal(plain, "name=${oc.env:TDISTILL_NAME}")
    assert load_recipe(plain, ["name=${oc.env:TDISTILL_NAME,default}"]).name == "default"


# ---- a recipe that extends another ----


def extend(base: Path, tree: dict[str, Any], name: str = "child.yaml") -> Path:
    """A recipe beside its base."""
    return write_recipe(base.parent / name, {"base": base.name, **tree})


def test_a_recipe_extends_another_one_key_by_key(plain: Path, monkeypatch: pytest.MonkeyPatch):
    child = extend(
        plain,
        {
            "name": "child",
            "output": "runs/${name}",
            "phases": {
                "bd": {"args": {"objective": {"alpha": 3}}},
                "more": {"args": {"objective": {"name": "iq_learn", "gamma": 0.5}}},
                "last": {"args": {"max_steps": 5}},
            },
            "evaluation": {"seeds": [3]},
        },
    )
    monkeypatch.chdir("/")  # the base is found from the recipe's folder, wherever one is
    recipe, base = load_recipe(child), load_recipe(plain)
    assert (recipe.name, recipe.output) == ("child", "runs/child")
    assert list(recipe.phases) == ["sft", "bd", "more", "last"]
    assert recipe.phases["bd"].args == {"objective": {"name": "iq_learn", "alpha": 3}, "max_steps": 10}
    assert recipe.phases["more"].args == {"objective": {"name": "iq_learn", "gamma": 0.5}}
    assert (recipe.phases["more"].init, recipe.phases["more"].control) == ("sft", True)
    assert recipe.evaluation.seeds == (3,)
    assert (recipe.teacher, recipe.data, recipe.capture) == (base.teacher, base.data, base.capture)
    assert "base" not in yaml.safe_load(recipe.to_yaml())
    assert load_recipe(child, ["capture.p_max=0.7"]).capture.p_max == 0.7


def test_references_in_the_base_see_what_the_recipe_changes(plain: Path):
    tree = copy.deepcopy(PLAIN) | {"output": "runs/${name}"}
    write_recipe(plain, tree)
    assert load_recipe(extend(plain, {"name": "child"})).output == "runs/child"


def test_null_takes_the_place_of_a_value_of_the_base(plain: Path):
    student = load_recipe(extend(plain, {"student": {"layers": None, "model": "org/student"}})).student
    assert (student.layers, student.model) == (None, "org/student")


def test_a_base_in_another_folder(plain: Path):
    (plain.parent / "below").mkdir()
    child = write_recipe(plain.parent / "below" / "child.yaml", {"base": "../recipe.yaml", "name": "child"})
    assert load_recipe(child).name == "child"


@pytest.mark.parametrize("base", [3, None, "", ["recipe.yaml"], {"path": "recipe.yaml"}])
def test_a_base_that_is_no_path_is_refused(plain: Path, base: Any):
    child = write_recipe(plain.parent / "child.yaml", {"base": base})
    message = refusal(child)
    assert f"'{child}': base = {base!r} must be the path of a recipe" in message


def test_a_missing_or_broken_base_is_named_with_the_recipe_that_asks_for_it(plain: Path):
    child = write_recipe(plain.parent / "child.yaml", {"base": "none.yaml"})
    assert all(part in refusal(child) for part in (str(child), f"No recipe at '{plain.parent / 'none.yaml'}'"))
    plain.write_text("a: [1\n")
    assert all(part in refusal(extend(plain, {})) for part in (str(child), f"'{plain}' is not readable", "line 2"))
    plain.write_text("- a\n")
    assert all(part in refusal(extend(plain, {})) for part in (str(child), f"'{plain}' must be a mapping"))


def test_a_base_of_a_base_is_refused(plain: Path):
    child = extend(plain, {"name": "child"})
    message = refusal(extend(child, {"name": "grandchild"}, "grandchild.yaml"))
    assert all(part in message for part in ("grandchild.yaml'", f"extends '{child}'", "A base stands on its own"))
    assert "A base stands on its own" in refusal(write_recipe(child, {"base": child.name}))


def test_kinds_that_cannot_be_merged_are_refused_with_both_files(plain: Path):
    child = extend(plain, {"phases": ["sft"]})
    assert all(
        part in refusal(child) for part in (f"'{child}' cannot be laid over '{plain}'", "a mapping where it has")
    )


def test_what_a_child_makes_invalid_is_said_of_the_child(plain: Path):
    child = extend(plain, {"capture": {"pmax": 0.5}})
    assert all(part in refusal(child) for part in (str(child), "capture.pmax: unknown key. Did you mean 'p_max'?"))


def test_dry_run_prints_a_recipe_that_loads_back_to_the_same_one_and_touches_nothing(plain: Path, tmp_path: Path):
    overrides = [
        f"output={tmp_path}/run",
        "name='Größe: a # b'",
        "capture.max_actions=null",
        "phases.bd.args.objective.alpha=.inf",
        "phases.bd.args.learning_rate=5e-5",
        "peft={r: 4, target_modules: [q_proj]}",
        "evaluation.compare=[[bd, more], [bd, teacher]]",
    ]
    outcome = tdistill("run", plain, *overrides, "--dry-run")
    assert outcome.code == 0
    (tmp_path / "printed.yaml").write_text(outcome.out, encoding="utf-8")
    printed = load_recipe(tmp_path / "printed.yaml")
    assert printed == load_recipe(plain, overrides)
    assert printed.name == "Größe: a # b"
    assert printed.capture.max_actions is None
    assert printed.phases["bd"].args["objective"] == {"name": "iq_learn", "alpha": math.inf}
    assert printed.phases["bd"].args["learning_rate"] == 5e-5
    assert printed.evaluation.compare == (("bd", "more"), ("bd", "teacher"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["run", "capture", "train", "eval"])
def test_every_verb_with_a_recipe_has_a_dry_run(verb: str, plain: Path):
    outcome = tdistill(verb, plain, "--dry-run")
    assert (outcome.code, Recipe.model_validate(yaml.safe_load(outcome.out))) == (0, load_recipe(plain))


def test_answers_in_the_evaluation_are_as_long_as_the_teachers_unless_told_otherwise(plain: Path):
    assert load_recipe(plain).evaluation.max_new_tokens == 256
    assert load_recipe(plain, ["capture.max_new_tokens=7"]).evaluation.max_new_tokens == 7
    assert (
        load_recipe(plain, ["capture.max_new_tokens=7", "evaluation.max_new_tokens=9"]).evaluation.max_new_tokens == 9
    )


def test_a_phase_starts_from_the_phase_before_it_that_is_no_control(plain: Path):
    recipe = load_recipe(plain, ["phases.last={args: {objective: sft}}"])
    assert [recipe.init_of(name) for name in recipe.phases] == ["start", "sft", "sft", "bd"]
    assert (recipe.final_phase, recipe.controls) == ("last", ["more"])


# ---- overrides ----


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("capture.p_max=0.5", ["capture", "p_max"], 0.5),
        ("capture.seed=3", ["capture", "seed"], 3),
        ("capture.max_actions=null", ["capture", "max_actions"], None),
        ("evaluation.seeds=[5, 6]", ["evaluation", "seeds"], (5, 6)),
        ("phases.bd.args.objective.alpha=.inf", ["phases", "bd", "args", "objective", "alpha"], math.inf),
        ("phases.bd.args.learning_rate=5e-4", ["phases", "bd", "args", "learning_rate"], 5e-4),
        ("phases.bd.args.lr_scheduler_type=cosine", ["phases", "bd", "args", "lr_scheduler_type"], "cosine"),
        ("data.train=a=b.jsonl", ["data", "train"], "a=b.jsonl"),
        (" capture.seed =4", ["capture", "seed"], 4),
        ("evaluation.max_new_tokens=${capture.seed}", ["evaluation", "max_new_tokens"], 1),
    ],
)
def test_an_override_sets_one_value(plain: Path, override: str, place: list[str], value: Any):
    def at(recipe: Recipe) -> Any:
        part: Any = recipe.model_dump()
        for key in place:
            part = part[key]
        return part

    assert at(load_recipe(plain, ["capture.seed=1", override])) == value
    tree, before = load_recipe(plain, ["capture.seed=1", override]).model_dump(), load_recipe(plain).model_dump()
    assert set(tree) == set(before)
    untouched = {"name", "output", "teacher", "student"}
    assert {key: tree[key] for key in untouched} == {key: before[key] for key in untouched}


def test_an_override_makes_a_new_phase(plain: Path):
    recipe = load_recipe(plain, ["phases.extra={args: {max_steps: 4}}", "phases.extra.args.max_steps=5"])
    assert list(recipe.phases) == ["sft", "bd", "more", "extra"]
    assert recipe.phases["extra"].args == {"max_steps": 5}


def test_an_override_inside_a_misspelt_phase_does_not_make_one(plain: Path):
    with pytest.raises(ConfigError, match=r"'phases\.sfft\.args\.p=1': the recipe has no phase 'sfft'.*'sft'\?"):
        load_recipe(plain, ["phases.sfft.args.p=1"])


def test_later_overrides_win(plain: Path):
    assert load_recipe(plain, ["capture.seed=1", "capture.seed=2"]).capture.seed == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("p_max", ["'p_max'", "key.subkey=value"]),
        ("=3", ["'=3'", "key.subkey=value"]),
        ("capture.seed={", ["'capture.seed={'", "cannot be applied"]),
        ("phases=[1]", ["'phases=[1]'", "cannot be applied"]),
        ("name=${nowhere}", ["nowhere", "does not resolve"]),
        ("name=???", ["name", "does not resolve", "Missing"]),
        ("capture.p_max.deep=1", ["capture.p_max", "{'deep': 1}"]),
    ],
)
def test_a_malformed_override_is_named(plain: Path, override: str, parts: list[str]):
    message = refusal(plain, override)
    assert all(part in message for part in parts), message


# ---- unknown keys ----


@pytest.mark.parametrize(
    ("override", "place", "suggestion"),
    [
        ("teachr.model=x", "teachr", "teacher"),
        ("capture.pmax=0.9", "capture.pmax", "p_max"),
        ("teacher.model_=x", "teacher.model_", "model"),
        ("data.heldout=x", "data.heldout", "held_out"),
        ("student.layer=3", "student.layer", "layers"),
        ("evaluation.seed=3", "evaluation.seed", "seeds"),
        ("phases.bd.inti=sft", "phases.bd.inti", "init"),
        ("phases.bd.args.lerning_rate=1", "phases.bd.args", "learning_rate"),
        ("phases.bd.args.off_suport=tail", "phases.bd.args", "off_support"),
        ("phases.bd.args.objective.alpha_=1", "phases.bd.args", "alpha"),
        ("phases.bd.args.objective.name=iqlearn", "phases.bd.args", "iq_learn"),
        ("phases.sft.args.objective=sftt", "phases.sft.args", "sft"),
        ("peft.target_module=[q_proj]", "peft", "target_modules"),
        ("phases.bd.rollouts.everyy=3", "phases.bd.rollouts.everyy", "every"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_known_one(plain: Path, override: str, place: str, suggestion: str):
    message = refusal(plain, override)
    assert f"  {place}: " in message
    assert f"Did you mean '{suggestion}'?" in message
    assert str(plain) in message


def test_a_key_like_no_other_gets_the_list(plain: Path):
    assert "Known: capture, data, evaluation, name, output, peft, phases, student, teacher." in refusal(plain, "zzz=1")


def test_all_defects_are_reported_at_once(plain: Path):
    message = refusal(plain, "zzz=1", "capture.pmax=1", "evaluation.top_p=2", "phases.bd.args.max_steps=many")
    assert len(message.splitlines()) == 5
    for place in ("zzz", "capture.pmax", "evaluation.top_p", "phases.bd.args"):
        assert f"\n  {place}: " in message


# ---- values ----


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("capture.p_max=much", ["capture.p_max", "number", "'much'"]),
        ("capture.temperature=0", ["capture.temperature", "greater than 0", "given: 0"]),
        ("capture.temperature=.inf", ["capture.temperature", "finite"]),
        ("capture.max_actions=0", ["capture.max_actions", "greater than or equal to 1", "given: 0"]),
        ("capture.max_new_tokens=0", ["capture.max_new_tokens", "greater than or equal to 1"]),
        ("capture.log_prob_bits=12", ["capture.log_prob_bits", "8 or 16", "given: 12"]),
        ("capture.seed=-1", ["capture.seed", "given: -1"]),
        ("capture.mode=scoer", ["capture.mode", "'generate' or 'score'", "'scoer'"]),
        ("data.turns=some", ["data.turns", "'last' or 'all'", "'some'"]),
        ("data.text_tokens=1", ["data.text_tokens", "given: 1"]),
        ("student.layers=0", ["student.layers", "given: 0"]),
        ("student.method=odd", ["student.method", "'block_influence' or 'even'", "'odd'"]),
        ("evaluation.top_p=0", ["evaluation.top_p", "given: 0"]),
        ("evaluation.seeds=[]", ["evaluation.seeds", "at least 1"]),
        ("evaluation.seeds=[1, 1]", ["evaluation.seeds", "[1, 1]", "different"]),
        ("evaluation.seeds=[-1]", ["evaluation.seeds", "[-1]", "from 0"]),
        ("evaluation.temperature=.inf", ["evaluation.temperature", "inf", "finite"]),
        ("phases.bd.args.max_steps=many", ["phases.bd.args", "max_steps", "integer", "'many'"]),
        ("phases.bd.args.learning_rate=fast", ["phases.bd.args", "learning_rate", "number", "'fast'"]),
        # `no` without quotes is a truth value in YAML.
        ("phases.bd.args.save_strategy=no", ["phases.bd.args", "save_strategy", "'no'", "given: False; put no in"]),
        ("phases.bd.rollouts.share=2", ["phases.bd.rollouts", "share = 2", "(0, 1]"]),
        ("phases.bd.args.per_device_train_batch_size=4", ["phases.bd.args", "= 4", "response_tokens_per_batch"]),
        ("phases.bd.args.label_smoothing_factor=0.1", ["phases.bd.args", "= 0.1", "no effect"]),
        ("phases.bd.args.kernel=fast", ["phases.bd.args", "kernel", "'candidates' or 'reference'", "'fast'"]),
        ("phases.bd.args.off_support=some", ["phases.bd.args", "off_support", "'tail'", "'some'"]),
        ("phases.bd.args.lr_scheduler_type=cosin", ["phases.bd.args", "cosin", "cosine"]),
        ("phases.bd.args.objective.coordinates=odd", ["phases.bd.args", "coordinates", "'value_head'", "'odd'"]),
        ("phases.bd.args.objective.alpha=big", ["phases.bd.args", "alpha", "number", "'big'"]),
        (
            "phases.bd.args.response_tokens_per_batch=0",
            ["phases.bd.args", "response_tokens_per_batch", "0", "at least"],
        ),
        ("phases.bd.args.output_dir=x", ["phases.bd.args", "output_dir"]),
        (
            "phases.bd.args.load_best_model_at_end=true",
            ["phases.bd.args", "load_best_model_at_end", "eval_strategy", "alike", "no and steps"],
        ),
        ("phases.bd.args.metric_for_best_model=loss", ["phases.bd.args: metric_for_best_model", "'loss'", "nll"]),
        (
            "phases.bd.args={metric_for_best_model: agreement_top1, greater_is_better: false}",
            ["phases.bd.args: greater_is_better = False", "worst agreement_top1", "Leave it out"],
        ),
        ("peft={r: four}", ["peft", "'r'", "integer", "'four'"]),
        ("name=''", ["name", "at least 1 character"]),
        ("output=null", ["output", "string", "None"]),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(plain: Path, override: str, parts: list[str]):
    message = refusal(plain, override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("p", ["0", "-0.1", "1.5", ".nan"])
def test_p_outside_its_range_is_refused(plain: Path, p: str):
    for override, where in ((f"capture.p_max={p}", "capture.p_max"), (f"phases.bd.args.p={p}", "phases.bd.args: p")):
        with pytest.raises(ProbabilityRangeError, match=r"outside \(0, 1\]") as caught:
            load_recipe(plain, [override])
        assert f"{where} = " in str(caught.value)


def test_p_above_p_max_is_refused_with_both_values(plain: Path):
    assert load_recipe(plain, ["phases.bd.args.p=0.9"]).phases["bd"].args["p"] == 0.9
    with pytest.raises(ProbabilityRangeError, match=r"phases\.bd\.args\.p = 0\.91 is above capture\.p_max = 0\.9"):
        load_recipe(plain, ["phases.bd.args.p=0.91"])


def test_a_hyperparameter_outside_its_domain_names_the_phase(plain: Path):
    with pytest.raises(DomainError, match=r"phases\.bd\.args: iq_learn: alpha = -1\.0 must be positive"):
        load_recipe(plain, ["phases.bd.args.objective.alpha=-1"])


def test_an_objective_that_needs_rollouts_without_them_is_refused(plain: Path):
    mixture = "phases.bd.args.objective={name: iq_learn, student_value_weight: 0.5}"
    with pytest.raises(ConfigError, match=r"phases\.bd\.args\.objective learns from the student's own.*rollouts"):
        load_recipe(plain, [mixture])
    recipe = load_recipe(plain, [mixture, "phases.bd.rollouts={every: 3}"])
    assert (recipe.phases["bd"].rollouts.every, recipe.phases["bd"].rollouts.share) == (3, 0.5)
    assert "phases.bd.rollouts" in refusal(plain, "phases.bd.rollouts={shares: 1}")
    assert "rollouts.share = 2" in refusal(plain, "phases.bd.rollouts={share: 2}")


def test_rollouts_are_refused_where_the_student_would_imitate_itself(plain: Path):
    with pytest.raises(
        ConfigError, match=r"phases\.sft\.args\.objective = sft would imitate.*Leave phases\.sft\.rollouts out"
    ):
        load_recipe(plain, ["phases.sft.rollouts={share: 0.5}"])
    # Only the off-support term reads them there, or a temporal term too.
    load_recipe(plain, ["phases.bd.rollouts={share: 0.5}"])
    for objective in OBJECTIVES:
        values = [
            "capture.log_prob_bits=16",
            f"phases.bd.args={{objective: {objective}}}",
            "phases.bd.rollouts={share: 1}",
        ]
        assert objective == "sft" or load_recipe(plain, values).phases["bd"].rollouts is not None


def test_what_the_trainer_would_refuse_after_the_capture_is_refused_before_it(tmp_path: Path):
    reverse = write(tmp_path, "phases.bd", {"args": {"objective": "reverse_kl"}})
    with pytest.raises(ConfigError, match=r"phases\.bd\.args\.objective needs capture\.log_prob_bits: 16.*has 8"):
        load_recipe(reverse)
    load_recipe(reverse, ["capture.log_prob_bits=16"])
    minillm = write(tmp_path, "phases.bd", {"args": {"objective": "minillm"}, "rollouts": {"share": 1.0}})
    load_recipe(minillm)
    for change, part in (
        ("phases.bd.rollouts.top_p=0.9", "rollouts.temperature and rollouts.top_p to 1"),
        ("capture.temperature=0.7", "capture.temperature = 0.7. Capture at temperature 1"),
    ):
        with pytest.raises(ConfigError, match=r"phases\.bd: The objective 'minillm'") as caught:
            load_recipe(minillm, [change])
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("teacher.model_kwargs={token: hf_secret}", "HF_TOKEN"),
        ("phases.bd.args={hub_token: hf_secret}", "HF_TOKEN"),
        ("teacher.model_kwargs={trust_remote_code: true}", "trust_remote_code stays off"),
    ],
)
def test_keys_and_remote_code_have_no_place_in_a_recipe(plain: Path, override: str, part: str):
    message = refusal(plain, override)
    assert part in message and "hf_secret" not in message


def test_checkpoints_are_not_sent_to_the_hub(plain: Path):
    for override in ("phases.bd.args.push_to_hub=true", "phases.bd.args.hub_model_id=me/mine"):
        assert "hf upload ORG/NAME OUTPUT/student" in refusal(plain, override)


def test_settings_of_a_template_are_names_and_plain_values(plain: Path):
    kwargs = load_recipe(plain, ["data.template_kwargs.enable_thinking=false"]).data.template_kwargs
    assert kwargs == {"enable_thinking": False}
    for override in ("data.template_kwargs={'a b': 1}", "data.template_kwargs={a: null}"):
        assert "template_kwargs" in refusal(plain, override)


def test_phases_after_each_other_have_other_orders_of_batches_and_phases_beside_each_other_the_same():
    recipe = load_recipe(RECIPES[-1])
    orders = {name: recipe.arguments(name, "x").data_seed for name in ("sft", "bd", "sft_continued")}
    assert orders == {"sft": 42, "bd": 43, "sft_continued": 43}
    given = load_recipe(RECIPES[-1], ["phases.bd.args.data_seed=7", "phases.sft_continued.args.seed=1"])
    assert [given.arguments(name, "x").data_seed for name in ("bd", "sft_continued")] == [7, 2]


def test_a_phase_has_a_name_of_its_own_where_it_is_logged(plain: Path):
    recipe = load_recipe(plain)
    assert recipe.arguments("bd", "x").run_name == f"{recipe.name}-bd"
    assert load_recipe(plain, ["phases.bd.args.run_name=mine"]).arguments("bd", "x").run_name == "mine"


def test_a_budget_is_in_the_place_of_p(plain: Path):
    assert load_recipe(plain, ["phases.bd.args.p_budget_nats=2"]).arguments("bd", "x").p_budget_nats == 2
    with pytest.raises(ConfigError, match=r"p = 0\.5 and p_budget_nats = 2\.0 exclude each other"):
        load_recipe(plain, ["phases.bd.args.p_budget_nats=2", "phases.bd.args.p=0.5"])
    with pytest.raises(DomainError, match="budget_nats = 0"):
        load_recipe(plain, ["phases.bd.args.p_budget_nats=0"])
    with pytest.raises(DomainError, match="p_budget_gamma = 2"):
        load_recipe(plain, ["phases.bd.args.p_budget_nats=1", "phases.bd.args.p_budget_gamma=2"])
    with pytest.raises(ProbabilityRangeError, match=r"phases\.bd\.args\.p_budget_nats = 1\.0 needs action sets"):
        load_recipe(plain, ["phases.bd.args.p_budget_nats=1", "capture.p_max=1"])


def test_transitions_outside_are_kept_only_where_the_token_is_not_read(plain: Path, tmp_path: Path):
    def arguments(**objective: object) -> TDistillConfig:
        return TDistillConfig(str(tmp_path), objective=objective, outside="keep", use_cpu=True)

    for objective in (
        {"name": "iq_learn", "alpha": 10.0},
        {"name": "iq_learn", "first_order": "sampled"},
        {"name": "path_consistency"},
        {"name": "minillm"},
        {"name": "sft"},
    ):
        with pytest.raises(ConfigError, match="reads the token taken"):
            arguments(**objective)
    assert arguments(name="iq_learn").outside == arguments(name="skew_kl", source="set").outside == "keep"
    assert "'outside': Input should be 'drop' or 'keep'" in refusal(plain, "phases.bd.args.outside=kept")
    with pytest.raises(ConfigError, match="outside = 'kept' is unknown"):
        TDistillConfig(str(tmp_path), outside="kept", use_cpu=True)  # type: ignore[arg-type]


def test_the_target_of_the_off_support_term_is_one_of_two(plain: Path):
    recipe = load_recipe(plain, ["phases.bd.args.off_support_target=set"])
    assert recipe.arguments("bd", "x").build_off_support().target == "set"
    assert "off_support" in refusal(plain, "phases.bd.args.off_support_target=sets")


def test_settings_of_an_objective_without_its_name_are_refused(plain: Path):
    # `objective.alpha` over `objective: sft` must not become the objective that has an alpha.
    message = refusal(plain, "phases.sft.args.objective.alpha=1")
    assert "phases.sft.args" in message
    assert "has no name" in message


# ---- p = 1 ----


def test_p_max_1_needs_phases_that_do_without_action_sets(plain: Path):
    with pytest.raises(ConfigError, match=r"phases\.bd\.args\.off_support = \w+ has nothing .* Set it to none"):
        load_recipe(plain, ["capture.p_max=1"])
    with pytest.raises(DomainError, match=r"phases\.bd\.args, capture\.p_max = 1: .*first_order to sampled"):
        load_recipe(plain, ["capture.p_max=1", "phases.bd.args.off_support=none"])
    whole = [
        "capture.p_max=1",
        "phases.bd.args.off_support=none",
        "phases.bd.args.objective.first_order=sampled",
    ]
    assert load_recipe(plain, whole).capture.p_max == 1
    with pytest.raises(ProbabilityRangeError, match=r"phases\.bd\.args\.p = 0\.8, but capture\.p_max = 1 keeps no"):
        load_recipe(plain, [*whole, "phases.bd.args.p=0.8"])
    with pytest.raises(ConfigError, match=r"metric_for_best_model = 'kl_set_tail' is not measured.*Known: nll"):
        load_recipe(plain, [*whole, "phases.sft.args.metric_for_best_model=kl_set_tail"])


# ---- structure ----


@pytest.mark.parametrize(
    ("place", "value", "parts"),
    [
        ("phases", [{"sft": {}}], ["phases", "dictionary"]),
        ("phases", {}, ["phases", "at least one phase"]),
        ("phases", None, ["phases", "dictionary"]),
        ("phases.sft", None, ["phases.sft", "dictionary"]),
        ("phases.sft.args", ["max_steps"], ["phases.sft.args", "dictionary"]),
        ("phases.sft.args.objective", ["sft"], ["phases.sft.args", "objective", "dictionary"]),
        ("phases.bd.args.objective.name", ["sft"], ["phases.bd.args", "name of an objective", "['sft']"]),
        ("phases.bd.args.objective.alpha", {"value": 1}, ["phases.bd.args", "alpha", "number"]),
        ("data", ["train.jsonl"], ["data", "dictionary"]),
        ("data.train", ["train.jsonl"], ["data.train", "string"]),
        ("data.train", {"path": "x"}, ["data.train", "string"]),
        ("teacher", "org/teacher", ["teacher", "dictionary", "'org/teacher'"]),
        ("evaluation", None, ["evaluation", "dictionary"]),
        ("evaluation.seeds", 10, ["evaluation.seeds", "tuple", "given: 10"]),
        ("evaluation.seeds", {"a": 1}, ["evaluation.seeds", "tuple"]),
        ("evaluation.compare", [["bd"]], ["evaluation.compare"]),
        ("evaluation.compare", [["bd", "mores"]], ["evaluation.compare", "'mores'", "Did you mean 'more'?"]),
        ("evaluation.start", "sfft", ["evaluation.start", "'sfft'", "Did you mean 'sft'?"]),
        ("peft", ["r"], ["peft", "dictionary"]),
        ("student", {}, ["student", "student.model", "student.layers"]),
        ("student", {"layers": 2, "model": "x"}, ["student", "student.model", "student.layers"]),
        ("student", {"layers": None, "model": ""}, ["student.model", "at least 1 character"]),
        ("capture", {"mode": "score", "answers_per_prompt": 2}, ["capture", "answers_per_prompt = 2", "use 1"]),
    ],
)
def test_a_part_of_the_wrong_kind_is_named(tmp_path: Path, place: str, value: Any, parts: list[str]):
    message = refusal(write(tmp_path, place, value))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("key", ["name", "output", "teacher", "data", "student", "phases"])
def test_a_missing_part_is_named(tmp_path: Path, key: str):
    path = write_recipe(tmp_path / "recipe.yaml", {k: v for k, v in PLAIN.items() if k != key})
    assert f"  {key}: Field required" in refusal(path)


@pytest.mark.parametrize("init", ["bd", "more", "nowhere"])
def test_a_phase_cannot_start_from_itself_or_a_later_or_unknown_one(plain: Path, init: str):
    message = refusal(plain, f"phases.bd.init={init}")
    assert f"phases.bd.init = '{init}' is no earlier phase; earlier: start, sft" in message


@pytest.mark.parametrize("name", ["start", "teacher"])
def test_reserved_names_are_refused(tmp_path: Path, name: str):
    assert f"'{name}' is reserved" in refusal(write(tmp_path, f"phases.{name}", {}))


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "a b"])
def test_a_phase_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str):
    tree = {**PLAIN, "phases": {**PLAIN["phases"], name: {}}}  # type: ignore[dict-item]
    assert f"'{name}' is to be a folder's name" in refusal(write_recipe(tmp_path / "recipe.yaml", tree))


def test_a_recipe_of_controls_only_is_refused(tmp_path: Path):
    assert "no control" in refusal(write(tmp_path, "phases", {"sft": {"control": True}}))


# ---- sets of prompts ----


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"held_out": "train.jsonl"}, ["train and held_out are the same prompts (train.jsonl)", "name another file"]),
        ({"held_out": "train.jsonl", "held_out_split": "test"}, ["train and held_out are the same"]),
        ({"dev": "train.jsonl"}, ["train and dev are the same"]),
        ({"held_out": "dev.jsonl"}, ["dev and held_out are the same"]),
        (
            {"dev": "org/set", "held_out": "org/set"},
            ["dev and held_out", "(org/set, split train)", "or a held_out_split"],
        ),
        (
            {"train": "org/set", "dev": "org/set", "train_config": "main", "dev_config": "main"},
            ["train and dev", "(org/set, main, split train)"],
        ),
        ({"train_config": "main"}, ["train_config = 'main'", "the file train.jsonl", "leave it out"]),
        ({"train": "org/set", "train_config": ""}, ["data.train_config", "at least 1 character"]),
    ],
)
def test_sets_that_are_the_same_and_configurations_of_files_are_refused(tmp_path: Path, data: dict, parts: list[str]):
    message = refusal(write(tmp_path, "data", {**PLAIN["data"], **data}))  # type: ignore[dict-item]
    assert "  data" in message and all(part in message for part in parts), message


def test_splits_and_configurations_of_one_data_set_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = {"train": "org/set", "dev": "org/set", "held_out": "org/set", "max_prompt_tokens": 64}
    data |= {"dev_split": "train[90%:]", "held_out_config": "main"}
    recipe = load_recipe(write(tmp_path, "data", data), [f"output={tmp_path / 'run'}"])
    asked = []
    monkeypatch.setattr(pipeline, "read_records", lambda *values: asked.append(values))
    run = pipeline.Run(recipe)
    for split in pipeline.SPLITS:
        run.records(split)
    assert asked == [("org/set", "train", None), ("org/set", "train[90%:]", None), ("org/set", "train", "main")]


# ---- files ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["name: Field required"]),
        ("- a\n- b\n", ["mapping"]),
        ("just words", ["name: Field required", "just words: unknown key"]),
        ("a: [1\n", ["not readable", "line 2"]),
        ("name: a\nname: b\n", ["not readable", "duplicate"]),
        ("name: \xff", ["not readable"]),
        ("1: x\n", ["1: Keys should be strings"]),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, parts: list[str]):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    message = refusal(path)
    assert str(path) in message
    assert all(part in message for part in parts), message


def test_a_missing_recipe_says_where_recipes_are(tmp_path: Path):
    message = refusal(tmp_path / "none.yaml")
    assert "none.yaml" in message
    assert "tdistill ls recipes" in message
    assert str(tmp_path) in refusal(tmp_path)  # a folder is no recipe either


def test_the_command_line_prints_a_refusal_alone_and_exits_with_2(plain: Path):
    outcome = tdistill("run", plain, "capture.pmax=0.9", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert (
        outcome.err
        == f"error: The recipe '{plain}' is not valid:\n  capture.pmax: unknown key. Did you mean 'p_max'?\n"
    )


@pytest.mark.parametrize("place", ["capture", "data", "evaluation", "name", "phases", "student", "teacher"])
@pytest.mark.parametrize("value", [None, 0, -1.5, True, "x", "", [], [None], {}, {"x": []}, [[1, 2]], math.nan])
def test_no_value_anywhere_ends_in_another_exception(tmp_path: Path, place: str, value: Any):
    for where in [place, *(f"{place}.{key}" for key in PLAIN[place] if isinstance(PLAIN[place], dict))]:
        try:
            load_recipe(write(tmp_path, where, value))
        except TDistillError as error:
            assert "Traceback" not in str(error)


# ---- what an evaluation measures only when asked ----


def test_optional_measurements_are_off_and_can_be_switched_on(plain: Path):
    settings = load_recipe(plain).evaluation
    assert (settings.exposure, settings.perplexity, settings.judge, settings.tasks) == (None, None, None, None)
    recipe = load_recipe(
        plain,
        [
            "evaluation.exposure={}",
            "evaluation.perplexity.text=held_out.jsonl",
            "evaluation.judge={base_url: http://localhost:8000/v1, model: judge, against: sft}",
            "evaluation.judge.extra_body={temperature: null, max_completion_tokens: 900}",
            "evaluation.tasks.gsm8k={data: gsm8k.jsonl, limit: 5}",
        ],
    )
    assert recipe.evaluation.exposure.min_share == 0.5
    assert recipe.evaluation.perplexity.window_tokens == 512
    assert recipe.evaluation.judge.against == "sft"
    assert recipe.evaluation.judge.extra_body == {"temperature": None, "max_completion_tokens": 900}
    assert recipe.evaluation.tasks["gsm8k"].limit == 5
    (plain.parent / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(plain.parent / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("evaluation.exposure={min_shares: 1}", ["evaluation.exposure.min_shares", "Did you mean 'min_share'?"]),
        ("evaluation.exposure={min_share: 0}", ["evaluation.exposure.min_share", "greater than 0", "given: 0"]),
        ("evaluation.perplexity={}", ["evaluation.perplexity.text", "required"]),
        ("evaluation.perplexity={text: x, stride_tokens: 512}", ["evaluation.perplexity", "stride_tokens = 512"]),
        ("evaluation.judge={base_url: here, model: m}", ["evaluation.judge.base_url", "'here'", "http://localhost"]),
        (
            "evaluation.judge={base_url: http://h/v1, model: m, against: sfft}",
            ["evaluation.judge.against = 'sfft'", "Did you mean 'sft'?"],
        ),
        (
            "evaluation.judge={base_url: http://h/v1, model: m, api_key: x}",
            ["evaluation.judge.api_key", "Did you mean 'api_key_env'?"],
        ),
        ("evaluation.tasks.gsm8k={}", ["evaluation.tasks.gsm8k.data", "required"]),
        ("evaluation.tasks.gsm8k={dat: x}", ["evaluation.tasks.gsm8k.dat", "Did you mean 'data'?"]),
        ("evaluation.tasks.gsm8k={data: x, num_fewshot: 2}", ["evaluation.tasks.gsm8k", "belong together"]),
        ("evaluation.tasks=[gsm8k]", ["evaluation.tasks", "dictionary"]),
    ],
)
def test_mistakes_in_optional_measurements_are_named(plain: Path, override: str, parts: list[str]):
    message = refusal(plain, override)
    assert all(part in message for part in parts), message


def test_no_message_about_a_judge_shows_a_key(plain: Path):
    key = "sk-very-secret"
    for override in (
        f"evaluation.judge={{base_url: 'https://me:{key}@h/v1', model: m}}",
        f"evaluation.judge={{base_url: 'http://h/v1', model: m, api_key_env: {key}}}",
        f"evaluation.judge={{base_url: 'http://h/v1', model: m, api_key: {key}}}",
        f"evaluation.judge={{base_url: 'http://h/v1', model: m, extra_body: {{api_key: {key}}}}}",
    ):
        assert key not in refusal(plain, override)
