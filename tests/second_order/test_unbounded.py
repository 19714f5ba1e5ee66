"""Functions that fall without end are called so; functions with a finite limit, walls and deep minima are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import one_in
from minimize_cases import SOLVERS, Recorder, assert_result_is_true, each_solver, one_thread, vector  # noqa: F401
from torch import Tensor

import descend
from descend import Status, minimize

FLOATS = (torch.float32, torch.float64)
MATRIX = vector(2.0, 1.0, 0.0, 1.0, -1.0, 3.0, 0.0, 3.0, 1.0).reshape(3, 3)
START = (1.0, 2.0, 0.7)

FALLING: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x.sum(),
    "parabola": lambda x: -x.square().sum(),
    "exponential": lambda x: -x.exp().sum(),
    "cubic": lambda x: (x**2 - x**3).sum(),
    "saddle": lambda x: x[0] ** 2 - 2 * x[1] ** 2 + x[2] ** 2 + x[1],
    "matrix": lambda x: x @ (MATRIX.to(x) @ x) / 2,
    "quartic": lambda x: x[0] ** 2 + x[1] ** 2 - x[2] ** 4,
}
LEVELLING: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": lambda x: (-x).exp().sum(),
    "arctangent": lambda x: -x.atan().sum(),
    "reciprocal": lambda x: (1 / x).sum(),
    "sigmoid": lambda x: -x.sigmoid().sum(),
}
NO_BOUNDS = (None, None)


def without_bounds(options: dict[str, Any]) -> dict[str, Any]:
    return dict(bounds=NO_BOUNDS) if "bounds" in options else options


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    one_in(2, FALLING, FLOATS, [pytest.param(options, id=name) for name, options in SOLVERS.items()]),
)
def test_a_function_that_falls_without_end_is_unbounded(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    fun = FALLING[name]
    for scale, unit in ((1.0, 1.0), (1e-8, 1.0), (1e8, 1.0)):
        recorder, x0 = Recorder(lambda x, s=scale, u=unit: s * fun(x / u)), (unit * vector(*START)).to(dtype)
        tol = 1e-4 * min(1.0, scale / unit)
        result = minimize(recorder, x0, tol=tol, max_eval=400, **without_bounds(options))
        assert result.status is Status.unbounded
        assert "without end" in result.message
        assert not result.success
        assert_result_is_true(result, recorder, x0, tol)


@each_solver
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LEVELLING)
def test_a_function_with_a_limit_at_infinity_is_not(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for scale, unit in ((1.0, 1.0), (1e8, 1.0), (1.0, 1e-8)):
        x0 = (unit * vector(*START)).to(dtype)
        options = without_bounds(options)
        result = minimize(lambda x, s=scale, u=unit: s * LEVELLING[name](x / u), x0, max_eval=1000, **options)
        assert result.status in (Status.converged, Status.precision_limit)
        assert bool(result.x.isfinite().all())


@each_solver
def test_without_a_tolerance_a_limit_is_not_called_unbounded(options: dict[str, Any]) -> None:
    for name in ("exponential", "reciprocal"):
        result = minimize(LEVELLING[name], vector(*START), tol=0.0, max_eval=500, **without_bounds(options))
        assert result.status in (Status.converged, Status.precision_limit, Status.max_eval)
        assert bool(result.x.isfinite().all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("side", [1, -1])
def test_logarithm_at_a_bound_is_unbounded(side: int, dtype: torch.dtype) -> None:
    points = []

    def fun(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        return (side * x).log().sum() + x.square().sum()

    bounds = (0, 5) if side > 0 else (-5, 0)
    result = minimize(fun, side * vector(1.0, 2.0).to(dtype), bounds=bounds)
    assert result.status is Status.unbounded
    assert math.isfinite(result.fun)
    assert bool((side * result.x > 0).all())
    assert all(bool(((x >= bounds[0]) & (x <= bounds[1])).all()) for x in points)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bounds_end_the_fall(dtype: torch.dtype) -> None:
    for fun in FALLING.values():
        result = minimize(fun, vector(*START).to(dtype), bounds=(-20, 20))
        assert result.success


@each_solver
@pytest.mark.parametrize("dtype", FLOATS)
def test_deep_minima_are_found(dtype: torch.dtype, options: dict[str, Any]) -> None:
    for width in (1e2, 1e4, 1e5):
        x0 = vector(1e-3, 2e-3).to(dtype)
        result = minimize(lambda x, w=width: (x**4 - w**2 * x**2).sum(), x0, **without_bounds(options))
        assert result.status in (Status.converged, Status.precision_limit)
        assert result.fun == pytest.approx(-(width**4) / 2, rel=1e-4)
    for factor in (1e12, 1e18) if dtype is torch.float32 else (1e20, 1e40):
        result = minimize(
            lambda x, f=factor: f * (x**2 - 1).sum(), torch.ones(2, dtype=dtype), **without_bounds(options)
        )
        assert result.status in (Status.converged, Status.precision_limit)


@each_solver
def test_walls_of_nan_stay_non_finite(options: dict[str, Any]) -> None:
    def fun(x: Tensor) -> Tensor:
        return x.sum() if bool((x == 1).all()) else x.sum() * math.nan

    assert minimize(fun, torch.ones(2).double(), **without_bounds(options)).status is Status.non_finite


@each_solver
def test_a_start_at_minus_infinity_is_non_finite(options: dict[str, Any]) -> None:
    result = minimize(lambda x: x.log().sum(), vector(0.0, 1.0), **without_bounds(options))
    assert result.status is Status.non_finite


@pytest.mark.parametrize("make", [
    lambda params: descend.LBFGS(params, line_search_fn="hager_zhang", max_eval=100),
    lambda params: descend.Newton(params, solver="cholesky", max_iter=200),
    lambda params: descend.Newton(params, solver="cg", max_iter=200),
], ids=["LBFGS", "cholesky", "cg"])  # fmt: skip
def test_optimizers_say_so_and_keep_the_best_point(make: Callable[[Any], Any]) -> None:
    param = torch.nn.Parameter(vector(*START))
    optimizer = make([param])
    for _ in range(20):
        optimizer.step(lambda: -(param**2).sum() + param.sum())
        if optimizer.result.status is Status.unbounded:
            break
    assert optimizer.result.status is Status.unbounded
    assert bool(param.isfinite().all())
    assert math.isfinite(optimizer.result.fun)
    assert optimizer.result.fun == (-(param**2).sum() + param.sum()).item()
