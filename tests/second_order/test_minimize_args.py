"""`minimize(..., args=...)` passes further arguments to the caller's functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from minimize_cases import vector
from torch import Tensor, nn

from descend import minimize


def bowl(x: Tensor, center: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (x - center).square().sum()


@pytest.mark.parametrize("method", ["gd", "bfgs", "l-bfgs", "newton-cg", "newton"])
def test_args_reach_fun(method: Any) -> None:
    center = vector(1.0, -2.0, 3.0)
    assert torch.allclose(minimize(bowl, vector(0.0, 0.0, 0.0), method, args=(center, 3.0)).x, center)


def test_args_reach_jac_and_hvp() -> None:
    seen = []

    def jac(x: Tensor, center: Tensor, scale: float) -> Tensor:
        seen.append("jac")
        return 2 * scale * (x - center)

    def hvp(x: Tensor, v: Tensor, center: Tensor, scale: float) -> Tensor:
        seen.append("hvp")
        return 2 * scale * v

    center = vector(1.0, -2.0)
    result = minimize(bowl, vector(0.0, 0.0), "newton", jac=jac, hvp=hvp, args=(center, 3.0))
    assert torch.allclose(result.x, center)
    assert set(seen) == {"jac", "hvp"}


def test_args_with_value_and_gradient() -> None:
    def fun(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        return bowl(x, center), 2 * (x - center)

    assert torch.allclose(minimize(fun, vector(0.0), jac=True, args=(vector(4.0),)).x, vector(4.0))


def test_args_follow_a_module() -> None:
    module = nn.Linear(2, 1)
    options = {"weight": torch.ones(1, 2)}
    result = minimize(lambda m, o, bias: bowl(m.weight, o["weight"]) + bowl(m.bias, bias), module, args=(options, 2.0))
    assert result.x is module
    assert torch.allclose(module.weight, options["weight"], atol=1e-4)
    assert torch.allclose(module.bias, torch.tensor([2.0]), atol=1e-4)


@pytest.mark.parametrize("args", [vector(1.0), [vector(1.0)], None, 3])
def test_args_must_be_a_tuple(args: Any) -> None:
    with pytest.raises(TypeError, match=r"minimize: args must be a tuple .* got .* Write args=\(value,\)"):
        minimize(bowl, vector(0.0), args=args)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
@pytest.mark.parametrize("batched", [False, True])
def test_transforms_of_functions_are_refused(transform: Any, batched: bool) -> None:
    def solution(center: Tensor) -> Tensor:
        x0 = torch.zeros(2, 1, dtype=torch.float64) if batched else vector(0.0)
        return minimize(lambda x: (x - center).square().sum(-1), x0, batched=batched, differentiable=True).x.sum()

    with pytest.raises(RuntimeError, match=r"minimize: torch\.func cannot transform a solver.*batched=True"):
        transform(solution)(torch.tensor([1.0]) if transform is torch.vmap else torch.tensor(1.0))
