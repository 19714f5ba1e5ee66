"""`least_squares(..., differentiable=True)`: derivatives of fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from minimize_cases import one_thread, vector  # noqa: F401
from torch import Tensor, nn
from torch.autograd import gradcheck

from descend import least_squares

TIGHT = 1e-12  # gradcheck's differences amplify an error of the solution by a million
TIMES = torch.linspace(0, 3, 8, dtype=torch.float64)


def decay(x: Tensor, data: Tensor, rate: Tensor) -> Tensor:
    """Nonlinear, with residuals that are not small: the Gauss-Newton Hessian would be wrong."""
    return x[0] * torch.exp(-rate * x[1] * TIMES) + x[2] - data


def inputs() -> tuple[Tensor, Tensor]:
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = 2 * torch.exp(-TIMES) + 0.5 + 0.2 * noise
    return data.requires_grad_(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)


def fitted(data: Tensor, rate: Tensor, **options: Any) -> Tensor:
    options = {"tol": TIGHT, "args": (data, rate), **options}
    return least_squares(decay, vector(1.0, 1.0, 0.0), differentiable=True, **options).x


@pytest.mark.parametrize("loss", ["linear", "huber", "soft_l1", "cauchy"])
def test_derivatives_match_differences(loss: str) -> None:
    assert gradcheck(lambda *args: fitted(*args, loss=loss, loss_scale=0.2), inputs(), atol=1e-6)


def test_own_losses_may_depend_on_tensors() -> None:
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def solve(scale: Tensor, is_triple: bool) -> Tensor:
        def loss(z: Tensor) -> Any:
            root = (1 + scale * z).sqrt()
            value = 2 * (root - 1) / scale
            return torch.stack([value, 1 / root, -0.5 * scale / root**3]) if is_triple else value

        return fitted(*inputs(), loss=loss, loss_scale=0.2)

    for is_triple in (False, True):
        assert gradcheck(lambda scale, is_triple=is_triple: solve(scale, is_triple), scale, atol=1e-6)


@pytest.mark.parametrize("method", ["trust-region", "lm"])
def test_derivatives_do_not_depend_on_the_method(method: str) -> None:
    assert gradcheck(lambda *args: fitted(*args, method=method), inputs(), atol=1e-6)


def test_derivatives_with_bounds_match_differences() -> None:
    def solve(data: Tensor, rate: Tensor, upper: Tensor) -> Tensor:
        return fitted(data, rate, bounds=(None, upper))

    upper = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(solve, (*inputs(), upper), atol=1e-6)
    assert torch.autograd.grad(solve(*inputs(), upper).sum(), upper)[0] != 0


def test_linear_fits_match_their_solution() -> None:
    matrix = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    targets = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    x = least_squares(lambda x, a, b: a @ x - b, vector(0, 0, 0), args=(matrix, targets), differentiable=True).x
    expected = torch.linalg.lstsq(matrix, targets[:, None]).solution[:, 0]
    for found, wanted in zip(
        torch.autograd.grad(x.square().sum(), (matrix, targets)),
        torch.autograd.grad(expected.square().sum(), (matrix, targets)),
        strict=True,
    ):
        assert torch.allclose(found, wanted, rtol=1e-9)


def test_given_jacobians_change_no_derivative() -> None:
    def jac(x: Tensor, data: Tensor, rate: Tensor) -> Tensor:
        factor = torch.exp(-rate * x[1] * TIMES)
        return torch.stack([factor, -x[0] * rate * TIMES * factor, torch.ones_like(TIMES)], dim=1).detach()

    assert gradcheck(lambda *args: fitted(*args, jac=jac), inputs(), atol=1e-6)


def test_evaluations_are_counted() -> None:
    calls = []

    def fun(*args: Tensor) -> Tensor:
        calls.append(args)
        return decay(*args)

    result = least_squares(fun, vector(1.0, 1.0, 0.0), args=inputs(), differentiable=True)
    assert result.n_eval == len(calls)


def test_no_derivative_is_an_error() -> None:
    args = inputs()
    unfinished = least_squares(decay, vector(1.0, 1.0, 0.0), args=args, differentiable=True, max_iter=1)
    with pytest.raises(RuntimeError, match=r"least_squares: the solution cannot be differentiated: .*'max_iter'"):
        unfinished.x.sum().backward()
    singular = least_squares(lambda x: x.sum() - args[1], vector(1.0, 1.0), differentiable=True)
    with pytest.raises(RuntimeError, match="least_squares: the solution cannot be differentiated: its Hessian"):
        singular.x[0].backward()
    with pytest.raises(ValueError, match="least_squares: differentiable=True needs plain tensors"):
        least_squares(lambda m: m(torch.ones(1, 2)), nn.Linear(2, 1), differentiable=True)
