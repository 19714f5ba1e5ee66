"""Checkpoints of optimizers with ``shard_state``, by torch's means and by ``consolidated_state_dict``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, Case, give_grads, params_of
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from descend import AdamW, AdamWScheduleFree
from descend.distributed import gather

# Different optimizers keep different state.
SOME = [case for case in CASES if case.ours.__name__ in ("Adagrad", "AdamWScheduleFree", "ASGD", "NAdam", "Rprop")]
ADAMW = Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 40), nn.LayerNorm(40), nn.Linear(40, 1)).double()


def train(optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        give_grads(params_of(optimizer), seed)
        optimizer.step()


def options_of(sharded: bool) -> dict[str, Any]:
    return dict(shard_state=dist.group.WORLD) if sharded else {}


def params_after(case: Case, steps: int) -> list[Tensor]:
    optimizer = case.ours(model().parameters(), **case.options)
    train(optimizer, range(steps))
    return [param.detach() for param in params_of(optimizer)]


def save_whole(rank: int, case: Case, to: int) -> bytes | None:
    optimizer = case.ours(model().parameters(), **case.options, **options_of(True))
    train(optimizer, range(3))
    gather.BUCKET_BYTES, before = 200, gather.BUCKET_BYTES
    whole = optimizer.consolidated_state_dict(to)
    gather.BUCKET_BYTES = before
    assert (whole is None) == (rank != to)
    if whole is None:
        return None
    file = io.BytesIO()
    torch.save({"optimizer": whole, "params": [param.detach() for param in params_of(optimizer)]}, file)
    return file.getvalue()


def go_on(rank: int, case: Case, file: bytes, sharded: bool) -> list[Tensor]:
    saved = torch.load(io.BytesIO(file), weights_only=True)
    optimizer = case.ours(model().parameters(), **case.options, **options_of(sharded))
    with torch.no_grad():
        for param, value in zip(params_of(optimizer), saved["params"], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    if sharded:
        state = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        assert all(isinstance(value, DTensor) for value in state)
    train(optimizer, range(3, 5))
    return [param.detach() for param in params_of(optimizer)]


@pytest.mark.parametrize("case", [ADAMW, *SOME], ids=str)
def test_whole_state_loads_anywhere(case: Case) -> None:
    file = on_ranks(3, save_whole, case, 1)[1]
    straight = params_after(case, 5)
    found = [go_on(0, case, file, False), *on_ranks(2, go_on, case, file, True), *on_ranks(1, go_on, case, file, True)]
    for params in found:
        assert all(map(torch.equal, params, straight))


def test_whole_state_is_torchs_both_ways() -> None:
    file = on_ranks(2, save_whole, ADAMW, 0)[0]
    theirs = torch.optim.AdamW(model().parameters(), lr=0.01, weight_decay=0.1)
    train(theirs, range(3))
    saved = torch.load(io.BytesIO(file), weights_only=True)
    torch.testing.assert_close(saved["optimizer"]["state"], theirs.state_dict()["state"], rtol=1e-12, atol=1e-12)
    torch.optim.AdamW(model().parameters()).load_state_dict(saved["optimizer"])
    file_of_theirs = io.BytesIO()
    torch.save({"optimizer": theirs.state_dict(), "params": [p.detach() for p in params_of(theirs)]}, file_of_theirs)
    for params in on_ranks(2, go_on, ADAMW, file_of_theirs.getvalue(), True):
        torch.testing.assert_close(params, params_after(ADAMW, 5), rtol=1e-12, atol=1e-12)


# torch.distributed.checkpoint.


def wrapped(case: Case) -> tuple[nn.Module, Any]:
    module = DistributedDataParallel(model())
    return module, case.ours(module.parameters(), **case.options, **options_of(True))


def save_distributed(rank: int, case: Case, folder: Path, how: StateDictOptions) -> None:
    module, optimizer = wrapped(case)
    train(optimizer, range(3))
    dcp.save(
        {"model": module.module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer, options=how)},
        checkpoint_id=folder,
    )


def load_distributed(rank: int, case: Case, folder: Path, how: StateDictOptions, used: bool) -> list[Tensor]:
    module, optimizer = wrapped(case)
    if used:
        train(optimizer, range(7, 8))
    else:
        optimizer.init_state()
    into = {"model": module.module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer, options=how)}
    dcp.load(into, checkpoint_id=folder)
    set_optimizer_state_dict(module, optimizer, into["optimizer"], options=how)
    train(optimizer, range(3, 5))
    return [param.detach() for param in params_of(optimizer)]


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 3), (3, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("flatten", [False, True])
def test_sharded_checkpoints_are_resharded(saved_on: int, loaded_on: int, flatten: bool, tmp_path: Path) -> None:
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    on_ranks(saved_on, save_distributed, ADAMW, tmp_path, how)
    straight = params_after(ADAMW, 5)
    for params in on_ranks(loaded_on, load_distributed, ADAMW, tmp_path, how, flatten):
        assert all(map(torch.equal, params, straight))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_sharded_checkpoints_of_other_optimizers(case: Case, tmp_path: Path) -> None:
    how = StateDictOptions()
    on_ranks(2, save_distributed, case, tmp_path, how)
    for params in on_ranks(3, load_distributed, case, tmp_path, how, False):
        assert all(map(torch.equal, params, params_after(case, 5)))


def round_trip(rank: int, options: dict[str, bool]) -> tuple[list[Tensor], list[Tensor]]:
    how = StateDictOptions(**options)
    module, optimizer = wrapped(ADAMW)
    other, loading = wrapped(ADAMW)
    train(optimizer, range(3))
    taken = get_optimizer_state_dict(module, optimizer, options=how)
    if options.get("full_state_dict"):
        assert "DTensor" not in str(taken)
    other.load_state_dict(module.state_dict())
    set_optimizer_state_dict(other, loading, taken, options=how)
    train(optimizer, range(3, 5))
    train(loading, range(3, 5))
    return [p.detach() for p in params_of(optimizer)], [p.detach() for p in params_of(loading)]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(cpu_offload=True),
        dict(full_state_dict=True),
        dict(flatten_optimizer_state_dict=True),  # torch cannot load one that is flattened and full
        dict(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    ],
    ids=str,
)
def test_optimizer_state_dicts_go_round(options: dict[str, bool]) -> None:
    straight = params_after(ADAMW, 5)
    for first, second in on_ranks(2, round_trip, options):
        assert all(map(torch.equal, first, straight))
        assert all(map(torch.equal, second, straight))


def schedule_free(rank: int, sharded: bool) -> list[list[Tensor]]:
    optimizer = AdamWScheduleFree(model().parameters(), lr=0.1, **options_of(sharded))
    found = []
    for seeds in (range(2), range(2, 3)):
        train(optimizer, seeds)
        for switch in (optimizer.eval, optimizer.train):
            switch()
            found.append([param.detach().clone() for param in params_of(optimizer)])
    return found


def test_schedule_free_averages_are_whole_on_every_rank() -> None:
    expected = schedule_free(0, False)
    for found in on_ranks(3, schedule_free, True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
