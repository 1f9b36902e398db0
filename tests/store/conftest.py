from pathlib import Path

import pytest
from store_fakes import capture_fake, make_prompts


@pytest.fixture
def small_store(tmp_path: Path) -> Path:
    """A store of two shards, one row each."""
    capture_fake(tmp_path / "store", make_prompts(2), shard_prompts=1)
    return tmp_path / "store"
