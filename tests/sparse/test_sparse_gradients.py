"""Sparse gradients of any origin; they are read, never written and never kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS
from sparse_cases import (
    ADAMW,
    TOUCHED,
    ByHand,
    Touched,
    coo,
    one_thread,  # noqa: F401 a fixture
    random_sparse,
    table,
)
from torch import Tensor, nn

from descend import SGD, AdamW


class Model(nn.Module):
    """One table, read in one of the ways that torch has."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.table = kind(12, 4, sparse=True, dtype=torch.float64, **options)
        self.read = forward

    def loss(self, words: Tensor) -> Tensor:
        out = self.read(self.table, words)
        return (out * torch.linspace(-1, 1, out.shape[-1], dtype=torch.float64)).square().mean()


MODELS: dict[str, Callable[[], Model]] = {
    "embedding": lambda: Model(lambda t, w: t(w), nn.Embedding),
    "used several times": lambda: Model(lambda t, w: t(w) * t(w.flip(0)) + t(w[:1]), nn.Embedding),
    "padding": lambda: Model(lambda t, w: t(w), nn.Embedding, padding_idx=3),
    "max_norm": lambda: Model(lambda t, w: t(w), nn.Embedding, max_norm=0.7),
    "sum": lambda: Model(lambda t, w: t(w), nn.EmbeddingBag, mode="sum"),
    "mean": lambda: Model(lambda t, w: t(w), nn.EmbeddingBag, mode="mean"),
    "offsets": lambda: Model(lambda t, w: t(w.flatten(), torch.tensor([0, 3, 3, 7])), nn.EmbeddingBag, mode="mean"),
    "weights": lambda: Model(
        lambda t, w: t(w, per_sample_weights=torch.linspace(-1, 2, w.numel()).double().view_as(w)),
        nn.EmbeddingBag,
        mode="sum",
    ),
    "gathered": lambda: Model(lambda t, w: torch.gather(t.weight, 0, w, sparse_grad=True), nn.Embedding),
    "selected": lambda: Model(lambda t, w: t.weight.square()[:1] + t(w), nn.Embedding),  # dense + sparse: dense
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backwards", [1, 3], ids=["one backward", "three backwards"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_embeddings_are_taken(kind: str, backwards: int, backend: str) -> None:
    model = MODELS[kind]()
    weight = model.table.weight
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1, sparse="touched", backend=backend)
    expected = ByHand(weight, torch.optim.AdamW, dict(lr=0.1, weight_decay=0.1))
    for seed in range(4):
        optimizer.zero_grad()
        for part in range(backwards):
            random = torch.Generator().manual_seed(10 * seed + part)
            model.loss(torch.randint(12, (5, 4), generator=random)).backward()
        expected.table = weight.detach().clone()  # max_norm writes the weight when it is read
        grad = weight.grad if weight.grad.is_sparse else weight.grad.to_sparse(1)
        assert weight.grad.is_sparse == (kind != "selected")
        expected.step(grad)
        optimizer.step()
    if kind == "selected":  # rows of zeros in a dense gradient are touched, other than by hand
        assert torch.isfinite(weight).all()
    else:
        expected.assert_equal(optimizer, weight)


def transposed_indices(grad: Tensor) -> Tensor:
    indices = grad._indices().t().contiguous().t()
    return coo(indices, grad._values(), grad.shape)


def strided_values(grad: Tensor) -> Tensor:
    values = torch.stack([grad._values(), grad._values()], -1)[..., 1]
    return coo(grad._indices(), values, grad.shape)


def transposed_values(grad: Tensor) -> Tensor:
    return coo(grad._indices(), grad._values().t().contiguous().t(), grad.shape)


def expanded_values(grad: Tensor) -> Tensor:
    return coo(grad._indices(), torch.tensor(0.3, dtype=torch.float64).expand(grad._nnz(), 4), grad.shape)


def negated_values(grad: Tensor) -> Tensor:
    return coo(grad._indices(), torch._neg_view(grad._values()), grad.shape)


def with_graph(grad: Tensor) -> Tensor:
    return coo(grad._indices(), grad._values().requires_grad_() * 2, grad.shape)


