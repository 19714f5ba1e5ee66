"""The static picture, for documents: losses against steps and time in the optimizer, in the report's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from descend.compare.records import Comparison, Run
from descend.compare.results import bars, charts, looks
from descend.compare.results.coincide import pairs
from descend.compare.results.curves import loss_curve, raw_curve
from descend.compare.results.series import Series, gather, window
from descend.reporting.axes import log_axis
from descend.reporting.palette import LIGHT, style
from descend.reporting.text import number, seconds, shortened

MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "x": "X",
    "triangle-down": "v",
}
DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (4, 2)), "dot": (0, (1, 1.5)), "dashdot": (0, (5, 1.5, 1, 1.5))}


def picture(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """Return the figure. Texts are taken as they are, dollars included."""
    series = gather(runs)
    height = max(5.0, 1.2 + 0.45 * len(series))
    figure = Figure(figsize=(11, height), layout="constrained", facecolor=LIGHT.surface)
    losses, times = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_losses(losses, comparison, series)
    _draw_times(times, series)
    if series:  # below, where it hides no curve
        figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9, handlelength=3.2)
    return figure


def _draw_losses(axes: Axes, comparison: Comparison, series: Sequence[Series]) -> None:
    drawn = looks.layers(series, pairs(series))
    curves = {one.index: loss_curve(one.best, "steps") for one in series}
    for one in series:
        look, curve, layer = style(one.index), curves[one.index], drawn[one.index]
        colour = LIGHT.series[look.colour]
        order = 2 if layer == "under" else 3
        if len(series) <= charts.RAW:
            axes.plot(*raw_curve(one.best, "steps"), color=colour, linewidth=0.6, alpha=0.2, zorder=1)
        axes.fill_between(curve.x, curve.low, curve.high, where=_finite(curve.high), color=colour, alpha=0.15, zorder=1)
        axes.plot(
            curve.x,
            curve.middle,
            color=colour,
            linewidth=looks.WIDTHS[layer] * 0.8,
            linestyle=DASHES[looks.dash(one, layer)],
            marker=MARKERS[look.marker],
            markevery=((one.index + 0.5) / len(series) / 6, 1 / 6) if len(curve.x) > 12 else None,
            markersize=6,
            markeredgecolor=LIGHT.surface,
            label=_plain(_legend_name(one)),
            zorder=order,
        )
    calm = [curves[one.index] for one in series if not one.best.diverged] or list(curves.values())
    axis = looks.value_axis(comparison.loss_name, calm, [curve.middle[:1] for curve in curves.values()])
    top = 10 ** axis["range"][1] if "range" in axis else math.inf
    for one in series:
        cross = charts.end(one, curves[one.index], top)
        if cross:
            colour = LIGHT.series[style(one.index).colour]
            axes.plot(*cross, "x", color=colour, markersize=9, markeredgewidth=2.5, zorder=4, clip_on=False)
    if "range" in axis:
        low, high = axis["range"]
        axes.set(yscale="log", ylim=(10**low, 10**high))
        axes.set_yticks(axis["tickvals"], axis["ticktext"])
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="step", ylabel=_plain(comparison.loss_name))
    steps = window(series)
    averaged = f", mean of {steps} steps" if steps > 1 else ""
    axes.set_title(
        _plain(f"{shortened(comparison.task, bars.LABEL)}: training loss{averaged}"),
        loc="left",
        fontsize=11,
    )
    _style(axes)


def _draw_times(axes: Axes, series: Sequence[Series]) -> None:
    axes.set_title("time in the optimizer per step", loc="left", fontsize=11)
    drawn = [(bar.series, bar.parts["optimizer"]) for bar in bars.step_bars(series) if bar.parts.get("optimizer")]
    for row, (one, duration) in enumerate(drawn):
        look = style(one.index)
        axes.plot(duration, row, MARKERS[look.marker], color=LIGHT.series[look.colour], markersize=9)
        axes.annotate(
            _plain(f"{shortened(one.label, bars.LABEL)}  {seconds(duration)}"),
            (0, row),
            xycoords=("axes fraction", "data"),
            xytext=(2, 9),
            textcoords="offset points",
            fontsize=9,
        )
    if drawn:
        durations = [duration for _, duration in drawn]
        axes.set(xlim=(0, 1.1 * max(durations)), ylim=(len(drawn) - 0.5, -0.8))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
        if bars.is_wide(durations):
            axis = log_axis("", durations, seconds)
            low, high = axis["range"]
            margin = 0.05 * (high - low)  # beside the markers
            axes.set(xscale="log", xlim=(10 ** (low - margin), 10 ** (high + margin)))
            axes.set_xticks(axis["tickvals"], axis["ticktext"])
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color=LIGHT.muted)
        axes.set_xticks([])
    axes.set_yticks([])
    _style(axes)


def _style(axes: Axes) -> None:
    axes.grid(color=LIGHT.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.ink, which="both", color=LIGHT.line)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT.line)


def _legend_name(one: Series) -> str:
    return one.name + (f", diverged{_at(one)}" if one.best.diverged else "")


def _at(one: Series) -> str:
    steps = [run.diverged_at for run in one.best.diverged if run.diverged_at]
    return f" at step {number(min(steps))}" if steps else ""


def _finite(values: Any) -> Any:
    return [math.isfinite(value) for value in values]


def _plain(text: str) -> str:
    """Return the start of ``text`` so that matplotlib does not read mathematics between dollars."""
    return shortened(text, 60).replace("$", r"\$")
