"""SciPy's solvers on a model's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from descend.compare.handoff import End, Iterate, Report
from descend.compare.problem import Problem
from descend.compare.tasks.task import Batch, Loss

Vector = NDArray[np.float64]

# The same tolerance for all, of the largest entry of the gradient; Newton-CG knows only one of the step's mean entry.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "cg": {"gtol": 1e-7},
    "bfgs": {"gtol": 1e-7},
    "l-bfgs-b": {"gtol": 1e-7, "ftol": 0.0},
    "newton-cg": {"xtol": 1e-8},
    "trust-ncg": {"gtol": 1e-7},
    "trust-krylov": {"gtol": 1e-7},
}
USE_HESSIAN = ("newton-cg", "trust-ncg", "trust-krylov")


class Objective:
    """A loss as SciPy sees it: a function of one float64 vector, with its gradient and products with its Hessian.

    Attributes:
        evaluations: gradients and products so far.
        values: losses by point, as bytes, of the points evaluated since it was last emptied.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, needs_curvature: bool) -> None:
        self.evaluations = 0
        self.values: dict[bytes, float] = {}
        self._model, self._loss, self._batch, self._needs_curvature = model, loss, batch, needs_curvature
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._x = self._at = b""  # where the parameters and the graph are
        self._graph = torch.empty(0)

    def start(self) -> Vector:
        return _array(torch.cat([param.reshape(-1) for param in self._params]))

    def move_to(self, x: Vector) -> None:
        """Set the parameters to ``x``, unless they are there: writing to them would make the graph unusable."""
        if self._x == x.tobytes():
            return
        self._x = x.tobytes()
        with torch.no_grad():
            parts = torch.split(torch.tensor(x), [param.numel() for param in self._params])
            for param, part in zip(self._params, parts, strict=True):
                param.copy_(part.view_as(param))

    def value_and_grad(self, x: Vector) -> tuple[float, Vector]:
        self.move_to(x)
        loss = self._loss(self._model, self._batch)
        grads = torch.autograd.grad(loss, self._params, create_graph=self._needs_curvature)
        self._graph, self._at = torch.cat([grad.reshape(-1) for grad in grads]), x.tobytes()
        self.evaluations += 1
        self.values[self._at] = loss.item()
        return loss.item(), _array(self._graph)

    def product(self, x: Vector, vector: Vector) -> Vector:
        """Return the Hessian at ``x`` times ``vector``."""
        if self._at != x.tobytes():  # a trial that was rejected has been evaluated since
            self.value_and_grad(x)
        direction = torch.tensor(vector, dtype=self._graph.dtype)
        products = torch.autograd.grad(self._graph, self._params, direction, retain_graph=True)
        self.evaluations += 1
        return _array(torch.cat([product.reshape(-1) for product in products]))


def _array(vector: Tensor) -> Vector:
    # A copy: SciPy writes to what it gets.
    return np.array(vector.detach().numpy(), dtype=np.float64)


class SciPy:
    """``scipy.optimize.minimize``."""

    name = "scipy.optimize.minimize"
    methods: Collection[str] = tuple(METHODS)

    def check(self, method: str, options: Mapping[str, Any], problem: Problem) -> None:
        from scipy.optimize import minimize

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # how SciPy says that it does not know an option
            minimize(
                lambda x: (float(x @ x), 2 * x),
                np.ones(1),
                method=method,
                jac=True,
                hessp=(lambda _, vector: 2 * vector) if method in USE_HESSIAN else None,
                options={**METHODS[method], **options},
            )

    def solve(
        self, method: str, options: Mapping[str, Any], model: nn.Module, loss: Loss, batch: Batch, report: Report
    ) -> End:
        from scipy.optimize import minimize

        objective = Objective(model, loss, batch, needs_curvature=method in USE_HESSIAN)

        def callback(x: Vector) -> None:
            value = objective.values.get(x.tobytes())
            objective.values = {}
            objective.move_to(x)
            if value is None:
                with torch.no_grad():
                    value = loss(model, batch).item()
            report(Iterate(value, objective.evaluations))
            objective.values[x.tobytes()] = value  # where a rejected step ends

        found = minimize(
            objective.value_and_grad,
            objective.start(),
            method=method,
            jac=True,
            hessp=objective.product if method in USE_HESSIAN else None,
            callback=callback,
            options={**METHODS[method], **options},
        )
        objective.move_to(found.x)
        return End(str(found.message), objective.evaluations)
