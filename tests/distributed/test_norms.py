"""Norms and clipping of DTensors, against torch's functions on the whole tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded import CLOSE, LAYOUTS, Put, is_here, local, values, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from descend import SGD, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

ORDERS = (1.0, 2.0, 3.0, math.inf)


def partial(tensor: Tensor) -> Tensor:
    """A DTensor whose parts, unequal ones, add up to ``tensor``."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    rank, size = mesh.get_rank(), mesh.size()
    share = tensor * (rank + 1) / (size * (size + 1) / 2)
    return DTensor.from_local(share, mesh, [Partial()], run_check=False)


def with_partial(put: Put) -> Put:
    return lambda index, tensor: partial(tensor) if index % 3 == 1 else put(index, tensor)


def graded(grads: Sequence[Tensor], put: Put | None = None) -> list[Tensor]:
    """Parameters with gradients; of DTensors those of the same layout."""
    put = put or (lambda index, tensor: tensor)
    params = []
    for index, grad in enumerate(grads):
        placed = put(index, grad.clone())
        param = torch.nn.Parameter(torch.zeros_like(placed))
        param.grad = placed
        params.append(param)
    return params


def scaled(factor: float) -> list[Tensor]:
    return [value * factor for value in values(1)]


def vector_norm(order: float) -> Tensor:
    """The norm of the gradients as one vector; torch's ``get_total_norm`` takes no empty tensor with ``inf``."""
    return torch.linalg.vector_norm(torch.cat([value.flatten() for value in scaled(1.0)]), order)


def check_norms(put: Put) -> list[float]:
    norms = []
    for factor in (1.0, 1e200, 1e-140, 0.0):
        for order in ORDERS:
            norm = get_total_norm([param.grad for param in graded(scaled(factor), put)], order)
            expected = vector_norm(order) * factor
            assert type(norm) is Tensor
            torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0)
            norms.append(norm.item())
    for order in ORDERS:
        ours, theirs = graded(scaled(1.0), put), graded(scaled(1.0))
        norm = clip_grad_norm_(ours, 0.5, order)
        torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, vector_norm(order))
        assert_same_grads(ours, theirs)
        norms.append(norm.item())
    ours, theirs = graded(scaled(1.0), put), graded(scaled(1.0))
    total = get_total_norm([param.grad for param in ours])
    clip_grads_with_norm_(ours, 0.25, total)
    torch.nn.utils.clip_grads_with_norm_(theirs, 0.25, total)
    assert_same_grads(ours, theirs)
    clip_grad_value_(ours, 0.01)
    torch.nn.utils.clip_grad_value_(theirs, 0.01)
    assert_same_grads(ours, theirs)
    return norms


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, **CLOSE)


def assert_same_grads(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if is_here(one):
            assert_close(whole(one.grad), other.grad)


def norms_of(rank: int, layout: str) -> list[float]:
    put = LAYOUTS[layout][1]()
    return check_norms(put)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_those_of_the_whole_tensors(layout: str) -> None:
    first, *others = on_ranks(LAYOUTS[layout][0], norms_of, layout)
    assert all(other == first for other in others)  # bit for bit


def partial_norms(rank: int, layout: str) -> list[float]:
    return check_norms(with_partial(LAYOUTS[layout][1]()))


@pytest.mark.parametrize("layout", ["rows of 3", "several meshes"])
def test_partial_gradients_are_reduced(layout: str) -> None:
    first, *others = on_ranks(LAYOUTS[layout][0], partial_norms, layout)
    assert all(other == first for other in others)


def with_nan_on_last_rank(rank: int, layout: str) -> list[Any]:
    put = LAYOUTS[layout][1]()
    params = graded(scaled(1.0), put)
    last = torch.distributed.get_world_size() - 1
    if rank == last:
        local(params[0].grad).fill_(math.nan)
    found: list[Any] = []
    for order in ORDERS:
        found.append(str(get_total_norm([param.grad for param in params], order).item()))
        before = [local(param.grad).clone() for param in params]
        try:
            clip_grad_norm_(params, 1.0, order, error_if_nonfinite=True)
        except RuntimeError as error:
            found.append(str(error))
        assert all(torch.equal(local(p.grad).nan_to_num(), b.nan_to_num()) for p, b in zip(params, before, strict=True))
    return found


@pytest.mark.parametrize("layout", ["rows of 3", "copies of rows", "several meshes"])
def test_nan_on_one_rank_is_known_to_all(layout: str) -> None:
    first, *others = on_ranks(LAYOUTS[layout][0], with_nan_on_last_rank, layout)
    assert all(other == first for other in others)
    assert first[::2] == ["nan"] * len(ORDERS)
    assert all("non-finite" in text for text in first[1::2])
    assert len(first) == 2 * len(ORDERS)


def large(rank: int) -> list[Any]:
    """Norms and steps of a tensor that kernels share among threads."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    value = torch.randn(400_003, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        placed = distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        param = torch.nn.Parameter(placed.clone())
        param.grad = placed.clone()
        optimizer = SGD([param], lr=0.1, momentum=0.9, max_norm=1.0)
        norms = [get_total_norm([param.grad], order).item() for order in ORDERS]
        optimizer.step()
        optimizer.step()
        found.append((norms, optimizer.grad_norm, local(param).numpy().tobytes()))
    torch.set_num_threads(1)
    assert found[0] == found[1]
    return found[0][:2]


def test_number_of_threads_changes_no_bit() -> None:
    one, other = on_ranks(2, large)
    assert one == other
