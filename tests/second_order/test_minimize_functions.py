"""`minimize` takes the caller's own derivatives and callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from minimize_cases import (
    QUICK,
    SOLVERS,
    Recorder,
    assert_result_is_true,
    assert_same_structure,
    bowl,
    distance,
    each_method,
    each_solver,
    one_thread,  # noqa: F401
    rosenbrock,
    slope,
    vector,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend import Progress, Result, Status, minimize

# Functions for gradient and curvature.


def rosenbrock_slope(x: Tensor) -> Tensor:
    """As somebody would write it who knows autograd: it needs gradients to be enabled."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(rosenbrock(leaf), leaf)[0]


def rosenbrock_product(x: Tensor, v: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(rosenbrock(leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad, leaf, v)[0]


def into(buffer: Tensor, fun: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that always returns the same memory."""

    def filled(*arguments: Tensor) -> Tensor:
        return buffer.copy_(fun(*arguments))

    return filled


def assert_alike_in_value(ours: Result, theirs: Result) -> None:
    """The same points up to rounding, which grows along the valley."""
    assert ours.n_hvp > 0
    assert abs(ours.n_iter - theirs.n_iter) <= 2
    for a, b in zip(ours.history[:8], theirs.history[:8], strict=True):
        assert a.fun == pytest.approx(b.fun, rel=1e-6)


@each_solver
@pytest.mark.parametrize("kind", ["callable", "True", "buffer"])
def test_own_gradient_takes_the_same_way_as_autograd(kind: str, options: dict[str, Any]) -> None:
    x0 = vector(-1.2, 1.0, 0.5)
    expected = minimize(rosenbrock, x0, max_iter=30, **options)
    hvp: Any = rosenbrock_product if "newton" in options.get("method", "") else None
    if kind == "True":
        result = minimize(lambda x: (rosenbrock(x), rosenbrock_slope(x)), x0, max_iter=30, jac=True, hvp=hvp, **options)
    else:
        jac = rosenbrock_slope if kind == "callable" else into(torch.zeros_like(x0), rosenbrock_slope)
        result = minimize(rosenbrock, x0, max_iter=30, jac=jac, hvp=hvp, **options)
    if hvp is None:
        assert result.history == expected.history
    else:  # products are summed in another order
        assert_alike_in_value(result, expected)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
@pytest.mark.parametrize("is_buffer", [False, True])
def test_own_products_take_the_same_way_as_autograd(method: str, is_buffer: bool) -> None:
    x0 = vector(-1.2, 1.0, 0.5)
    expected = minimize(rosenbrock, x0, method, max_iter=30)
    hvp = into(torch.zeros_like(x0), rosenbrock_product) if is_buffer else rosenbrock_product
    result = minimize(rosenbrock, x0, method, max_iter=30, hvp=hvp)
    assert_alike_in_value(result, expected)


@each_method
def test_own_gradient_may_be_a_function_of_torch_operations(method: str) -> None:
    # Then Newton's methods differentiate it once more.
    result = minimize(quartic_of_values, vector(3.0, 2.0), method, jac=lambda x: 4 * (x - 1) ** 3)
    assert result.success
    assert result.n_iter < 40


def quartic_of_values(x: Tensor) -> Tensor:
    return ((x - 1) ** 4).sum()


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_own_gradient_that_autograd_cannot_follow_needs_products(method: str) -> None:
    # Taken for constant, its curvature would be zero, and Newton's method silently gradient descent.
    with pytest.raises(RuntimeError, match="hvp"):
        minimize(rosenbrock, vector(-1.2, 1.0), method, jac=rosenbrock_slope, max_iter=20)


def test_own_gradient_of_a_structure_is_found_by_name() -> None:
    result = minimize(
        lambda x: (x["a"] - 1) ** 2 + (x["b"] - 2) ** 2,
        dict(a=torch.tensor(0.0), b=torch.tensor(0.0)),
        jac=lambda x: dict(b=2 * (x["b"] - 2), a=2 * (x["a"] - 1)),
    )
    assert result.success
    assert (float(result.x["a"]), float(result.x["b"])) == pytest.approx((1, 2), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_own_gradient_may_have_another_dtype(dtype: torch.dtype) -> None:
    def jac(x: Tensor) -> Tensor:
        return (2 * (x - 1)).to(torch.float64 if dtype == torch.float32 else torch.float32)

    result = minimize(bowl, vector(3.0, 2.0).to(dtype), jac=jac)
    assert result.success
    assert result.x.dtype == result.grad.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(jac=lambda x: x.sum()), ValueError, "gradient from jac must have .* shapes of x0"),
        (dict(jac=lambda x: None), ValueError, "gradient from jac must have .* shapes of x0"),
        (dict(jac=lambda x: x.numpy()), (TypeError, ValueError), "gradient from jac must .*tensor"),
        (dict(jac="2-point"), TypeError, "jac must be .*got '2-point'"),
        (dict(jac=True), (TypeError, ValueError), "jac=True.*value.*gradient"),
        (dict(hvp=lambda x, v: v.sum(), method="newton"), ValueError, "product from hvp must have .* shapes of x0"),
        (dict(hvp=3, method="newton-cg"), TypeError, "hvp must be .*got 3"),
        (dict(callback=3), TypeError, "callback must be .*got 3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_own_functions_that_do_not_fit_are_errors(arguments: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=rf"minimize: .*{words}"):
        minimize(bowl, vector(3.0, 2.0), **arguments)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_function_that_cannot_be_differentiated_twice_needs_products(method: str) -> None:
    def fun(x: Tensor) -> Tensor:
        margin = nn.functional.multi_margin_loss(x[None], torch.tensor([0]))  # its backward has no backward
        return margin + x.square().sum()

    with pytest.raises(RuntimeError, match=r"minimize: .*hvp"):
        minimize(fun, vector(1.0, 0.5), method)
    assert minimize(fun, vector(1.0, 0.5), "l-bfgs").success


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_linear_and_piecewise_functions_have_no_curvature(method: str) -> None:
    result = minimize(lambda x: x.relu().sum() + (1 - x).relu().sum(), vector(3.0, -2.0), method)
    assert result.success
    assert bool(((result.x >= 0) & (result.x <= 1)).all())


# The callback.


@each_solver
def test_callback_sees_every_iteration(options: dict[str, Any]) -> None:
    seen: list[Progress] = []
    result = minimize(rosenbrock, vector(-1.2, 1.0), callback=seen.append, max_iter=15, **options)
    assert [progress.n_iter for progress in seen] == list(range(1, result.n_iter + 1))
    for progress, iteration in zip(seen, result.history[1:], strict=True):
        assert (progress.fun, progress.grad_norm) == (iteration.fun, iteration.grad_norm)
        assert (progress.n_eval, progress.n_hvp) == (iteration.n_eval, iteration.n_hvp)
        assert rosenbrock(progress.x).item() == progress.fun
        assert torch.equal(progress.grad, slope(rosenbrock, progress.x))


@pytest.mark.parametrize("name", QUICK)
def test_callback_sees_the_last_iteration_too(name: str) -> None:
    seen: list[Progress] = []
    result = minimize(rosenbrock, vector(-1.2, 1.0), callback=seen.append, **SOLVERS[name])
    assert result.success
    assert len(seen) == result.n_iter
    assert torch.equal(seen[-1].x, result.x)


def test_callback_sees_the_structure_of_x0() -> None:
    x0 = {"a": [vector(3.0), torch.zeros(2)]}
    seen: list[Progress] = []
    minimize(distance, x0, callback=seen.append, tol=1e-12)
    assert seen
    assert_same_structure(seen[0].x, x0)
    assert_same_structure(seen[0].grad, x0)


def stop(progress: Progress) -> bool:
    return progress.n_iter == 2


def raises_stop(progress: Progress) -> None:
    if progress.n_iter == 2:
        raise StopIteration


@each_solver
@pytest.mark.parametrize("callback", [stop, raises_stop, lambda p: torch.tensor(p.n_iter == 2)], ids=["a", "b", "c"])
def test_callback_stops(callback: Callable[[Progress], Any], options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(rosenbrock), vector(-1.2, 1.0)
    result = minimize(recorder, x0, callback=callback, **options)
    assert (result.status, result.n_iter) == (Status.stopped_by_callback, 2)
    assert_result_is_true(result, recorder, x0, 1e-6)


def test_callback_may_use_autograd() -> None:
    def callback(progress: Progress) -> None:
        x = progress.x.clone().requires_grad_()
        rosenbrock(x).backward()
        assert torch.equal(x.grad, progress.grad)

    assert minimize(rosenbrock, vector(-1.2, 1.0), callback=callback).success


def overwrite(progress: Progress) -> None:
    """Spoil whatever a callback gets."""
    for leaf in pytree.tree_leaves((progress.x, progress.grad)):
        leaf.detach().fill_(7.0)


@each_solver
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": x[:1].clone(), "b": x[1:].clone()}], ids=["x", "dict"])
def test_callback_that_writes_changes_nothing(wrap: Callable[[Tensor], Any], options: dict[str, Any]) -> None:
    def fun(tree: Any) -> Tensor:
        return rosenbrock(torch.cat(pytree.tree_leaves(tree)))

    x0 = wrap(vector(-1.2, 1.0))
    result = minimize(fun, x0, max_iter=20, **options, callback=overwrite)
    expected = minimize(fun, x0, max_iter=20, **options)
    assert result.history == expected.history
    for ours, theirs in ((result.x, expected.x), (result.grad, expected.grad)):
        assert all(map(torch.equal, pytree.tree_leaves(ours), pytree.tree_leaves(theirs)))
    assert result.fun == fun(result.x).item()


@each_method
def test_parameters_that_the_callback_writes_to_are_restored(method: str) -> None:
    def spoil(progress: Progress) -> None:
        progress.x.detach().fill_(7.0)

    param, other = nn.Parameter(vector(-1.2, 1.0)), nn.Parameter(vector(-1.2, 1.0))
    result = minimize(rosenbrock, param, method, max_iter=20, callback=spoil)
    expected = minimize(rosenbrock, other, method, max_iter=20)
    assert [entry.fun for entry in result.history] == [entry.fun for entry in expected.history]
    assert torch.equal(param, other)
    assert result.fun == rosenbrock(param).item()


@pytest.mark.slow  # torch.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch.compile reads
@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_curvature_of_a_compiled_function_is_not_taken_for_zero(method: str) -> None:
    def function(x: Tensor) -> Tensor:
        return ((x - torch.arange(3.0)) ** 4).sum() + (x**2).sum()

    start = torch.zeros(3, dtype=torch.float64)
    expected = minimize(function, start, method)
    found = minimize(torch.compile(function, backend="aot_eager"), start, method)
    assert found.success
    assert found.n_iter == expected.n_iter
    torch.testing.assert_close(found.x, expected.x)
