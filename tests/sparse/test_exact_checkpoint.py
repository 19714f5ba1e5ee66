"""Saving, loading and copying while rows are behind: nothing is caught up with twice, nothing is lost."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS
from exact_cases import LR, OPTIONS, ORDERS, Run, embedding, load, run_behind, save, through_file, train
from sparse_cases import coo
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR

from descend import AdamW


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch wakes all threads for a handful of numbers: minutes on a busy machine."""
    torch.set_num_threads(1)


def others_only_decay() -> Run:
    """All rows that ever had a gradient are current."""
    return Run(weight_decay=1.0).train([0, 1], steps=3)


def first_rows_have_come_to_rest() -> Run:
    """Rows that have been brought up to date long after their last gradient no longer move."""
    run = Run(rows=60, dtype=torch.float32, weight_decay=0.0).train(range(60), steps=3).train([59], steps=200)
    run.ours.settle()
    return run.train([56, 57, 58], steps=5).train([59], steps=4)


def first_rows_had_zero_gradients() -> Run:
    run = Run(rows=60, weight_decay=0.0)
    for optimizer, layer in ((run.ours, run.layer), (run.theirs, run.dense)):
        optimizer.zero_grad()
        (0 * layer(torch.arange(40))).sum().backward()
        optimizer.step()
    return run.train([50, 51, 52], steps=4).train([50], steps=4)


def some_rows_are_not_numbers() -> Run:
    run = Run(rows=6)
    for layer in (run.layer, run.dense):
        layer.weight.data[:2] = torch.nan
    run.train([2, 3, 4], steps=4).train([4], steps=20)
    for layer in (run.layer, run.dense):
        layer.weight.data[:2] = torch.inf
    return run


def nothing_is_behind() -> Run:
    run = run_behind()
    run.ours.settle()
    return run


def no_step_was_taken() -> Run:
    return Run()


SITUATIONS = [
    run_behind,
    others_only_decay,
    first_rows_have_come_to_rest,
    first_rows_had_zero_gradients,
    some_rows_are_not_numbers,
    nothing_is_behind,
    no_step_was_taken,
]


@pytest.mark.parametrize("load_order", ORDERS, ids=["load model first", "load optimizer first"])
@pytest.mark.parametrize("save_order", ORDERS, ids=["save model first", "save optimizer first"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_order_of_model_and_optimizer_does_not_matter(
    situation: Callable[[], Run], save_order: str, load_order: str
) -> None:
    run = situation()
    new = load(run, save(run, save_order), load_order)
    for each in (run, new):
        train(each.ours, each.layer, [1, 2, 5])
        train(each.ours, each.layer, [1], steps=3)
        each.ours.settle()
    assert torch.equal(new.layer.weight.nan_to_num(), run.layer.weight.nan_to_num())
    assert_same_averages(new, run)


def assert_same_averages(ours: Run, theirs: Run) -> None:
    for name in ("step", "exp_avg", "exp_avg_sq"):
        found, expected = (run.ours.state[run.layer.weight][name] for run in (ours, theirs))
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), name


@pytest.mark.parametrize("order", ["model optimizer", "optimizer model"])
def test_one_file_may_hold_both(order: str) -> None:
    """Tensors in a state dict are alive until they are written."""
    run = run_behind()
    both = {name: (run.layer if name == "model" else run.ours).state_dict() for name in order.split()}
    saved = through_file(both)
    new = load(run, (saved["model"], saved["optimizer"]), "model optimizer")
    new.assert_close()


WAYS: dict[str, Callable[[Run], Run]] = {}


def way(make: Callable[[Run], Run]) -> Callable[[Run], Run]:
    WAYS[make.__name__] = make
    return make


@way
def through_state_dict(run: Run) -> Run:
    saved = through_file(run.ours.state_dict())
    new = run.replaced()
    new.ours.load_state_dict(saved)
    new.layer.weight.data.copy_(run.layer.weight.data)  # as they are, rows that are behind included
    return new


@way
def through_two_state_dicts(run: Run) -> Run:
    return load(run, save(run, "model optimizer"), "optimizer model")


@way
def through_deepcopy(run: Run) -> Run:
    return with_optimizer(run, copy.deepcopy(run.ours))


@way
def through_pickle(run: Run) -> Run:
    return with_optimizer(run, pickle.loads(pickle.dumps(run.ours)))


@way
def through_deepcopy_of_both(run: Run) -> Run:
    return attached(run, *copy.deepcopy((run.layer, run.ours)))


@way
def through_deepcopy_of_both_turned_round(run: Run) -> Run:
    return attached(run, *copy.deepcopy((run.ours, run.layer))[::-1])


@way
def through_pickle_of_both(run: Run) -> Run:
    run.ours.settle()
    return attached(run, *pickle.loads(pickle.dumps((run.ours, run.layer)))[::-1])


@way
def through_itself(run: Run) -> Run:
    run.ours.load_state_dict(run.ours.state_dict())
    return run


def with_optimizer(run: Run, optimizer: Any) -> Run:
    """A run with a copy of the optimizer, which has a copy of the weights."""
    layer = embedding(run.layer.weight)
    layer.weight = optimizer.param_groups[0]["params"][0]
    return attached(run, layer, optimizer)


def attached(run: Run, layer: nn.Embedding, optimizer: Any) -> Run:
    new = run.replaced()
    assert layer.weight is optimizer.param_groups[0]["params"][0]
    new.layer, new.ours = layer, optimizer
    new.ours.attach(new.layer)
    return new


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, BACKENDS[0]), (torch.bfloat16, BACKENDS[0]), (torch.float64, "eager")],
    ids=str,
)
@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_going_on_equals_not_stopping_bit_for_bit(make: Callable[[Run], Run], dtype: torch.dtype, backend: str) -> None:
    run = Run(dtype=dtype, backend=backend)
    random = torch.Generator().manual_seed(0)
    schedulers = [CosineAnnealingLR(run.ours, T_max=50)]
    for _ in range(20):
        train(run.ours, run.layer, torch.randint(0, 5, (1,), generator=random))
        schedulers[0].step()
    other = make(run)
    schedulers.append(CosineAnnealingLR(other.ours, T_max=50))
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    other.ours.param_groups[0]["lr"] = run.ours.param_groups[0]["lr"]
    for _ in range(20):
        rows = torch.randint(0, 5, (1,), generator=random)
        for each, scheduler in zip((run, other), schedulers, strict=True):
            if each is run or other is not run:
                train(each.ours, each.layer, rows)
                scheduler.step()
    assert torch.equal(run.layer(torch.tensor([2])), other.layer(torch.tensor([2])))
    for each in (run, other):
        each.ours.settle()
    assert torch.equal(run.layer.weight, other.layer.weight)
    assert_same_averages(run, other)


