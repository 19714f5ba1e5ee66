"""A third backend needs nothing but the protocol, and rules of whole matrices go to a backend that takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import CASES, Case, Twins, give_grads, params_of
from torch import Tensor

from descend import SGD, AdamW, FirstOrder, backends, warmup
from descend.backends.backend import Declined
from descend.backends.cpu import object_files
from descend.backends.eager import EagerBackend, EagerLaunch, EagerRows
from descend.core.signature import signature
from descend.ops import of_matrices


class RowByRow(EagerBackend):
    """Takes dense float64 parameters with rows, and runs rules on one row after the other."""

    name = "row-by-row"

    def __init__(self) -> None:
        self.launches = self.rows_made = 0

    def why_not(self, rule: Any, param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]) -> str | None:
        if rule is not None and (signature(rule).kind != "element" or signature(rule).summed):
            return "a rule of whole matrices, or with sums over whole tensors"
        return None if param.dtype == torch.float64 and param.dim() else "no rows of float64"

    why_not_rows = lambda self, rule, param, state: self.why_not(rule, param, None, state)  # noqa: E731

    def launch(self, rule: Callable[..., Any], *arguments: Any) -> EagerLaunch:
        def on_rows(*values: Any) -> Any:
            tensors, scalars = values[: 2 + states], values[2 + states :]
            results = [rule(*row, *scalars) for row in zip(*tensors, strict=True)]
            if not results:
                return rule(*values)
            return tuple(map(torch.stack, zip(*results, strict=True))) if states else torch.stack(results)

        states = len(signature(rule).state)
        self.launches += 1
        return super().launch(on_rows, *arguments)

    def rows(self, *arguments: Any) -> EagerRows:
        self.rows_made += 1
        return super().rows(*arguments)


@pytest.fixture
def row_by_row() -> Iterator[RowByRow]:
    backend = RowByRow()
    backends.register(backend)
    yield backend
    backends.unregister(backend)


@pytest.mark.parametrize("case", [case for case in CASES if not case.needs_sums()], ids=str)
def test_trajectories_on_a_third_backend_match_torch(case: Case, row_by_row: RowByRow) -> None:
    twins = Twins(case)
    for seed in range(8):
        twins.step(seed)
    twins.assert_equal()
    assert row_by_row.launches > 0
    names = [placement.backend for placement in twins.ours.backends()]
    assert names.count("row-by-row") == len(names) - 1  # but for the parameter without dimensions


def test_a_third_backend_can_be_asked_for(row_by_row: RowByRow) -> None:
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert AdamW([weight], backend="row-by-row").backends()[0].backend == "row-by-row"
    narrow = torch.zeros(3, requires_grad=True)
    narrow.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"backend='row-by-row' cannot run .*: no rows of float64"):
        AdamW([narrow], backend="row-by-row").step()


def test_sparse_gradients_go_to_a_third_backend(row_by_row: RowByRow) -> None:
    weight = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 2, dtype=torch.float64), (4, 2))
    SGD([weight], lr=0.25).step()
    assert weight[:, 0].tolist() == [1.0, 0.5, 1.0, 1.0]
    assert row_by_row.rows_made == 1


class Fussy(RowByRow):
    """Finds out late that it cannot compile a rule."""

    name = "fussy"

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[Any, str] = {}

    def why_not(self, rule: Any, param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]) -> str | None:
        return self.reasons.get(rule) or super().why_not(rule, param, grad, state)

    def launch(self, rule: Callable[..., Any], *arguments: Any) -> EagerLaunch:
        launch = super().launch(rule, *arguments)

        def compile_(wants_norm: bool, measures: bool = False) -> None:
            self.reasons[rule] = "a rule that it cannot compile"
            raise Declined(self.reasons[rule])

        launch.compile = compile_  # type: ignore[method-assign]
        return launch


def test_a_rule_that_a_backend_declines_late_goes_to_another() -> None:
    fussy = Fussy()
    backends.register(fussy)
    try:
        weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        weight.grad = torch.ones(3, dtype=torch.float64)
        optimizer = SGD([weight], lr=0.5)
        optimizer.step()
        assert weight.tolist() == [-0.5, -0.5, -0.5]
        assert fussy.launches == 1
        assert optimizer.backends()[0].backend == "cpu"
        warmup(AdamW([weight]))
        with pytest.raises(RuntimeError, match=r"backend='fussy' cannot run .*: a rule that it cannot compile"):
            SGD([weight], lr=0.5, backend="fussy").step()
        assert weight.tolist() == [-0.5, -0.5, -0.5]
    finally:
        backends.unregister(fussy)


@of_matrices
def normalized(param: Any, grad: Any, lr: Any) -> Any:
    """Gradient descent with a gradient of norm 1."""
    return param - lr * grad / (grad * grad).sum() ** 0.5


class Normalized(FirstOrder):
    """An optimizer with a rule of whole matrices."""

    rule = staticmethod(normalized)
    counts_steps = False

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)


def test_a_rule_of_matrices_has_a_backend_of_its_own() -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    optimizer = Normalized([weight], lr=5.0)
    assert signature(normalized).kind == "matrix"
    assert optimizer.backends()[0][1:] == ("matrix", "float32")
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[-3.0, 0.0], [0.0, -4.0]]))


def test_a_rule_of_matrices_refuses_single_rows() -> None:
    weight = torch.zeros(4, 2, requires_grad=True)
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2))
    with pytest.raises(RuntimeError, match="a rule of whole matrices cannot update single rows"):
        Normalized([weight], sparse="touched").step()
    assert not weight.any()


def row_averages(param: Any, grad: Any, row_avg: Any, lr: Any) -> Any:
    """One average a row instead of one an element."""
    row_avg = 0.5 * row_avg + 0.5 * (grad * grad).mean(-1, keepdim=True)
    return param - lr * grad / row_avg**0.5, row_avg


class RowAverages(FirstOrder):
    """An optimizer whose state has another shape than its parameter."""

    rule = staticmethod(of_matrices(row_averages))
    counts_steps = False

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    def state_shape(self, name: str, param: Tensor, group: Any) -> torch.Size:
        return torch.Size((*param.shape[:-1], 1))


def test_state_may_have_a_shape_of_its_own() -> None:
    weight = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = RowAverages([weight])
    expected, average = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for seed in range(4):
        give_grads(params_of(optimizer), seed)
        average = 0.5 * average + 0.5 * (weight.grad**2).mean(1, keepdim=True)
        expected = expected - 0.1 * weight.grad / average.sqrt()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(optimizer.state[weight]["row_avg"], average)
    again = RowAverages([weight])
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[weight]["row_avg"], average)


def test_saying_where_rules_run_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> int:
        raise AssertionError("something was compiled or loaded")

    def cube(param: Any, grad: Any, lr: Any) -> Any:
        return param - lr * grad * grad * grad

    class Cube(FirstOrder):
        rule = staticmethod(cube)
        counts_steps = False

    table, weight = torch.zeros(4, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2))
    monkeypatch.setattr(object_files, "load", never)
    optimizer = Cube([table, weight], {"lr": 0.1}, max_norm=1.0, sparse="touched")
    assert [placement.backend for placement in optimizer.backends()] == ["cpu", "cpu"]
