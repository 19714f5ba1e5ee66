"""Threads and forked processes: no waiting for ever, and the same bits everywhere."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, give_grads, leaves, params_of, state_of
from processes import in_child, needs_fork
from torch import Tensor

import descend
from descend import LBFGS, Adagrad, AdamW, AdamWScheduleFree, Rprop
from descend.backends.cpu import threads

LARGE = [(100_000,), (300, 301), (7,)]  # enough for threads to be used


def walk(case: Case, steps: int = 3, seed: int = 0) -> tuple[list[Tensor], Any, float | None]:
    """Where some steps lead, the state there, and the last norm."""
    optimizer = case.ours(leaves(LARGE, torch.float32, seed), **case.options, max_norm=1.0)
    take_steps(optimizer, range(steps))
    return [param.detach() for param in params_of(optimizer)], state_of(optimizer), optimizer.grad_norm


def take_steps(optimizer: torch.optim.Optimizer, seeds: Any) -> None:
    for seed in seeds:
        give_grads(params_of(optimizer), seed)
        optimizer.step()


def assert_same_walk(
    ours: tuple[list[Tensor], Any, float | None], theirs: tuple[list[Tensor], Any, float | None]
) -> None:
    assert all(map(torch.equal, ours[0], theirs[0]))
    assert ours[2] == theirs[2]
    for index, state in theirs[1].items():
        assert all(torch.equal(ours[1][index][name], value) for name, value in state.items())


def test_large_work_goes_to_several_threads() -> None:
    assert sum(param.numel() for param in leaves(LARGE)) > 4 * threads.SERIAL_BELOW


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs_are_identical(case: Case) -> None:
    assert_same_walk(walk(case), walk(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    torch.set_num_threads(1)
    expected = walk(case)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same_walk(walk(case), expected)


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, float("inf")])
def test_norms_do_not_depend_on_the_number_of_threads(order: float) -> None:
    tensors = [param.detach() for param in leaves([*LARGE, (50, 60, 70)], torch.float32)]
    tensors.append(tensors[-1].permute(2, 0, 1)[::2])  # strided: no kernel
    norms = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norms.add(tuple(float(descend.get_total_norm(part, order)) for part in (tensors, tensors[:-1])))
    assert len(norms) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_openmp_the_bits_are_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    expected = walk(case)
    monkeypatch.setattr(threads._openmp, "parallel", None)
    assert_same_walk(walk(case), expected)


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_that_step_at_once_equal_serial_ones(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(threads._openmp, "parallel", None)
    torch.set_num_threads(2)
    jobs = [(case, 5, seed) for seed in range(2) for case in CASES]
    expected = [walk(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: walk(*job), jobs))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_walk(ours, theirs)


# Forked children.


@pytest.fixture
def forking() -> Iterator[None]:
    """Python warns of forks in processes with threads from 3.12 on; that they work here is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Compared by numpy: torch's own loops over large tensors wait for ever in a forked child."""
    return all(np.array_equal(a.detach().numpy(), b.detach().numpy()) for a, b in zip(ours, theirs, strict=True))


