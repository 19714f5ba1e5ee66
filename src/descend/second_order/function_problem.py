"""The problem of ``minimize``: a function of values or of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from descend.second_order.flat_problem import FlatProblem
from descend.second_order.problem.domain import DomainErrors
from descend.second_order.problem.objective import FunctionObjective
from descend.second_order.problem.parameter_objective import ParameterObjective
from descend.second_order.solvers.result import X


class FunctionProblem(FlatProblem[X]):
    """A function, a start and bounds, as an objective of a flat vector.

    Args:
        who: the caller's name, for errors.
        fun, x0, bounds, jac, hvp: as ``minimize`` takes them.
        needs_curvature: whether second derivatives will be asked for.
        domain_errors: exceptions that mean that a point is outside the domain of ``fun``.
    """

    objective: FunctionObjective | ParameterObjective

    def __init__(
        self,
        who: str,
        fun: Callable[[X], Any],
        x0: Any,
        bounds: Any,
        jac: Callable[[X], Any] | bool | None = None,
        hvp: Callable[[X, X], Any] | None = None,
        needs_curvature: bool = False,
        domain_errors: DomainErrors = (),
    ) -> None:
        self.fun, self.jac, self.hvp, self.needs_curvature = fun, jac, hvp, needs_curvature
        derivatives = "" if jac is None and hvp is None else "jac and hvp"
        super().__init__(who, x0, bounds, derivatives, domain_errors)

    def new_objective(self, bounds: tuple[Tensor, Tensor] | None) -> FunctionObjective | ParameterObjective:
        if self.parameters is None:
            return FunctionObjective(
                self.who,
                self.fun,
                self.structure,
                jac=self.jac,
                hvp=self.hvp,
                needs_curvature=self.needs_curvature,
                bounds=bounds,
            )
        return ParameterObjective(
            f"{self.who}: fun",
            lambda: self.fun(self.tree),
            self.parameters,
            needs_curvature=self.needs_curvature,
            bounds=bounds,
        )
