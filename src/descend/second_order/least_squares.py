"""Fit a model to data: minimize a sum of squared residuals, or of robust losses of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from descend.second_order.flat_problem import FlatProblem
from descend.second_order.mathematics.robust_losses import LOSSES, Rho
from descend.second_order.minimize import default_tolerance
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.residuals import FunctionResiduals, ParameterResiduals
from descend.second_order.solvers.dense_linearization import DenseLinearization
from descend.second_order.solvers.least_squares_descent import least_squares_descent
from descend.second_order.solvers.step_control import Damping, TrustRegion
from descend.second_order.solvers.least_squares_run import LeastSquaresRun
from descend.second_order.solvers.result import MESSAGES, Progress, Status, X, result_of

WHO = "least_squares"


def least_squares(
    residuals,
    x0,
    bounds=None,
    loss="linear",
    method="trust-region",
    tol=None,
    max_iter=None,
    max_eval=None,
    callback=None,
    *,
    loss_scale=1.0,
    jac=None,
):
    rho = LOSSES[loss]
    began = time.perf_counter()

    class P(FlatProblem):
        def objective_of_values(self, bounds, needs_curvature):
            return FunctionResiduals(
                f"{WHO}: residuals", self.fun, self.structure, jac=jac, rho=rho, loss_scale=loss_scale, bounds=bounds
            )

        def objective_of_parameters(self, parameters, bounds, needs_curvature):
            return ParameterResiduals(
                f"{WHO}: residuals",
                lambda: self.fun(self.tree),
                parameters,
                rho=rho,
                loss_scale=loss_scale,
                bounds=bounds,
            )

    with torch.no_grad():
        problem = P(WHO, residuals, x0, bounds, jac, None, False)
        run = LeastSquaresRun(
            problem.objective,
            tol=1e-8 if tol is None else tol,
            max_iter=max_iter or 10000,
            max_eval=max_eval or math.inf,
        )
        status = least_squares_descent(
            run,
            problem.start,
            DenseLinearization(problem.objective),
            TrustRegion() if method == "trust-region" else Damping(),
        )
    return result_of(run, status, MESSAGES[status], problem.tree_of(run.best.x), problem.split_tree, began=began)
