import base64
import itertools
import json
import multiprocessing
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fakes import (
    END_TOKEN,
    SETTINGS,
    FakeTeacher,
    assert_near,
    assert_same_trajectory,
    capture_fake,
    make_prompts,
)
from store_fakes import random_trajectory as build

from tdistill.errors import StoreCorruptError, StoreError
from tdistill.store import Store, verify_store
from tdistill.store.codes import (
    Numbering,
    PackedSets,
    dequantise,
    log_prob_bounds,
    pack_sets,
    quantise,
    unpack_sets,
)
from tdistill.store.schema import store_identity
from tdistill.store.write import read_rows, shard_header, write_manifest, write_shard
from tdistill.types import ActionSets, Trajectory


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
            assert_same_trajectory(found, expected, bits)
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
    assert_same_trajectory(store[0], cut, 16)
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
    assert_near(dequantise(quantise(exact, bits), bits), exact, bits)
    low, high = log_prob_bounds(exact, bits)
    assert ((low <= exact) & (exact <= high + 1e-12)).all()


def test_quantised_values() -> None:
    # −ln ½ = 0.693147 nats: · 2048 = 1419.57; 1 nat lies on a step; 40 nats are clamped.
    log_probs = np.array([0.0, np.log(0.5), -1.0, -40.0, -np.inf])
    assert quantise(log_probs, 16).tolist() == [0, 1420, 2048, 65535, 65535]
    assert dequantise(np.array([0, 1420, 65535], dtype=np.uint16), 16).tolist() == [0.0, -0.693359375, -31.99951171875]
    # 40 · (1 − √½) = 11.72; 40 · (1 − √e⁻¹) = 15.74; 1/400 is code 38 and each nat below it one more: 40 − 5.99 nats
    # is 34.01 more.
    assert quantise(log_probs, 8).tolist() == [0, 12, 16, 72, 255]
    assert quantise(np.log(np.array([1.0, 0.25, 1 / 400, 1 / 400 / np.e])), 8).tolist() == [0, 20, 38, 39]
    # Code 12 is p = (28/40)² and code 39 is one nat below 1/400.
    np.testing.assert_allclose(
        dequantise(np.array([0, 12, 38, 39], dtype=np.uint8), 8), [0, np.log(0.49), -np.log(400), -np.log(400) - 1]
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 16]), st.integers(1, 12), st.integers(0, 20))
def test_packed_sets_are_unpacked(seed: int, bits: int, num_states: int, num_common: int) -> None:
    rng = np.random.default_rng(seed)
    numbering = Numbering(rng.permutation(50)[:num_common], 50)
    sizes = rng.integers(1, 12, num_states)
    ids = np.concatenate([rng.permutation(50)[:size] for size in sizes])
    # Few different codes, so that many are equal.
    codes = np.concatenate([np.sort(rng.integers(0, 5, size)) for size in sizes]).astype(np.uint16)
    offsets, found, found_codes = unpack_sets(pack_sets(sizes, ids, codes, numbering), numbering)
    np.testing.assert_array_equal(found_codes, codes)
    assert offsets.tolist() == [0, *np.cumsum(sizes)]
    for start, stop in itertools.pairwise(offsets):
        assert found[start] == ids[start]
        assert set(zip(found[start:stop], codes[start:stop], strict=True)) == set(
            zip(ids[start:stop], codes[start:stop], strict=True)
        )


def test_numbering_puts_common_ids_first() -> None:
    ids = np.repeat([7, 3, 9, 4], [25, 40, 25, 2])
    numbering = Numbering.of(ids, 11)
    # 3 occurs most often, then 7 and 9, the lower one first; 4 is too rare; all others follow in order.
    assert numbering.id_of_number.tolist() == [3, 7, 9, 0, 1, 2, 4, 5, 6, 8, 10]
    assert numbering.numbers(np.array([9, 4, 3])).tolist() == [2, 6, 0]
    assert Numbering.decode(numbering.encode(), 11).id_of_number.tolist() == numbering.id_of_number.tolist()
    assert base64.b64decode(numbering.encode()) == bytes([3, 0, 7, 0, 9, 0])


@pytest.mark.parametrize("text", ["AwAHAAk", "AwADAA==", "CwA=", "AwAH", "ä"])
def test_list_of_common_ids_that_is_none(text: str) -> None:
    """Cut, with a repeated id, with an id outside the vocabulary, of an odd length, and no base64."""
    with pytest.raises(StoreCorruptError, match="common_ids"):
        Numbering.decode(text, 11)


def packed(**changes: object) -> PackedSets:
    """Sets {4: code 1, 0: code 3} and {1: code 2}, with changes."""
    whole = {
        "sizes_R": [2, 1],
        "gaps_M": [0, 3, 1],
        "last_codes_R": np.array([3, 2], dtype=np.uint8),
        "code_gaps_M": np.array([0, 2, 0], dtype=np.uint8),
        "tops_R": [0, 0],
    }
    return PackedSets(**{name: np.asarray(value) for name, value in {**whole, **changes}.items()})


def test_packed_sets_by_hand() -> None:
    offsets, ids, codes = unpack_sets(packed(), Numbering(np.zeros(0), 10))
    assert (offsets.tolist(), ids.tolist(), codes.tolist()) == ([0, 2, 3], [4, 0, 1], [1, 3, 2])


