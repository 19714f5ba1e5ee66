"""Linear least squares in a box, by active sets."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HALVINGS = 30
SUFFICIENT = 1e-4  # share of the slope's promise that a step must fulfil


def boxed_least_squares(
    matrix: Tensor, right: Tensor, low: Tensor, high: Tensor, start: Tensor, rounding: float
) -> Tensor:
    """Minimize |A t + b| over low <= t <= high, from a start inside.

    Each iteration solves for the variables that are free: those between their bounds, and those at a bound that the
    slope pushes inwards, unless their part of the solution leads outwards. The way there is projected on the box. If
    that does not lower the norm, only one variable is released, for which the solution leads inwards; and if that does
    not either, because a variable has almost no room, the way ends where it meets the first bound.

    Args:
        matrix: A, shape (K, N), on the CPU; of any rank. The shortest solution is used where there are several.
        right: b, shape (K,).
        low, high: bounds, shape (N,).
        start: shape (N,).
        rounding: singular values below this share of the largest count as zero, and slopes below this share too.
    Source: Bertsekas 1982, https://doi.org/10.1137/0320018, for the projected way; Stark & Parker 1995, for the single
        variable, https://digitalassets.lib.berkeley.edu/sdtr/ucb/text/394.pdf
    """
    t = start
    norms = torch.linalg.vector_norm(matrix, dim=0)
    noise = rounding * norms * torch.linalg.vector_norm(right)
    for _ in range(5 * len(t) + 20):
        residual = matrix.mv(t) + right
        slope = matrix.T.mv(residual)
        between = (t > low) & (t < high)
        entering = ((t <= low) & (t < high) & (slope < -noise)) | ((t >= high) & (t > low) & (slope > noise))
        if not bool((entering | (between & (slope.abs() > noise))).any()):
            break
        step = _inwards(matrix, residual, t, between | entering, low, high, rounding)
        moved = _projected(matrix, slope, t, step, low, high)
        if moved is None and bool(entering.any()):
            steepest = torch.where(entering, slope.abs() / torch.where(norms > 0, norms, 1.0), -1.0).argmax()
            between[steepest] = True
            step = _inwards(matrix, residual, t, between, low, high, rounding)
            moved = _projected(matrix, slope, t, step, low, high)
        t = _to_nearest_bound(t, step, low, high) if moved is None else moved
    return t


def _inwards(
    matrix: Tensor, residual: Tensor, t: Tensor, free: Tensor, low: Tensor, high: Tensor, rounding: float
) -> Tensor:
    """The step to the least-squares solution for the free variables, without those that it pushes out of the box."""
    while True:
        step = torch.zeros_like(t)
        if bool(free.any()):
            columns = matrix[:, free]
            solved = torch.linalg.lstsq(columns, -residual.unsqueeze(1), rcond=rounding, driver="gelsd")
            step[free] = solved.solution.squeeze(1)
        blocked = ((t <= low) & (step < 0)) | ((t >= high) & (step > 0))
        if not bool(blocked.any()):
            return step
        free = free & ~blocked


def _projected(matrix: Tensor, slope: Tensor, t: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
    """The first of t + step, t + step / 2, ... whose projection lowers the norm sufficiently; None without one."""
    for _ in range(MAX_HALVINGS):
        moved = torch.clamp(t + step, low, high)
        change = moved - t
        along = matrix.mv(change)
        fall = float(slope.dot(change))
        if fall < 0 and fall + 0.5 * float(along.dot(along)) <= SUFFICIENT * fall:
            return moved
        step = step / 2
    return None


def _to_nearest_bound(t: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The point where the way along a step meets its first bound; that variable is exactly there."""
    room = torch.where(step > 0, high - t, torch.where(step < 0, t - low, torch.inf))
    share, nearest = (room / step.abs()).min(0) if bool((step != 0).any()) else (torch.tensor(0.0), None)
    if nearest is None or not bool(share < 1):
        return t
    moved = torch.clamp(t + share * step, low, high)
    moved[nearest] = high[nearest] if bool(step[nearest] > 0) else low[nearest]
    return moved
