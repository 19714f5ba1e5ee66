"""Newton's method in a trust region: with the dense Hessian, or with conjugate gradients and products only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.directions import CompactInverse
from descend.second_order.objective import Curved, Point
from descend.second_order.quartic import first_minimum
from descend.second_order.result import Status
from descend.second_order.run import PATIENCE, Run
from descend.second_order.trust_region import CGPath, DenseModel, End, Trial, steihaug

ACCEPTED = 1e-4  # share of the promised decrease that makes a step
GOOD, POOR = 0.75, 0.25  # shares above and below which the model is trusted farther and less far
GROWTH, SHRINK = 2.0, 0.25
EXTENSION = 0.05  # share of a step's decrease that must be expected beyond it, to look there
FARTHEST = 10.0  # lengths of the step to look there
UNLIMITED = 1e10  # radius before anything is known, relative to the point
ENDLESS = 1e30  # step, relative to the start, at which a function that still falls has no minimum
REJECTIONS = 40  # in a row
COARSE = 0.4  # power of the precision to which equal values may have been rounded
BLIND = 5  # of the rejections, where values cannot tell a better point from a worse one
STALLED = 20  # iterations without progress in value or gradient
PAIRS = 20  # directions of conjugate gradients, with their products, that precondition the next ones
KEPT = 20  # directions of a path kept for shorter steps
PROBES = 20  # products that look for negative curvature where there is no gradient to show it
LEAST_CURVATURE = 1e-8  # relative, of a pair
EQUILIBRATIONS = 5  # a largest entry differs from 1 by the square root of what it did before


class Model(Protocol):
    """A quadratic model of the function that has been worked out once and answers for every radius."""

    def step(self, radius: float) -> Trial:
        """Its minimizer in a region, or what comes near it."""


class Method(Protocol):
    """How a model is made."""

    @property
    def unit(self) -> float:
        """How long, in the norm of the region, a step of length 1 is, as far as is known."""

    def model(self, point: Point, radius: float) -> Model:
        """The model at a point, for steps up to a radius."""

    def learn(self, point: Point, new: Point, trial: Trial) -> float:
        """Take notice of a step; return by what lengths have been multiplied, should their norm have changed."""


class Dense:
    """The exact Hessian, and exact minimizers.

    The region is an ellipsoid: its axes are those of the variables, their lengths such that the Hessian in their units
    has rows of equal size. So the units that the variables are given in do not matter. Volumes are kept.

    Source: the units: Ruiz 2001, A scaling algorithm to equilibrate both rows and columns norms in matrices,
        RAL-TR-2001-034.
    """

    unit = 1.0

    def __init__(self, objective: Curved) -> None:
        self.objective = objective

    def model(self, point: Point, radius: float) -> Model:
        # Where a second derivative is not finite, the model does without.
        hessian = torch.nan_to_num(self.objective.hessian(point), nan=0.0, posinf=0.0, neginf=0.0)
        return _Rescaled(hessian, point.grad)

    def learn(self, point: Point, new: Point, trial: Trial) -> float:
        return 1.0


class _Rescaled:
    def __init__(self, hessian: Tensor, grad: Tensor) -> None:
        self.scale = _equilibrating(hessian)
        self.inner = DenseModel(hessian / self.scale / self.scale[:, None], grad / self.scale)

    def step(self, radius: float) -> Trial:
        trial = self.inner.step(radius)
        return trial._replace(step=trial.step / self.scale)


def _equilibrating(matrix: Tensor) -> Tensor:
    """d with the geometric mean 1, for which the rows of matrix / dd' have nearly equal largest entries, or none."""
    if not len(matrix):
        return matrix.new_ones(0)
    rest, logarithms = matrix.abs(), torch.zeros_like(matrix[0])
    is_zero = rest.amax(1) == 0
    for _ in range(EQUILIBRATIONS):
        factor = torch.where(is_zero, 1.0, rest.amax(1).sqrt())
        rest = rest / factor / factor[:, None]
        logarithms += factor.log()
    mean = torch.where(is_zero, torch.nan, logarithms).nanmean().nan_to_num()
    return torch.where(is_zero, 0.0, logarithms - mean).exp()


