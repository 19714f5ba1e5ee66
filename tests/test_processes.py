"""Forked children, several threads, and any number of them: the same bits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, give_grads, leaves, params_of
from torch import Tensor

from descend import AdamW, get_total_norm
from descend.kernels import threads

# More than enough elements for the work to be shared; sizes that no chunk divides.
SHAPES = ((300, 333), (65_537,), (7,), (0,), ())


def trained(case: Case, seed: int, steps: int = 4) -> list[Tensor]:
    """Parameters after some clipped steps."""
    params = leaves(SHAPES, torch.float32, seed)
    optimizer = case.ours(params, **case.options, max_norm=0.1)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_threads(case: Case) -> None:
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(trained(case, seed=0))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_norms_do_not_depend_on_threads(norm_type: float) -> None:
    tensors = [torch.randn(300_001), torch.randn(1_001)]
    norms = set()
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        norms.add(get_total_norm(tensors, norm_type).item())
    assert len(norms) == 1


def test_bits_do_not_depend_on_where_threads_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    borrowed = trained(CASES[0], seed=0)
    monkeypatch.setattr(threads._openmp, "parallel", None)
    assert all(map(torch.equal, borrowed, trained(CASES[0], seed=0)))


def test_threads_stepping_different_optimizers_do_not_meet() -> None:
    alone = [trained(CASES[i % len(CASES)], seed=i) for i in range(8)]
    together: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        together[i] = trained(CASES[i % len(CASES)], seed=i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, result in enumerate(alone):
        assert all(map(torch.equal, result, together[i]))


def in_child(work: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether ``work`` returns True in a forked child, in time."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_steps_on() -> None:
    torch.set_num_threads(2)
    # Together enough for threads; each too small for torch's own, which would hang in the child.
    params = leaves([(20_000,)] * 5, torch.float32)
    optimizer = AdamW(params, max_norm=0.1)
    give_grads(params, 0)
    optimizer.step()  # the parent has used its threads

    def three_more() -> list[Tensor]:
        for _ in range(3):
            optimizer.step()
        return [param.detach().clone() for param in params_of(optimizer)]

    start = [param.detach().clone() for param in params]
    state = {name: value.clone() for name, value in optimizer.state[params[0]].items()}

    def child() -> bool:
        moved = three_more()
        return not torch.equal(moved[0], start[0]) and optimizer.state[params[0]]["step"].item() == 4

    assert in_child(child)
    assert all(torch.equal(param.detach(), before) for param, before in zip(params, start, strict=True))
    assert all(torch.equal(optimizer.state[params[0]][name], value) for name, value in state.items())
    three_more()  # and the parent goes on
