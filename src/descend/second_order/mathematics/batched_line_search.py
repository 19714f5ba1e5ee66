"""The line search of ``line_search.py`` for many problems at once, each on a line of its own.

The formulas, their order and the ways to end are those of ``hager_zhang``. What it does with ``if`` is done here by
choosing between arrays, so that a round costs the same number of operations for one problem and for a thousand.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from descend.second_order.mathematics.arrays import full, keep, library
from descend.second_order.mathematics.line_search import (
    MARGIN,
    MAX_FLAT,
    NARROW,
    NEAR_NONFINITE,
    SHRINK,
    TINY,
    Outcome,
)
from descend.second_order.mathematics.space import Array

C1, C2 = 1e-4, 0.7  # the constants of Wolfe's conditions, as in ``hager_zhang``
GROWTH = 10.0  # largest ratio of a trial to the one before while phi still falls
CODES = {outcome: code for code, outcome in enumerate(Outcome)}
RUNNING = -1  # code of a search that has not ended
STEP, VALUE, SLOPE = 0, 1, 2  # rows of a trial


class Lines:
    """The searches of K problems: brackets, limits and next trials.

    ``begin`` starts some searches, ``advance`` takes one trial of each. A search has ended where ``outcome`` is not
    ``RUNNING``; it must begin again before the next ``advance``. A trial is an array (3, K): step, value and slope.

    Attributes:
        step: the next trial's, (K,).
        trial, lowest: the newest trial, and the lowest with the start among them, of equals the earliest.
        is_lowest: where these are the same, (K,).
        outcome: how the search ended, a code in ``CODES``; (K,).
        n_eval: trials of this search, (K,).
    """

    _TRIALS: ClassVar = ("start", "low", "previous", "high", "lowest", "trial")
    _NUMBERS: ClassVar = (
        *("noise", "max_step", "max_eval", "step", "outcome", "n_eval", "n_flat"),
        *("is_bracketed", "nonfinite", "width", "older", "first"),
    )

    def __init__(self, count: int, like: Array) -> None:
        self.xp = library(like)
        self.start = self.low = self.previous = self.high = self.lowest = self.trial = full(like, (3, count), math.nan)
        self.noise = self.max_step = self.max_eval = self.step = full(like, count, math.nan)
        self.nonfinite = self.width = self.older = self.first = self.step
        self.n_eval = self.n_flat = full(like, count, 0)
        self.outcome = full(like, count, RUNNING)
        self.is_bracketed = self.is_lowest = full(like, count, False)

    def keep(self, rows: Array) -> None:
        """Forget all searches but these."""
        keep(self, self._TRIALS, rows, 1)
        keep(self, self._NUMBERS, rows)

    def begin(
        self, where: Array, value: Array, slope: Array, step: Array, max_step: Array, max_eval: Array, noise: Array
    ) -> None:
        """Begin a search in some problems; the arguments are those of ``hager_zhang``, (K,) each."""
        choose = self.xp.where
        self.start = choose(where, self.xp.stack([self.xp.zeros_like(step), value, slope]), self.start)
        self.low, self.previous, self.lowest = (
            choose(where, self.start, trial) for trial in (self.low, self.previous, self.lowest)
        )
        self.max_step = choose(where, max_step, self.max_step)
        self.step = choose(where, self.xp.minimum(step, max_step), self.step)
        self.max_eval, self.noise = choose(where, max_eval, self.max_eval), choose(where, noise, self.noise)
        self.outcome, self.n_eval = choose(where, RUNNING, self.outcome), choose(where, 0, self.n_eval)
        self.n_flat, self.first = choose(where, 0, self.n_flat), choose(where, math.nan, self.first)
        self.is_bracketed = self.is_bracketed & ~where
        self.nonfinite, self.width, self.older = (
            choose(where, math.inf, number) for number in (self.nonfinite, self.width, self.older)
        )

    def advance(self, value: Array, slope: Array, is_end: Array) -> None:
        """Take value and slope at ``step``, (K,), and find the next one.

        ``is_end`` says where the trial ends the search as found, whatever the conditions say.
        """
        xp, choose, step = self.xp, self.xp.where, self.step
        self.n_eval = self.n_eval + 1
        self.trial = trial = xp.stack([step, value, slope])
        _, value0, slope0 = self.start
        is_finite = xp.isfinite(value) & xp.isfinite(slope)
        sufficient = value <= value0 + C1 * step * slope0
        within = value <= value0 + self.noise
        is_flat = slope >= C2 * slope0
        found = is_finite & is_flat & (sufficient | (within & (slope <= (2 * C1 - 1) * slope0)))
        found = found | is_end
        goes_on = is_finite & ~found
        # A decrease below the noise cannot be seen in the values: then the slope alone says where to go.
        falling = goes_on & ~is_flat & (sufficient | (within & (-slope0 * step <= 4 * self.noise)))
        rising = goes_on & ~falling
        at_end = falling & (step >= self.max_step)
        outside = ~is_finite & ~found

        self.is_lowest = is_finite & (value < self.lowest[VALUE])
        self.lowest = choose(self.is_lowest, trial, self.lowest)
        self.first = choose(is_finite & (self.first != self.first), step, self.first)
        self.nonfinite = choose(outside, step, self.nonfinite)
        moves = falling & ~at_end
        self.previous, self.low = choose(moves, self.low, self.previous), choose(moves, trial, self.low)
        self.high = choose(rising, trial, self.high)
        self.is_bracketed = (self.is_bracketed | rising) & ~outside

        step = choose(outside, self._back_off(), self._next(goes_on & self.is_bracketed))
        has_step = step > 0  # NaN: there is no step left to try
        gave_up = ~(has_step & (self.n_eval < self.max_eval))
        reason = choose(
            self.is_bracketed,
            choose(has_step, CODES[Outcome.max_eval], CODES[Outcome.precision]),
            choose(self.nonfinite == math.inf, CODES[Outcome.no_bracket], CODES[Outcome.non_finite]),
        )
        self.step = step
        self.outcome = choose(gave_up, reason, self.outcome)
        self.outcome = choose(at_end, CODES[Outcome.max_step], self.outcome)
        self.outcome = choose(found, CODES[Outcome.found], self.outcome)

    def _back_off(self) -> Array:
        """A tenth of the way from low to the step at which phi was not finite; NaN where there is no room."""
        low = self.low[STEP]
        step = low + 0.1 * (self.nonfinite - low)
        return self.xp.where(step > low, step, math.nan)

    def _next(self, inside: Array) -> Array:
        """The next trial inside of a bracket, else ahead of low; NaN where there is no room."""
        choose, low, high, previous = self.xp.where, self.low, self.high, self.previous
        a, b = choose(self.is_bracketed, low, previous), choose(self.is_bracketed, high, low)
        secant = secant_step(a, b)
        guess = minimizer(a, b, secant, self.noise)
        beyond = choose(guess > low[STEP], guess, secant)
        beyond = choose(low[SLOPE] <= previous[SLOPE], math.inf, beyond)
        return choose(self.is_bracketed, self._inside(inside, guess), self._ahead(beyond))

    def _ahead(self, guess: Array) -> Array:
        """The next trial beyond low while there is no bracket; NaN where there is no room."""
        low = self.low[STEP]
        room = self.xp.minimum(low + 0.5 * (self.nonfinite - low), self.max_step)
        most = clip_above(self.xp.minimum(GROWTH * low, room), math.nextafter(math.inf, 0))
        step = clip(guess, self.xp.minimum(1.5 * low, most), most)
        is_room = (low < (1 - NEAR_NONFINITE) * self.nonfinite) & (step > low)
        return self.xp.where(is_room, step, math.nan)

    def _inside(self, where: Array, guess: Array) -> Array:
        """The next trial within a bracket, of which the newest trial is one end; NaN where there is no room."""
        xp, choose, low, high = self.xp, self.xp.where, self.low, self.high
        self.n_flat = self.n_flat + (where & (abs(self.trial[VALUE] - self.start[VALUE]) <= self.noise))
        width = high[STEP] - low[STEP]
        is_point = (width <= xp.maximum(NARROW * high[STEP], TINY * self.first)) | (self.n_flat >= MAX_FLAT)
        guess = choose(width > SHRINK * self.older, math.nan, power_step(low, high, guess, self.noise))
        self.older, self.width = choose(where, self.width, self.older), choose(where, width, self.width)
        # The first good step may be many orders of magnitude below the first bad one.
        least = low[STEP] + choose(low[STEP] > 0, MARGIN, TINY) * width
        step = clip(guess, least, high[STEP] - MARGIN * width)
        return choose(~is_point & (low[STEP] < step) & (step < high[STEP]), step, math.nan)


def clip(guess: Array, least: Array, most: Array) -> Array:
    """The guess within its limits; halfway between them if it is NaN."""
    xp: Any = library(guess)
    inside = xp.minimum(xp.maximum(guess, least), most)
    return xp.where(guess != guess, least + 0.5 * (most - least), inside)


def clip_above(numbers: Array, most: float) -> Array:
    """Numbers, at most one."""
    return np.minimum(numbers, most) if isinstance(numbers, np.ndarray) else numbers.clamp(max=most)


def minimizer(a: Array, b: Array, secant: Array, noise: Array) -> Array:
    """Minimizer of the cubic, or of a parabola through the slopes where the values differ by noise only."""
    xp: Any = library(a)
    guess = xp.where(abs(b[VALUE] - a[VALUE]) > noise, cubic_step(a, b), math.nan)
    turns = xp.where(xp.signbit(b[SLOPE]), -a[SLOPE], a[SLOPE]) < 0
    return xp.where((guess != guess) & turns, secant, guess)


def power_step(low: Array, high: Array, otherwise: Array, noise: Array) -> Array:
    """Minimizer between low and high of a power of the distance where phi rises more steeply than a cubic."""
    xp: Any = library(low)
    width, rise = high[STEP] - low[STEP], high[VALUE] - low[VALUE]
    steeper, mean = 1 - high[SLOPE] / low[SLOPE], 1 - rise / width / low[SLOPE]
    power = xp.where(mean > 0, steeper / mean, 0.0)
    is_steep = (power > 3) & (power < math.inf) & ~(abs(rise) <= noise)
    return xp.where(is_steep, low[STEP] + width * xp.exp(-xp.log(steeper) / (power - 1)), otherwise)


def cubic_step(a: Array, b: Array) -> Array:
    """Minimizer of the cubic through both values and slopes, b beyond a; NaN if there is none."""
    xp: Any = library(a)
    width = b[STEP] - a[STEP]
    mean = (b[VALUE] - a[VALUE]) / width
    scale = xp.maximum(xp.maximum(abs(a[SLOPE]), abs(b[SLOPE])), abs(mean))
    start, end, mean = a[SLOPE] / scale, b[SLOPE] / scale, mean / scale  # nothing overflows when squared
    square, cube = 3 * mean - 2 * start - end, start + end - 2 * mean
    # Of the two ways to write the root of the derivative, the one without cancellation.
    root = xp.sqrt(square * square - 3 * cube * start)  # NaN: there is none
    is_plain = square >= 0
    numerator, denominator = xp.where(is_plain, -start, root - square), xp.where(is_plain, square + root, 3 * cube)
    is_there = (scale > 0) & (scale < math.inf) & (denominator != 0) & (root >= 0)
    return xp.where(is_there, a[STEP] + width * (numerator / denominator), math.nan)


def secant_step(a: Array, b: Array) -> Array:
    """Zero of the line through both slopes; NaN if there is none."""
    xp: Any = library(a)
    scale = xp.maximum(abs(a[SLOPE]), abs(b[SLOPE]))
    start, end = a[SLOPE] / scale, b[SLOPE] / scale
    step = a[STEP] + (b[STEP] - a[STEP]) * (start / (start - end))
    return xp.where(a[SLOPE] == b[SLOPE], math.nan, step)
