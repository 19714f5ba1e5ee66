"""One run of a solver on many problems: limits, points, best points and reasons to stop, of each alone.

What ``run.py`` decides for one problem is decided here by the same rules for all at once. A round is one evaluation of
every problem that has not finished. Problems that finish leave all arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from descend.second_order.mathematics.arrays import full, keep, lengths, library, positions, take, tensor_of
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.batched_objective import BatchedObjective
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import DEPTH, FLAT, MAX_ENDLESS, NOISE, PATIENCE

STATUSES = list(Status)
STATUS_CODES = {status: code for code, status in enumerate(STATUSES)}
NONE = -1  # code of a problem that goes on


class Iterations(NamedTuple):
    """Iterations that ended in one round: which problems made one, and their points; all (K,)."""

    rows: Array
    is_new: Array
    value: Array
    norm: Array
    step: Array
    n_eval: Array
    n_hvp: Array


class Ends:
    """The results of all B problems; filled as problems finish."""

    def __init__(self, x: Array) -> None:
        count = len(x)
        self.x, self.grad = x + 0.0, x + 0.0
        self.value, self.norm = full(x, count, math.nan), full(x, count, math.nan)
        self.status = full(x, count, NONE)
        self.n_iter, self.n_eval = full(x, count, 0), full(x, count, 0)
        self.n_hvp, self.n_negative_curvature = full(x, count, 0), full(x, count, 0)


class Trials(NamedTuple):
    """An evaluation of all problems; x and grad (K, n), the others (K,)."""

    x: Array
    value: Array
    grad: Array
    norm: Array
    is_finite: Array


class BatchedRun:
    """Counts, limits and points of all problems that have not finished.

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

    _NUMBERS: tuple[str, ...] = (
        *("value", "norm", "target", "n_iter", "n_eval", "n_hvp", "n_negative_curvature", "patience"),
        *("milestone_value", "milestone_norm", "best_value", "best_norm"),
        *("depth", "n_endless", "has_met_minus_infinity"),
    )
    _VECTORS: tuple[str, ...] = ("x", "grad", "best_x", "best_grad")

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
        self.milestone_value, self.milestone_norm = value, norm
        with np.errstate(all="ignore"):
            self.target = self.tol * self.xp.where(norm > 1.0, norm, 1.0)
            self.depth = -DEPTH * self._sizes()
        self.n_iter = self.n_hvp = self.n_negative_curvature = self.n_endless = full(x, count, 0)
        self.has_met_minus_infinity = full(x, count, False)  # since the step began
        self.n_eval, self.patience = full(x, count, 1), full(x, count, PATIENCE)
        self._record(full(x, count, True), full(x, count, 0.0))

    def _sizes(self) -> Array:
        """The largest of 1, the values at the start, and how they change over its size; infinite outside the domain."""
        change = self.norm * (1 + lengths(self.x))
        size = self.xp.maximum(abs(self.value), change)
        return self.xp.where(self.xp.isfinite(size), self.xp.where(size > 1.0, size, 1.0), math.inf)

    def noise(self, value: Array) -> Array:
        """Rounding errors of values."""
        return NOISE * self.objective.eps * abs(value)

    def keep(self, rows: Array) -> None:
        """Leave out all problems but these."""
        keep(self, self._NUMBERS, rows)
        keep(self, self._VECTORS, rows)
        self.objective.keep(rows)

    def evaluate(self, x: Array) -> Trials:
        """Evaluate all problems, and keep the lowest point of each."""
        value, grad, norm = self.objective.evaluate(x)
        self.n_eval = self.n_eval + 1
        is_flat = norm <= FLAT[tensor_of(x).dtype]
        if bool(is_flat.any()):  # the function may have a limit at infinity, which is no point
            value = self.xp.where(is_flat & ~self.xp.isfinite(x).all(1), math.nan, value)
        self.has_met_minus_infinity = self.has_met_minus_infinity | (value == -math.inf)
        trials = Trials(x, value, grad, norm, self.xp.isfinite(value) & self.xp.isfinite(norm))
        self._keep_best(trials.is_finite & (value < self.best_value), x, value, grad, norm)
        return trials

    def solves(self, trials: Trials) -> Array:
        """Where a trial meets the tolerance, and is above the point it comes from by no more than rounding."""
        is_low = trials.value <= self.value + self.noise(self.value)
        return trials.is_finite & (trials.norm <= self.target) & is_low

    def is_deep(self, value: Array) -> Array:
        """Where a value is so far below the start's that a function which still falls there has no minimum."""
        return value <= self.depth

    def fall_without_end(self, moves: Array, is_endless: Array) -> Array:
        """Count steps by which functions fell towards no minimum, or did not; where enough have in a row."""
        choose = self.xp.where
        self.n_endless = choose(moves, choose(is_endless, self.n_endless + 1, 0), self.n_endless)
        return moves & (self.n_endless >= MAX_ENDLESS)

    def meets_infinity(self, is_wall: Array) -> Array:
        """Where a step that led nowhere says that the function falls without end: at a wall one sign is enough."""
        is_met, is_deep = self.has_met_minus_infinity, self.is_deep(self.value)
        return self.xp.where(is_wall, is_met | is_deep, is_met & is_deep)

    def advance(self, moves: Array, end: Trials, step: Array) -> None:
        """Count iterations that ended at points, where there was one."""
        choose = self.xp.where
        self.x, self.grad = choose(moves[:, None], end.x, self.x), choose(moves[:, None], end.grad, self.grad)
        self.value, self.norm = choose(moves, end.value, self.value), choose(moves, end.norm, self.norm)
        self.n_iter = self.n_iter + moves
        self._record(moves, step)

    def stop_statuses(self, has_ended: Array, moves: Array) -> Array:
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

    def finish(self, stop: Array) -> Array | None:
        """Let problems with a reason to stop leave. Return the rows of the others; None if nothing has changed."""
        rows = positions(stop != NONE)
        if not len(rows):
            return None
        ends, places = self.ends, take(self.objective.rows, rows)
        for name, array in (
            ("x", self.best_x),
            ("grad", self.best_grad),
            ("value", self.best_value),
            ("norm", self.best_norm),
            ("status", stop),
            ("n_iter", self.n_iter),
            ("n_eval", self.n_eval),
            ("n_hvp", self.n_hvp),
            ("n_negative_curvature", self.n_negative_curvature),
        ):
            getattr(ends, name)[places] = take(array, rows)
        left = positions(stop == NONE)
        self.keep(left)
        return left

    def _keep_best(self, where: Array, x: Array, value: Array, grad: Array, norm: Array) -> None:
        choose = self.xp.where
        self.best_x = choose(where[:, None], x, self.best_x)
        self.best_grad = choose(where[:, None], grad, self.best_grad)
        self.best_value, self.best_norm = choose(where, value, self.best_value), choose(where, norm, self.best_norm)

    def _record(self, is_new: Array, step: Array) -> None:
        counts = self.n_eval, self.n_hvp
        self.history.append(Iterations(self.objective.rows, is_new, self.value, self.norm, step, *counts))
