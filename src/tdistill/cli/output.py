"""Files that a verb is asked to write."""

from __future__ import annotations

from pathlib import Path

from tdistill.errors import ConfigError


def require_folder(option: str, path: Path) -> None:
    """Refuse, before any work, a file whose folder does not exist.

    Raises:
        ConfigError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}. Make it, or name another file.")
