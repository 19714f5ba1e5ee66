"""`minimize(..., batched=True, differentiable=True)`: derivatives of many solutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from minimize_cases import one_thread, vector  # noqa: F401
from torch import Tensor
from torch.autograd import gradcheck

from descend import minimize
from descend.second_order.solvers import implicit_function

TIGHT = 1e-12  # gradcheck's differences amplify an error of the solution by a million
COUNT = 3
CURVATURES = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)


def wells(x: Tensor, centers: Tensor, weight: Tensor) -> Tensor:
    """Not quadratic, strictly convex; centers belong to the problems, weight to all."""
    steps = x - centers
    return (steps @ CURVATURES * steps).sum(1) + weight.exp() * (x**4).sum(1)


def inputs() -> tuple[Tensor, Tensor]:
    centers = torch.tensor([[1.0, -2.0], [0.5, 0.25], [-1.5, 3.0]], dtype=torch.float64)
    return centers.requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def solved(centers: Tensor, weight: Tensor, **options: Any) -> Tensor:
    options = {"tol": TIGHT, **options}
    x0 = torch.zeros(COUNT, 2, dtype=torch.float64)
    return minimize(wells, x0, args=(centers, weight), batched=True, differentiable=True, **options).x


@pytest.fixture(params=["dense", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Hessians factorized, or multiplied by."""
    if request.param == "products":
        monkeypatch.setattr(implicit_function, "MAX_DENSE", -1)
    return str(request.param)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_match_differences(way: str) -> None:
    assert gradcheck(solved, inputs(), atol=1e-6, check_forward_ad=True)


def test_derivatives_with_bounds_match_differences(way: str) -> None:
    upper = vector(0.4, 0.3).requires_grad_()

    def solve(centers: Tensor, weight: Tensor, upper: Tensor) -> Tensor:
        return solved(centers, weight, bounds=(None, upper))

    x = solve(*inputs(), upper)
    assert 0 < int((x == upper).sum()) < x.numel()
    assert gradcheck(solve, (*inputs(), upper), atol=1e-6)


def test_derivatives_equal_those_of_single_problems() -> None:
    centers, weight = inputs()
    weights = vector(1.0, 2.0)
    found = torch.autograd.grad((solved(centers, weight) @ weights).sum(), (centers, weight))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(COUNT):
        args = centers[i : i + 1], weight
        x0 = torch.zeros(2, dtype=torch.float64)
        single = minimize(lambda x, *args: wells(x[None], *args)[0], x0, args=args, tol=TIGHT, differentiable=True)
        loss = loss + single.x @ weights
    for one, other in zip(found, torch.autograd.grad(loss, (centers, weight)), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


def test_given_gradients_are_used() -> None:
    def jac(x: Tensor, centers: Tensor, weight: Tensor) -> Tensor:
        return 2 * (x - centers) @ CURVATURES + 4 * weight.exp() * x**3

    assert gradcheck(lambda *args: solved(*args, jac=jac), inputs(), atol=1e-6)


def test_structures_get_derivatives() -> None:
    def fun(x: dict[str, Tensor], center: Tensor) -> Tensor:
        return (x["a"] - center).square().sum(1) + (x["b"] - 2 * center[:, 0]).square()

    center = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    x0 = {"a": torch.zeros(2, 1, dtype=torch.float64), "b": torch.zeros(2)}
    x = minimize(fun, x0, args=(center,), batched=True, differentiable=True).x
    assert [x["a"].shape, x["b"].shape, x["b"].dtype] == [(2, 1), (2,), torch.float32]
    (x["a"].sum() + x["b"] @ torch.tensor([3.0, 4.0])).backward()
    assert torch.allclose(center.grad, torch.tensor([[7.0], [9.0]], dtype=torch.float64))  # type: ignore[arg-type]


def test_best_start_gets_derivatives() -> None:
    shift = vector(0.1).requires_grad_()
    starts = torch.linspace(-5, 5, 7, dtype=torch.float64)[:, None]
    best = minimize(
        lambda x: (torch.cos(3 * (x - shift)) + 0.1 * (x - shift) ** 2).sum(1),
        starts,
        batched="best",
        differentiable=True,
    )
    best.x.sum().backward()
    assert torch.allclose(shift.grad, vector(1.0))  # type: ignore[arg-type]


def test_evaluations_are_counted() -> None:
    calls = []

    def fun(*args: Tensor) -> Tensor:
        calls.append(len(args[0]))
        return wells(*args)

    x0, args = torch.zeros(COUNT, 2, dtype=torch.float64), inputs()
    result = minimize(fun, x0, args=args, batched=True, differentiable=True)
    assert result.n_calls == len(calls)
    plain = minimize(wells, x0, args=args, batched=True)
    assert torch.equal(result.n_eval, plain.n_eval + 1)
    assert torch.equal(result.x, plain.x)
    assert not plain.x.requires_grad
    limited = minimize(wells, x0, args=args, batched=True, differentiable=True, max_eval=4)
    assert int(limited.n_eval.max()) <= 4
    with torch.no_grad():
        assert not minimize(wells, x0, args=args, batched=True, differentiable=True).x.requires_grad


def test_no_problems_are_solved() -> None:
    p = vector(1.0).requires_grad_()
    x = minimize(lambda x: (x - p).square().sum(1), torch.zeros(0, 1), batched=True, differentiable=True).x
    assert x.shape == (0, 1)


@pytest.mark.parametrize("kind", ["unfinished", "singular", "kink", "nan"])
def test_problems_without_derivatives_do_not_spoil_others(kind: str, way: str) -> None:
    if kind == "singular" and way == "products":
        return  # conjugate gradients solve all problems at once
    theta = vector(1.0, 2.0, 3.0).requires_grad_()
    options: dict[str, Any] = {}
    x0 = torch.zeros(3, 2, dtype=torch.float64)
    if kind == "kink":
        options["bounds"] = (None, torch.tensor([[9.0], [2.0], [9.0]], dtype=torch.float64))
    elif kind == "unfinished":
        options["callback"] = lambda progress: torch.tensor([False, True, False])

    def fun(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
        squares = (x - theta[:, None]).square()
        valley = (x.sum(1) - theta).square()
        values = (squares + squares.square()).sum(1)
        values = torch.where((positions == 1) & (kind == "singular"), valley, values)
        return values + torch.where((positions == 1) & (kind == "nan"), torch.nan, 0.0)

    result = minimize(fun, x0, args=(theta, torch.arange(3)), batched=True, differentiable=True, **options)
    assert result.success.tolist() == [True, kind in ("singular", "kink"), True]
    with pytest.raises(RuntimeError, match="minimize: the solution cannot be differentiated: problem 1: "):
        result.x[1].sum().backward(retain_graph=True)
    result.x[[0, 2]].sum().backward(retain_graph=True)
    assert torch.allclose(theta.grad, vector(2.0, 0.0, 2.0))  # type: ignore[arg-type]
