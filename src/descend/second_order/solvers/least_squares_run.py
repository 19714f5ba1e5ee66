"""One run of a least-squares solver: its limits, the best point so far and its reasons to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descend.second_order.mathematics import fit_rules
from descend.second_order.mathematics.gauss_newton import LinearModel
from descend.second_order.problem.residuals import ResidualObjective, ResidualPoint
from descend.second_order.solvers.budget import Budget
from descend.second_order.solvers.result import Iteration, Status

BLIND = 3  # iterations whose falls are within rounding, while the promised one does not become a quarter


class Fitted(NamedTuple):
    """A point at which the residuals and their linear model are known.

    Attributes:
        x: flat vector, never written to.
        value: the cost.
        grad: its flat gradient.
        norm: largest absolute entry of the (projected) gradient.
        tree: the residuals as the function returned them.
        model: around the point; None if the Jacobian is not finite.
    """

    x: Tensor
    value: float
    grad: Tensor
    norm: float
    tree: Any
    model: LinearModel | None


class LeastSquaresRun(Budget):
    """Counts, limits and the best point of one run.

    Args:
        objective: the residuals.
        tol: see ``stop_status``.
        max_iter: iterations at most.
        max_eval: evaluations of the residuals at most.
        callback: called after every iteration; stops if it returns True.
    """

    n_negative_curvature = 0

    def __init__(
        self,
        objective: ResidualObjective,
        *,
        tol: float,
        max_iter: float,
        max_eval: float,
        callback: Callable[[LeastSquaresRun, Fitted], bool] | None = None,
    ) -> None:
        self.objective, self.tol, self.max_iter, self.callback = objective, tol, max_iter, callback
        super().__init__(objective, max_eval)
        self.n_iter = self.n_blind = 0
        self.promised = math.inf
        self.is_stopped = False
        self.history: list[Iteration] = []

    def noise(self, point: ResidualPoint, model: LinearModel) -> float:
        """Rounding error of the cost."""
        return float(fit_rules.noise(point.value, model.rounding(point.x), self.objective.eps))

    def start(self, point: ResidualPoint, model: LinearModel | None) -> None:
        """Record the first point."""
        self.first_x = point.x
        self.best = self.fitted(point, model)
        self._record(self.best, 0.0)

    def fitted(self, point: ResidualPoint, model: LinearModel | None) -> Fitted:
        grad = torch.full_like(point.x, math.nan) if model is None else model.grad
        residual = grad
        if self.objective.lower is not None and self.objective.upper is not None:
            # x - clamp(x - grad), without rounding x - grad.
            residual = torch.clamp(grad, point.x - self.objective.upper, point.x - self.objective.lower)
        norm = float(residual.abs().amax()) if residual.numel() else 0.0
        return Fitted(point.x, point.value, grad, norm, point.tree, model)

    def advance(self, point: ResidualPoint, model: LinearModel, length: float) -> None:
        """Count an iteration that ended at ``point``."""
        self.n_iter += 1
        here = self.fitted(point, model)
        if here.value < self.best.value:
            self.best = here
        self._record(here, length)
        if self.callback is not None:
            self.is_stopped = self.callback(self, here)

    def stop_status(self, point: ResidualPoint, model: LinearModel) -> Status | None:
        """Why to stop at ``point``; None to go on.

        It has converged when the step to the model's minimizer promises to lower the cost by at most ``tol**2`` of it,
        or changes no variable by more than ``tol`` of it, or x by no more than rounding in the norm of the region.
        """
        if model.is_solved and is_within(self.tol, model, point, self.objective.eps):
            self.best = self.fitted(point, model)
            return Status.converged
        if self.is_stopped:
            return Status.stopped_by_callback
        if self.n_iter >= self.max_iter:
            return Status.max_iter
        if self.evaluations_left < 1:
            return Status.max_eval
        return self.stuck_status() if self._is_stuck(point, model) else None

    def stuck_status(self) -> Status:
        """Why to stop where no step lowers the cost by more than rounding."""
        best, model = self.best, self.best.model
        if model is None or best.value <= 0:
            return Status.precision_limit
        size = max(model.change(self.first_x), model.change(best.x))
        is_zero = fit_rules.is_rounding(best.value, size, self.objective.eps)
        return Status.converged if is_zero else Status.precision_limit

    def _is_stuck(self, point: ResidualPoint, model: LinearModel) -> bool:
        """Whether for ``BLIND`` iterations falls of the cost have been within rounding, and the promise as large."""
        promised = model.newton().decrease
        if fit_rules.is_progress(promised, self.noise(point, model), self.promised):
            self.promised, self.n_blind = promised, 0
        else:
            self.n_blind += 1
        return self.n_blind >= BLIND

    def _record(self, point: Fitted, length: float) -> None:
        counts = self.objective.n_eval, self.objective.n_hvp
        self.history.append(Iteration(point.value, point.norm, length, *counts))


def is_within(tol: float, model: LinearModel, point: ResidualPoint, eps: float) -> bool:
    """Whether the model's minimizer is within a tolerance; see ``LeastSquaresRun.stop_status``."""
    newton = model.newton()
    decrease = math.inf if has_underflowed(point) else newton.decrease
    if fit_rules.is_within(tol, eps, point.value, decrease, newton.norm, model.length(point.x)):
        return True
    return bool((newton.step.abs() <= tol * point.x.abs()).all())


def has_underflowed(point: ResidualPoint) -> bool:
    """Whether the cost is zero, though the residuals are not."""
    return point.value == 0 and bool(point.residuals.any())
