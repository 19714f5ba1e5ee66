"""The figures of losses, as plotly's traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from descend.compare.records import Comparison, Run
from descend.compare.results.coincide import Pair
from descend.compare.results.curves import Curve, held_out_curve, loss_curve, raw_curve, thin
from descend.compare.results.looks import TITLE, WIDTHS, Trace, colour, dash, layers, line, marker, stroke, value_axis
from descend.compare.results.series import Series, window
from descend.reporting.axes import log_axis
from descend.reporting.page import Chart, chart_text
from descend.reporting.text import joined, rate, shortened

RAW = 8  # more optimizers than this, and the raw losses behind their curves hide each other
AXIS_NAMES = {"steps": "step", "time": "seconds", "evaluations": "gradients evaluated"}


def loss_chart(comparison: Comparison, series: Sequence[Series], pairs: Sequence[Pair], axis: str) -> Chart:
    """Draw the training loss against "steps", "time" or "evaluations"."""
    drawn = layers(series, pairs)
    # Wide curves come first, so that the narrow ones lie on them.
    order = sorted(series, key=lambda one: drawn[one.index] != "under")
    traces: list[Trace] = []
    if len(series) <= RAW:
        for one in order:
            faint = {"line": stroke(one, 1, "solid", 0.22), "hoverinfo": "skip", "hovertemplate": None}
            traces.append(line(one, *raw_curve(one.best, axis), width=1) | faint)
    curves = {one.index: loss_curve(one.best, axis) for one in series}
    for one in order:
        curve, layer = curves[one.index], drawn[one.index]
        traces += [*_band(one, curve), line(one, curve.x, curve.middle, WIDTHS[layer], dash(one, layer))]
    calm = [curves[one.index] for one in series if not one.best.diverged] or list(curves.values())
    y = value_axis(comparison.loss_name, calm, [curve.middle[:1] for curve in curves.values()])
    top = 10 ** y["range"][1] if "range" in y else math.inf
    steps = window(series)
    averaged = f", each the mean of the last {steps} steps" if steps > 1 else ""
    for one in order:
        traces += _marks(one, curves[one.index], len(series))
        traces += _ends(one, curves[one.index], top)
    x_axis = {"title": {"text": AXIS_NAMES[axis]}, "rangemode": "tozero"}
    words = f"Training loss against {axis} of {_names(series)}{averaged}. The table at the end has the final values."
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
        traces.append(line(pair.second, kept + 1.0, np.where(y > 0, y, np.nan), WIDTHS["alone"]) | {"name": name})
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
            line(one, curve.x, curve.middle, WIDTHS[layer], dash(one, layer))
            | {"mode": "lines+markers", "marker": marker(one, size)}
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
            line(one, xs, [middle for _, middle in sound], WIDTHS[layer], dash(one, layer))
            | {"mode": "lines+markers", "marker": marker(one, 13 if layer == "under" else 7), "error_y": error}
            | {"hovertemplate": f"{chart_text(one.label)}<br>lr %{{x:.3g}}: %{{y:.4g}}<extra></extra>"}
        )
        lost = [setting for setting in one.swept if setting.diverged]
        if lost:
            height = top - 0.04 * (one.index % 5) * (high - low)  # crosses at one rate stand one below the other
            texts = [f"diverged in {len(setting.diverged)} of {len(setting.runs)}" for setting in lost]
            traces.append(
                {
                    "x": [setting.lr for setting in lost],
                    "y": [10**height if is_log else height] * len(lost),
                    "mode": "markers",
                    "marker": {"symbol": "x-thin", "size": 10, "line": {"width": 3, "color": colour(one)}},
                    "legendgroup": one.group,
                    "name": chart_text(one.label),
                    "customdata": texts,
                    "hovertemplate": f"{chart_text(one.label)}<br>lr %{{x:.3g}}: %{{customdata}}<extra></extra>",
                }
            )
    rates = [setting.lr for one in swept for setting in one.swept if setting.lr]
    layout = {"xaxis": log_axis("learning rate", rates, rate), "yaxis": y}
    return Chart(f"{name.capitalize()} against the learning rate of {_names(swept)}.", traces, layout, height=400)


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
            "line": {"width": 0, "color": colour(one)},
            "fill": "toself",
            "fillcolor": f"{colour(one)}/0.18",
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
            "marker": marker(one, 9),
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
            "marker": {"symbol": "x-thin", "size": 14, "line": {"width": 4, "color": colour(one)}},
            "cliponaxis": False,
            "legendgroup": one.group,
            "name": chart_text(one.label),
            "hovertemplate": f"{chart_text(one.label)}: diverged<extra></extra>",
        }
    ]


def _names(series: Sequence[Series]) -> str:
    return joined([one.name for one in series])
