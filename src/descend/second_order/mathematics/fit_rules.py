"""How least squares judges steps: decisions about one problem from numbers, or about many from arrays (K,).

Where a number is computed for all problems and used for some, arrays may hold NaN and infinity; callers silence the
warnings.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from descend.second_order.mathematics.arrays import choose

Numbers: TypeAlias = Any  # a float, or an array of one for each problem
Mask: TypeAlias = Any

FIRST_RADIUS = 0.5  # relative to the length of the start
POOR, GOOD = 0.25, 0.75  # ratios of the fall of the cost to the predicted one
NOISE = 10.0  # units in the last place that the cost may be off by
ROUNDING = 100.0  # units in the last place of x that a step may be too short to matter
PROGRESS = 0.25  # of the promised fall, relative to the one before
BETTER = 0.5  # error of a model, relative to the other's, that decides for it
LONGEST_CORRECTION = 0.5  # of a step, relative to it
SHORTEST_RETRY = 0.2  # of a step, relative to it
ALIGNED = 0.8  # cosine of two steps, the bend along one of which tells about the other


def noise(value: Numbers, change: Numbers, eps: float) -> Numbers:
    """Rounding error of a cost: of the sum, and of residuals that are small differences of large numbers.

    How large is not known, but rounding x alone changes the residuals. D does not tell by how much: it remembers
    columns of the Jacobian at a far start.

    Args:
        value: the cost.
        change: of the residuals where all variables change independently, relative to the variables' change.
        eps: the precision.
    """
    return eps * (NOISE * abs(value) + (2 * abs(value)) ** 0.5 * change)


def is_within(tol: float, eps: float, value: Numbers, decrease: Numbers, norm: Numbers, length: Numbers) -> Mask:
    """Whether a model's minimizer is within a tolerance: it promises, or moves, too little.

    Args:
        tol: of the root of the cost.
        eps: the precision.
        value: the cost.
        decrease, norm: what the step to the minimizer promises, and |D s|.
        length: |D x|.
    """
    return (decrease <= tol**2 * abs(value)) | (norm <= min(tol, ROUNDING * eps) * length)


def is_progress(promised: Numbers, noise: Numbers, before: Numbers) -> Mask:
    """Whether a promised fall of the cost is beyond rounding, or a fraction of the one promised before."""
    return (promised > noise) | (promised < PROGRESS * before)


def is_rounding(value: Numbers, size: Numbers, eps: float) -> Mask:
    """Whether residuals are zero: no larger than what rounding variables of the start's size would make of them.

    Args:
        value: the cost.
        size: |J x|.
        eps: the precision.
    """
    return (value > 0) & ((2 * abs(value)) ** 0.5 <= NOISE * eps * size)


def radius_after(radius: Numbers, norm: Numbers, ratio: Numbers, on_boundary: Mask) -> Numbers:
    """The radius of the trust region after a step that was taken.

    Args:
        radius: the old one.
        norm: |D s|.
        ratio: fall of the cost by the predicted one.
        on_boundary: whether the radius has limited the step.
    Source: Moré 1978, section 4, https://doi.org/10.1007/BFb0067700
    """
    return choose(ratio < POOR, 0.5 * norm, choose(on_boundary & (ratio <= GOOD), radius, 2 * norm))


def shortening(ratio: Numbers) -> Numbers:
    """The factor for a step that was not taken: to the minimum of the parabola through the slope and both values."""
    factor = 0.5 / (1 - ratio)
    return choose(factor < 0.1, 0.1, choose(factor > 0.5, 0.5, factor))


def uses_curvature(is_curved: Mask, missing: Numbers, straight: Numbers, fall: Numbers) -> Mask:
    """Whether the next model has curvature: the one that has predicted a fall of the cost better, or the last one.

    Args:
        is_curved: whether the last model had.
        missing: by how much less a model with curvature predicts.
        straight: the fall that J alone predicts.
        fall: of the cost.
    """
    errors = abs(fall - straight), abs(fall - (straight - missing))
    is_worse = (missing == 0) | (errors[0] < BETTER * errors[1])
    return choose(is_worse, False, choose(errors[1] < BETTER * errors[0], True, is_curved))


def is_known(share: Numbers, last_norm: Numbers, norm: Numbers) -> Mask:
    """Whether a step has about the direction of the last one, so that the bend along that tells about it.

    Args:
        share: what multiple of the last step is nearest to it.
        last_norm, norm: |D s| of both.
    """
    return abs(share) * last_norm >= ALIGNED * norm


def longest_retry(norm: Numbers, correction: Numbers) -> Numbers:
    """By what to shorten a rejected step so that its correction, which shrinks faster, is short; 0 if by too much.

    Args:
        norm, correction: |D s| of both, >= 0.
    """
    longest = LONGEST_CORRECTION * norm / choose(correction == 0, 5e-324, correction)
    return choose(longest >= SHORTEST_RETRY, choose(longest < 1.0, longest, 1.0), 0.0)
