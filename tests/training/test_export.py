from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch
from safetensors import safe_open
from training_support import settings
from transformers import AutoModelForCausalLM, pipeline

from tdistill.store import Store
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_tokenizer
from tdistill.training.export import export_student
from tdistill.training.trainer import TDistillTrainer

QUESTION = [{"role": "user", "content": "where is the old fox ?"}]


@pytest.fixture(scope="module")
def train(tiny_start_folder, tiny_stores, tiny_tokenizer, tmp_path_factory) -> Any:
    def run(**changes: Any) -> TDistillTrainer:
        own = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
        trainer = TDistillTrainer(
            load_causal_lm(tiny_start_folder, dtype="float32"),
            settings(tmp_path_factory.mktemp("train"), **{"max_steps": 60, "learning_rate": 4e-3, **changes}),
            tiny_stores["train"],
            tiny_stores["dev"],
            tiny_tokenizer,
            **own,
        )
        trainer.train()
        return trainer

    return run


@pytest.fixture(scope="module")
def exported(train, tiny_stores, tiny_tokenizer, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """Folder of a trained student, and its logits on a dev answer before the export."""
    trainer = train()
    before = logits(trainer.model, tiny_stores["dev"])
    folder = tmp_path_factory.mktemp("export") / "deep" / "student"
    export_student(trainer.model, tiny_tokenizer, folder, tiny_stores["train"].end_token_ids, {"card.md": "# ü\n"})
    return folder, before


@torch.inference_mode()
def logits(model: Any, store: Store) -> torch.Tensor:
    return model.eval()(input_ids=torch.from_numpy(support.sequence_of(store, 0))[None]).logits[0]


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_folder_holds_weights_json_and_the_tokenizer_only(exported):
    folder, _ = exported
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "card.md",
    }
    assert (folder / "card.md").read_text(encoding="utf-8") == "# ü\n"
    assert [file.name for file in folder.parent.iterdir()] == ["student"]


def test_the_configuration_is_that_of_the_start(exported, tiny_start_folder):
    """transformers' Trainer turns the cache off, which a loop of one's own needs."""
    found, start = (json.loads((of / "config.json").read_text()) for of in (exported[0], tiny_start_folder))
    special = ("eos_token_id", "pad_token_id", "bos_token_id", "dtype")
    assert {k: v for k, v in found.items() if k not in special} == {k: v for k, v in start.items() if k not in special}


