"""`least_squares` takes structures, modules, parameters, complex numbers and Jacobians; and refuses the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from least_squares_cases import (
    decay,
    each_method,
    jacobian,
    one_thread,  # noqa: F401
    rosenbrock,
    vector,
)
from minimize_cases import assert_same_structure
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend import Status, least_squares

TIMES = torch.linspace(0, 4, 25, dtype=torch.float64)
DATA = 3 * torch.exp(-0.7 * TIMES) + 0.5


def curve(p: Any) -> Tensor:
    return p["scale"] * torch.exp(-p["rates"][0] * TIMES) + p["rates"][1] - DATA


def guess() -> Any:
    return {"scale": vector(1.0), "rates": [torch.tensor(1.0).double(), torch.tensor(0.0)]}


@each_method
def test_structures_come_back(method: str) -> None:
    x0 = guess()
    kept = [leaf.clone() for leaf in pytree.tree_leaves(x0)]
    result = least_squares(curve, x0, method=method)
    assert result.success
    for tree in (result.x, result.grad, result.standard_errors):
        assert_same_structure(tree, x0)
    assert all(map(torch.equal, pytree.tree_leaves(x0), kept))
    torch.testing.assert_close(result.x["scale"], vector(3.0), rtol=1e-4, atol=0.0)
    assert result.jac.shape == (25, 3)


def test_residuals_may_have_any_structure_and_shape() -> None:
    def fun(x: Tensor) -> Any:
        r = decay(x)
        return {"late": (r[20:].reshape(2, 5), r[15:20].float().double()), "early": [r[:15].reshape(3, 5, 1)]}

    result, flat = least_squares(fun, vector(1.0, 1.0)), least_squares(decay, vector(1.0, 1.0))
    torch.testing.assert_close(result.x, flat.x, rtol=1e-5, atol=0.0)
    assert result.residuals["early"][0].shape == (3, 5, 1)
    assert not result.residuals["late"][0].requires_grad


@each_method
@pytest.mark.parametrize("kind", ["module", "parameter", "list"])
def test_modules_are_fitted_in_place(kind: str, method: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    module[0].bias.requires_grad_(False)
    frozen = module[0].bias.clone()
    x0 = {"module": module, "parameter": module[2].weight, "list": [p for p in module.parameters() if p.requires_grad]}
    before = {name: param.clone() for name, param in module.named_parameters()}

    def fun(_: Any) -> Tensor:
        return module(TIMES.unsqueeze(1))[:, 0] - DATA

    result = least_squares(fun, x0[kind], method=method, max_iter=30)
    assert result.fun < 0.9 * result.history[0].fun
    assert result.fun == pytest.approx(0.5 * fun(None).square().sum().item(), rel=1e-13)
    assert torch.equal(module[0].bias, frozen)
    assert torch.equal(before["2.bias"], module[2].bias) == (kind == "parameter")
    assert all(param.grad is None for param in module.parameters())
    if kind == "module":
        assert result.x is module
        assert list(result.grad) == list(result.standard_errors) == ["0.weight", "2.weight", "2.bias"]


def test_values_and_parameters_take_the_same_way() -> None:
    values = least_squares(rosenbrock, vector(-1.2, 1.0))
    parameters = least_squares(rosenbrock, nn.Parameter(vector(-1.2, 1.0)))
    assert [entry.fun for entry in values.history] == [entry.fun for entry in parameters.history]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_parameters_are_at_the_best_point_after_an_error(number: int) -> None:
    param, costs = nn.Parameter(vector(-1.2, 1.0)), []

    def fun(x: Tensor) -> Tensor:
        if len(costs) == number - 1:
            raise ArithmeticError("stop")
        costs.append(rosenbrock(x).square().sum().item())
        return rosenbrock(x)

    with pytest.raises(ArithmeticError, match="stop"):
        least_squares(fun, param)
    start = rosenbrock(vector(-1.2, 1.0)).square().sum().item()
    assert rosenbrock(param).square().sum().item() == min([*costs, start])


@each_method
def test_complex_numbers_count_by_their_magnitude(method: str) -> None:
    matrix = torch.randn(6, 2, dtype=torch.complex128)
    right = torch.randn(6, dtype=torch.complex128)
    result = least_squares(lambda z: matrix @ z - right, torch.zeros(2, dtype=torch.complex128), method=method)
    assert result.success
    torch.testing.assert_close(result.x, torch.linalg.lstsq(matrix, right.unsqueeze(1)).solution[:, 0])
    assert result.fun == pytest.approx(0.5 * result.residuals.abs().square().sum().item())
    assert result.jac.shape == (12, 4)
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    torch.testing.assert_close(least_squares(lambda z: matrix @ z - right, parameter).x.data, result.x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    result = least_squares(lambda x: x.float() ** 2 - 2, torch.ones(3, dtype=dtype))
    assert result.x.dtype == dtype
    assert float((result.x.float() - 2**0.5).abs().max()) < 0.01


@pytest.mark.parametrize("form", ["matrix", "buffer", "sparse"])
def test_given_jacobian_is_used(form: str) -> None:
    calls, buffer = [], torch.empty(30, 2, dtype=torch.float64)

    def jac(x: Tensor) -> Tensor:
        calls.append(x)
        matrix = jacobian(decay, x.detach())
        if form == "buffer":
            return buffer.copy_(matrix)
        return matrix.to_sparse() if form == "sparse" else matrix

    result = least_squares(lambda x: decay(x.detach()), vector(1.0, 1.0), jac=jac)
    assert result.success
    assert len(calls) == result.n_jac
    assert [entry.fun for entry in result.history] == pytest.approx(
        [entry.fun for entry in least_squares(decay, vector(1.0, 1.0)).history]
    )


def test_given_jacobian_may_be_a_structure_as_of_jacrev() -> None:
    x0 = {"matrix": torch.zeros(2, 2).double(), "b": torch.tensor(0.0).double()}

    def fun(x: Any) -> Tensor:
        return (x["matrix"] - 1) * (2 + x["b"]) + x["b"] - torch.eye(2).double()

    result = least_squares(fun, x0, jac=torch.func.jacrev(fun))
    torch.testing.assert_close(result.x, least_squares(fun, x0).x)


class Doubled(torch.autograd.Function):
    """2 x, whose backward cannot be differentiated, nor batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(2 * grad.numpy())


