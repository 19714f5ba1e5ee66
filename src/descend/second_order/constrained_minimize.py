"""The part of ``minimize`` that has constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from descend.second_order.constraints import Constraint
from descend.second_order.flat_problem import FlatProblem
from descend.second_order.problem.constrained_functions import ConstraintFunction
from descend.second_order.problem.constrained_objective import ConstrainedObjective
from descend.second_order.solvers.augmented_lagrangian import AugmentedLagrangian, Descend, Limits
from descend.second_order.solvers.constrained_result import ConstrainedResult, constrained_result
from descend.second_order.solvers.result import X


def constraint_functions(constraints: Any, jac: Any, hvp: Any, who: str) -> list[ConstraintFunction]:
    """The constraints as an objective takes them.

    Raises:
        TypeError, ValueError: if they are not made by ``eq`` and ``ineq``, or derivatives are given beside them.
    """
    if isinstance(constraints, Constraint):
        constraints = [constraints]
    if not isinstance(constraints, Sequence) or not all(isinstance(one, Constraint) for one in constraints):
        raise TypeError(f"{who}: constraints must be a list of eq(function) and ineq(function), got {constraints!r}.")
    if constraints and (jac is not None or hvp is not None):
        raise ValueError(f"{who}: jac and hvp are for problems without constraints. Leave them out: autograd is used.")
    return [
        ConstraintFunction(one.fun, one.is_equality, f"constraints[{place}]") for place, one in enumerate(constraints)
    ]


def minimize_constrained(
    problem: FlatProblem[X], new_descent: Callable[[], Descend], limits: Limits, *, began: float
) -> ConstrainedResult[X]:
    """Minimize a problem that has constraints.

    Args:
        problem: made with constraints.
        new_descent: makes what minimizes a function without constraints from a point.
        limits: what ends the run.
        began: ``time.perf_counter()`` at the start.
    """
    objective = problem.objective
    assert isinstance(objective, ConstrainedObjective)
    objective.feasible = limits.tol
    run = AugmentedLagrangian(objective, new_descent, limits)
    try:
        status = run.run(problem.start)
    finally:
        problem.set_parameters(run)
    return constrained_result(run, status, problem.tree_of(run.best.x), problem.split_tree, began=began)
