"""Many meshes over the same ranks, and meshes of more ranks than a test can start processes for."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import SOME, TABLE, Sharded, place, values
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed import multi_threaded_pg

from descend import AdamW, get_total_norm


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


def slices(rank: int, of_one: bool) -> list[Any]:
    """Parameters on the rows and columns of a square mesh, none on all of it."""
    if of_one:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        rows, columns = square["dp"], square["tp"]
    else:
        pairs = ([0, 2], [1, 3], [0, 1], [2, 3])
        meshes = [DeviceMesh("cpu", ranks, mesh_dim_names=("pair",)) for ranks in pairs]
        rows, columns = (mesh for mesh in meshes if mesh.get_coordinate() is not None)
    params = [torch.nn.Parameter(place(value, rows, Shard(0))) for value in values(0)]
    params += [torch.nn.Parameter(place(value, columns, Shard(0))) for value in values(1)]
    for param in params:
        param.grad = param.detach().clone()
    optimizer = AdamW(params, max_norm=1.0)
    optimizer.step()
    return [optimizer.grad_norm, get_total_norm([param.grad for param in params]).item()]


@pytest.mark.parametrize("of_one", [False, True])
def test_slices_of_a_mesh_count_once(of_one: bool) -> None:
    norm = torch.cat([value.flatten() for seed in (0, 1) for value in values(seed)]).norm().item()
    first, *others = on_ranks(4, slices, of_one)
    torch.testing.assert_close(first, [norm, norm], rtol=1e-14, atol=0)
    assert others == [first] * 3  # bit for bit


def apart(rank: int, kind: str, bad: int, value: float) -> tuple[float, int]:
    """A step with ``value`` in a gradient on one rank; no mesh holds all ranks."""
    if kind == "slices":
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        meshes = [square["dp"], square["tp"]]
    else:
        meshes = [DeviceMesh("cpu", [i, i + 1], mesh_dim_names=(f"pair {i}",)) for i in (0, 1)]
    params = [torch.nn.Parameter(place(torch.ones(4, 3), mesh, Shard(0))) for mesh in meshes]
    for param in params:
        param.grad = torch.ones_like(param)
    if rank == bad:
        params[1].grad._local_tensor[0, 0] = value
    optimizer = AdamW(params, max_norm=1.0, nonfinite="skip")
    optimizer.step()
    return optimizer.grad_norm, optimizer.skipped_steps


@pytest.mark.parametrize("value", [math.nan, 1e30])
@pytest.mark.parametrize(("kind", "world", "bad"), [("slices", 4, 0), ("slices", 4, 3), ("pairs", 3, 2)])
def test_ranks_without_a_common_mesh_agree(kind: str, world: int, bad: int, value: float) -> None:
    found = on_ranks(world, apart, kind, bad, value)
    norm, skipped = found[0]
    assert skipped == math.isnan(value)
    assert math.isnan(norm) if skipped else norm >= value
    assert [str(one) for one in found] == [str(found[0])] * world


def not_listed(rank: int) -> str:
    """Rank 1 lists a parameter of rank 2, of which rank 0 does not know."""
    pair, other = (DeviceMesh("cpu", ranks, mesh_dim_names=(f"{ranks}",)) for ranks in ([0, 1], [2]))
    if rank == 2:
        return ""
    meshes = [pair, other][: 1 + rank]
    params = [torch.nn.Parameter(place(torch.ones(4, 3), mesh, Shard(0))) for mesh in meshes]
    params[0].grad = torch.ones_like(params[0])
    AdamW(params).step()  # without a norm that does not matter
    with pytest.raises(RuntimeError) as caught:
        AdamW(params, max_norm=1.0).step()
    return str(caught.value)


def test_ranks_that_would_send_differently_are_told() -> None:
    first, second, _ = on_ranks(3, not_listed, timeout=5)
    assert first == second
    assert "AdamW: ranks 0 and 1 disagree about meshes that are in no larger one: 1 and 2." in first


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
