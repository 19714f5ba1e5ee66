"""Colours, dashes and markers that tell series apart, for colour-blind readers too, on light and on dark ground.

Colour is never alone: the first eight series differ in colour and marker, further ones repeat the colours with other
dashes and markers.

Example:
    >>> style(1)
    Style(colour=1, dash='solid', marker='square')
    >>> LIGHT.series[style(9).colour], style(9).dash
    ('#c73804', 'dash')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Theme:
    """Colours on one ground, as ``#rrggbb``.

    Args:
        surface: the ground.
        raised: the ground of boxes, buttons and the first row of tables.
        ink: text.
        muted: text of less weight; its contrast with ``raised`` is at least 4.5.
        line: rules, grids and borders.
        accent: links, the focus ring and what is selected.
        good: a difference that was shown.
        bad: what went wrong.
        series: colours of series. Each has a contrast of at least 3 with ``surface``. Any two of them differ by at
            least 0.1 in OKLab, for full colour vision, protanopia and deuteranopia.
    """

    surface: str
    raised: str
    ink: str
    muted: str
    line: str
    accent: str
    good: str
    bad: str
    series: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    raised="#f4f6f8",
    ink="#1b1f24",
    muted="#57606a",
    line="#d0d7de",
    accent="#0b5cad",
    good="#1a6b3c",
    bad="#b3261e",
    series=("#066b97", "#c73804", "#217e62", "#ba7eaf", "#ce8012", "#2783f7", "#533f42", "#5c0d9b"),
)
DARK = Theme(
    surface="#14171c",
    raised="#1f242b",
    ink="#e6e9ed",
    muted="#a5aeb8",
    line="#3a424c",
    accent="#7cb7ff",
    good="#6fd39a",
    bad="#ff8a80",
    series=("#3b91ad", "#ff6f19", "#1cb47f", "#e4bdd1", "#ffce3f", "#80a3ff", "#fff1e0", "#9f39ed"),
)


class Style(NamedTuple):
    """How one series is drawn.

    Args:
        colour: index into ``Theme.series``.
        dash: plotly's name of the line's dashes.
        marker: plotly's name of the marker.
    """

    colour: int
    dash: str
    marker: str


def style(index: int) -> Style:
    """Return the style of the series ``index``, from 0; it repeats after 224."""
    colours = len(LIGHT.series)
    return Style(index % colours, DASHES[index // colours % len(DASHES)], MARKERS[index % len(MARKERS)])
