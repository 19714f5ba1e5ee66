"""Running a function on several ranks of a gloo process group. The processes are reused from case to case."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

MOST = 4  # ranks
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "descend.public"]
TIMEOUT = 60.0  # seconds until ranks that wait for each other give up; a case gets a little more


class RankError(AssertionError):
    """What a function raised, with the traceback of the lowest rank on which it did."""


class RankDiedError(RankError):
    """The process of a rank has died."""


def on_ranks_that_may_die(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The same as ``on_ranks``, tried once more if a process dies.

    For sparse gradients under DistributedDataParallel: on three ranks gloo's own thread was twice seen to crash in
    ``malloc`` in many hundred runs (torch 2.13).
    """
    try:
        return on_ranks(world, function, *args)
    except RankDiedError as error:
        print(f"{error}; once more", file=sys.stderr)
        return on_ranks(world, function, *args)


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Call ``function(rank, *args)`` on each of ``world`` ranks of a new process group.

    Args:
        world: number of ranks, 1 to ``MOST``.
        function: a function of a module, so that it can be sent to another process.
        args: further arguments.
        timeout: of the process group, in seconds.
    Returns:
        What the ranks returned, in their order.
    Raises:
        RankError: if a rank raised, hung or died. What was left of the processes is killed then.
    """
    workers = _workers()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank, (_, connection) in enumerate(workers[:world]):
        connection.send((rank, world, store.port, timeout, function, args))
    answers, deadline = [], time.monotonic() + timeout + 30
    for rank, (_, connection) in enumerate(workers[:world]):
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            stop()
            raise RankError(f"rank {rank} of {world} did not come back in time")
        try:
            answers.append(connection.recv())
        except EOFError:
            stop()
            raise RankDiedError(f"the process of rank {rank} of {world} has died") from None
    failed = [f"rank {rank} of {world}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
    if failed:
        stop()  # processes that have seen different groups number the next ones differently
        raise RankError(failed[0])
    return [result for _, result in answers]


_pool: list[tuple[Any, Connection]] = []


def _workers() -> list[tuple[Any, Connection]]:
    if not _pool:
        # Importing torch takes seconds: all ranks but the first are forked from one process that has done it. The first
        # is new, so that sets of strings have another order on it than on the others, as on ranks of real programs.
        spawn = multiprocessing.get_context("spawn")
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        others = multiprocessing.get_context("forkserver") if can_fork else spawn
        if can_fork:
            others.set_forkserver_preload(PRELOADED)
        for rank in range(MOST):
            here, there = spawn.Pipe()
            context: Any = others if rank else spawn
            process = context.Process(target=_work, args=(there, list(sys.path)), daemon=True)
            process.start()
            there.close()
            _pool.append((process, here))
        atexit.register(stop)
        for _, connection in _pool:  # timeouts of tests may be short
            connection.recv()
    return _pool


def stop() -> None:
    """End the processes; the next call of ``on_ranks`` starts new ones."""
    for process, connection in _pool:
        connection.close()
        process.kill()
        process.join()
    _pool.clear()


def _work(connection: Connection, path: list[str]) -> None:
    """What a process does: take calls until the connection closes."""
    sys.path[:] = path
    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            rank, world, port, timeout, function, args = connection.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        torch.manual_seed(0)
        try:
            store = dist.TCPStore("127.0.0.1", port)
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
            answer = "", function(rank, *args)
            with contextlib.suppress(Exception):  # another rank may have failed
                dist.barrier()  # gloo may crash where a rank ends its group while another still sends
        except BaseException:
            answer = traceback.format_exc(), None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)
