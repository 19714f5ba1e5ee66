"""Line-search methods for many problems: BFGS, L-BFGS and L-BFGS-B."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from descend.second_order.mathematics.arrays import cast, clip_above, full
from descend.second_order.mathematics.batched_box import box_directions, clamp, max_feasible_steps
from descend.second_order.mathematics.batched_directions import CompactInverses, ManyDirections
from descend.second_order.mathematics.space import Array
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

    @np.errstate(all="ignore")
    def propose(where: Array) -> Searches:
        choose, lower, upper = run.xp.where, run.objective.lower, run.objective.upper
        low, high = lower - run.x, upper - run.x
        is_steepest = inverses.is_steepest
        is_boxed = run.xp.isfinite(low).all(1) & run.xp.isfinite(high).all(1)
        lengths = choose(is_boxed & (run.failed == NONE), 1.0, first_steps(run.value, run.grad, run.norm))
        steepest = clamp(-cast(lengths, run.x)[:, None] * run.grad, low, high)
        directions = box_directions(inverses, run.grad, low, high, where & ~is_steepest)
        directions = choose(is_steepest[:, None], steepest, directions)
        steps = full(run.x, run.count, 1.0)
        return Searches(directions, steps, clip_above(max_feasible_steps(directions, low, high), run.largest_step))

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
