"""Newton's method in a trust region: with the dense Hessian, or with conjugate gradients and products only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.objective import Curved, Point
from descend.second_order.result import Status
from descend.second_order.run import Run
from descend.second_order.trust_region import CGPath, DenseModel, Trial, steihaug

ACCEPTED = 1e-4  # share of the promised decrease that makes a step
GOOD, POOR = 0.75, 0.25  # shares above and below which the model is trusted farther and less far
GROWTH, SHRINK = 3.0, 0.25
UNLIMITED = 1e10  # radius before anything is known, relative to the point
REJECTIONS = 40  # in a row
ENDLESS = 1e30  # radius, relative to the start, at which a function that still falls has no minimum


class Model(Protocol):
    """A quadratic model of the function that has been worked out once and answers for every radius."""

    def step(self, radius: float) -> Trial:
        """Its minimizer in a ball, or what comes near it."""


def newton(run: Run, objective: Curved, point: Point, radius: float | None = None) -> tuple[Status, float | None]:
    """Newton's method with the dense Hessian and exact minimizers of the model.

    Args:
        run: limits; its best point is the result.
        objective: what ``run`` evaluates.
        point: the start.
        radius: of the trust region; None to begin with the Newton step, however long.
    Returns:
        Why it stopped, and the last radius.
    """
    return _descend(run, point, lambda at, radius: DenseModel(objective.hessian(at), at.grad), radius)


def newton_cg(run: Run, objective: Curved, point: Point, radius: float | None = None) -> tuple[Status, float | None]:
    """The same with truncated conjugate gradients, in a few vectors of memory.

    Source: Steihaug 1983, https://doi.org/10.1137/0720042; the forcing sequence relative to the start.
    """
    start = length(point.grad)

    def model(at: Point, radius: float) -> CGPath:
        norm = length(at.grad)
        forcing = min(0.5, math.sqrt(norm / start)) if start > 0 else 0.5
        # What is left below half the target will not be missed.
        tolerance = min(max(forcing * norm, 0.5 * run.target), _longest(at))
        most = 2 * at.x.numel() + 10
        return steihaug(lambda vector: objective.product(at, vector), at.grad, radius, tolerance, most)

    return _descend(run, point, model, radius)


def _descend(
    run: Run, point: Point, model_at: Callable[[Point, float], Model], radius: float | None
) -> tuple[Status, float | None]:
    is_convex = False  # as far as the last model knew
    endless = ENDLESS * (1.0 + length(point.x))
    while True:
        status = run.verdict(point)
        if status is not None and (status is not Status.converged or is_convex):
            return status, radius
        if status is not None and run.n_iter >= run.max_iter:
            return status, radius  # whether this is a saddle cannot be acted upon
        if radius is not None and radius > endless:
            return Status.line_search_failed, radius
        size = 1.0 + length(point.x)
        limit = min(UNLIMITED * size if radius is None else radius, _longest(point))
        model = model_at(point, limit)
        trial = model.step(limit)
        if radius is None and trial.on_boundary:  # no minimizer in sight: all there is to go by are the units of x
            radius = min(size, _longest(point))
            trial = model.step(radius)
        is_convex = not trial.negative_curvature
        if status is not None and (is_convex or trial.decrease <= run.noise(point)):
            return status, radius  # no saddle
        step = _step(run, point, model, trial, radius)
        if isinstance(step, Status):
            return step, radius
        point, radius, stride = step
        run.advance(point, stride, negative_curvature=not is_convex)


def _step(
    run: Run, point: Point, model: Model, trial: Trial, radius: float | None
) -> tuple[Point, float | None, float] | Status:
    """The next point, radius and the length of the step; or why there is no step in a smaller region either."""
    is_finite = False
    noise = run.noise(point)
    for _ in range(REJECTIONS):
        if run.evaluations_left < 1:
            return Status.max_eval
        if not trial.decrease > 0 or trial.norm <= run.objective.eps**2 * (1.0 + float(point.x.abs().amax())):
            break
        new = run.evaluate(point.x + trial.step, trial.step, point)
        if run.solves(new, point):
            return new, radius, trial.norm
        if new.is_finite:
            is_finite = True
            share = (point.value - new.value) / trial.decrease
            if trial.decrease <= noise and abs(new.value - point.value) <= noise:
                share = 1.0 if new.norm < point.norm else 0.0  # the values cannot tell
            if share > GOOD and trial.on_boundary:
                radius = GROWTH * trial.norm
            elif share < POOR:
                radius = SHRINK * trial.norm
            if share > ACCEPTED:
                return new, radius, trial.norm
            radius = trial.norm * _shortening(point, new)
        else:
            radius = 0.1 * trial.norm
        trial = model.step(radius)
    return Status.precision_limit if is_finite else Status.non_finite


def _shortening(point: Point, new: Point) -> float:
    """By how much to shorten a rejected step: to the minimum of a parabola through what was seen, or nearly."""
    excess = new.value - point.value - new.slope_before
    return min(0.5, max(0.1, -new.slope_before / (2 * excess))) if excess > 0 else SHRINK


def length(vector: Tensor) -> float:
    """The 2-norm, however large or small."""
    largest = float(vector.abs().amax()) if vector.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(vector / largest)) if 0 < largest < math.inf else largest


def _longest(point: Point) -> float:
    """A length that leaves room for arithmetic."""
    return 0.01 * torch.finfo(point.x.dtype).max
