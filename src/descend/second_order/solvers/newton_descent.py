"""Newton's method in a trust region: with the dense Hessian, or with conjugate gradients and products only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.mathematics.dense_steps import equilibrating
from descend.second_order.mathematics.directions import CompactInverse
from descend.second_order.mathematics.newton_rules import ACCEPTED, extension, judged, radius_after, shortening
from descend.second_order.mathematics.quartic import first_minimum
from descend.second_order.mathematics.space import Space
from descend.second_order.mathematics.trust_region import CGPath, DenseModel, End, TrialStep, steihaug
from descend.second_order.problem.objective import Curved, Point
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import PATIENCE, Run

INITIAL_RADIUS = 1e10  # before anything is known, relative to the point
UNBOUNDED = 1e30  # step, relative to the start, at which a function that still falls has no minimum,
STEEP = 0.1  # if its slope is this times that at the start or steeper; else it may fall towards a finite limit
REJECTIONS = 40  # in a row
COARSE = 0.4  # power of the precision to which equal values may have been rounded
BLIND = 5  # rejections at which the values differ by no more than the noise
MAX_DENSE = 100  # variables up to which conjugate gradients may give way to the Hessian
LONG = 1.25  # products of a path, relative to the columns of the Hessian, for which they do
STALLED = 20  # iterations without progress in value or gradient
PAIRS = 20  # directions of conjugate gradients, with their products, that precondition the next ones
KEPT = 20  # directions of a path stored for shorter steps
PROBES = 20  # products with which negative curvature is looked for where the gradient is zero
LEAST_CURVATURE = 1e-8  # relative, of a pair


class Model(Protocol):
    """A quadratic model of the function, computed once, with a step for every radius."""

    def step(self, radius: float) -> TrialStep:
        """The model's minimizer within the radius, or an approximation."""


class TrustRegionMethod(Protocol):
    """How models are made."""

    @property
    def unit(self) -> float:
        """Length, in the norm of the region, of a step of length 1, as far as is known."""

    def model(self, point: Point, radius: float) -> Model:
        """The model at a point, for steps up to a radius."""

    def learn(self, point: Point, new: Point, trial: TrialStep) -> float:
        """Learn from a step; return the factor by which a change of the norm has scaled lengths."""

    def refine(self) -> bool:
        """Make exact models from here on; whether those so far were not."""


class DenseNewton:
    """The exact Hessian, and exact minimizers of the model.

    The region is an ellipsoid whose axes are those of the variables. Their lengths equilibrate the Hessian: its scaled
    rows have nearly equal largest entries, so that the units of the variables do not matter. The volume is that of the
    ball.
    """

    unit = 1.0

    def __init__(self, objective: Curved) -> None:
        self.objective = objective

    def model(self, point: Point, radius: float) -> Model:
        # The model leaves out second derivatives that are not finite.
        hessian = torch.nan_to_num(self.objective.hessian(point), nan=0.0, posinf=0.0, neginf=0.0)
        return _Rescaled(hessian, point.grad)

    def learn(self, point: Point, new: Point, trial: TrialStep) -> float:
        return 1.0

    def refine(self) -> bool:
        return False


class _Rescaled:
    """The model in the units in which the Hessian is equilibrated."""

    def __init__(self, hessian: Tensor, grad: Tensor) -> None:
        (self.scale,) = equilibrating(hessian[None])
        self.inner = DenseModel(hessian / self.scale / self.scale[:, None], grad / self.scale)

    def step(self, radius: float) -> TrialStep:
        trial = self.inner.step(radius)
        return trial._replace(step=trial.step / self.scale)


