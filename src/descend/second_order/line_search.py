"""Line searches: how far to go along a direction, as pure functions of phi(step) -> (value, slope).

Where phi is NaN or infinite there is a wall: no later trial is at or beyond it. Every search calls phi at most
``max_eval`` times, never beyond ``max_step``, and says how it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

Phi = Callable[[float], tuple[float, float]]

SHRINK = 0.66  # a bracket not narrower than this after two trials is bisected: Moré & Thuente 1994, section 4
MARGIN = 0.01  # a trial keeps this share of the bracket away from its ends
NARROW = 1e-15  # relative width at which a bracket is one point
TINY = 1e-25  # the same for a bracket that begins at 0, relative to the first trial
NEAR_WALL = 0.25  # a search that still falls stops when it is relatively this near to a wall
MAX_FLAT = 4  # trials in a bracket whose values do not differ from the first before nothing more is hoped for


class Outcome(str, Enum):
    """How a line search ended; each member equals its own name, so that ``outcome == "found"`` works."""

    found = "found"  # the conditions hold at the returned step
    max_step = "max_step"  # the step is max_step, the value has fallen sufficiently (or by mere noise) and still falls
    max_eval = "max_eval"  # max_eval calls were made, the last ones inside a bracket
    no_bracket = "no_bracket"  # the value still fell when the calls or the numbers ended: unbounded below?
    precision = "precision"  # the bracket is one point, or its values differ by no more than the noise
    non_finite = "non_finite"  # the value fell up to near where phi is NaN or infinite, or no trial was finite

    def __str__(self) -> str:
        return self.value


class Search(NamedTuple):
    """Where a line search ended: the accepted step, or else the lowest finite trial, step 0 if none is lower."""

    step: float
    value: float
    slope: float
    n_eval: int
    outcome: Outcome


class Trial(NamedTuple):
    """A point where phi was finite."""

    step: float
    value: float
    slope: float


def hager_zhang(
    phi: Phi,
    value: float,
    slope: float,
    step: float,
    *,
    c1: float = 1e-4,
    c2: float = 0.7,
    max_step: float = math.inf,
    max_eval: int = 30,
    noise: float = 0.0,
    growth: float = 10.0,
) -> Search:
    """Find a step that fulfils the Wolfe or the approximate Wolfe conditions, in few evaluations.

    Wolfe: value(t) <= value + c1 t slope, and slope(t) >= c2 slope. Approximate, for values at the limit of their
    precision: (2 c1 - 1) slope >= slope(t) >= c2 slope, and value(t) <= value + noise.

    Args:
        phi: step -> (value, slope).
        value: phi at 0, finite.
        slope: its derivative at 0, finite and < 0.
        step: first trial, > 0; lowered to ``max_step``.
        c1: share of the promised decrease that suffices, 0 < c1 < 1/2. Default: 1e-4.
        c2: share of the slope that may be left, c1 <= c2 < 1. Default: 0.7.
        max_step: largest allowed step, > 0. Default: inf.
        max_eval: largest number of calls of phi, >= 1. Default: 30.
        noise: by how much values may be off through rounding, >= 0, absolute. Default: 0.
        growth: largest ratio of a trial to the one before while phi still falls, > 1. Default: 10.
    Returns:
        A ``Search``; its outcome is ``found`` only if the conditions hold at its step.
    Raises:
        ValueError: if an argument is outside its range.
    Example:
        >>> hager_zhang(lambda t: ((t - 4) ** 2, 2 * (t - 4)), value=16.0, slope=-8.0, step=1.0)
        Search(step=4.0, value=0.0, slope=0.0, n_eval=2, outcome=<Outcome.found: 'found'>)

    Source: Hager & Zhang 2005, https://doi.org/10.1137/030601880
    """
    _check("hager_zhang", value, slope, step, max_step, max_eval, growth)
    if not (0 < c1 < 0.5 and c1 <= c2 < 1):
        raise ValueError(f"hager_zhang: c1 < 1/2 and 0 < c1 <= c2 < 1 are needed, got c1={c1} and c2={c2}.")
    if not 0 <= noise < math.inf:
        raise ValueError(f"hager_zhang: noise must be finite and >= 0, got {noise}; 0 means exact values.")
    line = _Line(phi, Trial(0.0, value, slope), max_step, noise)
    low = previous = line.start  # still falling, and not above the start
    high: Trial | None = None  # rising, or above the start: an acceptable step lies between low and high
    step = min(step, max_step)
    while line.n_eval < max_eval and step > 0:  # NaN: there is no step left to try
        trial = line.evaluate(step)
        if trial is None:
            high, step = None, line.before_wall(low)
            continue
        sufficient = trial.value <= value + c1 * trial.step * slope
        within = trial.value <= value + noise
        if trial.slope >= c2 * slope and (sufficient or (within and trial.slope <= (2 * c1 - 1) * slope)):
            return line.end(Outcome.found, trial)
        # A decrease below the noise cannot be seen in the values: then the slope alone says where to go.
        if trial.slope < c2 * slope and (sufficient or (within and -slope * trial.step <= 4 * noise)):
            if trial.step >= max_step:
                return line.end(Outcome.max_step, trial)
            previous, low = low, trial
        else:
            high = trial
        if high is None:
            step = line.ahead(low, _beyond(previous, low, noise), 1.5 * low.step, growth * low.step)
        else:
            step = line.inside(low, high, trial, _within(low, high, noise))
    return line.give_up(step, bracketed=high is not None)


def strong_wolfe(
    phi: Phi,
    value: float,
    slope: float,
    step: float,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_step: float = math.inf,
    max_eval: int = 30,
    growth: float = 4.0,
) -> Search:
    """Find a step t with value(t) <= value + c1 t slope and |slope(t)| <= c2 |slope|, the strong Wolfe conditions.

    Args:
        phi, value, slope, step, max_step, max_eval: as in ``hager_zhang``.
        c1: share of the promised decrease that suffices, 0 < c1 <= c2. Default: 1e-4.
        c2: share of the slope that may be left, c1 <= c2 < 1. Default: 0.9.
        growth: largest ratio of a stride to the one before while phi still falls, > 1. Default: 4.
    Returns, Raises: as in ``hager_zhang``.
    Example:
        >>> search = strong_wolfe(lambda t: ((t - 4) ** 2, 2 * (t - 4)), value=16.0, slope=-8.0, step=1.0, c2=0.5)
        >>> round(search.step, 2), search.n_eval, search.outcome
        (4.0, 2, <Outcome.found: 'found'>)

    Source: Moré & Thuente 1994, https://doi.org/10.1145/192115.192132
    """
    _check("strong_wolfe", value, slope, step, max_step, max_eval, growth)
    if not 0 < c1 <= c2 < 1:
        raise ValueError(f"strong_wolfe: 0 < c1 <= c2 < 1 is needed, got c1={c1} and c2={c2}.")

    def excess(t: Trial) -> Trial:
        """Their psi, phi less what would suffice, by which trials are compared until one rises and suffices."""
        return t if rising else Trial(t.step, t.value - value - c1 * t.step * slope, t.slope - c1 * slope)

    line = _Line(phi, Trial(0.0, value, slope), max_step)
    best, rising = line.start, False
    other: Trial | None = None  # the far end of the bracket, on either side of best
    step = min(step, max_step)
    while line.n_eval < max_eval and step > 0:  # NaN: there is no step left to try
        trial = line.evaluate(step)
        if trial is None:
            best, other = line.lowest_falling(c1), None
            step = line.before_wall(best)
            continue
        sufficient = trial.value <= value + c1 * trial.step * slope
        if sufficient and abs(trial.slope) <= -c2 * slope:
            return line.end(Outcome.found, trial)
        if sufficient and trial.slope < 0 and trial.step >= max_step:
            return line.end(Outcome.max_step, trial)
        rising = rising or (sufficient and trial.slope > 0)
        x, t, y = excess(best), excess(trial), excess(other) if other else None
        guess = _more_thuente(x, t, y)
        if t.value > x.value:
            other = trial
        else:
            other = best if t.slope * math.copysign(1.0, x.slope) < 0 else other
            best = trial
        if other is None:
            stride = t.step - x.step
            step = line.ahead(best, guess, t.step + 1.1 * stride, t.step + growth * stride)
        else:
            low, high = sorted((best, other))
            step = line.inside(low, high, trial, guess)
    return line.give_up(step, bracketed=other is not None)


def backtracking(
    phi: Phi,
    value: float,
    slope: float,
    step: float,
    *,
    c1: float = 1e-4,
    shrink: tuple[float, float] = (0.1, 0.5),
    max_eval: int = 30,
) -> Search:
    """Shorten a step until value(t) <= value + c1 t slope, Armijo's condition.

    Args:
        phi, value, slope, max_eval: as in ``hager_zhang``; slopes only help to choose the next trial.
        step: first and largest trial, > 0.
        c1: share of the promised decrease that suffices, 0 < c1 < 1. Default: 1e-4.
        shrink: least and largest ratio of a trial to a finite one before, both in (0, 1). Default: (0.1, 0.5).
    Returns, Raises: as in ``hager_zhang``.
    Example:
        >>> backtracking(lambda t: ((t - 1) ** 2, 2 * (t - 1)), value=1.0, slope=-2.0, step=5.0)
        Search(step=1.0, value=0.0, slope=0.0, n_eval=2, outcome=<Outcome.found: 'found'>)

    Source: Nocedal & Wright 2006, section 3.5, https://doi.org/10.1007/978-0-387-40065-5
    """
    _check("backtracking", value, slope, step, math.inf, max_eval, 2.0)
    least, largest = shrink
    if not (0 < c1 < 1 and 0 < least <= largest < 1):
        raise ValueError(f"backtracking: c1 and an increasing shrink must be in (0, 1), got c1={c1}, shrink={shrink}.")
    line = _Line(phi, Trial(0.0, value, slope))
    while line.n_eval < max_eval and step > 0:  # NaN: there is no step left to try
        trial = line.evaluate(step)
        if trial is None:
            step = line.before_wall(line.start)
        elif trial.value <= value + c1 * trial.step * slope:
            return line.end(Outcome.found, trial)
        elif line.is_point(line.start, trial, trial):
            step = math.nan
        else:
            step = _clip(_minimiser(line.start, trial), least * step, largest * step)
    return line.give_up(step, bracketed=len(line.trials) > 1)


class _Line:
    """What is known of one line: its limits, the trials made on it, and how its bracket shrank."""

    def __init__(self, phi: Phi, start: Trial, max_step: float = math.inf, noise: float = 0.0) -> None:
        self.phi, self.start, self.max_step, self.noise = phi, start, max_step, noise
        self.trials = [start]
        self.wall = math.inf  # the smallest step at which phi was not finite
        self.n_eval = self.n_flat = 0
        self.width = self.older = math.inf

    def evaluate(self, step: float) -> Trial | None:
        """Call phi; where it is not finite there is a wall, and no trial."""
        self.n_eval += 1
        value, slope = self.phi(step)
        if not (math.isfinite(value) and math.isfinite(slope)):
            self.wall = step
            return None
        self.trials.append(Trial(step, value, slope))
        return self.trials[-1]

    def lowest_falling(self, c1: float) -> Trial:
        """The lowest trial before the wall that has fallen sufficiently and still falls; the start is one."""
        value, slope = self.start.value, self.start.slope
        falling = [t for t in self.trials if t.slope < 0 and t.value <= value + c1 * t.step * slope]
        return min((t for t in falling if t.step < self.wall), key=lambda t: (t.value, -t.step))

    def before_wall(self, low: Trial) -> float:
        """A tenth of the way from low to the wall; NaN where there is no room."""
        step = low.step + 0.1 * (self.wall - low.step)
        return step if step > low.step else math.nan

    def ahead(self, low: Trial, guess: float, least: float, most: float) -> float:
        """The next trial beyond low while there is no bracket; NaN where there is no room."""
        if low.step >= (1 - NEAR_WALL) * self.wall:
            return math.nan
        most = min(most, low.step + 0.5 * (self.wall - low.step), self.max_step, math.nextafter(math.inf, 0))
        step = _clip(guess, min(least, most), most)
        return step if step > low.step else math.nan

    def inside(self, low: Trial, high: Trial, trial: Trial, guess: float) -> float:
        """The next trial within a bracket, of which trial is the newest end; NaN where there is no room."""
        if self.is_point(low, high, trial):
            return math.nan
        older, self.older, self.width = self.older, self.width, high.step - low.step
        # The first good step may be many orders of magnitude below the first bad one.
        least = low.step + (MARGIN if low.step else TINY) * self.width
        step = _clip(math.nan if self.width > SHRINK * older else guess, least, high.step - MARGIN * self.width)
        return step if low.step < step < high.step else math.nan

    def is_point(self, low: Trial, high: Trial, trial: Trial) -> bool:
        """Whether a bracket has shrunk to rounding, in its width or in its values."""
        self.n_flat += abs(trial.value - self.start.value) <= self.noise
        point = max(NARROW * high.step, TINY * self.trials[1].step)
        return high.step - low.step <= point or self.n_flat >= MAX_FLAT

    def end(self, outcome: Outcome, trial: Trial | None = None) -> Search:
        """The result: the given trial, or else the lowest, the earliest among equals."""
        step, value, slope = trial or min(self.trials, key=lambda trial: trial.value)
        return Search(step, value, slope, self.n_eval, outcome)

    def give_up(self, step: float, bracketed: bool) -> Search:
        """The result when there is no call left, or no step to try."""
        if bracketed:
            return self.end(Outcome.max_eval if step > 0 else Outcome.precision)
        return self.end(Outcome.no_bracket if self.wall == math.inf else Outcome.non_finite)


def _check(who: str, value: float, slope: float, step: float, max_step: float, max_eval: int, growth: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{who}: value must be finite, got {value}; start where the function is finite.")
    if not -math.inf < slope < 0:
        raise ValueError(f"{who}: slope must be finite and < 0, got {slope}; take a descent direction.")
    if not 0 < step < math.inf:
        raise ValueError(f"{who}: step must be finite and > 0, got {step}; to go back, turn the direction.")
    if not max_step > 0:
        raise ValueError(f"{who}: max_step must be > 0, got {max_step}; inf means no limit.")
    if not max_eval >= 1:
        raise ValueError(f"{who}: max_eval must be at least 1, got {max_eval}; a step is judged by a trial.")
    if not growth > 1:
        raise ValueError(f"{who}: growth must be > 1, got {growth}; 2 to 10 are usual.")


def _clip(guess: float, least: float, most: float) -> float:
    """The guess within its limits, halfway between them if there is none."""
    return least + 0.5 * (most - least) if math.isnan(guess) else min(max(guess, least), most)


def _minimiser(a: Trial, b: Trial, noise: float = 0.0) -> float:
    """The least point of a cubic, or of a parabola through the slopes where values only differ by noise."""
    guess = _cubic(a, b) if abs(b.value - a.value) > noise else math.nan
    return _secant(a, b) if math.isnan(guess) and a.slope * math.copysign(1.0, b.slope) < 0 else guess


def _within(low: Trial, high: Trial, noise: float) -> float:
    """The least point between low and high by a cubic, or a power of the distance if phi rises even more steeply."""
    width, rise = high.step - low.step, high.value - low.value
    steeper, mean = 1 - high.slope / low.slope, 1 - rise / width / low.slope
    power = steeper / mean if mean > 0 else 0.0
    if not 3 < power < math.inf or abs(rise) <= noise:
        return _minimiser(low, high, noise)
    # Where low.slope * t + constant * t**power is least; a cubic would come 2 or 3 times closer with each trial.
    return low.step + width * math.exp(-math.log(steeper) / (power - 1))


def _beyond(previous: Trial, low: Trial, noise: float) -> float:
    """Where phi may stop falling beyond low; infinity if it falls ever faster."""
    if low.slope <= previous.slope:
        return math.inf
    guess = _minimiser(previous, low, noise)
    return guess if guess > low.step else _secant(previous, low)


def _more_thuente(best: Trial, trial: Trial, other: Trial | None) -> float:
    """The next trial by the four cases of Moré & Thuente 1994, section 4; NaN for the middle, inf for far ahead."""
    cubic, secant = _cubic(best, trial), _secant(best, trial)
    if trial.value > best.value:
        parabola = _parabola(best, trial)
        return cubic if abs(cubic - best.step) < abs(parabola - best.step) else 0.5 * cubic + 0.5 * parabola
    if trial.slope * math.copysign(1.0, best.slope) < 0:
        return cubic if abs(cubic - trial.step) >= abs(secant - trial.step) else secant
    if abs(trial.slope) > abs(best.slope):
        return _cubic(trial, other) if other else math.inf
    ahead = math.copysign(math.inf, trial.step - best.step)
    cubic = cubic if (cubic - trial.step) * math.copysign(1.0, ahead) > 0 else ahead
    secant = ahead if math.isnan(secant) else secant
    if other is None:
        return max(cubic, secant)
    nearer = cubic if abs(cubic - trial.step) < abs(secant - trial.step) else secant
    bound = trial.step + SHRINK * (other.step - trial.step)
    return min(nearer, bound) if ahead > 0 else max(nearer, bound)


def _cubic(a: Trial, b: Trial) -> float:
    """Where the cubic through both values and slopes is least; NaN if nowhere. The steps differ."""
    width = b.step - a.step
    mean = (b.value - a.value) / abs(width)
    start, end = (a.slope, b.slope) if width > 0 else (-a.slope, -b.slope)
    scale = max(abs(start), abs(end), abs(mean))
    if not 0 < scale < math.inf:
        return math.nan
    start, end, mean = start / scale, end / scale, mean / scale  # nothing overflows when squared
    square, cube = 3 * mean - 2 * start - end, start + end - 2 * mean
    root = square * square - 3 * cube * start
    if not root >= 0:
        return math.nan
    # Of the two ways to write the root of the derivative, the one without cancellation.
    root = math.sqrt(root)
    numerator, denominator = (-start, square + root) if square >= 0 else (root - square, 3 * cube)
    return a.step + width * (numerator / denominator) if denominator else math.nan


def _parabola(a: Trial, b: Trial) -> float:
    """Where the parabola through both values and the slope at a is least; NaN if nowhere."""
    mean = (b.value - a.value) / (b.step - a.step)
    return _secant(a, b._replace(slope=2 * mean - a.slope))


def _secant(a: Trial, b: Trial) -> float:
    """Where the line through both slopes is 0; NaN if nowhere."""
    if a.slope == b.slope:
        return math.nan
    scale = max(abs(a.slope), abs(b.slope))
    start, end = a.slope / scale, b.slope / scale
    return a.step + (b.step - a.step) * (start / (start - end))
