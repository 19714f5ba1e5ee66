"""Residuals to fit, and the checks of every result, for the tests of `least_squares`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from descend import LeastSquaresResult, Status

Residuals = Callable[[Tensor], Tensor]
METHODS = ("trust-region", "lm")
each_method = pytest.mark.parametrize("method", METHODS)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def freudenstein_roth(x: Tensor) -> Tensor:
    """A local minimum at 48.98 / 2, where Gauss-Newton's full steps move away."""
    return torch.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def brown_dennis(x: Tensor) -> Tensor:
    t = torch.arange(1, 21, dtype=x.dtype) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


def powell_singular(x: Tensor) -> Tensor:
    """The Jacobian at the solution has rank 2 of 4."""
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def linear(x: Tensor) -> Tensor:
    matrix = torch.tensor(np.random.default_rng(0).normal(size=(9, len(x)))).to(x)
    return matrix @ x - torch.arange(9.0).to(x)


def decay(x: Tensor) -> Tensor:
    """An exponential through noisy data with three outliers."""
    generator = np.random.default_rng(1)
    t = torch.linspace(0, 4, 30, dtype=x.dtype)
    y = 3 * torch.exp(-0.7 * t) + 0.02 * torch.tensor(generator.normal(size=30)).to(x)
    y[[4, 11, 20]] += torch.tensor([2.0, -1.0, 3.0]).to(x)
    return x[0] * torch.exp(-x[1] * t) - y


class Setting(NamedTuple):
    fun: Residuals
    x0: Tensor

    def __str__(self) -> str:
        return f"{self.fun.__name__}-{len(self.x0)}"


SETTINGS = [
    Setting(rosenbrock, vector(-1.2, 1.0)),
    Setting(rosenbrock, vector(-1.0, 2.0, 1.0, 0.5)),
    Setting(freudenstein_roth, vector(0.5, -2.0)),
    Setting(brown_dennis, vector(25.0, 5.0, -5.0, -1.0)),
    Setting(powell_singular, vector(3.0, -1.0, 0.0, 1.0)),
    Setting(linear, vector(0.0, 0.0, 0.0)),
    Setting(decay, vector(1.0, 1.0)),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """With small problems threads only wait for each other. ``conftest.py`` restores their number."""
    torch.set_num_threads(1)


class Recorder:
    """Residuals that record each point, and the cost there."""

    def __init__(self, fun: Residuals) -> None:
        self.fun = fun
        self.points: list[Tensor] = []
        self.costs: list[float] = []

    def __call__(self, x: Tensor) -> Tensor:
        residuals = self.fun(x)
        self.points.append(x.detach().clone())
        self.costs.append(cost(residuals))
        return residuals

    @property
    def least(self) -> float:
        return min(value for value in self.costs if math.isfinite(value))


def cost(residuals: Tensor) -> float:
    return 0.5 * residuals.detach().square().sum().item()


def jacobian(fun: Residuals, x: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(fun, x)
    return found


def assert_fit_is_true(result: LeastSquaresResult[Any], recorder: Recorder) -> None:
    """Assert that each field of a result is true, by computing it again and comparing it with every evaluation."""
    fun = recorder.fun
    assert result.n_eval == len(recorder.points)
    assert len(result.history) == result.n_iter + 1
    assert result.n_iter + 1 <= result.n_jac <= result.n_eval
    assert bool(result.x.isfinite().all())
    assert result.fun == pytest.approx(cost(fun(result.x)), rel=1e-14)
    assert result.fun <= recorder.least * (1 + 1e-13)
    assert torch.equal(result.residuals, fun(result.x))
    true = jacobian(fun, result.x)
    torch.testing.assert_close(result.jac, true, rtol=1e-10, atol=1e-12 * float(true.abs().max()))
    torch.testing.assert_close(result.grad, true.T @ result.residuals, rtol=1e-7, atol=1e-9 * (1 + result.fun))
    assert result.success == (result.status is Status.converged)
    costs = [entry.fun for entry in result.history]
    pairs = itertools.pairwise(costs)
    assert all(after <= before * (1 + 1e-10) + 1e-30 * costs[0] for before, after in pairs)
