"""Methods that choose a direction and then a step along it: gradient descent, BFGS and L-BFGS without bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from descend.second_order.directions import Directions, Learner, stretch
from descend.second_order.line_search import Outcome
from descend.second_order.objective import Point
from descend.second_order.result import Status
from descend.second_order.run import Move, Run

LEAST_RISE = 1e-8  # of the slope along a step, relative, that counts as curvature
VISIBLE = 1e3  # times the noise of the values: what a step must promise before its failure is no rounding error


class Way(NamedTuple):
    """Where to search next: a direction, the first step along it, and the last that is allowed."""

    direction: Tensor
    step: float
    max_step: float = math.inf


def descend(run: Run, point: Point, directions: Directions, lr: float = 1.0) -> Status:
    """Go down from ``point`` along directions until there is a reason to stop.

    Args:
        run: limits and line searches; its best point is the result.
        directions: what was learned so far; empty at the start.
        lr: first step tried along a direction that has learned something.
    """

    def way(point: Point, has_failed: bool) -> Way:
        return Way(directions.descend(point.grad), first_step(point) if directions.is_steepest else lr)

    return go(run, point, directions, way)


def go(run: Run, point: Point, learner: Learner, way: Callable[[Point, bool], Way]) -> Status:
    """Go down from ``point``, one search after the other, until there is a reason to stop.

    Args:
        run: limits and line searches; its best point is the result.
        learner: is shown every step.
        way: from a point, and whether the search before has failed, to the next search.
    """
    failed: Status | None = None  # why the last search failed, if it did
    while (status := run.verdict(point)) is None:
        move = run.search(point, *way(point, failed is not None))
        status = failure(run, point, move)
        if move.point is not None:
            learn(run, learner, point, move)
            point = move.point
            run.advance(point, move.step)
        if status and run.evaluations_left < 1:
            return run.verdict(point) or Status.max_eval
        # Once, what was learned is to blame for a failed search; the next time, the function is.
        if status and (failed or (learner.is_steepest and move.point is None)):
            return run.verdict(point) or failed or status
        if status:
            learner.reset()
        failed = status
    return status


def learn(run: Run, directions: Learner, point: Point, move: Move) -> None:
    """Show a step to the directions, if the slope rose along it."""
    new = move.point
    assert new is not None
    rise = new.slope - new.slope_before
    if rise <= LEAST_RISE * abs(new.slope_before):
        return
    sy = move.step * rise
    s, y = run.scratch  # fresh memory would cost more than the subtraction
    torch.sub(new.x, point.x, out=s)
    torch.sub(new.grad, point.grad, out=y)
    if run.noise(point) < 0.1 * sy:
        y *= stretch(sy, point.value, new.value, move.step * (new.slope + new.slope_before))
    directions.update(s, y)


def first_step(point: Point) -> float:
    """Length of the first step down the gradient: of a unit, or to where a parabola with minimum 0 would end."""
    largest = point.norm
    norm = largest * float(torch.linalg.vector_norm(point.grad / largest))
    return max(1 / norm, min(1 / largest, 2 * abs(point.value) / norm / norm))


def failure(run: Run, origin: Point, move: Move) -> Status | None:
    """Why a search failed; None if it did not."""
    if move.is_sufficient:
        return None
    if move.outcome is Outcome.non_finite and move.point is None:
        return Status.non_finite
    return Status.precision_limit if move.promise <= VISIBLE * run.noise(origin) else Status.line_search_failed
