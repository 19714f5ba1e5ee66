"""The line search: how far to go along a direction, given phi(step) -> (value, slope).

Once phi has been NaN or infinite at a step, every later trial is shorter. The search calls phi at most ``max_eval``
times, never beyond ``max_step``, and says how it ended.

A search is a row of numbers. ``begin`` fills it in, ``advance`` takes phi at the step that the row asks for. One search
is a list, and these functions run in Python; those of many problems are rows of an array, and the same functions run
compiled. What raises in Python only (division by zero, the logarithm of a negative number) is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

Phi = Callable[[float], tuple[float, float]]

SHRINK = 0.66  # a bracket not narrower than this after two trials is bisected: Moré & Thuente 1994, section 4
MARGIN = 0.01  # a trial keeps this share of the bracket away from its ends
NARROW = 1e-15  # relative width at which a bracket is one point
TINY = 1e-25  # the same for a bracket that begins at 0, relative to the first trial
NEAR_NONFINITE = 0.25  # a search that still falls stops when it is relatively this near to a non-finite trial
MAX_FLAT = 4  # trials in a bracket with the value of the start, to within the noise, before the search gives up
LARGEST = math.nextafter(math.inf, 0)


class Outcome(str, Enum):
    """How a line search ended; each member equals its own name, so that ``outcome == "found"`` works."""

    found = "found"  # the conditions hold at the returned step
    max_step = "max_step"  # the step is max_step, the value has fallen sufficiently (or by mere noise) and still falls
    max_eval = "max_eval"  # max_eval calls were made, the last ones inside a bracket
    no_bracket = "no_bracket"  # the value still fell when the calls or the numbers ended: unbounded below?
    precision = "precision"  # the bracket is one point, or its values differ by no more than the noise
    non_finite = "non_finite"  # the value fell until phi was NaN or infinite, or no trial was finite

    def __str__(self) -> str:
        return self.value


class Search(NamedTuple):
    """How a line search ended: at the accepted step, else at the lowest finite trial, which may be step 0."""

    step: float
    value: float
    slope: float
    n_eval: int
    outcome: Outcome


class Trial(NamedTuple):
    """A step at which phi was finite."""

    step: float
    value: float
    slope: float


Row: TypeAlias = Any  # a list of WIDTH numbers, or an array of them
# OUTCOME is a position in OUTCOMES, or one of the two below. NONFINITE is the smallest step where phi was not finite;
# FIRST the first where it was; BRACKET and OLDER are the last two widths.
STEP, OUTCOME, N_EVAL, N_FLAT, NONFINITE, FIRST, BRACKET, OLDER = range(8)
MAX_STEP, MAX_EVAL, NOISE, C1, C2, GROWTH, VALUE0, SLOPE0 = range(8, 16)
# Trials, three numbers each. LOWEST: of equals the earliest. An acceptable step lies between LOW, where phi still falls
# and is not above the start, and HIGH, where it rises or is above the start; infinite while there is none.
LOWEST, LOW, HIGH, WIDTH = range(16, 28, 3)
OUTCOMES = list(Outcome)
FOUND, AT_MAX_STEP, AT_MAX_EVAL, NO_BRACKET, PRECISION, NON_FINITE = map(float, range(6))
RUNNING, NO_DESCENT = -1.0, -2.0  # the slope at the start is not finite and negative: there is nothing to search


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
    """Find a step that satisfies the Wolfe or the approximate Wolfe conditions, in few evaluations.

    Wolfe: value(t) <= value + c1 t slope, and slope(t) >= c2 slope. Approximate, for values at the limit of their
    precision: (2 c1 - 1) slope >= slope(t) >= c2 slope, and value(t) <= value + noise.

    Args:
        phi: step -> (value, slope).
        value: phi at 0, finite.
        slope: its derivative at 0, finite and < 0.
        step: first trial, > 0; lowered to ``max_step``.
        c1: fraction of the decrease ``-step * slope`` that suffices, 0 < c1 < 1/2. Default: 1e-4.
        c2: fraction of the slope that may remain, c1 <= c2 < 1. Default: 0.7.
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
    _check(value, slope, step, max_step, max_eval, growth)
    if not (0 < c1 < 0.5 and c1 <= c2 < 1):
        raise ValueError(f"hager_zhang: c1 < 1/2 and 0 < c1 <= c2 < 1 are needed, got c1={c1} and c2={c2}.")
    if not 0 <= noise < math.inf:
        raise ValueError(f"hager_zhang: noise must be finite and >= 0, got {noise}; 0 means exact values.")
    search = [0.0] * WIDTH
    begin(search, value, slope, step, max_step, max_eval, noise, c1, c2, growth)
    while search[OUTCOME] == RUNNING:
        step = search[STEP]
        value, slope = phi(step)
        advance(search, value, slope)
    outcome = OUTCOMES[int(search[OUTCOME])]
    if not (outcome is Outcome.found or outcome is Outcome.max_step):
        step, value, slope = search[LOWEST : LOWEST + 3]
    return Search(step, value, slope, int(search[N_EVAL]), outcome)