def multiplied(grad: Tensor) -> Tensor:
    return grad * 3 + grad


ORIGINS = [
    lambda grad: grad,
    lambda grad: grad.coalesce(),
    lambda grad: grad.coalesce().to_dense().to_sparse(2),
    transposed_indices,
    strided_values,
    transposed_values,
    expanded_values,
    negated_values,
    with_graph,
    multiplied,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ORIGINS, ids=range(len(ORIGINS)))
def test_gradients_in_any_memory_are_taken(change: Callable[[Tensor], Tensor], backend: str) -> None:
    param = table()
    optimizer = AdamW([param], lr=0.1, sparse="touched", backend=backend, max_norm=1e9)
    expected = ByHand(param, torch.optim.AdamW, dict(lr=0.1))
    for seed in range(3):
        param.grad = change(random_sparse(param.shape, 6, seed))
        expected.step(param.grad.detach())
        optimizer.step()
    expected.assert_equal(optimizer, param)


def test_gradient_that_is_a_view_of_the_parameter_is_read_before_it_moves() -> None:
    ours, theirs = table(), table()
    optimizers = SGD([ours], lr=0.1), torch.optim.SGD([theirs], lr=0.1)
    for _ in range(3):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            value = param.detach()[:3]
            param.grad = coo([1, 2, 0], value if param is ours else value.clone(), param.shape)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [TOUCHED[0], ADAMW], ids=str)
def test_gradients_are_left_as_they_were(case: Touched, backend: str, dtype: torch.dtype) -> None:
    param = table(dtype=dtype)
    optimizer = case.ours([param], **case.options, sparse="touched", backend=backend, max_norm=0.1)
    for seed in range(4):
        param.grad = grad = random_sparse(param.shape, 6, seed, dtype)
        if seed == 2:
            param.grad = grad = grad.coalesce()
        copies = grad._indices().clone(), grad._values().clone()
        version, moved = grad._version, param._version
        facts = grad.is_coalesced(), grad._nnz(), grad._values().data_ptr(), grad._values()._version
        optimizer.step()
        assert param.grad is grad
        assert grad._version == version
        assert (grad.is_coalesced(), grad._nnz(), grad._values().data_ptr(), grad._values()._version) == facts
        assert torch.equal(grad._indices(), copies[0])
        assert torch.equal(grad._values(), copies[1])
        assert param._version > moved
    pointers = {param.data_ptr(), grad._values().data_ptr(), grad._indices().data_ptr()}
    state = [value for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    assert not pointers & {value.data_ptr() for value in state}


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_update(backend: str) -> None:
    weight = table()
    loss = weight.square().sum()
    weight.grad = random_sparse(weight.shape, 3, 0)
    SGD([weight], lr=0.1, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_watched_memory(param: Tensor, rows: list[int], value: float = 1.0) -> tuple[Tensor, weakref.ref[Any]]:
    """A sparse gradient, and a reference that dies with its values' memory."""
    memory = np.full((len(rows), *param.shape[1:]), value)
    return coo(rows, torch.from_numpy(memory), param.shape), weakref.ref(memory)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["stepped", "skipped", "raised", "refused"])
def test_gradients_are_not_kept_alive(how: str, backend: str) -> None:
    params = [table(), table()]
    nonfinite = {"skipped": "skip", "raised": "raise"}.get(how, "step")
    optimizer = AdamW(params, sparse="touched", backend=backend, nonfinite=nonfinite)
    for param in params:
        param.grad = random_sparse(param.shape, 3, 0)
    optimizer.step()  # makes the plan, which is kept
    params[0].grad, memory = in_watched_memory(params[0], [1, 1, 4])
    bad = torch.nan if how in ("skipped", "raised") else 1.0
    params[1].grad = coo([2, 99] if how == "refused" else [2, 3], torch.full((2, 4), bad).double(), (9, 4))
    if how in ("raised", "refused"):
        with pytest.raises((FloatingPointError, IndexError)):
            optimizer.step()
    else:
        optimizer.step()
    assert memory() is not None
    params[0].grad = None
    assert memory() is None
