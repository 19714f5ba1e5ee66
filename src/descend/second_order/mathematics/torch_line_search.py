"""The strong Wolfe line search of ``torch.optim.LBFGS``, operation by operation, but never into NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A number or a 0-dimensional tensor. Steps are tensors where torch's are, because a number divided by a tensor is
# rounded twice. If the learning rate is a tensor, everything is, because torch then computes in its dtype.
Scalar = Any


class LinePoint(NamedTuple):
    """An evaluated point along a direction; value +inf and slope NaN if anything there is not finite."""

    t: Scalar
    value: float
    slope: Scalar
    evaluation: Any


def strong_wolfe(
    phi: Callable[[Scalar], LinePoint],
    start: LinePoint,
    t: Scalar,
    d_norm: Scalar,
    max_ls: float,
    tolerance_change: float = 1e-9,
    c1: float = 1e-4,
    c2: float = 0.9,
) -> LinePoint:
    """Torch's line search: bracket a point that satisfies the strong Wolfe conditions, then zoom in on it.

    Args:
        phi: evaluates a step.
        start: step 0; finite.
        t: first step.
        d_norm: largest absolute entry of the direction.
        max_ls: most evaluations after the first.
        tolerance_change: the search ends when the bracket moves no entry by as much. Torch does not pass the
            optimizer's option here.
        c1: constant of the sufficient decrease.
        c2: constant of the curvature condition.
    Returns:
        The accepted point, else the lower end of the bracket; always a finite one.
    """
    last, trial, count = start, phi(t), 0
    while count < max_ls:
        if trial.value > start.value + c1 * trial.t * start.slope or (count > 1 and trial.value >= last.value):
            break
        if abs(trial.slope) <= -c2 * start.slope:
            return trial
        if trial.slope >= 0:
            break
        t = interpolate(last, trial, trial.t + 0.01 * (trial.t - last.t), trial.t * 10)
        last, trial = trial, phi(t)
        count += 1
    # Of two equal values the first is the lower one.
    bracket = [last if count < max_ls else start, trial]
    low = 0 if bracket[0].value <= bracket[1].value else 1
    was_near_end = False
    while count < max_ls:
        left, right = min(end.t for end in bracket), max(end.t for end in bracket)
        if (right - left) * d_norm < tolerance_change:
            break
        t = interpolate(bracket[0], bracket[1], left, right)
        margin = 0.1 * (right - left)
        is_near_end = min(right - t, t - left) < margin
        if is_near_end and (was_near_end or t >= right or t <= left):
            t = right - margin if abs(t - right) < abs(t - left) else left + margin
            is_near_end = False
        was_near_end = is_near_end
        trial = phi(t)
        count += 1
        if trial.value > start.value + c1 * t * start.slope or trial.value >= bracket[low].value:
            bracket[1 - low] = trial
            low = 0 if bracket[0].value <= bracket[1].value else 1
            continue
        if abs(trial.slope) <= -c2 * start.slope:
            return trial
        if trial.slope * (bracket[1 - low].t - bracket[low].t) >= 0:
            bracket[1 - low] = bracket[low]
        bracket[low] = trial
    return bracket[low]


def interpolate(a: LinePoint, b: LinePoint, least: Scalar, most: Scalar) -> Scalar:
    """Minimizer of the cubic through values and slopes of two points, clamped; the middle if there is none."""
    if a.t > b.t:
        a, b = b, a
    d1 = a.slope + b.slope - ratio(3 * (a.value - b.value), a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if square >= 0:
        d2 = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
        t = b.t - (b.t - a.t) * ratio(b.slope + d2 - d1, b.slope - a.slope + 2 * d2)
        t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        t = min(max(t, least), most)
        if math.isfinite(t):
            return t
    return (least + most) / 2.0


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """Quotient, infinite or NaN where Python raises ``ZeroDivisionError``."""
    if b == 0 and not isinstance(b, Tensor):
        return a * math.inf if a == a and a != 0 else math.nan
    return a / b