@needs_fork
@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("parent", ["stepped", "trained", "without openmp"])
def test_forked_child_steps_after_the_parent(parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    if parent == "without openmp":
        monkeypatch.setattr(threads._openmp, "parallel", None)
    optimizer, straight = (AdamW(leaves(LARGE, torch.float32), max_norm=1.0) for _ in range(2))
    for one in (optimizer, straight):
        take_steps(one, range(2))
    if parent == "trained":  # torch's own workers have been at it
        torch.randn(1000, 1000).mm(torch.randn(1000, 1000)).sum()
    for one in (optimizer, straight):
        give_grads(params_of(one), 2)
    for _ in range(3):
        straight.step()

    def arrives() -> bool:
        for _ in range(3):
            optimizer.step()
        return equal(params_of(optimizer), params_of(straight))

    assert in_child(arrives)
    assert in_child(lambda: in_child(arrives))  # and a child's child
    assert arrives()  # and the parent afterwards


@needs_fork
@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("kind", [AdamW, Rprop, AdamWScheduleFree])  # zeros, a number, a copy
def test_forked_child_makes_its_first_state(kind: Any) -> None:
    torch.set_num_threads(2)
    optimizer, straight = (kind(leaves(LARGE, torch.float32), max_norm=1.0) for _ in range(2))
    for one in (optimizer, straight):
        give_grads(params_of(one), 0)
    straight.step()

    def arrives() -> bool:
        optimizer.step()
        return equal(params_of(optimizer), params_of(straight))

    assert in_child(arrives)


@needs_fork
@pytest.mark.usefixtures("forking")
def test_forked_child_steps_with_lbfgs() -> None:
    torch.set_num_threads(2)
    (param,) = leaves([(200_000,)], torch.float64)
    optimizer = LBFGS([param], max_iter=4, max_eval=20, history_size=4, line_search_fn="hager_zhang")

    def closure() -> Tensor:
        return (100 * (param[1:] - param[:-1] ** 2) ** 2 + (1 - param[:-1]) ** 2).sum()

    optimizer.step(closure)

    def falls() -> bool:
        assert optimizer.result is not None
        before = optimizer.result.fun
        optimizer.step(closure)
        return optimizer.result.fun < before

    assert in_child(falls)
    assert falls()


@needs_fork
@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("options", [{"backend": "foreach"}, {"backend": "eager", "state_dtype": "8bit"}], ids=str)
def test_forked_child_steps_with_operations_of_torch(options: Any) -> None:
    torch.set_num_threads(2)
    optimizer, straight = (AdamW(leaves(LARGE, torch.float32), max_norm=1.0, **options) for _ in range(2))
    for one in (optimizer, straight):
        take_steps(one, range(2))
    straight.step()

    def arrives() -> bool:
        optimizer.step()
        return equal(params_of(optimizer), params_of(straight))

    assert in_child(arrives)


@needs_fork
@pytest.mark.usefixtures("forking")
def test_forked_workers_of_multiprocessing_step() -> None:
    torch.set_num_threads(2)
    optimizer, straight = (AdamW(leaves(LARGE, torch.float32)) for _ in range(2))
    for one in (optimizer, straight):
        take_steps(one, range(2))
    straight.step()
    context: Any = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work() -> None:
        optimizer.step()
        queue.put(equal(params_of(optimizer), params_of(straight)))

    worker = context.Process(target=work, daemon=True)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert queue.get()


def test_processes_share_the_sums_of_adagrad() -> None:
    params = leaves([(50,), (3, 4)], torch.float32)
    optimizer, straight = (Adagrad(p, initial_accumulator_value=0.1) for p in (params, leaves([(50,), (3, 4)])))
    optimizer.share_memory()
    sums = [state["sum"] for state in optimizer.state.values()]
    assert all(total.is_shared() for total in sums)
    assert all(bool((total == 0.1).all()) for total in sums)
    for one in (optimizer, straight):
        take_steps(one, range(2))
    optimizer.share_memory()  # again, in mid-run: nothing is lost
    for one in (optimizer, straight):
        take_steps(one, range(2, 4))
    assert all(state["sum"] is total for state, total in zip(optimizer.state.values(), sums, strict=True))
    assert all(total.is_shared() for total in sums)
    for total, theirs in zip(sums, (state["sum"] for state in straight.state.values()), strict=True):
        torch.testing.assert_close(total.double(), theirs, rtol=1e-5, atol=1e-5)  # float32 gradients


@needs_fork
@pytest.mark.usefixtures("forking")
def test_forked_child_adds_to_the_sums_of_its_parent() -> None:
    param = torch.zeros(50, requires_grad=True)
    optimizer = Adagrad([param])
    optimizer.share_memory()
    param.grad = torch.ones(50)

    def steps() -> bool:
        optimizer.step()
        return True

    assert in_child(steps)
    assert bool((optimizer.state[param]["sum"] == 1).all())
    assert bool((param == 0).all())  # not shared
