"""scikit-learn's solvers for logistic regression."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from descend.compare.handoff import End, Iterate, Report
from descend.compare.problem import Problem
from descend.compare.tasks.task import Batch, Loss

DEFAULTS = {"tol": 1e-7, "max_iter": 10_000}
TASK = "regression"


class ScikitLearn:
    """``sklearn.linear_model.LogisticRegression`` with the objective of the task ``regression``.

    scikit-learn reports no iterations, so what it evaluates is watched: each point whose gradient it asks for is an
    iteration. Its losses are of trial points too, and may rise. A dense Hessian counts as one product per weight, as
    in ``descend.Result``.
    """

    name = "sklearn.linear_model.LogisticRegression"
    methods: Collection[str] = ("lbfgs", "newton-cg", "newton-cholesky")

    def check(self, method: str, options: Mapping[str, Any], problem: Problem) -> None:
        from sklearn.linear_model import LogisticRegression

        if problem.task.name != TASK:
            raise ValueError(f"scikit-learn's solvers fit logistic regression, which is the task {TASK} alone.")
        others = options.keys() - DEFAULTS.keys()
        if others:
            allowed = " and ".join(DEFAULTS)
            raise ValueError(f"only {allowed} can be given, got {', '.join(sorted(others))}; the rest is the task's.")
        LogisticRegression(solver=method, **options).fit([[0.0], [1.0]], [0, 1])

    def solve(
        self, method: str, options: Mapping[str, Any], model: nn.Module, loss: Loss, batch: Batch, report: Report
    ) -> End:
        from sklearn.linear_model import LogisticRegression

        from descend.compare.tasks.regression import L2

        inputs, targets = (part.numpy() for part in batch)
        regression = LogisticRegression(solver=method, C=1 / (L2 * len(targets)), **{**DEFAULTS, **options})
        watch = Watch(model, report)
        with watch.watching(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            regression.fit(inputs, targets)
        _set(model, regression.coef_, regression.intercept_)
        told = [" ".join(str(warning.message).split()) for warning in caught]
        return End("; ".join(told) or f"Converged after {regression.n_iter_[0]} iterations.", watch.evaluations)


class Watch:
    """Counts what scikit-learn's loss evaluates, and reports each new point with a gradient.

    Attributes:
        evaluations: points at which the loss or its gradient was evaluated, and products with the Hessian.
    """

    def __init__(self, model: nn.Module, report: Report) -> None:
        self.evaluations = 0
        self._model, self._report = model, report
        self._at = self._reported = b""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the methods of scikit-learn's ``LinearModelLoss`` are counted."""
        from sklearn.linear_model._linear_loss import LinearModelLoss

        names = ("loss", "gradient", "loss_gradient", "gradient_hessian", "gradient_hessian_product")
        originals = {name: getattr(LinearModelLoss, name) for name in names}
        for name, original in originals.items():
            setattr(LinearModelLoss, name, self._counted(name, original, originals["loss"]))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(LinearModelLoss, name, original)

    def _counted(self, name: str, original: Callable[..., Any], loss: Callable[..., float]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(linear: Any, coef: NDArray[np.float64], X: Any, y: Any, *args: Any, **options: Any) -> Any:
            found = original(linear, coef, X, y, *args, **options)
            point = coef.tobytes()
            self.evaluations += point != self._at
            self._at = point
            if name == "gradient_hessian":
                self.evaluations += coef.size
            if name == "gradient_hessian_product":
                found = found[0], self._counting(found[1])
            if name != "loss" and point != self._reported:
                if self._reported:
                    weight, intercept = linear.weight_intercept(coef)
                    _set(self._model, weight, intercept)
                    given = {
                        key: value for key, value in options.items() if key in ("sample_weight", "l2_reg_strength")
                    }
                    self._report(Iterate(loss(linear, coef, X, y, *args[:2], **given), self.evaluations))
                self._reported = point
            return found

        return method

    def _counting(self, product: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted(vector: Any) -> Any:
            self.evaluations += 1
            return product(vector)

        return counted


def _set(model: nn.Module, weight: NDArray[np.float64], intercept: NDArray[np.float64]) -> None:
    with torch.no_grad():
        model.get_parameter("weight").copy_(torch.tensor(weight))
        model.get_parameter("bias").copy_(torch.tensor(intercept))
