"""Compare objectives on equal terms: the same starts, stores, batches and response tokens.

    python benchmarks/objectives tiny        # ten seeds of every question of kind
    python benchmarks/objectives real        # finalists and off-support controls, SmolLM2-135M to 15 of its layers

Reads the data from TDISTILL_DATA, keeps what it makes in runs/objectives, and goes on from the JSON already there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from measure import measure
from setups import Setup, real, tiny
from training import train
from variants import VARIANTS, Variant

from tdistill.files import write_atomically
from tdistill.run_folder import environment
from tdistill.teachers.loading import load_causal_lm

RESULTS = Path(__file__).parent.parent / "results"


def first_phase(setup: Setup, seed: int) -> Path:
    """Folder of the SFT student of a seed."""
    return setup.after_first_phase(seed, lambda model, args, seed: train(setup, model, args, seed)[0].model)


def run_variant(setup: Setup, name: str, variant: Variant, seed: int) -> dict[str, Any]:
    """Train one variant with one seed and measure it on dev and held-out prompts."""
    start = first_phase(setup, seed)
    model = load_causal_lm(start, dtype="float32")
    args = {**setup.second_phase, **variant.args}
    trainer, times = train(setup, model, args, seed, variant.rollouts, text=variant.text)
    dev = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    model.eval()
    return {
        "variant": name,
        "seed": seed,
        "response_tokens": trainer.state.num_input_tokens_seen,
        "step_s": times.median_s,
        "step_with_rollouts_s": times.mean_s,
        "dev": {name: value for name, value in dev.items() if name != "runtime"},
        "held_out": measure(setup, model, seed),
    }


def step_times(setup: Setup, only: str) -> dict[str, float]:
    """Seconds per step of every variant, rounds of rollouts included: a short run each, from the first seed's start.

    Median over six steps; with rollouts the mean over as many steps as one round serves.
    """
    found = {}
    for name, variant in VARIANTS[setup.name].items():
        if only not in name:
            continue
        model = load_causal_lm(first_phase(setup, setup.seeds[0]), dtype="float32")
        steps = setup.rollouts["every"] if variant.rollouts is not None else 7  # the first warms up
        args = {**setup.second_phase, **variant.args, "max_steps": steps}
        _, times = train(setup, model, args, setup.seeds[0], variant.rollouts, text=variant.text)
        found[name] = times.mean_s if variant.rollouts is not None else times.median_s
        print(f"{name}: {found[name]:.2f} s per step", flush=True)
    return found


def as_text(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """JSON with one line per row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]}\n"


def main() -> None:
    """Run what is missing, one seed of every variant before the next seed, and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=("tiny", "real"))
    parser.add_argument("--data", type=Path, default=os.environ.get("TDISTILL_DATA"), help="default: TDISTILL_DATA")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument(
        "--times", action="store_true", help="only measure seconds per step again, nothing else running"
    )
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set TDISTILL_DATA to the folder with train/, eval/ and models/")
    setup = (tiny if options.scale == "tiny" else real)(options.data, options.work)
    output = RESULTS / f"objectives_{setup.name}.json"
    content = json.loads(output.read_text()) if output.is_file() else {"rows": []}
    rows = content.pop("rows")
    if options.times:
        times = {**content.get("step_s", {}), **step_times(setup, options.only)}
        write_atomically(output, as_text({**content, "step_s": times}, rows))
        return
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in setup.seeds:
        if ("before", seed) not in done:
            model = load_causal_lm(first_phase(setup, seed), dtype="float32").eval()
            rows.append({"variant": "before", "seed": seed, "held_out": measure(setup, model, seed)})
        for name, variant in VARIANTS[setup.name].items():
            if (name, seed) in done or seed not in setup.seeds[: variant.num_seeds] or options.only not in name:
                continue
            started = time.perf_counter()
            rows.append(run_variant(setup, name, variant, seed))
            head = {**content, "scale": setup.name, "facts": setup.facts, "first_phase": setup.first_phase,
                       "second_phase": setup.second_phase, "rollouts": setup.rollouts,
                       "environment": environment(), "threads": torch.get_num_threads()}  # fmt: skip
            write_atomically(output, as_text(head, rows))
            kl, seconds = rows[-1]["held_out"]["kl_teacher_student"], time.perf_counter() - started
            print(f"{name} seed {seed}: KL {kl:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
