"""Size of a store and of its alternatives, speed of reading it, and time and memory of opening large ones."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tdistill.actions import nested_sizes, prefix_mass, sample_from_sets
from tdistill.bench.memory import in_own_process, peak_rss_bytes
from tdistill.evaluation.sparsity import check_has_sets
from tdistill.store import Store, codes
from tdistill.store.write import (
    index_rows,
    shard_bytes,
    shard_entry,
    shard_header,
    shard_table,
    write_manifest,
    write_shard,
    write_whole,
)
from tdistill.training.batches import TokenBudgetSampler
from tdistill.training.collate import PackedCollator
from tdistill.types import Trajectory

_MASSES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
_CAPS = (8, 16, 32, 64, 128)
_ZSTD_LEVELS = (3, 9, 19)
# Prompts per shard and answers at once.
_LAYOUTS = ((64, 64), (64, 32), (256, 32), (1024, 32))
# Written fast: what is measured on synthetic stores does not depend on how well they are compressed.
_SYNTHETIC_ZSTD_LEVEL = 1


def measure(
    store_path: str | Path,
    *,
    response_tokens_per_batch: int = 1024,
    rounds: int = 3,
    synthetic_response_tokens: Sequence[int] = (100_000, 200_000, 400_000),
    read_response_tokens: int = 100_000,
    cache_bytes: int = Store.cache_bytes,
) -> dict[str, Any]:
    """Measure a captured store.

    Sizes are of whole folders: every column, file headers, index and manifest. Speeds are per second of *processor
    time* of one process with one thread, so that other work on the machine does not count; files are in the page cache.

    Args:
        store_path: a store below p_max = 1. With 16-bit log-probabilities it is also the reference for their error.
        response_tokens_per_batch: response tokens of a micro-batch.
        rounds: epochs that are read for the speed; the median counts.
        synthetic_response_tokens: sizes of the stores that are written by repeating the given one.
        read_response_tokens: response tokens that are read of each, for the peak of memory.
        cache_bytes: room for decoded row groups while reading those.
    Returns:
        ``store``: bytes per response token by column. ``by_p_and_cap``: the same for nested sets, in one shard.
        ``padding``: share of the prompt positions of a capture, by its layout.
        ``encodings``: of ids and log-probabilities by representation, Parquet encoding and zstd level.
        ``log_prob_error``: by bits. ``reading``: response tokens per second from the file to the collated batch.
        ``opening``: one row per synthetic store.
    Raises:
        StoreError: the store is at p_max = 1, which keeps no sets.
    """
    store = Store.open(store_path)
    check_has_sets(store)
    trajectories = [store[row] for row in range(len(store))]
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        return {
            "response_tokens": store.total_response_tokens,
            "rows": len(store),
            "mean_set_size": store.manifest["totals"]["action_slots"] / store.manifest["totals"]["positions"],
            "store": _bytes_per_token(store.path),
            "by_p_and_cap": _by_p_and_cap(store, trajectories, Path(folder)),
            "padding": [
                {"shard_prompts": n, "batch_size": batch, "share": padding_share(store.prompt_lengths, n, batch)}
                for n, batch in _LAYOUTS
            ],
            "encodings": _encodings(trajectories, store.identity["teacher"].get("vocab_size")),
            "log_prob_error": {str(bits): _log_prob_error(trajectories, bits) for bits in (8, 16)},
            "reading": _reading(store.path, response_tokens_per_batch, rounds),
            "opening": [
                _opening(
                    synthetic_store(store, Path(folder) / str(size), size),
                    read_response_tokens,
                    response_tokens_per_batch,
                    cache_bytes,
                )
                for size in synthetic_response_tokens
            ],
        }


class _one_thread:  # noqa: N801 — a context manager, used like a function
    def __enter__(self) -> None:
        self.torch, self.arrow = torch.get_num_threads(), pa.cpu_count()
        torch.set_num_threads(1)
        pa.set_cpu_count(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.torch)
        pa.set_cpu_count(self.arrow)


# ---- size ----


def _bytes_per_token(path: Path) -> dict[str, Any]:
    """Bytes of each column and of everything else, per response token."""
    store = Store.open(path)
    num_tokens, columns = store.total_response_tokens, dict[str, int]()
    for entry in store.shards:
        metadata = pq.ParquetFile(path / entry["file"]).metadata
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                name = chunk.path_in_schema.split(".")[0]
                columns[name] = columns.get(name, 0) + chunk.total_compressed_size
    files = {entry["file"]: entry["bytes"] for entry in (store.manifest["index"], *store.shards)}
    parts = {
        **columns,
        "shard_headers": store.manifest["totals"]["bytes"] - sum(columns.values()),
        "index": store.manifest["index"]["bytes"],
        "manifest": (path / "manifest.json").stat().st_size,
    }
    total = sum(files.values()) + parts["manifest"]
    return {
        "log_prob_bits": store.identity["log_prob_bits"],
        "num_shards": len(store.shards),
        "bytes_per_response_token": total / num_tokens,
        "by_part_bytes_per_response_token": {name: size / num_tokens for name, size in parts.items()},
    }


def _by_p_and_cap(store: Store, trajectories: Sequence[Trajectory], folder: Path) -> list[dict[str, Any]]:
    cap = store.identity["sampling"]["max_actions"]
    largest = max(int(np.diff(t.sets.offsets).max()) for t in trajectories)
    rows = []
    for p in sorted({*(p for p in _MASSES if p < store.p_max), store.p_max}):
        for own_cap in sorted({*(c for c in _CAPS if c < largest), largest if cap is None else cap}):
            nested = [_nested(t, p, own_cap, store, number) for number, t in enumerate(trajectories)]
            for bits in (8, 16):
                path = folder / f"nested-{p}-{own_cap}-{bits}"
                sampling = {**store.identity["sampling"], "p_max": p, "max_actions": own_cap}
                _write(path, nested, {**store.identity, "sampling": sampling, "log_prob_bits": bits})
                size = _bytes_per_token(path)["bytes_per_response_token"]
                mean = float(np.mean(np.concatenate([np.diff(t.sets.offsets) for t in nested])))
                rows.append(
                    {
                        "p": p,
                        "cap": own_cap,
                        "log_prob_bits": bits,
                        "mean_set_size": mean,
                        "bytes_per_response_token": size,
                    }
                )
    return rows


def _nested(trajectory: Trajectory, p: float, cap: int, store: Store, number: int) -> Trajectory:
    """The trajectory on the sets of p and cap; a token outside its set is drawn again from it."""
    sets = trajectory.sets
    sizes_R = np.minimum(np.diff(sets.offsets) if p == store.p_max else nested_sizes(sets, p), cap)
    stored_R = np.diff(sets.offsets)
    if np.array_equal(sizes_R, stored_R):
        return trajectory
    rank_M = np.arange(len(sets.ids)) - np.repeat(sets.offsets[:-1], stored_R)
    keep_M = rank_M < np.repeat(sizes_R, stored_R)
    nested = replace(
        sets,
        offsets=np.concatenate([[0], np.cumsum(sizes_R)]),
        ids=sets.ids[keep_M],
        log_probs=sets.log_probs[keep_M],
        covered_mass=prefix_mass(sets, sizes_R).astype(np.float32),
    )
    num_taken = len(trajectory.response_ids)
    state_M = np.repeat(np.arange(len(sizes_R)), sizes_R)
    taken_R = np.append(trajectory.response_ids, np.full(len(sizes_R) - num_taken, -1))
    inside_R = np.bincount(state_M[nested.ids == taken_R[state_M]], minlength=len(sizes_R)) > 0
    drawn_R = sample_from_sets(nested, np.random.default_rng(number).random(len(sizes_R)))
    response_ids = np.where(inside_R, taken_R, drawn_R)[:num_taken].astype(np.int32)
    terminal = trajectory.ends == "terminal" and int(response_ids[-1]) in store.end_token_ids
    return replace(trajectory, response_ids=response_ids, sets=nested, ends="terminal" if terminal else "truncated")


def _write(path: Path, trajectories: Sequence[Trajectory], identity: dict[str, Any]) -> None:
    path.mkdir(parents=True)
    write_manifest(path, identity, [write_shard(path, 0, trajectories, _header(trajectories, identity))])


def _header(trajectories: Sequence[Trajectory], identity: dict[str, Any]) -> dict[str, Any]:
    # Digests that compress as little as those of real requests.
    digests = [hashlib.sha256(t.prompt_ids.tobytes()).hexdigest()[:16] for t in trajectories]
    jobs = [(t.prompt_id, t.answer_index, digest) for t, digest in zip(trajectories, digests, strict=True)]
    return shard_header(identity, jobs, 1)


def padding_share(prompt_lengths: np.ndarray, shard_prompts: int, batch_size: int) -> float:
    """Share of prompt positions that are padding when each shard is cut into batches by length, longest first."""
    computed = 0
    for at in range(0, len(prompt_lengths), shard_prompts):
        falling = np.sort(prompt_lengths[at : at + shard_prompts])[::-1]
        computed += sum(int(falling[b]) * len(falling[b : b + batch_size]) for b in range(0, len(falling), batch_size))
    return 1 - float(prompt_lengths.sum()) / computed


# ---- encodings ----


def _encodings(trajectories: Sequence[Trajectory], vocab_size: int | None) -> list[dict[str, Any]]:
    """Bytes per response token of the two large columns, by representation, encoding and compression."""
    num_tokens = sum(len(t.response_ids) for t in trajectories)
    sets = [t.sets for t in trajectories]
    sizes_R = np.concatenate([np.diff(own.offsets) for own in sets])
    ids_M = np.concatenate([own.ids for own in sets])
    log_probs_M = np.concatenate([own.log_probs for own in sets])
    first_R = np.cumsum(sizes_R) - sizes_R
    size = int(ids_M.max()) + 1 if vocab_size is None else vocab_size
    numbering, plain = codes.Numbering.of(ids_M, size), codes.Numbering(np.zeros(0), size)
    columns: dict[str, dict[str, np.ndarray]] = {"set_ids": {"ids by falling probability": ids_M.astype(np.int32)}}
    for bits in (8, 16):
        codes_M = codes.quantise(log_probs_M, bits)
        steps_M = np.diff(codes_M.astype(np.int32), prepend=0)
        steps_M[first_R] = codes_M[first_R]
        packed = codes.pack_sets(sizes_R, ids_M, codes_M, numbering)
        columns["set_ids"]["gaps of rising ids"] = codes.pack_sets(sizes_R, ids_M, codes_M, plain).gaps_M
        columns["set_ids"]["gaps of rising numbers (the format)"] = packed.gaps_M
        columns[f"set_log_probs, {bits} bits"] = {
            "codes by falling probability": codes_M.astype(np.int32),
            "differences by falling probability": steps_M,
            "differences from the largest, by rising number (the format)": packed.code_gaps_M.astype(np.int32),
        }
    return [
        {
            "column": column,
            "representation": name,
            "encoding": encoding,
            "zstd_level": level,
            "bytes_per_response_token": _column_bytes(values, encoding, level) / num_tokens,
        }
        for column, representations in columns.items()
        for name, values in representations.items()
        for encoding in ("BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN", "dictionary")
        for level in (_ZSTD_LEVELS if encoding == "BYTE_STREAM_SPLIT" else _ZSTD_LEVELS[-1:])
    ]


def _column_bytes(values: np.ndarray, encoding: str, level: int) -> int:
    sink = pa.BufferOutputStream()
    how: dict[str, Any] = {"use_dictionary": True}
    if encoding != "dictionary":
        how = {"use_dictionary": False, "column_encoding": {"values": encoding}}
    pq.write_table(
        pa.table({"values": values}), sink, compression="zstd", compression_level=level, write_statistics=False, **how
    )
    group = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata.row_group(0)
    return group.column(0).total_compressed_size


def _log_prob_error(trajectories: Sequence[Trajectory], bits: int) -> dict[str, float]:
    """Error of log-probabilities kept in so many bits, against those of the given store."""
    exact = [t.sets.log_probs.astype(np.float64) for t in trajectories]
    found = [codes.dequantise(codes.quantise(own, bits), bits).astype(np.float64) for own in exact]
    error, prob = np.concatenate(found) - np.concatenate(exact), np.exp(np.concatenate(exact))
    kl = [_kl(a, b, t.sets.offsets) for a, b, t in zip(exact, found, trajectories, strict=True)]
    return {
        "max_error_nats": float(np.abs(error).max()),
        "mean_error_by_probability_nats": float((prob * np.abs(error)).sum() / prob.sum()),
        "max_error_of_p": float(np.abs(np.exp(error + np.log(prob)) - prob).max()),
        "mean_kl_of_set_nats": float(np.concatenate(kl).mean()),
    }


def _kl(log_probs_M: np.ndarray, other_M: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """KL(proj_p π‖proj_p π') of each set, nats."""
    first_R, sizes_R = offsets[:-1], np.diff(offsets)
    own_M, stored_M = (
        values - np.repeat(np.log(np.add.reduceat(np.exp(values), first_R)), sizes_R)
        for values in (log_probs_M, other_M)
    )
    return np.add.reduceat(np.exp(own_M) * (own_M - stored_M), first_R)


# ---- reading ----


def batches(store: Store, response_tokens_per_batch: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """One epoch of collated micro-batches, as training reads them without worker processes."""
    sampler = TokenBudgetSampler(
        store.response_lengths,
        store.response_lengths + store.prompt_lengths,
        response_tokens_per_batch,
        seed,
        row_groups=store.row_groups,
        window_row_groups=store.row_groups_in_memory,
    )
    collate = PackedCollator(pad_token_id=0)
    for rows in sampler:
        yield collate([store[row] for row in rows])


def _reading(path: Path, response_tokens_per_batch: int, rounds: int) -> dict[str, Any]:
    """Response tokens per second of processor time, opening included; nothing is decoded when an epoch starts."""
    whole: list[float] = []
    decoded: list[float] = []
    for _ in range(rounds + 1):
        store = Store.open(path)
        for seconds in (whole, decoded):
            seconds.append(_processor_seconds(partial(_drain, batches(store, response_tokens_per_batch))))
    num_tokens = store.total_response_tokens
    return {
        "response_tokens_per_batch": response_tokens_per_batch,
        "response_tokens_per_s": num_tokens / float(np.median(whole[1:])),
        "response_tokens_per_s_from_decoded_row_groups": num_tokens / float(np.median(decoded[1:])),
        "rounds": rounds,
    }


def _drain(items: Iterator[Any]) -> int:
    return sum(1 for _ in items)


def _processor_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


# ---- large stores ----


def synthetic_store(source: Store, path: Path, response_tokens: int) -> Path:
    """Write a store of at least so many response tokens that repeats the shards of another under new prompt ids.

    Args:
        source: a store.
        path: folder to make.
        response_tokens: how many the new one has at least.
    Returns:
        ``path``.
    """
    path.mkdir(parents=True)
    entries, rows, written, number = [], {}, 0, 0
    shards = [_shard(source, entry) for entry in source.shards]
    while written < response_tokens:
        table, header = shards[number % len(shards)]
        ids = pa.array([f"{number}/{prompt_id}" for prompt_id in table.column("prompt_id").to_pylist()])
        own = table.set_column(0, table.schema.field(0), ids)
        data = shard_bytes(own, header["row_group_rows"], _SYNTHETIC_ZSTD_LEVEL)
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"shard-{number:05d}-{sha256[:16]}.parquet"
        write_whole(path / name, data)
        entries.append(shard_entry(name, sha256, len(data), header, own))
        rows[name] = index_rows(own)
        written, number = written + entries[-1]["response_tokens"], number + 1
    write_manifest(path, source.identity, entries, rows)
    return path


def _shard(store: Store, entry: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    """Table and header of a shard, made anew: the file itself does not say in which order its columns were packed."""
    first = sum(shard["rows"] for shard in store.shards[: store.shards.index(entry)])
    trajectories = [store[row] for row in range(first, first + entry["rows"])]
    return shard_table(trajectories, _header(trajectories, store.identity))


def _opening(path: Path, read_tokens: int, response_tokens_per_batch: int, cache_bytes: int) -> dict[str, Any]:
    """Open and read a store in a process of its own, whose peak of memory is measured."""
    return in_own_process(read_in_process, str(path), read_tokens, response_tokens_per_batch, cache_bytes)


def read_in_process(
    path: str, read_tokens: int, response_tokens_per_batch: int, cache_bytes: int = Store.cache_bytes
) -> dict[str, Any]:
    """Time to open a store and to its first batch, and memory of the process before opening and at its peak.

    Args:
        path: folder of the store.
        read_tokens: response tokens to read in training order.
        response_tokens_per_batch: response tokens of a micro-batch.
        cache_bytes: room for decoded row groups.
    """
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    before, processor_before = peak_rss_bytes(), time.process_time()
    started = time.perf_counter()
    store = Store.open(path)
    opened, processor_opened = time.perf_counter(), time.process_time()
    store.cache_bytes = cache_bytes
    wanted = batches(store, response_tokens_per_batch)
    next(wanted)
    first = time.perf_counter()
    num_batches = _drain(islice(wanted, read_tokens // response_tokens_per_batch))
    return {
        "response_tokens": store.total_response_tokens,
        "rows": len(store),
        "num_shards": len(store.shards),
        "store_bytes": store.manifest["totals"]["bytes"],
        "manifest_bytes": (store.path / "manifest.json").stat().st_size,
        "open_s": opened - started,
        "open_processor_s": processor_opened - processor_before,
        "first_batch_s": first - opened,
        "batches_read": num_batches + 1,
        "start_rss_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
    }
