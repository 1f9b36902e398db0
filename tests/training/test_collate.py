"""Collation against batches derived by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import random_trajectory

from tdistill.training.collate import PackedCollator, PlainText
from tdistill.types import ActionSets, Ends, Trajectory


def sets_of(*states: dict[int, float]) -> ActionSets:
    """Token → probability per state, in the order given."""
    probs = [p for state in states for p in state.values()]
    sizes = [len(state) for state in states]
    return ActionSets(
        offsets=np.cumsum([0, *sizes]).astype(np.int64),
        ids=np.array([token for state in states for token in state], dtype=np.int32),
        log_probs=np.log(np.array(probs)).astype(np.float32),
        covered_mass=np.array([sum(state.values()) for state in states], dtype=np.float32),
        log_sum_exp=np.zeros(len(sizes), dtype=np.float32),
    )


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


SAMPLED = Trajectory(
    "a", 0, ids(10, 11), ids(5, 6, 2), "terminal", "teacher",
    sets_of({5: 0.5, 7: 0.3, 8: 0.15}, {9: 0.6, 6: 0.35}, {2: 0.97}),
)  # fmt: skip
# Its second token, 4, lies outside the teacher's set {8, 1} and was added at the end when the answer was scored.
GIVEN = Trajectory(
    "b", 1, ids(12), ids(7, 4), "truncated", "given",
    sets_of({3: 0.7, 7: 0.2}, {8: 0.55, 1: 0.35, 4: 0.02}, {6: 0.5, 5: 0.45}),
)  # fmt: skip
NEXT, TERMINAL, TRUNCATED = int(Ends.NEXT), int(Ends.TERMINAL), int(Ends.TRUNCATED)


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, list]:
    floats = ("log_prob_teacher_M", "log_prob_taken_teacher_N", "teacher_log_sum_exp_N")
    return {name: value.tolist() for name, value in batch.items() if name not in floats}


def test_sets_as_stored():
    batch = PackedCollator(pad_token_id=99)([SAMPLED, GIVEN])
    assert as_lists(batch) == {
        "input_ids": [[10, 11, 5, 6, 2], [12, 7, 4, 99, 99]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        # The state before a token is at the token before it: 11 → 5, 5 → 6, 6 → 2; 12 → 7, 7 → 4, 4 → bootstrap.
        "position_index_N": [1, 2, 3, 5, 6, 7],
        "offsets": [0, 3, 5, 6, 8, 11, 13],
        "action_ids_M": [5, 7, 8, 9, 6, 2, 3, 7, 8, 1, 4, 6, 5],
        "taken_N": [5, 6, 2, 7, 4, 0],
        "sequence_N": [0, 0, 0, 1, 1, 1],
        "has_action_N": [True, True, True, True, True, False],
        "ends_N": [NEXT, NEXT, TERMINAL, NEXT, NEXT, TRUNCATED],
        "added_M": [False] * 13,
        "from_student_N": [False] * 6,
        "log_prob_sampled_N": [0.0] * 6,
        "dropped_N": [False] * 6,
        "added_N": [False] * 6,
        "text_index_L": [],
        "text_target_L": [],
        "num_over_budget": 0,
    }
    wanted = [0.5, 0.3, 0.15, 0.6, 0.35, 0.97, 0.7, 0.2, 0.55, 0.35, 0.02, 0.5, 0.45]
    np.testing.assert_allclose(batch["log_prob_teacher_M"].exp(), wanted, rtol=1e-6)
    # Of 5, 6, 2, 7 and 4; the bootstrap row takes nothing.
    wanted = [0.5, 0.35, 0.97, 0.2, 0.02, 1.0]
    np.testing.assert_allclose(batch["log_prob_taken_teacher_N"].exp(), wanted, rtol=1e-6)


def test_a_budget_chooses_the_sets_of_each_trajectory():
    # SAMPLED, one slot per state: −log(0.5 · 0.6 · 0.97) = 1.234 nats at γ = 1. A second slot is worth log(0.8/0.5) =
    # 0.470 in the first state and log(0.95/0.6) = 0.460 in the second; the third slot of the first log(0.95/0.8) =
    # 0.172. All of them: 0.133. So 0.8 nats need the first only, 0.4 both seconds, and 0.1 cannot be met.
    def sizes(nats: float) -> tuple[list[int], int, list[bool]]:
        batch = PackedCollator(pad_token_id=0, budget=(nats, 1.0))([SAMPLED])
        return batch["offsets"].diff().tolist(), int(batch["num_over_budget"]), batch["dropped_N"].tolist()

    assert sizes(1.3) == ([1, 1, 1], 0, [False, True, False])
    assert sizes(0.8) == ([2, 1, 1], 0, [False, True, False])
    assert sizes(0.4) == ([2, 2, 1], 0, [False, False, False])
    assert sizes(0.1) == ([3, 2, 1], 1, [False, False, False])


def test_answers_of_the_student_are_marked_and_keep_their_tokens():
    # At p = 0.45 a token outside the set of a sampled answer is dropped; one of the student's own is added.
    own = replace(
        GIVEN, source="student", log_probs_sampled=np.array([-3, -2, -1], dtype=np.float32)[: len(GIVEN.response_ids)]
    )
    batch = PackedCollator(pad_token_id=0, p=0.45)([SAMPLED, own])
    assert batch["log_prob_sampled_N"].tolist()[:5] == [0, 0, 0, -3, -2]
    assert batch["from_student_N"].tolist() == [False] * 3 + [True] * 3
    assert batch["added_N"].tolist() == [False] * 3 + [True, True, False]
    assert batch["dropped_N"].tolist() == [False, True, False] + [False] * 3
    np.testing.assert_allclose(batch["log_prob_taken_teacher_N"].exp(), [0.5, 1, 0.97, 0.2, 0.02, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("p", "scored", "added"),
    [
        (None, None, []),
        (None, (0.8, None), [4]),  # {3, 7} reach 0.8 with 7; {8, 1} without 4
        (None, (0.95, None), []),
        (None, (0.95, 2), [4]),  # the cap
        (0.45, (0.95, 2), [7, 4]),  # 7 is not in {3}
    ],
)
def test_tokens_that_only_the_student_finds_likely_are_marked(p, scored, added):
    own = replace(GIVEN, source="student")
    batch = PackedCollator(pad_token_id=0, p=p, scored=scored)([SAMPLED, GIVEN, own])
    assert batch["action_ids_M"][batch["added_M"]].tolist() == added
    assert not batch["added_M"][: batch["offsets"][6]].any()  # of the teacher and of people nothing


def test_transitions_outside_can_be_kept():
    # As below, but the objective does not read that the token was 6.
    dropping, keeping = (PackedCollator(pad_token_id=0, p=0.45, keep_outside=keep)([SAMPLED]) for keep in (False, True))
    assert dropping["has_action_N"].tolist() == [True, False, True] and keeping["has_action_N"].tolist() == [True] * 3
    assert keeping["dropped_N"].tolist() == [False] * 3
    for name in ("offsets", "action_ids_M", "log_prob_teacher_M"):
        assert torch.equal(dropping[name], keeping[name])


def test_smaller_p_drops_sampled_tokens_and_adds_given_ones():
    # At p = 0.45 every set is its first token. Sampled: 6 is outside {9}, so that transition is dropped, and its row
    # stays as a next state. Given: 7 and 4 are outside {3} and {8} and are added.
    batch = PackedCollator(pad_token_id=0, p=0.45)([SAMPLED, GIVEN])
    assert batch["action_ids_M"].tolist() == [5, 9, 2, 3, 7, 8, 4, 6]
    assert batch["offsets"].tolist() == [0, 1, 2, 3, 5, 7, 8]
    assert batch["has_action_N"].tolist() == [True, False, True, True, True, False]
    assert batch["dropped_N"].tolist() == [False, True, False, False, False, False]
    assert batch["added_N"].tolist() == [False, False, False, True, True, False]
    assert batch["ends_N"].tolist() == [NEXT, NEXT, TERMINAL, NEXT, NEXT, TRUNCATED]
    assert batch["position_index_N"].tolist() == [1, 2, 3, 5, 6, 7]
    np.testing.assert_allclose(
        batch["log_prob_teacher_M"].exp(), [0.5, 0.6, 0.97, 0.7, 0.2, 0.55, 0.02, 0.5], rtol=1e-6
    )


def test_p_between():
    # At p = 0.75: {5, 7} (0.8), {9, 6} (0.95), {2}; {3, 7} (0.9), {8, 1} (0.9) + 4, {6, 5} (0.95).
    batch = PackedCollator(pad_token_id=0, p=0.75)([SAMPLED, GIVEN])
    assert batch["action_ids_M"].tolist() == [5, 7, 9, 6, 2, 3, 7, 8, 1, 4, 6, 5]
    assert batch["dropped_N"].tolist() == [False] * 6
    assert batch["added_N"].tolist() == [False, False, False, False, True, False]
    assert batch["has_action_N"].tolist() == [True, True, True, True, True, False]


def test_truncated_without_a_recorded_last_state():
    cut = replace(GIVEN, sets=sets_of({3: 0.7, 7: 0.2}, {8: 0.55, 1: 0.35, 4: 0.02}))
    batch = PackedCollator(pad_token_id=0)([cut])
    assert batch["ends_N"].tolist() == [NEXT, TRUNCATED]
    assert batch["has_action_N"].tolist() == [True, True]
    assert batch["position_index_N"].tolist() == [0, 1]


def test_store_without_lists():
    empty = ActionSets(np.zeros(4, dtype=np.int64), ids(), np.zeros(0, np.float32), np.ones(3, np.float32), np.zeros(3))
    batch = PackedCollator(pad_token_id=0, p=1.0)([replace(SAMPLED, sets=empty)])
    assert batch["offsets"].tolist() == [0, 0, 0, 0]
    assert batch["action_ids_M"].tolist() == []
    assert batch["taken_N"].tolist() == [5, 6, 2]
    assert batch["has_action_N"].tolist() == [True] * 3
    assert batch["dropped_N"].tolist() == [False] * 3


def test_plain_text_comes_after_the_trajectories():
    text = PlainText([ids(20, 21, 22, 23, 24, 25, 26)], per_batch=2)
    batch = PackedCollator(pad_token_id=0, text=text)([SAMPLED, GIVEN])
    assert batch["input_ids"].shape == (4, 7)
    # Rows 2 and 3 of width 7 hold the text; each of its first six tokens predicts the next one.
    assert batch["text_index_L"].tolist() == [*range(14, 20), *range(21, 27)]
    assert batch["text_target_L"].tolist() == [21, 22, 23, 24, 25, 26] * 2
    assert batch["position_index_N"].tolist() == [1, 2, 3, 7, 8, 9]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 7, 7]


def test_choice_of_text_depends_on_seed_and_trajectories_alone():
    rng = np.random.default_rng(0)
    text = PlainText([rng.integers(50, size=6).astype(np.int32) for _ in range(40)], per_batch=3)
    batches = [[random_trajectory(seed, 50, 3, 4)] for seed in range(12)]

    def chosen(seed: int, order: list[int]) -> dict[int, list[int]]:
        collator = PackedCollator(0, text=text, seed=seed)
        return {b: collator(batches[b])["text_target_L"].tolist() for b in order}

    first = chosen(0, list(range(12)))
    assert chosen(0, list(range(11, -1, -1))) == first
    assert len({tuple(targets) for targets in first.values()}) == 12
    assert chosen(1, list(range(12))) != first


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("source", ["teacher", "given"])
def test_rows_with_an_action_hold_the_token_taken(p, source):
    rows = [random_trajectory(seed, 30, 2, 8, ends, source) for seed in range(4) for ends in ("terminal", "truncated")]
    batch = PackedCollator(0, p)(rows)
    offsets = batch["offsets"].tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(offsets)):
        assert stop > start
        inside = int(batch["taken_N"][n]) in batch["action_ids_M"][start:stop].tolist()
        assert inside or not batch["has_action_N"][n]
        assert not (batch["dropped_N"][n] and inside)
    assert bool(batch["dropped_N"].any()) is (source == "teacher")
    assert bool(batch["added_N"].any()) is (source == "given")