MALFORMED_SETS = {
    "empty set": ({"sizes_R": [3, 0]}, "set_sizes"),
    "sizes": ({"sizes_R": [2, 2]}, "set_sizes add up to 4"),
    "negative gap": ({"gaps_M": [0, -1, 1]}, "below 0"),
    "vocabulary": ({"gaps_M": [0, 9, 1]}, "reach the number 10 of 10 ids"),
    "code": ({"code_gaps_M": np.array([0, 4, 0], dtype=np.uint8)}, "above the largest code"),
    "top outside": ({"tops_R": [0, 1]}, "set_tops"),
    "top of another code": ({"tops_R": [1, 0]}, "set_tops"),
    "negative top": ({"tops_R": [-1, 0]}, "set_tops"),
}


@pytest.mark.parametrize(("changes", "message"), MALFORMED_SETS.values(), ids=MALFORMED_SETS)
def test_malformed_sets_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(StoreCorruptError, match=message):
        unpack_sets(packed(**changes), Numbering(np.zeros(0), 10))


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


def test_many_row_groups_in_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdistill.store.schema.ROW_GROUP_TOKENS", 170)
    capture_fake(tmp_path, make_prompts(150), shard_prompts=150, batch_size=50)
    store = Store.open(tmp_path)
    (entry,) = store.shards
    # 150 answers of 3 tokens on average, 170 tokens to a group.
    num_groups = -(-150 // entry["row_group_rows"])
    assert pq.ParquetFile(tmp_path / entry["file"]).metadata.num_row_groups == num_groups == 3
    assert store.row_groups.tolist() == [row // entry["row_group_rows"] for row in range(150)]
    teacher = FakeTeacher()
    for index in (149, 0, 64, 63, 128, 127):
        (expected,) = teacher.generate([(make_prompts(150)[index], 0)], SETTINGS)
        assert_same_trajectory(store[index], expected, 16)


def test_cache_of_row_groups_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "cache_bytes", 1)
    capture_fake(tmp_path, make_prompts(6))
    store = Store.open(tmp_path)
    assert [store[i].prompt_id for i in (0, 5, 0)] == ["prompt-0", "prompt-5", "prompt-0"]
    assert len(store._cache) == 1


def test_pickled_store_reads_the_same(small_store: Path) -> None:
    store = Store.open(small_store)
    first = store[0]
    copy = pickle.loads(pickle.dumps(store))
    for name, value in vars(first.sets).items():
        np.testing.assert_array_equal(getattr(copy[0].sets, name), value)


def read_in_worker(store: Store, queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put([len(store[index].response_ids) for index in range(len(store))])


def test_forked_worker_reads_the_same(small_store: Path) -> None:
    store = Store.open(small_store)
    expected = [len(t.response_ids) for t in store]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_in_worker, args=(store, queue))
    worker.start()
    try:
        assert queue.get(timeout=30) == expected
    finally:
        worker.kill()  # what a fork of a process with threads does when it ends is not the matter here
        worker.join()


def test_lengths_and_jobs_do_not_need_the_shards(small_store: Path) -> None:
    """Break a shard: opening, lengths and jobs do not notice, the trajectory is refused."""
    store = Store.open(small_store)
    expected = [len(t.response_ids) for t in store]
    file = small_store / store.shards[0]["file"]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    store = Store.open(small_store)
    assert store.response_lengths.tolist() == expected
    assert store.jobs == [("prompt-0", 0), ("prompt-1", 0)]
    with pytest.raises(StoreCorruptError, match=file.name):
        store[0]


def test_pages_carry_checksums(small_store: Path) -> None:
    """A page that is damaged after its file was checked is refused too."""
    store = Store.open(small_store, verify=True)
    file = small_store / store.shards[0]["file"]
    metadata = pq.ParquetFile(file).metadata.row_group(0)
    column = next(c for c in map(metadata.column, range(13)) if c.path_in_schema.startswith("log_sum_exp"))
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreCorruptError, match=f"{file.name}: expected a readable row group 0"):
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


# A shard has no place for the others: numbers of a set rise, the token taken is a place in the set, and so on.
STORABLE_DEFECTS = {name: DEFECTS[name] for name in ("prompt", "mass", "mass range", "lse")}


@pytest.mark.parametrize(("field", "change", "message"), STORABLE_DEFECTS.values(), ids=STORABLE_DEFECTS)
def test_check_finds_what_another_program_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, change: object, message: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tdistill.store.write.trajectory_problems", lambda *_: [])
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
    other = {**facts, "template": "other", "teacher": {**facts["teacher"], "vocab_size": 60}}
    write_manifest(tmp_path, other, [{**entry, "action_slots": 7, "batch_size": 3}])
    text = "\n".join(verify_store(tmp_path))
    assert "its batch_size is 2, the manifest says 3" in text
    assert "it numbers 50 ids of a vocabulary of 60" in text
    assert 'template: stored "plain", asked "other"' in text
    assert "6 action_slots, the manifest says 7" in text


def test_check_compares_shards_with_the_index(tmp_path: Path) -> None:
    first, second = defect("prompt_id", "a"), defect("prompt_id", "b")
    facts = identity()
    entry = write_shard(tmp_path, 0, [first, second], shard_header(facts, [("a", 0, "0" * 16), ("b", 0, "0" * 16)], 2))
    rows = read_rows(tmp_path / entry["file"])
    wrong = rows.set_column(3, rows.schema.field(3), pa.array([2, 3], type=pa.int32()))
    write_manifest(tmp_path, facts, [entry], {entry["file"]: wrong.take([1, 0])})
    text = "\n".join(verify_store(tmp_path))
    assert "answer 0 to 'a': the index says prompt_id 'b', response_tokens 3" in text
    assert "answer 0 to 'b': the index says prompt_id 'a'" in text


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
