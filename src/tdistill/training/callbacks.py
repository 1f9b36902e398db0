"""What a phase writes while it is trained: its log lines, and how long it took, its resumes together."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tdistill.files import write_atomically


class MetricsFile(TrainerCallback):
    """Appends each log line to a file; after a resume the file first goes back to what the checkpoint knows."""

    def __init__(self, phase: str, path: Path) -> None:
        self.phase, self.path = phase, path

    def begin(self, state: TrainerState) -> None:
        """Start the file with what was logged before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(map(self._line, state.log_history)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file."""
        self.begin(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append a line."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(state.log_history[-1]))

    def _line(self, entry: dict[str, Any]) -> str:
        # The line at the end sums up what this process trained, which after a resume is not the phase.
        if "train_runtime" in entry:
            return ""
        entry = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        return json.dumps({"phase": self.phase, **entry}, allow_nan=False) + "\n"


class Clock(TrainerCallback):
    """Seconds that a phase took, its resumes together: each checkpoint says what came before it."""

    FILE = "seconds.json"

    def __init__(self, checkpoint: Path | None) -> None:
        self.started, self.before = time.perf_counter(), 0.0
        if checkpoint is not None and (path := checkpoint / self.FILE).is_file():
            self.before = float(json.loads(path.read_text()))

    def seconds(self) -> float:
        """Seconds until now."""
        return self.before + time.perf_counter() - self.started

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the seconds beside the checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_atomically(folder / self.FILE, json.dumps(self.seconds()) + "\n")
