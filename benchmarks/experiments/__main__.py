"""Train and measure what the experiments ask for, one unit (a method, a seed) after another.

    python benchmarks/experiments e1 e5       # these; without names all of them
    python benchmarks/experiments e8 --only "cost 1$" # of these, the rows whose name matches
    python benchmarks/experiments --estimate  # only say how long it would take
    python benchmarks/experiments --times     # only measure what a step and a captured token cost
    python benchmarks/experiments tests       # the test sets, once per frozen recipe; never without this name
    python benchmarks/experiments exposure    # exposure bias of the same students; never without this name
    python benchmarks/experiments decoding    # the same students at smaller top-p; never without this name
    python benchmarks/experiments perplexity  # what they have lost of plain text; never without this name
    python benchmarks/experiments accuracy    # right answers to GSM8K, with lm-eval; never without this name

Reads the data from TDISTILL_DATA, keeps what it makes in runs/experiments, and goes on from the JSON already there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "objectives"))
import accuracy
import decoding
import finals
import perplexity
import prefixes
from claims import FINE_TUNED, Claims, claims, references_of
from plan import (
    BASE,
    BUDGET,
    EXPERIMENTS,
    GSM8K,
    METHODS,
    NUM_SEEDS,
    RESULTS,
    SCREENING_SEEDS,
    START_OF_TESTS,
    STEPS,
    TIMED,
    Method,
    frozen,
    missing,
    read,
    times,
)
from scores import screening
from setups import Setup
from training import StepTimes, train

from tdistill.evaluation.speed import decode_speed, num_parameters, weights_bytes
from tdistill.files import write_atomically
from tdistill.run_folder import environment
from tdistill.store.capture import capture as capture_store
from tdistill.teachers.loading import load_causal_lm
from tdistill.types import PromptTokens

# Tokens per second on two cores, for the estimate of units that were never run: training on answers without and with a
# teacher in memory (prompts not counted), and generation.
TRAINED_PER_S, TRAINED_LIVE_PER_S, GENERATED_PER_S = 250.0, 180.0, 160.0
TIMED_ROUNDS = 3
# More about the students that meet the test sets, and about the models of E9; and the setup of each.
STUDIES = {"exposure": (prefixes, BASE), "decoding": (decoding, BASE), "perplexity": (perplexity, BASE),
           "accuracy": (accuracy, GSM8K)}  # fmt: skip
# Without these, glibc gives each large tensor back to the system and asks for it again, page by page. The methods that
# allocate most would then cost more than they do where memory is kept, as on any GPU.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


class Experiments:
    """Setups of one work folder, made when they are first asked for."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work
        self.setups: dict[str, Setup] = {}

    def setup(self, what: Claims) -> Setup:
        """The setup."""
        if what.name not in self.setups:
            fine_tuned = self.healed(FINE_TUNED) if what.fine_tuned else None
            self.setups[what.name] = claims(self.data, self.work, what, fine_tuned)
        return self.setups[what.name]

    def healed(self, what: Claims) -> Path:
        """Folder of the student that all methods of a setup go on from."""
        setup = self.setup(what)
        return setup.after_first_phase(0, lambda model, args, seed: train(setup, model, args, seed)[0].model)

    def train(self, what: Claims, method: Method, seed: int, **args: Any) -> tuple[Any, StepTimes]:
        """Train one unit; return the trainer and the times of its steps."""
        setup = self.setup(what)
        model = load_causal_lm(self.healed(what), dtype="float32")
        store = self.setup(references_of(what)).stores["train"] if method.references else None
        # The start was healed on the teacher's answers in the order of seed 0; no method sees them in that order again.
        order = {"data_seed": NUM_SEEDS} if seed == 0 and store is None else {}
        args = {**setup.second_phase, **order, **method.args, **args}
        return train(setup, model, args, seed, method.rollouts, store, method.text)

    def run(self, what: Claims, name: str, method: Method, seed: int) -> dict[str, Any]:
        """Train one unit and measure it."""
        started, setup = time.perf_counter(), self.setup(what)
        trainer, measured_times = self.train(what, method, seed)
        if what == BASE and name in frozen():
            self.keep(trainer.model, self.student_folder(what, name, method, seed))
        curve = [entry for entry in trainer.state.log_history if "eval_kl_set_tail" in entry]
        dev = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
        model = trainer.model.eval()
        return {
            "setup": what.name,
            "method": name,
            "seed": seed,
            "data_seed": trainer.args.data_seed,
            "steps": trainer.state.global_step,
            "response_tokens": trainer.state.num_input_tokens_seen,
            "step_s": measured_times.mean_s,
            "dev_curve": [[entry["step"], entry["eval_kl_set_tail"], entry["eval_nll"]] for entry in curve],
            "dev": {key: value for key, value in dev.items() if key != "runtime"},
            "screening": screening(setup, model, SCREENING_SEEDS),
            "seconds": time.perf_counter() - started,
        }

    def load(self, what: Claims, name: str, method: Method | None, seed: int, dtype: str) -> Any:
        """The teacher, the healed start or a student of a setup, which is trained once and kept."""
        if name == "teacher":
            return copy.deepcopy(self.setup(what).teacher.model).to(getattr(torch, dtype))
        folder = self.healed(what)
        if method is not None:
            folder = self.student_folder(what, name, method, seed)
            if not folder.is_dir():
                self.keep(self.train(what, method, seed)[0].model, folder)
        return load_causal_lm(folder, dtype=dtype)

    def student_folder(self, what: Claims, name: str, method: Method, seed: int) -> Path:
        """Folder of a student that meets the test sets; another recipe of the same name has another."""
        parts = [name.replace(" ", "-").replace(",", ""), finals.recipe_digest(method), str(seed)]
        return self.work / "claims" / what.name / "students" / "-".join(parts)

    def keep(self, model: Any, folder: Path) -> None:
        """Write a student, whole or not at all."""
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            model.save_pretrained(partial)
            partial.rename(folder)

    def step_s(self, what: Claims, method: Method) -> float:
        """Seconds per step, nothing else running: the median of seven, or the mean over one round of own answers."""
        steps = 7 if method.rollouts is None else self.setup(what).rollouts["every"]
        _, measured_times = self.train(what, method, 0, max_steps=steps, eval_strategy="no")
        return measured_times.median_s if method.rollouts is None else measured_times.mean_s

    def untrained(self, what: Claims, name: str) -> dict[str, Any]:
        """The healed start, also as it answers in the test sets' dtype, or the teacher, measured like a unit."""
        started, setup = time.perf_counter(), self.setup(what)
        dtype = finals.DTYPE if name == START_OF_TESTS else "float32"
        model = setup.teacher.model if name == "teacher" else load_causal_lm(self.healed(what), dtype=dtype)
        return {"setup": what.name, "method": name, "seed": 0, "screening": screening(setup, model, SCREENING_SEEDS),
                "seconds": time.perf_counter() - started}  # fmt: skip


