"""A page in one HTML file that needs no network: headings, text, tables, and charts by plotly.js, which is inside.

The page is light or dark as the reader's system is, or as a button says. It fits a phone. Everything that can be
clicked can be reached by keyboard and has a name. Text is never taken for HTML. The page's content security policy
allows its own scripts, by their hashes, and no requests.

Example:
    >>> curve = {"x": [1, 2, 3], "y": [3.0, 2.5, 2.0], "line": {"color": "$series0"}, "legendgroup": "adam"}
    >>> chart = Chart("Loss of adam: it falls from 3 to 2.", [curve], {"xaxis": {"title": {"text": "step"}}})
    >>> text = page("A report", "What was measured.", [Section("Loss", [Legend([Entry("adam", "adam", 0)]), chart])])
    >>> text.startswith("<!doctype html>")
    True
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import resources
from itertools import count
from typing import Any, NamedTuple, Protocol

from descend.reporting.errors import require
from descend.reporting.palette import DARK, LIGHT, Theme, style


class Block(Protocol):
    """Part of a section."""

    def html(self, parts: Parts) -> str:
        """Return the block's HTML; whatever it draws is added to ``parts``."""


@dataclass
class Parts:
    """What the blocks of a page share: the charts that the script draws, and numbers for ids."""

    charts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    ids: count[int] = field(default_factory=count)

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{next(self.ids)}"


@dataclass(frozen=True)
class Prose:
    """A paragraph; ``kind`` is "plain" or "note", which is smaller."""

    text: str
    kind: str = "plain"

    def html(self, parts: Parts) -> str:
        return f'<p class="{self.kind}">{escape(self.text)}</p>'


class Fact(NamedTuple):
    """What is said of one thing.

    Args:
        name: the thing.
        text: what is said.
        kind: "plain", "good" or "bad"; it colours the fact's edge.
        details: what backs it, in smaller letters, each item by itself.
    """

    name: str
    text: str
    kind: str = "plain"
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Facts:
    """A list of facts."""

    items: Sequence[Fact]

    def html(self, parts: Parts) -> str:
        rows = []
        for name, text, kind, details in self.items:
            said = f"<p>{escape(text)}</p>" if text else ""
            backing = "".join(f"<li>{escape(detail)}</li>" for detail in details)
            backing = f"<ul>{backing}</ul>" if backing else ""
            rows.append(f'<div class="{kind}"><dt>{escape(name)}</dt><dd>{said}{backing}</dd></div>')
        return f'<dl class="facts">{"".join(rows)}</dl>'


@dataclass(frozen=True)
class Entry:
    """One line of a legend, or the mark of a table's row.

    Args:
        name: what the reader sees.
        group: ``legendgroup`` of the traces that it shows and hides.
        series: index of its style.
        dash: plotly's name of the line's dashes, if it is not the style's.
    """

    name: str
    group: str
    series: int
    dash: str | None = None


@dataclass(frozen=True)
class Legend:
    """Buttons that show and hide series, in all charts of the page; any number of legends stay in step."""

    entries: Sequence[Entry]

    def html(self, parts: Parts) -> str:
        buttons = (
            f'<button type="button" aria-pressed="true" data-group="{escape(entry.group)}">'
            f"{_swatch(entry)}<span>{escape(entry.name)}</span></button>"
            for entry in self.entries
        )
        return f'<div class="legend" role="group" aria-label="Legend: show or hide">{"".join(buttons)}</div>'


@dataclass(frozen=True)
class Chart:
    """A figure of plotly.js.

    Args:
        description: what the figure shows, in words, for those who do not see it.
        traces: plotly's. Colours are written ``$series3``, ``$ink``, ``$muted``, ``$line`` or ``$surface``, with
            ``/0.2`` behind for opacity, and follow the theme. A trace is hidden with its ``legendgroup``. NaN and Inf
            become null, and floats are rounded to six digits. Plotly takes some HTML in texts: a text that is not
            yours goes through ``chart_text``.
        layout: plotly's, without colours and fonts; axes are styled for the theme.
        height: in pixels.
    """

    description: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 380

    def html(self, parts: Parts) -> str:
        name = parts.new_id("chart")
        parts.charts[name] = {"traces": self.traces, "layout": self.layout}
        return (
            f'<div class="chart" id="{name}" role="img" aria-label="{escape(self.description)}" '
            f'style="height:{self.height}px"></div>'
        )


