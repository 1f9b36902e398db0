from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import make_results, write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", make_results())
