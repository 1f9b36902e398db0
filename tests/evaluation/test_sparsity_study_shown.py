"""The study as text and as a figure."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from tdistill.evaluation.sparsity import sparsity_study
from tdistill.reports import plots
from tdistill.reports.records import format_number
from tdistill.reports.sparsity import study_text
from tdistill.store import Store


@pytest.fixture(scope="module")
def study(tiny_stores: dict[str, Store]) -> dict[str, Any]:
    return sparsity_study(tiny_stores["train"])


def block(text: str, title: str) -> list[list[str]]:
    [found] = [part for part in text.split("\n\n") if part.startswith(title)]
    return [line.split() for line in found.splitlines()[1:]]


def test_text_holds_the_numbers_of_the_study(study: dict[str, Any]):
    text = study_text(study)
    sets = block(text, "Sets A_p")
    assert [line[0] for line in sets[1:]] == [f"{row['p']:g}" for row in study["by_p"]]
    assert [line[1] for line in sets[1:]] == [format_number(row["size"]["mean"]) for row in study["by_p"]]
    losses = block(text, "Loss of value")
    assert losses[0][:2] == ["p", "κ(p)"]
    for line, row in zip(losses[1:], study["by_p"], strict=True):
        spread = [row[name][k] for name in ("q_loss_nats", "v_loss_nats") for k in ("mean", "q25", "median", "q75")]
        assert line[1:] == [format_number(value) for value in (row["kappa_nats"], *spread)]
    assert [line[0] for line in block(text, "Budgets")[1:]] == [f"{r['budget_nats']:g}" for r in study["by_budget"]]
    positions = block(text, "Mean size of A_p by position")
    assert [line[0] for line in positions[1:]] == ["0", "1–3", "4–7", "8–15", "16"]
    assert positions[1][2] == format_number(study["by_position"][0]["mean"])
    costs = block(text, "Bytes per token")
    assert costs[0] == ["p", "8", "16"]
    assert [line[1:] for line in costs[1:]] == [
        [format_number(row["bytes_per_token"]) for row in study["by_cap"] if row["p"] == p]
        for p in dict.fromkeys(row["p"] for row in study["by_cap"])
    ]
    assert all(f"- {note}" in text for note in study["notes"])
    tables = text[: text.index("- ")]
    assert max(map(len, tables.splitlines())) <= 100


def test_text_where_the_bound_is_infinite_and_no_budget_says_anything(tiny_stores: dict[str, Store]):
    study = sparsity_study(tiny_stores["dev"], gamma=1.0, budgets_nats=())
    text = study_text(study)
    assert "Budgets" not in text
    assert {line[1] for line in block(text, "Loss of value")[1:]} == {"–"}


def drawn(study: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str | None, tuple[list, list]]]:
    lines: dict[str | None, tuple[list, list]] = {}
    draw = plots._line

    def note(axes, index, x, y, label) -> None:
        lines[label] = (list(x), list(y))
        draw(axes, index, x, y, label)

    monkeypatch.setattr(plots, "_line", note)
    return plots.sparsity_study_chart(study), lines


def test_figure_shows_the_study(study: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    svg, lines = drawn(study, monkeypatch)
    masses = [row["p"] for row in study["by_p"]]
    assert lines[None] == ([row["k"] for row in study["top_k_mass"]], [row["mean"] for row in study["top_k_mass"]])
    assert lines["mean"] == (masses, [row["size"]["mean"] for row in study["by_p"]])
    assert lines["bound κ(p)"] == (masses, [row["kappa_nats"] for row in study["by_p"]])
    assert lines["estimate, median"] == (masses, [row["q_loss_nats"]["median"] for row in study["by_p"]])
    assert lines["p = 0.95"][1] == [row["mean"] for row in study["by_position"] if row["p"] == 0.95]
    assert len([label for label in lines if label and label.startswith("p = ")]) == 4
    root = ElementTree.fromstring(svg)
    texts = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"bound κ(p)", "estimate, median", "estimate, quartiles", "p = 0.95", "loss of value, nats"} <= texts
    assert "sparsity-study-title" in root.get("aria-labelledby", "")
    assert f"bound {format_number(study['by_p'][0]['kappa_nats'])}" in svg


def test_figure_without_a_finite_bound_shows_the_estimate_alone(
    tiny_stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
):
    svg, lines = drawn(sparsity_study(tiny_stores["dev"], gamma=1.0), monkeypatch)
    assert "bound κ(p)" not in lines and "estimate, median" in lines
    assert "bound" not in svg
