"""Sparse gradients that cannot be taken are refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, assert_unmoved, leaves, params_of, snapshot
from processes import in_child, needs_fork
from sparse_cases import (
    Signs,
    coo,
    give_sparse_grads,
    one_thread,  # noqa: F401 a fixture
    random_sparse,
    table,
    versions,
)
from torch import Tensor

from descend import SGD, Adam, AdamW, FirstOrder, SparseAdam


def one_below(grad: Tensor) -> Tensor:
    return coo([*grad._indices()[0][:-1].tolist(), -1], grad._values(), grad.shape)


def one_too_many(grad: Tensor) -> Tensor:
    return coo([len(grad), *grad._indices()[0][1:].tolist()], grad._values(), grad.shape)


def far_away(grad: Tensor) -> Tensor:
    return coo([2**62, *grad._indices()[0][1:].tolist()], grad._values(), grad.shape)


def second_dimension(grad: Tensor) -> Tensor:
    indices = torch.tensor([[0, 1, 8], [3, 4, 0]])  # the last but one would be a place in the next row
    return coo(indices, torch.ones(3, dtype=grad.dtype), grad.shape)


def claims_to_be_coalesced(grad: Tensor) -> Tensor:
    return coo([-(2**40), 2, 3, 4, 5, 6], grad._values(), grad.shape, coalesced=True)


BAD_INDICES = [one_below, one_too_many, far_away, second_dimension, claims_to_be_coalesced]


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", BAD_INDICES, ids=lambda spoil: spoil.__name__)
def test_index_out_of_range_is_an_error_before_anything_moves(
    spoil: Callable[[Tensor], Tensor], backend: str, first: bool
) -> None:
    params = leaves([(9, 4), (7,), (9, 4)])
    for kind, options in (
        (SGD, dict(momentum=0.9)),
        (SGD, dict(sparse="touched")),
        (AdamW, dict(sparse="touched")),
        (SparseAdam, {}),
    ):
        named = [(f"table {i}", param) for i, param in enumerate(params)]
        groups = [{"params": named[:2]}, {"params": named[2:]}]
        if kind is SparseAdam:
            groups[0]["params"] = named[:1]
        optimizer = kind(groups, **options, backend=backend, nonfinite="skip")
        for param in params:
            param.grad = None
        give_sparse_grads(params_of(optimizer), 0)
        if not first:
            optimizer.step()
        before, was = snapshot(optimizer), versions(optimizer)
        params[2].grad = spoil(random_sparse((9, 4), 6, 1))
        with pytest.raises(IndexError, match=rf"{kind.__name__}: .*table 2.*out of range.*Nothing has moved"):
            optimizer.step()
        assert_unmoved(optimizer, before)
        assert versions(optimizer) == was
        assert optimizer.skipped_steps == 0
        assert not first or not optimizer.state
        params[2].grad = random_sparse((9, 4), 6, 2)
        optimizer.step()


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("kind", [Adam, AdamW, Signs])
def test_sparse_gradients_must_be_given_a_meaning(kind: type[FirstOrder], first: bool) -> None:
    params = leaves([(7,), (9, 4), (9, 4)])
    groups = [{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])]}]
    optimizer = kind(groups)
    if not first:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    before, was = snapshot(optimizer), versions(optimizer)
    params[0].grad, params[1].grad = torch.ones_like(params[0]), torch.ones_like(params[1])
    params[2].grad = random_sparse((9, 4), 6, 0)
    cure = "sparse='touched'" if kind is Signs else "sparse='exact' or sparse='touched'"
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    message = str(caught.value)
    assert f"{kind.__name__} does not support sparse gradients, please consider SparseAdam instead" in message
    assert cure in message
    assert "(c has" in message
    assert_unmoved(optimizer, before)
    assert versions(optimizer) == was


def test_torchs_words_are_in_ours() -> None:
    for name, kind in (("Adam", Adam), ("AdamW", AdamW)):
        for flags in (dict(foreach=False), dict(foreach=True), {}):
            (param,) = leaves([(9, 4)])
            param.grad = random_sparse((9, 4), 6, 0)
            with pytest.raises(RuntimeError) as theirs:
                getattr(torch.optim, name)([param], **flags).step()
            with pytest.raises(RuntimeError) as ours:
                kind([param], **flags).step()
            assert str(theirs.value).removeprefix(name).removeprefix("Adam").strip() in str(ours.value)


@pytest.mark.parametrize("meaning", ["dense", "Touched", "", True, 1, b"touched"], ids=repr)
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Signs])
def test_unknown_meaning_is_refused(kind: type[FirstOrder], meaning: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: sparse must be one of .*'touched'.*got {meaning!r}"):
        kind(leaves([(3,)]), sparse=meaning)


@pytest.mark.parametrize("kind", [SGD, Signs])
def test_exact_is_refused_where_there_is_no_closed_form(kind: type[FirstOrder]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: sparse='exact' is for Adam and AdamW.*'touched'"):
        kind(leaves([(3,)]), sparse="exact")


@pytest.mark.parametrize("meaning", [None, "touched"])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_differentiable_step_refuses_sparse_gradients(kind: type[FirstOrder], meaning: str | None) -> None:
    params = leaves([(7,), (9, 4)])
    optimizer = kind([{"params": params[:1]}, {"params": params[1:], "differentiable": True}], sparse=meaning)
    before, was = snapshot(optimizer), versions(optimizer)
    give_sparse_grads(params, 0)
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}.*differentiable.*sparse"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    assert versions(optimizer) == was
    assert not optimizer.state


def test_cpu_backend_refuses_what_it_cannot_run() -> None:
    params = [table(), table().detach().t().contiguous().t().requires_grad_()]
    optimizer = AdamW(params, sparse="touched", backend="cpu")
    before = snapshot(optimizer)
    give_sparse_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run .*\[1\]: .*not contiguous"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    optimizer.backend = "auto"
    optimizer.step()
    assert [placement.backend for placement in optimizer.backends()] == ["cpu", "foreach"]


@pytest.mark.parametrize("change", [dict(lr="fast"), dict(betas=(0.9, "high"))], ids=str)
def test_option_spoiled_between_steps_moves_nothing(change: dict[str, Any]) -> None:
    params = leaves([(7,), (9, 4)])
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}], sparse="touched")
    for first in (True, False):
        good = {key: optimizer.param_groups[1][key] for key in change}
        optimizer.param_groups[1].update(change)
        before, was = snapshot(optimizer), versions(optimizer)
        give_sparse_grads(params, 0)
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        assert_unmoved(optimizer, before)
        assert versions(optimizer) == was
        optimizer.param_groups[1].update(good)
        if first:
            optimizer.step()


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_freed_memory_of_a_gradient_is_an_error(backend: str) -> None:
    """In a child: reading it would end the process."""
    param, values = table(), torch.ones(3, 4, dtype=torch.float64)
    optimizer = SGD([param], lr=0.1, backend=backend)
    param.grad = coo([1, 2, 2], values, param.shape)
    values.untyped_storage().resize_(0)

    def is_refused() -> bool:
        try:
            optimizer.step()
        except RuntimeError as error:
            return "freed" in str(error)
        return False

    assert in_child(is_refused)


@pytest.mark.parametrize("options", [{}, dict(momentum=0.9), dict(sparse="touched"), dict(backend="eager")], ids=str)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_parameters_are_refused_before_anything_moves(layout: torch.layout, options: dict[str, Any]) -> None:
    (dense,) = leaves([(3,)])
    param = torch.eye(3).to_sparse(layout=layout).requires_grad_()
    optimizer = SGD([dense, param], lr=0.1, **options)
    dense.grad, param.grad = torch.ones_like(dense), param.detach().clone()
    before = dense.detach().clone()
    with pytest.raises(RuntimeError, match="gradients may be sparse, parameters may not"):
        optimizer.step()
    assert torch.equal(dense, before)
    assert torch.equal(param.to_dense(), torch.eye(3))
