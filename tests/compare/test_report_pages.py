"""``report.write``: what is in its files, whatever the runs were."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_runs import HOSTILE, cases, comparison, rich, run

from descend.compare import report
from descend.compare.results import content

CASES = {"rich": rich(), **cases()}
VOID = {"meta", "link", "path", "br", "img"}


class Reader(HTMLParser):
    """Checks that tags are closed, and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave plotly.js out: five megabytes that are the same in every page."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "var Plotly")


def data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


@pytest.mark.parametrize("case", CASES)
def test_page_is_whole_and_asks_for_nothing(case: str) -> None:
    page = content.report_page(*CASES[case])
    reader = Reader(page)
    data_of(page)
    names = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src"):
            assert tag == "path" or (attributes.get(name) or "#").startswith(("#", "data:,"))
        for name in ("aria-controls", "aria-labelledby"):
            assert name not in attributes or attributes[name] in names
    headings = [tag for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1", *["h2"] * (len(headings) - 1)]
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in reader.tags}


def test_hostile_names_stay_text() -> None:
    page = content.report_page(*CASES["hostile"])
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags].count("script") == 3
    assert "img" not in [tag for tag, _ in reader.tags]
    assert HOSTILE in reader.text
    chart = next(iter(data_of(page)["charts"].values()))
    names = [trace["name"] for trace in chart["traces"] if "name" in trace]
    assert not any("<" in name for name in names)


def test_numbers_of_the_page_are_those_of_the_runs() -> None:
    one = run("adamw", test_losses=[0.3, 0.1234], test_metrics=[0.5, 0.875], state_bytes=[1500], parameters=400)
    text = Reader(content.report_page(comparison(), [one])).text
    for number in (
        f"{one.final_loss:.4g}",
        "0.1234",
        "87.5%",
        "1.5 kB",
        "3.75 B",
        "2026-01-02",
        "batch_size 64",
    ):
        assert number in text
    assert "task_file" not in text


def test_page_counts_the_seeds_that_are_reported() -> None:
    runs = [run("a", seed=0), run("a", seed=10_000, tuning=True), run("a", seed=10_001, tuning=True)]
    assert "1 optimizer, 1 seed." in Reader(content.report_page(comparison(), runs)).text


def test_curves_of_all_data_are_not_said_to_be_averaged() -> None:
    page = Reader(content.report_page(comparison(), [run("a", window=1)])).text
    assert "mean of the last" not in page
    assert "Each point is the loss of one step." in page
    for steps, averaged in ((60, 20), (5, 5)):
        page = Reader(content.report_page(comparison(), [run("a", steps=steps)])).text
        assert f"mean of the last {averaged} steps" in page


def test_diverged_runs_have_a_step_and_no_loss() -> None:
    page = content.report_page(*CASES["all diverged"])
    text = Reader(page).text
    assert "at step 3" in text
    assert "Training loss" in text
    assert "80" not in re.sub(r"\d{4}-\d\d-\d\d\S*", "", text)


def test_coinciding_curves_are_said_to_and_drawn_one_on_the_other() -> None:
    page = content.report_page(*CASES["rich"])
    assert "adamw and torch.adamw coincide to 1e-08" in Reader(page).text
    chart = data_of(page)["charts"]["chart-1"]
    lines = {
        trace["legendgroup"]: trace["line"]
        for trace in chart["traces"]
        if trace["mode"] == "lines" and trace["line"]["width"] > 1
    }
    assert lines["series0"]["width"] > 2 * lines["series1"]["width"]
    assert (lines["series0"]["dash"], lines["series1"]["dash"]) == ("solid", "dash")
    order = [
        trace["legendgroup"] for trace in chart["traces"] if trace["mode"] == "lines" and trace["line"]["width"] > 1
    ]
    assert order.index("series0") < order.index("series1")


def test_one_slow_optimizer_does_not_squash_the_bars() -> None:
    page = content.report_page(*CASES["rich"])
    [chart] = [chart for chart in data_of(page)["charts"].values() if "(cut)" in json.dumps(chart["traces"])]
    end = chart["layout"]["xaxis"]["range"][1]
    assert end < 0.01 < 0.499


def test_page_says_where_the_rates_come_from() -> None:
    sweep = [run("a", lr=lr) for lr in (0.01, 0.1)]
    assert "of those swept" in Reader(content.report_page(comparison(), sweep)).text
    assert "not tuned" in Reader(content.report_page(comparison(), sweep[:1])).text


def test_tuning_runs_are_in_the_rates_chart_alone() -> None:
    tried = [run("a", seed=1000, lr=lr, floor=0.77, tuning=True) for lr in (0.001, 0.01, 0.1)]
    page = content.report_page(comparison(tuned="by trying"), [run("a", lr=0.01), *tried])
    text = Reader(page).text
    assert "3, from 0.001 to 0.1" in text
    assert "by trying" in text
    assert "0.77" not in text
    assert any("learning rate" in json.dumps(chart["layout"]) for chart in data_of(page)["charts"].values())


@pytest.mark.parametrize("case", ["rich", "nothing", "all diverged", "hostile", "thirty"])
def test_files_are_written_whole(case: str, tmp_path: Path) -> None:
    report.write(tmp_path, *CASES[case])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "curves.svg", "report.html"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "curves.svg")


def test_file_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curves.png").write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path, *CASES["one step"])
    assert (tmp_path / "curves.png").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "report.html"]
