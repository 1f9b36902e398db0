"""A study of sparsity as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tdistill.reports.records import MISSING, format_number

_SIZE = ("mean", "median", "p99", "max")
_SPREAD = ("mean", "q25", "median", "q75")


def study_text(study: Mapping[str, Any]) -> str:
    """The tables of one study, narrower than 100 columns, and what limits their numbers.

    Args:
        study: what ``tdistill check sparsity STORE --json`` prints.
    """
    cap = "no cap" if study["cap"] is None else f"cap {study['cap']}"
    head = (
        f"{study['num_trajectories']:,} of {study['num_stored_trajectories']:,} trajectories, "
        f"{study['num_states']:,} states; p_max {study['p_max']:g}, {cap}, mode {study['mode']}; "
        f"γ {study['gamma']:g}; {_percent(study['truncated_share'])} % truncated"
    )
    masses = study["top_k_mass"]
    by_p, by_cap, by_budget, on_disk = study["by_p"], study["by_cap"], study["by_budget"], study["bytes"]
    blocks = [
        [head],
        _block("Mass of the top k", ["k", *(str(row["k"]) for row in masses)],
               [["mass", *(f"{row['mean']:.3f}" for row in masses)]]),
        _block("Sets A_p: size, covered mass Z, states that the cap cut (%), taken tokens outside (%)",
               ["p", *_SIZE, *(f"Z {name}" for name in _SPREAD), "cut", "outside"],
               [[f"{row['p']:g}", *_numbers(row["size"], _SIZE), *(f"{row['covered_mass'][n]:.3f}" for n in _SPREAD),
                 _percent(row["cut_share"]), _percent(row["tokens_outside_share"])] for row in by_p]),
        _block("Loss of value (nats): bound κ(p), and estimates over trajectories, of Q (k ≥ 1) and V (t ≥ 0)",
               ["p", "κ(p)", *(f"Q {name}" for name in _SPREAD), *(f"V {name}" for name in _SPREAD)],
               [[f"{row['p']:g}", _number(row["kappa_nats"]), *_numbers(row["q_loss_nats"], _SPREAD),
                 *_numbers(row["v_loss_nats"], _SPREAD)] for row in by_p]),
        _block("Budgets (nats): smallest sets with V loss within it; trajectories that cannot meet it (%)",
               ["budget", *_SIZE, "V median", "unmet", "outside", "bytes/token"],
               [[f"{row['budget_nats']:g}", *_numbers(row["size"], _SIZE), _number(row["v_loss_nats"]["median"]),
                 _percent(row["unmet_share"]), _percent(row["tokens_outside_share"]), _number(row["bytes_per_token"])]
                for row in by_budget]),
        _by_position(study["by_position"]),
        _by_cap("Bytes per token, uncompressed, by p and cap", by_cap, lambda row: _number(row["bytes_per_token"])),
        _by_cap("States that the cap cut (%), by p and cap", by_cap, lambda row: _percent(row["cut_share"])),
        [f"On disk: {_number(on_disk['on_disk_per_token'])} bytes per token, compressed, with the prompts "
         f"({_number(on_disk['prompts_per_token'])} uncompressed)."],
        [f"- {note}" for note in study["notes"]],
    ]  # fmt: skip
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _by_position(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    masses = list(dict.fromkeys(row["p"] for row in rows))
    bins = list(dict.fromkeys((row["first"], row["last"], row["num_states"]) for row in rows))
    mean = {(row["first"], row["p"]): row["mean"] for row in rows}
    return _block(
        "Mean size of A_p by position in the answer",
        ["position", "states", *(f"p = {p:g}" for p in masses)],
        [
            [
                str(first) if first == last else f"{first}–{last}",
                _number(num_states),
                *(_number(mean[first, p]) for p in masses),
            ]
            for first, last, num_states in bins
        ],
    )


def _by_cap(title: str, rows: Sequence[Mapping[str, Any]], cell: Callable[[Any], str]) -> list[str]:
    caps = list(dict.fromkeys(row["cap"] for row in rows))
    found = {(row["p"], row["cap"]): cell(row) for row in rows}
    header = ["p", *("none" if cap is None else str(cap) for cap in caps)]
    return _block(
        title, header, [[f"{p:g}", *(found[p, cap] for cap in caps)] for p in dict.fromkeys(p for p, _ in found)]
    )


def _block(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [title, *("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)]


def _numbers(values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [_number(values[name]) for name in names]


def _number(value: float | None) -> str:
    return MISSING if value is None else format_number(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
