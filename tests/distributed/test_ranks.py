"""The helper that runs functions on several ranks: it returns, raises and gives up."""

from __future__ import annotations

import os
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RankError, on_ranks


def total(rank: int, offset: float) -> float:
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return value.item()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("this one")


def hang_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(3)
    dist.barrier()


def die(rank: int) -> None:
    os._exit(1)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_come_in_the_order_of_the_ranks(world: int) -> None:
    assert on_ranks(world, total, 0.5) == [sum(range(world)) + world / 2] * world


def test_processes_are_reused() -> None:
    assert on_ranks(2, pid) == on_ranks(2, pid)


def pid(rank: int) -> int:
    return os.getpid()


def test_what_a_rank_raises_is_raised() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2:[\s\S]*ValueError: this one"):
        on_ranks(2, fail_on_one)
    assert on_ranks(2, total, 0) == [1, 1]


def test_rank_that_hangs_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 of 2"):
        on_ranks(2, hang_on_one, timeout=1)


@pytest.mark.slow  # new processes have to be started
def test_rank_that_dies_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 of 1 has died"):
        on_ranks(1, die)
    assert ranks.on_ranks(1, total, 1) == [1]
