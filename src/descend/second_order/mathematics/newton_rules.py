"""How Newton's method in a trust region judges steps: decisions about one problem from numbers, or about many.

Numbers of many problems are arrays (K,), which may hold NaN and infinity.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from descend.second_order.mathematics.arrays import choose

Numbers: TypeAlias = Any  # a float, or an array of one for each problem
Mask: TypeAlias = Any

ACCEPTED = 1e-4  # ratio of actual to predicted decrease from which a step is accepted
GOOD, POOR = 0.75, 0.25  # ratios above and below which the radius grows and shrinks
GROWTH, SHRINK = 2.0, 0.25
EXTENSION = 0.05  # further decrease predicted beyond a step, relative to its own, for which a longer one is tried
MAX_EXTENSION = 10.0  # times the step


def judged(fall: Numbers, decrease: Numbers, slopes: Numbers, noise: Numbers, coarse: Numbers) -> tuple[Numbers, Mask]:
    """The ratio of the actual to the predicted decrease, and whether the values differ by no more than rounding.

    Args:
        fall: of the value.
        decrease: the predicted one, > 0.
        slopes: the sum of the slopes along the step at both ends; they have more digits than differences of values.
        noise: rounding errors of values.
        coarse: those of values that are equal.
    """
    is_blind = (decrease <= choose(fall == 0, coarse, noise)) & (abs(fall) <= noise)
    return choose(is_blind, -slopes / 2, fall) / decrease, is_blind


def radius_after(radius: Any, norm: Numbers, ratio: Numbers, on_boundary: Mask) -> Any:
    """The radius after a trial; of one problem it may be None."""
    return choose(ratio < POOR, SHRINK * norm, choose((ratio > GOOD) & on_boundary, GROWTH * norm, radius))


def extension(times: Numbers, whole_fall: Numbers, fall: Numbers, noise: Numbers) -> Numbers:
    """By what to multiply an accepted step to try a longer one; 1 if the quartic predicts too little further decrease.

    Args:
        times, whole_fall: the minimum of the quartic; NaN if it has none.
        fall: of the value.
        noise: rounding errors of values.
    """
    is_longer = (fall > noise) & (times > 1) & (whole_fall >= (1 + EXTENSION) * fall)
    return choose(is_longer, choose(times > MAX_EXTENSION, MAX_EXTENSION, times), 1.0)


def shortening(times: Numbers) -> Numbers:
    """Factor for a rejected step: to the minimum of the quartic, NaN if it has none, within limits."""
    inside = choose(times < 0.1, 0.1, choose(times > 0.5, 0.5, times))
    return choose(times != times, SHRINK, inside)
