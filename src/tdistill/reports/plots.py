"""Figures of a run as inline SVG text: the same input gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tdistill.reports.compare import Comparison
from tdistill.reports.load import Phase, Record, RunArtifacts, SetSize, Sparsity, TopKMass
from tdistill.reports.records import Scale, format_number, format_record, has_interval, scale_of
from tdistill.reports.tables import title_of

_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

# Matplotlib cannot name CSS's currentColor; this colour stands for it until the SVG text exists.
_INK = "#010203"

# From Okabe & Ito's colour-blind-safe palette, those with a contrast of at least 3 on both the light and the dark page.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#808080")
_LINES = ("-", "--", "-.", ":")

_WIDTH_IN, _ROW_IN = 7.2, 2.7  # 7.2 in is 691 CSS pixels

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and recoloured
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


class _Logged(NamedTuple):
    """What one phase logged of one quantity; ``order`` keeps a phase's colour the same in every figure."""

    order: int
    phase: Phase
    steps: list[float]
    values: list[float]


def loss_curves(artifacts: RunArtifacts) -> str | None:
    """Training loss over steps, one panel per phase (losses of different objectives have no common scale)."""
    lines = _logged(artifacts, "loss")
    if not lines:
        return None

    def draw(panels: Sequence[Axes]) -> None:
        for axes, (index, phase, steps, losses) in zip(panels, lines, strict=True):
            _line(axes, index, steps, losses, None)
            axes.set(title=f"{phase.name} ({phase.objective})", xlabel="step", ylabel="loss")

    description = f"First and last logged loss: {_first_and_last(lines)}."
    return _figure("loss", "Training loss of each phase", description, len(lines), draw)


def dev_kl_curves(artifacts: RunArtifacts) -> str | None:
    """KL on the dev prompts over the training budget; a phase begins where the phase it starts from ended."""
    keys = sorted({key for line in artifacts.metrics for key in line if key.startswith("eval_kl")})
    drawn = {key: lines for key in keys if (lines := _logged(artifacts, key))}
    if not drawn:
        return None
    phases = artifacts.results.summary.phases
    in_tokens = all(phase.steps and phase.response_tokens is not None for phase in phases)
    per_step = {p.name: p.response_tokens / p.steps if in_tokens and p.steps else 1.0 for p in phases}  # type: ignore[operator]
    begins: dict[str, float] = {}
    for phase in phases:
        # `init` names an earlier phase, or a model that no phase of this run trained.
        parent = next((p for p in phases if p.name == phase.init and p.name in begins), None)
        begins[phase.name] = begins[parent.name] + (parent.steps or 0) * per_step[parent.name] if parent else 0.0

    def draw(panels: Sequence[Axes]) -> None:
        for axes, (key, lines) in zip(panels, drawn.items(), strict=True):
            for index, phase, steps, values in lines:
                spent = [begins[phase.name] + step * per_step[phase.name] for step in steps]
                _line(axes, index, spent, values, phase.name)
            axes.set(title=key.removeprefix("eval_"), ylabel="nats per token")
            axes.set_xlabel("response tokens (steps × mean per step)" if in_tokens else "step")
            axes.legend()

    told = " ".join(f"{key}: {_first_and_last(lines)}." for key, lines in drawn.items())
    return _figure("dev-kl", "KL on the dev prompts", f"First and last. {told}", len(drawn), draw, columns=1)


def temporal_curves(artifacts: RunArtifacts) -> str | None:
    """Recovered reward and soft value over steps, for the phases that log them."""
    labels = {"recovered_reward": "recovered reward r, nats", "value": "soft value V, nats"}
    drawn = {label: lines for key, label in labels.items() if (lines := _logged(artifacts, key))}
    if not drawn:
        return None

    def draw(panels: Sequence[Axes]) -> None:
        for axes, (label, lines) in zip(panels, drawn.items(), strict=True):
            for index, phase, steps, values in lines:
                _line(axes, index, steps, values, phase.name)
            axes.set(xlabel="step", ylabel=label)
            axes.legend()

    told = " ".join(f"{label}: {_first_and_last(lines)}." for label, lines in drawn.items())
    return _figure("temporal", "Recovered reward and value", f"First and last. {told}", len(drawn), draw)


