"""One minimisation: its limits, the best point so far, its line searches and its reasons to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from descend.second_order.line_search import Outcome, Search, hager_zhang
from descend.second_order.objective import Objective, Point
from descend.second_order.result import Iteration, Status

NOISE = 10.0  # units in the last place that a value may be off by
C1 = 1e-4  # share of the promised decrease that is progress
LONGEST_SEARCH = 40  # evaluations in one line search
LONGEST_STEP = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
MOST_WALLS = 120  # searches in a row that may end where the function does
PATIENCE = 100  # iterations without progress in value or gradient


class Move(NamedTuple):
    """Where a line search led.

    Attributes:
        point: the new point; None if no trial was lower.
        step: the step to it.
        outcome: how the search ended; None if the direction did not descend.
        is_sufficient: whether the value fell by a fair share of what the slope promised, or the search succeeded.
        promise: by how much the value would have fallen over the first trial's step had the slope stayed.
    """

    point: Point | None
    step: float
    outcome: Outcome | None
    is_sufficient: bool
    promise: float = math.inf


class Run:
    """Counts, limits and the best point of one minimisation.

    Args:
        objective: what is minimized.
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
        self.last_eval = objective.n_eval + max_eval
        self.n_iter = self.n_negative_curvature = 0
        self.is_stopped = False
        self.n_walls = 0
        self.history: list[Iteration] = []

    def start(self, x: Tensor, scale: float | None = None) -> Point:
        """Evaluate the first point. ``scale``: the gradient's largest entry where it all began, if not here."""
        point = self.best = self.milestone = self.objective.evaluate(x)
        self.scratch = torch.empty_like(x), torch.empty_like(x)
        self.target = self.tol * max(1.0, point.norm if scale is None else scale)
        self.patience = PATIENCE
        self._record(point, 0.0)
        return point

    @property
    def evaluations_left(self) -> float:
        return self.last_eval - self.objective.n_eval

    def noise(self, point: Point) -> float:
        """By how much the value at a point may be off through rounding."""
        return NOISE * self.objective.eps * abs(point.value)

    def evaluate(self, x: Tensor, direction: Tensor, origin: Point) -> Point:
        """Evaluate at ``x``, which lies in a direction from a point, and remember the lowest."""
        point = self.objective.evaluate(x, direction, origin)
        if point.is_finite and point.value < self.best.value:
            self.best = point
        return point

    def solves(self, trial: Point, origin: Point) -> bool:
        """Whether a trial meets the tolerance, and is not above where it came from by more than rounding."""
        return trial.is_finite and trial.norm <= self.target and trial.value <= origin.value + self.noise(origin)

    def search(self, origin: Point, direction: Tensor, step: float, max_step: float = math.inf) -> Move:
        """Search along a direction for a lower point."""
        max_step = min(max_step, LONGEST_STEP[direction.dtype])
        step = min(step, max_step)
        trial = self.evaluate(self.along(origin, direction, step), direction, origin)
        if self.solves(trial, origin):
            return Move(trial, step, Outcome.found, is_sufficient=True)
        slope = trial.slope_before
        if not -math.inf < slope < 0:
            return Move(None, 0.0, None, is_sufficient=False)
        trials = {step: trial}

        def phi(length: float) -> tuple[float, float]:
            if length not in trials:
                trials[length] = self.evaluate(self.along(origin, direction, length), direction, origin)
                _keep_lowest(trials, besides=length)
            found = trials[length]
            if not found.is_finite:
                return math.nan, math.nan
            # A trial that solves the problem passes for a minimum of the line, so that the search ends there.
            return found.value, 0.0 if self.solves(found, origin) else found.slope

        most = 1 + int(min(self.evaluations_left, LONGEST_SEARCH))  # the first call costs nothing
        search = hager_zhang(phi, origin.value, slope, step, max_step=max_step, max_eval=most, noise=self.noise(origin))
        end = trials[search.step] if search.step else None
        length = min(trials, key=lambda length: _height(trials[length]))
        if end is not None and trials[length].value < end.value - self.noise(end):  # in another valley of the line
            end = trials[length]
        else:
            length = search.step
        is_sufficient = search.outcome is Outcome.found or (
            _height(end) < origin.value + C1 * length * slope and not self._falls_for_ever(search)
        )
        if is_sufficient or _height(end) < origin.value:
            return Move(end, length, search.outcome, is_sufficient, -slope * step)
        return Move(None, 0.0, search.outcome, is_sufficient=False, promise=-slope * step)

    def _falls_for_ever(self, search: Search) -> bool:
        """Whether there seems to be no minimum: no end within 40 powers of ten, or one wall after the other."""
        self.n_walls = self.n_walls + 1 if search.outcome is Outcome.non_finite else 0
        is_endless = search.outcome is Outcome.no_bracket and search.n_eval > LONGEST_SEARCH
        return is_endless or self.n_walls >= MOST_WALLS

    def along(self, origin: Point, direction: Tensor, step: float) -> Tensor:
        """The point at a step along a direction, within the bounds whatever rounding does."""
        x = torch.add(origin.x, direction, alpha=step)
        return x if self.objective.lower is None else torch.clamp(x, self.objective.lower, self.objective.upper)

    def advance(self, point: Point, step: float, *, negative_curvature: bool = False) -> None:
        """Count an iteration that ended at ``point``."""
        self.n_iter += 1
        self.n_negative_curvature += negative_curvature
        self._record(point, step)
        self.is_stopped = self.callback is not None and self.callback(self, point)

    def verdict(self, point: Point) -> Status | None:
        """Whether to stop at ``point``, and why."""
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
        """Whether for long neither the value fell by more than its rounding error nor the gradient to a half."""
        mark = self.milestone
        if point.value < mark.value - self.noise(mark) / NOISE or point.norm < 0.5 * mark.norm:
            self.milestone, self.patience = point, PATIENCE
        else:
            self.patience -= 1
        return self.patience <= 0

    def _record(self, point: Point, step: float) -> None:
        counts = self.objective.n_eval, self.objective.n_hvp
        self.history.append(Iteration(point.value, point.norm, step, *counts))


def _keep_lowest(trials: dict[float, Point], besides: float) -> None:
    """Forget the trials that a search cannot end at: all but the newest and the lowest."""
    lowest = min(trials, key=lambda length: _height(trials[length]))
    for length in [length for length in trials if length not in (lowest, besides)]:
        del trials[length]


def _height(point: Point | None) -> float:
    """The value of a trial that a search can end at."""
    is_finite = point is not None and point.is_finite and math.isfinite(point.slope)
    return point.value if point is not None and is_finite else math.inf
