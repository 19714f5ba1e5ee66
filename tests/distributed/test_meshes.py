"""Many meshes over the same ranks, and meshes of more ranks than a test can start processes for."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import SOME, TABLE, Sharded, place, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed import multi_threaded_pg

from descend import get_total_norm


def twins(rank: int) -> list[float]:
    """Meshes that differ in their shapes or names only: every rank must visit them in the same order."""
    meshes = [
        init_device_mesh("cpu", shape, mesh_dim_names=names)
        for shape, names in (
            ((4,), ("a",)),
            ((4,), ("b",)),
            ((4,), None),
            ((2, 2), ("a", "b")),
            ((2, 2), ("b", "a")),
            ((1, 4), ("a", "b")),
            ((4, 1), ("a", "b")),
            ((4, 1), ("c", "d")),
        )
    ]
    if rank % 2:
        meshes.reverse()
    values = [torch.full((5,), 2.0, dtype=torch.float64) for _ in meshes]
    tensors = [place(value, mesh, *[Shard(0)] * mesh.ndim) for value, mesh in zip(values, meshes, strict=True)]
    return [get_total_norm(tensors).item(), get_total_norm(tensors, math.inf).item()]


def test_meshes_over_the_same_ranks_are_visited_in_one_order() -> None:
    assert on_ranks(4, twins) == [[160**0.5, 2.0]] * 4


def on_threads(rank: int, world: int, work: Any) -> list[Any]:
    """Call ``work()`` on each of ``world`` ranks, which are threads of this process."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()

    def call(store: Any, rank: int) -> Any:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            return work()
        except BaseException as error:
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # lets go of the others
            raise
        finally:
            dist.destroy_process_group()

    try:
        with ThreadPoolExecutor(world) as threads:
            return list(threads.map(partial(call, dist.HashStore()), range(world)))
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


def in_cube() -> list[Any]:
    """Norms of tensors on a mesh of 2 x 2 x 2 and its parts, and steps with a norm."""
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
    line = init_device_mesh("cpu", (8,))
    shapes = [(9, 5, 3), (2, 7), (16,), (3,), (1, 1, 6)]
    whole = values(0, shapes)
    layouts = [(Shard(0), Shard(1), Shard(2)), (Replicate(), Shard(0), Shard(1)), (Shard(0),) * 3]
    tensors = [place(value, cube, *layout) for value, layout in zip(whole, layouts, strict=False)]
    tensors += [place(whole[3], line, Shard(0)), place(whole[4], cube["shard", "tp"], Shard(2), Replicate())]
    flat, found = torch.cat([value.flatten() for value in whole]), []
    for order in (1.0, 2.0, 3.0, math.inf):
        found.append(get_total_norm(tensors, order).item())
        torch.testing.assert_close(found[-1], torch.linalg.vector_norm(flat, order).item(), rtol=1e-13, atol=0)
    for name in SOME:
        pair = Sharded(TABLE[name], lambda index, value: place(value, cube, *layouts[index % 3]), max_norm=0.5)
        for seed in range(2):
            pair.step(seed)
        pair.assert_equal()
        found.append(pair.ours.grad_norm)
    return found


def test_eight_ranks_in_a_cube() -> None:
    ((first, *others),) = on_ranks(1, on_threads, 8, in_cube)
    assert all(other == first for other in others)  # bit for bit
