"""Line searches of many problems, and what they teach: the rules of ``run.py`` and ``descent.py`` for all at once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from descend.second_order.mathematics.arrays import (
    cast,
    full,
    library,
    positions,
    replaced,
    row_products,
    take,
    tensor_of,
)
from descend.second_order.mathematics.batched_directions import Learner, modified_secant_factors
from descend.second_order.mathematics.line_search import (
    AT_MAX_STEP,
    FOUND,
    NO_BRACKET,
    NO_DESCENT,
    NON_FINITE,
    RUNNING,
)
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_lines import Lines
from descend.second_order.solvers.batched_run import NONE, STATUS_CODES, BatchedRun, Trials
from descend.second_order.solvers.descent import MIN_CURVATURE, VISIBLE
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import C1, MAX_NONFINITE, MAX_SEARCH, MAX_STEP

STEP, VALUE, SLOPE = 0, 1, 2  # rows of a trial


class Searches(NamedTuple):
    """What to search next: directions (K, n), first steps and the largest ones allowed (K,)."""

    directions: Array
    steps: Array
    max_steps: Array


class BatchedSearches(BatchedRun):
    """A run whose problems are on lines, each at the next trial of its own search.

    Attributes:
        failed: why the last search failed, if it did; a code.
    """

    _NUMBERS = (*BatchedRun._NUMBERS, "failed", "n_nonfinite", "predicted", "lowest_norm")
    _VECTORS = (*BatchedRun._VECTORS, "direction", "lowest_x", "lowest_grad")

    def start(self) -> None:
        super().start()
        count = self.count
        self.lowest_x, self.lowest_grad, self.lowest_norm = self.x + 0.0, self.grad + 0.0, self.norm
        self.direction = self.grad
        self.failed, self.n_nonfinite = full(self.x, count, NONE), full(self.x, count, 0)
        self.predicted = full(self.x, count, math.nan)
        dtype = tensor_of(self.x).dtype
        self.tiny, self.largest_step = torch.finfo(dtype).tiny, MAX_STEP[dtype]
        self.lines = Lines(count, self.x)

    def keep(self, rows: Array) -> None:
        super().keep(rows)
        self.lines.keep(rows)

    @np.errstate(all="ignore")
    def begin(self, where: Array, searches: Searches) -> None:
        """Begin searches in some problems."""
        choose = self.xp.where
        self.has_met_minus_infinity = self.has_met_minus_infinity & ~where
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
    def take_trials(self, trials: Trials, learner: Learner) -> Array:
        """Take an evaluation; finish iterations and problems; return where to search anew, (K,)."""
        choose, lines = self.xp.where, self.lines
        x, value, grad, norm, is_finite = trials
        solves, slope0 = self.solves(trials), lines.slope0
        lines.advance(choose(is_finite, value, math.nan), row_products(grad, self.direction))
        outcome = choose(solves, FOUND, lines.outcome)  # whatever the conditions say
        is_astray, has_ended = outcome == NO_DESCENT, outcome != RUNNING

        is_newest = (outcome == FOUND) | (outcome == AT_MAX_STEP)
        self._keep_lowest(lines.is_lowest & ~is_newest, x, grad, norm)
        # Near a lower minimum, or without one: the lowest trial, if that is not the start.
        lowest, trial = lines.lowest, lines.trial
        is_beyond = lowest[STEP] > 0
        is_lower = is_newest & (lowest[VALUE] < trial[VALUE] - self.noise(trial[VALUE]))
        at_lowest = has_ended & is_beyond & (is_lower | ~is_newest)
        exists = has_ended & ~is_astray & (is_newest | is_beyond)
        if len(rows := positions(at_lowest)):
            x = replaced(x, take(self.lowest_x, rows), rows)
            grad = replaced(grad, take(self.lowest_grad, rows), rows)
            norm = choose(at_lowest, self.lowest_norm, norm)
        end = choose(at_lowest, lowest, trial)

        is_enough = self._sufficient(outcome, exists & (end[VALUE] < self.value + C1 * end[STEP] * slope0))
        is_sufficient = exists & is_enough
        moves = exists & (is_sufficient | (end[VALUE] < self.value))
        is_unbounded = has_ended & ~solves & self._are_unbounded(outcome, moves, end[VALUE])
        failure = self._failures(outcome, moves)
        self._learn(learner, moves, x, grad, end, slope0)
        self.advance(moves, Trials(x, end[VALUE], grad, norm, is_finite), end[STEP])

        stop = self.stop_statuses(has_ended, moves)
        # The first failure is blamed on what was learned, the next one on the function.
        is_failure = has_ended & ~is_sufficient
        is_second = is_failure & ((self.failed != NONE) | (learner.is_steepest & ~moves))
        is_rounding = failure == STATUS_CODES[Status.precision_limit]
        blame = choose((self.failed != NONE) & ~is_rounding, self.failed, failure)
        is_unbounded = is_unbounded & (stop != STATUS_CODES[Status.stopped_by_callback])
        stop = choose(is_unbounded, STATUS_CODES[Status.unbounded], stop)  # whatever limit has been reached as well
        stop = choose((stop == NONE) & is_second, blame, stop)
        self.failed = choose(has_ended, choose(is_failure, failure, NONE), self.failed)
        if len(rows := positions(is_failure)):
            learner.reset(rows)
        return self._without(stop, has_ended, learner)

    @np.errstate(all="ignore")
    def stop_at_start(self, learner: Learner) -> Array:
        """Finish problems that need no iteration; return where to search, (K,): everywhere else."""
        everywhere = full(self.x, self.count, True)
        return self._without(self.stop_statuses(everywhere, ~everywhere), everywhere, learner)

    def _without(self, stop: Array, has_ended: Array, learner: Learner) -> Array:
        """Finish problems; return where the others have to search anew, (K,)."""
        left = self.finish(stop)
        if left is None:
            return has_ended
        learner.keep(left)
        return take(has_ended, left)

    def _keep_lowest(self, where: Array, x: Array, grad: Array, norm: Array) -> None:
        """Keep the lowest trials of searches that go on: they may end there."""
        if len(rows := positions(where)):
            self.lowest_x[rows], self.lowest_grad[rows] = take(x, rows), take(grad, rows)
            self.lowest_norm = self.xp.where(where, norm, self.lowest_norm)

    def _sufficient(self, outcome: Array, has_fallen: Array) -> Array:
        """Whether searches succeeded, or lowered the value enough; not where the function seems unbounded below."""
        choose, is_found, is_non_finite = self.xp.where, outcome == FOUND, outcome == NON_FINITE
        looks = has_fallen & ~is_found
        self.n_nonfinite = choose(looks, choose(is_non_finite, self.n_nonfinite + 1, 0), self.n_nonfinite)
        is_endless = (outcome == NO_BRACKET) & (self.lines.n_eval > MAX_SEARCH)
        return is_found | (has_fallen & ~is_endless & (self.n_nonfinite < MAX_NONFINITE))

    def _are_unbounded(self, outcome: Array, moves: Array, value: Array) -> Array:
        """Where the function falls without end, from what the searches have met; counts their steps."""
        choose, lines, is_wall = self.xp.where, self.lines, outcome == NON_FINITE
        is_last = (outcome == AT_MAX_STEP) & (lines.trial[STEP] == self.largest_step)
        is_endless = (is_wall & (self.has_met_minus_infinity | self.is_deep(value))) | is_last
        is_unbounded = self.fall_without_end(moves, is_endless)
        is_unbounded = is_unbounded | ((outcome == NO_BRACKET) & self.is_deep(value))
        is_unbounded = choose(moves, is_unbounded, self.meets_infinity(is_wall))
        is_steep = (lines.slope0 == -math.inf) & self.is_deep(self.value)
        return choose(outcome == NO_DESCENT, is_steep, is_unbounded)

    def _failures(self, outcome: Array, moves: Array) -> Array:
        """Why searches failed, where they did."""
        noise = self.xp.where(self.lines.noise > self.tiny, self.lines.noise, self.tiny)
        is_rounding = (self.predicted <= VISIBLE * noise) & (self.lines.slope0 <= 0)
        failure = self.xp.where(
            is_rounding, STATUS_CODES[Status.precision_limit], STATUS_CODES[Status.line_search_failed]
        )
        is_outside = (outcome == NON_FINITE) & ~moves
        return self.xp.where(is_outside, STATUS_CODES[Status.non_finite], failure)

    def _learn(self, learner: Learner, moves: Array, x: Array, grad: Array, end: Array, slope0: Array) -> None:
        """Show steps to the learner, where the slope rose along them."""
        slope, step = end[SLOPE], end[STEP]
        rise = slope - slope0
        sy = step * rise
        factor = modified_secant_factors(sy, self.value, end[VALUE], step * (slope + slope0))
        factor = self.xp.where(self.noise(self.value) < 0.1 * sy, factor, 1.0)
        if len(rows := positions(moves & ~(rise <= MIN_CURVATURE * abs(slope0)))):
            s, y = take(x, rows) - take(self.x, rows), take(grad, rows) - take(self.grad, rows)
            learner.update(rows, s, cast(take(factor, rows), y)[:, None] * y)


def first_steps(value: Array, grad: Array, norm: Array) -> Array:
    """First steps along gradients: a length of one, or to the minimum of a parabola whose minimum is 0."""
    xp: Any = library(grad)
    unit = grad / cast(norm, grad)[:, None]
    length = norm * row_products(unit, unit) ** 0.5
    return xp.maximum(1 / length, xp.minimum(1 / norm, 2 * abs(value) / length / length))
