"""One run of a solver on many problems: limits, best points, line searches and reasons to stop, of each alone.

What ``run.py`` and ``descent.py`` decide for one problem is decided here by the same rules for all at once. A round is
one evaluation of every problem that has not finished. Problems that finish leave all arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from descend.second_order.mathematics.arrays import (
    cast,
    full,
    keep,
    library,
    positions,
    row_products,
    take,
)
from descend.second_order.mathematics.batched_directions import ManyDirections, modified_secant_factors
from descend.second_order.mathematics.batched_line_search import CODES, RUNNING, SLOPE, STEP, VALUE, Lines
from descend.second_order.mathematics.line_search import Outcome
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.batched_objective import BatchedObjective
from descend.second_order.solvers.descent import MIN_CURVATURE, VISIBLE
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import C1, MAX_NONFINITE, MAX_SEARCH, NOISE, PATIENCE

STATUSES = list(Status)
NONE = -1  # code of a problem that goes on
STATUS_CODES = {status: code for code, status in enumerate(STATUSES)}


class Searches(NamedTuple):
    """What to search next: directions (K, n), first steps and the largest ones allowed (K,)."""

    directions: Array
    steps: Array
    max_steps: Array


class Iterations(NamedTuple):
    """Iterations that ended in one round: which problems made one, and their points; all (K,)."""

    rows: Array
    is_new: Array
    value: Array
    norm: Array
    step: Array
    n_eval: Array


class Ends:
    """The results of all B problems; filled as problems finish."""

    def __init__(self, x: Array) -> None:
        count = len(x)
        self.x, self.grad = x + 0.0, x + 0.0
        self.value, self.norm = full(x, count, math.nan), full(x, count, math.nan)
        self.status = full(x, count, NONE)
        self.n_iter, self.n_eval = full(x, count, 0), full(x, count, 0)


class BatchedRun:
    """Counts, limits, points and searches of all problems that have not finished.

    Args:
        objective: what is minimized.
        x: the starts, (B, n).
        tol: converged when the largest entry of the (projected) gradient is at most ``tol * max(1, its start)``.
        max_iter, max_eval: iterations and evaluations of each problem at most.
        callback: called after every round in which a problem has made an iteration; says which of the problems
            that are left stop, (K,).
    Attributes:
        ends: the results.
        history: iterations, round by round; the first entry is the start.
    """

    _NUMBERS: ClassVar = (
        *("value", "norm", "target", "n_iter", "n_eval", "failed", "n_nonfinite", "patience", "predicted"),
        *("milestone_value", "milestone_norm", "best_value", "best_norm", "lowest_norm"),
    )
    _VECTORS: ClassVar = ("x", "grad", "direction", "best_x", "best_grad", "lowest_x", "lowest_grad")

    def __init__(
        self,
        objective: BatchedObjective,
        x: Array,
        *,
        tol: float,
        max_iter: float,
        max_eval: float,
        callback: Callable[[BatchedRun], Array] | None = None,
    ) -> None:
        self.objective, self.tol, self.callback = objective, tol, callback
        self.max_iter, self.max_eval = max_iter, max_eval
        self.history: list[Iterations] = []
        self.x, self.ends, self.xp = x, Ends(x), library(x)

    @property
    def count(self) -> int:
        return len(self.x)

    def start(self) -> None:
        """Evaluate the first points."""
        x, count = self.x, self.count
        value, grad, norm = self.objective.evaluate(x)
        if self.max_iter > 0 and self.max_eval > 1:
            self.objective.check_independence(x, value)
        self.grad, self.value, self.norm = grad, value, norm
        self.best_x, self.best_grad, self.best_value, self.best_norm = x, grad, value, norm
        self.lowest_x, self.lowest_grad, self.lowest_norm = x + 0.0, grad + 0.0, norm
        self.direction = grad
        self.milestone_value, self.milestone_norm = value, norm
        self.target = self.tol * self.xp.where(norm > 1.0, norm, 1.0)
        self.n_iter, self.n_eval, self.n_nonfinite = (full(x, count, number) for number in (0, 1, 0))
        self.failed, self.patience = full(x, count, NONE), full(x, count, PATIENCE)
        self.predicted = full(x, count, math.nan)
        self.lines = Lines(count, x)
        self._record(full(x, count, True), full(x, count, 0.0))

    def noise(self, value: Array) -> Array:
        """Rounding errors of values."""
        return NOISE * self.objective.eps * abs(value)

    def keep(self, rows: Array) -> None:
        """Leave out all problems but these."""
        keep(self, self._NUMBERS, rows)
        keep(self, self._VECTORS, rows)
        self.lines.keep(rows)
        self.objective.keep(rows)

    @np.errstate(all="ignore")
    def begin(self, where: Array, searches: Searches) -> None:
        """Begin searches in some problems."""
        choose = self.xp.where
        self.direction = choose(where[:, None], searches.directions, self.direction)
        slope = row_products(self.grad, searches.directions)
        steps = self.xp.minimum(searches.steps, searches.max_steps)
        max_eval = self.xp.minimum(self.max_eval - self.n_eval, full(self.x, self.count, 1 + MAX_SEARCH))
        self.lines.begin(where, self.value, slope, steps, searches.max_steps, max_eval, self.noise(self.value))
        self.predicted = choose(where, -slope * steps, self.predicted)

    @np.errstate(all="ignore")
    def along(self) -> Array:
        """The next trials, clamped to the bounds against rounding."""
        x = self.x + cast(self.lines.step, self.x)[:, None] * self.direction
        if self.objective.lower is None:
            return x
        return self.xp.minimum(self.xp.maximum(x, self.objective.lower), self.objective.upper)

    @np.errstate(all="ignore")
    def take_trials(self, x: Array, value: Array, grad: Array, norm: Array, learner: ManyDirections) -> Array:
        """Take an evaluation of all problems; finish iterations and problems; return where to search anew, (K,)."""
        choose, lines = self.xp.where, self.lines
        self.n_eval = self.n_eval + 1
        is_finite = self.xp.isfinite(value) & self.xp.isfinite(norm)
        self._keep_best(is_finite & (value < self.best_value), x, value, grad, norm)
        solves = is_finite & (norm <= self.target) & (value <= self.value + lines.noise)
        slope0 = lines.start[SLOPE]
        is_astray = (lines.n_eval == 0) & ~solves & ~((slope0 < 0) & (slope0 > -math.inf))
        lines.advance(choose(is_finite, value, math.nan), row_products(grad, self.direction), solves)
        has_ended = (lines.outcome != RUNNING) | is_astray

        is_newest = (lines.outcome == CODES[Outcome.found]) | (lines.outcome == CODES[Outcome.max_step])
        self._keep_lowest(lines.is_lowest & ~is_newest, x, grad, norm)
        # Near a lower minimum, or without one: the lowest trial, if that is not the start.
        lowest, trial = lines.lowest, lines.trial
        is_beyond = lowest[STEP] > 0
        is_lower = is_newest & is_beyond & (lowest[VALUE] < trial[VALUE] - self.noise(trial[VALUE]))
        at_lowest = has_ended & is_beyond & (is_lower | ~is_newest)
        exists = has_ended & ~is_astray & (is_newest | is_beyond)
        if len(rows := positions(at_lowest)):
            x[rows], grad[rows] = take(self.lowest_x, rows), take(self.lowest_grad, rows)
            norm = choose(at_lowest, self.lowest_norm, norm)
        end = choose(at_lowest, lowest, trial)

        is_sufficient = self._sufficient(exists & (end[VALUE] < self.value + C1 * end[STEP] * slope0))
        is_sufficient = has_ended & ~is_astray & is_sufficient
        moves = exists & (is_sufficient | (end[VALUE] < self.value))
        failure = self._failures(moves)
        self._learn(learner, moves, x, grad, end, slope0)
        self.x, self.grad = choose(moves[:, None], x, self.x), choose(moves[:, None], grad, self.grad)
        self.value, self.norm = choose(moves, end[VALUE], self.value), choose(moves, norm, self.norm)
        self.n_iter = self.n_iter + moves
        self._record(moves, end[STEP])

        stop = self._stop_statuses(has_ended, moves)
        # The first failure is blamed on what was learned, the next one on the function.
        is_failure = has_ended & ~is_sufficient
        is_second = is_failure & ((self.failed != NONE) | (learner.is_steepest & ~moves))
        blame = choose(self.failed != NONE, self.failed, failure)
        stop = choose((stop == NONE) & is_second, blame, stop)
        self.failed = choose(has_ended, choose(is_failure, failure, NONE), self.failed)
        if len(rows := positions(is_failure)):
            learner.reset(rows)
        return self.finish(stop, has_ended, learner)

    def stop_at_start(self, learner: ManyDirections) -> Array:
        """Finish problems that need no iteration; return where to search, (K,): everywhere else."""
        everywhere = full(self.x, self.count, True)
        return self.finish(self._stop_statuses(everywhere, ~everywhere), everywhere, learner)

    def finish(self, stop: Array, has_ended: Array, learner: ManyDirections) -> Array:
        """Let problems with a reason to stop leave; return ``has_ended`` of the others."""
        rows = positions(stop != NONE)
        if not len(rows):
            return has_ended
        ends, places = self.ends, take(self.objective.rows, rows)
        ends.x[places], ends.grad[places] = take(self.best_x, rows), take(self.best_grad, rows)
        for name, numbers in (("value", self.best_value), ("norm", self.best_norm), ("status", stop)):
            getattr(ends, name)[places] = take(numbers, rows)
        ends.n_iter[places], ends.n_eval[places] = take(self.n_iter, rows), take(self.n_eval, rows)
        left = positions(stop == NONE)
        self.keep(left)
        learner.keep(left)
        return take(has_ended, left)

    def _keep_best(self, where: Array, x: Array, value: Array, grad: Array, norm: Array) -> None:
        choose = self.xp.where
        self.best_x = choose(where[:, None], x, self.best_x)
        self.best_grad = choose(where[:, None], grad, self.best_grad)
        self.best_value, self.best_norm = choose(where, value, self.best_value), choose(where, norm, self.best_norm)

    def _keep_lowest(self, where: Array, x: Array, grad: Array, norm: Array) -> None:
        """Keep the lowest trials of searches that go on: they may end there."""
        if len(rows := positions(where)):
            self.lowest_x[rows], self.lowest_grad[rows] = take(x, rows), take(grad, rows)
            self.lowest_norm = self.xp.where(where, norm, self.lowest_norm)

    def _sufficient(self, has_fallen: Array) -> Array:
        """Whether searches succeeded, or lowered the value enough; not where the function seems unbounded below."""
        choose, outcome = self.xp.where, self.lines.outcome
        is_found = outcome == CODES[Outcome.found]
        is_non_finite = outcome == CODES[Outcome.non_finite]
        looks = has_fallen & ~is_found
        self.n_nonfinite = choose(looks, choose(is_non_finite, self.n_nonfinite + 1, 0), self.n_nonfinite)
        is_endless = (outcome == CODES[Outcome.no_bracket]) & (self.lines.n_eval > MAX_SEARCH)
        return is_found | (has_fallen & ~is_endless & (self.n_nonfinite < MAX_NONFINITE))

    def _failures(self, moves: Array) -> Array:
        """Why searches failed, where they did."""
        is_rounding = (self.predicted <= VISIBLE * self.lines.noise) & (self.lines.start[SLOPE] < 0)
        failure = self.xp.where(
            is_rounding, STATUS_CODES[Status.precision_limit], STATUS_CODES[Status.line_search_failed]
        )
        is_outside = (self.lines.outcome == CODES[Outcome.non_finite]) & ~moves
        return self.xp.where(is_outside, STATUS_CODES[Status.non_finite], failure)

    def _learn(self, learner: ManyDirections, moves: Array, x: Array, grad: Array, end: Array, slope0: Array) -> None:
        """Show steps to the learner, where the slope rose along them."""
        slope, step = end[SLOPE], end[STEP]
        rise = slope - slope0
        sy = step * rise
        factor = modified_secant_factors(sy, self.value, end[VALUE], step * (slope + slope0))
        factor = self.xp.where(self.noise(self.value) < 0.1 * sy, factor, 1.0)
        if len(rows := positions(moves & ~(rise <= MIN_CURVATURE * abs(slope0)))):
            s, y = take(x, rows) - take(self.x, rows), take(grad, rows) - take(self.grad, rows)
            learner.update(rows, s, cast(take(factor, rows), y)[:, None] * y)

    def _stop_statuses(self, has_ended: Array, moves: Array) -> Array:
        """Why to stop problems whose search has ended; NONE to go on."""
        choose, xp = self.xp.where, self.xp
        stop = full(self.x, self.count, NONE)
        is_stuck = self._is_stuck(has_ended)
        stop = choose(is_stuck, STATUS_CODES[Status.precision_limit], stop)
        stop = choose(self.n_eval >= self.max_eval, STATUS_CODES[Status.max_eval], stop)
        stop = choose(self.n_iter >= self.max_iter, STATUS_CODES[Status.max_iter], stop)
        if self.callback is not None and bool(moves.any()):
            is_stopped = self.callback(self)
            stop, has_ended = choose(is_stopped, STATUS_CODES[Status.stopped_by_callback], stop), has_ended | is_stopped
        solved = self.norm <= self.target
        stop = choose(solved, STATUS_CODES[Status.converged], stop)
        is_finite = xp.isfinite(self.value) & xp.isfinite(self.norm)
        stop = choose(is_finite, stop, STATUS_CODES[Status.non_finite])
        stop = choose(has_ended, stop, NONE)
        self._keep_best(stop == STATUS_CODES[Status.converged], self.x, self.value, self.grad, self.norm)
        return stop

    def _is_stuck(self, has_ended: Array) -> Array:
        """Where for ``PATIENCE`` iterations the value has not fallen beyond rounding, nor the gradient halved."""
        choose, value, norm = self.xp.where, self.milestone_value, self.milestone_norm
        is_progress = (self.value < value - self.noise(value) / NOISE) | (self.norm < 0.5 * norm)
        is_progress = is_progress & has_ended
        self.milestone_value = choose(is_progress, self.value, value)
        self.milestone_norm = choose(is_progress, self.norm, norm)
        self.patience = choose(is_progress, PATIENCE, choose(has_ended, self.patience - 1, self.patience))
        return self.patience <= 0

    def _record(self, is_new: Array, step: Array) -> None:
        self.history.append(Iterations(self.objective.rows, is_new, self.value, self.norm, step, self.n_eval))


def first_steps(value: Array, grad: Array, norm: Array) -> Array:
    """First steps along gradients: a length of one, or to the minimum of a parabola whose minimum is 0."""
    xp: Any = library(grad)
    unit = grad / cast(norm, grad)[:, None]
    length = norm * row_products(unit, unit) ** 0.5
    return xp.maximum(1 / length, xp.minimum(1 / norm, 2 * abs(value) / length / length))