def test_the_value_head_stays_behind(exported):
    folder, _ = exported
    assert not any("value_head" in name for name in tensor_names(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == sum(value.numel() for value in model.parameters())
    assert not any("value_head" in name for name, _ in model.named_modules())


def test_the_loaded_student_has_the_logits_of_the_trained_one(exported, tiny_stores):
    folder, before = exported
    torch.testing.assert_close(logits(load_causal_lm(folder), tiny_stores["dev"]), before, rtol=0, atol=0)


def test_end_tokens_are_the_stores(exported, tiny_stores, tiny_tokenizer):
    folder, _ = exported
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == list(tiny_stores["train"].end_token_ids)
    assert len(config["eos_token_id"]) == 2
    assert config["pad_token_id"] == tiny_tokenizer.pad_token_id
    assert HFTeacher.from_pretrained(str(folder)).end_token_ids == tiny_stores["train"].end_token_ids


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # As models are released: transformers loads it with a warning and refuses to save it with other end tokens.
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.9, "top_k": 20}, {"do_sample": False}),
        ({"do_sample": True, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"length_penalty": 2.0, "early_stopping": True}, {}),
        ({"num_beams": 2, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 2.0}),
        ({"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_settings_that_transformers_refuses_to_save_are_settled(
    tiny_start_folder, tiny_stores, tiny_tokenizer, tmp_path, given, expected
):
    start = shutil.copytree(tiny_start_folder, tmp_path / "start")
    (start / "generation_config.json").write_text(json.dumps(given))
    end_token_ids = tiny_stores["train"].end_token_ids
    export_student(load_causal_lm(start), tiny_tokenizer, tmp_path / "student", end_token_ids)
    found = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert found["eos_token_id"] == list(end_token_ids)
    names = (
        "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams", "length_penalty", "early_stopping",
        "repetition_penalty",
    )  # fmt: skip
    idle = {"temperature": 1.0, "top_k": 50}
    assert {name: found[name] for name in names if found.get(name) not in (None, idle.get(name))} == expected
    # What was exported can be exported again.
    export_student(load_causal_lm(tmp_path / "student"), tiny_tokenizer, tmp_path / "again", end_token_ids[:1])


def test_the_student_answers_a_chat_message_and_stops(exported, tiny_teacher, tiny_stores):
    folder, _ = exported
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    (out,) = generator(QUESTION, max_new_tokens=40, do_sample=False, return_full_text=False)
    assert "is" in out["generated_text"].split()
    tokenizer = load_tokenizer(folder)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        answer = load_causal_lm(folder).generate(input_ids=ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert len(answer) < 40
    assert int(answer[-1]) in tiny_stores["train"].end_token_ids
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == out["generated_text"].strip()


def test_nothing_is_left_where_an_earlier_export_broke_off(train, tiny_tokenizer, tiny_stores, tmp_path):
    partial = tmp_path / ".student.partial"
    partial.mkdir()
    (partial / "leftover.bin").write_bytes(b"x")
    trainer = train(max_steps=1)
    export_student(trainer.model, tiny_tokenizer, tmp_path / "student", tiny_stores["train"].end_token_ids)
    assert not partial.exists()
    assert not (tmp_path / "student" / "leftover.bin").exists()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_into_a_plain_folder(train, tiny_tokenizer, tiny_stores, tmp_path, dora):
    peft = pytest.importorskip("peft")
    trainer = train(
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", use_dora=dora), learning_rate=1e-2, max_steps=20
    )
    before = logits(trainer.model, tiny_stores["dev"])
    export_student(trainer.model, tiny_tokenizer, tmp_path / "student", tiny_stores["train"].end_token_ids)
    names = tensor_names(tmp_path / "student")
    assert not any(word in name for name in names for word in ("lora", "value_head", "base_layer", "modules_to_save"))
    assert not (tmp_path / "student" / "adapter_config.json").exists()
    after = logits(load_causal_lm(tmp_path / "student"), tiny_stores["dev"])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_an_adapter_on_the_output_matrix_of_an_untied_student_is_trained_and_merged(
    tiny_start_folder, tiny_tokenizer, tiny_stores, tmp_path
):
    peft = pytest.importorskip("peft")
    model = load_causal_lm(tiny_start_folder, dtype="float32")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    trainer = TDistillTrainer(
        model,
        settings(tmp_path / "train", max_steps=20, learning_rate=1e-2),
        tiny_stores["train"],
        tiny_stores["dev"],
        tiny_tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["lm_head"]),
    )
    start, first = model.lm_head.base_layer.weight.detach().clone(), trainer.evaluate()["eval_kl_set_tail"]
    trainer.train()
    assert trainer.evaluate()["eval_kl_set_tail"] < first - 0.01
    before = logits(trainer.model, tiny_stores["dev"])
    export_student(trainer.model, tiny_tokenizer, tmp_path / "student", tiny_stores["train"].end_token_ids)
    student = load_causal_lm(tmp_path / "student")
    torch.testing.assert_close(logits(student, tiny_stores["dev"]), before, rtol=0, atol=1e-4)
    assert not torch.equal(student.lm_head.weight, start)
    assert not torch.equal(student.lm_head.weight, student.get_input_embeddings().weight)


def test_a_student_trained_in_bfloat16_autocast_is_exported_in_float32(train, tiny_tokenizer, tiny_stores, tmp_path):
    trainer = train(bf16=True, max_steps=3)
    export_student(
        trainer.accelerator.unwrap_model(trainer.model),
        tiny_tokenizer,
        tmp_path / "student",
        tiny_stores["train"].end_token_ids,
    )
    with safe_open(tmp_path / "student" / "model.safetensors", "np") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype(np.float32)}  # noqa: SIM118
    student = HFTeacher.from_pretrained(str(tmp_path / "student"))
    trajectory = student.generate(
        [(support.PromptTokens("p", tiny_stores["dev"][0].prompt_ids), 0)], support.TINY_SAMPLING
    )[0]
    assert len(trajectory.response_ids) > 1
