"""The quartic that interpolates a function along Newton's step, and its first minimum."""

from __future__ import annotations

import numpy as np


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
        # In units of the slope: q(t) = -t + h t^2 / 2 + c t^3 + d t^4.
        h, value, end = np.divide([curvature, -fall, slope], -slope_before)
        excess, turn = value + 1 - h / 2, end + 1 - h
        c, d = 4 * excess - turn, turn - 3 * excess
        if not (np.isfinite([c, d, h]).all() and slope_before < 0):
            return None
        roots = np.roots([4 * d, 3 * c, h, -1])
    minima = roots.real[(np.abs(roots.imag) <= 1e-7 * np.abs(roots)) & (roots.real > 0)]
    if not len(minima):
        return None
    t = float(minima.min())
    return t, float(t * (1 - t * (h / 2 + t * (c + t * d)))) * -slope_before
