"""The figures of the report, as plotly's traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from descend.compare.records import WINDOW, Comparison, Run
from descend.compare.results.coincide import Pair
from descend.compare.results.curves import Curve, Floats, held_out_curve, loss_curve, raw_curve, thin
from descend.compare.results.series import Series, Setting
from descend.reporting.axes import log_axis
from descend.reporting.page import Chart, chart_text
from descend.reporting.palette import style
from descend.reporting.text import joined, rate, seconds, shortened

Trace = dict[str, Any]
RAW = 8  # more optimizers than this, and the raw losses behind their curves hide each other
AXIS_NAMES = {"steps": "step", "time": "seconds", "evaluations": "gradients evaluated"}
WIDTHS = {"alone": 2.2, "under": 6.0, "over": 2.2}


def layers(series: Sequence[Series], pairs: Sequence[Pair]) -> dict[int, str]:
    """Return how each series' curve is drawn: "under" is wide, and "over" is dashed and lies on it."""
    drawn = {one.index: "alone" for one in series}
    for pair in pairs:
        drawn[pair.first.index] = "under"
        drawn[pair.second.index] = "over"
    return drawn


def loss_chart(comparison: Comparison, series: Sequence[Series], pairs: Sequence[Pair], axis: str) -> Chart:
    """Draw the training loss against "steps", "time" or "evaluations"."""
    drawn = layers(series, pairs)
    # Wide curves come first, so that the narrow ones lie on them.
    order = sorted(series, key=lambda one: drawn[one.index] != "under")
    traces: list[Trace] = []
    if len(series) <= RAW:
        for one in order:
            faint = {"line": _stroke(one, 1, "solid", 0.22), "hoverinfo": "skip", "hovertemplate": None}
            traces.append(_line(one, *raw_curve(one.best, axis), width=1) | faint)
    curves = {one.index: loss_curve(one.best, axis) for one in series}
    for one in order:
        curve, layer = curves[one.index], drawn[one.index]
        traces += [*_band(one, curve), _line(one, curve.x, curve.middle, WIDTHS[layer], dash(one, layer))]
    calm = [curves[one.index] for one in series if not one.best.diverged] or list(curves.values())
    y = value_axis(comparison.loss_name, calm, [curve.middle[:1] for curve in curves.values()])
    top = 10 ** y["range"][1] if "range" in y else math.inf
    for one in order:
        traces += _marks(one, curves[one.index], len(series))
        traces += _ends(one, curves[one.index], top)
    x_axis = {"title": {"text": AXIS_NAMES[axis]}, "rangemode": "tozero"}
    words = (
        f"Training loss against {axis} of {_names(series)}, each the mean of the last {WINDOW} steps. "
        "The table at the end has the final values."
    )
    return Chart(words, traces, {"xaxis": x_axis, "yaxis": y}, height=440)


def difference_chart(comparison: Comparison, pairs: Sequence[Pair]) -> Chart | None:
    """Draw how much curves that coincide differ; None if none do, or they are equal."""
    shown = [pair for pair in pairs if pair.largest > 0]
    if not shown:
        return None
    traces = []
    for pair in shown:
        # The largest of each stretch of steps, so that no peak is lost.
        kept = thin(len(pair.differences))
        y = np.maximum.reduceat(pair.differences, kept)
        name = chart_text(f"{pair.second.label} against {pair.first.label}")
        traces.append(_line(pair.second, kept + 1.0, np.where(y > 0, y, np.nan), WIDTHS["alone"]) | {"name": name})
    values = [float(value) for pair in shown for value in pair.differences]
    layout = {
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": log_axis("difference of the losses", values),
    }
    words = f"Difference of the losses of {joined([f'{p.second.label} and {p.first.label}' for p in shown])} by step."
    return Chart(words, traces, layout, height=260)


def held_out_chart(
    series: Sequence[Series], pairs: Sequence[Pair], name: str, measure: Callable[[Run], Sequence[float]], scale: str
) -> Chart:
    """Draw a held-out measure against steps; ``scale`` is "free" for a loss or an error, "share" for an accuracy."""
    drawn = layers(series, pairs)
    curves = {one.index: held_out_curve(one.best, measure) for one in series}
    traces: list[Trace] = []
    for one in sorted(series, key=lambda one: drawn[one.index] != "under"):
        curve, layer = curves[one.index], drawn[one.index]
        traces += _band(one, curve)
        size = 13 if layer == "under" else 7
        traces.append(
            _line(one, curve.x, curve.middle, WIDTHS[layer], dash(one, layer))
            | {"mode": "lines+markers", "marker": _marker(one, size)}
        )
    calm = [curves[one.index] for one in series if not one.best.diverged] or list(curves.values())
    y = value_axis(name, calm, [])
    if scale == "share":
        y = {"title": {"text": chart_text(shortened(name, TITLE))}, "tickformat": ".0%"}
    layout = {"xaxis": {"title": {"text": "step"}, "rangemode": "tozero"}, "yaxis": y}
    return Chart(f"Held-out {name} against steps of {_names(series)}.", traces, layout, height=380)