class Conjugate:
    """Truncated conjugate gradients, preconditioned by what the last ones and the last steps have shown.

    Directions v and their products Hv are pairs for an L-BFGS inverse: of the next Hessian, which differs little, it
    knows the extreme eigenvalues. Lengths are in its norm, sqrt(s'M s), where M is the inverse of the preconditioner.

    Args:
        objective: gives the products.
        run: gives the tolerance.
        start: where the forcing sequence min(1/2, sqrt(|grad| / |grad at the start|)) begins.
        inverse: what was learned so far.
        scale: the gradient's largest entry where it all began, if not at ``start``.

    Source:
        Steihaug 1983, https://doi.org/10.1137/0720042; the preconditioner: Morales & Nocedal 2000,
        https://doi.org/10.1137/S1052623497327854
    """

    def __init__(
        self, objective: Curved, run: Run, start: Point, inverse: CompactInverse, scale: float | None = None
    ) -> None:
        self.objective, self.run, self.inverse = objective, run, inverse
        self.scale = start.norm if scale is None else scale
        self.products: deque[tuple[Tensor, Tensor]] = deque(maxlen=PAIRS - 1)

    @property
    def unit(self) -> float:
        if self.inverse.is_steepest:
            return 1.0
        newest = (self.inverse.count - 1) % self.inverse.history_size
        s = torch.as_tensor(self.inverse.steps[newest])
        return math.sqrt(float(self.inverse.curvatures[newest])) / length(s)

    def model(self, point: Point, radius: float) -> Model:
        self.products.clear()
        return self._path(point, radius) if point.norm > self.run.target else self._valley(point, radius)

    def _path(self, point: Point, radius: float) -> CGPath:
        self.scale = max(self.scale, point.norm)  # a saddle has none to begin with
        forcing = min(0.5, math.sqrt(point.norm / self.scale))
        # What is left below the target will not be missed.
        tolerance = min(max(forcing * length(point.grad), 0.9 * self.run.target), _longest(point))
        most = 2 * point.x.numel() + 10
        if not self.inverse.is_steepest:
            try:
                path = steihaug(
                    self._multiplier(point), point.grad, radius, tolerance, most, self._precondition, keep=KEPT
                )
                if path.norm > 0:
                    return path
            except ValueError:
                pass  # rounding has made it indefinite
            self.inverse.reset()
        return steihaug(self._multiplier(point), point.grad, radius, tolerance, most, keep=KEPT)

    def _valley(self, point: Point, radius: float) -> Model:
        """A direction of negative curvature where no gradient leads to it; random numbers do."""
        random = torch.Generator(point.x.device).manual_seed(0)
        start = torch.randn(point.x.shape, generator=random, dtype=point.x.dtype, device=point.x.device)
        far, most = min(UNLIMITED * (1.0 + length(start)), _longest(point)), max(1, min(PROBES, point.x.numel()))
        if steihaug(self._multiplier(point), start, far, 0.0, most, keep=0).end is End.negative_curvature:
            return _Valley(*self.products[-1], point.grad, self.unit)
        # The gradient is nothing to step along.
        return steihaug(self._multiplier(point), point.grad, radius, _longest(point), most)

    def _precondition(self, residual: Tensor) -> Tensor:
        return -self.inverse.descend(residual)

    def _multiplier(self, point: Point) -> Callable[[Tensor], Tensor]:
        def multiply(vector: Tensor) -> Tensor:
            # Where a second derivative is not finite, the model does without.
            product = torch.nan_to_num(self.objective.product(point, vector), nan=0.0, posinf=0.0, neginf=0.0)
            self.products.append((vector, product))
            return product

        return multiply

    def learn(self, point: Point, new: Point, trial: Trial) -> float:
        y = new.grad - point.grad
        sy, *curvatures = torch.stack([s.dot(y) for s, y in ((trial.step, y), *self.products)]).tolist()
        if not sy > LEAST_CURVATURE * abs(new.slope_before):
            return 1.0
        for curvature, (s, product) in zip(curvatures, self.products, strict=True):
            if curvature > LEAST_CURVATURE * max(curvatures):
                self.inverse.update(s, product)
        self.inverse.update(trial.step, y)
        return math.sqrt(sy) / trial.norm  # the newest pair has s'M s = s'y


