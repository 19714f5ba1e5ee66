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
    that does not lower the norm, only one variable is released, for which the solution leads inwards.

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
    noise = rounding * torch.linalg.vector_norm(matrix, dim=0) * torch.linalg.vector_norm(right)
    for _ in range(3 * len(t) + 10):
        residual = matrix.mv(t) + right
        slope = matrix.T.mv(residual)
        between = (t > low) & (t < high)
        entering = ~between & (low < high) & (((t <= low) & (slope < -noise)) | ((t >= high) & (slope > noise)))
        if not bool((entering | (between & (slope.abs() > noise))).any()):
            break
        moved = _improved(
            matrix,
            residual,
            slope,
            t,
            _inwards(matrix, residual, t, between | entering, low, high, rounding),
            low,
            high,
        )
        if moved is None and bool(entering.any()):
            norms = torch.linalg.vector_norm(matrix, dim=0)
            steepest = torch.where(entering, slope.abs() / torch.where(norms > 0, norms, 1.0), -1.0).argmax()
            single = between.clone()
            single[steepest] = True
            moved = _improved(
                matrix, residual, slope, t, _inwards(matrix, residual, t, single, low, high, rounding), low, high
            )
        if moved is None:
            break
        t = moved
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


def _improved(
    matrix: Tensor, residual: Tensor, slope: Tensor, t: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> Tensor | None:
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
