"""Load Hugging Face models by folder, hub name, installed package, or GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tdistill.errors import ConfigError, ModelNotFoundError
from tdistill.files import file_sha256
from tdistill.prompts import resolve_package_path

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_METADATA = ("*.json", "*.model", "*.txt", "*.jinja")

_IF_GATED = "If it is gated or private, accept its terms on the hub and set HF_TOKEN, or log in with `hf auth login`. "


def resolve_model_folder(address: str, gguf_file: str | None = None, revision: str | None = None) -> Path:
    """Folder that holds the model: an existing folder, ``package:NAME``, or a hub name (downloaded, safetensors only).

    Args:
        address: one of these.
        gguf_file: file to download in the place of safetensors.
        revision: branch, tag or commit of a hub name; None is the hub's default.
    Raises:
        ConfigError: a revision of what is no hub name.
        ModelNotFoundError: nothing there, or the hub cannot be reached; names the address and the remedy.
    """
    folder = Path(address).expanduser()
    is_package = address.startswith("package:")
    if revision is not None and (is_package or folder.is_dir()):
        raise ConfigError(
            f"revision = '{revision}', but '{address}' is a local folder and has no revisions. Leave revision out, or "
            "give a hub name."
        )
    if is_package:
        return resolve_package_path(address, ModelNotFoundError)
    if folder.is_dir():
        return folder
    if address.count("/") > 1 or address.startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"No model folder at '{address}'. Give an existing folder or a hub name such as org/name."
        )
    wanted = [gguf_file] if gguf_file else list(_WEIGHTS)
    try:
        return Path(snapshot_download(address, revision=revision, allow_patterns=[*wanted, *_METADATA]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        of_revision = "" if revision is None else f" at revision '{revision}'"
        raise ModelNotFoundError(
            f"'{address}' is neither a folder nor a model that the hub gave{of_revision} ({type(error).__name__}). "
            + ("" if not isinstance(error, RepositoryNotFoundError) else _IF_GATED)  # gated ones are among them
            + "Check the spelling and the network, or give a local folder."
        ) from error


def weights_sha256(folder: Path, gguf_file: str | None = None) -> str:
    """SHA-256 over names and contents of the weight files (and the configuration, where it is a file of its own).

    Raises:
        ModelNotFoundError: the folder holds no safetensors weights, or not the GGUF file.
    """
    digest = hashlib.sha256()
    for name in _weight_files(folder, gguf_file):
        digest.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _weight_files(folder: Path, gguf_file: str | None) -> list[str]:
    """Names of the files with weights and configuration; raises ModelNotFoundError where they are not there."""
    names = [gguf_file] if gguf_file else sorted(path.name for path in folder.glob("*.safetensors"))
    if not gguf_file and names:
        names.append("config.json")
    if names and all((folder / name).is_file() for name in names):
        return names
    wanted = gguf_file or "*.safetensors with a config.json"
    remedy = "tdistill reads safetensors or GGUF weights only; convert with model.save_pretrained(folder)."
    if (folder / "adapter_config.json").is_file():
        remedy = "It is an adapter; merge it into its model (merge_and_unload) and save that."
    elif others := sorted(path.name for path in folder.glob("*.gguf")):
        remedy = f"It has {', '.join(others)}; name one as gguf_file."
    raise ModelNotFoundError(f"The folder '{folder}' holds no {wanted}. {remedy}")


def load_config(folder: Path) -> Any:
    """Configuration of a model whose weights are there too.

    Raises:
        ModelNotFoundError: a part of it is not there or not readable.
    """
    _weight_files(folder, None)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelNotFoundError(f"'{folder}' has no configuration of a known kind of model: {reason}") from error


def load_causal_lm(
    folder: Path, *, gguf_file: str | None = None, dtype: str = "auto", **model_kwargs: Any
) -> PreTrainedModel:
    """Load weights with ``trust_remote_code`` off. GGUF weights are dequantised into a plain, saveable model.

    Args:
        folder: from :func:`resolve_model_folder`.
        gguf_file: file inside the folder, or None for safetensors.
        dtype: name of a torch dtype, or ``auto``.
        **model_kwargs: passed to ``from_pretrained`` (``device_map``, ``quantization_config``, …).
    Raises:
        ModelNotFoundError: not a loadable causal language model, or weights without some of its parameters.
        ConfigError: unknown dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype = '{dtype}' is unknown. Use auto, float32, bfloat16 or float16.")
    _weight_files(folder, gguf_file)
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    if gguf_file and hasattr(transformers, "GgufConfig"):  # newer ones keep the blocks where they have a kernel
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source["output_loading_info"] = True  # returns a pair
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **source, **model_kwargs)
    # AssertionError: a device that this torch was not built for.
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).partition("\nModel type should be one of")[0]  # a list of hundreds of classes
        raise ModelNotFoundError(f"'{folder}' is not a loadable causal language model: {reason}") from error
    model, loaded = pair
    if missing := sorted(loaded["missing_keys"]):  # transformers would draw them at random
        raise ModelNotFoundError(
            f"The weights in '{folder}' lack {len(missing)} parameters of {type(model).__name__}, among them "
            f"{missing[0]}. Save the whole model with model.save_pretrained(folder)."
        )
    if not gguf_file:
        return model.eval()
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=model.dtype, attn_implementation="sdpa"
    )
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.to(model.device).eval()


def load_tokenizer(folder: Path, *, gguf_file: str | None = None) -> Any:
    """Load the tokenizer of a folder or of a GGUF file.

    Raises:
        ModelNotFoundError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelNotFoundError(f"'{folder}' holds no loadable tokenizer: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, any id serves
    return tokenizer
