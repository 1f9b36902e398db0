"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tdistill.files import publish, write_atomically


def test_threads_that_write_one_file_do_not_take_each_others_parts(tmp_path: Path):
    """The judge's replies to equal requests come back at the same time."""
    start, failures = threading.Barrier(4), []

    def write(text: str) -> None:
        start.wait()
        try:
            for _ in range(100):
                write_atomically(tmp_path / "reply.json", text)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == ["reply.json"]
    assert len(set((tmp_path / "reply.json").read_text())) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs names of open files")
def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, events, sync, rename = tmp_path / "a.json", [], os.fsync, Path.replace
    path.write_text("old")

    def noting_sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        assert (events[-1] == tmp_path) == (path.read_text() == "new")
        sync(descriptor)

    def noting_rename(source: Path, target: Path) -> Path:
        assert events == [source] and source.read_text() == "new"
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Path, "replace", noting_rename)
    write_atomically(path, "new")
    assert events[1:] == [tmp_path]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs names of open files")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    partial, folder, events, rename = tmp_path / ".a.partial", tmp_path / "deep" / "a", [], Path.rename
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "weights").write_text("1")
    inside = {partial, partial / "sub", partial / "sub" / "weights"}
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(Path(f"/proc/self/fd/{descriptor}").resolve()))

    def noting_rename(source: Path, target: Path) -> Path:
        assert set(events) == inside
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", noting_rename)
    publish(partial, folder)
    assert events[len(inside) :] == [folder.parent] and (folder / "sub" / "weights").read_text() == "1"
    assert not partial.exists()


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_atomically(tmp_path / "a.json", "old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
