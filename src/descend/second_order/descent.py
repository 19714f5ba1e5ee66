"""Methods that choose a direction and then a step along it: gradient descent, BFGS and L-BFGS without bounds."""

from __future__ import annotations

import torch

from descend.second_order.directions import Directions, Learner, stretch
from descend.second_order.line_search import Outcome
from descend.second_order.objective import Point
from descend.second_order.result import Status
from descend.second_order.run import Move, Run

LEAST_RISE = 1e-8  # of the slope along a step, relative, that counts as curvature


def descend(run: Run, point: Point, directions: Directions, lr: float = 1.0) -> Status:
    """Go down from ``point`` until there is a reason to stop.

    Args:
        run: limits and line searches; its best point is the result.
        directions: what was learned so far; empty at the start.
        lr: first step tried along a direction that has learned something.
    """
    is_second_try = False
    while (status := run.verdict(point)) is None:
        direction = directions.descend(point.grad)
        move = run.search(point, direction, first_step(point) if directions.is_steepest else lr)
        if move.point is not None:
            learn(run, directions, point, move)
            point = move.point
            run.advance(point, move.step)
            if move.is_sufficient:
                is_second_try = False
                continue
        if run.evaluations_left < 1:
            return Status.max_eval
        # The search failed. Once, what was learned is to blame; the next time, the function is.
        if is_second_try or (directions.is_steepest and move.point is None):
            return run.verdict(point) or failure(move)
        directions.reset()
        is_second_try = True
    return status


def learn(run: Run, directions: Learner, point: Point, move: Move) -> None:
    """Show a step to the directions, if the slope rose along it."""
    new = move.point
    assert new is not None
    rise = new.slope - new.slope_before
    if rise <= LEAST_RISE * abs(new.slope_before):
        return
    sy = move.step * rise
    y = new.grad - point.grad
    if run.noise(point) < 0.1 * sy:
        y *= stretch(sy, point.value, new.value, move.step * (new.slope + new.slope_before))
    directions.update(new.x - point.x, y)


def first_step(point: Point) -> float:
    """Length of the first step down the gradient: of a unit, or to where a parabola with minimum 0 would end."""
    largest = point.norm
    norm = largest * float(torch.linalg.vector_norm(point.grad / largest))
    return max(1 / norm, min(1 / largest, 2 * abs(point.value) / norm / norm))


def failure(move: Move) -> Status:
    """What a failed search means."""
    if move.outcome is Outcome.non_finite:
        return Status.non_finite
    return Status.precision_limit if move.outcome is Outcome.precision else Status.line_search_failed
