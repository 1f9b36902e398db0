"""Tables of docs/performance.md, from the JSON of ``tdistill bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = tuple[str, float, str]
"""What is compared, the figure, and how to show it."""


def performance_table(kind: str, content: dict[str, Any]) -> str:
    """Markdown table of one measurement."""
    rows = _ROWS[kind](content)
    lines = ["| | |", "|---|---:|", *(f"| {what} | {value:{form}} |" for what, value, form in rows)]
    absent = [f"\nNot measured: {name} ({why})." for name, why in content.get("absent", {}).items()]
    return "\n".join([*lines, *absent]) + "\n"


def step_rows(c: dict[str, Any]) -> list[Row]:
    """Seconds and ratios of ``tdistill bench step``."""
    body = c["body_s"]
    head, names = c["head"], [name for name in c if name.endswith("_s")]
    rows: list[Row] = [(f"`{name}`", c[name], ".3f") for name in names]
    rows += [(f"`{name}` / `body_s`", c[name] / body, ".3f") for name in names if name != "body_s"]
    rows += [
        (f"head alone, {name} / dense", head[f"{name}_s"] / head["dense_s"], ".3f")
        for name in ("candidates", "default")
    ]
    for size, whole in c["with_optimiser"].items():
        rows.append((f"whole step, default / SFT, {int(size):,} tokens", whole["bd_default_s"] / whole["sft_s"], ".2f"))
    if "trl_chunked_s" in c:
        rows += [
            (f"`{name}` / `trl_chunked_s`", c[name] / c["trl_chunked_s"], ".3f") for name in ("bd_s", "bd_default_s")
        ]
    small, large = (c["vocabulary"][size] for size in sorted(c["vocabulary"], key=int))
    for name in ("bd_s", "bd_default_s"):
        growth = (large[name] - large["body_s"]) - (small[name] - small["body_s"])
        rows.append((f"growth of `{name}` − `body_s` from 32k to 256k tokens, share of the body", growth / body, ".3f"))
    return rows


def memory_rows(c: dict[str, Any]) -> list[Row]:
    """Peaks and shares of ``tdistill bench memory``."""
    rows: list[Row] = []
    for size, peak in c["vocabulary"].items():
        above = {name: value - peak["body_bytes"] for name, value in peak.items()}
        label = f"{int(size):,} tokens"
        rows.append((f"{label}: body, MB", peak["body_bytes"] / 1e6, ".0f"))
        rows += [
            (f"{label}: {name.removesuffix('_bytes')} above the body, MB", value / 1e6, ".1f")
            for name, value in above.items()
            if name != "body_bytes"
        ]
        rows += [
            (f"{label}: {name} / SFT, above the body", above[f"{name}_bytes"] / above["sft_bytes"], ".3f")
            for name in ("bd", "bd_default")
        ]
    return rows


def scaling_rows(c: dict[str, Any]) -> list[Row]:
    """Line of ``tdistill bench scaling``."""
    rows: list[Row] = [(f"{tokens:,} tokens, s", s, ".3f") for tokens, s in zip(c["tokens"], c["step_s"], strict=True)]
    return [*rows, ("R² of a straight line", c["r_squared"], ".4f")]


_ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "step": step_rows,
    "memory": memory_rows,
    "scaling": scaling_rows,
}
