"""Curves over seeds: median and quartiles, thinned to what a picture can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from descend.compare.records import Run
from descend.compare.results.series import Setting, losses, smooth_losses

Floats = NDArray[np.float64]
POINTS = 300  # of a curve in a picture

AXES: dict[str, Callable[[Run], Sequence[float]]] = {
    "steps": lambda run: range(1, len(run.losses) + 1),
    "time": lambda run: run.seconds,
    "evaluations": lambda run: run.evaluations,
}


@dataclass(frozen=True)
class Curve:
    """A measure over the course of the runs of a setting.

    Args:
        x: median over the seeds.
        low: first quartile over the seeds.
        middle: median over the seeds.
        high: third quartile over the seeds.
    """

    x: Floats
    low: Floats
    middle: Floats
    high: Floats


def loss_curve(setting: Setting, axis: str) -> Curve:
    """Return the smoothed training loss against "steps", "time" or "evaluations".

    A diverged run counts as infinitely high from where it diverged, and a run that stopped early keeps its last loss.
    Interrupted and failed runs count as far as they came. Against time, runs that shared the machine with others count
    only if there are no others.
    """
    runs = [run for run in setting.runs if run.alone or axis != "time"] or setting.runs
    return _over_seeds([(AXES[axis](run), smooth_losses(run), run.status) for run in runs])


def held_out_curve(setting: Setting, measure: Callable[[Run], Sequence[float]]) -> Curve:
    """Return ``test_losses`` or ``test_metrics`` against steps."""
    return _over_seeds([(run.test_steps, measure(run), run.status) for run in setting.runs])


def raw_curve(setting: Setting, axis: str) -> tuple[Floats, Floats]:
    """Return x and the losses of batches of the first seed, thinned."""
    run = setting.runs[0]
    y = losses(run)
    count = min(len(y), len(AXES[axis](run)))
    kept = thin(count)
    return np.array(AXES[axis](run)[:count], float)[kept], np.array(y[:count], float)[kept]


def thin(count: int, most: int = POINTS) -> NDArray[np.int64]:
    """Return at most ``most`` indices below ``count``, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _over_seeds(courses: Sequence[tuple[Sequence[float], Sequence[Any], str]]) -> Curve:
    courses = [(x, y, status) for x, y, status in courses if len(x) and len(y)]
    length = max((min(len(x), len(y)) for x, y, _ in courses), default=0)
    xs, ys = np.full((len(courses), length), np.nan), np.full((len(courses), length), np.nan)
    for row, (x, y, status) in enumerate(courses):
        count = min(len(x), len(y))
        xs[row, :count] = x[:count]
        ys[row, :count] = [np.inf if value is None or np.isnan(value) else value for value in y[:count]]
        if status == "diverged":
            ys[row, count:] = np.inf
        elif status == "finished":
            ys[row, count:] = ys[row, count - 1]
    if not courses:
        return Curve(*np.empty((4, 0)))
    kept = thin(length)
    xs, ys = xs[:, kept], ys[:, kept]
    low, middle, high = _quartiles(ys)
    is_shown = np.isfinite(middle)
    return Curve(*(values[is_shown] for values in (_quartiles(xs)[1], low, middle, high)))


def _quartiles(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return quartiles and median of each column without its NaN.

    The quartiles are elements of the column, since between a number and Inf there is no other.
    """
    last = (~np.isnan(values)).sum(axis=0) - 1
    in_order = np.sort(values, axis=0)  # NaN come last

    def element(place: Floats) -> Floats:
        found: Floats = np.take_along_axis(in_order, place.astype(np.int64)[None], axis=0)[0]
        return found

    middle = (element(np.floor(last / 2)) + element(np.ceil(last / 2))) / 2
    return element(np.floor(last / 4)), middle, element(np.ceil(last * 3 / 4))
