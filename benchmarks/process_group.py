"""Running a function on the ranks of a gloo process group, each in a fresh process with one thread."""

from __future__ import annotations

import datetime
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 300  # until ranks that wait for each other give up
_BYTES_SENT = 200  # where Linux keeps it in a tcp_info


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` on each rank; return what rank 0 returns. What a rank raises is raised."""
    results = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (ranks, f"file://{folder}/store", results, function, args), nprocs=ranks)  # type: ignore[no-untyped-call]
    return results.get()


def _work(
    rank: int, ranks: int, meeting: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=limit)
    result = function(*args)
    if rank == 0:
        results.put(result)
    dist.barrier()
    dist.destroy_process_group()


def from_rank_0(value: Any) -> Any:
    """What rank 0 passes, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """What each rank passes, in their order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sent_on_sockets() -> int | None:
    """Bytes that this process has sent on its TCP connections since they were opened; None if this is not Linux."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return None
    return sum(_sent_on(int(path.name)) for path in descriptors.iterdir() if _target(path).startswith("socket:"))


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed by now, as that of the listing itself
        return ""


def _sent_on(descriptor: int) -> int:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
        return int(struct.unpack_from("Q", information, _BYTES_SENT)[0])


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives while it is entered.

    Attributes:
        count: how many.
        payload: bytes of the tensors that this rank has passed to them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.payload = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.Tensor) and kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it calls its operations on plain tensors, collectives among them
        name, space = function.overloadpacket.__name__, function.namespace
        if space in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier", "monitored_barrier_"):
            self.count += 1
            self.payload += sum(tensor.nbytes for tensor in _tensors(args[-1] if "gather" in name else args[0]))
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
