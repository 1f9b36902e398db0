import errno
import multiprocessing
import os
import re
import shutil
import signal
import stat
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_fakes import SETTINGS, FakeTeacher, assert_same_trajectory, capture_fake, files_of, make_prompts

from tdistill.errors import (
    ConfigError,
    DataFileError,
    EmptyPromptSetError,
    NoSpaceError,
    ProbabilityRangeError,
    StoreCorruptError,
    StoreError,
    StoreIdentityError,
)
from tdistill.store import Store, verify_store
from tdistill.teachers.base import PromptTokens

PROMPTS = make_prompts(8)  # three shards of 3, 3 and 2 prompts, in batches of 2 answers


class Killed(BaseException):
    """Stands for a signal: no handler of errors sees it."""


def is_file(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, bytes]:
    capture_fake(tmp_path / "uninterrupted", PROMPTS, answers_per_prompt=2)
    return files_of(tmp_path / "uninterrupted")


def test_batches_are_of_similar_length_and_rows_in_order(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    store = capture_fake(tmp_path, PROMPTS, teacher, answers_per_prompt=2)
    assert store.jobs == [(prompt.prompt_id, index) for prompt in PROMPTS for index in (0, 1)]
    assert [(t.prompt_id, t.answer_index) for t in store] == store.jobs
    # Lengths 3, 5, 7 of the first three prompts: the longest prompt with both answers comes first.
    assert teacher.batches[:3] == [[(f"prompt-{n}", 0), (f"prompt-{n}", 1)] for n in (2, 1, 0)]
    assert verify_store(tmp_path) == []
    for found, (prompt_id, index) in zip(store, store.jobs, strict=True):
        prompt = next(p for p in PROMPTS if p.prompt_id == prompt_id)
        assert_same_trajectory(found, FakeTeacher().generate([(prompt, index)], SETTINGS)[0], 16)


def test_manifest_says_what_was_captured(tmp_path: Path) -> None:
    store = capture_fake(tmp_path, PROMPTS, answers_per_prompt=2)
    manifest = store.manifest
    assert manifest["identity"] == {
        "teacher": FakeTeacher().identity,
        "tokenizer_sha256": "bb" * 32,
        "template": {"kind": "chat", "sha256": "cc" * 32},
        "end_token_ids": [1],
        "mode": "generate",
        "sampling": {"p_max": 0.9, "max_actions": 8, "temperature": 1.0, "max_new_tokens": 5, "seed": 0},
        "log_prob_bits": 16,
    }
    assert [entry["rows"] for entry in store.shards] == [6, 6, 4]
    assert manifest["totals"]["shards"] == 3
    assert manifest["totals"]["rows"] == 16 and manifest["totals"]["prompts"] == 8
    assert manifest["totals"]["bytes"] == sum(f.stat().st_size for f in tmp_path.glob("shard-*"))
    assert all(set(entry["versions"]) == {"pyarrow", "tdistill", "torch", "transformers"} for entry in store.shards)


@pytest.mark.parametrize("batch", range(9))
def test_killed_between_batches(tmp_path: Path, uninterrupted: dict[str, bytes], batch: int) -> None:
    def kill(number: int) -> None:
        if number == batch:
            raise Killed

    teacher = FakeTeacher()
    teacher.before_batch = kill
    if batch < 8:
        with pytest.raises(Killed):
            capture_fake(tmp_path / "store", PROMPTS, teacher, answers_per_prompt=2)
        assert not (tmp_path / "store" / "manifest.json").exists()
    again = FakeTeacher()
    capture_fake(tmp_path / "store", PROMPTS, again, answers_per_prompt=2)
    assert files_of(tmp_path / "store") == uninterrupted
    # Shards take 3, 3 and 2 batches; whole ones are not asked for again.
    assert len(again.batches) == {0: 8, 1: 8, 2: 8, 3: 5, 4: 5, 5: 5, 6: 2, 7: 2, 8: 8}[batch]


@pytest.mark.parametrize("file_number", range(5))
@pytest.mark.parametrize("moment", ["before the write", "half written", "before the rename", "after the rename"])
def test_killed_while_writing(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, file_number: int, moment: str
) -> None:
    """Files 0 to 2 are the shards, file 3 is the index, file 4 is the manifest."""
    written, rename, sync = [], Path.replace, os.fsync

    def killing_rename(source: Path, target: Path) -> Path:
        if len(written) == file_number:
            if moment == "half written":
                source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
            if moment == "after the rename":
                rename(source, target)
            raise Killed
        written.append(target)
        return rename(source, target)

    def killing_sync(descriptor: int) -> None:
        if len(written) == file_number and moment == "before the write" and is_file(descriptor):
            os.ftruncate(descriptor, 0)
            raise Killed
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", killing_rename)
        patch.setattr(os, "fsync", killing_sync)
        capture_fake(tmp_path / "store", PROMPTS, answers_per_prompt=2)
    assert (tmp_path / "store" / "manifest.json").exists() == (file_number == 4 and moment == "after the rename")
    capture_fake(tmp_path / "store", PROMPTS, answers_per_prompt=2)
    assert files_of(tmp_path / "store") == uninterrupted


def slow_capture(path: Path) -> None:
    teacher = FakeTeacher()
    teacher.before_batch = lambda number: time.sleep(0.01)
    capture_fake(path, PROMPTS, teacher, answers_per_prompt=2)


def test_killed_by_a_signal_again_and_again(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    path, kills = tmp_path / "store", 0
    for milliseconds in (15, 40, 45, 55, 70, 95, 1000, 10_000):
        child = multiprocessing.get_context("fork").Process(target=slow_capture, args=(path,))
        child.start()
        child.join(milliseconds / 1000)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills > 0
    assert files_of(path) == uninterrupted


def test_damaged_shard_of_an_unfinished_capture_is_made_again(
    tmp_path: Path, uninterrupted: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "uninterrupted"
    (path / "manifest.json").unlink()
    damaged = sorted(path.glob("shard-*"))[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    teacher = FakeTeacher()
    capture_fake(path, PROMPTS, teacher, answers_per_prompt=2, progress=True)
    assert files_of(path) == uninterrupted
    assert {prompt_id for batch in teacher.batches for prompt_id, _ in batch} == {"prompt-3", "prompt-4", "prompt-5"}
    assert f"{damaged} is damaged and is captured again" in capsys.readouterr().err


def test_remedy_of_a_corrupt_store_works(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    path = tmp_path / "uninterrupted"
    sorted(path.glob("shard-*"))[0].write_bytes(b"")
    with pytest.raises(StoreCorruptError, match=r"delete manifest\.json and run capture again"):
        capture_fake(path, PROMPTS, answers_per_prompt=2)
    (path / "manifest.json").unlink()
    capture_fake(path, PROMPTS, answers_per_prompt=2)
    assert files_of(path) == uninterrupted


def test_whole_store_is_reused(
    tmp_path: Path, uninterrupted: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = FakeTeacher()
    path = tmp_path / "uninterrupted"
    store = capture_fake(path, PROMPTS[2:4], teacher, progress=True)
    assert len(store) == 16 and teacher.batches == []
    assert files_of(path) == uninterrupted
    assert "reused" in capsys.readouterr().err


def test_prompts_are_appended(tmp_path: Path) -> None:
    capture_fake(tmp_path, PROMPTS[:4])
    before = files_of(tmp_path)
    teacher = FakeTeacher()
    store = capture_fake(tmp_path, PROMPTS, teacher)
    assert store.jobs == [(prompt.prompt_id, 0) for prompt in PROMPTS]
    assert {prompt_id for batch in teacher.batches for prompt_id, _ in batch} == {f"prompt-{n}" for n in range(4, 8)}
    after = files_of(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name.startswith("shard-"))
    assert verify_store(tmp_path) == []


def test_index_left_by_a_killed_append_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new manifest is in place, the old index is not removed yet."""
    capture_fake(tmp_path / "other", PROMPTS)
    capture_fake(tmp_path / "store", PROMPTS[:2])

    def killed(path: Path, name: str) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("tdistill.store.write.remove_other_indices", killed)
        capture_fake(tmp_path / "store", PROMPTS)
    assert len(list((tmp_path / "store").glob("index-*"))) == 2
    assert len(Store.open(tmp_path / "store", verify=True).jobs) == len(PROMPTS)
    capture_fake(tmp_path / "store", PROMPTS)
    assert len(list((tmp_path / "store").glob("index-*"))) == 1
    assert verify_store(tmp_path / "store") == []


def test_killed_append_keeps_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new index is in place, the new manifest is not."""
    store, rename = capture_fake(tmp_path, PROMPTS[:2]), Path.replace

    def killing_rename(source: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise Killed
        return rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", killing_rename)
        capture_fake(tmp_path, PROMPTS)
    assert len(list(tmp_path.glob("index-*"))) == 2
    assert Store.open(tmp_path, verify=True).jobs == store.jobs == [("prompt-0", 0), ("prompt-1", 0)]


def test_answers_are_appended(tmp_path: Path) -> None:
    capture_fake(tmp_path, PROMPTS[:2])
    store = capture_fake(tmp_path, PROMPTS[:2], answers_per_prompt=3)
    assert store.jobs == [(f"prompt-{n}", i) for n, i in [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (1, 2)]]
    assert len({store[row].response_ids.tobytes() for row in (0, 2, 3)}) == 3
    assert verify_store(tmp_path) == []


def test_interrupted_append_leaves_the_old_store_and_is_finished(tmp_path: Path) -> None:
    capture_fake(tmp_path / "store", PROMPTS[:2])
    capture_fake(tmp_path / "other", PROMPTS[:2])
    teacher = FakeTeacher()

    def kill(number: int) -> None:
        if number == 3:
            raise Killed

    teacher.before_batch = kill
    with pytest.raises(Killed):
        capture_fake(tmp_path / "store", PROMPTS, teacher)
    assert len(Store.open(tmp_path / "store")) == 2
    for name in ("store", "other"):
        capture_fake(tmp_path / name, PROMPTS)
    assert files_of(tmp_path / "store") == files_of(tmp_path / "other")


def test_other_identity_names_both_values(tmp_path: Path) -> None:
    capture_fake(tmp_path, PROMPTS[:2])
    before = files_of(tmp_path)
    with pytest.raises(StoreIdentityError) as error:
        capture_fake(
            tmp_path,
            PROMPTS[:2],
            FakeTeacher(dtype="bfloat16", revision="main"),
            settings=replace(SETTINGS, p_max=0.8, max_actions=None),
            template="raw",
        )
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert 'teacher.dtype: stored "float32", asked "bfloat16"' in lines
    assert 'teacher.revision: stored nothing, asked "main"' in lines
    assert "sampling.p_max: stored 0.9, asked 0.8" in lines
    assert "sampling.max_actions: stored 8, asked null" in lines
    assert 'template.kind: stored "chat", asked nothing' in lines
    assert not any("seed" in line or "tokenizer" in line for line in lines)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_same_id_with_other_tokens(tmp_path: Path, finished: bool) -> None:
    capture_fake(tmp_path, PROMPTS[:2])
    if not finished:
        (tmp_path / "manifest.json").unlink()
    changed = replace(PROMPTS[1], prompt_ids=PROMPTS[1].prompt_ids + 1)
    with pytest.raises(StoreIdentityError, match=r"'prompt-1' has other tokens.*digest [0-9a-f]{16}, asked [0-9a-f]"):
        capture_fake(tmp_path, [PROMPTS[0], changed])


def given_answers(count: int) -> list[PromptTokens]:
    ids = [np.array([5 + number, 9, 1], dtype=np.int32)[number % 2 :] for number in range(count)]
    return [
        replace(prompt, response_ids=answer, ends="terminal")
        for prompt, answer in zip(make_prompts(count), ids, strict=True)
    ]


def test_given_answers_are_scored(tmp_path: Path) -> None:
    prompts = given_answers(5)
    store = capture_fake(tmp_path, prompts, mode="score")
    assert [t.response_ids.tolist() for t in store] == [prompt.response_ids.tolist() for prompt in prompts]
    assert {t.source for t in store} == {"given"}
    assert verify_store(tmp_path) == []
    changed = [replace(prompts[0], response_ids=np.array([9, 9, 1], dtype=np.int32)), *prompts[1:]]
    with pytest.raises(StoreIdentityError, match="'prompt-0'"):
        capture_fake(tmp_path, changed, mode="score")


class OnlyScores(FakeTeacher):
    capabilities = frozenset({"score"})


class Muddled(FakeTeacher):
    def generate(self, requests, settings):
        return super().generate(requests, settings)[::-1]


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(EmptyPromptSetError):
        capture_fake(tmp_path, [])
    with pytest.raises(DataFileError, match="'prompt-0' occurs twice"):
        capture_fake(tmp_path, [PROMPTS[0], PROMPTS[0]])
    with pytest.raises(DataFileError, match="'prompt-0' has no answer to score"):
        capture_fake(tmp_path, PROMPTS, mode="score")
    with pytest.raises(ConfigError, match="answers_per_prompt = 2"):
        capture_fake(tmp_path, given_answers(1), mode="score", answers_per_prompt=2)
    with pytest.raises(ConfigError, match="can only score"):
        capture_fake(tmp_path, PROMPTS, OnlyScores())
    with pytest.raises(ConfigError, match="batch_size = 0"):
        capture_fake(tmp_path, PROMPTS, batch_size=0)
    with pytest.raises(ConfigError, match="log_prob_bits = 12"):
        capture_fake(tmp_path, PROMPTS, log_prob_bits=12)
    with pytest.raises(ProbabilityRangeError, match=r"p_max = 1\.5"):
        capture_fake(tmp_path, PROMPTS, settings=replace(SETTINGS, p_max=1.5))
    with pytest.raises(StoreError, match="asked for the answers"):
        capture_fake(tmp_path, PROMPTS, Muddled())


Usage = namedtuple("Usage", "total used free")


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000_000, 10_000_000 - num_bytes, num_bytes))


def test_no_room_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 200)
    teacher = FakeTeacher()
    # 8 answers of one token, of 10 + 8 actions · 3 bytes.
    with pytest.raises(NoSpaceError, match=rf"about {8 * 34} bytes \(a guess.*200 bytes are free"):
        capture_fake(tmp_path, PROMPTS, teacher)
    assert teacher.batches == [] and list(tmp_path.iterdir()) == []


def test_answers_that_may_be_too_long_for_the_disk_are_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted, at_most = tmp_path / "uninterrupted", replace(SETTINGS, max_new_tokens=5_000)
    capture_fake(uninterrupted, PROMPTS)
    short = FakeTeacher()
    monkeypatch.setattr(short, "_answer", lambda prompt, index, _: FakeTeacher()._answer(prompt, index, SETTINGS))
    free(monkeypatch, sum(map(len, files_of(uninterrupted).values())))
    # 4 bytes for each of the prompts' tokens, and at most 40,000 response tokens.
    needed = 4 * sum(len(prompt.prompt_ids) for prompt in PROMPTS) + 40_000 * 34
    assert len(capture_fake(tmp_path / "store", PROMPTS, short, settings=at_most, progress=True)) == len(PROMPTS)
    said = capsys.readouterr().err
    assert f"up to {needed:,} are needed (a guess before the first batch)" in said and "max_new_tokens = 5000" in said


def test_no_room_for_answers_like_those_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_fake(tmp_path / "whole", PROMPTS)
    first = Store.open(tmp_path / "whole").shards[0]
    needed = int(5 * first["bytes"] / 3)
    free(monkeypatch, needed - 1)
    teacher = FakeTeacher()
    with pytest.raises(NoSpaceError, match=rf"about {needed:,} bytes \(5 answers of the mean size of 3\)"):
        capture_fake(tmp_path / "store", PROMPTS, teacher)
    # What was written is kept, and goes on where there is room.
    assert [file.name for file in (tmp_path / "store").iterdir()] == [first["file"]]
    free(monkeypatch, needed + 1)
    capture_fake(tmp_path / "store", PROMPTS)
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


def test_no_room_for_given_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [replace(prompt, response_ids=np.full(5, 7, np.int32), ends="truncated") for prompt in PROMPTS]
    tokens, teacher = sum(len(prompt.prompt_ids) for prompt in PROMPTS), FakeTeacher()
    free(monkeypatch, 1_000)
    with pytest.raises(NoSpaceError, match=rf"about {4 * tokens + 40 * 34:,} bytes \(a guess.*1,000 bytes are free"):
        capture_fake(tmp_path, given, teacher, mode="score")
    assert teacher.batches == [] and list(tmp_path.iterdir()) == []
    free(monkeypatch, 3_000)
    with pytest.raises(NoSpaceError, match=r"measured on the first batch\) and 3,000 bytes are free"):
        capture_fake(tmp_path, given, teacher, mode="score")
    assert len(teacher.batches) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_number", range(5))
def test_disk_fills_while_writing(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, file_number: int
) -> None:
    synced, sync = [], os.fsync

    def full(descriptor: int) -> None:
        if is_file(descriptor):
            if len(synced) == file_number:
                raise OSError(errno.ENOSPC, "No space left on device")
            synced.append(descriptor)
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(NoSpaceError, match=r"the disk is full.*run capture again"):
        patch.setattr(os, "fsync", full)
        capture_fake(tmp_path / "store", PROMPTS, answers_per_prompt=2)
    left = files_of(tmp_path / "store")
    assert len(left) == file_number and all(uninterrupted[name] == data for name, data in left.items())
    capture_fake(tmp_path / "store", PROMPTS, answers_per_prompt=2)
    assert files_of(tmp_path / "store") == uninterrupted


def test_other_write_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        capture_fake(tmp_path, PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_expected_work_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture_fake(tmp_path, PROMPTS, answers_per_prompt=2, progress=True)
    report = capsys.readouterr().err
    tokens = 2 * sum(len(prompt.prompt_ids) for prompt in PROMPTS)
    assert f"16 answers to 8 prompts: {tokens} prompt tokens, at most 80 response tokens" in report
    assert "a guess from 8 actions per position" in report
    # The first batch is two answers of at most 5 tokens.
    assert re.search(r"measured on the first batch: [\d,]+ bytes and [\d.]+ ms per response token", report)
    assert re.search(r"left are at most 70 response tokens, that is about [\d.]+k?B and 00:0\d\n", report)
    assert "tok/s" in report


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "download.tmp", "shard-old.parquet"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "manifest.json.tmp").write_text("left by a kill")
    capture_fake(tmp_path, PROMPTS)
    assert {"notes.txt", "download.tmp", "shard-old.parquet"} <= set(files_of(tmp_path))
    assert not (tmp_path / "manifest.json.tmp").exists()


def test_copy_of_a_shard_is_refused(tmp_path: Path) -> None:
    capture_fake(tmp_path, PROMPTS[:2])
    (file,) = tmp_path.glob("shard-*")
    shutil.copy(file, tmp_path / file.name.replace("shard-00000", "shard-00001"))
    with pytest.raises(StoreCorruptError, match=r"shard-00001.*repeats answer 0 to prompt 'prompt-0'"):
        capture_fake(tmp_path, PROMPTS)
