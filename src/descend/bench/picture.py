"""What was measured, as a picture: bars of a step's time beside the memory's limit."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure

from descend.bench.measure import Case
from descend.bench.methods import DEFAULT, FOREACH, FUSED, OURS
from descend.bench.report import LABELS, Report, title
from descend.reporting.palette import LIGHT
from descend.reporting.text import seconds

COLORS = dict(zip(LABELS, LIGHT.series, strict=False))
SPREAD = 30  # times the shortest bar, from which on the longest would leave no room for the others
HATCHES = {OURS: "", DEFAULT: "//", FOREACH: "..", FUSED: "xx"}


def draw(report: Report) -> Figure:
    """Return the figure: a panel per case, a bar per contender, a line at the limit."""
    cases = [case for case in report.cases if any(row.seconds for row in case.rows)]
    heights = [sum(bool(row.seconds) for row in case.rows) + 1.6 for case in cases]
    figure = Figure(figsize=(9, 0.9 + 0.42 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(cases), squeeze=False, height_ratios=heights)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        _panel(axis, case)
    figure.supxlabel("\n".join(wrap(report.where(), 120)), fontsize=7)
    return figure


def _panel(axis: Any, case: Case) -> None:
    rows = [(row, timing) for row in case.rows if (timing := row.timing)]
    unit, scale = ("ms", 1e3) if max(timing.median for _, timing in rows) >= 1e-3 else ("us", 1e6)
    for place, (row, timing) in enumerate(rows):
        median = timing.median * scale
        spread = [[median - timing.quartile1 * scale], [timing.quartile3 * scale - median]]
        axis.barh(
            place,
            median,
            color=COLORS[row.name],
            hatch=HATCHES[row.name],
            edgecolor=LIGHT.surface,
            xerr=spread,
            error_kw={"ecolor": LIGHT.ink, "capsize": 2, "linewidth": 1},
        )
        axis.annotate(
            seconds(timing.median) + ("" if row.agrees else ", differs"),
            (timing.quartile3 * scale, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    limit = rows[0][0].limit * scale
    medians = [timing.median * scale for _, timing in rows]
    is_wide = max(medians) > SPREAD * min(medians)
    axis.axvline(limit, color=LIGHT.ink, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(rows)), [LABELS[row.name] for row, _ in rows], fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    if is_wide:
        axis.set_xscale("log")
    axis.set_xlim(left=min(limit, *medians) / 2 if is_wide else 0)
    axis.set_xlabel(f"{unit} a step{', logarithmic' * is_wide}; dashed: the memory's limit", fontsize=8)
    axis.set_title("\n".join(wrap(title(case), 100)), fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
