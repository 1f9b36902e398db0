"""Train and measure what the experiments ask for, one unit (a method, a seed) after another.

    python benchmarks/experiments e1 e5       # these; without names all of them
    python benchmarks/experiments --estimate  # only say how long it would take

Reads the data from TDISTILL_DATA, keeps what it makes in runs/experiments, and goes on from the JSON already there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "objectives"))
from claims import Claims, claims, references_of
from plan import EXPERIMENTS, SCREENING_SEEDS, Method
from scores import screening
from setups import Setup
from training import train

from tdistill.pipeline import environment
from tdistill.reports.write import write_atomically
from tdistill.teachers.loading import load_causal_lm

RESULTS = Path(__file__).parent.parent / "results" / "experiments"
# Tokens per second on two cores, for the estimate of units that were never run: training on answers without and with a
# teacher in memory (prompts not counted), and generation.
TRAINED_PER_S, TRAINED_LIVE_PER_S, GENERATED_PER_S = 150.0, 80.0, 120.0


class Experiments:
    """Setups of one work folder, made when they are first asked for."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work
        self.setups: dict[str, Setup] = {}

    def setup(self, what: Claims, references: bool = False) -> Setup:
        """The setup, or the one with the references for answers."""
        key = what.name + ("-references" if references else "")
        if key not in self.setups:
            self.setups[key] = (references_of if references else claims)(self.data, self.work, what)
        return self.setups[key]

    def healed(self, what: Claims) -> Path:
        """Folder of the student that all methods of a setup go on from."""
        setup = self.setup(what)
        return setup.after_first_phase(0, lambda model, args, seed: train(setup, model, args, seed)[0].model)

    def run(self, what: Claims, name: str, method: Method, seed: int) -> dict[str, Any]:
        """Train one unit and measure it."""
        started, setup = time.perf_counter(), self.setup(what)
        model = load_causal_lm(self.healed(what), dtype="float32")
        args = {**setup.second_phase, **method.args}
        store = self.setup(what, references=True).stores["train"] if method.references else None
        trainer, times = train(setup, model, args, seed, method.rollouts, store)
        curve = [entry for entry in trainer.state.log_history if "eval_kl_set_tail" in entry]
        dev = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
        model.eval()
        return {
            "setup": what.name,
            "method": name,
            "seed": seed,
            "steps": trainer.state.global_step,
            "response_tokens": trainer.state.num_input_tokens_seen,
            "step_s": times.mean_s,
            "dev_curve": [[entry["step"], entry["eval_kl_set_tail"], entry["eval_nll"]] for entry in curve],
            "dev": {key: value for key, value in dev.items() if key != "runtime"},
            "screening": screening(setup, model, SCREENING_SEEDS),
            "seconds": time.perf_counter() - started,
        }

    def step_s(self, what: Claims, method: Method) -> float:
        """Seconds per step with nothing else running: the median of six, or the mean over one round of own answers."""
        setup = self.setup(what)
        model = load_causal_lm(self.healed(what), dtype="float32")
        steps = 7 if method.rollouts is None else setup.rollouts["every"]  # the first of the seven warms up
        args = {**setup.second_phase, **method.args, "max_steps": steps, "eval_strategy": "no"}
        store = self.setup(what, references=True).stores["train"] if method.references else None
        _, times = train(setup, model, args, 0, method.rollouts, store)
        return times.median_s if method.rollouts is None else times.mean_s

    def before(self, what: Claims) -> dict[str, Any]:
        """The healed start, measured like a unit."""
        started = time.perf_counter()
        model = load_causal_lm(self.healed(what), dtype="float32").eval()
        measured = screening(self.setup(what), model, SCREENING_SEEDS)
        return {"setup": what.name, "method": "start", "seed": 0, "screening": measured,
                "seconds": time.perf_counter() - started}  # fmt: skip


