"""Bounds are kept at every evaluation, and the minimum within them is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from minimize_cases import (
    Recorder,
    assert_evaluated_within_bounds,
    assert_result_is_true,
    bowl,
    for_scipy,
    one_thread,  # noqa: F401
    quartic,
    rosenbrock,
    vector,
    waves,
)
from problems import Problem, bounded
from torch import Tensor

from descend import minimize

INF = math.inf
BOUNDS: list[tuple[Any, Any]] = [
    (-2.0, 0.5),
    (0.5, 5.0),
    (None, 0.3),
    (0.7, None),
    (-INF, INF),
    (vector(-INF, 0.9, -1.0), vector(0.5, INF, 0.0)),
    (vector(0.1, 0.2, 0.3), vector(0.1, 0.2, 5.0)),  # fixed variables
    (vector(0.1, 0.2, 0.3), vector(0.1, 0.2, 0.3)),
    (1.0, 1.0),
    (1 / 3, 2 / 3),
    (-1e300, 1e-300),
    (vector(-1e-12, 0.1, 1e6), vector(1e-12, 0.1 + 1e-16, 1e6 + 1)),
]


def as_tensors(bounds: tuple[Any, Any], x0: Tensor) -> tuple[Tensor, Tensor]:
    lower = torch.as_tensor(-INF if bounds[0] is None else bounds[0], dtype=x0.dtype)
    upper = torch.as_tensor(INF if bounds[1] is None else bounds[1], dtype=x0.dtype)
    return lower.expand(x0.shape), upper.expand(x0.shape)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("fun", [bowl, rosenbrock, quartic, waves], ids=lambda fun: fun.__name__)
def test_bounds_are_never_violated(fun: Callable[[Tensor], Tensor], bounds: tuple[Any, Any]) -> None:
    for x0 in (vector(-1.2, 1.0, 2.0), vector(10.0, -10.0, 0.3), vector(0.1, 0.2, 0.3)):
        recorder, kept = Recorder(fun), x0.clone()
        result = minimize(recorder, x0, bounds=bounds)
        tensors = as_tensors(bounds, x0)
        assert_evaluated_within_bounds(recorder, *tensors)
        assert torch.equal(recorder.points[0], x0.clamp(*tensors))
        assert_result_is_true(result, recorder, x0, 1e-6, tensors)
        assert result.success
        assert torch.equal(x0, kept)


def test_bounds_keep_a_function_where_it_is_defined() -> None:
    def fun(x: Tensor) -> Tensor:
        assert bool((x >= 0).all())
        return (x.sqrt() * x).sum() - (0.1 * x).sum() + x[0]

    result = minimize(fun, vector(1.0, 2.0), bounds=(0, None))
    assert result.success
    assert float(result.x[0]) <= 1e-6


def test_gradient_below_the_rounding_of_x_is_no_success() -> None:
    # At x = 1e12, x - (x - 1e-5) is 0.
    recorder, x0, bounds = Recorder(lambda x: 5e-5 * ((x - 1e12) ** 2).sum()), vector(1e12 + 0.1), (0.0, INF)
    result = minimize(recorder, x0, bounds=bounds)
    assert_result_is_true(result, recorder, x0, 1e-6, (torch.tensor(0.0), torch.tensor(INF)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bounds", [(0.1, 0.999), (1 / 3, 0.7001)], ids=str)
def test_bounds_hold_in_the_dtype_of_each_tensor(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    # 0.999 rounds to 1 in bfloat16: a logarithm of 1 - x would be infinite there.
    points: list[Tensor] = []

    def fun(x: dict[str, Tensor]) -> Tensor:
        points.append(x["narrow"].detach().double())
        return (x["narrow"].double() + 3).square().sum() - x["wide"].sum() - 9 * x["narrow"].double()[0]

    x0 = {"narrow": torch.tensor([0.5, 0.5], dtype=dtype), "wide": vector(0.5)}
    minimize(fun, x0, bounds=bounds, max_iter=20)
    assert len(points) > 1
    assert all(bounds[0] <= float(value) <= bounds[1] for point in points for value in point)


@pytest.mark.parametrize(
    "bounds",
    [
        (dict(a=0.5, b=None), dict(a=None, b=vector(0.25, 9.0))),
        (dict(b=None, a=0.5), dict(b=vector(0.25, 9.0), a=None)),
        [dict(a=0.5, b=-INF), dict(a=INF, b=torch.tensor([0.25, INF]))],
    ],
    ids=["same order", "other order", "list"],
)
def test_bounds_have_the_structure_of_x0(bounds: Any) -> None:
    result = minimize(
        lambda x: x["a"].square().sum() + bowl(x["b"]),
        dict(a=vector(2.0, 3.0), b=vector(0.0, 0.0)),
        bounds=bounds,
    )
    assert result.x["a"].tolist() == [0.5, 0.5]
    assert result.x["b"][0] == 0.25
    assert float(result.x["b"][1]) == pytest.approx(1, abs=1e-6)


SMALL_BOXES = sorted((problem for problem in bounded() if len(problem.x0) <= 10), key=lambda problem: problem.name)


@pytest.mark.parametrize("problem", SMALL_BOXES[::6], ids=lambda problem: problem.name)
def test_bounded_minimum_is_as_low_as_scipys(problem: Problem) -> None:
    bounds = problem.lower, problem.upper
    recorder = Recorder(problem.fun)
    result = minimize(recorder, problem.x0, bounds=bounds, tol=1e-7, max_eval=3000)
    assert_evaluated_within_bounds(recorder, *bounds)
    assert_result_is_true(result, recorder, problem.x0, 1e-7, bounds)

    theirs = scipy.optimize.minimize(
        for_scipy(problem.fun),
        problem.x0.clamp(*bounds).numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(problem.lower.tolist(), problem.upper.tolist(), strict=True)),
        options=dict(ftol=1e-15, gtol=1e-9, maxiter=3000),
    )
    assert result.success
    assert result.fun <= theirs.fun + 1e-5 * (1 + abs(theirs.fun))
