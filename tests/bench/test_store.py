"""What the store benchmark reports, and memory that does not grow with the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import random_trajectory

from tdistill.bench.memory import in_own_process
from tdistill.bench.store import (
    _by_p_and_cap,
    _kl,
    _nested,
    measure,
    padding_share,
    read_in_process,
    synthetic_store,
)
from tdistill.errors import StoreError
from tdistill.store import Store, verify_store
from tdistill.store.schema import store_identity
from tdistill.store.write import shard_header, write_manifest, write_shard
from tdistill.teachers.base import SamplingSettings
from tdistill.types import Trajectory

VOCAB_SIZE, P_MAX = 400, 0.9


def write_store(path: Path, trajectories: list[Trajectory], p_max: float = P_MAX) -> Store:
    identity = store_identity(
        {"weights_sha256": "aa", "vocab_size": VOCAB_SIZE},
        (1,),
        SamplingSettings(p_max, 16, 1.0, 64, 0),
        mode="generate",
        log_prob_bits=16,
        tokenizer_sha256="bb",
        template="plain",
    )
    jobs = [(t.prompt_id, t.answer_index, "0" * 16) for t in trajectories]
    path.mkdir()
    write_manifest(path, identity, [write_shard(path, 0, trajectories, shard_header(identity, jobs, 8))])
    return Store.open(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rows = [random_trajectory(seed, VOCAB_SIZE, 6, 60, "truncated", largest_set=16) for seed in range(120)]
    rows = [
        Trajectory(f"prompt-{n}", 0, t.prompt_ids, t.response_ids, t.ends, t.source, t.sets) for n, t in enumerate(rows)
    ]
    return write_store(tmp_path_factory.mktemp("source") / "store", rows)


def test_a_store_without_sets_is_refused(tmp_path: Path):
    write_store(tmp_path / "store", [random_trajectory(0, VOCAB_SIZE, 6, 60, "truncated", largest_set=16)], p_max=1.0)
    with pytest.raises(StoreError, match=r"was captured at p_max = 1, which keeps no action sets.*p_max below 1"):
        measure(tmp_path / "store")


def test_report(source: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tdistill.bench.store._MASSES", (0.5,))
    monkeypatch.setattr("tdistill.bench.store._CAPS", (4,))
    report = measure(
        source.path,
        response_tokens_per_batch=256,
        rounds=1,
        synthetic_response_tokens=(10_000, 30_000),
        read_response_tokens=2_000,
    )
    assert report == json.loads(json.dumps(report))
    folder = sum(file.stat().st_size for file in source.path.iterdir())
    assert report["store"]["bytes_per_response_token"] == folder / source.total_response_tokens
    parts = report["store"]["by_part_bytes_per_response_token"]
    assert sum(parts.values()) == pytest.approx(report["store"]["bytes_per_response_token"])
    by_size = {(row["p"], row["cap"], row["log_prob_bits"]): row for row in report["by_p_and_cap"]}
    assert set(by_size) == {(p, cap, bits) for p in (0.5, P_MAX) for cap in (4, 16) for bits in (8, 16)}
    assert all(by_size[p, 4, b]["mean_set_size"] <= min(4, by_size[p, 16, b]["mean_set_size"]) for p, _, b in by_size)
    sizes = {key: row["bytes_per_response_token"] for key, row in by_size.items()}
    assert sizes[0.5, 4, 8] < sizes[P_MAX, 4, 8] < sizes[P_MAX, 16, 8] < sizes[P_MAX, 16, 16]
    assert report["log_prob_error"]["16"]["max_error_nats"] == 0.0
    assert 0.01 < report["log_prob_error"]["8"]["max_error_nats"] <= 0.5
    assert report["reading"]["response_tokens_per_s"] > 0
    small, large = report["opening"]
    assert 10_000 <= small["response_tokens"] < large["response_tokens"] >= 30_000
    assert large["rows"] / small["rows"] == large["num_shards"] / small["num_shards"]


def test_nested_sets_are_prefixes_that_hold_the_token_taken(source: Store, tmp_path: Path):
    nested = [_nested(source[row], 0.5, 4, source, row) for row in range(20)]
    for own, whole in zip(nested, (source[row] for row in range(20)), strict=True):
        for state in range(len(own.sets)):
            first, stop = own.sets.offsets[state : state + 2]
            at = whole.sets.offsets[state]
            assert own.sets.ids[first:stop].tolist() == whole.sets.ids[at : at + stop - first].tolist()
            assert 1 <= stop - first <= 4
            if state < len(own.response_ids):
                assert own.response_ids[state] in own.sets.ids[first:stop]
    assert any((a.response_ids != source[n].response_ids).any() for n, a in enumerate(nested))
    rows = _by_p_and_cap(source, [source[row] for row in range(len(source))], tmp_path)
    for row in rows:
        assert verify_store(tmp_path / f"nested-{row['p']}-{row['cap']}-{row['log_prob_bits']}") == []


def test_divergence_of_sets_by_hand():
    # {0.6, 0.2} against {0.4, 0.4}: renormalised 3/4 and 1/4 against 1/2 each. And a set of one: nothing to lose.
    exact, other = np.log([0.6, 0.2, 0.9]), np.log([0.4, 0.4, 0.5])
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(_kl(exact, other, np.array([0, 2, 3])), [expected, 0.0], atol=1e-12)


def test_synthetic_store_is_a_store(source: Store, tmp_path: Path):
    path = synthetic_store(source, tmp_path / "large", 3 * source.total_response_tokens)
    store = Store.open(path, verify=True)
    assert verify_store(path) == []
    assert len(store) == 3 * len(source)
    assert len({prompt_id for prompt_id, _ in store.jobs}) == len(store)
    np.testing.assert_array_equal(store[len(source) + 5].sets.log_probs, source[5].sets.log_probs)


@pytest.mark.slow
def test_memory_and_opening_do_not_grow_with_the_store(source: Store, tmp_path: Path):
    """Two stores, one twenty times as large; of each, more is read than the cache holds."""
    cache_bytes, found = 8 << 20, []
    for size in (200_000, 4_000_000):
        path = synthetic_store(source, tmp_path / str(size), size)
        # A fresh process for each: the peak of one process never falls.
        found.append(in_own_process(read_in_process, str(path), 200_000, 1024, cache_bytes))
    small, large = found
    assert large["store_bytes"] > 15 * small["store_bytes"]
    # Decoded, what was read takes 150 MB and more, of which 8 MiB may stay; per row of the index there are arrays of
    # some ten numbers.
    growth = (large["peak_rss_bytes"] - large["start_rss_bytes"]) - (small["peak_rss_bytes"] - small["start_rss_bytes"])
    assert growth < (32 << 20) + 100 * large["rows"]
    assert large["open_s"] < 1.0


def test_padding_by_hand():
    # One batch: 4 rows of 8 positions for 8 + 2 + 7 + 1 tokens. Sorted into two: 2 · 8 + 2 · 2.
    lengths = np.array([8, 2, 7, 1])
    assert padding_share(lengths, 4, 4) == pytest.approx(1 - 18 / 32)
    assert padding_share(lengths, 4, 2) == pytest.approx(1 - 18 / 20)
    # Two shards of two: 2 · 8 + 2 · 7.
    assert padding_share(lengths, 2, 2) == pytest.approx(1 - 18 / 30)
