"""Functions that do their worst: a clear error or an honest status each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from minimize_cases import (
    Recorder,
    assert_result_is_true,
    bowl,
    each_method,
    each_solver,
    falls_to_infinity,
    logarithms,
    one_thread,  # noqa: F401
    rosenbrock,
    vector,
)
from torch import Tensor, nn

from descend import Status, minimize


def no_graph_outside(x: Tensor) -> Tensor:
    """What people write for "infinite elsewhere": a constant, of which autograd knows nothing."""
    return logarithms(x) if bool((x > 0).all()) else torch.tensor(math.inf)


def raises_outside(x: Tensor) -> Tensor:
    """Positive definite only where all x are positive."""
    return x.sum() - 0.01 * torch.linalg.cholesky(torch.diag(x)).diagonal().log().sum() + x.square().sum()


@each_solver
@pytest.mark.parametrize(
    "fun",
    [
        logarithms,
        no_graph_outside,
        raises_outside,
        lambda x: torch.where(x > 0, x, -math.inf).sum() + 1e-3 / x.abs().sum(),  # unbounded, no minimum
    ],
    ids=["nan", "inf", "error", "-inf"],
)
def test_points_outside_the_domain_are_not_accepted(fun: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    x0 = vector(2.0, 3.0)
    result = minimize(fun, x0, max_iter=200, **options)
    assert bool((result.x > 0).all())
    assert math.isfinite(result.fun)
    assert result.fun < fun(x0).item()
    assert result.fun == fun(result.x).item()
    if fun in (logarithms, no_graph_outside, raises_outside):
        assert result.success


@each_solver
def test_falling_up_to_infinity_is_no_success(options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(falls_to_infinity), vector(0.0, 1.0)
    result = minimize(recorder, x0, **options)
    assert result.status in (Status.non_finite, Status.line_search_failed, Status.precision_limit)
    assert_result_is_true(result, recorder, x0, 1e-6)
    assert result.fun < -2.5
    assert result.n_eval < 1000


@each_method
def test_error_at_the_start_is_the_callers(method: str) -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        minimize(raises_outside, vector(-1.0, 1.0), method)


@each_solver
def test_constant_is_solved_at_once(options: dict[str, Any]) -> None:
    result = minimize(lambda x: (x * 0).sum() + 7, vector(1.0, 2.0), **options)
    assert (result.status, result.n_eval, result.fun) == (Status.converged, 1, 7.0)


@each_solver
@pytest.mark.parametrize(
    "fun",
    [lambda x: x.sum(), lambda x: -x.exp().sum(), lambda x: -(x**2).sum(), lambda x: -(x.abs() + 1).log().sum()],
    ids=["linear", "exponential", "parabola", "logarithm"],
)
def test_unbounded_is_no_success(fun: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    if "bounds" in options:
        options = dict(bounds=(None, None))
    result = minimize(fun, vector(1.0, 2.0), max_eval=3000, **options)
    assert result.status is not Status.max_eval  # it gives up by itself
    assert bool(result.x.isfinite().all())
    assert math.isfinite(result.fun)
    is_flat = fun(result.x).item() > -1e4  # the slope of a logarithm truly goes to zero
    assert result.success == is_flat


@each_solver
@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_kink_is_an_honest_failure(tilt: float, options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(lambda x: (x.abs() + tilt * x).sum()), vector(1.3, -0.7)
    result = minimize(recorder, x0, max_eval=500, **options)
    assert_result_is_true(result, recorder, x0, 1e-6, options.get("bounds"))
    # A quadratic model is blind to kinks; line searches see them.
    assert result.fun < (0.1 if options.get("method", "").startswith("newton") else 1e-3)


FLOATS = (torch.float32, torch.float64)


@each_solver
@pytest.mark.parametrize(
    ("dtype", "factor"), [*((dtype, factor) for dtype in FLOATS for factor in (1e8, 1e25)), (torch.float64, 1e150)]
)
def test_huge_values_are_minimized(dtype: torch.dtype, factor: float, options: dict[str, Any]) -> None:
    result = minimize(lambda x: factor * bowl(x), vector(3.0, -1.0).to(dtype), **options)
    assert result.success
    assert float((result.x - 1).abs().max()) < 1e-3


@each_solver
@pytest.mark.parametrize(
    ("dtype", "factor"), [*((dtype, factor) for dtype in FLOATS for factor in (1e-8, 1e-25)), (torch.float64, 1e-150)]
)
def test_tiny_values_are_minimized_if_asked_for(dtype: torch.dtype, factor: float, options: dict[str, Any]) -> None:
    x0 = vector(3.0, -1.0).to(dtype)
    assert minimize(lambda x: factor * bowl(x), x0, **options).n_eval == 1
    result = minimize(lambda x: factor * bowl(x), x0, tol=1e-3 * factor, **options)
    assert result.success
    assert float((result.x - 1).abs().max()) < 1e-2


@each_solver
@pytest.mark.parametrize("unit", [1e-20, 1e-12, 1e12, 1e20])
def test_variables_may_have_any_unit(unit: float, options: dict[str, Any]) -> None:
    result = minimize(
        lambda x: bowl(x / unit), vector(3.0, -1.0) * unit, tol=1e-3 * min(1.0, 1 / unit), max_eval=3000, **options
    )
    assert result.success
    assert float((result.x / unit - 1).abs().max()) < 1e-2


@each_solver
@pytest.mark.parametrize(
    ("dtype", "factor", "unit"),
    [
        *((torch.float64, factor, 1.0) for factor in (1e-300, 1e-200, 1e200, 1e300)),
        *((torch.float64, 1.0, unit) for unit in (1e-200, 1e-100, 1e100, 1e200)),
        *((torch.float32, factor, 1.0) for factor in (1e-44, 1e-40, 1e37)),
        *((torch.float32, 1.0, unit) for unit in (1e-30, 1e-25, 1e25, 1e37)),
    ],
)
def test_numbers_near_the_limits_are_honest(
    dtype: torch.dtype, factor: float, unit: float, options: dict[str, Any]
) -> None:
    recorder, x0 = Recorder(lambda x: factor * bowl(x / unit)), (vector(3.0, -1.0) * unit).to(dtype)
    result = minimize(recorder, x0, tol=0.0, max_eval=300, **options)
    assert_result_is_true(result, recorder, x0, 0.0)


@pytest.mark.parametrize("max_eval", range(1, 12))
def test_slope_that_overflows_is_not_finite(max_eval: int) -> None:
    # The lowest point of the line has a finite gradient whose product with the direction overflows.
    steps = ((0.05, 0.0, -10.0), (0.15, -1.0, -10.0), (0.5, -0.5, 1.0), (math.inf, -1e3, -1e308))

    def fun(x: Tensor) -> tuple[Tensor, Tensor]:
        _, value, grad = next(step for step in steps if x[0].item() < step[0])
        return torch.tensor(value, dtype=torch.float64), torch.full_like(x, grad)

    result = minimize(fun, torch.zeros(100, dtype=torch.float64), "l-bfgs", jac=True, max_eval=max_eval)
    assert result.n_eval <= max_eval
    assert not result.success


@each_solver
@pytest.mark.parametrize("level", [1e-8, 1e-3])
def test_noise_ends_at_its_level(level: float, options: dict[str, Any]) -> None:
    recorder = Recorder(lambda x: bowl(x) + level * torch.rand((), dtype=torch.float64))
    result = minimize(recorder, vector(3.0, -1.0), tol=1e-12, max_eval=500, **options)
    assert result.fun == recorder.least
    assert bowl(result.x).item() <= 2 * level


@each_solver
@pytest.mark.parametrize(
    ("fun", "error", "words"),
    [
        (lambda x: x, ValueError, r" must return a real scalar tensor, got shape \(2,\).*sum"),
        (lambda x: x[:0], ValueError, r"scalar tensor, got shape \(0,\)"),
        (lambda x: x.sum() * 1j, ValueError, "real scalar tensor, got .*complex128"),
        (lambda x: (x > 0).sum(), ValueError, "real scalar tensor, got .*int64"),
        (lambda x: x.sum().item(), TypeError, "scalar tensor, got float"),
        (lambda x: None, TypeError, "scalar tensor, got NoneType"),
        (lambda x: (x.sum(), x), TypeError, "scalar tensor, got tuple"),
        (lambda x: x.detach().sum(), RuntimeError, "does not depend on .*autograd.*detach"),
        (lambda x: torch.ones((), requires_grad=True) * 2, RuntimeError, "does not depend on .*autograd"),
        (lambda x: torch.tensor(1.0), RuntimeError, "does not depend on .*autograd"),
    ],
    ids=["vector", "nothing", "complex", "integer", "float", "None", "tuple", "detached", "other", "constant"],
)
@pytest.mark.parametrize("is_parameter", [False, True])
def test_wrong_returns_are_errors(
    fun: Any, error: type[Exception], words: str, is_parameter: bool, options: dict[str, Any]
) -> None:
    x0 = nn.Parameter(vector(3.0, -1.0)) if is_parameter else vector(3.0, -1.0)
    with pytest.raises(error, match=rf"(?s)minimize: fun.*{words}"):
        minimize(fun, x0, **options)


@each_solver
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_value_may_be_a_tensor_with_one_element(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    assert minimize(lambda x: bowl(x).reshape(shape), vector(3.0, -1.0), **options).success


def changes_argument(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.sub_(1.0)
    return x.square().sum()


@each_solver
@pytest.mark.parametrize("jac", [None, lambda x: 2 * (x - 1)], ids=["autograd", "jac"])
def test_function_that_changes_its_argument_is_an_error_or_harmless(jac: Any, options: dict[str, Any]) -> None:
    x0 = vector(3.0, -1.0)
    hvp = (lambda x, v: 2 * v) if "newton" in options.get("method", "") and jac else None
    try:
        result = minimize(changes_argument, x0, jac=jac, hvp=hvp, max_iter=50, **options)
    except (RuntimeError, ValueError) as error:
        assert "in place" in str(error) or "in-place" in str(error)
    else:
        assert result.fun == bowl(result.x).item()
    assert torch.equal(x0, vector(3.0, -1.0))


@each_solver
def test_errors_of_the_function_come_through(options: dict[str, Any]) -> None:
    calls = []

    def fun(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 4:
            raise KeyError("mine")
        return rosenbrock(x)

    with pytest.raises(KeyError, match="mine"):
        minimize(fun, vector(-1.2, 1.0), **options)
    assert minimize(rosenbrock, vector(-1.2, 1.0), max_iter=3, **options).n_iter == 3


def test_sizes_that_do_not_fit_into_memory_are_told_before() -> None:
    n = 10_000_000
    for method, instead in (("bfgs", "l-bfgs"), ("ss-broyden", "l-bfgs"), ("newton", "newton-cg")):
        with pytest.raises(MemoryError, match=rf"10,000,000 variables needs .* GiB .*{instead}"):
            minimize(lambda x: (x * x).sum(), torch.ones(n), method)
