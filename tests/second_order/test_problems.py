"""The problems on which `minimize` is developed: their formulas are what they should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import (
    Problem,
    bounded,
    bounded_seen,
    bounded_unseen,
    ill_conditioned_squares,
    in_own_units,
    rounded,
    scaled,
    unconstrained,
)
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

FREE, BOUNDED = unconstrained(), bounded()
VALIDATION = [*bounded_seen(), *bounded_unseen()]
FROM_PAPERS = [problem for problem in VALIDATION if not problem.name.endswith("-moved")]
ILL = ill_conditioned_squares()
ORIGINALS = list(in_own_units())
COPIES = FREE[len(ORIGINALS) :]
# Torch's own forward mode calls torch.jit.script, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

BY_NAME = {problem.name: problem for problem in (*FREE, *BOUNDED, *VALIDATION, *ILL)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The problems are small: threads only wait for each other. They are restored by ``conftest.py``."""
    torch.set_num_threads(1)


def each(problems: list[Problem]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("problem", problems, ids=lambda problem: problem.name)


def smallest(problems: list[Problem]) -> list[Problem]:
    """The smallest problem with known minima of each formula, if it is small."""
    chosen: dict[str, Problem] = {}
    for problem in problems:
        formula = problem.name.split("-")[0]
        if problem.minima and (formula not in chosen or len(problem.x0) < len(chosen[formula].x0)):
            chosen[formula] = problem
    return [problem for problem in chosen.values() if len(problem.x0) <= 100]


def value_and_grad(problem: Problem, point: Tensor) -> tuple[Tensor, Tensor]:
    x = point.clone().requires_grad_()
    value = problem.fun(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def product(problem: Problem, point: Tensor, direction: Tensor) -> Tensor:
    """The Hessian times a direction, by double backward."""
    x = point.clone().requires_grad_()
    grad = torch.autograd.grad(problem.fun(x), x, create_graph=True)[0]
    return torch.autograd.grad(grad @ direction, x)[0]


def direction_of(point: Tensor, seed: int) -> Tensor:
    """Random, with each variable's own size, so that a difference along it moves all of them alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(point.shape, generator=generator, dtype=point.dtype) * point.abs().clamp(0.1, 10)


def points_of(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.x0, problem.x0 + 1e-3 * direction_of(problem.x0, seed=1)


def slope(fun: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """The derivative along a direction by four values: off by h^4 of a fifth derivative and by eps / h."""
    h = 1e-4
    near = fun(point + h * direction) - fun(point - h * direction)
    far = fun(point + 2 * h * direction) - fun(point - 2 * h * direction)
    return (8 * near - far) / (12 * h)


# Tolerances: of a sum with terms of both signs the largest size counts, 1e-6 of it for the formula and,
# as eps / h is 2e-12, 1e-9 of what is differenced for rounding.
@each(ORIGINALS)
def test_gradient_is_the_slope(problem: Problem) -> None:
    for point in points_of(problem):
        direction = direction_of(point, seed=2)
        value, grad = value_and_grad(problem, point)
        allowed = 1e-6 * (grad * direction).abs().sum() + 1e-9 * value.abs() + 1e-12
        assert abs(slope(problem.fun, point, direction) - grad @ direction) <= allowed


@each(ORIGINALS)
def test_product_is_the_slope_of_the_gradient(problem: Problem) -> None:
    for point in points_of(problem):
        direction = direction_of(point, seed=3)
        grad, exact = value_and_grad(problem, point)[1], product(problem, point, direction)
        difference = slope(lambda x: value_and_grad(problem, x)[1], point, direction)
        allowed = 1e-6 * exact.abs().max() + 1e-9 * grad.abs().max() + 1e-12
        assert (difference - exact).abs().max() <= allowed


@each(ORIGINALS)
def test_float32_goes_in_and_comes_out(problem: Problem) -> None:
    single = rounded(problem)
    value, grad = value_and_grad(single, single.x0)
    assert value.shape == ()
    assert value.dtype == grad.dtype == torch.float32
    # Values may cancel to nothing in float32; the gradient still has to point the same way.
    exact = value_and_grad(problem, single.x0.double())[1]
    assert torch.cosine_similarity(grad.double(), exact, dim=0) > 0.99


@each(smallest([*FREE, *BOUNDED, *FROM_PAPERS]))
def test_scipy_reaches_a_known_minimum(problem: Problem) -> None:
    def fun(x):
        value, grad = value_and_grad(problem, torch.from_numpy(x))
        return value.item(), grad.numpy()

    def hessian(x):
        return torch.autograd.functional.hessian(problem.fun, torch.from_numpy(x)).numpy()

    def is_known(value):
        return any(value == pytest.approx(minimum, rel=1e-5, abs=1e-9) for minimum in problem.minima)

    bounds = None if problem.lower is None else list(zip(problem.lower.tolist(), problem.upper.tolist(), strict=True))
    with threadpool_limits(1, "blas"):
        options = dict(gtol=1e-9, ftol=1e-16)
        result = minimize(fun, problem.x0.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        # Gradients alone stop early in the narrow valleys, on one processor and not on another.
        for further in () if bounds else (dict(method="BFGS"), dict(method="trust-exact", hess=hessian)):
            if not is_known(result.fun):
                result = minimize(fun, result.x, jac=True, options=dict(gtol=1e-9), **further)
    assert is_known(result.fun)


@each(COPIES)
def test_copy_in_other_units_has_the_same_shape(problem: Problem) -> None:
    original = next(base for base in ORIGINALS if problem.name.startswith(f"{base.name}-"))
    value, grad = value_and_grad(problem, problem.x0)
    original_value, original_grad = value_and_grad(original, original.x0)
    factor = value / original_value
    torch.testing.assert_close(problem.fun(problem.x0 * 0.99), factor * original.fun(original.x0 * 0.99))
    # The same change in both units; where x0 is zero its factor is unknown, and so is that of the gradient.
    torch.testing.assert_close(grad @ problem.x0, factor * (original_grad @ original.x0))


@each([*BOUNDED, *VALIDATION])
def test_start_is_within_bounds_and_not_yet_a_minimum(problem: Problem) -> None:
    assert (problem.lower <= problem.x0).all()
    assert (problem.x0 <= problem.upper).all()
    value, grad = value_and_grad(problem, problem.x0)
    assert value.isfinite()
    projected = problem.x0 - (problem.x0 - grad).clamp(problem.lower, problem.upper)
    assert projected.abs().max() > 1e-6


def test_names_are_unique_and_end_in_the_number_of_variables() -> None:
    assert len(BY_NAME) == len(FREE) + len(BOUNDED) + len(VALIDATION) + len(ILL)
    for problem in BY_NAME.values():
        assert problem.name.split("-")[1] == str(len(problem.x0))


def test_scaled_moves_start_bounds_and_minima() -> None:
    problem = scaled(BY_NAME["hs2-2"], "copy", factor_x=10.0, factor_f=3.0)
    assert problem.name == "hs2-2-copy"
    assert problem.x0.tolist() == [-20.0, 15.0]
    assert problem.lower.tolist() == [-torch.inf, 15.0]
    assert problem.minima == pytest.approx((3 * 0.05042619, 3 * 4.941229))
    assert problem.fun(problem.x0) == 3 * BY_NAME["hs2-2"].fun(BY_NAME["hs2-2"].x0)