def estimate_s(name: str, only: str = "") -> float:
    """Seconds that the missing units of an experiment take: as long as their like, or by the rates above."""
    known: dict[str, list[float]] = {}
    for row in read(name)["rows"]:
        known.setdefault(row["method"], []).append(row["seconds"])
    total = 0.0
    for _, key, method, _ in missing(name, only):
        measuring = 200 * len(SCREENING_SEEDS) * 50 / GENERATED_PER_S
        if key in known:
            total += float(np.median(known[key]))
        elif method is None:
            total += measuring
        else:
            num_steps = method.args.get("max_steps", STEPS)
            live = method.args["objective"].get("source") == "teacher"
            own = 0 if method.rollouts is None else num_steps / 10 * 32 * 50
            trained_per_s = TRAINED_LIVE_PER_S if live else TRAINED_PER_S
            total += num_steps * 512 / trained_per_s + own / GENERATED_PER_S + measuring
    return total


def write(name: str, setup: Setup, rows: list[dict[str, Any]]) -> None:
    """Write the JSON, a line per row."""
    head = {"experiment": name, "facts": setup.facts, "first_phase": setup.first_phase,
            "second_phase": setup.second_phase, "rollouts": setup.rollouts, "screening_seeds": SCREENING_SEEDS,
            "environment": environment(), "threads": torch.get_num_threads()}  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"{name}.json", json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]}\n")


def asking(teacher: Any, setup: Setup) -> dict[str, Any]:
    """What the teacher's answers to two batches of training prompts cost, or its scores of given answers."""
    store, capture_args = setup.stores["train"], setup.recipe.capture
    identity = store.manifest["identity"]
    rows = [store[i] for i, (_, answer_index) in enumerate(store.jobs) if answer_index == 0]
    given = capture_args.mode == "score"
    prompts = [
        PromptTokens(row.prompt_id, row.prompt_ids, row.response_ids if given else None, row.ends)
        for row in rows[: 2 * capture_args.batch_size]
    ]
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        asked = capture_store(
            teacher,
            prompts,
            scratch,
            capture_args.sampling(),
            mode=capture_args.mode,
            batch_size=capture_args.batch_size,
            log_prob_bits=capture_args.log_prob_bits,
            tokenizer_sha256=identity["tokenizer_sha256"],
            template=identity["template"],
        )
        seconds = time.perf_counter() - started
    return {"response_tokens": asked.total_response_tokens, "seconds": seconds,
            "all_response_tokens": store.total_response_tokens}  # fmt: skip


