"""Linear models of residuals with dense Jacobians, and what they have in common from one point to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from descend.second_order.mathematics.fit_rules import uses_curvature
from descend.second_order.mathematics.gauss_newton import DenseGaussNewton
from descend.second_order.mathematics.secant_curvature import secant_update
from descend.second_order.mathematics.spectrum import column_norms, first_scale
from descend.second_order.problem.residuals import ResidualObjective, ResidualPoint


class _Last(NamedTuple):
    """The point of the last model."""

    point: ResidualPoint
    model: DenseGaussNewton


class DenseLinearization:
    """Models with dense Jacobians, a scale of the variables that only grows, and learned curvature.

    D begins as ``first_scale``, then holds the largest norm that each column of the Jacobian has had: Moré 1978,
    section 6. So steps do not depend on the units of the variables.

    Where residuals stay large, Gauss-Newton is slow: it leaves out the sum of each residual times its Hessian. That
    sum, S, is learned from the gradients, and used while it predicts the cost better: Dennis, Gay & Welsch 1981.

    Args:
        objective: gives the Jacobians.
        norms: D of a run before; None without one.
    Attributes:
        norms: D, zero for columns that have always been zero; None before the first model.
    """

    def __init__(self, objective: ResidualObjective, norms: Tensor | None = None) -> None:
        self.objective, self.norms = objective, norms
        self._curvature: Tensor | None = None  # None before there is anything to learn from
        self._is_curved = False
        self._last: _Last | None = None

    def model(self, point: ResidualPoint) -> DenseGaussNewton | None:
        """The model around a point; None if the Jacobian is not finite there."""
        objective = self.objective
        residuals, factors = objective.rows_of(point)
        jacobian = objective.jacobian(point)
        if factors is not None:
            jacobian = jacobian * factors.unsqueeze(1)
        norms = column_norms(jacobian)
        if not bool(norms.isfinite().all()):
            return None
        self.norms = first_scale(norms, point.x) if self.norms is None else torch.maximum(self.norms, norms)
        self._learn(point, jacobian, residuals)
        low = None if objective.lower is None else objective.lower - point.x
        high = None if objective.upper is None else objective.upper - point.x
        model = DenseGaussNewton(
            jacobian,
            residuals,
            torch.where(self.norms > 0, self.norms, 1.0),
            factors=factors,
            curvature=self._curvature if self._is_curved else None,
            low=low,
            high=high,
        )
        self._last = _Last(point, model)
        return model

    def _learn(self, point: ResidualPoint, jacobian: Tensor, residuals: Tensor) -> None:
        """Learn S from the way here, and which of the two models has predicted it better."""
        if self._last is None:
            return
        before = self._last.model
        step = point.x - self._last.point.x
        along = before.jacobian.mv(step)
        grad = jacobian.T.mv(residuals)
        if self._curvature is None:
            self._curvature = torch.zeros(len(step), len(step), dtype=torch.float64)
        fall = self._last.point.value - point.value
        straight = -float(before.grad.dot(step) + 0.5 * along.dot(along))
        double = step.double().cpu()
        missing = 0.5 * float(double.dot(self._curvature.mv(double)))
        self._is_curved = uses_curvature(self._is_curved, missing, straight, fall)
        change = grad - before.grad
        if self.objective.rho is None:
            structured = grad - before.jacobian.T.mv(residuals)
        else:  # the rows have been weighted differently
            structured = change - jacobian.T.mv(jacobian.mv(step))
        self._curvature = secant_update(self._curvature, double, change.double().cpu(), structured.double().cpu())