class NewtonCG:
    """Truncated conjugate gradients, preconditioned by the previous directions and steps.

    Directions v and their products Hv are pairs for an L-BFGS inverse. It approximates the extreme eigenvalues of the
    next Hessian, which differs little. Lengths are in its norm, sqrt(s'M s), where M^-1 is the preconditioner.

    Args:
        objective: gives the products.
        run: gives the tolerance.
        start: of the forcing sequence min(1/2, sqrt(|grad| / |grad at the start|)).
        inverse: the preconditioner; learns from every step.
        scale: largest entry of the gradient at the first start, if not ``start``.
        may_be_dense: whether up to 100 variables the dense Hessian takes over where rounding makes paths long or ends
            progress. Default: False.

    Source:
        Steihaug 1983, https://doi.org/10.1137/0720042; the preconditioner: Morales & Nocedal 2000,
        https://doi.org/10.1137/S1052623497327854
    """

    def __init__(
        self,
        objective: Curved,
        run: Run,
        start: Point,
        inverse: CompactInverse,
        scale: float | None = None,
        may_be_dense: bool = False,
    ) -> None:
        self.objective, self.run, self.inverse, self.space = objective, run, inverse, objective.space
        self.scale = start.norm if scale is None else scale
        self.may_be_dense = may_be_dense and self.space.numel <= MAX_DENSE and not self.space.is_shared
        self.dense: DenseNewton | None = None  # once conjugate gradients have given way
        self.n_products = 0  # of the last path
        self.products: deque[tuple[Tensor, Tensor]] = deque(maxlen=PAIRS - 1)

    @property
    def unit(self) -> float:
        if self.inverse.is_steepest or self.dense is not None:
            return 1.0
        s, curvature = self.inverse.newest
        return math.sqrt(curvature) / self.space.length(s)

    def model(self, point: Point, radius: float) -> Model:
        if self.dense is not None:
            return self.dense.model(point, radius)
        self.products.clear()
        if point.norm > self.run.target:
            return self._path(point, radius)
        return self._negative_curvature_model(point, radius)

    def refine(self) -> bool:
        if self.dense is not None or not self.may_be_dense:
            return False
        self.dense = DenseNewton(self.objective)
        return True

    def _path(self, point: Point, radius: float) -> CGPath:
        path = self._truncated(point, radius)
        self.n_products = path.n_products
        return path

    def _truncated(self, point: Point, radius: float) -> CGPath:
        self.scale = max(self.scale, point.norm)  # at a saddle it starts at 0
        forcing = min(0.5, math.sqrt(point.norm / self.scale))
        # Nothing is gained below the target.
        tolerance = min(max(forcing * self.space.length(point.grad), 0.9 * self.run.target), _longest(point))
        max_products = 2 * self.space.numel + 10
        arguments = self._multiplier(point), point.grad, radius, tolerance, max_products
        if not self.inverse.is_steepest:
            try:
                path = steihaug(*arguments, self._precondition, KEPT, self.space)
                if path.norm > 0:
                    return path
            except ValueError:
                pass  # rounding has made the preconditioner indefinite
            self.inverse.reset()
        return steihaug(*arguments, keep=KEPT, space=self.space)

    def _negative_curvature_model(self, point: Point, radius: float) -> Model:
        """The model along a direction of negative curvature, found from a random vector where the gradient is zero."""
        start, space = self.space.random(point.x), self.space
        far = min(INITIAL_RADIUS * (1.0 + space.length(start)), _longest(point))
        n_probes = max(1, min(PROBES, space.numel))
        probes = steihaug(self._multiplier(point), start, far, 0.0, n_probes, keep=0, space=space)
        if probes.end is End.negative_curvature:
            return _LineModel(*self.products[-1], point.grad, self.unit, space)
        # Without one: the gradient is within this tolerance, and the step is zero.
        return steihaug(self._multiplier(point), point.grad, radius, _longest(point), n_probes, space=space)

    def _precondition(self, residual: Tensor) -> Tensor:
        return -self.inverse.direction(residual)

    def _multiplier(self, point: Point) -> Callable[[Tensor], Tensor]:
        def multiply(vector: Tensor) -> Tensor:
            # The model leaves out second derivatives that are not finite.
            product = torch.nan_to_num(self.objective.product(point, vector), nan=0.0, posinf=0.0, neginf=0.0)
            self.products.append((vector, product))
            return product

        return multiply

    def learn(self, point: Point, new: Point, trial: TrialStep) -> float:
        if self.dense is not None:
            return 1.0
        # Without rounding a path has at most one product per variable, at which price the Hessian is exact.
        if self.n_products >= LONG * self.space.numel and self.refine():
            return self.space.length(trial.step) / trial.norm
        y = new.grad - point.grad
        (all_sy,) = self.space.total(torch.stack([s.dot(y) for s, y in ((trial.step, y), *self.products)]))
        sy, *curvatures = all_sy.tolist()
        if not sy > LEAST_CURVATURE * abs(new.slope_before):
            return 1.0
        for curvature, (s, product) in zip(curvatures, self.products, strict=True):
            if curvature > LEAST_CURVATURE * max(curvatures):
                self.inverse.update(s, product)
        self.inverse.update(trial.step, y)
        return math.sqrt(sy) / trial.norm  # the newest pair has s'M s = s'y


class _LineModel:
    """The model along one direction, of negative curvature."""

    def __init__(self, direction: Tensor, product: Tensor, grad: Tensor, unit: float, space: Space) -> None:
        self.direction, self.unit = direction, unit
        self.slope, self.curvature = space.floats(grad.device, grad.dot(direction), product.dot(direction))

    def step(self, radius: float) -> TrialStep:
        length = radius / self.unit
        decrease = length * (abs(self.slope) - length * self.curvature / 2)
        return TrialStep(self.direction * math.copysign(length, -self.slope), radius, decrease, True, True)


