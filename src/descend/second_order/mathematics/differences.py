"""Derivatives by finite differences, from values of the function inside its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]
Scheme: TypeAlias = Literal["2-point", "3-point"]
SCHEMES = get_args(Scheme)
EVALUATIONS = {"2-point": 1, "3-point": 2}  # a variable
POWER = {"2-point": 1 / 2, "3-point": 1 / 3}  # of the precision: the length with the least sum of both errors


def lengths(x: Vector, scheme: Scheme, absolute: Any = None, relative: Any = None) -> Vector:
    """Lengths of the differences, one for each variable.

    Args:
        x: the point.
        scheme: of the differences.
        absolute: lengths, > 0.
        relative: lengths as multiples of the entries of x. Default: a power of the precision, times max(1, abs(x)).

    Source: Nocedal & Wright 2006, section 8.1.
    """
    default = np.finfo(np.float64).eps ** POWER[scheme] * np.maximum(1.0, np.abs(x))
    if absolute is None and relative is None:
        return default
    wanted = np.abs(relative * x) if absolute is None else np.broadcast_to(np.abs(absolute), x.shape)
    return np.where(x + wanted == x, default, wanted)


def difference_gradient(fun: Callable[[Vector], float], x: Vector, value: float, *options: Any) -> Vector:
    """The gradient of a function of one value; arguments as for ``difference_jacobian``."""
    jacobian = difference_jacobian(lambda point: np.full(1, fun(point)), x, np.full(1, value), *options)
    return jacobian.reshape(-1)


def difference_jacobian(
    fun: Callable[[Vector], Vector],
    x: Vector,
    values: Vector,
    length: Vector,
    scheme: Scheme,
    lower: Vector,
    upper: Vector,
) -> Vector:
    """The Jacobian of a function, evaluated within bounds only; 0 for a variable that they fix.

    Args:
        fun: gives the values at a point; keeps no reference to its argument.
        x, values: the point, within the bounds, and the function there.
        length: of the differences. Away from zero, unless a bound is nearer; at most what the bounds leave.
        scheme: ``"2-point"`` takes one evaluation a variable; ``"3-point"`` two, and has an error of second order.
        lower, upper: the bounds; infinite where there is none.
    Returns:
        The Jacobian, one row for each value.
    """
    jacobian = np.zeros((len(values), len(x)))
    point = x.copy()

    def move(i: int, offset: float) -> tuple[Vector, float]:
        """The values with variable i moved, and by how much it was moved, after rounding."""
        point[i] = min(max(x[i] + offset, lower[i]), upper[i])
        moved = point[i] - x[i]
        others = fun(point) if moved else values
        point[i] = x[i]
        return others, moved

    for i in range(len(x)):
        below, above, h = x[i] - lower[i], upper[i] - x[i], length[i]
        if scheme == "3-point" and h <= min(below, above):
            (ahead, a), (behind, b) = move(i, h), move(i, -h)
            jacobian[:, i] = (ahead - behind) / (a - b)
            continue
        sign, room = _side(x[i], h * EVALUATIONS[scheme], below, above)
        h = min(h, room / EVALUATIONS[scheme])
        near, a = move(i, sign * h)
        if not a:
            continue
        slope = (near - values) / a
        if scheme == "3-point":
            far, b = move(i, sign * 2 * h)
            if b != a:  # the slope at x of the parabola through three points
                slope = slope + (slope - (far - values) / b) * a / (b - a)
        jacobian[:, i] = slope
    return jacobian


def _side(x: float, reach: float, below: float, above: float) -> tuple[int, float]:
    """The direction in which to go, and the room there: away from zero if the reach fits, else where there is more."""
    if reach <= (above if x >= 0 else below):
        return (1, above) if x >= 0 else (-1, below)
    return (1, above) if above >= below else (-1, below)
