"""A capture whose process is killed, not merely stopped, and started again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli.harness import changed, contents, recipe_tree, write_recipe

from tdistill.store import Store, verify_store

KILLS = 5


def start(recipe: Path, output: Path) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "tdistill", "capture", recipe, f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def shards(output: Path) -> list[Path]:
    return sorted(output.glob("store/*/shard-*.parquet"))


@pytest.mark.slow
def test_a_capture_killed_five_times_gives_the_bytes_of_one_that_was_not(
    tmp_path: Path, tiny_teacher_folder: Path, tiny_prompt_files: dict[str, Path]
):
    tree = recipe_tree(tiny_teacher_folder, tiny_prompt_files, tmp_path / "unused")
    # Small batches and shards, and many answers: several seconds, in which there is always something half done.
    capture = {"answers_per_prompt": 24, "batch_size": 4, "shard_prompts": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(tree, capture=capture))
    whole = start(recipe, tmp_path / "whole")
    printed, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, printed
    total = len(shards(tmp_path / "whole"))
    assert total == 30 + 6 + 6

    chance = random.Random(7)
    output = tmp_path / "killed"
    # Moments after a number of shards that grows from kill to kill, and then at any place in the next ones.
    targets = sorted(chance.sample(range(total - 2), KILLS))
    caught_in_the_middle = 0
    for target in targets:
        process = start(recipe, output)
        deadline = time.monotonic() + 120
        while len(shards(output)) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0), printed
        caught_in_the_middle += not (output / "start").exists()
        # What carries the name of a shard is a whole shard, at every moment.
        reference = contents(tmp_path / "whole", "store/*/shard-*")
        assert contents(output, "store/*/shard-*").items() <= reference.items()
    assert caught_in_the_middle >= KILLS - 1

    last = start(recipe, output)
    printed, _ = last.communicate(timeout=300)
    assert last.returncode == 0, printed
    for split in ("train", "dev", "held_out"):
        assert contents(output, f"store/{split}/*") == contents(tmp_path / "whole", f"store/{split}/*")
        assert verify_store(output / "store" / split) == []
    assert len(Store.open(output / "store" / "train")) == 60 * 24
    assert contents(output, "start/*") == contents(tmp_path / "whole", "start/*")
