"""The part of a report, and the study for choosing p: against values by hand and an independent reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from references.sets import fewest_slots, losses_along, mass_of, size_at

from tdistill.actions import budget_sizes
from tdistill.errors import DomainError, StoreError
from tdistill.evaluation import sparsity as module
from tdistill.evaluation.sparsity import sparsity, sparsity_study
from tdistill.reports.load import Sparsity
from tdistill.store import Store
from tdistill.store.write import shard_header, write_manifest, write_shard
from tdistill.types import ActionSets, Trajectory

# A log-probability in 16 bits is off by 2⁻¹² nats.
ROUNDED = 3e-4


def answer(
    name: str, response: list[int], ends: str, *sets: dict[int, float], mass: list[float] | None = None, **fields: Any
) -> Trajectory:
    """A trajectory with sets written as token → probability."""
    sizes = [len(own) for own in sets]
    return Trajectory(
        prompt_id=name,
        answer_index=0,
        prompt_ids=np.array([3, 3, 3], dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        ends=ends,  # type: ignore[arg-type]
        source=fields.get("source", "teacher"),
        sets=ActionSets(
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            ids=np.array([token for own in sets for token in own], dtype=np.int32),
            log_probs=np.log([prob for own in sets for prob in own.values()]).astype(np.float32),
            covered_mass=np.array(mass or [sum(own.values()) for own in sets], dtype=np.float32),
            log_sum_exp=np.zeros(len(sizes), dtype=np.float32),
        ),
    )


def write_store(path: Path, trajectories: list[Trajectory], p_max: float, cap: int | None, **facts: Any) -> Store:
    identity = {
        "teacher": {"weights_sha256": "aa", "model_type": "none", "vocab_size": 50, "dtype": "float32"},
        "tokenizer_sha256": "bb",
        "template": None,
        "end_token_ids": [1],
        "mode": "generate",
        "sampling": {"p_max": p_max, "max_actions": cap, "temperature": 1.0, "max_new_tokens": 9, "seed": 0},
        "log_prob_bits": 16,
        **facts,
    }
    path.mkdir()
    jobs = [(t.prompt_id, t.answer_index, "cc" * 8) for t in trajectories]
    entry = write_shard(path, 0, trajectories, shard_header(identity, jobs, len(jobs)))
    write_manifest(path, identity, [entry])
    return Store.open(path)


@pytest.fixture
def two_answers(tmp_path: Path) -> Store:
    """p_max = 0.9, cap 3: a finished answer, and one that was cut, with a last state whose set the cap cut to 0.85."""
    finished = answer("a", [5, 1], "terminal", {5: 0.55, 6: 0.24, 7: 0.21}, {1: 0.96})
    cut = answer("b", [8], "truncated", {5: 0.75, 8: 0.17}, {5: 0.52, 6: 0.22, 7: 0.11})
    return write_store(tmp_path / "store", [finished, cut], 0.9, 3)


def at(rows: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    [row] = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    return row


def test_part_of_a_report_by_hand(two_answers: Store):
    part = sparsity(two_answers)
    assert part is not None and Sparsity.model_validate(part).num_states == 4
    # Top 1: 0.55, 0.96, 0.75, 0.52; top 2: 0.79, 0.96, 0.92, 0.74; top 3: 1, 0.96, 0.92, 0.85. More the cap forbids.
    assert [row["k"] for row in part["top_k_mass"]] == [1, 2, 3]
    means = [row["mean"] for row in part["top_k_mass"]]
    np.testing.assert_allclose(means, [0.695, 0.8525, 0.9325], atol=ROUNDED)
    # p = 0.5: one action everywhere. p = 0.8: 3, 1, 2, 3. p = 0.9: as stored, 3, 1, 2, 3.
    assert [row["p"] for row in part["set_size"]] == [0.5, 0.8, 0.9]
    assert [row["mean"] for row in part["set_size"]] == [1.0, 2.25, 2.25]
    assert [row["median"] for row in part["set_size"]] == [1.0, 2.5, 2.5]
    assert [row["share_at_cap"] for row in part["set_size"]] == [0.0, 0.5, 0.5]
    assert part["set_size"][2]["max"] == 3
    assert "0.9" in part["note"] and "cap 3" in part["note"]


def test_losses_and_bound_by_hand(two_answers: Store):
    study = sparsity_study(two_answers, gamma=0.5)
    row = at(study["by_p"], p=0.6)
    # p = 0.6: sizes 2, 1, 1, 2 with Z = 0.79, 0.96, 0.75, 0.74. κ = 1 · (−log 0.6).
    assert row["kappa_nats"] == pytest.approx(0.510826, abs=1e-6)
    # k ≥ 1: −½ log 0.96 = 0.020411 and −½ log 0.74 = 0.150553. Quartiles of two: a quarter of the way in.
    quartiles = [row["q_loss_nats"][name] for name in ("mean", "q25", "median", "q75")]
    np.testing.assert_allclose(quartiles, [0.085482, 0.052946, 0.085482, 0.118017], atol=ROUNDED)
    # t ≥ 0: −log 0.79 = 0.235722 and −log 0.75 = 0.287682 more.
    assert row["v_loss_nats"]["median"] == pytest.approx(0.085482 + 0.261702, abs=ROUNDED)
    assert row["covered_mass"]["mean"] == pytest.approx(0.81, abs=ROUNDED)
    assert row["covered_mass"]["median"] == pytest.approx(0.77, abs=ROUNDED)
    # Of the tokens 5, 1 and 8 only 8 is outside its set, {5}.
    assert row["tokens_outside_share"] == pytest.approx(1 / 3)
    assert study["truncated_share"] == 0.5
    assert any("50.0%" in note for note in study["notes"])
    assert at(study["by_p"], p=0.9)["tokens_outside_share"] == 0.0
    assert [row["p"] for row in study["by_p"]] == [0.5, 0.6, 0.7, 0.8, 0.9]


def test_bytes_by_hand(two_answers: Store):
    study = sparsity_study(two_answers)
    # A slot: id 4 + code 2. A state: size 4 + top 4 + last code 2 + mass 4 + log-sum-exp 4. A token: 4.
    # p = 0.6: 6 slots, 4 states, 3 tokens: (36 + 72 + 12) / 3. p = 0.9: 9 slots.
    assert at(study["by_p"], p=0.6)["bytes_per_token"] == 40.0
    assert at(study["by_p"], p=0.9)["bytes_per_token"] == 46.0
    assert study["bytes"]["prompts_per_token"] == 2 * 3 * 4 / 3
    files = sum(file.stat().st_size for file in two_answers.path.glob("shard-*.parquet"))
    assert study["bytes"]["on_disk_per_token"] == files / 3


def test_bytes_are_those_of_the_uncompressed_columns(tiny_stores: dict[str, Store]):
    store = tiny_stores["train"]
    study = sparsity_study(store)
    states = ["set_sizes", "set_tops", "last_log_probs", "covered_mass", "log_sum_exp"]
    lists = ["taken_slots", "set_ids", "set_log_probs", *states]
    num_bytes = 0
    for entry in store.shards:
        table = pq.read_table(store.path / entry["file"], columns=lists)
        num_bytes += sum(chunk.flatten().nbytes for name in lists for chunk in table.column(name).chunks)
    own = at(study["by_p"], p=store.p_max)["bytes_per_token"]
    assert own == pytest.approx(num_bytes / store.total_response_tokens)
    assert own == at(study["by_cap"], p=store.p_max, cap=16)["bytes_per_token"]


def test_eight_bits_make_a_slot_smaller(tmp_path: Path):
    store = write_store(tmp_path / "store", [answer("a", [5, 1], "terminal", {5: 0.95}, {1: 0.5, 4: 0.42})], 0.9, None,
                        log_prob_bits=8)  # fmt: skip
    study = sparsity_study(store)
    assert at(study["by_p"], p=0.9)["bytes_per_token"] == (3 * 5 + 2 * 15 + 2 * 4) / 2
    assert any("0.5 nats" in note for note in study["notes"])


def test_caps_by_hand(two_answers: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SMALLEST_CAP", 1)
    study = sparsity_study(two_answers, gamma=0.5)
    assert [row["cap"] for row in study["by_cap"]] == [1, 2, 3] * 5
    # p = 0.8, cap 2: Z = 0.79 (cut), 0.96, 0.92, 0.74 (cut).
    row = at(study["by_cap"], p=0.8, cap=2)
    assert row["cut_share"] == 0.5
    assert row["size"]["mean"] == 7 / 4
    assert row["covered_mass"]["mean"] == pytest.approx(0.8525, abs=ROUNDED)
    # Cap 3: three actions of mass 1 and of mass 0.85 reach 0.8; the latter misses 0.9.
    assert at(study["by_cap"], p=0.8, cap=3)["cut_share"] == 0.0
    assert at(study["by_cap"], p=0.9, cap=3)["cut_share"] == at(study["by_p"], p=0.9)["cut_share"] == 0.25


@pytest.mark.parametrize(
    ("cap", "largest", "wanted"),
    [(64, 3, [8, 16, 32, 64]), (50, 3, [8, 16, 32, 50]), (8, 3, [8]), (5, 3, [5]), (None, 17, [8, 16, None]),
     (None, 3, [None])],
)  # fmt: skip
def test_caps_go_up_to_the_stores_own_and_no_further(tmp_path: Path, cap: int | None, largest: int, wanted: list):
    flat = dict.fromkeys(range(2, 2 + largest), 0.9 / largest)
    store = write_store(tmp_path / "store", [answer("a", [2, 1], "terminal", flat, {1: 0.95})], 0.9, cap)
    assert list(dict.fromkeys(row["cap"] for row in sparsity_study(store)["by_cap"])) == wanted


def test_budgets_by_hand(two_answers: Store):
    # γ = ½. First answer: on 1 + 1 slots 0.598 + 0.020, on 2 + 1 0.236 + 0.020, on 3 + 1 0.020.
    # Second: on 1 + 1 slots 0.288 + 0.327 = 0.615; gains 0.204 (first state), 0.176 and 0.069 (second): 0.165 on all.
    study = sparsity_study(two_answers, gamma=0.5, budgets_nats=(0.7, 0.3, 0.2, 0.15))
    sizes = {0.7: [1, 1, 1, 1], 0.3: [2, 1, 2, 2], 0.2: [3, 1, 2, 3], 0.15: [3, 1, 2, 3]}
    for budget, wanted in sizes.items():
        row = at(study["by_budget"], budget_nats=budget)
        assert row["size"]["mean"] == np.mean(wanted)
        assert row["unmet_share"] == (0.5 if budget == 0.15 else 0.0)
    assert at(study["by_budget"], budget_nats=0.3)["v_loss_nats"]["q75"] < 0.3
    # With {5} alone in the second answer, its token 8 is outside.
    assert at(study["by_budget"], budget_nats=0.7)["tokens_outside_share"] == pytest.approx(1 / 3)


def test_default_budgets_go_from_the_loss_of_the_store_to_that_of_one_action(two_answers: Store, tmp_path: Path):
    budgets = [row["budget_nats"] for row in sparsity_study(two_answers, gamma=0.5)["by_budget"]]
    # Medians (0.0204 + 0.1646)/2 = 0.0925 and (0.6183 + 0.6146)/2 = 0.6164, to two digits.
    assert (budgets[0], budgets[-1], len(budgets)) == (0.093, 0.62, 6)
    assert budgets == sorted(budgets)
    certain = write_store(tmp_path / "certain", [answer("a", [1], "terminal", {1: 1.0})], 0.9, 3)
    assert sparsity_study(certain)["by_budget"] == []


def test_positions_by_hand(two_answers: Store, tmp_path: Path):
    rows = [row for row in sparsity_study(two_answers)["by_position"] if row["p"] == 0.9]
    assert rows == [
        {"p": 0.9, "first": 0, "last": 0, "num_states": 2, "mean": 2.5, "median": 2.5},
        {"p": 0.9, "first": 1, "last": 1, "num_states": 2, "mean": 2.0, "median": 2.0},
    ]
    # 18 states whose sets have 1, 2, 1, 2, … actions: bins 0, 1–3, 4–7, 8–15, 16–17.
    long = answer("a", [5] * 17 + [1], "terminal", *[{5: 0.95}, {5: 0.85, 1: 0.1}] * 9)
    store = write_store(tmp_path / "long", [long], 0.9, 3)
    rows = [row for row in sparsity_study(store)["by_position"] if row["p"] == 0.9]
    assert [(row["first"], row["last"], row["num_states"]) for row in rows] == [
        (0, 0, 1), (1, 3, 3), (4, 7, 4), (8, 15, 8), (16, 17, 2)
    ]  # fmt: skip
    np.testing.assert_allclose([row["mean"] for row in rows], [1, 5 / 3, 1.5, 1.5, 1.5])


def test_tokens_that_were_added_for_given_answers_are_not_actions_of_the_teacher(tmp_path: Path):
    # The token taken is: added after mass 0.93; added after the cap; the last of the teacher's own set; its first.
    sets = ({3: 0.93, 9: 0.001}, {3: 0.4, 4: 0.3, 9: 0.01}, {3: 0.5, 9: 0.45}, {1: 0.97})
    given = answer("a", [9, 9, 9, 1], "terminal", *sets, mass=[0.93, 0.7, 0.95, 0.97], source="given")
    store = write_store(tmp_path / "store", [given], 0.9, 2, mode="score")
    study = sparsity_study(store)
    row = at(study["by_p"], p=0.9)
    assert row["size"]["mean"] == (1 + 2 + 2 + 1) / 4
    assert row["size"]["max"] == 2
    assert row["tokens_outside_share"] == 0.5
    assert row["covered_mass"]["mean"] == pytest.approx((0.93 + 0.7 + 0.95 + 0.97) / 4)
    assert row["cut_share"] == 0.25
    assert sparsity(store)["set_size"][-1]["mean"] == 1.5  # type: ignore[index]
    assert any("given answers and no samples" in note for note in study["notes"])


def test_study_of_a_teachers_store_equals_the_reference(tiny_stores: dict[str, Store]):
    store, gamma = tiny_stores["train"], 0.9
    study = sparsity_study(store, gamma)
    trajectories = [store[row] for row in range(len(store))]
    states = [
        [t.sets.log_probs[a:b].tolist() for a, b in zip(t.sets.offsets[:-1], t.sets.offsets[1:], strict=True)]
        for t in trajectories
    ]
    for p in (0.5, 0.8, 0.95):
        for cap in (8, 16):
            sizes, masses, losses, outside = [], [], [], []
            for t, own in zip(trajectories, states, strict=True):
                kept = [len(s) if p == 0.95 else size_at(s, p) for s in own]
                kept = [min(k, cap) for k in kept]
                mass = [
                    float(whole) if k == len(s) else mass_of(s[:k])
                    for s, k, whole in zip(own, kept, t.sets.covered_mass, strict=True)
                ]
                sizes += kept
                masses += mass
                losses.append(losses_along(mass, gamma))
                for at_, token in enumerate(t.response_ids):
                    first = t.sets.offsets[at_]
                    outside.append(token not in t.sets.ids[first : first + kept[at_]])
            row = at(study["by_cap"], p=p, cap=cap)
            v_loss, q_loss = np.array(losses).T
            assert row["size"]["mean"] == np.mean(sizes) and row["size"]["max"] == max(sizes)
            assert row["tokens_outside_share"] == np.mean(outside)
            for name, values in (("covered_mass", masses), ("v_loss_nats", v_loss), ("q_loss_nats", q_loss)):
                wanted = [np.mean(values), *np.quantile(values, [0.25, 0.5, 0.75])]
                np.testing.assert_allclose([row[name][k] for k in ("mean", "q25", "median", "q75")], wanted, rtol=1e-9)
    assert study["num_trajectories"] == study["num_stored_trajectories"] == len(store)
    # The estimate stays below the bound where no cap cut a set.
    assert 0 < at(study["by_p"], p=0.5)["q_loss_nats"]["q75"] < at(study["by_p"], p=0.5)["kappa_nats"]


def test_budgets_on_a_teachers_store_take_as_few_slots_as_any_combination(tiny_stores: dict[str, Store]):
    # The first three actions of the first five states of each answer: at most 243 combinations.
    store, gamma, budget = tiny_stores["dev"], 0.9, 0.6
    found, wanted, whole = [], [], []
    for row in range(len(store)):
        sets = store[row].sets
        ends = zip(sets.offsets[:5], sets.offsets[1:6], strict=True)
        states = [sets.log_probs[start : min(stop, start + 3)] for start, stop in ends]
        sizes = [len(state) for state in states]
        short = replace(
            sets, offsets=np.concatenate([[0], np.cumsum(sizes)]), log_probs=np.concatenate(states).astype(np.float32)
        )
        found.append(int(budget_sizes(short, budget, gamma).sum()))
        whole.append(sum(sizes))
        wanted.append(fewest_slots([state.tolist() for state in states], budget, gamma) or whole[-1])
    assert found == wanted
    assert 0 < sum(few < all_ for few, all_ in zip(found, whole, strict=True)) < len(store)


def test_first_trajectories_only(tiny_stores: dict[str, Store]):
    study = sparsity_study(tiny_stores["train"], max_trajectories=7)
    assert (study["num_trajectories"], study["num_stored_trajectories"]) == (7, 60)
    assert study["num_states"] == sum(len(tiny_stores["train"][row].sets) for row in range(7))


def test_study_is_json_and_has_no_infinite_bound(tiny_stores: dict[str, Store]):
    study = sparsity_study(tiny_stores["dev"], gamma=1.0)
    assert json.loads(json.dumps(study, allow_nan=False)) == study
    assert [row["kappa_nats"] for row in study["by_p"]] == [None] * len(study["by_p"])


def test_nothing_above_p_max_is_reported(tiny_stores: dict[str, Store]):
    study = sparsity_study(tiny_stores["dev"])
    for part in ("by_p", "by_cap", "by_position", "set_size"):
        assert max(row["p"] for row in study[part]) == 0.95
    assert max(row["cap"] for row in study["by_cap"]) == 16
    assert max(row["k"] for row in study["top_k_mass"]) == 10


def test_a_store_without_sets_is_refused(tmp_path: Path):
    whole = answer("a", [5, 1], "terminal", {}, {}, mass=[1.0, 1.0])
    store = write_store(tmp_path / "store", [whole], 1.0, None)
    assert sparsity(store) is None
    with pytest.raises(StoreError, match=r"p_max = 1.*Capture with p_max below 1"):
        sparsity_study(store)


def test_numbers_outside_their_domain_are_refused_before_the_store_is_read(two_answers: Store):
    for shard in two_answers.path.glob("shard-*.parquet"):
        shard.unlink()
    with pytest.raises(DomainError, match="gamma"):
        sparsity_study(two_answers, gamma=1.5)
    with pytest.raises(DomainError, match="budget_nats"):
        sparsity_study(two_answers, budgets_nats=(0.0,))
