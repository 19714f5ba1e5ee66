"""A rank's part of a whole tensor is what torch puts there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from descend.distributed.dtensors import part_of

LAYOUTS: list[tuple[tuple[int, ...], list[Any]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Replicate()]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((1, 4), [_StridedShard(0, split_factor=4), Shard(0)]),
    ((4, 1), [_StridedShard(0, split_factor=1), Shard(0)]),
]


def assert_parts_are_torchs(rank: int) -> None:
    for mesh_shape, placements in LAYOUTS:
        mesh = init_device_mesh("cpu", mesh_shape)
        for rows in (0, 1, 3, 4, 5, 7, 8, 9):
            whole = torch.arange(rows * 3.0).reshape(rows, 3)
            dtensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            assert torch.equal(part_of(whole, dtensor), dtensor.to_local()), (mesh_shape, placements, rows)
            assert torch.equal(part_of(whole.T, dtensor.T), dtensor.T.to_local()), (mesh_shape, placements, rows)


def assert_parts_of_modules(rank: int, width: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3))
    whole = {name: param.detach().clone() for name, param in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    for name, param in model.named_parameters():
        assert torch.equal(part_of(whole[name], param), param.to_local()), name


def assert_refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    odd = DTensor.from_local(torch.zeros(1 + 2 * rank), mesh, [Shard(0)], shape=torch.Size((4,)), stride=(1,))
    with pytest.raises(ValueError, match=rf"make a part of shape \(2,\) here, but it has shape \({1 + 2 * rank},\)"):
        part_of(torch.zeros(4), odd)
    interleaved = distribute_tensor(torch.zeros(4), mesh, [_StridedShard(0, split_factor=2)])
    with pytest.raises(ValueError, match=r"parts cannot be found by placements \(_StridedShard\(dim=0, sf=2\),\)"):
        part_of(torch.zeros(4), interleaved)


def test_part_is_what_torch_distributes() -> None:
    on_ranks(4, assert_parts_are_torchs)


@pytest.mark.parametrize("width", [4, 5, 7])
def test_part_of_fsdp_and_tensor_parallelism(width: int) -> None:
    on_ranks(4, assert_parts_of_modules, width)


def test_layouts_that_do_not_tell_the_part_are_errors() -> None:
    on_ranks(2, assert_refused)
