"""Losses and gradients of a fixed batch, pinned: a change of an objective must be seen and meant.

The batch is spelled out below, so that no random generator stands between the file and the numbers. Write the file
again with ``PYTHONPATH=tests python tests/golden/test_golden_objectives.py`` after a change that is meant.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from builders import FLOAT_FIELDS, gradients, pack, with_leaves
from references import divergences as printed
from references import losses, td_family

from tdistill.objectives import SFT, IQLearn, OffSupport
from tdistill.objectives.forward_kl import ForwardKL
from tdistill.objectives.gkd import GKD
from tdistill.objectives.minillm import MiniLLM
from tdistill.objectives.path_consistency import PathConsistency

GOLDEN = Path(__file__).with_name("objectives.json")


def batch() -> list[losses.Episode]:
    """One terminal episode with a dropped transition, one truncated with, and one without a bootstrap state."""

    def state(logits: list[float], probs: list[float], taken: int | None, normaliser: float, value: float):
        return losses.State(np.array(logits), np.log(probs), taken, normaliser, value)

    return [
        losses.Episode(
            [
                state([1.5, 0.25, -0.75], [0.5, 0.25, 0.125], 0, 2.25, -0.5),
                state([0.5, 2.0], [0.625, 0.25], None, 2.5, 0.75),
                state([-1.0, 0.0, 1.0, 3.0], [0.375, 0.25, 0.125, 0.0625], 3, 3.5, 0.25),
            ],
            "terminal",
        ),
        losses.Episode(
            [
                state([2.0], [0.875], 0, 2.125, 1.0),
                state([0.125, -0.375], [0.5, 0.3125], 1, 1.5, -1.25),
                state([0.75, 0.5], [0.75, 0.125], None, 2.0, 0.5),
            ],
            "truncated",
            bootstrap=True,
        ),
        losses.Episode([state([-0.5, 1.25], [0.4375, 0.375], 1, 1.75, 0.375)], "truncated"),
    ]


def mixed_batch() -> list[losses.Episode]:
    """The same, and an answer of the student that ends."""
    states = [
        losses.State(np.array([0.25, -1.5]), np.log([0.75, 0.1875]), 1, 1.25, 0.625),
        losses.State(np.array([1.0, 0.5, -0.25]), np.log([0.5, 0.375, 0.0625]), 0, 1.875, -0.375),
    ]
    return [*batch(), losses.Episode(states, "terminal", from_student=True)]


CASES = {
    "iq_learn default": IQLearn(),
    "iq_learn alpha 100": IQLearn(alpha=100.0),
    "iq_learn paper": IQLearn(alpha=0.1, coordinates="raw", first_order="sampled", q_floor=-10.0),
    "iq_learn raw expected": IQLearn(alpha=1.0, gamma=0.5, coordinates="raw"),
    "iq_learn max_set floor": IQLearn(alpha=0.1, coordinates="max_set", first_order="sampled", q_floor=-1.0),
    "iq_learn value_head sampled": IQLearn(alpha=0.1, gamma=1.0, first_order="sampled"),
    "iq_learn behaviour cloning": IQLearn(alpha=math.inf, first_order="sampled"),
    "iq_learn reverse_kl": IQLearn(alpha=0.5, phi="reverse_kl"),
    "iq_learn hellinger": IQLearn(alpha=0.5, phi="hellinger"),
    "iq_learn jensen_shannon": IQLearn(alpha=0.5, phi="jensen_shannon"),
    "iq_learn total_variation": IQLearn(alpha=0.5, phi="total_variation"),
    "iq_learn identity": IQLearn(phi="identity", coordinates="raw"),
    "iq_learn mixture": IQLearn(alpha=0.5, student_value_weight=0.5),
    "iq_learn three steps": IQLearn(alpha=0.5, steps=3),
    "path_consistency two steps": PathConsistency(steps=2),
    "path_consistency both": PathConsistency(states="both", student_weight=0.5),
    "sft": SFT(),
    "forward_kl": ForwardKL(),
    "gkd on the set": GKD(source="set"),
    "minillm": MiniLLM(),
    "off_support tail": OffSupport("tail", target="teacher"),
    "off_support union half": OffSupport("union", weight=0.5, target="teacher"),
}


def batch_of(case: str) -> list[losses.Episode]:
    """The batch that a case is measured on."""
    return mixed_batch() if getattr(CASES[case], "needs_rollouts", False) else batch()


def measure(case: str) -> dict[str, float]:
    """Loss, and the Euclidean norm of the gradient in each field."""
    stats = with_leaves(pack(batch_of(case)))
    loss = CASES[case](stats).loss
    loss.backward()
    return {"loss": loss.item(), **{f"grad_{name}": g.norm().item() for name, g in gradients(stats).items()}}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_as_pinned(case):
    pinned = json.loads(GOLDEN.read_text())
    assert pinned.keys() == CASES.keys()
    assert set(pinned[case]) == {"loss", *(f"grad_{name}" for name in FLOAT_FIELDS)}
    assert measure(case) == pytest.approx(pinned[case], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_pinned_losses_are_those_of_the_slow_reference(case):
    objective = CASES[case]
    if isinstance(objective, IQLearn):
        wanted = losses.iq_learn(batch_of(case), **vars(objective))
    elif isinstance(objective, PathConsistency):
        wanted = td_family.path_consistency(batch_of(case), **vars(objective))
    elif isinstance(objective, MiniLLM):
        fields = {name: value for name, value in vars(objective).items() if name != "source"}
        wanted = printed.minillm(batch_of(case), **fields)
    elif isinstance(objective, ForwardKL | GKD):
        acting = [state for episode in batch() for state in episode.states if state.taken is not None]
        if isinstance(objective, ForwardKL):
            wanted = sum(printed.kl(*printed.set_and_tail(state)) for state in acting)
        else:
            policies = [map(losses.projected, (state.teacher_log_probs, state.logits)) for state in acting]
            wanted = sum(printed.jsd(*pair, objective.beta) for pair in policies)
    elif isinstance(objective, OffSupport):
        wanted = objective.weight * losses.off_support(batch())
    else:
        wanted = losses.sft(batch())
    assert json.loads(GOLDEN.read_text())[case]["loss"] == pytest.approx(wanted, rel=1e-12)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: measure(case) for case in CASES}, indent=2) + "\n")
