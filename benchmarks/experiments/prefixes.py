"""Exposure bias of the students that meet the test sets, on the screening prompts.

    python benchmarks/experiments exposure

The frozen methods' students, and the start, answer with one sampling seed; the divergence from the teacher along these
answers is compared with that along the teacher's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finals import Load
from plan import BASE, RESULTS, SCREENING_SEEDS, Method, studied
from rows import UNTRAINED, markdown, short_name
from scores import TOP_P
from setups import Setup

from tdistill.evaluation.exposure import PositionSums, exposure, kl_by_position
from tdistill.evaluation.generation import sample_answers
from tdistill.files import write_atomically
from tdistill.reports.plots import curves_chart

PATH = RESULTS / "exposure.json"
SEED = SCREENING_SEEDS[0]


def missing() -> list[tuple[str, Method | None, int]]:
    """Students without a curve: the start and the frozen ones, by name, method and training seed."""
    done = {(curve["subject"], curve["training_seed"]) for curve in _curves()}
    return [of for of in studied() if of[0] != "teacher" and (of[0], of[2]) not in done]


def run(setup: Setup, load: Load) -> None:
    """Measure what is missing and write each curve down."""
    pairs, vocab_size = setup.held_out_pairs, len(setup.tokenizer)
    for name, method, training_seed in missing():
        student = load(name, method, training_seed, "float32")
        answers, _ = sample_answers(
            student,
            [prompt for prompt, _ in pairs],
            end_token_ids=setup.stores["train"].end_token_ids,
            vocab_size=vocab_size,
            max_new_tokens=setup.recipe.capture.max_new_tokens,
            top_p=TOP_P,
            seed=SEED,
            batch_size=64,
        )
        own_pairs = [(prompt, answer.token_ids) for (prompt, _), answer in zip(pairs, answers, strict=True)]
        own, teacher = (
            PositionSums.gather(
                kl_by_position(setup.teacher.model, {name: student}, along, vocab_size=vocab_size)[name],
                range(len(along)),
                len(along),
            )
            for along in (own_pairs, pairs)
        )
        curves = [*_curves(), exposure(own, teacher, name).curve.model_dump() | {"training_seed": training_seed}]
        head = f'{{"setup": {json.dumps(BASE.name)}, "sampling_seed": {SEED}, "curves": [\n'
        write_atomically(PATH, head + ",\n".join(map(json.dumps, curves)) + "\n]}\n")
        print(f"exposure: {name}, seed {training_seed}", flush=True)


def _curves() -> list[dict[str, Any]]:
    return json.loads(PATH.read_text())["curves"] if PATH.is_file() else []


def section(path: Path, figure: str) -> str:
    """The section of docs/results.md."""
    content = json.loads(path.read_text())
    lines = [
        ["", "training seed", "length", "KL on own prefixes", "KL on the teacher's", "excess accumulated error"],
    ]
    for curve in content["curves"]:
        last = curve["points"][-1]
        length = last["length"]
        own, teacher = (sum(curve[key][:length]) / length for key in ("kl_own_prefixes", "kl_teacher_prefixes"))
        interval = "" if last["low"] is None else f" [{last['low']:.3f}, {last['high']:.3f}]"
        seed = "–" if curve["subject"] in UNTRAINED else str(curve["training_seed"])
        numbers = [f"{own:.3f}", f"{teacher:.3f}", f"{last['value']:.3f}{interval}"]
        lines.append([curve["subject"], seed, str(length), *numbers])
    return (
        f"## Exposure bias\n\nFrom `{path}`, which `python benchmarks/experiments exposure` makes: the 200 screening "
        f"prompts, sampling seed {content['sampling_seed']}, against the teacher's answers to the same prompts, which "
        "are drawn from sets of at most 64 tokens; the student's are not. KL(teacher‖student), nats per "
        "token, mean over the positions up to the length; the excess is the share by which it is larger on the "
        "student's own prefixes (MiniLLM's excess accumulated error), 95 % intervals over prompts. Below 0: the "
        f"student's own prefixes are easier for it than the teacher's.\n\n{markdown(lines)}\n\n"
        f"![Exposure bias]({figure})\n"
    )


def chart(path: Path) -> str:
    """Divergence over position on either kind of prefix, of the first training seed that each was measured with."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for curve in json.loads(path.read_text())["curves"]:
        for key, title in (("kl_own_prefixes", "KL on own prefixes"), ("kl_teacher_prefixes", "on the teacher's")):
            values = curve[key]
            at = [float(t + 1) for t in range(len(values))]
            panels.setdefault(title, {}).setdefault(short_name(curve["subject"]), (at, values))
    return curves_chart("exposure", "Exposure bias", "position in the answer", panels)