def begin(
    search: Row,
    value: float,
    slope: float,
    step: float,
    max_step: float,
    max_eval: float,
    noise: float,
    c1: float = 1e-4,
    c2: float = 0.7,
    growth: float = 10.0,
) -> None:
    """Begin a search in a row, whatever it held; the arguments are those of ``hager_zhang``."""
    search[STEP], search[N_EVAL], search[N_FLAT] = min(step, max_step), 0.0, 0.0
    search[OUTCOME] = RUNNING if -math.inf < slope < 0 else NO_DESCENT
    search[NONFINITE], search[FIRST], search[BRACKET], search[OLDER] = math.inf, math.nan, math.inf, math.inf
    search[MAX_STEP], search[MAX_EVAL], search[NOISE] = max_step, max_eval, noise
    search[C1], search[C2], search[GROWTH] = c1, c2, growth
    search[VALUE0], search[SLOPE0] = value, slope
    for at in (LOWEST, LOW):
        search[at], search[at + 1], search[at + 2] = 0.0, value, slope
    search[HIGH] = math.inf


def advance(search: Row, value: float, slope: float) -> None:
    """Take phi at the step that the search asks for. Then it asks for another one, or has ended."""
    step, slope0, noise = search[STEP], search[SLOPE0], search[NOISE]
    search[N_EVAL] += 1.0
    if not (math.isfinite(value) and math.isfinite(slope)):
        search[NONFINITE], search[HIGH] = step, math.inf
        _go_on(search, _back_off(search))
        return
    if math.isnan(search[FIRST]):
        search[FIRST] = step
    if value < search[LOWEST + 1]:
        search[LOWEST], search[LOWEST + 1], search[LOWEST + 2] = step, value, slope
    sufficient = value <= search[VALUE0] + search[C1] * step * slope0
    within = value <= search[VALUE0] + noise
    is_flat = slope >= search[C2] * slope0
    if is_flat and (sufficient or (within and slope <= (2 * search[C1] - 1) * slope0)):
        search[OUTCOME] = FOUND
        return
    # A decrease below the noise cannot be seen in the values: then the slope alone says where to go.
    falls = not is_flat and (sufficient or (within and -slope0 * step <= 4 * noise))
    if falls and step >= search[MAX_STEP]:
        search[OUTCOME] = AT_MAX_STEP
        return
    trial = Trial(step, value, slope)
    previous = low = _trial(search, LOW)
    if falls:
        low, high = trial, _trial(search, HIGH)
        _put(search, LOW, low)
    else:
        high = trial
        _put(search, HIGH, high)
    if high.step < math.inf:
        step = _inside(search, low, high, trial, _within(low, high, noise))
    else:
        step = _ahead(search, low, _beyond(previous, low, noise))
    _go_on(search, step)


def _go_on(search: Row, step: float) -> None:
    """Ask for a trial at a step; end where no call is left, or no step to try (NaN)."""
    search[STEP] = step
    if step > 0 and search[N_EVAL] < search[MAX_EVAL]:
        return
    if search[HIGH] < math.inf:
        search[OUTCOME] = AT_MAX_EVAL if step > 0 else PRECISION
    else:
        search[OUTCOME] = NO_BRACKET if search[NONFINITE] == math.inf else NON_FINITE


def _back_off(search: Row) -> float:
    """A tenth of the way from low to the step at which phi was not finite; NaN where there is no room."""
    low = search[LOW]
    step = low + 0.1 * (search[NONFINITE] - low)
    return step if step > low else math.nan


def _ahead(search: Row, low: Trial, guess: float) -> float:
    """The next trial beyond low while there is no bracket; NaN where there is no room."""
    nonfinite = search[NONFINITE]
    if low.step >= (1 - NEAR_NONFINITE) * nonfinite:
        return math.nan
    most = min(search[GROWTH] * low.step, low.step + 0.5 * (nonfinite - low.step), search[MAX_STEP], LARGEST)
    step = _clip(guess, min(1.5 * low.step, most), most)
    return step if step > low.step else math.nan


