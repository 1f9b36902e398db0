"""Reading a store: a map-style dataset of trajectories, memory-mapped, one row group at a time."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tdistill.errors import StoreCorruptError
from tdistill.store import schema
from tdistill.types import ActionSets, Trajectory

_REMEDY = (
    f"Restore the file, or delete {schema.MANIFEST} and run capture again with the same settings: "
    "whole shards are kept and this one is made again."
)
# Decoded row groups of a store with 18 actions per position take about 30 KiB per answer of 256 tokens.
_CACHE_BYTES = 256 << 20


def open_shard(file: Path) -> pq.ParquetFile:
    """Open a shard, memory-mapped, with page checksums verified on reading."""
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


class Store:
    """Trajectories of one teacher, as a map-style dataset: ``len(store)``, ``store[i]``.

    Files are opened for each row group that is read, so a store may be pickled to or forked into worker processes.
    Recently decoded row groups are kept, up to 256 MiB.

    Attributes:
        path: folder of the store.
        manifest: content of its manifest.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self._first_row = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])
        self._cache: OrderedDict[tuple[int, int], tuple[pa.Table, int]] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Store:
        """Open the store in folder ``path``.

        Args:
            path: folder of the store.
            verify: check the SHA-256 of every shard. Otherwise only the sizes and the manifest's own checksum.
        Raises:
            StoreCorruptError: a shard or the manifest is damaged, truncated or missing.
            StoreIncompleteError: the folder holds shards and no manifest.
            StoreError: there is no store.
        """
        path = Path(path)
        manifest = schema.read_manifest(path)
        for shard in manifest["shards"]:
            file = path / shard["file"]
            if not file.is_file():
                raise StoreCorruptError(f"{file}: expected a shard of {shard['rows']} rows, found no file. {_REMEDY}")
            if (size := file.stat().st_size) != shard["bytes"]:
                raise StoreCorruptError(f"{file}: expected {shard['bytes']:,} bytes, found {size:,}. {_REMEDY}")
            if verify and (sha256 := schema.file_sha256(file)) != shard["sha256"]:
                raise StoreCorruptError(f"{file}: expected SHA-256 {shard['sha256']}, found {sha256}. {_REMEDY}")
        return cls(path, manifest)

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
        """(prompt id, answer index) of every row, without reading shards."""
        return [(job[0], job[1]) for shard in self.manifest["shards"] for job in shard["jobs"]]

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """Response tokens of every row, int64 [len(store)]."""
        return self._lengths("response_ids")

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Prompt tokens of every row, int64 [len(store)]."""
        return self._lengths("prompt_ids")

    def _lengths(self, column: str) -> np.ndarray:
        parts = [np.zeros(0, dtype=np.int64)]
        for number in range(len(self.manifest["shards"])):
            for chunk in self._read(number, None, [column]).column(column).chunks:
                parts.append(np.diff(chunk.offsets.to_numpy()).astype(np.int64))
        return np.concatenate(parts)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Trajectory:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a store with {len(self)} rows")
        index = index % len(self)
        number = int(np.searchsorted(self._first_row, index, side="right")) - 1
        group, row = divmod(index - int(self._first_row[number]), self.manifest["shards"][number]["row_group_rows"])
        return _trajectory(self._row_group(number, group), row, self.identity["log_prob_bits"])

    def _row_group(self, number: int, group: int) -> pa.Table:
        key = (number, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][0]
        table = self._read(number, group, None).combine_chunks()
        self._cache[key] = (table, table.nbytes)
        while len(self._cache) > 1 and sum(size for _, size in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return table

    def _read(self, number: int, group: int | None, columns: list[str] | None) -> pa.Table:
        file = self.path / self.manifest["shards"][number]["file"]
        try:
            # Arrow's thread pool does not survive a fork, and a worker has one core to itself anyway.
            with open_shard(file) as shard:
                if group is None:
                    return shard.read(columns=columns, use_threads=False)
                return shard.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise StoreCorruptError(
                f"{file}: expected a readable row group {group}, found: {error}. {_REMEDY}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}


def _trajectory(table: pa.Table, row: int, log_prob_bits: int) -> Trajectory:
    def array(name: str) -> np.ndarray:
        # A copy: Arrow's memory is read-only, and a view would keep the whole row group alive.
        return table.column(name)[row].values.to_numpy().copy()

    sizes = array("set_sizes").astype(np.int64)
    return Trajectory(
        prompt_id=table.column("prompt_id")[row].as_py(),
        answer_index=table.column("answer_index")[row].as_py(),
        prompt_ids=array("prompt_ids"),
        response_ids=array("response_ids"),
        ends=table.column("ends")[row].as_py(),
        source=table.column("source")[row].as_py(),
        sets=ActionSets(
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            ids=array("set_ids"),
            log_probs=schema.dequantise(array("set_log_probs"), log_prob_bits),
            covered_mass=array("covered_mass"),
            log_sum_exp=array("log_sum_exp"),
        ),
    )
