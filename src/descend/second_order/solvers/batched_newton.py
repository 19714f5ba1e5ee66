"""Newton's method in trust regions for many problems at once: the rules of ``newton_descent.py``."""

from __future__ import annotations

import math

import numpy as np
import torch

from descend.second_order.mathematics import newton_rules
from descend.second_order.mathematics.arrays import cast, full, lengths, positions, row_products, take, tensor_of
from descend.second_order.mathematics.batched_trust_region import DenseModels, TrialSteps
from descend.second_order.mathematics.quartic import first_minima
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_run import NONE, STATUS_CODES, BatchedRun, Trials
from descend.second_order.solvers.newton_descent import (
    BLIND,
    COARSE,
    INITIAL_RADIUS,
    REJECTIONS,
    STALLED,
    STEEP,
    UNBOUNDED,
)
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import PATIENCE

UNSEEN, OUTSIDE, FINITE = 0, 1, 2  # what the trials from a point have been so far


class BatchedNewton(BatchedRun):
    """A run whose problems each have a trial step, or a longer one in its direction, to be evaluated next.

    Attributes:
        radius: of the trust region; NaN until there is one.
        step, step_norm, decrease, on_boundary: the trial.
        times: by what the trial is multiplied to be extended; 1 for the trial itself.
        near_x, near_grad, near_value, near_norm: the accepted trial, while a longer one is tried.
    """

    _NUMBERS = (
        *BatchedRun._NUMBERS,
        *("radius", "step_norm", "decrease", "on_boundary", "is_convex", "times", "near_value", "near_norm"),
        *("n_rejected", "n_blind", "seen", "longest", "first_norm", "before"),
    )
    _VECTORS = (*BatchedRun._VECTORS, "step", "near_x", "near_grad")

    def start(self) -> None:
        super().start()
        x, count = self.x, self.count
        self.most = 0.01 * torch.finfo(tensor_of(x).dtype).max  # a length that leaves room for arithmetic
        self.radius, self.step_norm, self.decrease = (full(x, count, math.nan) for _ in range(3))
        self.near_value = self.near_norm = self.before = full(x, count, math.nan)
        self.times = full(x, count, 1.0)
        self.on_boundary, self.is_convex = full(x, count, False), full(x, count, False)
        self.n_rejected = self.n_blind = self.seen = full(x, count, 0)
        self.step, self.near_x, self.near_grad = x + 0.0, x, x
        self.longest, self.first_norm = UNBOUNDED * (1.0 + lengths(x)), self.norm
        self.models = DenseModels(x)

    def keep(self, rows: Array) -> None:
        super().keep(rows)
        self.models.keep(rows)

    @np.errstate(all="ignore")
    def begin(self, where: Array, ages: Array) -> Array:
        """Make models at new points, and their steps; return why problems stop, a code (K,).

        Args:
            where: problems at a new point.
            ages: how many evaluations ago theirs was, 1 or 2; (K,).
        """
        choose = self.xp.where
        stop = self.stop_statuses(where, where & (self.n_iter > 0))
        is_solved = stop == STATUS_CODES[Status.converged]
        is_last = (self.n_iter >= self.max_iter) | (self.n_eval >= self.max_eval)
        looks = is_solved & ~self.is_convex & ~is_last  # whether it is a saddle
        stop = choose(looks, NONE, stop)
        is_stalled = (PATIENCE - self.patience >= STALLED) | (self.radius <= 0)  # or lengths underflow
        is_stalled = where & (stop == NONE) & is_stalled
        stop = choose(is_stalled, STATUS_CODES[Status.precision_limit], stop)
        goes_on = where & (stop == NONE)
        self.has_met_minus_infinity = self.has_met_minus_infinity & ~goes_on
        for age in (1, 2):
            if len(rows := positions(goes_on & (ages == age))):
                hessians = self.objective.hessians(rows, age)
                # The models leave out second derivatives that are not finite.
                hessians = self.xp.where(self.xp.isfinite(hessians), hessians, 0.0)
                self.models.renew(rows, hessians, take(self.grad, rows))
        self.n_hvp = self.n_hvp + self.x.shape[1] * goes_on
        rows = positions(goes_on)
        if not len(rows):
            return stop
        size, radius = 1.0 + lengths(take(self.x, rows)), take(self.radius, rows)
        is_new = radius != radius
        limit = clip_above(self, choose(is_new, INITIAL_RADIUS * size, radius))
        trial = self.models.step(rows, limit)
        if len(some := positions(is_new & trial.on_boundary)):
            # No minimizer near: the first radius is the size of x.
            ratio = take(trial.norm, some) / lengths(take(trial.step, some))
            radius[some] = self.xp.minimum(take(size, some) * ratio, take(limit, some))
            for old, new in zip(trial, self.models.step(take(rows, some), take(radius, some)), strict=True):
                old[some] = new
        self.radius[rows] = radius
        self.is_convex[rows] = ~trial.negative_curvature
        self._set_trials(rows, trial)
        self.n_rejected, self.n_blind = choose(goes_on, 0, self.n_rejected), choose(goes_on, 0, self.n_blind)
        self.seen = choose(goes_on, UNSEEN, self.seen)
        # A saddle is left if the predicted decrease exceeds that of a slope within the tolerance.
        within = self.xp.maximum(self.noise(self.value), self.target * abs(self.step).sum(1))
        stop = choose(looks & (self.decrease <= within), STATUS_CODES[Status.converged], stop)
        return choose((stop == NONE) & goes_on, self._give_up(), stop)

    def _set_trials(self, rows: Array, trial: TrialSteps) -> None:
        self.step[rows], self.step_norm[rows], self.decrease[rows] = trial[:3]
        self.on_boundary[rows], self.times[rows] = trial.on_boundary, 1.0
        self.before = row_products(self.grad, self.step)

    def _give_up(self) -> Array:
        """Why not to evaluate the trial; NONE to do so."""
        is_nothing = ~(self.decrease > 0) | (self.x + self.step == self.x).all(1)
        stop = self.xp.where(
            is_nothing | (self.n_rejected >= REJECTIONS) | (self.n_blind >= BLIND), self._blame(), NONE
        )
        return self.xp.where(self.n_eval >= self.max_eval, STATUS_CODES[Status.max_eval], stop)

    def _blame(self) -> Array:
        choose, is_outside = self.xp.where, self.seen == OUTSIDE
        blame = choose(is_outside, STATUS_CODES[Status.non_finite], STATUS_CODES[Status.precision_limit])
        return choose(self.meets_infinity(is_outside), STATUS_CODES[Status.unbounded], blame)

    @np.errstate(all="ignore")
    def next_points(self) -> Array:
        """The next points to evaluate."""
        return self.x + self.step * cast(self.times, self.x)[:, None]

    @np.errstate(all="ignore")
    def take_trials(self, trials: Trials) -> tuple[Array, Array, Array]:
        """Judge an evaluation; return where a point was accepted, its age, and why problems stop; (K,)."""
        choose = self.xp.where
        is_far = self.times > 1
        solves = self.solves(trials)
        slope = row_products(trials.grad, self.step)
        fall = self.value - trials.value
        noise, coarse = self.noise(self.value), self.objective.eps**COARSE * abs(self.value)

        # Trials.
        judged = ~is_far & ~solves & trials.is_finite
        ratio, is_blind = newton_rules.judged(fall, self.decrease, self.before + slope, noise, coarse)
        after = newton_rules.radius_after(self.radius, self.step_norm, ratio, self.on_boundary)
        radius = choose(judged, after, self.radius)
        is_accepted = judged & (ratio > newton_rules.ACCEPTED)
        minimum, whole_fall = first_minima(fall, self.before, -2 * (self.before + self.decrease), slope)
        times = newton_rules.extension(minimum, whole_fall, fall, noise)
        extends = is_accepted & (times > 1) & (self.n_eval < self.max_eval)
        is_rejected = ~is_far & ~solves & ~is_accepted
        factor = choose(judged, newton_rules.shortening(minimum), 0.1)
        radius = choose(is_rejected, self.step_norm * factor, radius)
        self.seen = choose(judged, FINITE, choose(is_rejected & (self.seen == UNSEEN), OUTSIDE, self.seen))
        self.n_rejected, self.n_blind = self.n_rejected + is_rejected, self.n_blind + (is_rejected & judged & is_blind)

        # Longer steps.
        is_better = is_far & (solves | (trials.is_finite & (trials.value < self.near_value)))
        norm = choose(is_better, self.step_norm * self.times, self.step_norm)
        radius = choose(is_better & (radius == radius) & (norm > radius), norm, radius)
        end = self._ends(is_far & ~is_better, trials)
        self._keep_near(extends, trials)

        moves = (is_far | solves | is_accepted) & ~extends
        step = self.step * cast(choose(is_better, self.times, 1.0), self.step)[:, None]
        distance = lengths(step)
        signs = self.has_met_minus_infinity | (self.is_deep(end.value) & self.on_boundary)
        is_unbounded = self.fall_without_end(moves, signs)
        is_endless = moves & ~is_unbounded & (distance > self.longest)
        is_unbounded = is_unbounded | (is_endless & (end.norm >= STEEP * self.first_norm))
        self.radius = clip_above(self, radius)
        self.times = choose(extends, times, 1.0)
        moves = moves & ~is_endless & ~is_unbounded
        self.n_negative_curvature = self.n_negative_curvature + (moves & ~self.is_convex)
        self.advance(moves, end, distance)
        stop = choose(is_endless, STATUS_CODES[Status.precision_limit], full(self.x, self.count, NONE))
        stop = choose(is_unbounded, STATUS_CODES[Status.unbounded], stop)
        if len(rows := positions(is_rejected)):
            self._set_trials(rows, self.models.step(rows, take(self.radius, rows)))
            stop = choose(is_rejected, self._give_up(), stop)
        return moves, choose(is_far & ~is_better, 2, 1), stop

    def _ends(self, is_near: Array, trials: Trials) -> Trials:
        """The points where steps end: the trials, or those whose extension is no better."""
        choose = self.xp.where
        return trials._replace(
            x=choose(is_near[:, None], self.near_x, trials.x),
            grad=choose(is_near[:, None], self.near_grad, trials.grad),
            value=choose(is_near, self.near_value, trials.value),
            norm=choose(is_near, self.near_norm, trials.norm),
        )

    def _keep_near(self, where: Array, trials: Trials) -> None:
        choose = self.xp.where
        self.near_x = choose(where[:, None], trials.x, self.near_x)
        self.near_grad = choose(where[:, None], trials.grad, self.near_grad)
        self.near_value = choose(where, trials.value, self.near_value)
        self.near_norm = choose(where, trials.norm, self.near_norm)


def clip_above(run: BatchedNewton, lengths: Array) -> Array:
    """Lengths, at most what leaves room for arithmetic; NaN stays."""
    return run.xp.where(lengths > run.most, run.most, lengths)


def batched_newton_descent(run: BatchedNewton) -> None:
    """Minimize until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
    """
    where, ages = full(run.x, run.count, True), full(run.x, run.count, 1)
    stop = full(run.x, run.count, NONE)
    while run.count:
        at_new_points = run.begin(where, ages)
        run.finish(run.xp.where(at_new_points == NONE, stop, at_new_points))
        if run.count:
            where, ages, stop = run.take_trials(run.evaluate(run.next_points()))
