"""Residuals that do their worst: a clear error or an honest status each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from least_squares_cases import (
    Recorder,
    assert_fit_is_true,
    cost,
    decay,
    each_method,
    one_thread,  # noqa: F401
    rosenbrock,
    vector,
)
from problems.fits import unconstrained
from torch import Tensor

from descend import Status, least_squares


def logarithms(x: Tensor) -> Tensor:
    """NaN where an x < 0; the solution is close to 0."""
    return torch.cat([x.log() + 3, 10 * x])


def roots(x: Tensor) -> Tensor:
    """Finite at 0, where the Jacobian is not."""
    return torch.cat([x.sqrt() - 0.1, x - 2])


def raises_outside(x: Tensor) -> Tensor:
    return torch.cat([torch.linalg.cholesky(torch.diag(x)).diagonal(), x - 1])


@each_method
@pytest.mark.parametrize("fun", [logarithms, roots, raises_outside])
def test_points_outside_the_domain_are_not_accepted(fun: Any, method: str) -> None:
    recorder = Recorder(fun)
    x0 = vector(2.0, 3.0)
    result = least_squares(recorder, x0, method=method)
    assert result.success
    assert bool((result.x > 0).all())
    assert result.fun == cost(fun(result.x)) < cost(fun(x0))


@each_method
@pytest.mark.parametrize("fun", [lambda x: x.log(), lambda x: 1 / (x - 2), lambda x: x.sqrt() - 1])
@pytest.mark.parametrize("x0", [-1.0, 2.0, 0.0])
def test_start_that_is_not_finite_says_so(fun: Any, x0: float, method: str) -> None:
    start = torch.tensor([x0], dtype=torch.float64, requires_grad=True)
    residuals = fun(start)
    (grad,) = torch.autograd.grad(residuals.sum(), start)
    is_finite = bool(residuals.isfinite().all()) and bool(grad.isfinite().all())
    result = least_squares(fun, start.detach(), method=method)
    assert (result.status is Status.non_finite) == (not is_finite)
    if not is_finite:
        assert (result.n_eval, result.x.tolist()) == (1, [x0])


def test_error_at_the_start_is_the_callers() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        least_squares(raises_outside, vector(-1.0, 1.0))


@each_method
def test_errors_of_the_function_come_through(method: str) -> None:
    recorder = Recorder(rosenbrock)

    def fun(x: Tensor) -> Tensor:
        if len(recorder.points) == 3:
            raise KeyError("mine")
        return recorder(x)

    with pytest.raises(KeyError, match="mine"):
        least_squares(fun, vector(-1.2, 1.0), method=method)


@each_method
def test_walls_all_around_end_the_run(method: str) -> None:
    def fun(x: Tensor) -> Tensor:
        return x - 1 if bool((x == 3).all()) else x * math.nan

    result = least_squares(fun, vector(3.0, 3.0), method=method)
    assert (result.status, result.x.tolist(), result.fun) == (Status.non_finite, [3.0, 3.0], 4.0)
    assert result.n_eval < 80


@each_method
@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_kink_is_an_honest_end(tilt: float, method: str) -> None:
    recorder = Recorder(lambda x: torch.cat([x.abs().sqrt(), tilt * x - 0.1]))
    result = least_squares(recorder, vector(1.3, -0.7), method=method, max_eval=400)
    assert result.fun == cost(recorder.fun(result.x)) <= recorder.least * (1 + 1e-13)
    # Where it says that nothing is to be gained, that is true, though the gradient jumps there.
    assert not result.success or result.fun <= 0.01 * (1 + 1e-10)


@each_method
def test_wrong_jacobian_is_no_success(method: str) -> None:
    def jac(x: Tensor) -> Tensor:
        return -torch.autograd.functional.jacobian(decay, x)

    result = least_squares(decay, vector(1.0, 1.0), method=method, jac=jac)
    assert not result.success
    assert result.n_eval < 100
    assert result.fun == result.history[0].fun


@each_method
@pytest.mark.parametrize("factor", [1e-140, 1e-20, 1e20, 1e140])
def test_any_size_of_residuals(factor: float, method: str) -> None:
    result = least_squares(lambda x: factor * rosenbrock(x), vector(-1.2, 1.0), method=method)
    assert result.success
    torch.testing.assert_close(result.x, vector(1.0, 1.0), rtol=1e-5, atol=0.0)


@each_method
def test_squares_that_overflow_are_not_finite(method: str) -> None:
    result = least_squares(lambda x: 1e200 * rosenbrock(x), vector(-1.2, 1.0), method=method)
    assert (result.status, result.n_eval) == (Status.non_finite, 1)


@each_method
@pytest.mark.parametrize("level", [1e-9, 1e-4])
def test_noise_ends_at_its_level(level: float, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    recorder = Recorder(lambda x: decay(x) + level * torch.randn(30, generator=generator, dtype=x.dtype))
    result = least_squares(recorder, vector(1.0, 1.0), method=method, max_eval=500)
    assert result.n_eval < 500
    assert result.fun == recorder.least
    assert float((result.x - least_squares(decay, vector(1.0, 1.0)).x).abs().max()) < 10 * level**0.5


@each_method
def test_constant_residuals_are_solved_at_once(method: str) -> None:
    result = least_squares(lambda x: 0 * x + 7, vector(1.0, 2.0), method=method)
    assert (result.status, result.n_eval, result.fun, result.rank) == (Status.converged, 1, 49.0, 0)


@each_method
def test_falling_for_ever_ends(method: str) -> None:
    result = least_squares(lambda x: torch.exp(-x), vector(0.0), method=method, max_eval=2000)
    assert result.n_eval < 2000
    assert result.fun < 1e-10


def test_function_that_changes_its_argument_is_an_error() -> None:
    def fun(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.sub_(1.0)
        return rosenbrock(x)

    with pytest.raises(RuntimeError, match="in place"):
        least_squares(fun, vector(-1.2, 1.0))


def test_jacobian_that_does_not_fit_is_told_before() -> None:
    with pytest.raises(MemoryError, match=r"dense Jacobian of 4,000,000 residuals and 4,000,000 variables needs"):
        least_squares(lambda x: x, torch.ones(4_000_000), jac="dense")


@each_method
def test_start_outside_the_bounds_is_clamped(method: str) -> None:
    recorder = Recorder(decay)
    result = least_squares(recorder, vector(-5.0, 7.0), (vector(0.5, 0.1), vector(10.0, 2.0)), method=method)
    assert recorder.points[0].tolist() == [0.5, 2.0]
    assert result.success
    assert_fit_is_true(result, recorder)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-24), (torch.float64, 1e-200)], ids=str)
def test_cost_that_underflows_is_not_taken_for_zero(dtype: torch.dtype, unit: float) -> None:
    result = least_squares(lambda x: unit * (x - 1), torch.tensor([5.0, 4.0], dtype=dtype))
    assert result.status is Status.precision_limit


def test_start_of_huge_residuals_does_not_make_others_zero() -> None:
    problem = next(problem for problem in unconstrained() if problem.name == "chebyquad-8-times100")
    result = least_squares(problem.residuals, problem.x0)
    assert result.history[0].fun > 1e30
    assert result.fun < 0.1 or result.status is Status.precision_limit
