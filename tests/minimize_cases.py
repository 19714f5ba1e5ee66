"""Functions to minimize, all solvers, and the checks of every result, for the tests of `minimize`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descend import Result, Status

METHODS = ("gd", "bfgs", "ss-bfgs", "ss-broyden", "l-bfgs", "newton-cg", "newton")
# Bounds select another solver; these are too far away to matter.
SOLVERS = {**{method: dict(method=method) for method in METHODS}, "l-bfgs-b": dict(bounds=(-1e300, math.inf))}
QUICK = [name for name in SOLVERS if name != "gd"]  # solvers that need few evaluations for every function here
each_solver = pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """With small problems threads only wait for each other. ``conftest.py`` restores their number."""
    torch.set_num_threads(1)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bowl(x: Tensor) -> Tensor:
    return ((x - 1) ** 2).sum()


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quartic(x: Tensor) -> Tensor:
    return ((x - 1) ** 4).sum() + (x[0] * x[-1] - 1) ** 2


def waves(x: Tensor) -> Tensor:
    """Many local minima and maxima."""
    return torch.sin(3 * x).sum() + 0.02 * (x - 1).square().sum()


def trap(x: Tensor) -> Tensor:
    """A line search evaluates a deep, narrow minimum on its way to a shallow one behind it."""
    return ((2 * x - 1) ** 4).sum() / 100 + torch.cos(5 * x).sum()


def logarithms(x: Tensor) -> Tensor:
    """NaN if any x <= 0, and steep close to 0."""
    return (x - 0.01 * x.log()).sum() + x.square().sum()


def falls_to_infinity(x: Tensor) -> Tensor:
    """Decreasing up to 2 and infinite beyond."""
    return torch.where(x < 2, -x, torch.inf).sum() + 0.1 * (x**2).sum()


def distance(tree: Any) -> Tensor:
    """Return the squared distance of all leaves from 1, or from 1 + 2i if they are complex."""
    total: Any = 0.0
    for leaf in pytree.tree_leaves(tree):
        center = 1 + 2j if leaf.is_complex() else 1
        total = total + (leaf - center).abs().double().square().sum()
    return total


class Setting(NamedTuple):
    fun: Callable[[Tensor], Tensor]
    x0: Tensor

    def __str__(self) -> str:
        return f"{self.fun.__name__}-{len(self.x0)}"


SETTINGS = [
    Setting(bowl, vector(3.0, -2.0)),
    Setting(rosenbrock, vector(-1.2, 1.0)),
    Setting(rosenbrock, vector(-1.0, 2.0, 1.0, 0.5)),
    Setting(quartic, vector(3.0, -1.0, 0.5)),
    Setting(waves, vector(0.3, -2.0, 4.0)),
    Setting(logarithms, vector(2.0, 0.3)),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


class Recorder:
    """A function that records the point, value and finiteness of each call."""

    def __init__(self, fun: Callable[[Tensor], Tensor]) -> None:
        self.fun = fun
        self.points: list[Tensor] = []
        self.values: list[float] = []
        self.is_finite: list[bool] = []  # value and gradient

    def __call__(self, x: Tensor) -> Tensor:
        value = self.fun(x)
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        self.points.append(x.detach().clone())
        self.values.append(value.item())
        self.is_finite.append(math.isfinite(value.item()) and bool(grad.isfinite().all()))
        return value

    @property
    def least(self) -> float:
        return min(value for value, is_finite in zip(self.values, self.is_finite, strict=True) if is_finite)


def slope(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fun(leaf), leaf)[0]


def projected_grad_norm(fun: Callable[[Tensor], Tensor], x: Tensor, bounds: Any = None) -> float:
    """Return the largest absolute entry of the gradient, projected on the bounds if there are any."""
    grad = slope(fun, x)
    if bounds is not None:  # x - clamp(x - grad), without the rounding of x - grad
        grad = grad.clamp(x - bounds[1], x - bounds[0])
    return grad.abs().max().item()


def assert_result_is_true(result: Result, recorder: Recorder, x0: Tensor, tol: float, bounds: Any = None) -> None:
    """Assert that each field of a result is true, by computing it again and comparing it with every evaluation."""
    fun = recorder.fun
    assert result.n_eval == len(recorder.values)
    assert len(result.history) == result.n_iter + 1
    assert all(map(torch.isfinite, result.x.flatten()))
    assert result.fun == fun(result.x).item()
    assert result.fun <= recorder.least + 1e-14 * abs(result.fun)
    assert torch.equal(result.grad, slope(fun, result.x))
    start = x0 if bounds is None else x0.clamp(*bounds)
    reached = projected_grad_norm(fun, result.x, bounds)
    assert result.grad_norm == pytest.approx(reached, rel=1e-12)
    is_small = reached <= tol * max(1.0, projected_grad_norm(fun, start, bounds)) * (1 + 1e-12)
    assert result.success == (result.status is Status.converged)
    assert not result.success or is_small
    assert result.status == str(result.status)
    assert math.isfinite(result.fun)
    assert any(word in result.message for word in ("limit", "gradient", "function", "callback"))


def assert_evaluated_within_bounds(recorder: Recorder, lower: Any, upper: Any) -> None:
    """Assert that no evaluated point is outside the bounds."""
    for x in recorder.points:
        assert bool(((x >= lower) & (x <= upper)).all())


def assert_same_structure(ours: Any, theirs: Any) -> None:
    """Assert that two trees have the same structure, and leaves of the same shapes, dtypes and devices."""
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def for_scipy(fun: Callable[[Tensor], Tensor]) -> Callable[[Any], tuple[float, Any]]:
    """Return the function for SciPy: it takes an array and returns value and gradient."""

    def value_and_slope(x: Any) -> tuple[float, Any]:
        point = torch.as_tensor(x)
        return fun(point).item(), slope(fun, point).numpy()

    return value_and_slope
