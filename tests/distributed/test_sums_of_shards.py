"""Rules with sums on ranks: sums over a parameter, and over all, are those of the whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded import CLOSE, LAYOUTS, Put, bits, is_here, local, values
from sum_rules import Estimated, Trusted, estimated_naively, trusted_naively
from torch.distributed.device_mesh import init_device_mesh

from descend import in_backward

NAIVELY = {Trusted: trusted_naively, Estimated: estimated_naively}
STEPS = [values(100 + seed) for seed in range(3)]


def follow(kind: Any, put: Put, **options: Any) -> list[bytes]:
    """Some steps of ``kind``; what this rank has then, once it is found right."""
    params = [torch.nn.Parameter(put(index, value)) for index, value in enumerate(values(0))]
    optimizer = kind([dict(params=params[:3]), dict(params=params[3:])], **options)
    for step in STEPS:
        for index, (param, grad) in enumerate(zip(params, step, strict=True)):
            param.grad = put(index, grad)
        optimizer.step()
    for index, (param, end) in enumerate(zip(params, NAIVELY[kind](values(0), STEPS), strict=True)):
        if is_here(param):
            torch.testing.assert_close(local(param), local(put(index, end)), **CLOSE)
    return bits(optimizer)


def compare(rank: int, layout: str) -> list[list[bytes]]:
    put = LAYOUTS[layout][1]()
    return [follow(kind, put, backend=backend) for kind in NAIVELY for backend in ("auto", "eager")]


@pytest.mark.parametrize("layout", ["rows of 3", "columns", "copies", "copies of rows", "several meshes", "some ranks"])
def test_steps_are_those_of_the_whole_tensors(layout: str) -> None:
    found = on_ranks(LAYOUTS[layout][0], compare, layout)
    if layout == "copies":
        assert all(each == found[0] for each in found)


def share_state(rank: int) -> None:
    for kind in NAIVELY:
        follow(kind, lambda index, tensor: tensor.clone(), shard_state=init_device_mesh("cpu", (2,)))


def test_shard_state() -> None:
    on_ranks(2, share_state)


def refusals(rank: int) -> None:
    put = LAYOUTS["rows of 2"][1]()
    weight = torch.nn.Parameter(put(0, values(0)[0]))
    with in_backward(Trusted([weight])), pytest.raises(RuntimeError, match=r"inside backward the sums over .* cannot"):
        (weight * weight).sum().backward()


def test_sums_over_shards_are_refused_inside_backward() -> None:
    on_ranks(2, refusals)


def missing_gradients(rank: int) -> None:
    """A parameter without a gradient, on all ranks, takes no part and holds nobody up."""
    put = LAYOUTS["rows of 2"][1]()
    for kind in NAIVELY:
        params = [torch.nn.Parameter(put(index, value)) for index, value in enumerate(values(0)[:2])]
        before = local(params[0]).clone()
        optimizer = kind(params)
        params[1].grad = put(1, values(1)[1])
        optimizer.step()
        assert torch.equal(local(params[0]), before)
        (end,) = NAIVELY[kind](values(0)[1:2], [values(1)[1:2]])
        torch.testing.assert_close(local(params[1]), local(put(1, end)), **CLOSE)


def test_parameters_without_gradients() -> None:
    on_ranks(2, missing_gradients)
