"""Writing shards and the manifest: whole files or none."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tdistill.errors import NoSpaceError, StoreError
from tdistill.files import write_atomically
from tdistill.store import codes, schema
from tdistill.store.read import open_shard
from tdistill.store.verify import trajectory_problems
from tdistill.types import ActionSets, Trajectory

COUNTED = {"response_tokens": "taken_slots", "positions": "set_sizes", "action_slots": "set_ids"}
"""Counts of a manifest entry, and the list columns whose elements they count where sets are stored."""

# The highest level of zstd: it is paid once, and reading costs the same after any.
_ZSTD_LEVEL = 19
_INDEX_ROW_GROUP_ROWS = 1 << 20


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what is written."""
    return {name: version(name) for name in ("pyarrow", "tdistill", "torch", "transformers")}


def shard_header(identity: dict[str, Any], jobs: Sequence[tuple[str, int, str]], batch_size: int) -> dict[str, Any]:
    """What is known of a shard before its trajectories.

    Args:
        identity: see :func:`~tdistill.store.schema.store_identity`.
        jobs: (prompt id, answer index, request digest) of each row; they become columns of the shard.
        batch_size: answers that the teacher was asked for at once.
    """
    return {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "identity": identity,
        "jobs": [list(job) for job in jobs],
        "batch_size": batch_size,
        "layout": "longest_first_compacted",
        "versions": library_versions(),
    }


