"""Files that are written whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

from tdistill.files import write_atomically


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
