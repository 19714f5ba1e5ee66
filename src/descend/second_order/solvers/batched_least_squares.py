"""Least squares for many problems at once: the trust region of ``step_control.py``, one for each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.second_order.mathematics import fit_rules
from descend.second_order.mathematics.arrays import (
    array_of,
    cast,
    combine,
    doubles,
    full,
    lengths,
    multiply,
    positions,
    replaced,
    row_products,
    take,
    tensor_of,
)
from descend.second_order.mathematics.batched_gauss_newton import BatchedGaussNewton
from descend.second_order.mathematics.secant_curvature import secant_update
from descend.second_order.mathematics.space import Array
from descend.second_order.mathematics.spectrum import column_norms, first_scale
from descend.second_order.problem.batched_residuals import BatchedResiduals
from descend.second_order.solvers.batched_run import NONE, STATUS_CODES, BatchedRun, Trials
from descend.second_order.solvers.least_squares_descent import REJECTIONS
from descend.second_order.solvers.least_squares_run import BLIND
from descend.second_order.solvers.result import Status

SHORTENINGS = 20  # of a step in a box that its bounds turn into one uphill


class BatchedFits(BatchedRun):
    """A run whose problems each have a linear model, a radius, and a trial step to be evaluated next.

    Attributes:
        radius: of the trust region in the norm |D s|.
        norms: D: ``first_scale``, then the largest that each column of the Jacobian has had.
        fits: Jacobians and residuals at ``x``, as in ``BatchedResiduals``.
        end_fits: those of the results, (B, n + 2, M); of problems that have not finished, of the best point where
            ``is_best_here`` is False.
        trial_x, trial_norm, trial_decrease, on_boundary: the trial.
        noise_here: rounding errors of the costs.
        curvature, is_curved: what Gauss-Newton leaves out of the Hessian, (K, n, n), and whether it is used.
        last_step, last_slope, has_last: the step that led to ``x``, and J'b for the bend b along it.
        failed_step, failed_norm, has_failed: the correction of a trial that was rejected, and the length of that.
    """

    objective: BatchedResiduals
    _NUMBERS = (
        *BatchedRun._NUMBERS,
        *("radius", "n_rejected", "has_been_finite", "n_blind", "promised", "noise_here"),
        *("trial_norm", "trial_decrease", "on_boundary", "is_best_here", "is_curved"),
        *("has_last", "has_failed", "failed_norm"),
    )
    _VECTORS = (
        *BatchedRun._VECTORS,
        *("norms", "fits", "trial_x", "first_x", "curvature", "last_step", "last_slope", "failed_step"),
    )

    def start(self) -> None:
        self.is_best_here = full(self.x, self.count, True)
        super().start()
        x, count = self.x, self.count
        self.fits = self.objective.fits
        self.end_fits = self.fits + 0.0
        self.norms, self.trial_x, self.first_x = self.xp.zeros_like(x), x, x
        self.last_step = self.last_slope = self.failed_step = self.xp.zeros_like(x)
        self.radius, self.promised = full(x, count, math.nan), full(x, count, math.inf)
        self.noise_here = self.trial_norm = self.trial_decrease = self.failed_norm = full(x, count, 0.0)
        self.n_rejected = self.n_blind = full(x, count, 0)
        self.has_been_finite = self.on_boundary = self.is_curved = full(x, count, False)
        self.has_last = self.has_failed = full(x, count, False)
        self.curvature = full(x, (count, x.shape[1], x.shape[1]), 0.0)
        is_bounded = self.objective.lower is not None
        self.models = BatchedGaussNewton(self.fits.shape[2], tensor_of(x), holds=is_bounded)

    def keep(self, rows: Array) -> None:
        super().keep(rows)
        self.models.keep(tensor_of(rows))

    def finish(self, stop: Array) -> Array | None:
        self._store_fits((stop != NONE) & self.is_best_here)
        return super().finish(stop)

    def _store_fits(self, where: Array) -> None:
        if len(rows := positions(where)):
            self.end_fits[take(self.objective.rows, rows)] = take(self.fits, rows)

    def _keep_best(self, where: Array, x: Array, value: Array, grad: Array, norm: Array) -> None:
        super()._keep_best(where, x, value, grad, norm)
        # Of a trial before it is taken; a trial that is better always is.
        self.is_better, self.is_best_here = where, self.is_best_here | where

    @np.errstate(all="ignore")
    def begin(self, where: Array) -> Array:
        """Make models at new points; return why problems stop, a code (K,)."""
        choose, xp = self.xp.where, self.xp
        is_finite = xp.isfinite(self.value) & xp.isfinite(self.norm)
        if len(rows := positions(where & is_finite)):
            self._linearize(rows)
        stop = full(self.x, self.count, NONE)
        fails = where & self._is_stuck(where) | ~where & (self.n_rejected >= REJECTIONS)
        stop = self._stop_stuck(fails, stop)
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
        fits = tensor_of(self.fits if len(rows) == self.count else take(self.fits, rows))
        x = tensor_of(take(self.x, rows))
        n = x.shape[1]
        jacobians = fits[:, :n].mT
        columns = column_norms(jacobians)
        is_first = tensor_of(self.xp.isnan(take(self.radius, rows))).unsqueeze(1)
        norms = torch.where(is_first, first_scale(columns, x), tensor_of(take(self.norms, rows)))
        norms = torch.maximum(norms, columns)
        self.norms = replaced(self.norms, array_of(norms), rows)
        change = array_of(torch.linalg.vector_norm(columns.double() * x.double(), dim=1))
        noise = fit_rules.noise(take(self.value, rows), change, self.objective.eps)
        self.noise_here = replaced(self.noise_here, noise, rows)
        held = None
        if self.objective.lower is not None:
            lower, upper = (tensor_of(take(end, rows)) for end in (self.objective.lower, self.objective.upper))
            grad = tensor_of(take(self.grad, rows))
            held = ((x <= lower) & (grad > 0)) | ((x >= upper) & (grad < 0))
        models = self.models
        curvature, is_curved = (tensor_of(take(array, rows)) for array in (self.curvature, self.is_curved))
        scale = torch.where(norms > 0, norms, 1.0)
        models.renew(tensor_of(rows), jacobians, fits[:, n], scale, curvature, is_curved, held)
        size, choose = fit_rules.FIRST_RADIUS * array_of(models.lengths(tensor_of(self.x))), self.xp.where
        newton = array_of(models.newton_norm)
        first = choose(size > 0, size, choose(newton > 0, newton, 1.0))
        self.radius = choose(self.xp.isnan(self.radius), first, self.radius)

    def _is_within(self) -> Array:
        """Whether the models' minimizers are within the tolerance."""
        models, x = self.models, tensor_of(self.x).double()
        decrease = array_of(models.newton_decrease)
        if bool((self.value == 0).any()):  # or has underflowed, though residuals are not zero
            is_zero = (self.fits[:, self.x.shape[1] + 1] == 0).all(1)
            decrease = self.xp.where((self.value == 0) & ~is_zero, math.inf, decrease)
        norm, length = array_of(models.newton_norm), array_of(models.lengths(x))
        is_same = (models.to_steps(models.newton).abs() <= self.tol * x.abs()).all(1)
        return fit_rules.is_within(self.tol, self.objective.eps, self.value, decrease, norm, length) | array_of(is_same)

    def _is_stuck(self, where: Array) -> Array:
        """Whether for ``BLIND`` iterations falls of the cost have been within rounding, and the promise as large."""
        choose, promised = self.xp.where, array_of(self.models.newton_decrease)
        is_progress = where & fit_rules.is_progress(promised, self.noise_here, self.promised)
        self.promised = choose(is_progress, promised, self.promised)
        self.n_blind = choose(is_progress, 0, self.n_blind + where)
        return self.n_blind >= BLIND

    def _stop_stuck(self, where: Array, stop: Array) -> Array:
        """Stop where no step lowers the cost: it is zero, or the residuals were never finite, or rounding."""
        rows = positions(where)
        if not len(rows):
            return stop
        choose, n = self.xp.where, self.x.shape[1]
        is_here = take(self.is_best_here, rows)[:, None, None]
        columns = choose(is_here, take(self.fits, rows), self.end_fits[take(self.objective.rows, rows)])[:, :n]
        ends = (take(array, rows) for array in (self.first_x, self.best_x))
        size = self.xp.maximum(*(lengths(combine(x, columns)) for x in ends))
        is_zero = fit_rules.is_rounding(take(self.best_value, rows), size, self.objective.eps)
        codes = choose(is_zero, STATUS_CODES[Status.converged], STATUS_CODES[Status.precision_limit])
        is_outside = take((self.n_rejected > 0) & ~self.has_been_finite, rows)
        return replaced(stop, choose(is_outside, STATUS_CODES[Status.non_finite], codes), rows)

    @np.errstate(all="ignore")
    def choose_trials(self) -> Array:
        """Choose steps; return why problems stop that have none, a code (K,)."""
        choose, models = self.xp.where, self.models
        radius = choose(self._is_end() & (self.n_rejected == 0), math.inf, self.radius)
        for _ in range(SHORTENINGS):
            t, on_boundary = models.minimizers(tensor_of(radius))
            step = cast(array_of(models.to_steps(t)), self.x)
            self.trial_x = self._inside(self.x + step)
            if self.objective.lower is not None:
                t = models.from_steps(tensor_of(doubles(self.trial_x) - doubles(self.x)))
            self.trial_norm, self.trial_decrease = map(array_of, models.measure(t))
            is_uphill = ~(self.trial_decrease > 0) & (self.trial_norm > 0)
            if self.objective.lower is None or not bool(is_uphill.any()):
                break
            radius = choose(is_uphill, 0.25 * self.trial_norm, radius)
        self.on_boundary = array_of(on_boundary)
        if bool((self.has_last | self.has_failed).any()):
            self.trial_x = self._inside(self.trial_x + cast(self._corrections(t), self.x))
        return self._stop_stuck(
            ~(self.trial_decrease > 0) | (self.trial_x == self.x).all(1), full(self.x, self.count, NONE)
        )

    def _corrections(self, t: Tensor) -> Array:
        """What to add to trials because residuals bend; as in ``least_squares_descent``, zero where that is unknown."""
        choose, models = self.xp.where, self.models
        scale = array_of(models.scale)
        step, last = array_of(models.to_steps(t)) * scale, doubles(self.last_step) * scale
        square = row_products(last, last)
        share = choose(square > 0, row_products(step, last) / square, 0.0)
        is_known = self.has_last & fit_rules.is_known(share, square**0.5, self.trial_norm)
        found = array_of(models.corrections(tensor_of((share**2)[:, None] * self.last_slope)))
        is_short = array_of(models.lengths(tensor_of(found))) <= fit_rules.LONGEST_CORRECTION * self.trial_norm
        found = choose((is_known & is_short)[:, None], found, 0.0)
        ratio = (self.trial_norm / self.failed_norm) ** 2
        return choose(self.has_failed[:, None], self.failed_step * ratio[:, None], found)

    def _inside(self, x: Array) -> Array:
        if self.objective.lower is None:
            return x
        return self.xp.maximum(self.xp.minimum(x, self.objective.upper), self.objective.lower)

    def _is_end(self) -> Array:
        """Where falls can no longer be measured."""
        return array_of(self.models.newton_decrease) <= self.noise_here

    @np.errstate(all="ignore")
    def take_steps(self, trials: Trials) -> Array:
        """Move to the trials that are lower, and learn how far to trust the models; return where that was."""
        choose = self.xp.where
        fall = self.value - trials.value
        is_finite = self.xp.isfinite(trials.value)
        is_end = self._is_end()
        if self.objective.lower is not None:
            is_end = is_end | (self.trial_decrease <= self.noise_here)
        is_blind = is_end & (abs(fall) <= self.noise_here)
        lower = is_finite & ((fall > 0) | is_blind)
        moves = lower & trials.is_finite
        is_finite = is_finite & ~(lower & ~moves)
        ratio = choose(is_blind, 1.0, choose(is_finite, fall / self.trial_decrease, -math.inf))
        slopes = self._learn(trials, moves)
        retries = self._retry(trials, slopes, is_finite & ~moves)
        accepted = fit_rules.radius_after(self.radius, self.trial_norm, ratio, self.on_boundary)
        factor = choose(retries > 0, retries, fit_rules.shortening(choose(moves, 0.0, ratio)))
        self.radius = choose(moves, accepted, factor * self.trial_norm)
        self.n_rejected = choose(moves, 0, self.n_rejected + 1)
        self.has_been_finite = ~moves & (self.has_been_finite | is_finite)
        self.advance(moves, trials, self.trial_norm)
        return moves

    def _learn(self, trials: Trials, moves: Array) -> Array:
        """Take the Jacobians of the steps that are taken, and learn from them what they leave out.

        Returns:
            J'b, (K, n), where b is what residuals change by from the better to the worse of the two points of a step,
            beyond J times the step.
        """
        choose, n, new = self.xp.where, self.x.shape[1], self.objective.fits
        step = trials.x - self.x
        if bool(moves.any()):
            self._learn_curvature(trials, moves, step)
        leaves_best = moves & self.is_best_here & ~self.is_better
        self._store_fits(leaves_best)
        self.is_best_here = self.is_best_here & ~leaves_best
        change = choose(moves[:, None], self.fits[:, n + 1] - new[:, n + 1], new[:, n + 1] - self.fits[:, n + 1])
        if len(others := positions(~moves)):
            new[others] = take(self.fits, others)
        self.fits = new
        away = choose(moves[:, None], -step, step)
        weighted = change if self.objective.rho is None else new[:, n + 2] * change
        slopes = multiply(new[:, :n], weighted - combine(away, new[:, :n]))
        self.last_step = choose(moves[:, None], away, self.last_step)
        self.last_slope = choose(moves[:, None], doubles(slopes), self.last_slope)
        self.has_last, self.has_failed = self.has_last | moves, self.has_failed & ~moves
        return slopes

    def _learn_curvature(self, trials: Trials, moves: Array, step: Array) -> None:
        """Learn S, and whether to use it; as ``DenseLinearization``."""
        choose, n, new, old = self.xp.where, self.x.shape[1], self.objective.fits, self.fits
        along, double = combine(step, old[:, :n]), doubles(step)
        straight = -(row_products(self.grad, step) + 0.5 * row_products(along, along))
        missing = 0.5 * row_products(double, multiply(self.curvature, double))
        fall = self.value - trials.value
        is_curved = fit_rules.uses_curvature(self.is_curved, missing, straight, fall)
        self.is_curved = choose(moves, is_curved, self.is_curved)
        change = trials.grad - self.grad
        if self.objective.rho is None:
            structured = trials.grad - multiply(old[:, :n], new[:, n])
        else:  # the rows have been weighted differently
            structured = change - multiply(new[:, :n], combine(step, new[:, :n]))
        rows = positions(moves)
        given = (
            tensor_of(take(array, rows)) for array in (self.curvature, double, doubles(change), doubles(structured))
        )
        self.curvature = replaced(self.curvature, array_of(secant_update(*given)), rows)

    def _retry(self, trials: Trials, slopes: Array, where: Array) -> Array:
        """Correct trials that were rejected, if their corrections are short enough: by what to shorten them, or 0."""
        where = where & ~self.has_failed
        if not bool(where.any()):
            return full(self.x, self.count, 0.0)
        choose, models = self.xp.where, self.models
        found = models.corrections(tensor_of(slopes))
        norm = array_of(models.lengths(tensor_of(trials.x - self.x)))
        retry = choose(where, fit_rules.longest_retry(norm, array_of(models.lengths(found))), 0.0)
        where = retry > 0
        self.failed_step = choose(where[:, None], array_of(found), self.failed_step)
        self.failed_norm = choose(where, norm, self.failed_norm)
        self.has_failed = self.has_failed | where
        return retry


def batched_least_squares_descent(run: BatchedFits) -> None:
    """Go on from the start until every problem has a reason to stop."""
    moves: Any = full(run.x, run.count, True)
    while True:
        run.finish(run.begin(moves))
        if run.count:
            run.finish(run.choose_trials())
        if not run.count:
            return
        run.objective.needed_below = run.value + 2 * run.noise_here  # higher ones are rejected
        moves = run.take_steps(run.evaluate(run.trial_x))
