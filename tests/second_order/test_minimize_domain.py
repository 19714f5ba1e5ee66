"""Exceptions that a function raises outside its domain are walls, if `minimize` is told which."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from minimize_cases import (
    bowl,
    each_method,
    each_solver,
    logarithms,
    one_thread,  # noqa: F401
    vector,
)
from torch import Tensor, nn

from descend import Status, minimize


class OutsideError(Exception):
    """A model's own."""


def guarded(error: type[BaseException]) -> Any:
    """Logarithms that raise an error where one of their arguments is not positive."""

    def fun(x: Tensor) -> Tensor:
        if not bool((x > 0).all()):
            raise error("x must be positive")
        return logarithms(x)

    return fun


@each_solver
@pytest.mark.parametrize("error", [ValueError, OutsideError])
def test_listed_errors_are_walls_as_nan_is(error: type[Exception], options: dict[str, Any]) -> None:
    x0, domain_errors = vector(2.0, 3.0), (ArithmeticError, error)
    result = minimize(guarded(error), x0, max_iter=200, domain_errors=domain_errors, **options)
    by_nan = minimize(logarithms, x0, max_iter=200, **options)
    assert result.success
    assert result.history == by_nan.history
    assert torch.equal(result.x, by_nan.x)


@each_method
def test_listed_errors_at_the_start_are_the_callers(method: str) -> None:
    with pytest.raises(ValueError, match="x must be positive"):
        minimize(guarded(ValueError), vector(-1.0, 1.0), method, domain_errors=ValueError)


@each_method
def test_other_errors_are_the_callers(method: str) -> None:
    with pytest.raises(OutsideError):
        minimize(guarded(OutsideError), vector(2.0, 3.0), method, domain_errors=(ValueError, ArithmeticError))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError, torch.OutOfMemoryError]
)
def test_what_says_nothing_about_the_point_is_no_wall(error: type[BaseException]) -> None:
    with pytest.raises(error):
        minimize(guarded(error), vector(2.0, 3.0), domain_errors=Exception)


def test_errors_of_a_given_gradient_are_walls() -> None:
    def derivative(x: Tensor) -> Tensor:
        return 1 - 0.01 / x + 2 * x

    def jac(x: Tensor) -> Tensor:
        if not bool((x > 0).all()):
            raise ValueError("no gradient here")
        return derivative(x)

    result = minimize(logarithms, vector(2.0, 3.0), jac=jac, domain_errors=ValueError)
    assert result.success
    assert result.history == minimize(logarithms, vector(2.0, 3.0), jac=derivative).history
    with pytest.raises(ValueError, match="no gradient here"):
        minimize(logarithms, vector(2.0, 3.0), jac=jac)


def test_errors_of_backward_are_walls() -> None:
    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            if bool((x < -1).any()):
                raise OutsideError
            return 2 * x * grad

    result = minimize(lambda x: Picky.apply(3 * x).sum(), vector(0.9), domain_errors=OutsideError)
    assert result.success
    assert result.n_eval > 1


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_errors_of_second_derivatives_are_the_callers(method: str) -> None:
    def hvp(x: Tensor, vector: Tensor) -> Tensor:
        raise OutsideError

    with pytest.raises(OutsideError):
        minimize(bowl, vector(2.0, 3.0), method, hvp=hvp, domain_errors=OutsideError)


@each_solver
def test_a_module_is_left_at_the_best_point(options: dict[str, Any]) -> None:
    model = nn.ParameterList([nn.Parameter(vector(2.0, 3.0))])
    fun = guarded(ValueError)
    result = minimize(lambda model: fun(model[0]), model, domain_errors=ValueError, max_iter=200, **options)
    assert result.success
    assert result.fun == fun(model[0]).item()


def test_nothing_but_walls_is_said() -> None:
    def fun(x: Tensor) -> Tensor:
        if float(x[0].detach()) != 1.0:
            raise ValueError
        return x.sum()

    x0 = vector(1.0)
    result = minimize(fun, x0, domain_errors=ValueError)
    assert result.status is Status.non_finite
    assert torch.equal(result.x, x0)
    limited = minimize(fun, x0, domain_errors=ValueError, max_eval=5)
    assert (limited.status, limited.n_eval) == (Status.max_eval, 5)  # walls count


@pytest.mark.parametrize(
    "errors",
    [KeyboardInterrupt, (ValueError, SystemExit), "ValueError", ValueError("x"), [1], StopIteration, None, int],
)
def test_what_is_no_exception_class_is_named(errors: Any) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(TypeError, match="domain_errors must be subclasses of Exception"):
        minimize(never, vector(1.0), domain_errors=errors)


def test_python_functions_can_be_minimized() -> None:
    """The example of the documentation: functions of the standard library raise where they are not defined."""

    def fun(x: Tensor) -> tuple[Tensor, Tensor]:
        return vector(float(x[0]) - math.log(x[0]))[0], 1 - 1 / x

    result = minimize(fun, vector(3.0), jac=True, domain_errors=ValueError)
    assert result.success
    assert result.x.item() == pytest.approx(1.0, abs=1e-5)
