"""Cross-entropy of the token taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import gradients, pack, random_episodes, with_leaves
from references import losses

from tdistill.objectives import SFT


def test_loss_is_the_reference():
    for seed in range(5):
        episodes = random_episodes(seed)
        assert float(SFT()(pack(episodes)).loss) == pytest.approx(losses.sft(episodes), rel=1e-9)


def test_by_hand():
    # Probabilities 1/4 and 1/2 of the tokens taken; the dropped one does not count: log 4 + log 2.
    states = [
        losses.State(np.array([0.0]), np.zeros(1), taken=0, normaliser=math.log(4)),
        losses.State(np.array([9.0]), np.zeros(1), taken=None, normaliser=math.log(4)),
        losses.State(np.array([1.0]), np.zeros(1), taken=0, normaliser=1 + math.log(2)),
    ]
    result = SFT()(pack([losses.Episode(states, "terminal")]))
    assert float(result.loss) == pytest.approx(math.log(8))
    assert [float(x) for x in result.metrics["nll"]] == pytest.approx([math.log(8), 2.0])


def test_gradient_is_the_softmax_minus_the_indicator():
    stats = with_leaves(pack(random_episodes(0)))
    SFT()(stats).loss.backward()
    found = gradients(stats)
    act_N = stats.has_action_N.double()
    assert torch.equal(found["log_normaliser_N"], act_N)
    assert torch.equal(found["q_taken_N"], -act_N)
    assert float(found["q_M"].abs().sum() + found["value_N"].abs().sum()) == 0.0
