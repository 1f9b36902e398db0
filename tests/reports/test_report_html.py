from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import EVIL

from tdistill import files
from tdistill.reports.html import write_report
from tdistill.reports.load import load_run


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture
def html(run_folder: Path) -> str:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_other_peoples_text_is_escaped(html: str) -> None:
    page = Page(html)
    assert not page.named("script") and not page.named("img") and not page.named("b")
    assert page.text.count(EVIL) == 2 * 14  # once as a prompt and once as an answer, however many there are
    assert "note: <b>bold</b>" in page.text  # the recipe


def test_nothing_is_loaded_from_outside(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"link", "script", "iframe", "object", "embed", "img", "base"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                assert value is not None and value.startswith("#"), (tag, name, value)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_subject_and_interval_appears(html: str) -> None:
    text = Page(html).text
    for subject in ("teacher", "start", "sft", "bd (final)", "sft_continued (control)"):
        assert subject in text
    for number in (
        "5.00 [4.60, 5.40]", "1.30 [1.20, 1.40]", "1.00 [0.90, 1.10]", "1.10 [1.00, 1.20]",
        "−0.300 [−0.350, −0.250]", "−0.100 [−0.130, −0.070]", "10.0 [8.0, 12.0]", "55.0 [53.0, 57.0]",
        "61.0 [59.0, 63.0]", "60.0 [58.0, 62.0]", "80.0 [78.0, 82.0]", "0.800 [0.780, 0.820]",
        "81.2 [73.8, 88.8]", "134.5", "81.40", "162.8", "35.5 [34.0, 37.0]", "0.77 [0.67, 0.87]", "181.2",
    ):  # fmt: skip
        assert number in text, number


def test_the_best_student_is_marked_only_where_it_is_separated(html: str) -> None:
    marked = html.split('<strong class="best">')[1:]
    # Top-1 agreement of bd is highest, but its interval overlaps the control's and no paired record exists.
    assert [piece.split("<")[0] for piece in marked] == ["1.00 [0.90, 1.10]"]


def test_the_distinct_2_floor_is_stated_with_pass_and_fail(html: str) -> None:
    text = Page(html).text
    assert "Floor: 0.400, which is 0.5 × the teacher's" in text
    assert '<td class="text">pass</td>' in html and '<td class="text">fail</td>' in html


def test_accessibility(html: str) -> None:
    page = Page(html)
    assert page.named("html") == [{"lang": "en"}]
    assert len(page.named("caption")) == len(page.named("table")) > 0
    assert len(page.named("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)
    figures = page.named("svg")
    assert len(figures) == 4 and all(svg["role"] == "img" and svg["aria-labelledby"] for svg in figures)
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3", "h4"}]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert "prefers-color-scheme: dark" in html


def test_second_render_is_identical_and_leaves_no_partial_file(run_folder: Path) -> None:
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first
    assert not [path for path in run_folder.iterdir() if path.name.endswith(".tmp")]


def test_a_failed_write_keeps_the_old_report(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_folder / "report.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_report(run_folder)
    assert path.read_text() == "old"


def test_a_run_with_the_least_there_may_be(run_folder: Path) -> None:
    content = json.loads((run_folder / "results.json").read_text())
    content.update(sparsity=None, records=[], answers=[])
    (run_folder / "results.json").write_text(json.dumps(content))
    (run_folder / "metrics.jsonl").write_text("")
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "there is no verdict" in text and "The run kept no answers." in text
    assert load_run(run_folder).metrics == ()
