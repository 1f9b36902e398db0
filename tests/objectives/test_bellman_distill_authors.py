"""The released variant against whole rows of the vocabulary, and how it differs from the printed objective."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from builders import VOCAB_SIZE, pack, random_episodes
from references import td_family
from references.losses import Episode, State

from tdistill.errors import DomainError
from tdistill.objectives.bellman_distill_authors import BellmanDistillAuthors

NAMES = ("alpha", "gamma", "q_floor", "epsilon", "mask_end")
GRID = [
    dict(zip(NAMES, row, strict=True))
    for row in itertools.product([0.1, 5.0], [0.0, 0.99], [-10.0, -0.7], [1e-8, 0.05], [True, False])
]


@pytest.mark.parametrize("fields", GRID)
def test_loss_is_the_formula_over_the_whole_vocabulary(fields):
    episodes = random_episodes(1, with_student=True)
    for part in (episodes, *([episode] for episode in episodes)):
        found = float(BellmanDistillAuthors(**fields)(pack(part)).loss)
        wanted = td_family.bellman_distill_authors(part, VOCAB_SIZE, **fields)
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_one_step_by_hand():
    # A vocabulary of 3, set {a, b} with logits (0, −log 2), the third token at −∞ or so: π_Q = (⅔, ⅓, 0), ε → 0.
    # Q̃ = (0, −log 2, –); V = ⅔(0 − log ⅔) + ⅓(−log 2 − log ⅓) = log 1.5. Terminal, α = 1:
    # first term ⅓(φ(0) + φ(−log 2) + φ(0)) = ⅓(−log 2 − log² 2 / 4).
    state = State(np.array([0.0, -math.log(2)]), np.log([0.5, 0.3]), 0, normaliser=math.log(1.5), q_max=0.0)
    stats = replace(pack([Episode([state], "terminal")]), vocab_size=3)
    loss = BellmanDistillAuthors(alpha=1.0, epsilon=1e-14, mask_end=False)(stats).loss
    wanted = (-math.log(2) - math.log(2) ** 2 / 4) / 3 - math.log(1.5)
    assert float(loss) == pytest.approx(-wanted, abs=1e-9)


def test_the_action_taken_does_not_matter():
    stats = pack(random_episodes(2))
    moved = replace(stats, q_taken_N=stats.q_taken_N + 5.0)
    assert float(BellmanDistillAuthors()(moved).loss) == float(BellmanDistillAuthors()(stats).loss)


def test_rows_of_logits_as_the_released_code_has_them():
    """A vocabulary of 9 whose tokens off the sets are below the floor: the dense formula, not one count of tokens."""
    alpha, gamma, floor, epsilon, vocab_size = 0.3, 0.9, -10.0, 1e-3, 9
    rng = np.random.default_rng(0)
    sizes, states, rows = (3, 5, 2), [], []
    for size in sizes:
        logits = np.append(rng.normal(size=size) * 3, rng.uniform(-60, -30, vocab_size - size))
        logits[0] = logits.max() - 11 if size == 5 else logits[0]  # one slot of a set is clipped too
        q = np.maximum(logits - logits.max(), floor)
        inside = np.arange(vocab_size) < size
        policy = np.exp(q) / np.exp(q).sum() * inside + epsilon
        policy /= policy.sum()
        rows.append((q * inside, (policy * (q - np.log(policy))).sum()))
        teacher = np.log(np.full(size, 0.9 / size))
        states.append(State(logits[:size], teacher, 0, q_max=float(logits.max())))
    stats = replace(pack([Episode(states, "terminal")]), vocab_size=vocab_size)
    (q_0, v_0), (q_1, v_1), (q_2, v_2) = rows

    def loss_of(transitions: list[tuple[np.ndarray, float, float]]) -> float:
        return -sum(
            ((q - gamma * w) - (q - gamma * w) ** 2 / (4 * alpha)).mean() - (v - gamma * w) for q, v, w in transitions
        )

    objective = BellmanDistillAuthors(alpha, gamma, floor, epsilon, mask_end=False)
    wanted = loss_of([(q_0, v_0, v_1), (q_1, v_1, v_2), (q_2, v_2, 0.0)])
    assert float(objective(stats).loss) == pytest.approx(wanted, rel=1e-12)
    assert [int(x) for x in objective(stats).metrics["clipped_share"]] == [1, sum(sizes)]
    # The state before the end token has no value there, and its own transition is not counted.
    masked = replace(objective, mask_end=True)
    assert float(masked(stats).loss) == pytest.approx(loss_of([(q_0, v_0, v_1), (q_1, v_1, 0.0)]), rel=1e-12)


def test_without_epsilon_the_value_is_the_soft_value_on_the_set():
    # One terminal step without χ²: −J = log Σ_A exp Q̃ − (1/|V|) Σ_A Q̃.
    logits = np.array([1.0, 0.5, -2.0])
    stats = pack([Episode([State(logits, np.log([0.4, 0.3, 0.2]), 1, q_max=1.5)], "terminal")])
    loss = BellmanDistillAuthors(alpha=math.inf, epsilon=1e-300, mask_end=False)(stats).loss
    q = logits - 1.5
    assert float(loss) == pytest.approx(np.log(np.exp(q).sum()) - q.sum() / VOCAB_SIZE, rel=1e-12)


def test_no_normaliser_over_the_vocabulary_is_read():
    stats = pack(random_episodes(2))
    without = replace(stats, log_normaliser_N=None)
    assert float(BellmanDistillAuthors()(without).loss) == float(BellmanDistillAuthors()(stats).loss)


def test_it_is_refused_at_p_1():
    with pytest.raises(DomainError, match="no listed action sets"):
        BellmanDistillAuthors()(replace(pack(random_episodes(2)), full_support=True))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"gamma": 2.0}, "gamma"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"q_floor": 0.5}, "q_floor"),
        ({"q_floor": -math.inf}, "q_floor"),
    ],
)
def test_fields_outside_their_domain_are_refused(fields, part):
    with pytest.raises(DomainError, match=part):
        BellmanDistillAuthors(**fields)
