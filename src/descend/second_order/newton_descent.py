"""Newton's method in a trust region: with the dense Hessian, or with conjugate gradients and products only."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.directions import CompactInverse
from descend.second_order.objective import Curved, Point
from descend.second_order.result import Status
from descend.second_order.run import Run
from descend.second_order.trust_region import CGPath, DenseModel, Trial, steihaug

ACCEPTED = 1e-4  # share of the promised decrease that makes a step
GOOD, POOR = 0.75, 0.25  # shares above and below which the model is trusted farther and less far
GROWTH, SHRINK = 3.0, 0.25
UNLIMITED = 1e10  # radius before anything is known, relative to the point
ENDLESS = 1e30  # radius, relative to the start, at which a function that still falls has no minimum
REJECTIONS = 40  # in a row
PAIRS = 20  # directions of conjugate gradients, with their products, that precondition the next ones
KEPT = 20  # directions of a path kept for shorter steps
LEAST_COSINE = 1e-8  # between a direction and its product


class Model(Protocol):
    """A quadratic model of the function that has been worked out once and answers for every radius."""

    def step(self, radius: float) -> Trial:
        """Its minimizer in a ball, or what comes near it."""


class Method(Protocol):
    """How a model is made."""

    def model(self, point: Point, radius: float) -> Model:
        """The model at a point, for steps up to a radius."""

    def learn(self, point: Point, new: Point, trial: Trial) -> float:
        """Take notice of a step; return by what lengths have been multiplied, should their norm have changed."""


class Dense:
    """The exact Hessian, and exact minimizers."""

    def __init__(self, objective: Curved) -> None:
        self.objective = objective

    def model(self, point: Point, radius: float) -> DenseModel:
        return DenseModel(self.objective.hessian(point), point.grad)

    def learn(self, point: Point, new: Point, trial: Trial) -> float:
        return 1.0


class Conjugate:
    """Truncated conjugate gradients, preconditioned by what the last ones and the last steps have shown.

    Directions v and their products Hv are pairs for an L-BFGS inverse: of the next Hessian, which differs little, it
    knows the extreme eigenvalues. Lengths are in its norm, sqrt(s'M s), where M is the inverse of the preconditioner.

    Args:
        objective: gives the products.
        run: gives the tolerance.
        start: where the forcing sequence min(1/2, sqrt(|grad| / |grad at the start|)) begins.
        inverse: what was learned so far.

    Source:
        Steihaug 1983, https://doi.org/10.1137/0720042; the preconditioner: Morales & Nocedal 2000,
        https://doi.org/10.1137/S1052623497327854
    """

    def __init__(self, objective: Curved, run: Run, start: Point, inverse: CompactInverse) -> None:
        self.objective, self.run, self.inverse = objective, run, inverse
        self.first_norm = length(start.grad)
        self.products: list[tuple[Tensor, Tensor]] = []

    def model(self, point: Point, radius: float) -> CGPath:
        norm = length(point.grad)
        forcing = min(0.5, math.sqrt(norm / self.first_norm)) if self.first_norm > 0 else 0.5
        # What is left below the target will not be missed.
        tolerance = min(max(forcing * norm, 0.9 * self.run.target), _longest(point))
        self.products = []

        def product(vector: Tensor) -> Tensor:
            found = self.objective.product(point, vector)
            self.products = [*self.products[2 - PAIRS :], (vector, found)]
            return found

        return steihaug(
            product,
            point.grad,
            radius,
            tolerance,
            max_products=2 * point.x.numel() + 10,
            preconditioner=None if self.inverse.is_steepest else lambda residual: -self.inverse.descend(residual),
            keep=KEPT,
        )

    def learn(self, point: Point, new: Point, trial: Trial) -> float:
        for s, y in self.products:
            if s.dot(y) > LEAST_COSINE * torch.linalg.vector_norm(s) * torch.linalg.vector_norm(y):
                self.inverse.update(s, y)
        sy = new.slope - new.slope_before
        if not sy > LEAST_COSINE * abs(new.slope_before):
            return 1.0
        self.inverse.update(trial.step, new.grad - point.grad)
        return math.sqrt(sy) / trial.norm  # the newest pair has s'M s = s'y


def trust_region(run: Run, point: Point, method: Method, radius: float | None = None) -> tuple[Status, float | None]:
    """Go down from ``point`` until there is a reason to stop.

    Args:
        run: limits; its best point is the result.
        point: the start.
        method: how to make a model.
        radius: of the trust region; None to begin with the minimizer of the model, however far.
    Returns:
        Why it stopped, and the last radius.
    """
    is_convex = False  # as far as the last model knew
    endless = ENDLESS * (1.0 + length(point.x))
    while True:
        status = run.verdict(point)
        if status is not None and (status is not Status.converged or is_convex or run.n_iter >= run.max_iter):
            return status, radius
        if radius is not None and radius > endless:
            return Status.line_search_failed, radius
        size = 1.0 + length(point.x)
        limit = min(UNLIMITED * size if radius is None else radius, _longest(point))
        model = method.model(point, limit)
        trial = model.step(limit)
        if radius is None and trial.on_boundary:  # no minimizer in sight: all there is to go by are the units of x
            radius = min(size * (trial.norm / length(trial.step)), limit)
            trial = model.step(radius)
        is_convex = not trial.negative_curvature
        if status is not None and (is_convex or trial.decrease <= run.noise(point)):
            return status, radius  # no saddle
        found = _step(run, point, model, trial, radius)
        if isinstance(found, Status):
            return found, radius
        new, radius, trial = found
        scale = method.learn(point, new, trial)
        radius = None if radius is None else radius * scale
        point = new
        run.advance(point, length(trial.step), negative_curvature=not is_convex)


def _step(
    run: Run, point: Point, model: Model, trial: Trial, radius: float | None
) -> tuple[Point, float | None, Trial] | Status:
    """The next point and radius, and the step to it; or why there is no step in a smaller region either."""
    is_finite = False
    noise = run.noise(point)
    for _ in range(REJECTIONS):
        if run.evaluations_left < 1:
            return Status.max_eval
        if not trial.decrease > 0 or length(trial.step) <= run.objective.eps**2 * (1.0 + length(point.x)):
            break
        new = run.evaluate(point.x + trial.step, trial.step, point)
        if run.solves(new, point):
            return new, radius, trial
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
                return new, radius, trial
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
