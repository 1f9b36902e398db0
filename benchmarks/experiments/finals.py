"""The three test sets. Each frozen recipe is looked at once, and every look is in the JSON.

    python benchmarks/experiments tests

Nothing is chosen here. What is frozen stands in ``plan.FROZEN``; a row whose recipe has changed since it was looked at
is an error.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plan import BASE, NUM_SEEDS, RESULTS, Method, frozen
from scores import of_answers
from setups import Setup

from tdistill.files import write_atomically
from tdistill.prompts.read import read_records
from tdistill.prompts.templates import choose_template
from tdistill.prompts.tokenise import tokenize_prompts

TEST_SETS = {name: f"eval/{name}_eval.jsonl" for name in ("dolly", "selfinst", "vicuna")}
SAMPLING_SEEDS = (10, 20, 30, 40, 50)
PATH = RESULTS / "tests.json"
# Sampling in bfloat16 takes half the time of float32 on a CPU that has it; "start, bfloat16" in the main table is the
# same model and prompts, so its difference to "start" is what this changes.
DTYPE = "bfloat16"
# Loads a model by the name of its row, its method (None: start or teacher) and its training seed, in a dtype.
Load = Callable[[str, Method | None, int, str], Any]


def looks() -> Iterator[tuple[str, Method | None, int, str, int]]:
    """Row, its method, training seed, test set and sampling seed; a training is done with before the next begins."""
    methods = frozen()
    rows: list[tuple[str, Method | None, int]] = []
    for seed in range(NUM_SEEDS):
        rows += [(name, method, seed) for name, method in methods.items() if seed < method.num_seeds]
        if seed == 0 and methods:
            rows += [("start", None, 0), ("teacher", None, 0)]
    for name, method, seed in rows:
        for sampling_seed in SAMPLING_SEEDS:
            for test_set in TEST_SETS:
                yield name, method, seed, test_set, sampling_seed


def missing() -> list[tuple[str, Method | None, int, str, int]]:
    """Looks that were not taken."""
    taken = {(row["method"], row["seed"], row["set"], row["sampling_seed"]): row["recipe"] for row in _rows()}
    found = []
    for look in looks():
        name, method, seed, test_set, sampling_seed = look
        recipe = taken.get((name, seed, test_set, sampling_seed))
        if recipe is None:
            found.append(look)
        elif recipe != recipe_digest(method):
            raise SystemExit(
                f"{name}, seed {seed} was looked at on {test_set} with another recipe. A frozen recipe does not "
                "change; give the new one a name of its own."
            )
    return found


def run(setup: Setup, data: Path, load: Load) -> None:
    """Take the looks that are missing and write each one down."""
    prompts: dict[str, Any] = {}
    model, loaded = None, None
    for name, method, seed, test_set, sampling_seed in missing():
        if test_set not in prompts:
            prompts[test_set] = _read(setup, data / TEST_SETS[test_set])
        if loaded != (name, seed):
            model, loaded = load(name, method, seed, DTYPE), (name, seed)
        started = time.perf_counter()
        found = of_answers(setup, model, *prompts[test_set], {}, (sampling_seed,))
        row = {"method": name, "seed": seed, "set": test_set, "sampling_seed": sampling_seed,
               "recipe": recipe_digest(method), "looked_at": datetime.now(UTC).isoformat(timespec="seconds"),
               "seconds": time.perf_counter() - started,
               **{metric: of_seed[0] for metric, of_seed in found.items()}}  # fmt: skip
        lines = ",\n".join(json.dumps(line) for line in [*_rows(), row])
        head = f'{{"setup": {json.dumps(BASE.name)}, "dtype": {json.dumps(DTYPE)},\n "rows": [\n'
        write_atomically(PATH, head + lines + "\n]}\n")
        print(f"tests: {name}, seed {seed}, {test_set}, sampling seed {sampling_seed}", flush=True)


def _rows() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text())["rows"] if PATH.is_file() else []


def recipe_digest(method: Method | None) -> str:
    """Short digest of a recipe: its setup and what its method changes, without what all methods share."""
    what = [asdict(BASE), None if method is None else [method.args, method.rollouts, method.references]]
    if method is not None and method.text:
        what.append("plain text")
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _read(setup: Setup, path: Path) -> tuple[Any, dict[str, tuple[str, ...]]]:
    records, recipe, tokenizer = read_records(str(path), "train"), setup.recipe, setup.teacher.tokenizer
    prompts = tokenize_prompts(
        records,
        tokenizer,
        choose_template(tokenizer, recipe.data.template),
        end_token_ids=setup.teacher.end_token_ids,
        max_prompt_tokens=1024,
        max_new_tokens=recipe.capture.max_new_tokens,
    )
    return prompts, {record.prompt_id: record.references for record in records}
