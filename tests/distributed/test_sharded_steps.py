"""Sharded parameters step as unsharded ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from descend import AdamW

SHAPES = [(7, 3), (4,), (1, 5), (8, 2), (0, 3)]


def values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def train(rank: int, kind: type, options: dict[str, Any], steps: int, sharded: bool) -> list[list[float]]:
    if sharded:
        world = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", (world,))
        put = lambda t: distribute_tensor(t, mesh, [Shard(0)])  # noqa: E731
    else:
        put = lambda t: t  # noqa: E731
    params = [torch.nn.Parameter(put(value)) for value in values(0)]
    optimizer = kind(params, **options)
    for step in range(steps):
        for param, value in zip(params, values(step + 1), strict=True):
            param.grad = put(value)
        optimizer.step()
    return [(param.full_tensor() if sharded else param).detach().flatten().tolist() for param in params]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("options", [dict(), dict(max_norm=0.5), dict(nonfinite="raise")], ids=str)
def test_adamw(world: int, options: dict[str, Any]) -> None:
    expected = train(0, AdamW, options, 3, False)
    for result in on_ranks(world, train, AdamW, options, 3, True):
        for a, b in zip(result, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-13)
