"""What a minimization with constraints returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.augmented_lagrangian import largest, violations
from descend.second_order.problem.constrained_functions import Values
from descend.second_order.problem.constrained_objective import ConstrainedObjective
from descend.second_order.solvers.augmented_lagrangian import AugmentedLagrangian
from descend.second_order.solvers.result import MESSAGES, Result, Status, X

CONVERGED = (
    "The conditions of a constrained minimum hold: gradient of the Lagrangian, violations and complementarity are "
    "within tol."
)


@dataclass(frozen=True, repr=False, eq=False)
class ConstrainedResult(Result[X]):
    """What ``minimize`` returns with ``constraints``.

    ``x`` is the lowest point evaluated that is feasible to ``tol``, or the least infeasible one if none is. ``grad`` is
    the gradient of the Lagrangian there, that of ``fun`` minus the sum of ``multipliers`` times the constraints'; at an
    active bound it is the bound's own multiplier. ``grad_norm``, also in ``history``, and what ``callback`` gets are of
    the Lagrangian, too. ``success`` says that the conditions of Karush, Kuhn and Tucker hold to ``tol``.

    Attributes:
        multipliers: one tensor for each constraint, of its shape. Each entry is the derivative of the optimal ``fun``
            with respect to the right-hand side of the constraint: positive where it costs something to raise the 0 in
            ``fun(x) == 0`` or ``fun(x) >= 0``, and never negative for ``ineq`` at a solution.
        infeasibility: largest violation of a constraint at ``x``, each one divided by the largest entry of its gradient
            at ``x0`` if that exceeds 1.
        n_outer: subproblems that were minimized.
    """

    multipliers: list[Tensor] = field(default_factory=list)
    infeasibility: float = 0.0
    n_outer: int = 0

    def __repr__(self) -> str:
        return f"Constrained{super().__repr__()[:-1]}, infeasibility={self.infeasibility:.3g}, n_outer={self.n_outer})"


def constrained_result(
    solver: AugmentedLagrangian, status: Status, x: X, unflatten: Callable[[Tensor], Any], *, began: float
) -> ConstrainedResult[X]:
    """The result of a run.

    Args:
        solver: the run.
        status: why it stopped.
        x: the best point as the caller gets it.
        unflatten: maps the flat gradient to its structure.
        began: ``time.perf_counter()`` at the start.
    """
    objective, (point, multipliers) = solver.objective, solver.candidate
    values, scale = solver.candidate.values, objective.fun_scale
    grad = point.grad / scale
    unscaled = multipliers * objective.scales / scale
    sizes = [shape.numel() for shape in objective.functions.shapes]
    parts = zip(torch.split(unscaled, sizes), objective.functions.shapes, strict=True)
    return ConstrainedResult(
        x=x,
        fun=values.value,
        grad=unflatten(grad),
        status=status,
        message=_message(objective, status, values),
        grad_norm=largest(objective.projected(point.x, grad)),
        n_iter=solver.n_iter,
        n_eval=solver.n_eval,
        n_hvp=solver.n_hvp,
        time=time.perf_counter() - began,
        history=solver.history,
        n_negative_curvature=solver.n_negative_curvature,
        multipliers=[part.reshape(shape) for part, shape in parts],
        infeasibility=values.violation,
        n_outer=solver.n_outer,
    )


def _message(objective: ConstrainedObjective, status: Status, values: Values) -> str:
    message = CONVERGED if status is Status.converged else MESSAGES[status]
    if not values.violation > objective.feasible:
        return message
    sizes = violations(objective.scaled(values), objective.equal).abs()
    place = int(sizes.argmax())
    size = float(sizes[place] / objective.scales[place])
    where = objective.functions.name_of(place)
    return f"{message} No evaluated point is feasible: {where} is violated by {size:.3g}."