def trust_region_descent(
    run: Run, point: Point, method: TrustRegionMethod, radius: float | None = None
) -> tuple[Status, float | None]:
    """Minimize from ``point`` until there is a reason to stop.

    Args:
        run: limits; its best point is the result.
        point: the start.
        method: makes the models.
        radius: of the trust region; None to start with the model's minimizer, however far.
    Returns:
        Why the solver stopped, and the last radius.
    """
    is_convex = False  # according to the last model
    space = run.objective.space
    longest, slope_at_start = UNBOUNDED * (1.0 + space.length(point.x)), point.norm
    while True:
        status = run.stop_status(point)
        is_last = run.n_iter >= run.max_iter or run.evaluations_left < 1
        if status is not None and (status is not Status.converged or is_convex or is_last):
            return status, radius
        if PATIENCE - run.patience >= STALLED:
            if not method.refine():
                return Status.precision_limit, radius
            run.patience, radius = PATIENCE, None
        size = 1.0 + space.length(point.x)
        limit = min(INITIAL_RADIUS * size * method.unit if radius is None else radius, _longest(point))
        if not limit > 0:  # lengths underflow
            return Status.precision_limit, radius
        model = method.model(point, limit)
        trial = model.step(limit)
        if radius is None and trial.on_boundary:  # no minimizer near: the first radius is the size of x
            radius = min(size * (trial.norm / space.length(trial.step)), limit)
            trial = model.step(radius)
        is_convex = not trial.negative_curvature
        # A saddle is left if the predicted decrease exceeds that of a slope within the tolerance.
        if status is not None:
            (sum_of_entries,) = space.floats(trial.step.device, trial.step.abs().sum())
            if trial.decrease <= max(run.noise(point), run.target * sum_of_entries):
                return status, radius
        run.begin_step()
        accepted = _step(run, point, model, trial, radius)
        if accepted is Status.precision_limit and method.refine():
            radius = None
            continue
        if isinstance(accepted, Status):
            return _end(run, point, accepted), radius
        new, radius, trial = accepted
        distance = space.length(trial.step)
        if run.falls_without_end(run.has_met_minus_infinity or (run.is_deep(new) and trial.on_boundary)):
            return Status.unbounded, radius
        if distance > longest:
            return Status.unbounded if new.norm >= STEEP * slope_at_start else Status.precision_limit, radius
        if radius is not None:
            radius = min(radius * method.learn(point, new, trial), _longest(point))
        else:
            method.learn(point, new, trial)
        point = new
        run.advance(point, distance, negative_curvature=not is_convex)


def _step(
    run: Run, point: Point, model: Model, trial: TrialStep, radius: float | None
) -> tuple[Point, float | None, TrialStep] | Status:
    """The next point and radius, and the step to it; or why no smaller step was accepted either."""
    is_finite: bool | None = None  # until there has been a trial
    n_blind, noise, coarse = 0, run.noise(point), run.objective.eps**COARSE * abs(point.value)
    for _ in range(REJECTIONS):
        if run.evaluations_left < 1:
            return Status.max_eval
        x = point.x + trial.step
        if not trial.decrease > 0 or not run.objective.space.largest(not torch.equal(x, point.x)):
            break
        new = run.evaluate(x, trial.step, point)
        if run.solves(new, point):
            return new, radius, trial
        if new.is_finite:
            is_finite, fall = True, point.value - new.value
            ratio, is_blind = judged(fall, trial.decrease, new.slope_before + new.slope, noise, coarse)
            radius = radius_after(radius, trial.norm, ratio, trial.on_boundary)
            if ratio > ACCEPTED:
                return _extended(run, point, new, trial, radius)
            n_blind += is_blind
            if n_blind >= BLIND:
                break
            radius = trial.norm * shortening(_first_minimum(point, new, trial)[0])
        else:
            is_finite = bool(is_finite)
            radius = 0.1 * trial.norm
        if not radius > 0:  # lengths underflow
            break
        trial = model.step(radius)
    return Status.non_finite if is_finite is False else Status.precision_limit


def _end(run: Run, point: Point, status: Status) -> Status:
    """Why no step from a point was accepted: ``status``, or because the function falls to -infinity from there."""
    signs = run.has_met_minus_infinity, run.is_deep(point)
    is_unbounded = any(signs) if status is Status.non_finite else all(signs)
    return Status.unbounded if is_unbounded and status is not Status.max_eval else status


def _extended(
    run: Run, point: Point, new: Point, trial: TrialStep, radius: float | None
) -> tuple[Point, float | None, TrialStep]:
    """A step, or a longer one in its direction if a quartic predicts enough further decrease.

    Where the Hessian at the minimum is singular, Newton's steps are too short by a constant factor; this recovers it.
    """
    if run.evaluations_left < 1:
        return new, radius, trial
    times = extension(*_first_minimum(point, new, trial), point.value - new.value, run.noise(point))
    if times == 1:
        return new, radius, trial
    step = trial.step * times
    far = run.evaluate(point.x + step, step, point)
    if not (run.solves(far, point) or (far.is_finite and far.value < new.value)):
        return new, radius, trial
    trial = trial._replace(step=step, norm=trial.norm * times)
    return far, None if radius is None else max(radius, trial.norm), trial


def _first_minimum(point: Point, new: Point, trial: TrialStep) -> tuple[float, float]:
    """Where the quartic along a step has its first minimum, and how far it falls to there; NaN without one."""
    # The model's second derivative along the step, s'Hs, from the decrease -(g's + s'Hs / 2).
    curvature = -2 * (new.slope_before + trial.decrease)
    return first_minimum(point.value - new.value, new.slope_before, curvature, new.slope) or (math.nan, math.nan)


def _longest(point: Point) -> float:
    """A length that leaves room for arithmetic."""
    return 0.01 * torch.finfo(point.x.dtype).max
