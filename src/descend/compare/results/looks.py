"""How a series looks in all figures: its colour, marker, line and dashes; and the axis of losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from descend.compare.results.coincide import Pair
from descend.compare.results.curves import Curve, Floats
from descend.compare.results.series import Series
from descend.reporting.axes import log_axis
from descend.reporting.page import chart_text
from descend.reporting.palette import style
from descend.reporting.text import shortened

Trace = dict[str, Any]
WIDTHS = {"alone": 2.2, "under": 6.0, "over": 2.2}  # of curves, in pixels, by layer
TITLE = 50  # characters that fit along an axis on a phone


def layers(series: Sequence[Series], pairs: Sequence[Pair]) -> dict[int, str]:
    """Return how each series' curve is drawn: "under" is wide, and "over" is dashed and lies on it."""
    drawn = {one.index: "alone" for one in series}
    for pair in pairs:
        drawn[pair.first.index] = "under"
        drawn[pair.second.index] = "over"
    return drawn


def dash(one: Series, layer: str) -> str:
    """Return the dashes of a curve: one that lies on another lets it through."""
    return {"over": "dash", "under": "solid"}.get(layer, style(one.index).dash)


def line(one: Series, x: Any, y: Any, width: float, dashes: str | None = None) -> Trace:
    """Return a curve that the series' legend shows and hides."""
    return {
        "x": list(x),
        "y": list(y),
        "mode": "lines",
        "line": stroke(one, width, dashes or style(one.index).dash),
        "legendgroup": one.group,
        "name": chart_text(one.label),
        "hovertemplate": f"{chart_text(one.label)}<br>%{{x:.4g}}: %{{y:.4g}}<extra></extra>",
    }


def stroke(one: Series, width: float, dash: str, opacity: float | None = None) -> Trace:
    """Return plotly's ``line`` of a trace."""
    return {"color": colour(one) + (f"/{opacity}" if opacity else ""), "width": width, "dash": dash}


def marker(one: Series, size: int) -> Trace:
    """Return plotly's ``marker`` of a trace."""
    return {
        "symbol": style(one.index).marker,
        "size": size,
        "color": colour(one),
        "line": {"width": 1, "color": "$surface"},
    }


def colour(one: Series) -> str:
    """Return the series' colour, as the page writes it."""
    return f"$series{style(one.index).colour}"


def value_axis(title: str, curves: Iterable[Curve], more: Iterable[Floats]) -> dict[str, Any]:
    """Return the axis of a loss: logarithmic if all is positive and spans more than a factor of three."""
    title = chart_text(shortened(title, TITLE))
    arrays = [np.concatenate([curve.low, curve.middle, curve.high]) for curve in curves]
    values = np.concatenate([*arrays, *more, np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 3 * values.min():
        return log_axis(title, values.tolist())
    return {"title": {"text": title}}
