"""The part of ``minimize`` that has constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.second_order.constraints import Constraint
from descend.second_order.flat_problem import FlatProblem
from descend.second_order.problem.constrained_functions import ConstrainedFunctions, ConstraintFunction
from descend.second_order.problem.constrained_objective import ConstrainedObjective
from descend.second_order.problem.domain import DomainErrors
from descend.second_order.solvers.augmented_lagrangian import AugmentedLagrangian
from descend.second_order.solvers.budget import Limits
from descend.second_order.solvers.constrained_implicit_function import differentiable_constrained_solution
from descend.second_order.solvers.constrained_result import ConstrainedResult, constrained_result
from descend.second_order.solvers.result import X
from descend.second_order.solvers.run import Descend


def constraint_functions(constraints: Any, who: str, **others: Any) -> list[ConstraintFunction]:
    """The constraints as an objective takes them.

    Args:
        constraints: the argument of ``minimize``.
        who: the caller's name, for errors.
        others: arguments that are None unless they were given, and that do not go with constraints.
    Raises:
        TypeError, ValueError: if they are not made by ``eq`` and ``ineq``, or one of the others was given.
    """
    if isinstance(constraints, Constraint):
        constraints = [constraints]
    if not isinstance(constraints, Sequence) or not all(isinstance(one, Constraint) for one in constraints):
        raise TypeError(f"{who}: constraints must be a list of eq(function) and ineq(function), got {constraints!r}.")
    given = [name for name, value in others.items() if value is not None]
    if constraints and given:
        raise ValueError(f"{who}: {given[0]} is for problems without constraints. Leave one of them out.")
    return [
        ConstraintFunction(one.fun, one.is_equality, f"constraints[{place}]") for place, one in enumerate(constraints)
    ]


class ConstrainedProblem(FlatProblem[X]):
    """A function with constraints, a start and bounds, as an objective of a flat vector.

    Args:
        who: the caller's name, for errors.
        fun, x0, bounds: as ``minimize`` takes them.
        constraints: functions of the same argument.
        domain_errors: exceptions that mean that a point is outside the domain of ``fun`` or a constraint.
    """

    objective: ConstrainedObjective

    def __init__(
        self,
        who: str,
        fun: Callable[[X], Any],
        x0: Any,
        bounds: Any,
        constraints: Sequence[ConstraintFunction],
        domain_errors: DomainErrors = (),
    ) -> None:
        self.fun, self.constraints = fun, constraints
        super().__init__(who, x0, bounds, domain_errors=domain_errors)

    def new_objective(self, bounds: tuple[Tensor, Tensor] | None) -> ConstrainedObjective:
        if self.is_sharded:
            raise ValueError(f"{self.who}: constraints need all variables in one process, but x0 has DTensors.")
        functions = ConstrainedFunctions(
            self.who, self.fun, self.constraints, self.structure, self.parameters, self.tree
        )
        return ConstrainedObjective(functions, bounds)

    @property
    def holder(self) -> ConstrainedFunctions:
        return self.objective.functions


def minimize_constrained(
    problem: ConstrainedProblem[X],
    new_descent: Callable[[], Descend],
    limits: Limits,
    *,
    began: float,
    ends: Sequence[Tensor | None] | None = None,
    records_graph: bool = False,
) -> ConstrainedResult[X]:
    """Minimize a problem that has constraints.

    Args:
        problem: the problem.
        new_descent: makes a descent, which minimizes a function without constraints from a point.
        limits: those of the run.
        began: ``time.perf_counter()`` at the start.
        ends: for a result that can be differentiated, flat bounds with their graphs, or ().
        records_graph: whether autograd recorded where ``minimize`` was called.
    """
    objective = problem.objective
    run = AugmentedLagrangian(objective, new_descent, limits)
    try:
        status = run.run(problem.start)
    finally:
        problem.set_parameters(run)
    x = run.best.x
    with torch.set_grad_enabled(records_graph):
        if ends is not None:
            x = differentiable_constrained_solution(objective, run.candidate, status, *ends)
        return constrained_result(run, status, problem.tree_of(x), problem.split_tree, began=began)
