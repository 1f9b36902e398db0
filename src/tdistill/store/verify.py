"""The rules of docs/store-format.md as checks, of one trajectory and of a whole store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tdistill.errors import StoreCorruptError
from tdistill.store import codes, schema
from tdistill.store.read import Store, open_shard, read_header, read_jobs
from tdistill.types import Trajectory

# Room for float32 arithmetic of the teacher. Below the step of 16 bits, so a rise of one stored code is noticed.
_ROUNDING = 1e-4


def trajectory_problems(trajectory: Trajectory, identity: dict[str, Any]) -> list[str]:
    """Rules that a trajectory breaks, in words; an empty list when it breaks none.

    Args:
        trajectory: with exact or with dequantised log-probabilities.
        identity: identity of the store it is in, or is meant for.
    """
    t, sets = trajectory, trajectory.sets
    num_tokens, num_states = len(t.response_ids), len(sets)
    has_lists = identity["sampling"]["p_max"] < 1.0
    problems = []

    if num_tokens == 0:
        problems.append("the response is empty")
    if t.ends not in ("terminal", "truncated"):
        problems.append(f"ends is {t.ends!r}, not terminal or truncated")
    if t.source != {"generate": "teacher", "score": "given"}[identity["mode"]]:
        problems.append(f"source is {t.source!r} in a store of mode {identity['mode']!r}")
    if t.ends == "terminal" and num_tokens and int(t.response_ids[-1]) not in identity["end_token_ids"]:
        problems.append(f"a terminal response ends with {int(t.response_ids[-1])}, which is not an end token")
    if num_states != num_tokens and not (t.ends == "truncated" and num_states == num_tokens + 1):
        problems.append(f"{num_states} states for {num_tokens} response tokens ({t.ends})")
    if not len(sets.covered_mass) == len(sets.log_sum_exp) == num_states:
        problems.append(
            f"{num_states} set sizes, {len(sets.covered_mass)} covered masses, {len(sets.log_sum_exp)} log-sum-exps"
        )
    sizes = np.diff(sets.offsets)
    if sets.offsets[0] != 0 or (sizes < 0).any():
        problems.append("set offsets do not rise from 0")
    if not len(sets.ids) == len(sets.log_probs) == sets.offsets[-1]:
        problems.append(
            f"set sizes add up to {sets.offsets[-1]}, with {len(sets.ids)} ids and {len(sets.log_probs)} log-probs"
        )
    problems += _id_problems(t, identity["teacher"].get("vocab_size"))
    if not (np.isfinite(sets.covered_mass) & (sets.covered_mass >= 0) & (sets.covered_mass <= 1 + _ROUNDING)).all():
        problems.append("a covered mass lies outside [0, 1]")
    if not np.isfinite(sets.log_sum_exp).all():
        problems.append("a log-sum-exp is not finite")
    if not has_lists and len(sets.ids):
        problems.append(f"{len(sets.ids)} action slots in a store with p_max = 1, which keeps no lists")
    # The set checks index by offsets, so they need all of the above to be right.
    if problems or not has_lists:
        return problems
    return _set_problems(t, sizes, identity)


def _id_problems(trajectory: Trajectory, vocab_size: int | None) -> list[str]:
    problems = []
    for name, ids in (
        ("prompt", trajectory.prompt_ids),
        ("response", trajectory.response_ids),
        ("set", trajectory.sets.ids),
    ):
        if len(ids) and (ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size)):
            problems.append(f"a {name} id lies outside the vocabulary: {ids.min()} … {ids.max()}, size {vocab_size}")
    return problems


def _set_problems(trajectory: Trajectory, sizes: np.ndarray, identity: dict[str, Any]) -> list[str]:
    sets, bits, max_actions = trajectory.sets, identity["log_prob_bits"], identity["sampling"]["max_actions"]
    given = trajectory.source == "given"
    num_states, num_tokens = len(sizes), len(trajectory.response_ids)
    if (sizes == 0).any():
        return [f"the set of state {np.argmax(sizes == 0)} is empty"]
    problems = []
    if max_actions is not None and sizes.max() > max_actions + given:
        problems.append(f"the set of state {sizes.argmax()} has {sizes.max()} actions, above the cap of {max_actions}")

    log_probs, state_M = sets.log_probs.astype(np.float64), np.repeat(np.arange(num_states), sizes)
    if np.isnan(log_probs).any() or (log_probs > _ROUNDING).any():
        return [*problems, f"a log-probability is {log_probs.max()}: not a number, or above 0"]
    rising = (log_probs[1:] > log_probs[:-1] + _ROUNDING) & (state_M[1:] == state_M[:-1])
    if rising.any():
        problems.append(f"the log-probabilities of state {state_M[np.argmax(rising)]} rise")

    stride = int(max(sets.ids.max(), trajectory.response_ids.max())) + 1
    keys = np.sort(state_M * stride + sets.ids)
    if (repeated := keys[1:] == keys[:-1]).any():
        key = keys[np.argmax(repeated)]
        problems.append(f"the set of state {key // stride} holds the token {key % stride} twice")
    taken = ~np.isin(np.arange(num_tokens) * stride + trajectory.response_ids, keys)
    if taken.any():
        where = int(np.argmax(taken))
        problems.append(f"the taken token {trajectory.response_ids[where]} is not in the set of state {where}")

    # Mass that the list can stand for: every log-probability that has the same code.
    low_M, high_M = (np.exp(bound) for bound in codes.log_prob_bounds(log_probs, bits))
    mass = np.add.reduceat(np.exp(log_probs), sets.offsets[:-1])
    low, high = (np.add.reduceat(bound, sets.offsets[:-1]) for bound in (low_M, high_M))
    # A taken token that was added to the set of a given answer stands last and is not counted.
    added = np.zeros(num_states, dtype=bool)
    added[:num_tokens] = given & (sets.ids[sets.offsets[1 : num_tokens + 1] - 1] == trajectory.response_ids)
    low = low - np.where(added, low_M[sets.offsets[1:] - 1], 0.0)
    room = _ROUNDING + codes.mass_error(bits)
    outside = (sets.covered_mass < low - room) | (sets.covered_mass > high + room)
    if outside.any():
        where = int(np.argmax(outside))
        problems.append(f"state {where} records the mass {sets.covered_mass[where]}, its list has {mass[where]:.6f}")
    return problems


def verify_store(path: str | Path) -> list[str]:
    """Check every rule of the format; return what is wrong, in words, or an empty list.

    Raises:
        StoreIncompleteError: the folder holds shards and no manifest.
        StoreError: there is no store.
    """
    problems: list[str] = []
    try:
        store, row = Store.open(path, verify=True), 0
        index = store.index()
        if not index.schema.equals(schema.index_schema()):
            return [f"{store.manifest['index']['file']}: the columns are {index.schema.names}, or have other types"]
        for entry in store.shards:
            with open_shard(store.path / entry["file"]) as shard:
                problems += _shard_problems(shard, entry, store)
            rows = index.slice(row, entry["rows"]).to_pylist()
            counts = np.zeros(3, dtype=np.int64)
            for facts in rows:
                trajectory = store[row]
                place = f"{entry['file']}, answer {trajectory.answer_index} to {trajectory.prompt_id!r}"
                problems += [f"{place}: {problem}" for problem in trajectory_problems(trajectory, store.identity)]
                found = {
                    "prompt_id": trajectory.prompt_id,
                    "answer_index": trajectory.answer_index,
                    "prompt_tokens": len(trajectory.prompt_ids),
                    "response_tokens": len(trajectory.response_ids),
                }
                if found != facts:
                    lines = [f"{name} {facts[name]!r}" for name in found if found[name] != facts[name]]
                    problems.append(f"{place}: the index says {', '.join(lines)}")
                counts += [len(trajectory.response_ids), len(trajectory.sets), len(trajectory.sets.ids)]
                row += 1
            for name, count in zip(("response_tokens", "positions", "action_slots"), counts, strict=True):
                if entry[name] != count:
                    problems.append(f"{entry['file']}: {count} {name}, the manifest says {entry[name]}")
    except StoreCorruptError as error:
        return [*problems, str(error)]
    problems += _job_problems(store)
    for name, total in store.manifest["totals"].items():
        if name == "prompts":
            expected = len(set(index.column("prompt_id").to_pylist()))
        else:
            expected = len(store.shards) if name == "shards" else sum(entry[name] for entry in store.shards)
        if total != expected:
            problems.append(f"manifest: total {name} is {total}, which is not the sum over the shards, {expected}")
    return problems


def _shard_problems(shard: Any, entry: dict[str, Any], store: Store) -> list[str]:
    name, bits, has_lists = entry["file"], store.identity["log_prob_bits"], store.p_max < 1.0
    header = read_header(shard, name)
    problems = [f"{name}: {line}" for line in schema.identity_differences(header["identity"], store.identity)]
    if not shard.schema_arrow.equals(schema.arrow_schema(bits, has_lists)):
        problems.append(f"{name}: the columns are {shard.schema_arrow.names}, or have other types than the format says")
    if (found := shard.metadata.num_rows) != entry["rows"]:
        problems.append(f"{name}: {found} rows, the manifest says {entry['rows']}")
    for key in ("batch_size", "layout", "row_group_rows", "versions"):
        if header.get(key) != entry[key]:
            problems.append(f"{name}: its {key} is {header.get(key)}, the manifest says {entry[key]}")
    vocab_size = store.identity["teacher"].get("vocab_size")
    if has_lists and vocab_size is not None and header.get("num_ids") != vocab_size:
        problems.append(f"{name}: it numbers {header.get('num_ids')} ids of a vocabulary of {vocab_size}")
    if not name.endswith(f"-{entry['sha256'][:16]}.parquet"):
        problems.append(f"{name}: its name does not carry its checksum {entry['sha256'][:16]}")
    return problems


def _job_problems(store: Store) -> list[str]:
    problems = []
    seen: dict[tuple[str, int], str] = {}
    digests: dict[str, str] = {}
    for entry in store.shards:
        for prompt_id, answer_index, digest in read_jobs(store.path / entry["file"]):
            if (prompt_id, answer_index) in seen:
                first = seen[prompt_id, answer_index]
                problems.append(f"{entry['file']}: answer {answer_index} to {prompt_id!r} is also in {first}")
            if (other := digests.setdefault(prompt_id, digest)) != digest:
                problems.append(f"{entry['file']}: prompt {prompt_id!r} has the digests {other} and {digest}")
            seen.setdefault((prompt_id, answer_index), entry["file"])
    return problems
