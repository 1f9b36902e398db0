from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tdistill.reports import plots
from tdistill.reports.load import RunArtifacts, load_run

SVG = "{http://www.w3.org/2000/svg}"


def figures(artifacts: RunArtifacts) -> dict[str, str | None]:
    return {
        "loss": plots.loss_curves(artifacts),
        "dev-kl": plots.dev_kl_curves(artifacts),
        "temporal": plots.temporal_curves(artifacts),
        "sparsity": plots.sparsity_chart(artifacts.results.sparsity),
    }


def texts(svg: str) -> set[str]:
    return {"".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def test_svg_is_well_formed_named_and_has_ids_of_its_own(run_folder: Path) -> None:
    seen: set[str] = set()
    for name, svg in figures(load_run(run_folder)).items():
        assert svg is not None and svg.startswith("<svg")
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)) and not seen & set(ids)
        seen |= set(ids)
        labelled_by = root.get("aria-labelledby", "").split()
        assert labelled_by == [f"{name}-title", f"{name}-desc"] and set(labelled_by) <= set(ids)
        references = re.findall(r"url\(#([^)]*)\)", svg) + re.findall(r'href="#([^"]*)"', svg)
        assert references and set(references) <= set(ids)
        assert "#010203" not in svg and "currentColor" in svg
        assert 600 < float(root.get("width", "").removesuffix("pt")) * 96 / 72 <= 700


def test_what_the_figures_show(run_folder: Path) -> None:
    drawn = figures(load_run(run_folder))
    assert {"sft (sft)", "bd (iq_learn)", "sft_continued (sft)"} <= texts(drawn["loss"] or "")
    assert {"sft", "bd", "sft_continued", "response tokens (steps × mean per step)"} <= texts(drawn["dev-kl"] or "")
    assert "sft_continued" not in texts(drawn["temporal"] or "")
    assert "the top 7 hold 81 %" in (drawn["sparsity"] or "")
    assert {"1", "10", "100", "1000"} <= texts(drawn["sparsity"] or "")
    assert not any("$" in text for svg in drawn.values() for text in texts(svg or ""))
    assert "bd 2.800 to 2.200" in (drawn["loss"] or "")  # 3 − 10/50 and 3 − 40/50


def test_a_phase_begins_where_its_parent_ended(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: dict[str | None, list[float]] = {}

    def note(axes, index, x, y, label) -> None:
        spent[label] = list(x)
        axes.plot(x, y, label=label)

    monkeypatch.setattr(plots, "_line", note)
    plots.dev_kl_curves(load_run(run_folder))
    # 30,000 tokens in 60 steps of sft, then 20,000 in 40 steps: 500 a step in both; both children start at 30,000.
    assert spent == {
        "sft": [10_000, 20_000, 30_000],
        "bd": [40_000, 50_000],
        "sft_continued": [40_000, 50_000],
    }


def test_nothing_logged_gives_no_figure(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").write_text('{"phase": "sft", "step": 1, "learning_rate": 0.1}\n')
    drawn = figures(load_run(run_folder))
    assert {name for name, svg in drawn.items() if svg} == {"sparsity"}
    assert plots.sparsity_chart(None) is None


def test_a_diverged_loss_and_a_hostile_phase_name_are_drawn_as_they_are(run_folder: Path) -> None:
    path = run_folder / "results.json"
    content = json.loads(path.read_text())
    content["summary"]["phases"][0]["name"] = "<script>$x^2$</script>"
    path.write_text(json.dumps(content))
    lines = [{"phase": "<script>$x^2$</script>", "step": s, "loss": x} for s, x in enumerate((1.0, 2.0, float("nan")))]
    (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    svg = plots.loss_curves(load_run(run_folder))
    assert svg is not None and "<script>" not in svg
    assert "<script>$x^2$</script> (sft)" in texts(svg)
    assert "to not finite" in svg


def test_same_bytes_in_another_process_whatever_its_matplotlibrc(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nfont.size: 30\n")
    code = (
        "import sys; from pathlib import Path; from tdistill.reports import plots; "
        "from tdistill.reports.load import load_run; a = load_run(Path(sys.argv[1])); "
        "sys.stdout.buffer.write((plots.loss_curves(a) + plots.sparsity_chart(a.results.sparsity)).encode())"
    )
    there = subprocess.run([sys.executable, "-c", code, run_folder], cwd=tmp_path, capture_output=True, check=True)
    here = figures(load_run(run_folder))
    assert there.stdout.decode() == (here["loss"] or "") + (here["sparsity"] or "")


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_have_contrast_on_the_light_and_the_dark_page() -> None:
    css = (Path(plots.__file__).parent / "templates" / "report.css").read_text()
    papers = re.findall(r"--paper: (#[0-9a-f]{6})", css)
    assert len(papers) == 2
    for colour in plots._COLOURS:
        for paper in papers:
            dark, light = sorted((luminance(colour), luminance(paper)))
            assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11: graphical objects
