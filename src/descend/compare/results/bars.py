"""The figures of times and sizes, a row for each optimizer, as plotly's traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from descend.compare.records import Run
from descend.compare.results.looks import Trace, colour, marker
from descend.compare.results.series import Series, Setting
from descend.reporting.axes import log_axis
from descend.reporting.page import Chart, chart_text
from descend.reporting.text import seconds, shortened

ROW = 46  # pixels: a bar and the line of text above it
TONES = {  # of parts that do not depend on the optimizer, and of a step whose parts are not known
    "data": "$muted/0.3",
    "forward": "$muted/0.5",
    "backward": "$muted/0.75",
    "norm": "$muted",
    "step": "$ink/0.85",
}
BARE = {"showgrid": False, "showticklabels": False, "zeroline": False, "showline": False, "ticks": ""}
LABEL = 28  # characters that fit beside a number on a phone


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart.

    Args:
        series: whose it is.
        parts: lengths by part, left to right; those that ``TONES`` does not name have the series' colour.
        text: what is written above the bar.
    """

    series: Series
    parts: Mapping[str, float]
    text: str

    @property
    def length(self) -> float:
        return sum(self.parts.values())


def bar_chart(description: str, bars: Sequence[Bar], title: str, show: Callable[[float], str]) -> Chart:
    """Draw bars of parts. One that is more than four times as long as the median is cut, and says so."""
    lengths = sorted(bar.length for bar in bars)
    usual = lengths[len(lengths) // 2] if lengths else 0.0
    end = max((length for length in lengths if length <= 4 * usual), default=0.0) * 1.08 or 1.0
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    traces: list[Trace] = []
    for bar in bars:
        start, group, row, label = 0.0, bar.series.group, bar.series.index, chart_text(bar.series.label)
        for name in names:
            if name not in bar.parts:
                continue
            length = max(min(bar.parts[name], end - start), 0.0)
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [length],
                    "base": [start],
                    "y": [row],
                    "width": 0.42,
                    "marker": {
                        "color": TONES.get(name, colour(bar.series)),
                        "line": {"color": "$surface", "width": 1},
                    },
                    "legendgroup": group,
                    "hovertemplate": f"{label}<br>{name}: {show(bar.parts[name])}<extra></extra>",
                }
            )
            start += length
        is_cut = bar.length > end
        traces.append(_row_text(bar, 0.0, " (cut)" if is_cut else ""))
        if is_cut:
            traces.append(
                {
                    "x": [end],
                    "y": [row],
                    "mode": "markers",
                    "marker": {"symbol": "triangle-right", "size": 16, "color": "$ink"},
                    "cliponaxis": False,
                    "hoverinfo": "skip",
                    "legendgroup": group,
                }
            )
    ticks = _round_ticks(end)
    x = {
        "range": [0, end],
        "tickvals": ticks,
        "ticktext": [show(tick) for tick in ticks],
        "title": {"text": title},
        "zeroline": False,
    }
    return Chart(description, traces, {"xaxis": x, "yaxis": _rows_axis(bars), **_rows_layout()}, _rows_height(bars))


def dot_chart(description: str, bars: Sequence[Bar], title: str, show: Callable[[float], str]) -> Chart:
    """Draw lengths so that one which is far longer does not squash the others: if so, as dots on a logarithmic axis."""
    if not is_wide([bar.length for bar in bars]):
        return bar_chart(description, bars, title, show)
    x = log_axis(f"{title} (logarithmic)", [bar.length for bar in bars], show)
    low = x["range"][0]
    traces: list[Trace] = []
    for bar in bars:
        if bar.length > 0:
            traces.append(
                {
                    "x": [bar.length],
                    "y": [bar.series.index],
                    "mode": "markers",
                    "marker": marker(bar.series, 13),
                    "legendgroup": bar.series.group,
                    "hovertemplate": f"{chart_text(bar.series.label)}: {show(bar.length)}<extra></extra>",
                }
            )
        traces.append(_row_text(bar, 1.0001 * 10**low, ""))
    layout = {"xaxis": x, "yaxis": _rows_axis(bars), **_rows_layout()}
    return Chart(description, traces, layout, _rows_height(bars))


def is_wide(lengths: Sequence[float]) -> bool:
    """Tell whether lengths differ so much that bars from zero would not show them all."""
    return max(lengths, default=0.0) > 4 * min(lengths, default=0.0)


def step_bars(series: Sequence[Series]) -> list[Bar]:
    """Return the time of a step by part, the median over the runs that had the machine to themselves."""
    bars = []
    for one in series:
        parts = parts_of(one.timed)
        if parts:
            bars.append(Bar(one, parts, seconds(sum(parts.values()))))
    return bars


def parts_of(setting: Setting) -> dict[str, float]:
    """Return the seconds of each part of a step; "step" is a whole one, where the parts are not known."""
    names = dict.fromkeys(name for run in setting.runs for name in run.parts)
    parts = {name: setting.median(lambda run, name=name: run.parts.get(name)) for name in names}  # type: ignore[misc]
    known = {name: value for name, value in parts.items() if value is not None}
    if known:
        return known
    whole = setting.median(_median_step)
    return {} if whole is None else {"step": whole}


def _median_step(run: Run) -> float | None:
    durations = np.diff(np.array(run.seconds, float))
    return float(np.median(durations)) if durations.size else None


def _row_text(bar: Bar, x: float, remark: str) -> Trace:
    return {
        "x": [x],
        "y": [bar.series.index - 0.42],
        "mode": "text",
        "text": [f"{chart_text(shortened(bar.series.label, LABEL))}  <b>{chart_text(bar.text)}</b>{remark}"],
        "textposition": "middle right",
        "textfont": {"color": "$ink"},
        "cliponaxis": False,
        "hoverinfo": "skip",
        "legendgroup": bar.series.group,
    }


def _rows_axis(bars: Sequence[Bar]) -> Trace:
    rows = [bar.series.index for bar in bars] or [0]
    return {"range": [max(rows) + 0.5, min(rows) - 0.75], **BARE}


def _rows_layout() -> Trace:
    return {"margin": {"l": 8, "r": 12, "t": 4, "b": 44}, "hovermode": "closest"}


def _rows_height(bars: Sequence[Bar]) -> int:
    return 60 + ROW * max(len(bars), 1)


def _round_ticks(end: float) -> list[float]:
    unit = 10.0 ** math.floor(math.log10(end / 2))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 5 >= end)
    return [step * i for i in range(1, int(end / step) + 1)]
