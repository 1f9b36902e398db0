"""Files written whole or not at all, and named by their content."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, partial: Path | None = None) -> Path:
    """Write a file so that a reader, and a machine that lost its power, has the old one or the new one, never a part.

    Args:
        path: of the file.
        content: text becomes UTF-8.
        partial: where it is written before it is renamed; None: a hidden file of this thread's own.
    Returns:
        The path.
    """
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    # Generated text may hold lone surrogates, which UTF-8 cannot express.
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (Exception, KeyboardInterrupt):
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, its content on the disk before it: what is there is whole, power lost or not."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; where a folder cannot be opened, renames are so by themselves."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
