"""Line-search methods for many problems: BFGS, L-BFGS and L-BFGS-B."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from descend.second_order.mathematics.arrays import clip_above, full
from descend.second_order.mathematics.batched_directions import Learner, ManyDirections
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_box import BoxedModels
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


def batched_bounded_descent(run: BatchedSearches, models: BoxedModels) -> None:
    """Minimize inside the bounds until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
        models: learn from every step.
    """

    @np.errstate(all="ignore")
    def propose(where: Array) -> Searches:
        lower, upper, is_steepest = run.objective.lower, run.objective.upper, models.is_steepest
        lengths = full(run.x, run.count, 1.0)
        if bool(is_steepest.any()):
            is_boxed = run.xp.isfinite(lower).all(1) & run.xp.isfinite(upper).all(1)
            is_one = is_boxed & (run.failed == NONE)
            lengths = run.xp.where(is_one, lengths, first_steps(run.value, run.grad, run.norm))
        directions, longest = models.directions(where, run.x, run.grad, lower, upper, lengths)
        return Searches(directions, full(run.x, run.count, 1.0), clip_above(longest, run.largest_step))

    repeat_searches(run, models, propose)


def repeat_searches(run: BatchedSearches, learner: Learner, propose: Callable[[Array], Searches]) -> None:
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