def sparsity_chart(sparsity: Sparsity | None) -> str | None:
    """Teacher mass of the top k tokens, and sizes of the sets A_p."""
    if sparsity is None or not (sparsity.top_k_mass or sparsity.set_size):
        return None
    masses = sorted(sparsity.top_k_mass, key=lambda entry: entry.k)
    sizes = sorted(sparsity.set_size, key=lambda entry: entry.p)

    panels: list[Callable[[Axes], None]] = []
    if masses:
        panels.append(lambda axes: _top_k_mass(axes, masses))
    if sizes:
        panels.append(lambda axes: _set_sizes(axes, sizes))

    def draw(axes_list: Sequence[Axes]) -> None:
        for axes, drawing in zip(axes_list, panels, strict=True):
            drawing(axes)

    told = [f"the top {entry.k} hold {format_number(100 * entry.mean)} %" for entry in masses]
    told += [f"at p = {entry.p:g} a set has {format_number(entry.mean)} actions on average" for entry in sizes]
    return _figure("sparsity", "Sparsity of the teacher", f"On the stored states {'; '.join(told)}.", len(panels), draw)


def sparsity_study_chart(study: Mapping[str, Any]) -> str:
    """What a choice of p rests on: mass of the top k, sizes by p and by position, κ(p) beside the estimate.

    Args:
        study: what ``tdistill check sparsity STORE --json`` prints.
    """
    sparsity = Sparsity.model_validate({key: study[key] for key in ("num_states", "top_k_mass", "set_size")})
    by_p, by_position = study["by_p"], study["by_position"]

    def draw_positions(axes: Axes) -> None:
        masses = list(dict.fromkeys(row["p"] for row in by_position))
        # Evenly spaced in rank, the largest p first, as many as there are line styles.
        chosen = [masses[-1 - i * len(masses) // len(_LINES)] for i in range(len(_LINES))]
        for index, p in enumerate(dict.fromkeys(chosen)):
            means = [row["mean"] for row in by_position if row["p"] == p]
            _line(axes, index, range(len(means)), means, f"p = {p:g}")
        firsts = list(dict.fromkeys(row["first"] for row in by_position))
        axes.set_xticks(range(len(firsts)), [f"{first}" for first in firsts])
        axes.set_yscale("log", base=2)
        axes.set(xlabel="position in the answer, first of its bin", ylabel="mean actions in A_p")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    def draw_loss(axes: Axes) -> None:
        finite = [row for row in by_p if row["kappa_nats"] is not None]
        if finite:
            _line(axes, 0, [row["p"] for row in finite], [row["kappa_nats"] for row in finite], "bound κ(p)")
        low, median, high = ([row["q_loss_nats"][name] for row in by_p] for name in ("q25", "median", "q75"))
        masses = [row["p"] for row in by_p]
        _line(axes, 1, masses, median, "estimate, median")
        axes.fill_between(masses, low, high, color=_COLOURS[1], alpha=0.25, linewidth=0, label="estimate, quartiles")
        axes.set(ylim=(0, None), xlabel="p", ylabel="loss of value, nats")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    def draw(panels: Sequence[Axes]) -> None:
        _top_k_mass(panels[0], sparsity.top_k_mass)
        _set_sizes(panels[1], sparsity.set_size)
        draw_positions(panels[2])
        draw_loss(panels[3])

    told = "; ".join(
        f"at p = {row['p']:g} a set has {format_number(row['size']['mean'])} actions on average and the median loss of "
        f"value is {format_number(row['q_loss_nats']['median'])} nats"
        + (f", bound {format_number(row['kappa_nats'])}" if row["kappa_nats"] is not None else "")
        for row in by_p
    )
    return _figure("sparsity-study", "Choice of p", f"On the stored states {told}.", 4, draw)


def comparison_chart(comparison: Comparison, metric: str, cost: str | None = None) -> str:
    """One metric of every row with its interval, its difference to the baseline, and its value over a cost.

    Args:
        comparison: with at least one record of the metric, and of the cost.
        metric: drawn.
        cost: drawn along the x axis of a last panel, or None.
    """
    values = {row.label: r for row in comparison.rows if (r := comparison.find(metric, row.label)) is not None}
    scale, best = scale_of([*values.values()]), comparison.best.get(metric)
    leading = () if best is None else (best.label, *best.not_separable)
    other = comparison.against
    differences = {label: r for label in values if (r := comparison.find(metric, label, other)) is not None}
    name = f"{title_of(metric)}, {scale.unit}".rstrip(", ")
    drawings: list[Callable[[Axes], None]] = []

    def draw_values(axes: Axes) -> None:
        _intervals(axes, values, scale, leading)
        axes.set_xlabel(name)

    def draw_differences(axes: Axes) -> None:
        _intervals(axes, differences, scale, leading)
        axes.axvline(0, color=_INK, linestyle="--", linewidth=1)
        axes.set_xlabel(f"{name}, difference to {other}")

    def draw_cost(axes: Axes) -> None:
        costs = {label: r for label in values if (r := comparison.find(cost or "", label)) is not None}
        cost_scale = scale_of([*costs.values()])
        for label, record in costs.items():
            x, y = record.value * cost_scale.factor, values[label].value * scale.factor  # type: ignore[operator]
            colour = _COLOURS[0 if label in leading else -1]
            axes.plot([x], [y], "o", color=colour, markerfacecolor=colour if label in leading else "none")
            if has_interval(values[label]):
                low, high = values[label].low, values[label].high
                axes.plot([x, x], [low * scale.factor, high * scale.factor], color=colour)  # type: ignore[operator]
            axes.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.margins(x=0.15)  # room for the names
        axes.set(xlabel=f"{title_of(cost or '')}, {cost_scale.unit}", ylabel=name)

    drawings.append(draw_values)
    if other is not None and differences:
        drawings.append(draw_differences)
    if cost is not None:
        drawings.append(draw_cost)

    def draw(panels: Sequence[Axes]) -> None:
        for axes, drawing in zip(panels, drawings, strict=True):
            drawing(axes)

    told = "; ".join(f"{label} {format_record(record, scale)}" for label, record in values.items())
    height = max(_ROW_IN, 0.8 + 0.25 * len(values))
    return _figure("comparison", title_of(metric), f"{name}: {told}.", len(drawings), draw, columns=1, row_in=height)


def curves_chart(
    name: str, title: str, x_label: str, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> str:
    """Labelled curves, a panel for each quantity.

    Args:
        name: prefix of the ids in the SVG.
        title: of the figure.
        x_label: what all panels are drawn over.
        panels: quantity → label → x and y; a label has the same line in every panel that lists it at the same place.
    """

    def draw(axes_list: Sequence[Axes]) -> None:
        for axes, (quantity, curves) in zip(axes_list, panels.items(), strict=True):
            for index, (label, (x, y)) in enumerate(curves.items()):
                _line(axes, index, x, y, label)
            axes.set(xlabel=x_label, ylabel=quantity)
        # Below the panels: beside long labels there is no room for curves.
        whole = axes_list[0].get_figure()
        assert isinstance(whole, Figure)
        whole.legend(*axes_list[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)

    told = "; ".join(
        f"{quantity}, {label}: {', '.join(map(format_number, y))} at {', '.join(map(format_number, x))}"
        for quantity, curves in panels.items()
        for label, (x, y) in curves.items()
    )
    return _figure(name, title, f"Over {x_label}. {told}.", len(panels), draw)


def _intervals(axes: Axes, records: Mapping[str, Record], scale: Scale, leading: Sequence[str]) -> None:
    """A point and an interval for each label, the first on top; those that lead are filled."""
    for index, (label, record) in enumerate(records.items()):
        colour, y = _COLOURS[0 if label in leading else -1], len(records) - 1 - index
        if has_interval(record):
            axes.plot([record.low * scale.factor, record.high * scale.factor], [y, y], color=colour)  # type: ignore[operator]
        filled = colour if label in leading else "none"
        axes.plot([record.value * scale.factor], [y], "o", color=colour, markerfacecolor=filled)  # type: ignore[operator]
    axes.set_yticks(range(len(records)), [*records][::-1])
    axes.set_ylim(-0.6, len(records) - 0.4)


def _top_k_mass(axes: Axes, masses: Sequence[TopKMass]) -> None:
    _line(axes, 0, [entry.k for entry in masses], [entry.mean for entry in masses], None)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="k", ylabel="mean mass of the top k tokens")
    axes.set_xticks([e.k for e in masses], [str(e.k) for e in masses], minor=False)
    axes.minorticks_off()


def _set_sizes(axes: Axes, sizes: Sequence[SetSize]) -> None:
    for index, (field, label) in enumerate(
        [("mean", "mean"), ("median", "median"), ("p99", "99th percentile"), ("max", "maximum")]
    ):
        points = [(entry.p, size) for entry in sizes if (size := getattr(entry, field)) is not None]
        if points:
            _line(axes, index, [p for p, _ in points], [size for _, size in points], label)
    axes.set(yscale="log", xlabel="p", ylabel="actions in A_p")
    # The default labels of a log axis are mathtext, which is off because phase names may hold a dollar sign.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _logged(artifacts: RunArtifacts, key: str) -> list[_Logged]:
    """(phase, steps, values) for every phase that logged ``key``."""
    found = []
    for index, phase in enumerate(artifacts.results.summary.phases):
        points = [
            (line["step"], line[key]) for line in artifacts.metrics if line["phase"] == phase.name and key in line
        ]
        points = [(step, value) for step, value in points if isinstance(value, int | float)]
        if points:
            found.append(_Logged(index, phase, [step for step, _ in points], [value for _, value in points]))
    return found


def _first_and_last(lines: Sequence[_Logged]) -> str:
    return "; ".join(
        f"{line.phase.name} {format_number(line.values[0])} to {format_number(line.values[-1])}" for line in lines
    )


def _line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float], label: str | None) -> None:
    axes.plot(
        x,
        y,
        label=label,
        color=_COLOURS[index % len(_COLOURS)],
        linestyle=_LINES[index % len(_LINES)],  # colour is never the only sign
        marker="o" if len(x) <= 20 else None,
    )


def _figure(
    name: str,
    title: str,
    description: str,
    num_panels: int,
    draw: Callable[[Sequence[Axes]], None],
    columns: int = 2,
    row_in: float = _ROW_IN,
) -> str:
    """Draw on ``num_panels`` axes and return one SVG element with a title and a description."""
    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(_WIDTH_IN, row_in * rows), layout="constrained")
        panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[num_panels:]:
            axes.set_axis_off()
        draw(panels[:num_panels])
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return _inline(text.getvalue(), name, title, description)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """Make a stand-alone SVG fit for a page: ids of its own, the page's ink, a name for screen readers."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                value = f"{name}-{value}"
            elif attribute.endswith("href"):
                value = value.replace("#", f"#{name}-", 1)
            else:
                value = value.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")
            element.set(attribute, value)
    for tag, content in (("desc", description), ("title", title)):
        child = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        child.text = content
        root.insert(0, child)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    return ElementTree.tostring(root, encoding="unicode")