def shard_table(trajectories: Sequence[Trajectory], header: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    """Columns of a shard, and its header complete with ``row_group_rows``, ``num_ids`` and ``common_ids``.

    Sets are left out at p_max = 1. ``trajectories`` may be some of the header's jobs.

    Raises:
        StoreError: a trajectory breaks a rule of the format.
    """
    identity = header["identity"]
    has_lists, bits = identity["sampling"]["p_max"] < 1.0, identity["log_prob_bits"]
    if not has_lists:
        trajectories = [_without_lists(trajectory) for trajectory in trajectories]
    for trajectory in trajectories:
        if problems := trajectory_problems(trajectory, identity):
            raise StoreError(
                f"Answer {trajectory.answer_index} to prompt {trajectory.prompt_id!r} cannot be stored: "
                f"{'; '.join(problems)}. This is a defect of the teacher that returned it."
            )
    digests = {(prompt_id, answer_index): digest for prompt_id, answer_index, digest in header["jobs"]}
    columns: dict[str, list[Any]] = {
        "prompt_id": [t.prompt_id for t in trajectories],
        "answer_index": [t.answer_index for t in trajectories],
        "digest": [bytes.fromhex(digests[t.prompt_id, t.answer_index]) for t in trajectories],
        "terminal": [t.ends == "terminal" for t in trajectories],
        "prompt_ids": [t.prompt_ids for t in trajectories],
        "log_sum_exp": [codes.pack_log_sum_exp(t.sets.log_sum_exp, bits) for t in trajectories],
    }
    num_tokens = sum(len(t.response_ids) for t in trajectories)
    header = {
        **{name: value for name, value in header.items() if name != "jobs"},
        "row_group_rows": max(1, schema.ROW_GROUP_TOKENS * len(trajectories) // max(num_tokens, 1)),
    }
    if has_lists:
        set_columns, numbering = _set_columns(trajectories, bits, identity["teacher"].get("vocab_size"))
        columns |= set_columns
        header |= {"num_ids": len(numbering.id_of_number), "common_ids": numbering.encode()}
    else:
        columns["response_ids"] = [t.response_ids for t in trajectories]
    arrow_schema = schema.arrow_schema(bits, has_lists)
    arrow_schema = arrow_schema.with_metadata({schema.HEADER_KEY: schema.canonical_json(header)})
    table = pa.table([_column(columns[field.name], field.type) for field in arrow_schema], schema=arrow_schema)
    return table, header


def shard_bytes(table: pa.Table, row_group_rows: int, zstd_level: int = _ZSTD_LEVEL) -> bytes:
    """Parquet file of a shard or of an index; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=zstd_level,
        # Measured on sets of 15 actions: bytes that are not entropy-coded one by one, as in dictionary indices of odd
        # width, take 1.3 times the room.
        use_dictionary=False,
        use_byte_stream_split=[f"{f.name}.list.element" for f in table.schema if pa.types.is_list(f.type)],
        write_statistics=False,
        write_page_checksum=True,
        # Arrow's own copy of the schema would add a kilobyte to every shard, and says nothing that Parquet's does not.
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=row_group_rows)
        # With the schema left out, its metadata is too.
        writer.add_key_value_metadata(table.schema.metadata or {})
    return sink.getvalue().to_pybytes()


def _without_lists(trajectory: Trajectory) -> Trajectory:
    sets = trajectory.sets
    empty = replace(sets, offsets=np.zeros_like(sets.offsets), ids=sets.ids[:0], log_probs=sets.log_probs[:0])
    return replace(trajectory, sets=empty)


def _set_columns(
    trajectories: Sequence[Trajectory], bits: int, vocab_size: int | None
) -> tuple[dict[str, list[Any]], codes.Numbering]:
    ids_M = np.concatenate([np.zeros(0, dtype=np.int64), *(t.sets.ids for t in trajectories)])
    size = int(ids_M.max(initial=-1)) + 1 if vocab_size is None else vocab_size
    numbering = codes.Numbering.of(ids_M, size)
    names = ("set_sizes", "set_ids", "last_log_probs", "set_log_probs", "set_tops", "taken_slots", "covered_mass")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for trajectory in trajectories:
        sets = trajectory.sets
        packed = codes.pack_sets(np.diff(sets.offsets), sets.ids, _codes(sets, bits), numbering)
        # In the order in which a reader finds the set: equal codes do not keep the teacher's order.
        _, stored_ids_M, codes_M = codes.unpack_sets(packed, numbering)
        listed_R = codes.listed_mass(codes_M, sets.offsets, bits)
        columns["set_sizes"].append(packed.sizes_R)
        columns["set_ids"].append(packed.gaps_M)
        columns["last_log_probs"].append(packed.last_codes_R)
        columns["set_log_probs"].append(packed.code_gaps_M)
        columns["set_tops"].append(packed.tops_R)
        columns["taken_slots"].append(_taken_slots(trajectory, stored_ids_M))
        columns["covered_mass"].append(codes.pack_mass(sets.covered_mass, listed_R, bits))
    return columns, numbering


def _taken_slots(trajectory: Trajectory, ids_M: np.ndarray) -> np.ndarray:
    """Place of each response token in the set of its state."""
    offsets, num_taken = trajectory.sets.offsets, len(trajectory.response_ids)
    sizes_T = np.diff(offsets)[:num_taken]
    taken_M = np.repeat(trajectory.response_ids, sizes_T)
    return np.flatnonzero(ids_M[: offsets[num_taken]] == taken_M) - offsets[:num_taken]


def _codes(sets: ActionSets, bits: int) -> np.ndarray:
    """Codes that never fall inside a set: equal probabilities may differ by float32 rounding across a code's border."""
    values = codes.quantise(sets.log_probs, bits)
    above_other_sets = np.repeat(np.arange(len(sets)), np.diff(sets.offsets)) << bits
    return (np.maximum.accumulate(values + above_other_sets) - above_other_sets).astype(values.dtype)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in values])])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise StoreError(f"A shard would hold {offsets[-1]:,} list elements, above 2^31 − 1. Lower shard_prompts.")
    flat = np.concatenate(values) if values else np.zeros(0)
    return pa.ListArray.from_arrays(
        pa.array(offsets, type=pa.int32()),
        pa.array(flat.astype(kind.value_type.to_pandas_dtype(), copy=False), type=kind.value_type),
        type=kind,
    )


def write_shard(path: Path, number: int, trajectories: Sequence[Trajectory], header: dict[str, Any]) -> dict[str, Any]:
    """Write one shard into folder ``path`` and return its manifest entry.

    Raises:
        NoSpaceError: the disk is full; no partial file is left.
        StoreError: a trajectory breaks a rule of the format.
    """
    table, header = shard_table(trajectories, header)
    data = shard_bytes(table, header["row_group_rows"])
    sha256 = hashlib.sha256(data).hexdigest()
    # The name carries the checksum, so that a whole shard is known as whole before there is a manifest.
    name = f"shard-{number:05d}-{sha256[:16]}.parquet"
    write_whole(path / name, data)
    return shard_entry(name, sha256, len(data), header, table)