def units(name: str) -> Iterator[tuple[Claims, str, Method | None, int]]:
    """Units of an experiment, one seed of every method before the next seed; a method of None is the start."""
    experiment = EXPERIMENTS[name]
    for what in experiment.setups:
        yield what, "start", None, 0
    for seed in range(max(method.num_seeds for method in experiment.methods.values())):
        for what in experiment.setups:
            for key, method in experiment.methods.items():
                if seed < method.num_seeds:
                    yield what, key, method, seed


def read(name: str) -> dict[str, Any]:
    """Content of an experiment's JSON."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def missing(name: str) -> list[tuple[Claims, str, Method | None, int]]:
    """Units without a row."""
    done = {(row["setup"], row["method"], row["seed"]) for row in read(name)["rows"]}
    return [unit for unit in units(name) if (unit[0].name, unit[1], unit[3]) not in done]


def estimate_s(name: str) -> float:
    """Seconds that the missing units of an experiment take: as long as their like, or by the rates above."""
    known: dict[str, list[float]] = {}
    for row in read(name)["rows"]:
        known.setdefault(row["method"], []).append(row["seconds"])
    total = 0.0
    for _, key, method, _ in missing(name):
        measuring = 200 * len(SCREENING_SEEDS) * 50 / GENERATED_PER_S
        if key in known:
            total += float(np.median(known[key]))
        elif method is None:
            total += measuring
        else:
            tokens = 80 * 512
            live = method.args["objective"].get("source") == "teacher"
            own = 0 if method.rollouts is None else 8 * 32 * 50
            total += tokens / (TRAINED_LIVE_PER_S if live else TRAINED_PER_S) + own / GENERATED_PER_S + measuring
    return total


def write(name: str, setup: Setup, rows: list[dict[str, Any]], step_s: dict[str, float]) -> None:
    """Write the JSON, a line per row."""
    head = {"experiment": name, "facts": setup.facts, "first_phase": setup.first_phase,
            "second_phase": setup.second_phase, "rollouts": setup.rollouts, "screening_seeds": SCREENING_SEEDS,
            "environment": environment(), "threads": torch.get_num_threads(), "quiet_step_s": step_s}  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"{name}.json", json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]}\n")


def main() -> None:
    """Run what is missing and write the JSON after each unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--data", type=Path, default=os.environ.get("TDISTILL_DATA"), help="default: TDISTILL_DATA")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--times", action="store_true", help="only measure seconds per step, nothing else running")
    parser.add_argument("--estimate", action="store_true", help="only print how long it would take")
    options = parser.parse_args()
    names = options.names or list(EXPERIMENTS)
    if unknown := set(names) - set(EXPERIMENTS):
        parser.error(f"unknown experiments: {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    for name in names:
        print(f"{name}: {len(missing(name))} units left, about {estimate_s(name) / 3600:.1f} h", flush=True)
    if options.estimate:
        return
    if options.data is None:
        parser.error("give --data or set TDISTILL_DATA to the folder with train/, eval/ and models/")
    experiments = Experiments(Path(options.data), options.work)
    for name in names:
        if options.times:
            what, found = EXPERIMENTS[name].setups[0], read(name)
            for key, method in EXPERIMENTS[name].methods.items():
                found.setdefault("quiet_step_s", {})[key] = experiments.step_s(what, method)
                write(name, experiments.setup(what), found["rows"], found["quiet_step_s"])
            continue
        for what, key, method, seed in missing(name):
            content = read(name)
            row = experiments.before(what) if method is None else experiments.run(what, key, method, seed)
            write(name, experiments.setup(what), [*content["rows"], row], content.get("quiet_step_s", {}))
            kl = sum(row["screening"]["kl_sum"]) / sum(row["screening"]["num_tokens"])
            rouge = np.mean(row["screening"]["rouge_l"])
            print(f"{name}: {what.name}, {key}, seed {seed}: KL {kl:.4f}, Rouge-L {rouge:.4f}, {row['seconds']:.0f} s",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
