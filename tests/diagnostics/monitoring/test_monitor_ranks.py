"""Of sharded parameters a rank measures its part; all ranks together measure what one would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import give_grads, leaves
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from descend import AdamW, Monitor

SHAPES = ((6, 5), (7,), (3, 2))


def compare(rank: int, kind: str) -> Any:
    """What a rank with whole parameters measures, all ranks with sharded ones, and this rank's part."""
    whole, options = leaves(SHAPES), {}
    if kind == "DTensor":
        mesh = init_device_mesh("cpu", (2,))
        params = [torch.nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])) for param in whole]
    else:
        params, options = leaves(SHAPES), {"shard_state": torch.distributed.group.WORLD}
    alone, shared = AdamW(whole, lr=0.1), AdamW(params, lr=0.1, **options)
    monitors = [Monitor(optimizer, every=2) for optimizer in (alone, shared)]
    for seed in range(2):
        give_grads(whole, seed)
        for param, like in zip(params, whole, strict=True):
            assert like.grad is not None
            param.grad = distribute_tensor(like.grad, mesh, [Shard(0)]) if kind == "DTensor" else like.grad.clone()
        alone.step()
        shared.step()
    return monitors[0].read(), monitors[1].read(all_ranks=True), monitors[1].read()


@pytest.mark.parametrize("kind", ["DTensor", "shard_state"])
def test_ranks_together_measure_what_one_would(kind: str) -> None:
    for alone, together, part in on_ranks(2, compare, kind):
        for name, expected in alone["params"].items():
            assert together["params"][name] == pytest.approx(expected), name
        assert together["update_norm"] == pytest.approx(alone["update_norm"])
        assert 0 < part["weight_norm"] < together["weight_norm"]