class _Valley:
    """A model along one direction of negative curvature."""

    def __init__(self, direction: Tensor, product: Tensor, grad: Tensor, unit: float) -> None:
        self.direction, self.unit = direction, unit
        self.slope, self.curvature = torch.stack([grad.dot(direction), product.dot(direction)]).tolist()

    def step(self, radius: float) -> Trial:
        length = radius / self.unit
        decrease = length * (abs(self.slope) - length * self.curvature / 2)
        return Trial(self.direction * math.copysign(length, -self.slope), radius, decrease, True, True)


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
        is_last = run.n_iter >= run.max_iter or run.evaluations_left < 1
        if status is not None and (status is not Status.converged or is_convex or is_last):
            return status, radius
        if PATIENCE - run.patience >= STALLED:
            return Status.precision_limit, radius
        size = 1.0 + length(point.x)
        limit = min(UNLIMITED * size * method.unit if radius is None else radius, _longest(point))
        model = method.model(point, limit)
        trial = model.step(limit)
        if radius is None and trial.on_boundary:  # no minimizer in sight: all there is to go by are the units of x
            radius = min(size * (trial.norm / length(trial.step)), limit)
            trial = model.step(radius)
        is_convex = not trial.negative_curvature
        # A saddle is left if that promises more than a slope does that is as steep as the tolerance forgives.
        if status is not None and trial.decrease <= max(run.noise(point), run.target * float(trial.step.abs().sum())):
            return status, radius
        found = _step(run, point, model, trial, radius)
        if isinstance(found, Status):
            return found, radius
        new, radius, trial = found
        distance = length(trial.step)
        if distance > endless:
            return Status.line_search_failed, radius
        if radius is not None:
            radius = min(radius * method.learn(point, new, trial), _longest(point))
        else:
            method.learn(point, new, trial)
        point = new
        run.advance(point, distance, negative_curvature=not is_convex)


def _step(
    run: Run, point: Point, model: Model, trial: Trial, radius: float | None
) -> tuple[Point, float | None, Trial] | Status:
    """The next point and radius, and the step to it; or why there is no step in a smaller region either."""
    is_finite: bool | None = None  # until there has been a trial
    n_blind, noise, coarse = 0, run.noise(point), run.objective.eps**COARSE * abs(point.value)
    for _ in range(REJECTIONS):
        if run.evaluations_left < 1:
            return Status.max_eval
        x = point.x + trial.step
        if not trial.decrease > 0 or torch.equal(x, point.x):
            break
        new = run.evaluate(x, trial.step, point)
        if run.solves(new, point):
            return new, radius, trial
        if new.is_finite:
            is_finite, fall = True, point.value - new.value
            if is_blind := trial.decrease <= (coarse if fall == 0 else noise) and abs(fall) <= noise:
                fall = -(new.slope_before + new.slope) / 2  # slopes have more digits than differences of values
            share = fall / trial.decrease
            if share > GOOD and trial.on_boundary:
                radius = GROWTH * trial.norm
            elif share < POOR:
                radius = SHRINK * trial.norm
            if share > ACCEPTED:
                return _extended(run, point, new, trial, radius)
            n_blind += is_blind
            if n_blind >= BLIND:
                break
            radius = trial.norm * _shortening(point, new, trial)
        else:
            is_finite = bool(is_finite)
            radius = 0.1 * trial.norm
        trial = model.step(radius)
    return Status.non_finite if is_finite is False else Status.precision_limit


def _extended(
    run: Run, point: Point, new: Point, trial: Trial, radius: float | None
) -> tuple[Point, float | None, Trial]:
    """A step, or a longer one in its direction if the slope at its end promises more there.

    Where the Hessian at the minimum is singular, Newton's steps are too short by a constant factor: this finds it.
    """
    fall = point.value - new.value
    minimum = first_minimum(fall, new.slope_before, _curvature(new, trial), new.slope)
    if minimum is None or fall <= run.noise(point) or run.evaluations_left < 1:
        return new, radius, trial
    times, whole_fall = minimum
    if times <= 1 or whole_fall < (1 + EXTENSION) * fall:
        return new, radius, trial
    times = min(times, FARTHEST)
    step = trial.step * times
    far = run.evaluate(point.x + step, step, point)
    if not (run.solves(far, point) or (far.is_finite and far.value < new.value)):
        return new, radius, trial
    trial = trial._replace(step=step, norm=trial.norm * times)
    return far, None if radius is None else max(radius, trial.norm), trial


def _shortening(point: Point, new: Point, trial: Trial) -> float:
    """By how much to shorten a rejected step: to the minimum of a quartic through what was seen, or nearly."""
    minimum = first_minimum(point.value - new.value, new.slope_before, _curvature(new, trial), new.slope)
    return SHRINK if minimum is None else min(0.5, max(0.1, minimum[0]))


def _curvature(new: Point, trial: Trial) -> float:
    """The model's second derivative along a step, s'Hs, from the decrease -(g's + s'Hs / 2)."""
    return -2 * (new.slope_before + trial.decrease)


def length(vector: Tensor) -> float:
    """The 2-norm, however large or small."""
    largest = float(vector.abs().amax()) if vector.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(vector / largest)) if 0 < largest < math.inf else largest


def _longest(point: Point) -> float:
    """A length that leaves room for arithmetic."""
    return 0.01 * torch.finfo(point.x.dtype).max
