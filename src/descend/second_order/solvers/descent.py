"""Line-search methods: gradient descent, BFGS and L-BFGS without bounds, and the loop that L-BFGS-B shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from descend.second_order.mathematics.diagonal import Pair
from descend.second_order.mathematics.directions import CompactInverse, Directions, Learner, modified_secant_factor
from descend.second_order.mathematics.line_search import Outcome
from descend.second_order.problem.objective import Point
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import Run, Step

MIN_CURVATURE = 1e-8  # of the slope's rise along a step, relative, for the pair to be learned
VISIBLE = 1e3  # a failed step that predicted a decrease of fewer times the noise failed through rounding


class SearchDirection(NamedTuple):
    """What to search next: a direction, the first step along it, and the largest one allowed."""

    direction: Tensor
    step: float
    max_step: float = math.inf


def line_search_descent(run: Run, point: Point, directions: Directions, lr: float = 1.0) -> Status:
    """Minimize from ``point`` along directions until there is a reason to stop.

    Args:
        run: limits and line searches; its best point is the result.
        point: the start.
        directions: gives the directions; learns from every step.
        lr: first step tried along a direction that has learned something.
    """

    def propose(point: Point, has_failed: bool) -> SearchDirection:
        step = first_step(run, point) if directions.is_steepest else lr
        return SearchDirection(directions.direction(point.grad, point.norm), step)

    return repeat_searches(run, point, directions, propose)


def repeat_searches(
    run: Run, point: Point, learner: Learner, propose: Callable[[Point, bool], SearchDirection]
) -> Status:
    """Make one line search after the other until there is a reason to stop.

    Args:
        run: limits and line searches; its best point is the result.
        point: the start.
        learner: is shown every step.
        propose: maps a point, and whether the search before has failed, to the next search.
    """
    if run.objective.space.is_shared:
        run.objective.measure = learner.measure
    failed: Status | None = None  # why the last search failed, if it did
    while (status := run.stop_status(point)) is None:
        step = run.search(point, *propose(point, failed is not None))
        status = failure(run, point, step)
        if step.point is not None:
            learn(run, learner, point, step)
            point = step.point
            run.advance(point, step.length)
        if status is Status.unbounded:
            return run.stop_status(point) or status
        if status and run.evaluations_left < 1:
            return run.stop_status(point) or Status.max_eval
        # The first failure is blamed on what was learned, the next one on the function.
        if status and (failed or (learner.is_steepest and step.point is None)):
            is_rounding = status is Status.precision_limit
            return run.stop_status(point) or (status if is_rounding or failed is None else failed)
        if status:
            learner.reset()
        failed = status
    return status


def learn(run: Run, learner: Learner, point: Point, step: Step) -> None:
    """Show a step to the learner, if the slope rose along it."""
    new = step.point
    assert new is not None
    rise = new.slope - new.slope_before
    if rise <= MIN_CURVATURE * abs(new.slope_before):
        return
    sy, factor = step.length * rise, 1.0
    if run.noise(point) < 0.1 * sy:
        factor = modified_secant_factor(sy, point.value, new.value, step.length * (new.slope + new.slope_before))
    if isinstance(learner, CompactInverse) and not new.measured:
        learner.update_between(point, new, factor, factor * sy)
        return
    s, y = run.scratch  # allocating would cost more than the subtraction
    torch.sub(new.x, point.x, out=s)
    torch.sub(new.grad, point.grad, out=y)
    y *= factor
    if new.measured:
        learner.update(s, y, Pair(*new.measured).scaled(1.0, factor))
    else:
        learner.update(s, y)


def first_step(run: Run, point: Point) -> float:
    """First step along the gradient: a length of one, or to the minimum of a parabola whose minimum is 0."""
    largest = point.norm
    norm = largest * run.objective.space.norm(point.grad / largest)
    return max(1 / norm, min(1 / largest, 2 * abs(point.value) / norm / norm))


def failure(run: Run, origin: Point, step: Step) -> Status | None:
    """Why a search failed; None if it did not."""
    if step.is_unbounded:
        return Status.unbounded
    if step.is_sufficient:
        return None
    if step.outcome is Outcome.non_finite and step.point is None:
        return Status.non_finite
    visible = VISIBLE * max(run.noise(origin), torch.finfo(origin.x.dtype).tiny)
    is_rounding = step.predicted_decrease <= visible
    return Status.precision_limit if is_rounding else Status.line_search_failed