@dataclass(frozen=True)
class Tabs:
    """Alternatives of which one is shown.

    Args:
        label: what they differ in.
        panels: (name, blocks); the first is shown at first.
    """

    label: str
    panels: Sequence[tuple[str, Sequence[Block]]]

    def html(self, parts: Parts) -> str:
        name = parts.new_id("tab")
        tabs, panels = [], []
        for i, (title, blocks) in enumerate(self.panels):
            is_first = i == 0
            tabs.append(
                f'<button type="button" role="tab" id="{name}-{i}" aria-controls="{name}-{i}-panel" '
                f'aria-selected="{str(is_first).lower()}" tabindex="{0 if is_first else -1}">{escape(title)}</button>'
            )
            panels.append(
                f'<div role="tabpanel" id="{name}-{i}-panel" aria-labelledby="{name}-{i}"'
                f"{'' if is_first else ' hidden'}>{''.join(block.html(parts) for block in blocks)}</div>"
            )
        return f'<div role="tablist" aria-label="{escape(self.label)}">{"".join(tabs)}</div>{"".join(panels)}'


@dataclass(frozen=True)
class Table:
    """A table, which scrolls by itself where it is too wide.

    Args:
        caption: what it shows.
        headings: of all columns. The first column names the rows.
        rows: cells as text, as many in each as there are headings; a line break in a cell is kept.
        words: headings of the columns that hold text; all others but the first are aligned as numbers.
        marks: by row, the series that it belongs to, or None.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    marks: Sequence[int | None] = ()

    def html(self, parts: Parts) -> str:
        kinds = ["word" if heading in self.words else "number" for heading in self.headings]
        head = "".join(
            f'<th scope="col" class="{kind}">{escape(heading)}</th>'
            for kind, heading in zip(["word", *kinds[1:]], self.headings, strict=True)
        )
        body = []
        for i, (first, *rest) in enumerate(self.rows):
            mark = self.marks[i] if self.marks else None
            swatch = "" if mark is None else _swatch(Entry("", "", mark))
            cells = "".join(
                f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds[1:], rest, strict=True)
            )
            name = f'<span class="named">{swatch}<span>{escape(first)}</span></span>'
            body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
        # The caption is outside of what scrolls, where a narrow screen would cut it.
        name = parts.new_id("caption")
        return (
            f'<p class="caption" id="{name}">{escape(self.caption)}</p>'
            f'<div class="wide" role="region" tabindex="0" aria-labelledby="{name}"><table aria-labelledby="{name}">'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )


@dataclass(frozen=True)
class Key:
    """Squares of colour with names, which cannot be clicked.

    Args:
        entries: (name, colour), the colour written as in a ``Chart``.
    """

    entries: Sequence[tuple[str, str]]

    def html(self, parts: Parts) -> str:
        items = (
            f'<li><span class="square" style="background:{_css(colour)}"></span>{escape(name)}</li>'
            for name, colour in self.entries
        )
        return f'<ul class="key">{"".join(items)}</ul>'


@dataclass(frozen=True)
class Details:
    """Blocks without charts that are shown on demand."""

    summary: str
    blocks: Sequence[Block]

    def html(self, parts: Parts) -> str:
        inside = "".join(block.html(parts) for block in self.blocks)
        return f"<details><summary>{escape(self.summary)}</summary>{inside}</details>"


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading, which the page's list of contents names."""

    title: str
    blocks: Sequence[Block]