def rate_chart(
    series: Sequence[Series], pairs: Sequence[Pair], name: str, measure: Callable[[Run], float | None]
) -> Chart:
    """Draw a final value against the learning rate, with the range over the seeds; crosses at the top have diverged."""
    drawn = layers(series, pairs)
    swept = sorted((one for one in series if one.swept), key=lambda one: drawn[one.index] != "under")
    values = [value for one in swept for setting in one.swept for value in setting.values(measure)]
    y = value_axis(name, [], [np.array(values)])
    is_log = y.get("type") == "log"
    low, high = y.get("range") or (min(values, default=0.0), max(values, default=1.0))
    top = high + 0.09 * (high - low)
    y["range"] = [low - (0 if is_log else 0.05 * (high - low)), top + 0.05 * (high - low)]
    traces: list[Trace] = []
    for one in swept:
        layer = drawn[one.index]
        sound = [(setting, setting.median(measure)) for setting in one.swept]
        xs = [setting.lr for setting, _ in sound]
        spreads = [setting.values(measure) if middle is not None else [] for setting, middle in sound]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [max(s) - m if m is not None else None for s, (_, m) in zip(spreads, sound, strict=True)],
            "arrayminus": [m - min(s) if m is not None else None for s, (_, m) in zip(spreads, sound, strict=True)],
            "thickness": 1.5,
            "width": 4,
        }
        traces.append(
            _line(one, xs, [middle for _, middle in sound], WIDTHS[layer], dash(one, layer))
            | {"mode": "lines+markers", "marker": _marker(one, 13 if layer == "under" else 7), "error_y": error}
            | {"hovertemplate": f"{chart_text(one.label)}<br>lr %{{x:.3g}}: %{{y:.4g}}<extra></extra>"}
        )
        lost = [setting for setting in one.swept if setting.diverged]
        if lost:
            texts = [f"diverged in {len(setting.diverged)} of {len(setting.runs)}" for setting in lost]
            traces.append(
                {
                    "x": [setting.lr for setting in lost],
                    # Crosses of several optimizers at one rate stand one below the other.
                    "y": [(10**place if is_log else place) for place in [top - 0.03 * one.index % 0.2] * len(lost)],
                    "mode": "markers",
                    "marker": {"symbol": "x-thin", "size": 10, "line": {"width": 3, "color": _colour(one)}},
                    "legendgroup": one.group,
                    "name": chart_text(one.label),
                    "customdata": texts,
                    "hovertemplate": f"{chart_text(one.label)}<br>lr %{{x:.3g}}: %{{customdata}}<extra></extra>",
                }
            )
    rates = [setting.lr for one in swept for setting in one.swept if setting.lr]
    layout = {"xaxis": log_axis("learning rate", rates, rate), "yaxis": y}
    return Chart(f"{name.capitalize()} against the learning rate of {_names(swept)}.", traces, layout, height=400)


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart.

    Args:
        series: whose it is.
        parts: lengths by part, left to right; the part named ``own`` has the series' colour.
        text: what is written above the bar.
    """

    series: Series
    parts: Mapping[str, float]
    text: str

    @property
    def length(self) -> float:
        return sum(self.parts.values())


LABEL, TITLE = 28, 50  # characters that fit on a phone: beside a number, along an axis
ROW = 46  # pixels: a bar and the line of text above it
TONES = {
    "data": "$muted/0.3",
    "forward": "$muted/0.5",
    "backward": "$muted/0.75",
    "norm": "$muted",
    "step": "$ink/0.85",
}


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
                        "color": TONES.get(name, _colour(bar.series)),
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
                    "marker": _marker(bar.series, 13),
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


def value_axis(title: str, curves: Iterable[Curve], more: Iterable[Floats]) -> dict[str, Any]:
    """Return the axis of a loss: logarithmic if all is positive and spans more than a factor of three."""
    title = chart_text(shortened(title, TITLE))
    arrays = [np.concatenate([curve.low, curve.middle, curve.high]) for curve in curves]
    values = np.concatenate([*arrays, *more, np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 3 * values.min():
        return log_axis(title, values.tolist())
    return {"title": {"text": title}}


def _line(one: Series, x: Any, y: Any, width: float, dashes: str | None = None) -> Trace:
    return {
        "x": list(x),
        "y": list(y),
        "mode": "lines",
        "line": _stroke(one, width, dashes or style(one.index).dash),
        "legendgroup": one.group,
        "name": chart_text(one.label),
        "hovertemplate": f"{chart_text(one.label)}<br>%{{x:.4g}}: %{{y:.4g}}<extra></extra>",
    }


def _stroke(one: Series, width: float, dash: str, opacity: float | None = None) -> Trace:
    return {"color": _colour(one) + (f"/{opacity}" if opacity else ""), "width": width, "dash": dash}


def _band(one: Series, curve: Curve) -> list[Trace]:
    """Return the area between the quartiles, where there is any."""
    if not len(curve.x) or np.array_equal(curve.low, curve.high):
        return []
    # Where a quarter of the seeds has diverged, the band is open above: it ends there.
    kept = np.isfinite(curve.high)
    x, low, high = curve.x[kept], curve.low[kept], curve.high[kept]
    return [
        {
            "x": [*x, *x[::-1]],
            "y": [*high, *low[::-1]],
            "mode": "lines",
            "line": {"width": 0, "color": _colour(one)},
            "fill": "toself",
            "fillcolor": f"{_colour(one)}/0.18",
            "hoverinfo": "skip",
            "legendgroup": one.group,
        }
    ]


def _marks(one: Series, curve: Curve, count: int) -> list[Trace]:
    """Return a few markers on a curve; those of other curves stand at other steps, so that none hides another."""
    length = len(curve.x)
    if not length:
        return []
    gap = max(length / 6, 1)
    places = np.unique(np.clip(np.arange(gap * (one.index + 0.5) / count, length, gap), 0, length - 1).astype(int))
    return [
        {
            "x": curve.x[places].tolist(),
            "y": curve.middle[places].tolist(),
            "mode": "markers",
            "marker": _marker(one, 9),
            "hoverinfo": "skip",
            "legendgroup": one.group,
        }
    ]


def end(one: Series, curve: Curve, top: float) -> tuple[float, float] | None:
    """Return where a curve ends because its runs diverged, or leaves the picture at ``top``; None if it does not."""
    if not one.best.diverged or not len(curve.x):
        return None
    above = np.flatnonzero(curve.middle > top)
    return (float(curve.x[above[0]]), top) if above.size else (float(curve.x[-1]), float(curve.middle[-1]))


def _ends(one: Series, curve: Curve, top: float) -> list[Trace]:
    """Return a cross where a curve ends because its runs diverged."""
    place = end(one, curve, top)
    if place is None:
        return []
    return [
        {
            "x": [place[0]],
            "y": [place[1]],
            "mode": "markers",
            "marker": {"symbol": "x-thin", "size": 14, "line": {"width": 4, "color": _colour(one)}},
            "cliponaxis": False,
            "legendgroup": one.group,
            "name": chart_text(one.label),
            "hovertemplate": f"{chart_text(one.label)}: diverged<extra></extra>",
        }
    ]


def dash(one: Series, layer: str) -> str:
    """Return the dashes of a curve: one that lies on another lets it through."""
    return {"over": "dash", "under": "solid"}.get(layer, style(one.index).dash)


def _marker(one: Series, size: int) -> Trace:
    return {
        "symbol": style(one.index).marker,
        "size": size,
        "color": _colour(one),
        "line": {"width": 1, "color": "$surface"},
    }


def _colour(one: Series) -> str:
    return f"$series{style(one.index).colour}"


def _names(series: Sequence[Series]) -> str:
    return joined([one.name for one in series])


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


BARE = {"showgrid": False, "showticklabels": False, "zeroline": False, "showline": False, "ticks": ""}


def _rows_layout() -> Trace:
    return {"margin": {"l": 8, "r": 12, "t": 4, "b": 44}, "hovermode": "closest"}


def _rows_height(bars: Sequence[Bar]) -> int:
    return 60 + ROW * max(len(bars), 1)


def _round_ticks(end: float) -> list[float]:
    unit = 10.0 ** math.floor(math.log10(end / 2))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 5 >= end)
    return [step * i for i in range(1, int(end / step) + 1)]


def step_bars(series: Sequence[Series]) -> list[Bar]:
    """Return the time of a step by part, the median over the runs that had the machine to themselves."""
    bars = []
    for one in series:
        parts = parts_of(one.timed)
        if parts:
            total, own = sum(parts.values()), parts.get("optimizer")
            share = "" if own is None or len(parts) == 1 else f", optimizer {seconds(own)}"
            bars.append(Bar(one, parts, f"{seconds(total)}{share}"))
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
