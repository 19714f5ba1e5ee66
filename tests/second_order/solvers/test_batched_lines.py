"""Line searches of many problems are those of single ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from descend.backends.cpu import library as library_of_loops
from descend.backends.cpu import loops, object_files
from descend.second_order.mathematics.arrays import full, library
from descend.second_order.mathematics.dense_box import box_directions
from descend.second_order.mathematics.line_search import (
    AT_MAX_STEP,
    FOUND,
    NO_DESCENT,
    OUTCOME,
    OUTCOMES,
    RUNNING,
    WIDTH,
    Search,
    hager_zhang,
)
from descend.second_order.solvers import batched_lines
from descend.second_order.solvers.batched_lines import Lines, advance_all, begin_some, run_in_python

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
    most = (full(like, count, float(number)) for number in (step, max_step, max_eval, noise))
    lines.begin(everywhere, value, slope, *most)
    ended: dict[int, tuple[Any, ...]] = {}
    for _ in range(max_eval):
        trials = [
            line(t) if t == t else (math.nan, math.nan) for line, t in zip(LINES, lines.step.tolist(), strict=True)
        ]
        lines.advance(*(array([trial[k] for trial in trials]) for k in (0, 1)))
        for i in np.flatnonzero(np.asarray(lines.outcome) != RUNNING):
            outcome = float(lines.outcome[i])
            end = (lines.trial if outcome in (FOUND, AT_MAX_STEP) else lines.lowest)[:, i].tolist()
            ended.setdefault(int(i), (*end, int(lines.n_eval[i]), OUTCOMES[int(outcome)]))
    assert sorted(ended) == list(range(count))
    assert library(lines.step) is (np if kind == "numpy" else torch)
    return [Search(*ended[i]) for i in range(count)], alone


@pytest.mark.parametrize("few", [0, len(LINES) + 1], ids=["compiled", "python"])
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
def test_lines_are_searched_as_one_by_one(
    kind: str, step: float, max_step: float, max_eval: int, noise: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_lines, "FEW", few)
    together, alone = searched(kind, step, max_step, max_eval, noise)
    assert together == alone


def limits(count: int) -> list[Any]:
    return [np.full(count, number) for number in (1.0, math.inf, 41.0, 0.0)]


def test_lines_that_begin_later_know_nothing_of_earlier_searches() -> None:
    lines, every = Lines(2, np.zeros(1)), np.array([True, True])
    lines.begin(every, np.array([1.0, 1.0]), np.array([-1.0, -1.0]), *limits(2))
    for _ in range(3):
        lines.advance(np.array([2.0, math.nan]), np.array([3.0, math.nan]))
    lines.begin(np.array([True, False]), np.array([16.0, 0.0]), np.array([-8.0, 0.0]), *limits(2))
    assert lines.step[0] == 1.0
    assert lines.n_eval.tolist() == [0, 3]
    lines.advance(np.array([9.0, math.nan]), np.array([-6.0, math.nan]))
    assert lines.step[0] == pytest.approx(4.0)


def test_lines_without_descent_are_not_searched() -> None:
    slopes = np.array([0.0, 1.0, -math.inf, math.nan, -1.0])
    lines = Lines(5, np.zeros(1))
    lines.begin(np.full(5, True), np.zeros(5), slopes, *limits(5))
    assert lines.outcome.tolist() == [NO_DESCENT] * 4 + [RUNNING]
    lines.advance(np.full(5, -1.0), np.full(5, -1.0))
    assert lines.outcome.tolist() == [NO_DESCENT] * 4 + [RUNNING]
    lines.keep(np.array([1, 4]))
    assert lines.slope0.tolist() == [1.0, -1.0]
    assert lines.trial.tolist() == [[1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]]


@pytest.mark.parametrize(("function", "arrays"), [(begin_some, 8), (advance_all, 3), (box_directions, 14)])
def test_compiled_loops_are_loaded_without_numba(function: Any, arrays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every process would compile them again."""
    library_of_loops.loop(function, arrays)
    files: list[Any] = []
    monkeypatch.setattr(object_files, "_loaded", {})
    read = object_files.private_files.read
    monkeypatch.setattr(object_files.private_files, "read", lambda path: files.append(read(path)) or files[-1])
    library_of_loops.loop.__wrapped__(function, arrays)
    (file,) = files
    symbols = file.split(b"\n")[1].split()
    assert not [symbol for symbol in symbols if symbol.lower().startswith((b"nrt", b"numba"))]


EXTREMES = [0.0, 5e-324, 1e-310, 1e-30, 1.0, 1e30, 1e300, 1.7e308]
POSITIVE = st.sampled_from(EXTREMES[1:]) | st.floats(min_value=5e-324, max_value=1.7e308)
ANYTHING = st.sampled_from([*EXTREMES, math.nan, math.inf, -0.0]) | st.floats(-1e3, 1e3) | st.floats()
LINE = st.tuples(st.floats(-1e3, 1e3), st.one_of(POSITIVE.map(lambda slope: -slope), ANYTHING), POSITIVE)
LIMITS = st.tuples(POSITIVE | st.just(math.inf), st.integers(1, 40), st.sampled_from([0.0, 1e-9, 1.0]))


@settings(deadline=None)
@given(st.lists(st.tuples(LINE, LIMITS), min_size=1, max_size=4), st.lists(ANYTHING, min_size=8, max_size=40))
def test_compiled_searches_are_those_of_python_bit_for_bit(starts: list[Any], answers: list[float]) -> None:
    """Answers have no function behind them."""
    numbers = np.array([(*line, *most) for line, most in starts]).T.copy()
    searches = [np.full((len(starts), WIDTH), math.nan) for _ in range(2)]
    for round_ in range(len(answers) // 2):
        for rows, run in zip(searches, (loops.run, run_in_python), strict=True):
            if not round_:
                run(begin_some, rows, np.ones(len(starts)), *numbers)
            value, slope = (np.resize(np.roll(answers, -i - round_), len(starts)) for i in (0, 1))
            run(advance_all, rows, value, slope)
        bits = [np.where(np.isnan(rows), math.nan, rows).tobytes() for rows in searches]
        assert bits[0] == bits[1]
    assert np.isin(searches[0][:, OUTCOME], [*range(len(OUTCOMES)), RUNNING, NO_DESCENT]).all()
