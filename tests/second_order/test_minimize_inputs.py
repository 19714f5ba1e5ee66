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
    assert_same_structure,
    bowl,
    distance,
    each_solver,
    one_thread,  # noqa: F401
    quartic,
    rosenbrock,
    vector,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend import Progress, Status, minimize

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
        assert_same_structure(tree, x0)
        return distance(tree)

    result = minimize(fun, x0, **options)
    assert result.success
    assert_same_structure(result.x, x0)
    assert_same_structure(result.grad, x0)
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
    with pytest.raises(ValueError, match=r"derivatives .* nn.Parameter.*[Dd]etach x0, or leave jac and hvp out"):
        minimize(bowl, nn.Parameter(vector(1.0)), jac=lambda x: 2 * (x - 1))


def test_sparse_gradients_are_gradients() -> None:
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    result = minimize(lambda m: bowl(m(torch.tensor([0, 2, 2]))), table)
    assert result.success
    assert float((table.weight.detach()[[0, 2]] - 1).abs().max()) < 1e-6
