"""A rank's part of a whole tensor is what torch puts there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded import place
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from descend.core.codecs import Codec, decode, encode, keeps_blocks
from descend.distributed.dtensors import first_place, has_whole_blocks, part_of, redistributed, same_layout, scales_of

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
            for each in (dtensor, dtensor.T):
                numbered = part_of(torch.arange(3 * rows).reshape(each.shape), each).flatten().tolist()
                assert not numbered or first_place(each) == numbered[0], (mesh_shape, placements, rows)
        assert_blocks_are_those_of_the_whole(mesh, placements)


def assert_blocks_are_those_of_the_whole(mesh: Any, placements: list[Any]) -> None:
    codec, whole = Codec(signed=True), torch.randn(5, 256, 4, generator=torch.Generator().manual_seed(0))
    numbers, codes, scale = (place(each, mesh, *placements) for each in (whole, *encode(whole, codec)))
    found = scales_of(codes)
    assert has_whole_blocks(codes)
    assert same_layout(found, scale)
    assert (found.shape, found.stride(), found.dtype) == (scale.shape, scale.stride(), scale.dtype)
    assert found.to_local().shape == scale.to_local().shape, (mesh.shape, placements)
    here = codes.to_local(), scale.to_local()
    assert all(map(torch.equal, encode(numbers.to_local(), codec), here)), (mesh.shape, placements)
    assert decode(*here, codec).shape == here[0].shape
    compensation = torch.arange(-512, 768).to(torch.int16).view(5, 256)  # no backend sends int16
    moved = redistributed(place(compensation, mesh, *placements), [Replicate()] * mesh.ndim)
    assert torch.equal(moved.to_local(), compensation), (mesh.shape, placements)
    uneven = place(torch.zeros(5, 175, 4), mesh, *placements)
    assert has_whole_blocks(uneven) == (Shard(1) not in placements)


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


def test_cuts_that_keep_blocks() -> None:
    kept = [
        ((7, 3), 0, 4),
        ((7, 512), 1, 2),
        ((7, 3, 256), 1, 3),
        ((7, 4, 5, 256), 1, 2),
        ((1024,), 0, 4),
        ((9, 9), 1, 1),
    ]
    cut = [((7, 511), 1, 2), ((7, 500), 1, 2), ((7, 768), 1, 2), ((7, 2, 512), 2, 2), ((1023,), 0, 4), ((1000,), 0, 4)]
    assert all(keeps_blocks(torch.Size(shape), dim, parts) for shape, dim, parts in kept)
    assert not any(keeps_blocks(torch.Size(shape), dim, parts) for shape, dim, parts in cut)


@pytest.mark.parametrize("width", [4, 5, 7])
def test_part_of_fsdp_and_tensor_parallelism(width: int) -> None:
    on_ranks(4, assert_parts_of_modules, width)


def test_layouts_that_do_not_tell_the_part_are_errors() -> None:
    on_ranks(2, assert_refused)