def page(title: str, lead: str, sections: Sequence[Section], footer: str = "") -> str:
    """Return the page.

    Args:
        title: its heading, and the name of the browser's tab.
        lead: a paragraph under it.
        sections: its parts.
        footer: how it was made: versions, machine, date.
    Returns:
        HTML in one string of about 5 MB, nearly all of it plotly.js.
    Raises:
        UsageError: if plotly is not installed.
    """
    require("plotly")
    from plotly.offline import get_plotlyjs  # a second faster without, for those who only show a table

    parts = Parts()
    contents, body = [], []
    for i, section in enumerate(sections):
        contents.append(f'<li><a href="#section-{i}">{escape(section.title)}</a></li>')
        blocks = "".join(block.html(parts) for block in section.blocks)
        body.append(
            f'<section aria-labelledby="section-{i}"><h2 id="section-{i}" tabindex="-1">{escape(section.title)}</h2>'
            f"{blocks}</section>"
        )
    themes = {"light": asdict(LIGHT), "dark": asdict(DARK)}
    data = json.dumps(_plain({"charts": parts.charts, "themes": themes}), allow_nan=False, separators=(",", ":"))
    # Inside a script element, HTML's parser looks for "</script" and "<!--" alone.
    data = data.replace("<", "\\u003c")
    plotly, script = get_plotlyjs(), _file("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_colours()}{_file('page.css')}</style></head><body>"
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header><div><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></div>'
        '<button type="button" id="theme">Dark colours</button></header>'
        f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>'
        '<noscript><p class="plain">Charts need JavaScript. The tables have the same numbers.</p></noscript>'
        f'<main id="content" tabindex="-1">{"".join(body)}</main><footer><p>{escape(footer)}</p></footer>'
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{plotly}</script><script>{script}</script></body></html>\n"
    )


def chart_text(text: str) -> str:
    """Return ``text`` so that plotly shows it as it is, instead of taking "<b>" for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


MARKS = {  # paths in a square of 16
    "circle": "M8 4a4 4 0 1 0 .01 0z",
    "square": "M4.5 4.5h7v7h-7z",
    "diamond": "M8 3l5 5-5 5-5-5z",
    "triangle-up": "M8 3l5 9H3z",
    "cross": "M6.5 3h3v3.500h3.500v3h-3.500v3.500h-3v-3.500H3v-3h3.500z",
    "x": "M4 6l2-2 2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2z",
    "triangle-down": "M8 13l5-9H3z",
}
DASHES = {"solid": "none", "dash": "6 4", "dot": "2 3", "dashdot": "7 3 2 3"}


def _swatch(entry: Entry) -> str:
    """Return a picture of the entry's line and marker."""
    colour, dash, marker = style(entry.series)
    dashes = DASHES[entry.dash or dash]
    return (
        f'<svg class="swatch" width="30" height="16" viewBox="0 0 30 16" aria-hidden="true" '
        f'style="color:var(--series{colour})"><path d="M1 8h28" stroke="currentColor" stroke-width="2.5" '
        f'stroke-dasharray="{dashes}"/><path transform="translate(7)" d="{MARKS[marker]}" fill="currentColor"/></svg>'
    )


def _css(colour: str) -> str:
    name, _, opacity = colour.removeprefix("$").partition("/")
    return f"color-mix(in srgb,var(--{name}) {100 * float(opacity or 1):.0f}%,transparent)"


def _colours() -> str:
    light, dark = _variables(LIGHT, "light"), _variables(DARK, "dark")
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f":root[data-theme=light]{{{light}}}:root[data-theme=dark]{{{dark}}}"
    )


def _variables(theme: Theme, scheme: str) -> str:
    colours = asdict(theme)
    series = colours.pop("series")
    named = [*colours.items(), *((f"series{i}", colour) for i, colour in enumerate(series))]
    return f"color-scheme:{scheme};" + ";".join(f"--{name}:{colour}" for name, colour in named)


def _file(name: str) -> str:
    return resources.files("descend.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON has it: null for NaN and Inf, floats of six digits."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
