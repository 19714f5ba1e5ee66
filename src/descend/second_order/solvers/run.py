"""One run of a solver: its limits, the best point so far, its line searches and its reasons to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from descend.second_order.mathematics.line_search import Outcome, Search, hager_zhang
from descend.second_order.problem.objective import Objective, Point
from descend.second_order.solvers.budget import Budget
from descend.second_order.solvers.result import Iteration, Status

NOISE = 10.0  # units in the last place that a value may be off by
C1 = 1e-4  # fraction of the predicted decrease that is progress
MAX_SEARCH = 40  # evaluations in one line search
MAX_STEP = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
FLAT = {dtype: torch.finfo(dtype).tiny ** 0.5 for dtype in MAX_STEP}  # gradient at which the point may be infinite
MAX_NONFINITE = 120  # searches in a row that may end at NaN or infinity
MAX_ENDLESS = 3  # steps in a row towards -infinity, or on below the depth, after which a function has no minimum
DEPTH = 1e20  # how far below zero the depth begins, in multiples of the size of the value at the start
PATIENCE = 100  # iterations without progress in value or gradient


class Step(NamedTuple):
    """Where a line search led.

    Attributes:
        point: the new point; None if no trial was lower.
        length: of the step to it, in multiples of the direction.
        outcome: how the search ended; None if the direction is not a descent direction.
        is_sufficient: whether the search succeeded, or the value fell by ``C1`` of what the slope predicted.
        predicted_decrease: of the value over the first trial's step, had the slope stayed.
        is_unbounded: whether the function falls without end.
    """

    point: Point | None
    length: float
    outcome: Outcome | None
    is_sufficient: bool
    predicted_decrease: float = math.inf
    is_unbounded: bool = False


class Run(Budget):
    """Counts, limits and the best point of one run.

    Args:
        objective: the function to minimize.
        tol: converged when the largest entry of the (projected) gradient is at most ``tol * max(1, scale)``.
        max_iter: iterations at most.
        max_eval: evaluations at most.
        callback: called after every iteration; stops if it returns True.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        tol: float,
        max_iter: float,
        max_eval: float,
        callback: Callable[[Run, Point], bool] | None = None,
    ) -> None:
        self.objective = objective
        self.tol, self.max_iter, self.callback = tol, max_iter, callback
        super().__init__(objective, max_eval)
        self.n_iter = self.n_negative_curvature = 0
        self.is_stopped = False
        self.n_nonfinite = self.n_endless = 0
        self.has_met_minus_infinity = False  # since ``begin_step``
        self.history: list[Iteration] = []

    def start(self, x: Tensor, scale: float | None = None) -> Point:
        """Evaluate the first point. ``scale``: largest entry of the gradient at the first start, if not here."""
        point = self.best = self.milestone = self.current = self.objective.evaluate(x)
        self.target = self.tol * max(1.0, point.norm if scale is None else scale)
        change = point.norm * (1 + self.objective.space.length(x))
        self.depth = -max(1.0, abs(point.value), change) * DEPTH if point.is_finite else -math.inf
        self.patience = PATIENCE
        self._record(point, 0.0)
        return point

    @cached_property
    def scratch(self) -> tuple[Tensor, Tensor]:
        """Two vectors for whoever needs them."""
        return torch.empty_like(self.best.x), torch.empty_like(self.best.x)

    def noise(self, point: Point) -> float:
        """Rounding error of the value at a point."""
        return NOISE * self.objective.eps * abs(point.value)

    def evaluate(self, x: Tensor, direction: Tensor, origin: Point) -> Point:
        """Evaluate at ``x``, which lies along ``direction`` from ``origin``, and keep the lowest point."""
        point = self.objective.evaluate(x, direction, origin)
        if point.norm <= FLAT[x.dtype] and self.objective.space.largest(not torch.isfinite(x).all()):
            point = point._replace(value=math.nan)  # the function has a limit at infinity, which is no point
        self.has_met_minus_infinity |= point.value == -math.inf
        if point.is_finite and point.value < self.best.value:
            self.best = point
        return point

    def solves(self, trial: Point, origin: Point) -> bool:
        """Whether a trial meets the tolerance, and is above ``origin`` by no more than rounding."""
        return trial.is_finite and trial.norm <= self.target and trial.value <= origin.value + self.noise(origin)

    def search(self, origin: Point, direction: Tensor, step: float, max_step: float = math.inf) -> Step:
        """Search along a direction for a lower point."""
        self.begin_step()
        max_step = min(max_step, MAX_STEP[direction.dtype])
        step = min(step, max_step)
        trial = self.evaluate(self.along(origin, direction, step), direction, origin)
        if self.solves(trial, origin):
            return Step(trial, step, Outcome.found, is_sufficient=True)
        slope = trial.slope_before
        if not -math.inf < slope < 0:
            is_unbounded = slope == -math.inf and self.is_deep(origin)
            fall = -slope * step if slope == 0 else math.inf  # a slope that underflowed predicts none
            return Step(None, 0.0, None, False, fall, is_unbounded)
        trials = {step: trial}

        def phi(length: float) -> tuple[float, float]:
            if length not in trials:
                trials[length] = self.evaluate(self.along(origin, direction, length), direction, origin)
                self._keep_lowest(trials, besides=length)
            trial = trials[length]
            if not trial.is_finite:
                return math.nan, math.nan
            # Slope 0 where a trial solves the problem ends the search there.
            return trial.value, 0.0 if self.solves(trial, origin) else trial.slope

        max_eval = 1 + int(min(self.evaluations_left, MAX_SEARCH))  # the first trial has been evaluated
        noise = self.noise(origin)
        search = hager_zhang(phi, origin.value, slope, step, max_step=max_step, max_eval=max_eval, noise=noise)
        end = trials[search.step] if search.step else None
        length = min(trials, key=lambda length: _value_of(trials[length]))
        if end is not None and trials[length].value < end.value - self.noise(end):  # near a lower minimum
            end = trials[length]
        else:
            length = search.step
        is_sufficient = search.outcome is Outcome.found or (
            _value_of(end) < origin.value + C1 * length * slope and not self._seems_unbounded(search)
        )
        for trial in trials.values():
            if trial is not end:
                self._drop(trial)
        if end is None or not (is_sufficient or _value_of(end) < origin.value):
            is_wall = search.outcome is Outcome.non_finite
            signs = self.has_met_minus_infinity, self.is_deep(origin)
            return Step(None, 0.0, search.outcome, False, -slope * step, any(signs) if is_wall else all(signs))
        is_unbounded = self.falls_without_end(self._is_endless(search, end))
        is_unbounded |= search.outcome is Outcome.no_bracket and self.is_deep(end)
        return Step(end, length, search.outcome, is_sufficient, -slope * step, is_unbounded)

    def _is_endless(self, search: Search, end: Point) -> bool:
        """Whether the function fell up to the end of the numbers."""
        if search.outcome is Outcome.non_finite:
            return self.has_met_minus_infinity or self.is_deep(end)
        return search.outcome is Outcome.max_step and search.step == MAX_STEP[end.x.dtype]

    def begin_step(self) -> None:
        """Forget the infinities of the step before."""
        self.has_met_minus_infinity = False

    def is_deep(self, point: Point) -> bool:
        """Whether a value is so far below the start's that a function which still falls there has no minimum."""
        return point.value <= self.depth

    def falls_without_end(self, is_endless: bool) -> bool:
        """Count a step by which the function fell towards no minimum, or did not; whether enough have in a row."""
        self.n_endless = self.n_endless + 1 if is_endless else 0
        return self.n_endless >= MAX_ENDLESS

    def _seems_unbounded(self, search: Search) -> bool:
        """Whether the function still falls after 40 powers of ten, or search after search ended at NaN or infinity."""
        self.n_nonfinite = self.n_nonfinite + 1 if search.outcome is Outcome.non_finite else 0
        is_endless = search.outcome is Outcome.no_bracket and search.n_eval > MAX_SEARCH
        return is_endless or self.n_nonfinite >= MAX_NONFINITE

    def along(self, origin: Point, direction: Tensor, step: float) -> Tensor:
        """The point at a step along a direction, clamped to the bounds against rounding."""
        x = torch.add(origin.x, direction, alpha=step, out=self.objective.spare_vector())
        return x if self.objective.lower is None else torch.clamp(x, self.objective.lower, self.objective.upper)

    def advance(self, point: Point, step: float, *, negative_curvature: bool = False) -> None:
        """Count an iteration that ended at ``point``."""
        self.n_iter += 1
        self.n_negative_curvature += negative_curvature
        self._record(point, step)
        last, self.current = self.current, point
        self._drop(last)
        if self.callback is not None:  # one rank stops all
            self.is_stopped = bool(self.objective.space.largest(self.callback(self, point)))

    def _drop(self, point: Point) -> None:
        """Give back the vectors of a point, unless it is still needed."""
        if not any(point.x is other.x for other in (self.best, self.milestone, self.current)):
            self.objective.recycle(point)

    def _keep_lowest(self, trials: dict[float, Point], besides: float) -> None:
        """Drop the trials at which a search cannot end: all but the newest and the lowest."""
        lowest = min(trials, key=lambda length: _value_of(trials[length]))
        for length in [length for length in trials if length not in (lowest, besides)]:
            self._drop(trials.pop(length))

    def stop_status(self, point: Point) -> Status | None:
        """Why to stop at ``point``; None to go on."""
        if not point.is_finite:
            return Status.non_finite
        if point.norm <= self.target:
            self.best = point
            return Status.converged
        if self.is_stopped:
            return Status.stopped_by_callback
        if self.n_iter >= self.max_iter:
            return Status.max_iter
        if self.evaluations_left < 1:
            return Status.max_eval
        return Status.precision_limit if self._is_stuck(point) else None

    def _is_stuck(self, point: Point) -> bool:
        """Whether for ``PATIENCE`` iterations the value has not fallen beyond rounding, nor the gradient halved."""
        last = self.milestone
        if point.value < last.value - self.noise(last) / NOISE or point.norm < 0.5 * last.norm:
            # The value stays the least one: two points, one lower and one flatter, could take turns for ever.
            self.milestone, self.patience = point._replace(value=min(point.value, last.value)), PATIENCE
            self._drop(last)
        else:
            self.patience -= 1
        return self.patience <= 0

    def _record(self, point: Point, step: float) -> None:
        counts = self.objective.n_eval, self.objective.n_hvp
        self.history.append(Iteration(point.value, point.norm, step, *counts))


Descend: TypeAlias = Callable[[Run, Point], Status]  # minimizes from a point until there is a reason to stop


def _value_of(point: Point | None) -> float:
    """Value of a trial at which a search can end; infinity for any other."""
    is_finite = point is not None and point.is_finite and math.isfinite(point.slope)
    return point.value if point is not None and is_finite else math.inf
