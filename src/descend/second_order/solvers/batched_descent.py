"""Line-search methods for many problems: BFGS, L-BFGS and L-BFGS-B."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from descend.second_order.mathematics.arrays import cast, clip_above, full
from descend.second_order.mathematics.batched_directions import CompactInverses, ManyDirections
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_box import box_directions, runner
from descend.second_order.solvers.batched_run import NONE
from descend.second_order.solvers.batched_search import BatchedSearches, Searches, first_steps


def batched_descent(run: BatchedSearches, directions: ManyDirections) -> None:
    """Minimize along directions until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
        directions: gives the directions; learns from every step.
    """

    @np.errstate(all="ignore")
    def propose(where: Array) -> Searches:
        steps = first_steps(run.value, run.grad, run.norm)
        steps = run.xp.where(directions.is_steepest, steps, 1.0)
        return Searches(directions.directions(run.grad), steps, full(run.x, run.count, run.largest_step))

    repeat_searches(run, directions, propose)


def batched_bounded_descent(run: BatchedSearches, inverses: CompactInverses) -> None:
    """Minimize inside the bounds until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
        inverses: gives the quadratic models; learns from every step.
    """

    xp, run_box = run.xp, runner(*run.x.shape)

    @np.errstate(all="ignore")
    def propose(where: Array) -> Searches:
        low, high = run.objective.lower - run.x, run.objective.upper - run.x
        directions, is_steepest = inverses.directions(run.grad), inverses.is_steepest
        if bool(is_steepest.any()):
            is_boxed = xp.isfinite(low).all(1) & xp.isfinite(high).all(1)
            first = first_steps(run.value, run.grad, run.norm)
            lengths = xp.where(is_boxed & (run.failed == NONE), 1.0, first)
            steepest = xp.minimum(xp.maximum(-cast(lengths, run.x)[:, None] * run.grad, low), high)
            directions = xp.where(is_steepest[:, None], steepest, directions)
        directions, longest = box_directions(run_box, inverses, directions, run.grad, low, high, where)
        return Searches(directions, full(run.x, run.count, 1.0), clip_above(longest, run.largest_step))

    repeat_searches(run, inverses, propose)


def repeat_searches(run: BatchedSearches, learner: ManyDirections, propose: Callable[[Array], Searches]) -> None:
    """Make round after round until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
        learner: is shown every step.
        propose: gives the next searches; its argument says where one is needed, (K,).
    """
    where = run.stop_at_start(learner)
    while run.count:
        run.begin(where, propose(where))
        where = run.take_trials(run.evaluate(run.along()), learner)
