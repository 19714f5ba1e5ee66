"""Tables in exact mode whose weights somebody else writes: noticed, or in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS
from torch import Tensor, nn

from descend import AdamW

OPTIONS: dict[str, Any] = dict(lr=0.1, weight_decay=0.1, sparse="exact")


class Run:
    """An embedding in exact mode and a dense one, trained alike."""

    def __init__(self, backend: str = "auto", max_norm: float | None = None) -> None:
        table = torch.randn(9, 3, dtype=torch.float64)
        self.layer, self.dense = (
            nn.Embedding.from_pretrained(table.clone(), freeze=False, sparse=is_ours, max_norm=max_norm)
            for is_ours in (True, False)
        )
        self.ours = AdamW(self.layer.parameters(), backend=backend, **OPTIONS)
        self.theirs = torch.optim.AdamW(self.dense.parameters(), lr=0.1, weight_decay=0.1)
        self.ours.attach(self.layer)

    def train(self, rows: list[int], steps: int = 1) -> None:
        for _ in range(steps):
            for layer, optimizer in ((self.layer, self.ours), (self.dense, self.theirs)):
                optimizer.zero_grad()
                layer(torch.tensor(rows)).square().sum().backward()
                optimizer.step()

    def write(self, change: Callable[[Tensor], Any]) -> None:
        with torch.no_grad():
            change(self.layer.weight)
            change(self.dense.weight)

    def assert_close(self) -> None:
        self.ours.settle()
        torch.testing.assert_close(self.layer.weight, self.dense.weight, rtol=0, atol=0.01 * 0.1 * 4)


WRITES: list[Callable[[Tensor], Any]] = [
    lambda weight: weight.clamp_(-0.5, 0.5),
    lambda weight: weight[3].zero_(),
    lambda weight: weight.copy_(torch.ones_like(weight)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", WRITES)
def test_writes_while_rows_are_behind_are_noticed(write: Callable[[Tensor], Any], backend: str) -> None:
    run = Run(backend)
    run.train([0, 1, 3], steps=2)
    run.train([0], steps=3)
    with torch.no_grad():
        write(run.layer.weight)
    before = run.layer.weight.detach().clone()
    for read in (lambda: run.layer(torch.tensor([3])), run.ours.settle, run.layer.state_dict):
        with pytest.raises(RuntimeError, match="has been written to while rows of it were behind"):
            read()
    run.layer.weight.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 3, dtype=torch.float64), (9, 3))
    with pytest.raises(RuntimeError, match=r"Call optimizer\.settle"):
        run.ours.step()
    assert torch.equal(run.layer.weight, before)
    run.ours.attach(run.layer)  # accepts the weights as they are
    run.layer(torch.tensor([3]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", WRITES)
def test_writes_to_current_rows_act_as_in_a_dense_run(write: Callable[[Tensor], Any], backend: str) -> None:
    run = Run(backend)
    for _ in range(2):
        run.train([0, 1, 3], steps=2)
        run.train([0], steps=3)
        with run.ours.settled():
            run.write(write)
    run.train([3, 4])
    run.assert_close()


def test_an_embedding_may_scale_the_rows_it_reads() -> None:
    run = Run(max_norm=1.0)
    for rows in ([0, 1, 3], [0], [0, 2], [3]):
        run.train(rows, steps=2)
    run.assert_close()


def test_loading_weights_into_the_module_is_in_order() -> None:
    run = Run()
    run.train([0, 1, 3], steps=2)
    run.train([0], steps=3)
    saved = run.layer.state_dict()
    run.layer.load_state_dict({"weight": saved["weight"] * 0.5})
    with torch.no_grad():
        run.dense.weight.mul_(0.5)
    run.train([3, 4])
    run.assert_close()


def test_two_optimizers_of_one_table_are_refused_where_one_decays() -> None:
    layer = nn.Embedding(5, 2, sparse=True)
    first, second = (AdamW(layer.parameters(), **OPTIONS) for _ in range(2))
    first.attach(layer)
    with pytest.raises(RuntimeError, match="is a table of another AdamW with sparse='exact'"):
        second.attach(layer)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"Call optimizer.attach\(model\) once"):
        second.step()
    first.step()


def test_two_optimizers_without_decay_may_share_a_table() -> None:
    run = Run()
    run.train([1])
    layer = nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    twin = nn.Embedding.from_pretrained(layer.weight.detach().clone(), freeze=False)
    ours = [AdamW(layer.parameters(), lr=0.1, weight_decay=0, sparse="exact") for _ in range(2)]
    theirs = [torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0) for _ in range(2)]
    for optimizer in ours:
        optimizer.attach(layer)
    for step, rows in enumerate([[0, 1], [1], [2], [0], [4], [1, 2]]):
        for model, optimizers in ((layer, ours), (twin, theirs)):
            model.zero_grad()
            model(torch.tensor(rows)).square().sum().backward()
            optimizers[step % 2].step()
    for optimizer in ours:
        optimizer.settle()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=0.01 * 0.1 * 6)


def test_a_settled_table_is_given_up_to_the_next_optimizer() -> None:
    run = Run()
    run.train([0, 1], steps=2)
    run.ours.settle()
    following = AdamW(run.layer.parameters(), **OPTIONS)
    following.attach(run.layer)
    run.layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"Call optimizer.attach\(model\) once"):
        run.ours.step()
    following.step()
