"""Tables of docs/performance.md, from the JSON of ``tdistill bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


def store_rows(c: dict[str, Any]) -> list[Row]:
    """Sizes and speeds of ``tdistill bench store``."""
    own, reading = c["store"], c["reading"]
    rows: list[Row] = [("actions of a set, mean", c["mean_set_size"], ".1f")]
    rows.append((f"bytes per response token, {own['log_prob_bits']}-bit log-probabilities", own[_BYTES], ".1f"))
    rows += [(f"p {r['p']:g}, cap {r['cap']}, {r['log_prob_bits']} bits: bytes per response token", r[_BYTES], ".1f")
             for r in c["by_p_and_cap"]]  # fmt: skip
    for bits, error in c["log_prob_error"].items():
        rows.append((f"{bits} bits: largest error of a log-probability, nats", error["max_error_nats"], ".5f"))
        rows.append((f"{bits} bits: mean KL of a set to the stored one, nats", error["mean_kl_of_set_nats"], ".2g"))
    for p in c["padding"]:
        what = f"{p['shard_prompts']} prompts to a shard, {p['batch_size']} answers at once: padded share of prompts"
        rows.append((what, p["share"], ".3f"))
    rows.append(("response tokens read per second, one core", reading["response_tokens_per_s"], ",.0f"))
    for opened in c["opening"]:
        label = f"{opened['response_tokens']:,} response tokens, {opened['store_bytes'] / 1e6:,.0f} MB"
        rows.append((f"{label}: open, s", opened["open_s"], ".3f"))
        rows.append((f"{label}: to the first batch, s", opened["first_batch_s"], ".2f"))
        rows.append((f"{label}: memory above the start, MB",
                     (opened["peak_rss_bytes"] - opened["start_rss_bytes"]) / 1e6, ",.0f"))  # fmt: skip
    return rows


def capture_rows(c: dict[str, Any]) -> list[Row]:
    """Times and ratios of ``tdistill bench capture``."""
    rows: list[Row] = [(f"`{name}`", value, ".2f") for name, value in c.items() if name.endswith("_s")]
    rows += [(f"`{name}`", value, ".3f") for name, value in c.items() if "_per_" in name and not name.endswith("_s")]
    rows.append(("share of decoded rows whose answer had ended", c["wasted_row_steps"], ".3f"))
    return [*rows, ("R² of a straight line over the number of prompts", c["growth"]["r_squared"], ".4f")]


def accuracy_rows(c: dict[str, Any]) -> list[Row]:
    """Errors of ``tdistill bench accuracy``."""
    return [
        (f"{name}, {what}: {key}", c[name][what][key], ".3g" if key != "ratio" else ".2f")
        for name in ("bare", "default")
        for what in ("loss", "hidden", "matrix")
        for key in ("candidates", "dense", "ratio")
    ]


_BYTES = "bytes_per_response_token"
_ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "step": step_rows,
    "memory": memory_rows,
    "scaling": scaling_rows,
    "accuracy": accuracy_rows,
    "store": store_rows,
    "capture": capture_rows,
}


class Bar(NamedTuple):
    """One line of the list of bars.

    Attributes:
        what: what is compared.
        value: the figure.
        limit: the bar.
        least: whether the figure has to reach the bar, not to stay under it.
    """

    what: str
    value: float
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.value >= self.limit if self.least else self.value <= self.limit


def bars(found: dict[str, dict[str, Any]]) -> list[Bar]:
    """What is aimed at, and what was measured, from the contents of the JSON files by kind."""
    lines: list[Bar] = []
    if c := found.get("step"):
        body, head = c["body_s"], c["head"]
        for name, what, limit in (
            ("bd_s", "bare", 1.08),
            ("bd_default_s", "default", 1.20),
            ("bd_uncapped_s", "bare, no cap", 1.12),
        ):
            lines.append(Bar(f"step / body, {what}", c[name] / body, limit))
        lines.append(Bar("head alone / dense head, bare", head["candidates_s"] / head["dense_s"], 0.08))
        lines.append(Bar("head alone / dense head, default", head["default_s"] / head["dense_s"], 0.25))
        for limit, (size, whole) in zip((0.70, 0.40), c["with_optimiser"].items(), strict=True):
            what = f"step with optimiser / SFT, default, {int(size):,} tokens"
            lines.append(Bar(what, whole["bd_default_s"] / whole["sft_s"], limit))
        if "trl_chunked_s" in c:
            for name, what, limit in (("bd_s", "bare", 0.25), ("bd_default_s", "default", 0.28)):
                lines.append(Bar(f"step / TRL chunked, live teacher, {what}", c[name] / c["trl_chunked_s"], limit))
        small, large = (c["vocabulary"][size] for size in sorted(c["vocabulary"], key=int))
        for name, what in (("bd_s", "bare"), ("bd_default_s", "default")):
            growth = (large[name] - large["body_s"]) - (small[name] - small["body_s"])
            lines.append(Bar(f"growth of step − body from 32k to 256k tokens / body, {what}", growth / body, 0.05))
    if c := found.get("memory"):
        for size, peak in c["vocabulary"].items():
            for name, what in (("bd_bytes", "bare"), ("bd_default_bytes", "default")):
                share = (peak[name] - peak["body_bytes"]) / (peak["sft_bytes"] - peak["body_bytes"])
                lines.append(Bar(f"memory above the body / SFT's, {what}, {int(size):,} tokens", share, 0.3))
        sizes = sorted(c["vocabulary"], key=int)
        ends = [c["vocabulary"][size] for size in (sizes[0], sizes[-1])]
        for name, what in (("bd_bytes", "bare"), ("bd_default_bytes", "default")):
            grown, of_sft = (
                (ends[1][key] - ends[1]["body_bytes"]) - (ends[0][key] - ends[0]["body_bytes"])
                for key in (name, "sft_bytes")
            )
            what = (
                f"growth of memory above the body from {int(sizes[0]):,} to {int(sizes[-1]):,} tokens / SFT's, {what}"
            )
            lines.append(Bar(what, grown / of_sft, 0.05))
    if c := found.get("accuracy"):
        for name in ("bare", "default"):
            worst = max(errors["ratio"] for errors in c[name].values())
            lines.append(Bar(f"error of loss and gradients against float64 / dense float32's, {name}", worst, 2.0))
    if c := found.get("store"):
        for row in c["by_p_and_cap"]:
            if (row["p"], row["cap"], row["log_prob_bits"]) == (0.8, 64, 8):
                lines.append(Bar("bytes per response token, p 0.8, cap 64, 8 bits, one shard", row[_BYTES], 28))
        speed = c["reading"]["response_tokens_per_s"]
        lines.append(Bar("response tokens read per second, one core", speed, 200_000, least=True))
        times = [row["open_s"] for row in c["opening"]]
        lines.append(Bar("time to open: largest store / smallest", times[-1] / times[0], 2.0))
    if c := found.get("capture"):
        lines.append(Bar("capture / plain generate", c["capture_per_plain_generate"], 1.05))
        lines.append(Bar("capture over prompts: R²", c["growth"]["r_squared"], 0.99, least=True))
    if c := found.get("scaling"):
        lines.append(Bar("step over tokens: R²", c["r_squared"], 0.99, least=True))
    return lines


def bars_table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown table of :func:`bars`."""
    lines = ["| | bar | measured | met |", "|---|---:|---:|---|"]
    for bar in bars(found):
        sign = "≥" if bar.least else "≤"
        lines.append(f"| {bar.what} | {sign} {bar.limit:,g} | {bar.value:,.4g} | {'yes' if bar.met else '**no**'} |")
    return "\n".join(lines) + "\n"


def headline(found: dict[str, dict[str, Any]]) -> str:
    """Markdown table of what the default recipe costs, for the README."""
    shown = [bar for bar in bars(found) if "default" in bar.what and (" / SFT" in bar.what or "TRL" in bar.what)]
    lines = ["| the default recipe | ratio |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {bar.what.replace(', default', '')} | {bar.value:.2f} |" for bar in shown)]) + "\n"
