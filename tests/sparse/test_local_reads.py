"""What a replica reads for itself is put back at the next step, unless the rows have a gradient then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS
from exact_cases import OPTIONS, assert_current, embedding, embedding_behind, random_tables, snapshot, train
from torch import Tensor, nn

from descend import AdamW


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch wakes all threads for a handful of numbers: minutes on a busy machine."""
    torch.set_num_threads(1)


def replica_behind(**options: Any) -> tuple[nn.Embedding, AdamW, Tensor]:
    """Return a replicated embedding whose rows 1 to 3 are 30 steps behind, its optimizer, and what they should be."""
    layer, optimizer, expected = embedding_behind(**options)
    optimizer.attach(layer, replicated=True)
    return layer, optimizer, expected


def step_on_the_first_row(layer: nn.Embedding, optimizer: AdamW) -> Any:
    train(optimizer, layer, [0])
    return snapshot(optimizer)


READS: list[Callable[[nn.Embedding], Any]] = [
    lambda layer: layer(torch.tensor([3, 1, 1, 5])),
    lambda layer: [layer(torch.tensor([row])) for row in (2, 1, 2)],
    lambda layer: layer.state_dict(),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_reads_leave_no_trace(mode: Any, read: Callable[[nn.Embedding], Any], backend: str) -> None:
    (untouched, reference, _), (layer, optimizer, _) = (replica_behind(backend=backend) for _ in range(2))
    before = layer.weight.detach().clone()
    with mode():
        read(layer)
    assert not torch.equal(layer.weight, before)
    expected, found = step_on_the_first_row(untouched, reference), step_on_the_first_row(layer, optimizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_with_a_gradient_stay() -> None:
    """Both catch up between the same two steps: one because it reads the row, the other because of the gradient."""
    pair = [replica_behind()[:2] for _ in range(2)]
    for index, (layer, _) in enumerate(pair):
        if index == 0:
            layer(torch.tensor([1, 2]))
        values = torch.ones(2, 2, dtype=torch.float64)
        layer.weight.grad = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), values, layer.weight.shape)
    snapshots = []
    for _, optimizer in pair:
        optimizer.step()
        snapshots.append(snapshot(optimizer))
    torch.testing.assert_close(snapshots[0], snapshots[1], rtol=0, atol=0)


def test_settling_starts_from_what_all_ranks_have() -> None:
    (untouched, reference, _), (layer, optimizer, _) = (replica_behind() for _ in range(2))
    train(reference, untouched, [0])
    layer(torch.tensor([1, 2]))
    train(optimizer, layer, [0])
    layer(torch.tensor([3]))
    for each in (reference, optimizer):
        each.settle()
    assert torch.equal(layer.weight, untouched.weight)


def test_a_cleared_state_has_read_nothing() -> None:
    layer, optimizer, _ = replica_behind()
    layer(torch.tensor([1, 2]))
    optimizer.state.clear()
    (table,) = random_tables((6, 2))
    with torch.no_grad():
        layer.weight.copy_(table)
    fresh = embedding(table)
    other = AdamW(fresh.parameters(), sparse="exact", **OPTIONS)
    other.attach(fresh, replicated=True)
    for each, model in ((optimizer, layer), (other, fresh)):
        train(each, model, [0, 4], steps=3)
        each.settle()
    assert torch.equal(layer.weight, fresh.weight)


def test_attaching_again_takes_the_weights_as_they_are() -> None:
    layer, optimizer, _ = replica_behind()
    layer(torch.tensor([1, 2]))
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with pytest.raises(RuntimeError, match="has been written to while rows of it were behind"):
        optimizer.settle()
    optimizer.attach(layer)
    optimizer.settle()
    assert (layer.weight[1:3] == 1).all()


def test_a_step_that_is_skipped_puts_nothing_back() -> None:
    layer, optimizer, expected = replica_behind(nonfinite="skip")
    values = torch.full((1, 2), float("nan"), dtype=torch.float64)
    layer.weight.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), values, layer.weight.shape)
    layer(torch.tensor([1]))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_current(layer.weight[1], expected[1])