def shard_entry(name: str, sha256: str, num_bytes: int, header: dict[str, Any], table: pa.Table) -> dict[str, Any]:
    """Entry of a shard in the manifest; ``table`` needs the columns of :func:`counted_columns` only."""
    counted = counted_columns(header["identity"])
    return {
        "file": name,
        "sha256": sha256,
        "bytes": num_bytes,
        "rows": len(table),
        **{
            count: sum(len(chunk.flatten()) for chunk in table.column(counted[count]).chunks) if count in counted else 0
            for count in COUNTED
        },
        **{key: header[key] for key in ("batch_size", "layout", "row_group_rows", "versions")},
    }


def counted_columns(identity: dict[str, Any]) -> dict[str, str]:
    """Counts of a manifest entry, and the columns that hold what they count; without sets there are no slots."""
    if identity["sampling"]["p_max"] < 1.0:
        return COUNTED
    return {"response_tokens": "response_ids", "positions": "log_sum_exp"}


def index_rows(table: pa.Table) -> pa.Table:
    """Rows of the index for a shard, from its columns."""
    lengths = {
        name: pa.chunked_array([np.diff(chunk.offsets).astype(np.int32) for chunk in table.column(column).chunks])
        for name, column in (
            ("prompt_tokens", "prompt_ids"),
            ("response_tokens", "taken_slots" if "taken_slots" in table.column_names else "response_ids"),
        )
    }
    facts = {name: table.column(name) for name in ("prompt_id", "answer_index")}
    return pa.table({**facts, **lengths}, schema=schema.index_schema())


def write_manifest(
    path: Path, identity: dict[str, Any], entries: Sequence[dict[str, Any]], rows: Mapping[str, pa.Table] | None = None
) -> None:
    """Write index and manifest of the shards in folder ``path``: from here on they are a store.

    Args:
        path: folder of the shards.
        identity: identity of the store.
        entries: entries of the shards.
        rows: file name → its rows of the index, where known; the others are read from the shards.
    Raises:
        NoSpaceError: the disk is full; an earlier manifest and its index are still whole.
    """
    entries = sorted(entries, key=lambda entry: schema.shard_number(entry["file"]))
    totals = {key: sum(entry[key] for entry in entries) for key in ("rows", "bytes", *COUNTED)} | {
        "shards": len(entries)
    }
    known = rows or {}
    parts = [known[entry["file"]] if entry["file"] in known else read_rows(path / entry["file"]) for entry in entries]
    index = pa.concat_tables([schema.index_schema().empty_table(), *parts]).combine_chunks()
    index = index.replace_schema_metadata({schema.HEADER_KEY: schema.canonical_json({"shards": entries})})
    data = shard_bytes(index, _INDEX_ROW_GROUP_ROWS)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"index-{sha256[:16]}.parquet"
    write_whole(path / name, data)
    content = {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "identity": identity,
        "has_lists": identity["sampling"]["p_max"] < 1.0,
        "index": {"file": name, "sha256": sha256, "bytes": len(data)},
        "totals": {**totals, "prompts": pc.count_distinct(index.column("prompt_id")).as_py()},
    }
    write_whole(path / schema.MANIFEST, schema.seal_manifest(content))
    remove_other_indices(path, name)


def read_rows(file: Path) -> pa.Table:
    """Rows of the index for a shard in a file."""
    with open_shard(file) as shard:
        names = set(shard.schema_arrow.names)
        columns = ["prompt_id", "answer_index", "prompt_ids", "taken_slots", "response_ids"]
        return index_rows(shard.read(columns=[name for name in columns if name in names], use_threads=False))


def remove_other_indices(path: Path, name: str | None) -> None:
    """Remove every index in folder ``path`` but the one of the manifest: a killed writer left them."""
    for file in schema.index_files(path):
        if file.name != name:
            file.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of a store, which is either whole or absent, whatever interrupts.

    Raises:
        NoSpaceError: the disk or the quota is full.
    """
    try:
        write_atomically(path, data, partial=path.with_name(path.name + schema.TEMPORARY_SUFFIX))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{path}: the disk is full; writing {len(data):,} bytes failed. "
                "Free some room and run capture again: it goes on with the shards it has."
            ) from error
        raise
