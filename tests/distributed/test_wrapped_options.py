"""``ema``, ``averaged`` and ``cautious`` where ranks hold parts: of the parameters, or of the state alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import give_grads, leaves
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from descend import AdamW

SHAPES = [(7, 5), (129,), ()]
OPTIONS: dict[str, Any] = dict(lr=0.1, weight_decay=0.1, cautious="both", decay_by="schedule", ema=0.75)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def trained(params: list[Tensor], dtype: torch.dtype, mesh: Any = None, **options: Any) -> AdamW:
    """Three steps with the same gradients on every rank, of parts if there is a mesh."""
    optimizer = AdamW(params, **OPTIONS, **options)
    for seed in range(3):
        grads = leaves(SHAPES, dtype)
        give_grads(grads, seed)
        for param, source in zip(params, grads, strict=True):
            is_cut = isinstance(param, DTensor)
            assert source.grad is not None
            param.grad = distribute_tensor(source.grad, mesh, param.placements) if is_cut else source.grad
        optimizer.step()
    return optimizer


def assert_averages_are_those_of_one_process(rank: int, dtype: torch.dtype, sharded: bool) -> None:
    alone = leaves(SHAPES, dtype)
    expected = trained(alone, dtype)
    params, options, mesh = leaves(SHAPES, dtype), {}, None
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        params[:2] = [distribute_tensor(param.detach(), mesh, [Shard(0)]).requires_grad_() for param in params[:2]]
    else:
        options = dict(shard_state=dist.group.WORLD)
    optimizer = trained(params, dtype, mesh, **options)
    weights = [whole(param) for param in params]
    assert all(map(torch.equal, weights, alone))
    versions = [param._version for param in params]
    with optimizer.averaged(), expected.averaged():
        assert all(map(torch.equal, map(whole, params), map(whole, alone)))
        assert not torch.equal(whole(params[0]), weights[0])
    assert all(map(torch.equal, map(whole, params), weights))
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    give_grads(alone, 9)
    saved = optimizer.state_dict()["state"][0]["ema"]
    assert isinstance(saved, DTensor)
    assert torch.equal(saved.full_tensor(), expected.state_dict()["state"][0]["ema"])


@pytest.mark.parametrize("sharded", [True, False], ids=["parameters", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_are_those_of_one_process(dtype: torch.dtype, sharded: bool) -> None:
    on_ranks(2, assert_averages_are_those_of_one_process, dtype, sharded)
