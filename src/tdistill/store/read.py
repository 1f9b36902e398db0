"""Reading a store: a map-style dataset of trajectories, memory-mapped, one row group at a time."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tdistill.errors import StoreCorruptError
from tdistill.files import file_sha256
from tdistill.store import codes, schema
from tdistill.types import ActionSets, Trajectory

_REMEDY = (
    f"Restore the file, or delete {schema.MANIFEST} and run capture again with the same settings: "
    "whole shards are kept and this one is made again."
)
# Of a decoded row group, per action slot and per state: ids and log-probabilities; offsets, masses and tokens.
_BYTES_PER_SLOT, _BYTES_PER_STATE = 8, 24


def open_shard(file: Path) -> pq.ParquetFile:
    """Open a shard or an index, memory-mapped, with page checksums verified on reading."""
    return pq.ParquetFile(file, memory_map=True, page_checksum_verification=True)


def read_header(shard: pq.ParquetFile, name: str) -> dict[str, Any]:
    """What a shard says about itself.

    Raises:
        StoreCorruptError: it says nothing, or nothing readable.
        StoreError: another format version.
    """
    try:
        header = json.loads((shard.schema_arrow.metadata or {})[schema.HEADER_KEY])
    except (KeyError, ValueError) as error:
        raise StoreCorruptError(f"{name}: expected the metadata key 'tdistill', found {error!r}. {_REMEDY}") from error
    schema.check_version(header, name)
    return header


def read_jobs(file: Path) -> list[tuple[str, int, str]]:
    """(prompt id, answer index, request digest) of each row of a shard."""
    with open_shard(file) as shard:
        table = shard.read(columns=["prompt_id", "answer_index", "digest"], use_threads=False)
    prompt_ids, answer_indices, digests = (table.column(name).to_pylist() for name in table.column_names)
    return list(zip(prompt_ids, answer_indices, [digest.hex() for digest in digests], strict=True))


def kept_jobs(path: Path) -> set[tuple[str, int]]:
    """(prompt id, answer index) of what a capture into a folder keeps: of its store, and of whole shards in no store.

    Raises:
        StoreCorruptError: the manifest or the index is damaged.
    """
    store = Store.open(path) if (path / schema.MANIFEST).exists() else None
    jobs, listed = (set(store.jobs), {entry["file"] for entry in store.shards}) if store else (set(), set())
    for file in schema.shard_files(path):
        if file.name not in listed and f"-{file_sha256(file)[:16]}.parquet" in file.name:
            jobs |= {(prompt_id, answer_index) for prompt_id, answer_index, _ in read_jobs(file)}
    return jobs


@dataclass(frozen=True)
class _RowGroup:
    """Decoded trajectories, one after another; ``*_at`` are the places where each begins, and the end."""

    prompt_id: list[str]
    answer_index: np.ndarray
    terminal: np.ndarray
    prompt_ids: np.ndarray
    prompt_at: np.ndarray
    response_ids: np.ndarray
    response_at: np.ndarray
    state_at: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    covered_mass: np.ndarray
    log_sum_exp: np.ndarray

    @property
    def nbytes(self) -> int:
        arrays = (getattr(self, field.name) for field in fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def trajectory(self, row: int, source: Literal["teacher", "given"]) -> Trajectory:
        prompt, prompt_end = self.prompt_at[row], self.prompt_at[row + 1]
        token, token_end = self.response_at[row], self.response_at[row + 1]
        state, state_end = self.state_at[row], self.state_at[row + 1]
        offsets = self.offsets[state : state_end + 1]
        slot, slot_end = offsets[0], offsets[-1]
        # Copies: a view would keep the whole row group alive, and a caller's change would reach later readers.
        return Trajectory(
            prompt_id=self.prompt_id[row],
            answer_index=int(self.answer_index[row]),
            prompt_ids=self.prompt_ids[prompt:prompt_end].copy(),
            response_ids=self.response_ids[token:token_end].copy(),
            ends="terminal" if self.terminal[row] else "truncated",
            source=source,
            sets=ActionSets(
                offsets=offsets - slot,
                ids=self.ids[slot:slot_end].copy(),
                log_probs=self.log_probs[slot:slot_end].copy(),
                covered_mass=self.covered_mass[state:state_end].copy(),
                log_sum_exp=self.log_sum_exp[state:state_end].copy(),
            ),
        )


class Store:
    """Trajectories of one teacher, as a map-style dataset: ``len(store)``, ``store[i]``.

    Files are opened for each row group that is read, so a store may be pickled to or forked into worker processes.
    Recently decoded row groups are kept, up to ``cache_bytes``; nothing else of a shard stays in memory.

    Attributes:
        path: folder of the store.
        manifest: content of its manifest.
        cache_bytes: room for decoded row groups. Those of 16,384 response tokens with 15 actions each take 2.5 MiB.
    """

    cache_bytes: int = 256 << 20

    def __init__(self, path: str | Path, manifest: dict[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self._cache: OrderedDict[tuple[int, int], _RowGroup] = OrderedDict()
        self.cached_bytes = 0
        self._whole: set[str] = set()
        self._numbering: tuple[int, codes.Numbering] | None = None
        self._source: Literal["teacher", "given"] = "teacher" if self.identity["mode"] == "generate" else "given"

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Store:
        """Open the store in folder ``path``: read its manifest, which is small whatever the store's size.

        Args:
            path: folder of the store.
            verify: check size and SHA-256 of every shard and of the index now, which reads all of them. Otherwise each
                is checked when it is first read from.
        Raises:
            StoreCorruptError: a shard, the index or the manifest is damaged, truncated or missing.
            StoreIncompleteError: the folder holds shards and no manifest.
            StoreError: there is no store.
        """
        path = Path(path)
        manifest = schema.read_manifest(path)
        store = cls(path, manifest)
        store._check_size(manifest["index"])
        if verify:
            for entry in store.shards:
                store._checked(entry)
        return store

    def _check_size(self, entry: dict[str, Any]) -> None:
        file, what = self.path / entry["file"], f"a shard of {entry['rows']} rows" if "rows" in entry else "the index"
        if not file.is_file():
            raise StoreCorruptError(f"{file}: expected {what}, found no file. {_REMEDY}")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise StoreCorruptError(f"{file}: expected {entry['bytes']:,} bytes, found {size:,}. {_REMEDY}")

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """Entries of the shards, from the header of the index.

        Raises:
            StoreCorruptError: the index cannot be read.
        """
        file = self._checked(self.manifest["index"])
        try:
            with open_shard(file) as index:
                return json.loads(index.schema_arrow.metadata[schema.HEADER_KEY])["shards"]
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise StoreCorruptError(f"{file}: expected a readable index, found: {error!r}. {_REMEDY}") from error

    @cached_property
    def _first_row(self) -> np.ndarray:
        return np.cumsum([0] + [shard["rows"] for shard in self.shards])

    @property
    def identity(self) -> dict[str, Any]:
        """Teacher, tokenizer, template, end tokens, mode, sampling and quantisation of the trajectories."""
        return self.manifest["identity"]

    @property
    def p_max(self) -> float:
        """Mass of the recorded sets. 1 means that no sets are listed."""
        return self.identity["sampling"]["p_max"]

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.identity["end_token_ids"])

    @property
    def total_response_tokens(self) -> int:
        """Number of response tokens of all trajectories."""
        return self.manifest["totals"]["response_tokens"]

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(prompt id, answer index) of every row, from the index."""
        table = self.index(["prompt_id", "answer_index"])
        return list(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """Response tokens of every row, int64 [len(store)], from the index."""
        return self.index(["response_tokens"]).column(0).to_numpy().astype(np.int64)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Prompt tokens of every row, int64 [len(store)], from the index."""
        return self.index(["prompt_tokens"]).column(0).to_numpy().astype(np.int64)

    @cached_property
    def row_groups(self) -> np.ndarray:
        """Row group of every row, numbered through the store, int64 [len(store)]: what is decoded to read it."""
        parts, first = [np.zeros(0, dtype=np.int64)], 0
        for shard in self.shards:
            parts.append(first + np.arange(shard["rows"]) // shard["row_group_rows"])
            first += -(-shard["rows"] // shard["row_group_rows"])
        return np.concatenate(parts)

    @property
    def row_groups_in_memory(self) -> int:
        """Row groups of the store's mean size of which all, and as many again, are kept decoded; at least 1."""
        totals, num_groups = self.manifest["totals"], int(self.row_groups[-1]) + 1 if len(self) else 1
        decoded = _BYTES_PER_SLOT * totals["action_slots"] + _BYTES_PER_STATE * totals["positions"]
        return max(1, int(self.cache_bytes / 2 * num_groups / max(decoded, 1)))

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """Columns of the index: ``prompt_id``, ``answer_index``, ``prompt_tokens``, ``response_tokens``.

        Raises:
            StoreCorruptError: the index cannot be read, or has other rows than the shards.
        """
        file = self._checked(self.manifest["index"])
        try:
            with open_shard(file) as index:
                table = index.read(columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise StoreCorruptError(f"{file}: expected a readable index, found: {error}. {_REMEDY}") from error
        if missing := set(columns or schema.index_schema().names) - set(table.column_names):
            raise StoreCorruptError(f"{file}: expected the columns {sorted(missing)}, found none of them. {_REMEDY}")
        if len(table) != len(self):
            raise StoreCorruptError(f"{file}: expected {len(self):,} rows, found {len(table):,}. {_REMEDY}")
        return table

    def __len__(self) -> int:
        return self.manifest["totals"]["rows"]

    def __getitem__(self, index: int) -> Trajectory:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a store with {len(self)} rows")
        index = index % len(self)
        number = int(np.searchsorted(self._first_row, index, side="right")) - 1
        group, row = divmod(index - int(self._first_row[number]), self.shards[number]["row_group_rows"])
        return self._row_group(number, group).trajectory(row, self._source)

    def _row_group(self, number: int, group: int) -> _RowGroup:
        key = (number, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        decoded = self._read(number, group)
        self._cache[key] = decoded
        self.cached_bytes += decoded.nbytes
        while len(self._cache) > 1 and self.cached_bytes > self.cache_bytes:
            self.cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return decoded

    def drop_cache(self) -> None:
        """Forget what is decoded; it is read again when it is asked for."""
        self._cache.clear()
        self.cached_bytes = 0

    def _checked(self, entry: dict[str, Any]) -> Path:
        """File of an entry, its SHA-256 compared once: page checksums leave page headers and the footer out."""
        file = self.path / entry["file"]
        if entry["file"] not in self._whole:
            self._check_size(entry)
            try:
                sha256 = file_sha256(file)
            except OSError as error:
                raise StoreCorruptError(f"{file}: expected a readable file, found: {error}. {_REMEDY}") from error
            if sha256 != entry["sha256"]:
                raise StoreCorruptError(f"{file}: expected SHA-256 {entry['sha256']}, found {sha256}. {_REMEDY}")
            self._whole.add(entry["file"])
        return file

    def _read(self, number: int, group: int) -> _RowGroup:
        file = self._checked(self.shards[number])
        try:
            # Arrow's thread pool does not survive a fork, and a worker has one core to itself anyway.
            with open_shard(file) as shard:
                table = shard.read_row_group(group, use_threads=False)
                if self.p_max < 1.0 and (self._numbering is None or self._numbering[0] != number):
                    header = read_header(shard, str(file))
                    self._numbering = number, codes.Numbering.decode(header["common_ids"], header["num_ids"])
            return self._decode(table)
        except (OSError, pa.ArrowException, KeyError, StoreCorruptError) as error:
            raise StoreCorruptError(
                f"{file}: expected a readable row group {group}, found: {error}. {_REMEDY}"
            ) from error

    def _decode(self, table: pa.Table) -> _RowGroup:
        bits = self.identity["log_prob_bits"]
        prompt_at, prompt_ids = _ragged(table, "prompt_ids")
        state_at, log_sum_exp = _ragged(table, "log_sum_exp")
        if self.p_max < 1.0:
            assert self._numbering is not None
            response_at, taken_slots = _ragged(table, "taken_slots")
            names = ("set_sizes", "set_ids", "last_log_probs", "set_log_probs", "set_tops", "covered_mass")
            lists = {name: _ragged(table, name) for name in names}
            for name in ("set_sizes", "last_log_probs", "set_tops", "covered_mass"):
                if not np.array_equal(lists[name][0], state_at):
                    raise StoreCorruptError(f"{name} has other lengths than log_sum_exp")
            sizes, gaps, last, code_gaps, tops, mass = (values for _, values in lists.values())
            packed = codes.PackedSets(sizes, gaps, last, code_gaps, tops)
            offsets, ids, set_codes = codes.unpack_sets(packed, self._numbering[1])
            num_taken, num_states = np.diff(response_at), np.diff(state_at)
            # A truncated answer may have one state more than tokens.
            state_T = np.arange(len(taken_slots)) + np.repeat(state_at[:-1] - response_at[:-1], num_taken)
            if (num_taken > num_states).any() or ((taken_slots < 0) | (taken_slots >= sizes[state_T])).any():
                raise StoreCorruptError("taken_slots point outside the sets")
            response_ids, log_probs = ids[offsets[state_T] + taken_slots], codes.dequantise(set_codes, bits)
            listed = codes.listed_mass(set_codes, offsets, bits) if bits == 8 else np.zeros(0)
            covered_mass = codes.unpack_mass(mass, listed, bits)
        else:
            response_at, response_ids = _ragged(table, "response_ids")
            offsets = np.zeros(len(log_sum_exp) + 1, dtype=np.int64)
            ids, log_probs = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
            covered_mass = np.ones(len(log_sum_exp), dtype=np.float32)
        return _RowGroup(
            prompt_id=table.column("prompt_id").to_pylist(),
            answer_index=table.column("answer_index").to_numpy(),
            terminal=table.column("terminal").to_numpy(),
            prompt_ids=prompt_ids,
            prompt_at=prompt_at,
            response_ids=response_ids,
            response_at=response_at,
            state_at=state_at,
            offsets=offsets,
            ids=ids,
            log_probs=log_probs,
            covered_mass=covered_mass,
            log_sum_exp=codes.unpack_log_sum_exp(log_sum_exp, bits),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "cached_bytes": 0, "_numbering": None}


def _ragged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the lists of a column begin and the last one ends, int64 [rows + 1], and their elements."""
    column = table.column(name)
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.flatten().to_numpy()
