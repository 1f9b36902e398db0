"""The recipes of the paper, run to the end with tiny random models of the same architectures and tokenizers alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from builders import tiny_model
from cli.harness import Outcome, snapshot, strict_json, tdistill
from safetensors.torch import load_file
from support import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tdistill.prompts import choose_template
from tdistill.reports.load import load_run
from tdistill.reports.records import find
from tdistill.store import Store, verify_store

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"
SIZES = {"train": 12, "dev": 4, "held_out": 4}
NEW_TOKENS = 10
# As the recipes have it but for sizes, and with rates at which three steps are more than rounding.
PHASE = {
    "max_steps": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "response_tokens_per_batch": 160,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "dataloader_pin_memory": "false",
}


class Family(NamedTuple):
    """Teacher and student of an architecture, whose vocabularies may be padded by so many rows."""

    recipe: str
    end: str
    sizes: tuple[dict[str, Any], dict[str, Any]]
    padding: tuple[int, int] = (0, 0)


def gpt2(width: int, layers: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}


def opt(width: int, layers: int, **fields: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "ffn_dim": 2 * width, "num_hidden_layers": layers, "word_embed_proj_dim": width}
    return {**sizes, "num_attention_heads": 4, "max_position_embeddings": 512, "init_std": 0.2, **fields}


def qwen2(width: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return {**sizes, **heads, "max_position_embeddings": 512, "initializer_range": 0.2}


# Embeddings narrower than the states and layer norms after the blocks.
OPT_350M = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
CONFIGS = {"gpt2": GPT2Config, "opt": OPTConfig, "qwen2": Qwen2Config}
FAMILIES = {
    "gpt2": Family("gpt2_120m", "<|endoftext|>", (gpt2(48, 3), gpt2(32, 2))),
    "opt": Family("opt_1.3b", "</s>", (opt(48, 3), opt(32, 2))),
    "opt_projected": Family("opt_350m", "</s>", (opt(48, 3), opt(32, 2, **OPT_350M))),
    # As 152,064 rows of Qwen-2.5 7B and 151,936 of 0.5B, for 151,665 tokens.
    "qwen2_padded": Family("qwen2.5_0.5b", "<|endoftext|>", (qwen2(48, 3), qwen2(32, 2)), (40, 8)),
}


class Run(NamedTuple):
    """A run of a recipe with tiny models."""

    family: Family
    outcome: Outcome
    folder: Path
    teacher: Path
    words: tuple[str, ...]


def tokenizer_of(end: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a chat template, as in all three families; OPT's puts its end token before a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [end, "<pad>"] if end == "</s>" else [end]
    texts = [text for record in corpus() for text in record.values()] + ["### Instruction:\n\n### Response:\n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if end == "</s>":
        inner.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, inner.token_to_id(end))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end, pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end)


def save_model(folder: Path, family: Family, which: int) -> Path:
    """The teacher (0) or the student (1) with the family's tokenizer, as a folder."""
    tokenizer = tokenizer_of(family.end)
    config: type[PretrainedConfig] = next(cls for key, cls in CONFIGS.items() if family.recipe.startswith(key))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = tiny_model(
        config(vocab_size=len(tokenizer) + family.padding[which], **family.sizes[which], **ends), seed=which
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that TDISTILL_DATA names, with records as in Dolly."""
    folder = tmp_path_factory.mktemp("data")
    files = {"train": "train/dolly_train", "dev": "train/dolly_dev", "held_out": "eval/dolly_eval"}
    records = list({record["prompt"]: record for record in corpus()}.values())
    for split, size in SIZES.items():
        path = folder / f"{files[split]}.jsonl"
        path.parent.mkdir(exist_ok=True)
        own, records = records[:size], records[size:]
        lines = [
            {"instruction": record["prompt"], "input": "at night" if at % 2 else "", "output": record["answer"]}
            for at, record in enumerate(own)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for name in ("selfinst", "vicuna") if split == "held_out" else ():
            shutil.copy(path, path.with_name(f"{name}_eval.jsonl"))
    (folder / "text").mkdir()
    texts = [json.dumps({"text": record["answer"]}) + "\n" for record in records[:4]]
    (folder / "text" / "openwebtext.jsonl").write_text("".join(texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDISTILL_DATA", str(folder))
        yield folder


def words_of(*phases: str, **more: object) -> tuple[str, ...]:
    """Overrides that make a recipe tiny."""
    args = {f"phases.{phase}.args.{key}": value for phase in phases for key, value in PHASE.items()}
    values = {"capture.max_new_tokens": NEW_TOKENS, "evaluation.seeds": "[10]", "evaluation.speed_tokens": 4, **args}
    return tuple(f"{key}={value}" for key, value in (values | more).items())


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Do not change anything in its folder."""
    family, root = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    teacher, student = (save_model(root / name, family, at) for at, name in enumerate(("teacher", "student")))
    words = words_of(
        *("sft", "bd_paper", "bd"),
        **{
            "teacher.model": teacher,
            "teacher.dtype": "float32",
            "student.model": student,
            "capture.log_prob_bits": 16,
            "phases.bd_paper.args.text_sequences_per_batch": 2,
        },
    )
    outcome = tdistill("run", RECIPES / f"{family.recipe}.yaml", *words, f"output={root / 'run'}")
    assert outcome.code == 0, outcome.err
    return Run(family, outcome, root / "run", teacher, words)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_store_is_what_the_teacher_says_without_batches_and_padding(run: Run):
    tokenizer, model = AutoTokenizer.from_pretrained(run.teacher), AutoModelForCausalLM.from_pretrained(run.teacher)
    store = Store.open(run.folder / "store" / "train")
    assert verify_store(store.path) == []
    assert len(store) == 8 * SIZES["train"]
    assert store.identity["teacher"]["vocab_size"] == len(tokenizer) + run.family.padding[0]
    for row in range(0, len(store), 7):
        trajectory = store[row]
        text = tokenizer.decode(trajectory.prompt_ids)
        assert text.startswith("</s>Below is an instruction" if run.family.end == "</s>" else "Below is an instruction")
        assert text.endswith("### Response:\n")
        ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids]).astype(np.int64)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0, len(trajectory.prompt_ids) - 1 :]
        # Rows that pad the vocabulary stand for no token.
        log_probs_RV = logits[: len(trajectory.sets), : len(tokenizer)].log_softmax(-1)
        sets = trajectory.sets
        states = np.repeat(np.arange(len(sets)), np.diff(sets.offsets))
        assert len(set(zip(states, sets.ids, strict=True))) == len(sets.ids)
        np.testing.assert_allclose(sets.log_probs, log_probs_RV[states, sets.ids].numpy(), atol=2e-3)
        covered = log_probs_RV.exp().sort(descending=True).values.cumsum(-1)
        np.testing.assert_allclose(sets.covered_mass, covered[range(len(sets)), np.diff(sets.offsets) - 1], atol=1e-4)
        assert (sets.covered_mass >= 0.8 - 1e-5).all()
        assert sets.ids.max() < len(tokenizer)