def measure_times(experiments: Experiments) -> None:
    """Write what a step of each method costs, and a captured token, with nothing else running.

    What was measured before stays. The steps of a method that came later are measured in turns with those of the
    method whose steps are the budget, and counted by their ratio, so that another machine does not count as another
    method.
    """
    found = times()
    if "models" not in found:
        found = {"environment": environment(), "threads": torch.get_num_threads(), "allocator": ALLOCATOR,
                 **sizes_and_asking(experiments), "step_s": {}, "rounds_s": {}}  # fmt: skip
    new = [name for name in TIMED if len(found["rounds_s"].get(name, [])) < TIMED_ROUNDS]
    before = None if BUDGET in new else found["step_s"][BUDGET]
    # One method after another, and that again: a machine that slows down meanwhile slows down all of them.
    for i in range(TIMED_ROUNDS if new else 0):
        scale = 1.0 if before is None else before / experiments.step_s(BASE, METHODS[BUDGET])
        for name in new:
            rounds = found["rounds_s"].setdefault(name, [])
            if len(rounds) <= i:
                rounds.append(scale * experiments.step_s(BASE, METHODS[name]))
                print(f"{name}: {rounds[-1]:.2f} s a step", flush=True)
        found["step_s"] = {name: float(np.median(rounds)) for name, rounds in found["rounds_s"].items()}
        write_atomically(RESULTS / "times.json", json.dumps(found, indent=1) + "\n")


def sizes_and_asking(experiments: Experiments) -> dict[str, Any]:
    """Size and speed of teacher and student, and what asking the teacher costs."""
    setup = experiments.setup(BASE)
    prompts = [prompt.prompt_ids for prompt in setup.prompts("held_out")[:3]]
    models = {"teacher": setup.teacher.model, "student": load_causal_lm(experiments.healed(BASE), dtype="float32")}
    sizes = {
        name: {
            "num_parameters": num_parameters(model),
            "weights_bytes": weights_bytes(model),
            "decode_tokens_per_s": decode_speed(model, prompts).value,
        }
        for name, model in models.items()
    }
    return {"models": sizes, "captured": asking(setup.teacher, setup),
            "scored": asking(setup.teacher, experiments.setup(references_of(BASE)))}  # fmt: skip


def main() -> None:
    """Run what is missing and write the JSON after each unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--data", type=Path, default=os.environ.get("TDISTILL_DATA"), help="default: TDISTILL_DATA")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--only", default="", help="rows whose name has a match of this regular expression")
    parser.add_argument("--times", action="store_true", help="only measure seconds per step, nothing else running")
    parser.add_argument("--estimate", action="store_true", help="only print how long it would take")
    options = parser.parse_args()
    names = options.names or list(EXPERIMENTS)
    there = [*EXPERIMENTS, "tests", *STUDIES]
    if unknown := set(names) - set(there):
        parser.error(f"unknown experiments: {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    looks = len(finals.missing()) if "tests" in names else 0
    studies = [name for name in STUDIES if name in names]
    names = [name for name in names if name in EXPERIMENTS]
    for name in names:
        print(
            f"{name}: {len(missing(name, options.only))} units left, about "
            f"{estimate_s(name, options.only) / 3600:.1f} h at the pace of the rows that are there",
            flush=True,
        )
    if looks:
        print(f"tests: {looks} looks left, a minute each and three for each student to train", flush=True)
    for name in studies:
        print(f"{name}: {len(STUDIES[name][0].missing())} rows left, a minute or three each", flush=True)
    if options.estimate:
        return
    if options.data is None:
        parser.error("give --data or set TDISTILL_DATA to the folder with train/, eval/ and models/")
    experiments = Experiments(Path(options.data), options.work)
    if options.times:
        measure_times(experiments)
        return
    if looks:
        finals.run(experiments.setup(BASE), experiments.data, partial(experiments.load, BASE))
    for study, what in (STUDIES[name] for name in studies):
        study.run(experiments.setup(what), partial(experiments.load, what))
    for name in names:
        for what, key, method, seed in missing(name, options.only):
            row = experiments.untrained(what, key) if method is None else experiments.run(what, key, method, seed)
            write(name, experiments.setup(what), [*read(name)["rows"], row])
            kl = sum(row["screening"]["kl_sum"]) / sum(row["screening"]["num_tokens"])
            rouge = np.mean(row["screening"]["rouge_l"])
            print(f"{name}: {what.name}, {key}, seed {seed}: KL {kl:.4f}, Rouge-L {rouge:.4f}, {row['seconds']:.0f} s",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():  # read when the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    main()
