import json
import multiprocessing
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fakes import END_TOKEN, SETTINGS, FakeTeacher, assert_same_trajectory, capture_fake, make_prompts
from store_fakes import random_trajectory as build

from tdistill.errors import StoreCorruptError, StoreError
from tdistill.store import Store, verify_store
from tdistill.store.schema import dequantise, quantise, store_identity
from tdistill.store.write import shard_header, write_manifest, write_shard
from tdistill.types import ActionSets, Trajectory

# Half a step and the largest code, from docs/store-format.md.
ERROR = {8: 1 / 32, 16: 1 / 4096}
FLOOR = {8: -255 / 16, 16: -65535 / 2048}


def identity(bits: int = 16, p_max: float = 0.9, mode: str = "generate") -> dict:
    return store_identity(
        FakeTeacher().identity,
        (END_TOKEN,),
        replace(SETTINGS, p_max=p_max, max_actions=None),
        mode=mode,
        log_prob_bits=bits,
        tokenizer_sha256="bb",
        template="plain",
    )


def write_store(path: Path, trajectories: list[Trajectory], identity: dict) -> Store:
    header = shard_header(identity, [(t.prompt_id, t.answer_index, "0" * 16) for t in trajectories], 4)
    write_manifest(path, identity, [write_shard(path, 0, trajectories, header)])
    return Store.open(path)


