"""Ctrl-C at any line of a step: it was taken as a whole or not at all, and the program can go on."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BACKENDS, leaves
from interrupting import interrupted_everywhere
from sum_rules import Estimated
from torch import Tensor, nn

import descend
from descend import SGD, AdamW, AdamWScheduleFree, NAdam, Rprop, warmup
from descend.core.interrupts import DeferredSignals

SHAPES = [(7, 5), (3,), (), (33_000,)]  # the last one for several threads


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def set_grads(params: list[Tensor]) -> None:
    for number, param in enumerate(params):
        param.grad = torch.full_like(param, 0.1 + number)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "options", "stride"),
    [
        (AdamW, dict(max_norm=1.0), 5),
        (SGD, dict(momentum=0.9), 7),
        (NAdam, {}, 11),
        (Rprop, {}, 11),
        (AdamWScheduleFree, {}, 11),
        (Estimated, {}, 101),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dense_step_is_whole_or_not_at_all(kind: Any, options: dict[str, Any], stride: int, backend: str) -> None:
    def make(params: list[Tensor]) -> Any:
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        return kind(groups, lr=0.01, backend=backend, **options)

    params, twins = leaves(SHAPES), leaves(SHAPES)
    optimizer, straight = make(params), make(twins)
    warmup(optimizer)
    taken = 0
    for was_raised in interrupted_everywhere(lambda: (set_grads(params), optimizer.step()), stride=stride):
        if was_raised and torch.equal(params[0], twins[0]):
            pass  # not at all
        else:
            set_grads(twins)
            straight.step()
            taken += 1
        assert all(map(torch.equal, params, twins))
        counts = {float(state["step"]) for state in optimizer.state_dict()["state"].values() if "step" in state}
        assert counts <= {float(taken)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_share_memory_move_together(backend: str) -> None:
    whole = torch.zeros(6)
    params = [whole[:4].requires_grad_(), whole[2:].requires_grad_()]
    optimizer = SGD(params, lr=1.0, backend="auto" if backend == "cpu" else backend)
    for param in params:
        param.grad = torch.ones(4)
    warmup(optimizer)
    for _ in interrupted_everywhere(optimizer.step):
        assert torch.equal(whole[:2] * 2, whole[2:4])
        assert torch.equal(whole[:2], whole[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_in_exact_mode_go_on_after_any_interrupt(backend: str) -> None:
    torch.manual_seed(3)
    table = torch.randn(30, 4, dtype=torch.float64)
    layer, dense = (
        nn.Embedding.from_pretrained(table.clone(), freeze=False, sparse=sparse) for sparse in (True, False)
    )
    ours = AdamW(layer.parameters(), lr=0.01, weight_decay=0.1, sparse="exact", backend=backend)
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0.1)
    ours.attach(layer)
    warmup(ours)
    rows = torch.zeros(0, dtype=torch.int64)

    def iteration() -> None:
        layer(rows).square().sum().backward()
        ours.step()

    steps, catches_up = 0, 0
    random = torch.Generator().manual_seed(5)
    for number, _ in enumerate(interrupted_everywhere(iteration, stride=3)):
        if (taken := int(ours.state_dict()["state"].get(0, {}).get("step", 0))) > steps:
            assert taken == steps + 1
            steps = taken
            theirs.zero_grad()
            dense(rows).square().sum().backward()
            theirs.step()
        ours.zero_grad()
        if number % 10 == 9:
            again = AdamW(copy.deepcopy(layer).parameters(), sparse="exact")
            again.load_state_dict(ours.state_dict())
            ours.settle()
            catches_up = number
        # The error of one catch-up for each time that a row may have caught up.
        torch.testing.assert_close(layer.weight[rows], dense.weight[rows], rtol=0, atol=1e-4 * (number + 1))
        rows = torch.randint(30, (5,), generator=random)
    assert steps > 20
    assert catches_up
    ours.settle()
    torch.testing.assert_close(layer.weight, dense.weight, rtol=0, atol=1e-4 * (number + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_touched_rows_move_with_their_step_counts(backend: str) -> None:
    weight = torch.zeros(9, 2, dtype=torch.float64, requires_grad=True)
    twin = weight.detach().clone().requires_grad_()
    weight.grad = twin.grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 2, dtype=torch.float64), (9, 2))
    ours, straight = (descend.SparseAdam([param], backend=backend) for param in (weight, twin))
    warmup(ours)
    for _ in interrupted_everywhere(ours.step):
        while straight.state[twin].get("step", 0) < ours.state_dict()["state"].get(0, {}).get("step", 0):
            straight.step()
        assert torch.equal(weight, twin)


def raise_signals(*numbers: int) -> None:
    with DeferredSignals():
        for number in numbers:
            signal.raise_signal(number)


def test_handlers_run_when_the_block_ends() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            raise_signals(signal.SIGTERM, signal.SIGINT)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
