"""Least squares: steps that minimize a linear model of the residuals, in a trust region or with damping."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.mathematics.gauss_newton import DenseGaussNewton, LinearModel, column_norms
from descend.second_order.mathematics.trust_region import TrialStep
from descend.second_order.problem.residuals import ResidualObjective, ResidualPoint
from descend.second_order.solvers.least_squares_run import LeastSquaresRun
from descend.second_order.solvers.result import Status

REJECTIONS = 60  # trial steps in one iteration


class Linearization(Protocol):
    """Makes the linear models of a run."""

    def model(self, point: ResidualPoint) -> LinearModel | None:
        """The model around a point; None if the Jacobian is not finite there."""


class Region(Protocol):
    """How far to trust the models."""

    def step(self, model: LinearModel) -> TrialStep: ...

    def accept(self, trial: TrialStep, ratio: float) -> None:
        """Learn from a step that was taken; ``ratio``: fall of the cost by the predicted one."""

    def reject(self, trial: TrialStep, ratio: float) -> None:
        """Learn from one that was not; -inf where the residuals or the Jacobian were not finite."""


class DenseLinearization:
    """Models with dense Jacobians, and a scale of the variables that only grows.

    D holds the largest norm that each column of the Jacobian has had: Moré 1978, section 6. So steps do not depend on
    the units of the variables.
    """

    def __init__(self, objective: ResidualObjective) -> None:
        self.objective = objective
        self.norms: Tensor | None = None

    def model(self, point: ResidualPoint) -> DenseGaussNewton | None:
        objective = self.objective
        jacobian, residuals = objective.model_of(point, objective.jacobian(point))
        norms = column_norms(jacobian)
        if not bool(norms.isfinite().all()):
            return None
        self.norms = norms if self.norms is None else torch.maximum(self.norms, norms)
        scale = torch.where(self.norms > 0, self.norms, 1.0)
        if objective.lower is None or objective.upper is None:
            return DenseGaussNewton(jacobian, residuals, scale)
        return DenseGaussNewton(jacobian, residuals, scale, objective.lower - point.x, objective.upper - point.x)


class TrustRegion:
    """A radius in the norm |D s|, changed as in MINPACK.

    Source: Moré 1978, section 4, https://doi.org/10.1007/BFb0067700
    """

    FIRST = 100.0  # times the length of the start

    def __init__(self) -> None:
        self.radius: float | None = None

    def begin(self, model: LinearModel, x: Tensor) -> None:
        self.radius = self.FIRST * model.length(x) or self.FIRST

    def step(self, model: LinearModel) -> TrialStep:
        assert self.radius is not None
        return model.step(self.radius)

    def accept(self, trial: TrialStep, ratio: float) -> None:
        assert self.radius is not None
        if ratio < 0.25:
            self.radius = 0.5 * trial.norm
        elif ratio > 0.75 or not trial.on_boundary:
            self.radius = 2 * trial.norm

    def reject(self, trial: TrialStep, ratio: float) -> None:
        # The minimum of the parabola through the slope and both values, within limits.
        shorter = 0.1 if ratio == -math.inf else min(0.5, max(0.1, 0.5 / (1 - ratio)))
        self.radius = shorter * trial.norm


class Damping:
    """The damping of Nielsen.

    Source: Madsen, Nielsen & Tingleff 2004, Algorithm 3.16 and equation 2.21, http://www2.imm.dtu.dk/pubdb/p.php?3215
    """

    FIRST = 1e-3  # times the largest diagonal entry of (J D^-1)'(J D^-1), which is 1

    def __init__(self) -> None:
        self.damping, self.growth = self.FIRST, 2.0

    def begin(self, model: LinearModel, x: Tensor) -> None:
        pass

    def step(self, model: LinearModel) -> TrialStep:
        return model.damped_step(self.damping)

    def accept(self, trial: TrialStep, ratio: float) -> None:
        self.damping *= max(1 / 3, 1 - (2 * min(ratio, 1.0) - 1) ** 3)
        self.growth = 2.0

    def reject(self, trial: TrialStep, ratio: float) -> None:
        self.damping *= self.growth
        self.growth *= 2


def least_squares_descent(
    run: LeastSquaresRun, x: Tensor, linearization: Linearization, region: TrustRegion | Damping
) -> Status:
    """Minimize from ``x`` until there is a reason to stop.

    Args:
        run: limits; its best point is the result.
        x: the start.
        linearization: makes the models.
        region: how far they are trusted.
    """
    point = run.objective.evaluate(x)
    model = linearization.model(point) if point.is_finite else None
    run.start(point, model)
    if model is None:
        return Status.non_finite
    region.begin(model, x)
    while True:
        status = run.stop_status(point, model)
        if status is not None:
            return status
        accepted = _step(run, point, model, linearization, region)
        if isinstance(accepted, Status):
            return accepted
        point, model, length = accepted
        run.advance(point, model, length)


def _step(
    run: LeastSquaresRun, point: ResidualPoint, model: LinearModel, linearization: Linearization, region: Region
) -> tuple[ResidualPoint, LinearModel, float] | Status:
    """The next point, its model, and the length of the step; or why no smaller step was accepted either."""
    is_finite: bool | None = None  # until there has been a trial
    noise = run.noise(point.value)
    for _ in range(REJECTIONS):
        if run.evaluations_left < 1:
            return Status.max_eval
        trial = region.step(model)
        x = moved(run.objective, point.x, trial.step)
        if not trial.decrease > 0 or torch.equal(x, point.x):
            break
        new = run.objective.evaluate(x)
        ratio = -math.inf
        if new.is_finite:
            fall = point.value - new.value
            is_blind = trial.decrease <= noise and abs(fall) <= noise
            ratio = 1.0 if is_blind else fall / trial.decrease
            if fall > 0 or is_blind:
                new_model = linearization.model(new)
                if new_model is not None:
                    region.accept(trial, ratio)
                    return new, new_model, trial.norm
                ratio = -math.inf
        is_finite = bool(is_finite) or ratio > -math.inf
        region.reject(trial, ratio)
    return Status.non_finite if is_finite is False else Status.precision_limit


def moved(objective: ResidualObjective, x: Tensor, step: Tensor) -> Tensor:
    """x + step, clamped to the bounds against rounding."""
    x = x + step
    return x if objective.lower is None else torch.clamp(x, objective.lower, objective.upper)