def _inside(search: Row, low: Trial, high: Trial, trial: Trial, guess: float) -> float:
    """The next trial within a bracket, of which trial is the newest end; NaN where there is no room."""
    if _is_point(search, low, high, trial):
        return math.nan
    older, width = search[OLDER], high.step - low.step
    search[OLDER], search[BRACKET] = search[BRACKET], width
    # The first good step may be many orders of magnitude below the first bad one.
    least = low.step + (MARGIN if low.step else TINY) * width
    step = _clip(math.nan if width > SHRINK * older else guess, least, high.step - MARGIN * width)
    return step if low.step < step < high.step else math.nan


def _is_point(search: Row, low: Trial, high: Trial, trial: Trial) -> bool:
    """Whether a bracket has shrunk to rounding, in its width or in its values."""
    if abs(trial.value - search[VALUE0]) <= search[NOISE]:
        search[N_FLAT] += 1.0
    n_flat: float = search[N_FLAT]
    point = max(NARROW * high.step, TINY * search[FIRST])
    return high.step - low.step <= point or n_flat >= MAX_FLAT


def _trial(search: Row, at: int) -> Trial:
    return Trial(search[at], search[at + 1], search[at + 2])


def _put(search: Row, at: int, trial: Trial) -> None:
    search[at], search[at + 1], search[at + 2] = trial


def _check(value: float, slope: float, step: float, max_step: float, max_eval: int, growth: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"hager_zhang: value must be finite, got {value}; start where the function is finite.")
    if not -math.inf < slope < 0:
        raise ValueError(f"hager_zhang: slope must be finite and < 0, got {slope}; take a descent direction.")
    if not 0 < step < math.inf:
        raise ValueError(f"hager_zhang: step must be finite and > 0, got {step}; to go back, turn the direction.")
    if not max_step > 0:
        raise ValueError(f"hager_zhang: max_step must be > 0, got {max_step}; inf means no limit.")
    if not max_eval >= 1:
        raise ValueError(f"hager_zhang: max_eval must be at least 1, got {max_eval}; a step is judged by a trial.")
    if not growth > 1:
        raise ValueError(f"hager_zhang: growth must be > 1, got {growth}; 2 to 10 are usual.")


def _clip(guess: float, least: float, most: float) -> float:
    """The guess within its limits; halfway between them if it is NaN."""
    return least + 0.5 * (most - least) if math.isnan(guess) else min(max(guess, least), most)


def _minimizer(a: Trial, b: Trial, noise: float) -> float:
    """Minimizer of the cubic, or of a parabola through the slopes where the values differ by noise only."""
    guess = _cubic(a, b) if abs(b.value - a.value) > noise else math.nan
    return _secant(a, b) if math.isnan(guess) and a.slope * math.copysign(1.0, b.slope) < 0 else guess


def _within(low: Trial, high: Trial, noise: float) -> float:
    """Minimizer between low and high, by a cubic, or by a power of the distance where phi rises more steeply."""
    width, rise = high.step - low.step, high.value - low.value
    steeper, mean = 1 - high.slope / low.slope, 1 - rise / width / low.slope
    power = steeper / mean if mean > 0 else 0.0
    if not 3 < power < math.inf or abs(rise) <= noise:
        return _minimizer(low, high, noise)
    # The minimizer of low.slope * t + constant * t**power; with a cubic each trial comes only 2 or 3 times closer.
    return low.step + width * math.exp(-math.log(steeper) / (power - 1))


def _beyond(previous: Trial, low: Trial, noise: float) -> float:
    """Where phi may stop falling beyond low; infinity if the slope is getting steeper."""
    if low.slope <= previous.slope:
        return math.inf
    guess = _minimizer(previous, low, noise)
    return guess if guess > low.step else _secant(previous, low)


def _cubic(a: Trial, b: Trial) -> float:
    """Minimizer of the cubic through both values and slopes, b beyond a; NaN if there is none."""
    width = b.step - a.step
    start, end, mean = a.slope, b.slope, (b.value - a.value) / width
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


def _secant(a: Trial, b: Trial) -> float:
    """Zero of the line through both slopes; NaN if there is none."""
    if a.slope == b.slope:
        return math.nan
    scale = max(abs(a.slope), abs(b.slope))
    start, end = a.slope / scale, b.slope / scale
    return a.step + (b.step - a.step) * (start / (start - end))
