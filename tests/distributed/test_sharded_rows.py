"""Rules of rows on several ranks: rows may lie on different ones, and none is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded import place, values, whole
from sparse_cases import random_sparse
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from descend import RowwiseAdagrad

SHAPES = ((7, 5), (4, 3, 2), (6,))


def steps_on_ranks(rank: int, kind: str) -> list[Tensor]:
    """Parameters and sums, whole, after some steps with a checkpoint between them."""
    mesh = init_device_mesh("cpu", (2,))
    options: dict[str, Any] = dict(shard_state=mesh.get_group()) if kind == "state" else {}
    placements = dict(rows=(Shard(0),), copies=(Replicate(),)).get(kind)

    def put(tensor: Tensor) -> Tensor:
        return tensor.clone() if placements is None else place(tensor, mesh, *placements)

    def new() -> tuple[RowwiseAdagrad, list[Tensor]]:
        named = [(f"p{i}", nn.Parameter(put(each))) for i, each in enumerate(values(0, SHAPES))]
        return RowwiseAdagrad(named, lr=0.1, weight_decay=0.2, max_norm=3.0, **options), [param for _, param in named]

    optimizer, params = new()
    for seed in range(4):
        if seed == 2:
            old, saved = params, optimizer.state_dict()
            optimizer, params = new()
            optimizer.load_state_dict(saved)
            with torch.no_grad():
                for param, value in zip(params, old, strict=True):
                    param.copy_(value)
        for param, value in zip(params, values(100 + seed, SHAPES), strict=True):
            param.grad = put(value)
        if placements is None:  # DTensors of sparse gradients cannot be made
            params[0].grad = random_sparse(SHAPES[0], 4, seed)
        optimizer.step()
    sums = [optimizer.state[param]["sum"] for param in params]
    assert all(isinstance(each, DTensor) == (kind != "plain") for each in sums)
    return [whole(each) for each in (*params, *sums)]


def rows_are_cut(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(place(torch.zeros(4, 6), mesh, Shard(1)))
    optimizer = RowwiseAdagrad([("table", param)])
    param.grad = place(torch.ones(4, 6), mesh, Shard(1))
    with pytest.raises(RuntimeError, match=r"a rule of rows cannot update parts of rows, but table has .*Shard"):
        optimizer.step()


@pytest.mark.parametrize(("kind", "same"), [("rows", "copies"), ("state", "plain")])
def test_rows_may_lie_on_several_ranks(kind: str, same: str) -> None:
    expected = on_ranks(2, steps_on_ranks, same)[0]
    for result in on_ranks(2, steps_on_ranks, kind):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_rows_may_not_be_cut() -> None:
    on_ranks(2, rows_are_cut)
