from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli.harness import changed, recipe_tree
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from tdistill.config import Recipe, TeacherConfig
from tdistill.errors import ConfigError, ModelNotFoundError
from tdistill.models import load_teacher
from tdistill.pipeline import Run
from tdistill.teachers import loading
from tdistill.teachers.hf import HFTeacher
from tdistill.teachers.loading import load_causal_lm, load_config, load_tokenizer, resolve_model_folder, weights_sha256


@pytest.fixture
def folder(tiny_teacher_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher_folder, tmp_path / "teacher"))


@pytest.mark.parametrize(
    "address",
    ["/no/such/folder", "./runs/teacher", "~/no/such/folder", "a/b/c", "nobody/no-such-model", "no-such-model"],
)
def test_an_address_that_leads_nowhere_is_named(address):
    with pytest.raises(ModelNotFoundError, match=address) as caught:
        HFTeacher.from_pretrained(address)
    assert "folder" in str(caught.value)


@pytest.mark.parametrize("address", ["package:no_such_package", "package:tdistill/no_such_folder", "package:../x"])
def test_a_package_that_leads_nowhere_is_a_missing_model(address):
    with pytest.raises(ModelNotFoundError, match="package"):
        resolve_model_folder(address)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls to a hub that gives the tiny teacher, but not at the revision ``gone``."""
    calls: list[dict[str, Any]] = []

    def download(address: str, **settings: Any) -> str:
        calls.append({"address": address, **settings})
        if settings["revision"] == "gone":
            raise LocalEntryNotFoundError("not there")
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", download)
    return calls


def test_a_revision_is_the_one_that_is_downloaded(hub):
    load_teacher(TeacherConfig(model="org/teacher", dtype="float32", model_kwargs={"revision": "v1"}))
    resolve_model_folder("org/student", revision="v2")
    resolve_model_folder("org/student")
    assert [call["revision"] for call in hub] == ["v1", "v2", None]
    with pytest.raises(ModelNotFoundError, match=r"'org/teacher'.*at revision 'gone'"):
        HFTeacher.from_pretrained("org/teacher", revision="gone")


def test_the_student_has_a_revision_too(hub, tmp_path):
    prompts = {name: tmp_path / f"{name}.jsonl" for name in ("train", "dev", "held_out")}
    tree = changed(recipe_tree(Path("org/teacher"), prompts, tmp_path / "run"), student={"layers": None})
    tree = changed(tree, student={"model": "org/student", "revision": "v3"})
    Run(Recipe.model_validate(tree))._make_start(HFTeacher.from_pretrained("org/teacher", dtype="float32"))
    assert [(call["address"], call["revision"]) for call in hub] == [("org/teacher", None), ("org/student", "v3")]
    with pytest.raises(ValueError, match=r"revision = 'v3' is that of student\.model, which is not given"):
        Recipe.model_validate(changed(tree, student={"model": None, "layers": 2}))


@pytest.mark.parametrize("where", ["folder", "package"])
def test_a_local_model_has_no_revision(folder, where):
    address = str(folder) if where == "folder" else "package:tdistill/demo"
    with pytest.raises(ConfigError, match=r"revision = 'v1', but .* is a local folder.*Leave revision out"):
        resolve_model_folder(address, revision="v1")


@pytest.mark.parametrize(
    ("device_map", "device", "moved"), [(None, "cpu", ["cuda"]), (None, "cuda", []), ("auto", "cpu", [])]
)
def test_a_teacher_goes_to_the_gpu_unless_it_has_a_place(monkeypatch, device_map, device, moved):
    """Also a quantised one: most kinds load to the CPU."""
    model = SimpleNamespace(device=torch.device(device), is_quantized=True, to=lambda place: seen.append(place))
    seen: list[str] = []
    monkeypatch.setattr(HFTeacher, "from_pretrained", lambda *_, **__: SimpleNamespace(model=model))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_teacher(TeacherConfig(model="org/teacher", device_map=device_map))
    assert seen == moved


def test_gguf_blocks_are_unpacked_whatever_kernels_there_are(folder, monkeypatch):
    (folder / "some.gguf").write_bytes(b"")
    asked: dict[str, Any] = {}

    def load(folder: Path, **settings: Any) -> None:
        asked.update(settings)
        raise OSError("enough")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ModelNotFoundError, match="enough"):
        load_causal_lm(folder, gguf_file="some.gguf")
    assert asked["quantization_config"].dequantize is True


def test_a_gated_model_says_how_to_get_in(monkeypatch):
    def refused(*args: Any, **settings: Any) -> None:
        raise GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(loading, "snapshot_download", refused)
    with pytest.raises(ModelNotFoundError, match=r"GatedRepoError\).*accept its terms on the hub and set HF_TOKEN"):
        resolve_model_folder("org/teacher")


def test_a_student_folder_that_is_no_model_is_named(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(ModelNotFoundError, match=f"'{folder}' has no configuration of a known kind"):
        load_config(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="holds no"):
        load_config(folder)


def test_pickled_weights_are_not_read(folder):
    model = load_causal_lm(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        HFTeacher.from_pretrained(str(folder))
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_causal_lm(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_part_is_a_missing_model(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelNotFoundError, match=str(folder)):
        HFTeacher.from_pretrained(str(folder))


@pytest.mark.parametrize("size", [0, 100, 50_000])
def test_truncated_weights_are_a_missing_model(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelNotFoundError, match=str(folder)):
        HFTeacher.from_pretrained(str(folder))


def test_a_configuration_that_is_not_json_is_a_missing_model(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match=str(folder)):
        HFTeacher.from_pretrained(str(folder))


def test_an_unknown_dtype_is_named(folder):
    with pytest.raises(ConfigError, match="float31"):
        HFTeacher.from_pretrained(str(folder), dtype="float31")


def test_code_in_a_model_folder_is_not_run(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFoundError):
        HFTeacher.from_pretrained(str(folder))
    assert not ran.exists()


def test_the_hash_follows_every_byte_of_the_weights_and_the_configuration(folder):
    before = weights_sha256(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = weights_sha256(folder)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_sha256(folder) == before != changed
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_sha256(folder) not in (before, changed)


def test_the_hash_ignores_files_that_decide_nothing(folder):
    before = weights_sha256(folder)
    (folder / "README.md").write_text("changed")
    assert weights_sha256(folder) == before


def test_a_missing_gguf_file_is_named(folder):
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf"):
        HFTeacher.from_pretrained(str(folder), gguf_file="absent.gguf")


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_weights_without_some_parameters_are_not_filled_with_random_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        HFTeacher.from_pretrained(str(folder))


def test_weights_of_another_shape_are_a_missing_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelNotFoundError, match=str(folder)):
        HFTeacher.from_pretrained(str(folder))


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelNotFoundError, match="tokenizer"):
        load_tokenizer(folder)
