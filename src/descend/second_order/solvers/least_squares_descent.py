"""Least squares: steps that minimize a linear model of the residuals, corrected for how the residuals bend."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from descend.second_order.mathematics.fit_rules import LONGEST_CORRECTION, is_known, longest_retry
from descend.second_order.mathematics.gauss_newton import LinearModel
from descend.second_order.mathematics.trust_region import TrialStep
from descend.second_order.problem.residuals import ResidualObjective, ResidualPoint
from descend.second_order.solvers.least_squares_run import LeastSquaresRun
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.step_control import StepControl

REJECTIONS = 60  # trial steps in one iteration


class Linearization(Protocol):
    """Makes the linear models of a run."""

    def model(self, point: ResidualPoint) -> LinearModel | None:
        """The model around a point; None if the Jacobian is not finite there."""


class Bend(NamedTuple):
    """What residuals change by along a step beyond the linear model: half their second derivative."""

    step: Tensor
    residuals: Tensor


class Taken(NamedTuple):
    """A step that was taken, and where it led."""

    point: ResidualPoint
    model: LinearModel
    length: float


def least_squares_descent(
    run: LeastSquaresRun, x: Tensor, linearization: Linearization, control: StepControl
) -> Status:
    """Minimize from ``x`` until there is a reason to stop.

    Args:
        run: limits; its best point is the result.
        x: the start.
        linearization: makes the models.
        control: chooses the steps.
    """
    point = run.objective.evaluate(x)
    model = linearization.model(point) if point.is_finite else None
    run.start(point, model)
    if model is None:
        return Status.non_finite
    control.begin(model, x)
    last: Bend | None = None
    while True:
        status = run.stop_status(point, model)
        if status is not None:
            return status
        taken = _step(run, point, model, linearization, control, last)
        if isinstance(taken, Status):
            return taken
        # Seen from the new point: half the second derivative along the step that led to it.
        step = point.x - taken.point.x
        bend = taken.model.bend(point.residuals - taken.point.residuals, step)
        last = None if bend is None else Bend(step, bend)
        point, model = taken.point, taken.model
        run.advance(point, model, taken.length)


def _step(
    run: LeastSquaresRun,
    point: ResidualPoint,
    model: LinearModel,
    linearization: Linearization,
    control: StepControl,
    last: Bend | None,
) -> Taken | Status:
    """The next point; or why no smaller step was accepted either.

    A step is corrected to second order, as a geodesic of the model's manifold would be: Transtrum & Sethna 2012. They
    evaluate the residuals once more for that. Here the second derivative along a step comes for nothing: from the
    last step if it had about the same direction, as in a valley, and else from the trial that was rejected.
    """
    is_finite: bool | None = None  # until there has been a trial
    noise = run.noise(point, model)
    failed: tuple[Tensor, float] | None = None  # the correction of a rejected step, and the length of that
    is_end = model.newton().decrease <= noise  # falls can no longer be measured
    for attempt in range(REJECTIONS):
        if run.evaluations_left < 1:
            return Status.max_eval
        # There is nothing to learn from a short step then.
        trial = model.newton() if is_end and attempt == 0 else control.step(model)
        correction = _from_last(model, trial, last) if failed is None else failed[0] * (trial.norm / failed[1]) ** 2
        x = moved(run.objective, point.x, trial.step if correction is None else trial.step + correction)
        if not trial.decrease > 0 or torch.equal(x, point.x):
            break
        new = run.objective.evaluate(x)
        ratio = -math.inf
        if new.is_finite:
            fall = point.value - new.value
            is_blind = is_end and abs(fall) <= noise
            ratio = 1.0 if is_blind else fall / trial.decrease
            if fall > 0 or is_blind:
                new_model = linearization.model(new)
                if new_model is not None:
                    control.accept(trial, ratio)
                    return Taken(new, new_model, trial.norm)
                ratio = -math.inf
        is_finite = bool(is_finite) or ratio > -math.inf
        found = _from_trial(model, point, new) if failed is None and ratio > -math.inf else None
        if found is not None and (retry := longest_retry(found[1], model.length(found[0]))):
            failed = found
            control.shorten(trial, retry)
            continue
        control.reject(trial, ratio)
    return Status.non_finite if is_finite is False else run.stuck_status()


def _from_last(model: LinearModel, trial: TrialStep, last: Bend | None) -> Tensor | None:
    """The correction of a step by what the last one has taught; None if that was another direction."""
    if last is None:
        return None
    share = model.share(trial.step, last.step)
    if not is_known(share, model.length(last.step), trial.norm):
        return None
    correction = model.correction(share**2 * last.residuals)
    return correction if model.length(correction) <= LONGEST_CORRECTION * trial.norm else None


def _from_trial(model: LinearModel, point: ResidualPoint, new: ResidualPoint) -> tuple[Tensor, float] | None:
    """The correction of the step that led to a rejected trial, and the length of the step."""
    step = new.x - point.x
    bend = model.bend(new.residuals - point.residuals, step)
    return None if bend is None else (model.correction(bend), model.length(step))


def moved(objective: ResidualObjective, x: Tensor, step: Tensor) -> Tensor:
    """x + step, clamped to the bounds against rounding."""
    x = x + step
    return x if objective.lower is None else torch.clamp(x, objective.lower, objective.upper)
