"""Least squares for many problems at once: the trust region of ``step_control.py``, one for each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from descend.second_order.mathematics.arrays import array_of, cast, doubles, full, positions, replaced, take, tensor_of
from descend.second_order.mathematics.batched_gauss_newton import BatchedGaussNewton
from descend.second_order.mathematics.gauss_newton import column_norms, first_scale
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.batched_residuals import BatchedResiduals
from descend.second_order.solvers.batched_run import NONE, STATUS_CODES, BatchedRun, Trials
from descend.second_order.solvers.least_squares_descent import REJECTIONS
from descend.second_order.solvers.least_squares_run import BLIND, NOISE, ROUNDING
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.step_control import FIRST, GOOD, POOR

SHORTENINGS = 20  # of a step in a box that its bounds turn into one uphill


class BatchedFits(BatchedRun):
    """A run whose problems each have a linear model, a radius, and a trial step to be evaluated next.

    Attributes:
        radius: of the trust region in the norm |D s|.
        norms: D: ``first_scale``, then the largest that each column of the Jacobian has had.
        fits, best_fits: Jacobians and residuals at ``x`` and ``best_x``, as in ``BatchedResiduals``.
        end_fits: those of the results, (B, M, n + 2).
        trial_x, trial_norm, trial_decrease, on_boundary: the trial.
        noise_here: rounding errors of the costs.
    """

    objective: BatchedResiduals
    _NUMBERS = (
        *BatchedRun._NUMBERS,
        *("radius", "n_rejected", "has_been_finite", "n_blind", "promised", "noise_here"),
        *("trial_norm", "trial_decrease", "on_boundary"),
    )
    _VECTORS = (*BatchedRun._VECTORS, "norms", "fits", "best_fits", "trial_x", "first_x")

    def start(self) -> None:
        self.best_fits = None
        super().start()
        x, count = self.x, self.count
        self.fits = self.best_fits = self.objective.fits
        self.end_fits = self.fits + 0.0
        self.norms, self.trial_x, self.first_x = self.xp.zeros_like(x), x, x
        self.radius, self.promised = full(x, count, math.nan), full(x, count, math.inf)
        self.noise_here = self.trial_norm = self.trial_decrease = full(x, count, 0.0)
        self.n_rejected = self.n_blind = full(x, count, 0)
        self.has_been_finite = self.on_boundary = full(x, count, False)
        self.models = BatchedGaussNewton(self.fits.shape[1], tensor_of(x))

    def keep(self, rows: Array) -> None:
        super().keep(rows)
        self.models.keep(tensor_of(rows))

    def finish(self, stop: Array) -> Array | None:
        rows = positions(stop != NONE)
        if len(rows):
            self.end_fits[take(self.objective.rows, rows)] = take(self.best_fits, rows)
        return super().finish(stop)

    def _keep_best(self, where: Array, x: Array, value: Array, grad: Array, norm: Array) -> None:
        super()._keep_best(where, x, value, grad, norm)
        fits = self.fits if x is self.x else self.objective.fits
        self.best_fits = self.xp.where(where[:, None, None], fits, self.best_fits)

    @np.errstate(all="ignore")
    def begin(self, where: Array) -> Array:
        """Make models at new points; return why problems stop, a code (K,)."""
        choose, xp = self.xp.where, self.xp
        is_finite = xp.isfinite(self.value) & xp.isfinite(self.norm)
        if len(rows := positions(where & is_finite)):
            self._linearize(rows)
        stop = full(self.x, self.count, NONE)
        fails = where & self._is_stuck(where) | ~where & (self.n_rejected >= REJECTIONS)
        stop = choose(fails, self._stuck_codes(), stop)
        stop = choose(self.n_eval >= self.max_eval, STATUS_CODES[Status.max_eval], stop)
        stop = choose(self.n_iter >= self.max_iter, STATUS_CODES[Status.max_iter], stop)
        moved = where & (self.n_iter > 0)
        if self.callback is not None and bool(moved.any()):
            stop = choose(self.callback(self), STATUS_CODES[Status.stopped_by_callback], stop)
        is_solved = where & self._is_within()
        stop = choose(is_solved, STATUS_CODES[Status.converged], stop)
        stop = choose(is_finite, stop, STATUS_CODES[Status.non_finite])
        self._keep_best(is_solved & is_finite, self.x, self.value, self.grad, self.norm)
        return stop

    def _linearize(self, rows: Array) -> None:
        x, fits = tensor_of(take(self.x, rows)), tensor_of(take(self.fits, rows))
        jacobians, residuals = fits[:, :, : x.shape[1]], fits[:, :, -2]
        columns = column_norms(jacobians)
        is_first = tensor_of(self.xp.isnan(take(self.radius, rows))).unsqueeze(1)
        norms = torch.where(is_first, first_scale(columns, x), tensor_of(take(self.norms, rows)))
        norms = torch.maximum(norms, columns)
        self.norms = replaced(self.norms, array_of(norms), rows)
        # As in LeastSquaresRun.noise: rounding x alone changes the residuals.
        value = abs(take(self.value, rows))
        rounding = array_of(torch.linalg.vector_norm(columns.double() * x.double(), dim=1))
        noise = self.objective.eps * (NOISE * value + (2 * value) ** 0.5 * rounding)
        self.noise_here = replaced(self.noise_here, noise, rows)
        if self.objective.lower is not None:
            lower, upper = (tensor_of(take(end, rows)) for end in (self.objective.lower, self.objective.upper))
            grad = tensor_of(take(self.grad, rows))
            is_held = ((x <= lower) & (grad > 0)) | ((x >= upper) & (grad < 0))
            jacobians = jacobians.masked_fill(is_held.unsqueeze(1), 0.0)
        models = self.models
        models.renew(tensor_of(rows), jacobians, residuals, torch.where(norms > 0, norms, 1.0))
        size, choose = FIRST * array_of(models.lengths(tensor_of(self.x))), self.xp.where
        newton = array_of(models.newton_norm)
        first = choose(size > 0, size, choose(newton > 0, newton, 1.0))
        self.radius = choose(self.xp.isnan(self.radius), first, self.radius)

    def _is_within(self) -> Array:
        """Whether the models' minimizers are within the tolerance; as ``least_squares_run.is_within``."""
        models, eps = self.models, self.objective.eps
        x = tensor_of(self.x).double()
        is_low = models.newton_decrease <= self.tol**2 * tensor_of(abs(self.value))
        is_short = models.newton_norm <= min(self.tol, ROUNDING * eps) * models.lengths(x)
        is_same = (models.to_steps(models.newton).abs() <= self.tol * x.abs()).all(1)
        return array_of(is_low | is_short | is_same)

    def _is_stuck(self, where: Array) -> Array:
        """Whether for ``BLIND`` iterations falls of the cost have been within rounding, and the promise as large."""
        choose, promised = self.xp.where, array_of(self.models.newton_decrease)
        is_progress = where & ((promised > self.noise_here) | (promised < 0.25 * self.promised))
        self.promised = choose(is_progress, promised, self.promised)
        self.n_blind = choose(is_progress, 0, self.n_blind + where)
        return self.n_blind >= BLIND

    def _stuck_codes(self) -> Array:
        """Why to stop where no step lowers the cost: it is zero, or the residuals were never finite, or rounding."""
        choose = self.xp.where
        jacobians = tensor_of(self.best_fits)[:, :, : self.x.shape[1]]
        changes = [jacobians @ tensor_of(x).unsqueeze(2) for x in (self.first_x, self.best_x)]
        size = torch.maximum(*(torch.linalg.vector_norm(change, dim=(1, 2)) for change in changes))
        rounding = NOISE * self.objective.eps * array_of(size)
        is_zero = (self.best_value > 0) & ((2 * self.best_value) ** 0.5 <= rounding)
        codes = choose(is_zero, STATUS_CODES[Status.converged], STATUS_CODES[Status.precision_limit])
        is_outside = (self.n_rejected > 0) & ~self.has_been_finite
        return choose(is_outside, STATUS_CODES[Status.non_finite], codes)

    @np.errstate(all="ignore")
    def choose_trials(self) -> Array:
        """Choose steps; return why problems stop that have none, a code (K,)."""
        choose, models = self.xp.where, self.models
        radius = choose(self._is_end() & (self.n_rejected == 0), math.inf, self.radius)
        for _ in range(SHORTENINGS):
            t, on_boundary = models.minimizers(tensor_of(radius))
            self.trial_x = self.x + cast(array_of(models.to_steps(t)), self.x)
            if self.objective.lower is not None:
                self.trial_x = self.xp.maximum(
                    self.xp.minimum(self.trial_x, self.objective.upper), self.objective.lower
                )
                t = models.from_steps(tensor_of(doubles(self.trial_x) - doubles(self.x)))
            self.trial_norm, self.trial_decrease = map(array_of, models.measure(t))
            is_uphill = ~(self.trial_decrease > 0) & (self.trial_norm > 0)
            if self.objective.lower is None or not bool(is_uphill.any()):
                break
            radius = choose(is_uphill, 0.25 * self.trial_norm, radius)
        self.on_boundary = array_of(on_boundary)
        is_none = ~(self.trial_decrease > 0) | (self.trial_x == self.x).all(1)
        return choose(is_none, self._stuck_codes(), NONE)

    def _is_end(self) -> Array:
        """Where falls can no longer be measured."""
        return array_of(self.models.newton_decrease) <= self.noise_here

    @np.errstate(all="ignore")
    def take_steps(self, trials: Trials) -> Array:
        """Move to the trials that are lower, and learn how far to trust the models; return where that was."""
        choose = self.xp.where
        fall = self.value - trials.value
        is_end = self._is_end()
        if self.objective.lower is not None:
            is_end = is_end | (self.trial_decrease <= self.noise_here)
        is_blind = trials.is_finite & is_end & (abs(fall) <= self.noise_here)
        moves = trials.is_finite & (fall > 0) | is_blind
        ratio = choose(is_blind, 1.0, choose(trials.is_finite, fall / self.trial_decrease, -math.inf))
        grown = choose((ratio > GOOD) | ~self.on_boundary, 2 * self.trial_norm, self.radius)
        accepted = choose(ratio < POOR, 0.5 * self.trial_norm, grown)
        # To the minimum of the parabola through the slope and both values, within limits.
        parabola = (0.5 / (1 - choose(moves, 0.0, ratio))).clip(0.1, 0.5)
        self.radius = choose(moves, accepted, parabola * self.trial_norm)
        self.n_rejected = choose(moves, 0, self.n_rejected + 1)
        self.has_been_finite = ~moves & (self.has_been_finite | trials.is_finite)
        self.fits = choose(moves[:, None, None], self.objective.fits, self.fits)
        self.advance(moves, trials, self.trial_norm)
        return moves


def batched_least_squares_descent(run: BatchedFits) -> None:
    """Go on from the start until every problem has a reason to stop."""
    moves: Any = full(run.x, run.count, True)
    while True:
        run.finish(run.begin(moves))
        if run.count:
            run.finish(run.choose_trials())
        if not run.count:
            return
        moves = run.take_steps(run.evaluate(run.trial_x))