@st.composite
def trajectories(draw: st.DrawFn, with_lists: bool) -> Trajectory:
    length = draw(st.integers(1, 7))
    ends = draw(st.sampled_from(["terminal", "truncated"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    response = rng.integers(2, 50, length).astype(np.int32)
    if ends == "terminal":
        response[-1] = END_TOKEN
    return build(
        rng,
        prompt_id=draw(st.text(max_size=5)),
        answer_index=draw(st.integers(0, 9)),
        prompt_ids=rng.integers(0, 50, draw(st.integers(0, 5))).astype(np.int32),
        response_ids=response,
        ends=ends,
        source="teacher",
        with_lists=with_lists,
        max_size=draw(st.sampled_from([1, 2, 20])),
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("p_max", [0.9, 1.0])
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, bits: int, p_max: float) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(trajectories(with_lists=p_max < 1), min_size=1, max_size=4, unique_by=lambda t: t.prompt_id))
    def check(written: list[Trajectory]) -> None:
        path = tmp_path_factory.mktemp("store")
        store = write_store(path, written, identity(bits, p_max))
        assert len(store) == len(written)
        for found, expected in zip(store, written, strict=True):
            assert_same_trajectory(found, expected, ERROR[bits], FLOOR[bits])
        assert store.response_lengths.tolist() == [len(t.response_ids) for t in written]
        assert store.prompt_lengths.tolist() == [len(t.prompt_ids) for t in written]
        assert store.response_lengths.dtype == store.prompt_lengths.dtype == np.int64
        assert store.total_response_tokens == sum(len(t.response_ids) for t in written)
        assert verify_store(path) == []

    check()


def test_last_state_of_a_truncated_answer_may_be_missing(tmp_path: Path) -> None:
    whole = build(
        np.random.default_rng(0),
        prompt_id="a",
        answer_index=0,
        prompt_ids=np.arange(3, dtype=np.int32),
        response_ids=np.array([5, 6, 7], dtype=np.int32),
        ends="truncated",
        source="teacher",
        with_lists=True,
    )
    stop = whole.sets.offsets[3]
    cut = replace(
        whole,
        sets=ActionSets(
            whole.sets.offsets[:4],
            whole.sets.ids[:stop],
            whole.sets.log_probs[:stop],
            whole.sets.covered_mass[:3],
            whole.sets.log_sum_exp[:3],
        ),
    )
    store = write_store(tmp_path, [cut], identity())
    assert_same_trajectory(store[0], cut, ERROR[16], FLOOR[16])
    assert store.manifest["totals"]["positions"] == 3


def test_lists_are_left_out_at_p_max_1(tmp_path: Path) -> None:
    listed = build(
        np.random.default_rng(0),
        prompt_id="a",
        answer_index=0,
        prompt_ids=np.arange(3, dtype=np.int32),
        response_ids=np.array([5, END_TOKEN], dtype=np.int32),
        ends="terminal",
        source="teacher",
        with_lists=True,
    )
    store = write_store(tmp_path, [listed], identity(p_max=1.0))
    assert store.p_max == 1.0 and store.manifest["has_lists"] is False
    assert store.manifest["totals"]["action_slots"] == 0
    assert store[0].sets.offsets.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(store[0].response_ids, listed.response_ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(max_value=0.0, width=32), min_size=1), st.sampled_from([8, 16]))
def test_quantisation_error(log_probs: list[float], bits: int) -> None:
    exact = np.array(log_probs, dtype=np.float32)
    found = dequantise(quantise(exact, bits), bits)
    assert np.abs(found - np.maximum(exact.astype(np.float64), FLOOR[bits])).max() <= ERROR[bits]


def test_quantised_values() -> None:
    # −ln ½ = 0.693147 nats: · 2048 = 1419.57 and · 16 = 11.09; 1 nat lies on a step; 40 nats are clamped.
    log_probs = np.array([0.0, np.log(0.5), -1.0, -40.0, -np.inf])
    assert quantise(log_probs, 16).tolist() == [0, 1420, 2048, 65535, 65535]
    assert quantise(log_probs, 8).tolist() == [0, 11, 16, 255, 255]
    assert dequantise(np.array([0, 1420, 65535], dtype=np.uint16), 16).tolist() == [0.0, -0.693359375, -31.99951171875]


def test_codes_of_equal_probabilities_do_not_fall(tmp_path: Path) -> None:
    """Two probabilities that differ by float32 rounding, one on either side of the border between two codes."""
    border = -2457.5 / 2048
    log_probs = np.array([border - 1e-6, border + 1e-6, -0.5, -2.0], dtype=np.float32)
    assert quantise(log_probs, 16).tolist() == [2458, 2457, 1024, 4096]
    sets = ActionSets(
        offsets=np.array([0, 2, 4]),
        ids=np.array([5, 6, 1, 8], dtype=np.int32),
        log_probs=log_probs,
        covered_mass=np.array([2 * np.exp(border), np.exp(-0.5) + np.exp(-2.0)], dtype=np.float32),
        log_sum_exp=np.zeros(2, dtype=np.float32),
    )
    ids = np.array([6, END_TOKEN], dtype=np.int32)
    store = write_store(tmp_path, [Trajectory("a", 0, ids, ids, "terminal", "teacher", sets)], identity())
    assert (-2048 * store[0].sets.log_probs).tolist() == [2458, 2458, 1024, 4096]
    assert verify_store(tmp_path) == []


def test_negative_index_and_end(small_store: Path) -> None:
    store = Store.open(small_store)
    assert [t.prompt_id for t in store] == ["prompt-0", "prompt-1"]
    assert store[-1].prompt_id == "prompt-1"
    with pytest.raises(IndexError):
        store[2]


def test_many_row_groups_in_one_shard(tmp_path: Path) -> None:
    capture_fake(tmp_path, make_prompts(150), shard_prompts=150, batch_size=50)
    store = Store.open(tmp_path)
    (entry,) = store.manifest["shards"]
    assert pq.ParquetFile(tmp_path / entry["file"]).metadata.num_row_groups == 3
    teacher = FakeTeacher()
    for index in (149, 0, 64, 63, 128, 127):
        (expected,) = teacher.generate([(make_prompts(150)[index], 0)], SETTINGS)
        assert_same_trajectory(store[index], expected, ERROR[16], FLOOR[16])


def test_cache_of_row_groups_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdistill.store.read._CACHE_BYTES", 1)
    capture_fake(tmp_path, make_prompts(6))
    store = Store.open(tmp_path)
    assert [store[i].prompt_id for i in (0, 5, 0)] == ["prompt-0", "prompt-5", "prompt-0"]
    assert len(store._cache) == 1


def test_pickled_store_reads_the_same(small_store: Path) -> None:
    store = Store.open(small_store)
    first = store[0]
    copy = pickle.loads(pickle.dumps(store))
    assert_same_trajectory(copy[0], first, 0.0, -np.inf)


def read_in_worker(store: Store, queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put([len(store[index].response_ids) for index in range(len(store))])


def test_forked_worker_reads_the_same(small_store: Path) -> None:
    store = Store.open(small_store)
    expected = [len(t.response_ids) for t in store]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_in_worker, args=(store, queue))
    worker.start()
    assert queue.get(timeout=30) == expected
    worker.join()


def test_lengths_do_not_need_the_sets(small_store: Path) -> None:
    """Break the pages of the set columns: the lengths are still read, the trajectory is refused."""
    store = Store.open(small_store)
    expected = [len(t.response_ids) for t in store]
    file = small_store / store.manifest["shards"][0]["file"]
    metadata = pq.ParquetFile(file).metadata.row_group(0)
    column = next(c for c in map(metadata.column, range(11)) if c.path_in_schema.startswith("log_sum_exp"))
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    file.write_bytes(data)
    store = Store.open(small_store, verify=False)
    assert store.response_lengths.tolist() == expected
    with pytest.raises(StoreCorruptError, match=file.name):
        store[0]


def defect(field: str, change: object) -> Trajectory:
    good = Trajectory(
        prompt_id="a",
        answer_index=0,
        prompt_ids=np.array([4, 5], dtype=np.int32),
        response_ids=np.array([6, END_TOKEN], dtype=np.int32),
        ends="terminal",
        source="teacher",
        sets=ActionSets(
            offsets=np.array([0, 2, 3]),
            ids=np.array([6, 8, END_TOKEN], dtype=np.int32),
            log_probs=np.log(np.array([0.7, 0.25, 0.98], dtype=np.float32)),
            covered_mass=np.array([0.95, 0.98], dtype=np.float32),
            log_sum_exp=np.array([11.0, 12.0], dtype=np.float32),
        ),
    )
    if hasattr(good, field):
        return replace(good, **{field: change})
    return replace(good, sets=replace(good.sets, **{field: np.asarray(change, dtype=getattr(good.sets, field).dtype)}))


DEFECTS = {
    "rising": ("log_probs", np.log([0.25, 0.7, 0.98]), "log-probabilities of state 0 rise"),
    "above 0": ("log_probs", [0.5, -1.4, -0.02], "above 0"),
    "nan": ("log_probs", [-0.4, np.nan, -0.02], "not a number"),
    "twice": ("ids", [6, 6, 1], "token 6 twice"),
    "taken": ("ids", [7, 8, 1], "taken token 6 is not in the set of state 0"),
    "vocabulary": ("ids", [6, 50, 1], "outside the vocabulary"),
    "negative": ("ids", [6, -1, 1], "outside the vocabulary"),
    "prompt": ("prompt_ids", np.array([50], dtype=np.int32), "prompt id lies outside"),
    "mass": ("covered_mass", [0.9, 0.98], "state 0 records the mass 0.89999"),
    "mass range": ("covered_mass", [0.95, 1.5], "outside \\[0, 1\\]"),
    "lse": ("log_sum_exp", [np.inf, 1.0], "log-sum-exp is not finite"),
    "sum": ("offsets", [0, 2, 4], "add up to 4"),
    "empty set": ("offsets", [0, 0, 3], "state 0 is empty"),
    "states": ("offsets", [0, 1, 2, 3], "3 states for 2 response tokens"),
    "no end token": ("response_ids", np.array([6, 8], dtype=np.int32), "not an end token"),
    "empty": ("response_ids", np.zeros(0, dtype=np.int32), "response is empty"),
    "ends": ("ends", "next", "ends is 'next'"),
    "source": ("source", "given", "source is 'given'"),
}


@pytest.mark.parametrize(("field", "change", "message"), DEFECTS.values(), ids=DEFECTS)
def test_defective_trajectory_is_not_written(tmp_path: Path, field: str, change: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        write_store(tmp_path, [defect(field, change)], identity())
    assert list(tmp_path.iterdir()) == []


# Codes cannot express a log-probability above 0 or one that is not a number.
STORABLE_DEFECTS = {name: defect for name, defect in DEFECTS.items() if name not in ("above 0", "nan")}


@pytest.mark.parametrize(("field", "change", "message"), STORABLE_DEFECTS.values(), ids=STORABLE_DEFECTS)
def test_check_finds_what_another_program_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, change: object, message: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tdistill.store.write.trajectory_problems", lambda *_: [])
        patch.setattr("tdistill.store.write._codes", lambda sets, bits: quantise(sets.log_probs, bits))
        write_store(tmp_path, [defect(field, change)], identity())
    problems = verify_store(tmp_path)
    assert re.search(message, "\n".join(problems))


def test_good_neighbour_of_the_defects(tmp_path: Path) -> None:
    write_store(tmp_path, [defect("answer_index", 0)], identity())
    assert verify_store(tmp_path) == []


def test_added_token_of_a_given_answer_is_not_in_the_mass(tmp_path: Path) -> None:
    given_answer = replace(defect("log_probs", np.log([0.7, 0.01, 0.98])), source="given")
    given_answer = replace(given_answer, response_ids=np.array([8, END_TOKEN], dtype=np.int32))
    sets = replace(given_answer.sets, covered_mass=np.array([0.7, 0.98], dtype=np.float32))
    write_store(tmp_path, [replace(given_answer, sets=sets)], identity(mode="score"))
    assert verify_store(tmp_path) == []


def test_check_compares_shards_with_the_manifest(tmp_path: Path) -> None:
    first, second = defect("prompt_id", "a"), defect("prompt_id", "b")
    facts = identity()
    jobs = [("a", 0, "0" * 16), ("b", 0, "0" * 16)]
    entry = write_shard(tmp_path, 0, [first, second], shard_header(facts, jobs, 2))
    wrong = {**entry, "jobs": [list(jobs[1]), list(jobs[0])], "action_slots": 7}
    write_manifest(tmp_path, {**facts, "template": "other"}, [wrong])
    text = "\n".join(verify_store(tmp_path))
    assert 'template: stored "plain", asked "other"' in text
    assert "job list is not the manifest's" in text
    assert "the row is answer 0 to 'a'" in text
    assert "6 action_slots, the manifest says 7" in text


def test_check_finds_repeated_answers_and_two_prompts_of_one_id(tmp_path: Path) -> None:
    facts, row = identity(), defect("prompt_id", "a")
    entries = [
        write_shard(tmp_path, number, [row], shard_header(facts, [("a", 0, digit * 16)], 1))
        for number, digit in enumerate("01")
    ]
    write_manifest(tmp_path, facts, entries)
    repeated, two_prompts = verify_store(tmp_path)
    assert repeated.startswith("shard-00001") and f"answer 0 to 'a' is also in {entries[0]['file']}" in repeated
    assert "prompt 'a' has the digests 0000000000000000 and 1111111111111111" in two_prompts


def test_identity_is_plain_json(small_store: Path) -> None:
    store = Store.open(small_store)
    assert store.identity == json.loads(json.dumps(store.identity))
    assert store.end_token_ids == (END_TOKEN,)
    assert store.p_max == 0.9
    assert store.jobs == [("prompt-0", 0), ("prompt-1", 0)]
