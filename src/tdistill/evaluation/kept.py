"""What an evaluation has measured so far, on disk, so that an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdistill.files import write_atomically

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """Measurements by what they depend on, a JSON file each.

    Attributes:
        folder: where the files are, made with the first of them; None keeps nothing.
        weights_sha256: subject → hash of its weights. Of a subject without one nothing is kept.
    """

    folder: Path | None = None
    weights_sha256: Mapping[str, str] = field(default_factory=dict)

    def get(self, what: str, subject: str, facts: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The kept measurement of these facts, or a new one, which is kept.

        Args:
            what: name of the measurement.
            subject: name of the model.
            facts: all that the measurement depends on beside the model, JSON-able.
            measure: returns a JSON value.
        """
        if self.folder is None or subject not in self.weights_sha256:
            return measure()
        key = json.dumps([what, self.weights_sha256[subject], facts], sort_keys=True)
        path = self.folder / f"{what}-{subject}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # no JSON, no UTF-8
                _log.warning("%s is damaged and is measured again.", path)
        value = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value))
        return value
