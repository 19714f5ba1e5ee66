"""The scripts behind the Learn chapters run; figures and quoted numbers are those of the newest script."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest
from doc_pages import ROOT

with matplotlib.rc_context():  # for the scripts alone
    from figures import DARK, LEARN, STYLE, digest, power_of_ten, with_dark_scheme

SCRIPTS = sorted((ROOT / "examples").glob("learn_*.py"))
MEASURED = re.compile(r"\*\*([\d.,e+-]*\d)\*\*")


def chapter_of(script: Path) -> str:
    return script.stem.removeprefix("learn_").replace("_", "-")


def figures_of(folder: Path, chapter: str) -> set[str]:
    return {path.name for path in folder.glob(f"{chapter}-*.svg")}


def test_every_chapter_has_a_script() -> None:
    assert {chapter_of(script) for script in SCRIPTS} == {page.stem for page in LEARN.glob("*.md")} - {"index"}


@pytest.mark.parametrize("script", SCRIPTS, ids=chapter_of)
def test_script_draws_what_the_chapter_shows(script: Path, tmp_path: Path) -> None:
    chapter = chapter_of(script)
    with matplotlib.rc_context(STYLE):
        importlib.import_module(script.stem).main(["--quick", "--out", str(tmp_path)])
    shown = set(re.findall(r"!\[[^\]]+\]\(([\w-]+\.svg)\)", (LEARN / f"{chapter}.md").read_text("utf-8")))
    assert figures_of(tmp_path, chapter) == shown == figures_of(LEARN, chapter)
    assert len((tmp_path / f"{chapter}.txt").read_text("utf-8").splitlines()) > 3
    for path in [*tmp_path.glob("*.svg"), *(LEARN / name for name in shown)]:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert path.stat().st_size < 200_000


@pytest.mark.parametrize("script", SCRIPTS, ids=chapter_of)
def test_numbers_are_those_of_the_newest_script(script: Path) -> None:
    printed = (LEARN / f"{chapter_of(script)}.txt").read_text("utf-8")
    assert digest(script) in printed, f"{script.name} is newer than its figures: make figures."
    quoted = MEASURED.findall((LEARN / f"{chapter_of(script)}.md").read_text("utf-8"))
    assert len(quoted) > 3
    for number in quoted:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", printed), (
            f"The script does not print {number}."
        )


def test_labels_of_powers_of_ten() -> None:
    assert [power_of_ten(value) for value in (1e-4, 0.001, 0.2, 1, 1000, 1e5, 2e-5)] == [
        "10⁻⁴",
        "0.001",
        "0.2",
        "1",
        "1,000",
        "10⁵",
        "2·10⁻⁵",
    ]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_curves_stand_out_in_both_schemes() -> None:
    light, dark = list(DARK), list(DARK.values())
    for colors in (light, dark):
        ink, _, paper, *series = colors
        for color in (ink, *series):
            low, high = sorted((luminance(color), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{color} on {paper}"


def test_a_dark_scheme_changes_every_color_of_the_light_one() -> None:
    style = with_dark_scheme("<svg><defs></defs></svg>")
    assert all(f"{{fill:{dark}!important}}" in style for dark in DARK.values())