def test_every_phase_has_learnt_with_finite_losses(run: Run):
    lines = [strict_json(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {
        name: [line for line in lines if line["phase"] == name and "loss" in line] for name in ("sft", "bd_paper", "bd")
    }
    for name, own in steps.items():
        assert [line["step"] for line in own] == [1, 2, 3]
        assert np.isfinite([value for line in own for value in line.values() if isinstance(value, float)]).all()
        # Plain text goes with the paper's objective alone, the off-support term with the other.
        assert all(("text_nll" in line) == (name == "bd_paper") for line in own)
        assert all(("off_support" in line) == (name == "bd") for line in own)
        assert all(("clipped_share" in line) == (name == "bd_paper") for line in own)
    # Of tokens drawn at p_max = 0.8, about 3 in 8 are outside A_0.5.
    dropped = [line["dropped_share"] for line in steps["bd_paper"]]
    if run.family.recipe == "opt_1.3b":
        assert all(0.2 < share < 0.5 for share in dropped)
    else:
        assert dropped == [0, 0, 0]
    for name, init in (("sft", "../start"), ("bd_paper", "sft"), ("bd", "sft")):
        before = weights(run.folder / "start" if name == "sft" else run.folder / "phases" / init / "student")
        after = weights(run.folder / "phases" / name / "student")
        assert before.keys() == after.keys()
        assert all(torch.isfinite(after[key]).all() for key in after)
        # OPT's biases of keys shift every score of a query alike, so they have no gradient.
        assert not [key for key in after if torch.equal(before[key], after[key]) and "k_proj.bias" not in key]


def test_the_results_are_about_every_subject(run: Run):
    results = load_run(run.folder).results
    assert {record.subject for record in results.records} == {"teacher", "start", "sft", "bd_paper", "bd"}
    assert results.summary.final_phase == "bd"
    assert results.summary.num_prompts == SIZES
    assert (results.summary.teacher.num_layers, results.summary.student.num_layers) == (3, 2)
    assert results.summary.teacher.num_parameters > results.summary.student.num_parameters

    def value(metric: str, subject: str) -> float:
        record = find(results, metric, subject, "held_out")
        assert record is not None and record.value is not None
        return record.value

    assert value("kl_teacher_student", "teacher") == 0
    assert value("kl_teacher_student", "start") > value("kl_teacher_student", "sft") > value("kl_teacher_student", "bd")
    assert np.isfinite(value("kl_teacher_student", "bd_paper"))
    assert find(results, "kl_teacher_student", "bd", "held_out", against="bd_paper") is not None
    for split in ("held_out", "selfinst", "vicuna"):
        assert find(results, "rouge_l", "bd", split) is not None
        assert find(results, "rouge_l", "bd", split, against="bd_paper") is not None
    assert "bd_paper" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_the_student_is_a_plain_model_of_its_own_architecture_that_answers(run: Run):
    folder = run.folder / "student"
    assert weights(folder).keys() == weights(run.folder / "phases" / "bd" / "student").keys()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(run.folder / "start")
    assert type(model) is type(start)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in start.state_dict().items()
    }
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer) + run.family.padding[1]
    message = {"role": "user", "content": "where is the old fox ?"}
    prompt = choose_template(tokenizer, "alpaca").render([message], tokenizer, add_generation_prompt=True, who="it")
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 6
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
def test_another_student_goes_on_with_the_same_store(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tdistill.pipeline.HFTeacher.generate", lambda *_: pytest.fail("the store is there"))
    before = snapshot(run.folder / "store")
    family = run.family._replace(sizes=(run.family.sizes[0],) * 2)
    words = (*run.words, f"output={tmp_path / 'run'}", f"capture.from_run={run.folder}",
             f"student.model={save_model(tmp_path / 'student', family, 1)}")  # fmt: skip
    for verb in ("capture", "train"):
        outcome = tdistill(verb, RECIPES / f"{family.recipe}.yaml", *words)
        assert outcome.code == 0, outcome.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.num_hidden_layers == 3
    assert snapshot(run.folder / "store") == before


@pytest.mark.parametrize("name", ["gpt2", "qwen2_padded"])
def test_a_fine_tuned_teacher_can_be_the_teacher(name: str, data: Path, tmp_path: Path):
    family = FAMILIES[name]
    teacher, student = (save_model(tmp_path / part, family, at) for at, part in enumerate(("teacher", "student")))
    recipe = "teacher_gpt2_1.5b" if name == "gpt2" else "teacher_qwen2.5_3b"
    words = (*words_of("sft"), "phases.sft.args.eval_strategy=steps", "phases.sft.args.save_strategy=steps")
    tuned = tmp_path / "tuned"
    outcome = tdistill("run", RECIPES / f"{recipe}.yaml", *words, f"teacher.model={teacher}", f"output={tuned}")
    assert outcome.code == 0, outcome.err
    store = Store.open(tuned / "store" / "train")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    answers = [json.loads(line)["output"] for line in (data / "train" / "dolly_train.jsonl").read_text().splitlines()]
    for row, answer in enumerate(answers):
        assert tokenizer.decode(store[row].response_ids) == tokenizer.decode(tokenizer.encode(answer)[:NEW_TOKENS])
    results = load_run(tuned).results
    nll = {name: find(results, "nll_teacher_answers", name, "held_out") for name in ("start", "sft")}
    assert nll["start"] is not None and nll["sft"] is not None
    assert nll["sft"].value < nll["start"].value
    words = words_of(
        *("sft", "bd_paper", "bd"),
        **{"teacher.model": tuned / "student", "student.model": student, "data.text": "null"},
    )
    outcome = tdistill("capture", RECIPES / f"{family.recipe}.yaml", *words, f"output={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert len(Store.open(tmp_path / "run" / "store" / "train")) == 8 * SIZES["train"]
