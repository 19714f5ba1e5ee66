"""The quartic that interpolates a function along Newton's step, and its first minimum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from descend.second_order.mathematics.arrays import library


def first_minimum(fall: float, slope_before: float, curvature: float, slope: float) -> tuple[float, float] | None:
    """The first minimum of the quartic along a step, from its beginning (0) to its end (1) and beyond.

    Args:
        fall: by how much the function falls from 0 to 1.
        slope_before: its slope at 0, < 0.
        curvature: its second derivative at 0.
        slope: its slope at 1.
    Returns:
        Where it is, > 0, and by how much the quartic falls from 0 to there; None without a minimum, or if the numbers
        are too large.
    Example:
        >>> minimum = first_minimum(fall=3.0, slope_before=-4.0, curvature=2.0, slope=-2.0)  # of (2 - t)**2
        >>> [round(number, 6) for number in minimum]
        [2.0, 4.0]
    """
    with np.errstate(all="ignore"):
        t, whole_fall = first_minima(*map(np.float64, (fall, slope_before, curvature, slope)))
    return None if np.isnan(t) else (float(t), float(whole_fall))


def first_minima(fall: Any, slope_before: Any, curvature: Any, slope: Any) -> tuple[Any, Any]:
    """``first_minimum`` of numbers, or of arrays of them; NaN where there is none.

    In 1 / t, the slope of q(t) = -t + h t^2 / 2 + c t^3 + d t^4 is a cubic with a leading
    coefficient of 1: its largest zero is the first one of the slope.
    """
    xp: Any = library(fall)
    unit = -slope_before
    h, value, end = curvature / unit, -fall / unit, slope / unit
    excess, turn = value + 1 - h / 2, end + 1 - h
    c, d = 4 * excess - turn, turn - 3 * excess
    is_there = xp.isfinite(c) & xp.isfinite(d) & xp.isfinite(h) & (slope_before < 0)
    h, c, d = (xp.where(is_there, number, 0.0) for number in (h, c, d))
    u = largest_zeros(-h, -3 * c, -4 * d)
    t = 1 / u
    is_there = is_there & (u > 0) & xp.isfinite(t)
    return xp.where(is_there, t, math.nan), xp.where(is_there, t * (1 - t * (h / 2 + t * (c + t * d))) * unit, math.nan)


def largest_zeros(a2: Any, a1: Any, a0: Any) -> Any:
    """The largest real zeros of the cubics u^3 + a2 u^2 + a1 u + a0; zeros within rounding of a double one are real.

    Source: Cardano and Viète, as in Press et al. 2007, Numerical Recipes, section 5.6; then Newton's method.
    """
    xp: Any = library(a2)
    scale = xp.maximum(abs(a2), xp.maximum(abs(a1) ** 0.5, abs(a0) ** (1 / 3)))
    scale = xp.where(scale > 0, scale, 1.0)
    a2, a1, a0 = a2 / scale, a1 / scale / scale, a0 / scale / scale / scale
    p, q = (a2 * a2 - 3 * a1) / 9, (2 * a2 * a2 * a2 - 9 * a2 * a1 + 27 * a0) / 54
    discriminant = q * q - p * p * p
    # Three real zeros: the largest is the one at the angle nearest to 0.
    root = xp.where(p > 0, abs(p) ** 0.5, 1.0)
    cosine = (-q / root / root / root).clip(-1.0, 1.0)
    three = xp.where(p > 0, 2 * root * xp.cos(xp.arccos(cosine) / 3), 0.0)
    # One real zero, and a pair whose imaginary part may be rounding.
    one = (abs(q) + xp.where(discriminant > 0, abs(discriminant), 0.0) ** 0.5) ** (1 / 3)
    one = xp.where(q > 0, -one, one)
    other = xp.where(one != 0, p / one, 0.0)
    u = xp.where(discriminant > 0, one + other, three) - a2 / 3
    pair = -(one + other) / 2 - a2 / 3
    is_real = (discriminant > 0) & (abs(one - other) * 0.75**0.5 <= 1e-7 * abs(pair)) & (pair > u)
    for _ in range(3):
        value = ((u + a2) * u + a1) * u + a0
        better = u - value / ((3 * u + 2 * a2) * u + a1)
        is_better = abs(((better + a2) * better + a1) * better + a0) < abs(value)
        u = xp.where(is_better, better, u)
    return scale * xp.where(is_real, pair, u)
