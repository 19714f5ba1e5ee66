"""Line-search methods for many problems: BFGS and L-BFGS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from descend.second_order.mathematics.arrays import full, tensor_of
from descend.second_order.mathematics.batched_directions import ManyDirections
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_run import BatchedRun, Searches, first_steps
from descend.second_order.solvers.run import MAX_STEP


def batched_descent(run: BatchedRun, directions: ManyDirections) -> None:
    """Minimize along directions until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
        directions: gives the directions; learns from every step.
    """
    dtype = tensor_of(run.x).dtype

    @np.errstate(all="ignore")
    def propose(where: Array) -> Searches:
        steps = first_steps(run.value, run.grad, run.norm)
        steps = run.xp.where(directions.is_steepest, steps, 1.0)
        return Searches(directions.directions(run.grad), steps, full(run.x, run.count, MAX_STEP[dtype]))

    repeat_searches(run, directions, propose)


def repeat_searches(run: BatchedRun, learner: ManyDirections, propose: Callable[[Array], Searches]) -> None:
    """Make round after round until every problem has a reason to stop.

    Args:
        run: started; its ends are the results.
        learner: is shown every step.
        propose: gives the next searches; its argument says where one is needed, (K,).
    """
    where = run.stop_at_start(learner)
    while run.count:
        run.begin(where, propose(where))
        x = run.along()
        where = run.take_trials(x, *run.objective.evaluate(x), learner)
