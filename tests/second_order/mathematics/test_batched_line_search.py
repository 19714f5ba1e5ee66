"""Line searches of many problems are those of single ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from descend.second_order.mathematics.arrays import full, library
from descend.second_order.mathematics.batched_line_search import CODES, RUNNING, Lines
from descend.second_order.mathematics.line_search import Outcome, Search, hager_zhang

Line = Callable[[float], tuple[float, float]]


def parabola(minimum: float) -> Line:
    return lambda t: ((t - minimum) ** 2, 2 * (t - minimum))


def steep(power: float) -> Line:
    return lambda t: (-t + t**power, -1 + power * t ** (power - 1))


def wavy(frequency: float) -> Line:
    return lambda t: (-0.1 * t + math.sin(frequency * t), -0.1 + frequency * math.cos(frequency * t))


def walled(wall: float) -> Line:
    """Falls until it is NaN."""
    return lambda t: (-t, -1.0) if t < wall else (math.nan, math.nan)


def endless(t: float) -> tuple[float, float]:
    return -t, -1.0


def turning(t: float) -> tuple[float, float]:
    """Falls more and more steeply, then rises."""
    return (-t * t - t, -2 * t - 1) if t < 50 else (t - 2600, 1.0)


def noisy(t: float) -> tuple[float, float]:
    """Values are rounded away; only slopes tell."""
    return 1.0, (t - 3.0) * 1e-12


def lying(t: float) -> tuple[float, float]:
    """Rises although its slope says that it falls."""
    return t, -1.0


def flat(t: float) -> tuple[float, float]:
    return 0.0, -1e-30


LINES: list[Line] = [
    *map(parabola, (1e-9, 0.3, 1.0, 4.0, 1e3, 1e12)),
    *map(steep, (1.5, 2.0, 4.0, 20.0, 60.0)),
    *map(wavy, (1.0, 7.0, 90.0)),
    *map(walled, (1e-12, 0.01, 0.5, 3.0, 1e6)),
    endless,
    turning,
    noisy,
    lying,
    flat,
]


def searched(kind: str, step: float, max_step: float, max_eval: int, noise: float) -> tuple[Lines, list[Search]]:
    """All lines, searched together and one by one."""
    array: Any = np.array if kind == "numpy" else partial(torch.tensor, dtype=torch.float64)
    starts = [line(0.0) for line in LINES]
    starts = [(value, slope if slope < 0 else -1.0) for value, slope in starts]
    alone = [
        hager_zhang(line, *start, step, max_step=max_step, max_eval=max_eval, noise=noise)
        for line, start in zip(LINES, starts, strict=True)
    ]
    like = array([[0.0]])
    value, slope = array([value for value, _ in starts]), array([slope for _, slope in starts])
    lines, count = Lines(len(LINES), like), len(LINES)
    everywhere = full(like, count, True)
    limits = (full(like, count, float(number)) for number in (step, max_step, max_eval, noise))
    lines.begin(everywhere, value, slope, *limits)
    with np.errstate(all="ignore"):
        ended: dict[int, tuple[Any, ...]] = {}
        for _ in range(max_eval):
            trials = [
                line(t) if t == t else (math.nan, math.nan) for line, t in zip(LINES, lines.step.tolist(), strict=True)
            ]
            lines.advance(*(array([trial[k] for trial in trials]) for k in (0, 1)), ~everywhere)
            for i in np.flatnonzero(np.asarray(lines.outcome) != RUNNING):
                is_newest = lines.outcome[i] in (CODES[Outcome.found], CODES[Outcome.max_step])
                end = (lines.trial if is_newest else lines.lowest)[:, i].tolist()
                ended.setdefault(int(i), (*end, int(lines.n_eval[i]), list(Outcome)[int(lines.outcome[i])]))
    assert sorted(ended) == list(range(count))
    assert library(lines.step) is (np if kind == "numpy" else torch)
    return [Search(*ended[i]) for i in range(count)], alone


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("step", "max_step", "max_eval", "noise"),
    [
        (1.0, math.inf, 41, 0.0),
        (1e-3, 1e300, 41, 1e-10),
        (1e4, math.inf, 60, 0.0),
        (1.0, 2.0, 20, 0.0),
        (0.7, 1e9, 3, 0.0),
    ],
)
def test_lines_are_searched_as_one_by_one(kind: str, step: float, max_step: float, max_eval: int, noise: float) -> None:
    together, alone = searched(kind, step, max_step, max_eval, noise)
    for one, other in zip(together, alone, strict=True):
        assert one.outcome == other.outcome
        assert one.n_eval == other.n_eval
        assert one.step == pytest.approx(other.step, rel=1e-9, abs=1e-300)


def test_lines_that_begin_later_know_nothing_of_earlier_searches() -> None:
    lines = Lines(2, np.zeros(1))
    every, limits = np.array([True, True]), [np.full(2, number) for number in (1.0, math.inf, 41.0, 0.0)]
    lines.begin(every, np.array([1.0, 1.0]), np.array([-1.0, -1.0]), *limits)
    with np.errstate(all="ignore"):
        for _ in range(3):
            lines.advance(np.array([2.0, math.nan]), np.array([3.0, math.nan]), ~every)
        lines.begin(np.array([True, False]), np.array([16.0, 0.0]), np.array([-8.0, 0.0]), *limits)
        assert lines.step[0] == 1.0
        assert lines.n_eval.tolist() == [0, 3]
        lines.advance(np.array([9.0, math.nan]), np.array([-6.0, math.nan]), ~every)
    assert lines.step[0] == pytest.approx(4.0)
