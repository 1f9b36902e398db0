"""What a store consists of, byte for byte: columns, identity and the sealed manifest."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tdistill.errors import StoreCorruptError, StoreError, StoreIncompleteError
from tdistill.store.codes import check_log_prob_bits
from tdistill.teachers.base import PromptTokens, SamplingSettings

FORMAT = "tdistill-store"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
HEADER_KEY = b"tdistill"
TEMPORARY_SUFFIX = ".tmp"
# A row group is decoded whole to read one of its rows, and compresses the better the longer it is.
ROW_GROUP_TOKENS = 16384
DIGEST_BYTES = 8

SHARD_NAME = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.parquet")
INDEX_NAME = re.compile(r"index-([0-9a-f]{16})\.parquet")


def _ragged(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def arrow_schema(log_prob_bits: int, has_lists: bool = True) -> pa.Schema:
    """Columns of a shard; one row is one trajectory.

    Args:
        log_prob_bits: 8 or 16.
        has_lists: whether action sets are stored, that is p_max below 1.
    """
    check_log_prob_bits(log_prob_bits)
    code = pa.uint8() if log_prob_bits == 8 else pa.uint16()
    columns = {
        "prompt_id": pa.string(),
        "answer_index": pa.int32(),
        "digest": pa.binary(DIGEST_BYTES),
        "terminal": pa.bool_(),
        "prompt_ids": _ragged(pa.int32()),
    }
    if has_lists:
        columns |= {
            "taken_slots": _ragged(pa.int32()),
            "set_sizes": _ragged(pa.int32()),
            "set_tops": _ragged(pa.int32()),
            "set_ids": _ragged(pa.int32()),
            "set_log_probs": _ragged(code),
            "last_log_probs": _ragged(code),
            "covered_mass": _ragged(pa.int16() if log_prob_bits == 8 else pa.float32()),
        }
    else:
        columns["response_ids"] = _ragged(pa.int32())
    columns["log_sum_exp"] = _ragged(pa.int32() if log_prob_bits == 8 else pa.float32())
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def index_schema() -> pa.Schema:
    """Columns of the index; one row is one trajectory, in the order of the store."""
    columns = {
        "prompt_id": pa.string(),
        "answer_index": pa.int32(),
        "prompt_tokens": pa.int32(),
        "response_tokens": pa.int32(),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def request_digest(prompt: PromptTokens, mode: str) -> str:
    """First 16 hex digits of the SHA-256 over the prompt's token ids and, when scoring, the given answer and its end.

    Each id is a little-endian int32; the parts are separated by the int32 −1.
    """
    ids = [int(token) for token in prompt.prompt_ids]
    if mode == "score" and prompt.response_ids is not None:
        ids += [-1, *(int(token) for token in prompt.response_ids), -1, int(prompt.ends == "terminal")]
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()[:16]


def store_identity(
    teacher_identity: dict[str, Any],
    end_token_ids: tuple[int, ...],
    settings: SamplingSettings,
    *,
    mode: str,
    log_prob_bits: int,
    tokenizer_sha256: str,
    template: Any,
) -> dict[str, Any]:
    """Everything that decides what a teacher's trajectories are; two captures may share a store if these agree."""
    identity = {
        "teacher": teacher_identity,
        "tokenizer_sha256": tokenizer_sha256,
        "template": template,
        "end_token_ids": sorted(int(token) for token in end_token_ids),
        "mode": mode,
        "sampling": {
            "p_max": float(settings.p_max),
            "max_actions": settings.max_actions,
            "temperature": float(settings.temperature),
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
        },
        "log_prob_bits": log_prob_bits,
    }
    return json.loads(canonical_json(identity))


def identity_differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """One line ``field: stored X, asked Y`` for each differing field of two identities, nested names dotted."""
    stored_flat, asked_flat = _flatten(stored), _flatten(asked)
    return [
        f"{name}: stored {stored_flat.get(name, 'nothing')}, asked {asked_flat.get(name, 'nothing')}"
        for name in sorted({**stored_flat, **asked_flat})
        if stored_flat.get(name) != asked_flat.get(name)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def canonical_json(value: Any) -> bytes:
    """The one serialisation of a JSON value: sorted keys, no spaces, ASCII, one line feed at the end."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


def seal_manifest(content: dict[str, Any]) -> bytes:
    """Bytes of a manifest: ``content`` and, as ``manifest_sha256``, the SHA-256 of its canonical serialisation."""
    return canonical_json({**content, "manifest_sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def unseal_manifest(data: bytes, name: str) -> dict[str, Any]:
    """Parse the bytes of a manifest. ``name`` is used in messages.

    Raises:
        StoreCorruptError: one byte or more is not what was written.
        StoreError: the format version is not the one this program reads.
    """
    remedy = "Restore the file, or delete it and run capture again: whole shards are kept."
    try:
        content = json.loads(data.decode("ascii"))
        found = content.pop("manifest_sha256")
        expected = hashlib.sha256(canonical_json(content)).hexdigest()
        whole = found == expected and data == seal_manifest(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise StoreCorruptError(f"{name}: expected a sealed JSON manifest, found {error!r}. {remedy}") from error
    if not whole:
        raise StoreCorruptError(f"{name}: expected the checksum {expected}, found {found}. {remedy}")
    check_version(content, name)
    return content


def check_version(content: dict[str, Any], name: str) -> None:
    """Raise StoreError unless ``content`` names the format and version that this program reads."""
    found = (content.get("format"), content.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise StoreError(
            f"{name}: holds {found[0]} version {found[1]}; this tdistill reads {FORMAT} version {FORMAT_VERSION}. "
            "Use the tdistill that wrote it, or capture again into another folder."
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of the store in folder ``path``.

    Raises:
        StoreIncompleteError: the folder holds shards and no manifest.
        StoreCorruptError: the manifest is damaged.
        StoreError: there is no store.
    """
    manifest = path / MANIFEST
    if manifest.is_file():
        return unseal_manifest(manifest.read_bytes(), str(manifest))
    if found := shard_files(path):
        raise StoreIncompleteError(
            f"{path}: holds {len(found)} shards and no {MANIFEST}: its capture did not finish. "
            "Run capture again with the same settings to finish it; whole shards are kept."
        )
    raise StoreError(f"{path}: expected a store, found no {MANIFEST}. Check the path, or run capture first.")


def shard_files(path: Path) -> list[Path]:
    """Files in folder ``path`` that are named like a shard, by number."""
    if not path.is_dir():
        return []
    found = [file for file in path.iterdir() if SHARD_NAME.fullmatch(file.name)]
    return sorted(found, key=lambda file: (shard_number(file.name), file.name))


def shard_number(name: str) -> int:
    """Number of a shard from its file name."""
    match = SHARD_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def index_files(path: Path) -> list[Path]:
    """Files in folder ``path`` that are named like an index."""
    return [file for file in path.iterdir() if INDEX_NAME.fullmatch(file.name)]