class Hidden(torch.autograd.Function):
    """x + x^2, whose backward autograd can follow only in part: silently wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad + 2 * x * grad.detach()


@pytest.mark.parametrize("function", [Doubled, Hidden])
def test_backward_that_cannot_be_differentiated_is_noticed(function: Any) -> None:
    result = least_squares(lambda x: decay(function.apply(x)), vector(0.4, 0.4))
    true = torch.stack(
        [torch.autograd.grad(decay(function.apply(x))[i], x)[0] for i in range(30) for x in [result.x.requires_grad_()]]
    )
    torch.testing.assert_close(result.jac, true)
    assert result.success


# Refused before anything runs.

OTHER = vector(2.0).requires_grad_()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(method="dogbox"), ValueError, "method must be one of .*trust-region.*lm.*dogbox"),
        (dict(loss="l1"), ValueError, "loss must be one of .*huber.*or a function.*l1"),
        (dict(loss=3), ValueError, "loss must be one of"),
        (dict(loss_scale=0.0), ValueError, "loss_scale must be a finite number > 0, got 0.0"),
        (dict(loss_scale=math.nan), ValueError, "loss_scale"),
        (dict(tol=-1.0), ValueError, "tol must be a finite number >= 0"),
        (dict(tol=math.nan), ValueError, "tol must be"),
        (dict(max_iter=-1), ValueError, "max_iter must be an integer >= 0"),
        (dict(max_eval=0), ValueError, "max_eval must be an integer >= 1"),
        (dict(max_eval=2.0), ValueError, "max_eval must be an integer"),
        (dict(callback=1), TypeError, "callback must be a function or None"),
        (dict(jac="3-point"), TypeError, "jac must be a function, one of"),
        (dict(bounds=3), ValueError, "bounds must be"),
        (dict(bounds=(2.0, 1.0)), ValueError, "lower <= upper"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    def untouched(x: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(error, match=rf"(?s)^least_squares: .*{words}"):
        least_squares(untouched, vector(1.0), **options)


@pytest.mark.parametrize(
    ("residuals", "x0", "error", "words"),
    [
        (3, vector(1.0), TypeError, "residuals must be a function, got 3"),
        (rosenbrock, 3.0, TypeError, "x0 must be made of"),
        (rosenbrock, torch.arange(3), TypeError, "x0 must be made of"),
        (lambda x: x.sum().item(), vector(1.0), TypeError, "residuals must return .*got float"),
        (lambda x: None, vector(1.0), TypeError, "residuals must return .*NoneType"),
        (lambda x: x > 0, vector(1.0), TypeError, "residuals must return .*bool"),
        (lambda x: x.detach(), vector(1.0), RuntimeError, "do not depend on x0.*autograd.*jac="),
        (lambda x: x.detach() * OTHER, vector(1.0), RuntimeError, "do not depend on x0"),
        (lambda x: (x.detach() * OTHER).repeat(3), vector(1.0), RuntimeError, "do not depend on x0"),
    ],
)
def test_wrong_functions_are_errors(residuals: Any, x0: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"(?s)least_squares: .*{words}"):
        least_squares(residuals, x0)


def test_shapes_that_change_are_errors() -> None:
    sizes = iter([2, 3])
    with pytest.raises(ValueError, match=r"same structure and shapes at each call, got \[\(3,\)\] after \[\(2,\)\]"):
        least_squares(lambda x: x[0] * torch.ones(next(sizes)).double(), vector(1.0))


@pytest.mark.parametrize(
    "jac", [lambda x: torch.ones(2, 30), lambda x: None, lambda x: torch.ones(29, 2), lambda x: 2.0]
)
def test_wrong_jacobians_are_errors(jac: Any) -> None:
    with pytest.raises(ValueError, match=r"least_squares: jac must return a real tensor of shape \(30, 2\)"):
        least_squares(decay, vector(1.0, 1.0), jac=jac)


@pytest.mark.parametrize("loss", [lambda z: z.sum(), lambda z: 3.0, lambda z: z[:2], lambda z: (z, z)])
def test_wrong_losses_are_errors(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"least_squares: loss must map z of shape \(M,\)"):
        least_squares(decay, vector(1.0, 1.0), loss=loss)


def test_complex_residuals_need_squares() -> None:
    with pytest.raises(ValueError, match=r"complex residuals, which need loss='linear'.*view_as_real"):
        least_squares(lambda x: x * 1j, vector(1.0), loss="huber")


def test_jac_does_not_go_with_parameters() -> None:
    with pytest.raises(ValueError, match=r"nn.Parameter.*[Dd]etach x0"):
        least_squares(rosenbrock, nn.Parameter(vector(1.0, 2.0)), jac=lambda x: x)


def test_caller_may_be_in_any_gradient_mode() -> None:
    expected = least_squares(rosenbrock, vector(-1.2, 1.0))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = least_squares(rosenbrock, vector(-1.2, 1.0))
        assert torch.equal(result.x, expected.x)
        assert result.status is Status.converged