def test_saving_and_loading_itself_changes_nothing() -> None:
    run = run_behind()
    run.ours.load_state_dict(run.ours.state_dict())
    run.train([0], steps=3)
    run.ours.load_state_dict(through_file(run.ours.state_dict()))
    run.train([0, 2], steps=3)
    run.assert_close(catch_ups=4)


def test_a_state_of_old_replaces_averages_and_not_weights() -> None:
    run = Run().train([0, 1, 2, 3], steps=4)
    old = [copy.deepcopy(optimizer.state_dict()) for optimizer in (run.ours, run.theirs)]
    run.train([0], steps=30)
    for optimizer, saved in zip((run.ours, run.theirs), old, strict=True):
        optimizer.load_state_dict(saved)
    run.assert_close()
    run.train([0], steps=3).assert_close(catch_ups=2)


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_fresh_optimizer_brings_loaded_rows_up_to_date(attach_first: bool) -> None:
    run = run_behind()
    saved = through_file(run.ours.state_dict())
    weight = run.layer.weight.detach().clone().requires_grad_()
    optimizer = AdamW([weight], sparse="exact", **OPTIONS)
    optimizer.load_state_dict(saved)
    if attach_first:
        optimizer.attach(weight)
    optimizer.settle()
    run.ours.settle()
    assert torch.equal(weight, run.layer.weight)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_can_be_settled_before_it_is_attached(make: Callable[[Any], Any]) -> None:
    run = run_behind()
    twin = make(run.ours)
    twin.settle()
    run.ours.settle()
    assert torch.equal(twin.param_groups[0]["params"][0], run.layer.weight)


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_distributed_checkpoint_is_loaded(attach_first: bool) -> None:
    """It makes the state by a step with dense zeros."""
    run = run_behind()
    weights, saved = get_state_dict(run.layer, run.ours)
    new = run.replaced()
    if not attach_first:
        new.ours = AdamW(new.layer.parameters(), sparse="exact", **OPTIONS)
    set_state_dict(new.layer, new.ours, model_state_dict=weights, optim_state_dict=saved)
    new.ours.attach(new.layer)
    new.train([0], steps=9)
    new.assert_close(catch_ups=2)


# A process that dies.


def wandering(run: Run, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    run.ours.param_groups[0]["lr"] = LR / (1 + step)
    train(run.ours, run.layer, torch.randint(0, 5, (1,), generator=random))


def write_checkpoint(run: Run, path: Path) -> None:
    """The optimizer first: the order must not matter."""
    parts = path.with_suffix(".optimizer"), path.with_suffix(".model")
    for part, owner in zip(parts, (run.ours, run.layer), strict=True):
        torch.save(owner.state_dict(), part.with_suffix(part.suffix + ".new"))
    for part in parts:
        os.replace(part.with_suffix(part.suffix + ".new"), part)
    path.touch()


def run_until_killed(path: Path) -> None:
    torch.set_num_threads(1)
    run = Run()
    for step in range(10_000_000):
        if step == 25:
            write_checkpoint(run, path)
        wandering(run, step)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    child = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(path,))
    child.start()
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline and child.is_alive():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert path.exists()

    whole, resumed = Run(), Run().replaced()
    for step in range(25):
        wandering(whole, step)
    write_checkpoint(whole, tmp_path / "whole")
    resumed.ours.load_state_dict(torch.load(path.with_suffix(".optimizer"), weights_only=True))
    resumed.layer.load_state_dict(torch.load(path.with_suffix(".model"), weights_only=True))
    for step in range(25, 50):
        for run in (whole, resumed):
            wandering(run, step)
    for run in (whole, resumed):
        run.ours.settle()
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert_same_averages(whole, resumed)


def test_a_sparse_step_after_loading_needs_rows_that_were_read_since() -> None:
    run = run_behind()
    new = load(run, save(run, "model optimizer"), "model optimizer")
    train(new.ours, new.layer, [0])
    new.layer.weight.grad = coo([1], torch.ones((1, 2), dtype=torch.float64), (6, 2))
    with pytest.raises(RuntimeError, match="row 1 "):
        new.ours.step()
