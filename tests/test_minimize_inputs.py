"""`minimize` takes structures, modules, parameters, and the caller's own derivatives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from minimize_cases import (
    QUICK,
    SOLVERS,
    Recorder,
    assert_alike,
    bowl,
    distance,
    each_method,
    each_solver,
    one_thread,  # noqa: F401
    quartic,
    rosenbrock,
    vector,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend import Progress, Result, Status, minimize

# Structures, dtypes and places.


class Two(NamedTuple):
    first: Tensor
    second: Tensor


STRUCTURES: dict[str, Callable[[], Any]] = {
    "float64": lambda: vector(3.0, -1.0),
    "float32": lambda: vector(3.0, -1.0).float(),
    "bfloat16": lambda: vector(3.0, -1.0).bfloat16(),
    "float16": lambda: vector(3.0, -1.0).half(),
    "complex64": lambda: torch.tensor([3 + 1j, 0j], dtype=torch.complex64),
    "complex128": lambda: torch.tensor([[3 + 1j, 0j]], dtype=torch.complex128),
    "0-dim": lambda: torch.tensor(3.0),
    "matrix": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "dict": lambda: {"b": vector(3.0), "a": vector(2.0, 2.0).float()},
    "ordered": lambda: OrderedDict(b=vector(3.0), a=vector(2.0, 2.0)),
    "list": lambda: [vector(3.0), vector(), vector(1.0, 2.0)],
    "tuple": lambda: (vector(3.0), torch.tensor(2.0)),
    "namedtuple": lambda: Two(vector(3.0), vector(2.0)),
    "nested": lambda: {"a": [vector(3.0), (torch.zeros(2, 2), {"c": vector(4.0)})], "b": vector(0.0).bfloat16()},
    "mixed": lambda: [vector(3.0), torch.tensor([1j]), vector(0.0, 2.0).bfloat16(), torch.zeros(2).double() * 1j],
}


@each_solver
@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_comes_back(name: str, options: dict[str, Any]) -> None:
    x0 = STRUCTURES[name]()
    leaves = pytree.tree_leaves(x0)
    if "bounds" in options and any(leaf.is_complex() for leaf in leaves):
        return
    kept = [leaf.clone() for leaf in leaves]

    def fun(tree: Any) -> Tensor:
        assert_alike(tree, x0)
        return distance(tree)

    result = minimize(fun, x0, **options)
    assert result.success
    assert_alike(result.x, x0)
    assert_alike(result.grad, x0)
    assert all(map(torch.equal, leaves, kept))
    assert float(distance(result.x)) < 1e-4  # half precision
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(result.x))


@each_solver
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing_to_minimize_is_solved(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    result = minimize(lambda x: x.sum() + 3, torch.zeros(shape), **options)
    assert (result.status, result.fun, result.grad_norm) == (Status.converged, 3.0, 0.0)
    assert result.x.shape == shape


@pytest.mark.parametrize("name", QUICK)
def test_single_precision_is_used_up(name: str) -> None:
    result = minimize(rosenbrock, vector(-1.2, 1.0).float(), **SOLVERS[name])
    assert result.success
    assert result.x.dtype == torch.float32
    assert float((result.x - 1).abs().max()) < 0.1  # 1e-4 of the gradient at the start


@each_solver
def test_start_may_require_grad_and_is_left_alone(options: dict[str, Any]) -> None:
    x0 = vector(3.0, -1.0).requires_grad_()
    result = minimize(bowl, x0 * 2, **options)
    assert result.success
    assert minimize(bowl, x0, **options).success
    assert (x0.grad, x0.tolist()) == (None, [3.0, -1.0])


@each_solver
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("is_made_inside", [False, True])
def test_gradient_modes_of_the_caller_do_not_matter(mode: Any, is_made_inside: bool, options: dict[str, Any]) -> None:
    expected = minimize(quartic, vector(3.0, 0.5), max_iter=50, **options)
    x0 = vector(3.0, 0.5)
    with mode():
        start = vector(3.0, 0.5) if is_made_inside else x0
        result = minimize(quartic, start, max_iter=50, **options)
        assert not torch.is_grad_enabled()
    assert torch.equal(result.x, expected.x)
    assert torch.is_grad_enabled()


@each_solver
def test_default_dtype_does_not_matter(options: dict[str, Any]) -> None:
    expected = minimize(rosenbrock, vector(-1.2, 1.0).float(), max_iter=30, **options)
    torch.set_default_dtype(torch.float64)
    result = minimize(rosenbrock, vector(-1.2, 1.0).float(), max_iter=30, **options)
    assert torch.equal(result.x, expected.x)


def test_fun_gets_a_point_it_may_keep() -> None:
    kept: list[Tensor] = []

    def fun(x: Tensor) -> Tensor:
        kept.append(x)
        return rosenbrock(x)

    recorder = Recorder(rosenbrock)
    minimize(fun, vector(-1.2, 1.0))
    minimize(recorder, vector(-1.2, 1.0))
    assert all(map(torch.equal, (x.detach() for x in kept), recorder.points))


# Modules and parameters.


class Line(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0], [-1.0]], dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    def forward(self) -> Tensor:
        return ((self.weight - 1) ** 2).sum() * 3 + (self.bias - self.weight.sum()) ** 2 + self.frozen.sum()


@each_solver
def test_module_is_minimized_in_place(options: dict[str, Any]) -> None:
    module = Line()
    before = list(module.parameters())
    result = minimize(lambda m: m(), module, **options)
    assert result.x is module
    assert list(map(id, module.parameters())) == list(map(id, before))
    assert result.success
    assert module().item() == result.fun == pytest.approx(2, abs=1e-9)
    assert list(result.grad) == ["weight", "bias"]
    assert all(param.grad is None and param.requires_grad != (param is module.frozen) for param in before)
    assert module.frozen.tolist() == [1.0, 1.0]


@each_solver
@pytest.mark.parametrize("kind", ["parameter", "list", "dict", "generator"])
def test_parameters_are_minimized_in_place(kind: str, options: dict[str, Any]) -> None:
    module = Line()
    trees: dict[str, Any] = {
        "parameter": module.weight,
        "list": list(module.parameters()),
        "dict": dict(module.named_parameters()),
        "generator": module.parameters(),
    }

    def fun(tree: Any) -> Tensor:
        assert any(leaf is module.weight for leaf in pytree.tree_leaves(tree))
        return module()

    result = minimize(fun, trees[kind], **options)
    assert result.success
    assert module().item() == result.fun
    assert any(leaf is module.weight for leaf in pytree.tree_leaves(result.x))
    assert module.weight.tolist() != [[3.0], [-1.0]]


@each_solver
def test_values_and_parameters_take_the_same_way(options: dict[str, Any]) -> None:
    values = minimize(rosenbrock, vector(-1.2, 1.0), max_iter=20, **options)
    parameters = minimize(rosenbrock, nn.Parameter(vector(-1.2, 1.0)), max_iter=20, **options)
    assert values.history == parameters.history


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_module_keeps_its_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    module = Line(dtype)
    result = minimize(lambda m: m(), module, **options)
    assert {param.dtype for param in module.parameters()} == {dtype}
    assert module().item() == result.fun
    assert result.fun < 2.5


def test_bounds_of_a_module_have_its_names() -> None:
    module = Line()
    result = minimize(lambda m: m(), module, bounds=(dict(weight=1.5, bias=None), dict(weight=None, bias=2.0)))
    assert result.success
    assert module.weight.tolist() == [[1.5], [1.5]]
    assert module.bias.item() == pytest.approx(2, rel=1e-12)


@each_solver
@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_parameters_are_at_the_best_point_after_an_error(
    number: int, error: type[BaseException], options: dict[str, Any]
) -> None:
    param, values = nn.Parameter(vector(-1.2, 1.0)), []

    def fun(x: Tensor) -> Tensor:
        if len(values) == number - 1:
            raise error("stop")
        values.append(rosenbrock(x).item())
        return rosenbrock(x)

    with pytest.raises(error, match="stop"):
        minimize(fun, param, **options)
    assert rosenbrock(param).item() == min(values, default=rosenbrock(vector(-1.2, 1.0)).item())


def test_parameters_are_at_the_best_point_after_an_error_in_the_callback() -> None:
    param = nn.Parameter(vector(-1.2, 1.0))

    def callback(progress: Progress) -> None:
        assert progress.x is param
        assert rosenbrock(param).item() == progress.fun
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        minimize(rosenbrock, param, callback=callback)
    assert rosenbrock(param).item() < rosenbrock(vector(-1.2, 1.0)).item()


def test_parameter_given_twice_is_one_or_an_error() -> None:
    param = nn.Parameter(vector(3.0, -1.0))
    try:
        result = minimize(lambda params: quartic(params[0]), [param, param])
    except ValueError as error:
        assert "twice" in str(error) or "duplicate" in str(error)
    else:
        assert result.history == minimize(quartic, vector(3.0, -1.0)).history


def test_functions_of_values_do_not_go_with_parameters() -> None:
    with pytest.raises(ValueError, match=r"jac and hvp .* nn.Parameter.*[Dd]etach x0"):
        minimize(bowl, nn.Parameter(vector(1.0)), jac=lambda x: 2 * (x - 1))


def test_sparse_gradients_are_gradients() -> None:
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    result = minimize(lambda m: bowl(m(torch.tensor([0, 2, 2]))), table)
    assert result.success
    assert float((table.weight[[0, 2]] - 1).abs().max()) < 1e-6


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
    """The same way up to rounding, which a valley makes larger."""
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
    places = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        return torch.cdist(x[None], places, p=3.0).sum() + x.square().sum()  # its backward has no backward

    with pytest.raises(RuntimeError, match=r"minimize: .*hvp"):
        minimize(fun, vector(1.0, 0.5), method)
    assert minimize(fun, vector(1.0, 0.5), "l-bfgs").success


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_linear_and_piecewise_functions_have_no_curvature(method: str) -> None:
    result = minimize(lambda x: x.relu().sum() + (1 - x).relu().sum(), vector(3.0, -2.0), method)
    assert result.success
    assert bool(((result.x >= 0) & (result.x <= 1)).all())
