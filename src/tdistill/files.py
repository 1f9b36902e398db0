"""Files written whole or not at all, and named by their content."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path


def write_atomically(path: Path, text: str) -> Path:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part; return the path."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        # Generated text may hold lone surrogates, which UTF-8 cannot express.
        partial.write_bytes(text.encode("utf-8", "replace"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
