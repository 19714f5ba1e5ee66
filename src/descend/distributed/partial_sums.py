"""DTensors of which each rank holds a summand, as a layer gives them whose input is sharded: reduced together."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descend.distributed.dtensors import is_dtensor, like, local_of


def is_partial(tensor: Any) -> bool:
    """Whether it is a DTensor whose elements are sums over ranks that are still to be taken."""
    return is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)


def _summed_placements(tensor: Any) -> tuple[Any, ...]:
    """The placements of a DTensor once its sums have been taken: every rank has them."""
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    return tuple(replicate if placement.is_partial() else placement for placement in tensor.placements)


def summands(dtensor: Any) -> int:
    """The number of ranks whose parts add up to each element."""
    mesh = dtensor.device_mesh
    return math.prod(
        mesh.size(dim)
        for dim, placement in enumerate(dtensor.placements)
        if placement.is_partial() and placement.reduce_op == "sum"
    )


@torch.no_grad()
def reduced(tensors: Sequence[Any]) -> list[Tensor]:
    """The tensors with all sums taken; those that are not partial as they are.

    Tensors that are summed over the same ranks share a collective.
    """
    results = list(tensors)
    together: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if is_partial(tensor):
            operations = tuple(placement.reduce_op if placement.is_partial() else "" for placement in tensor.placements)
            if {*operations} <= {"", "sum", "avg"}:
                together[tensor.device_mesh, operations, tensor.dtype].append(i)
            else:
                results[i] = tensor.redistribute(tensor.device_mesh, _summed_placements(tensor))
    for (mesh, operations, _), members in together.items():
        parts = [local_of(tensors[i]) for i in members]
        flat = torch.cat([part.reshape(-1) for part in parts])
        for dim, operation in enumerate(operations):
            if operation:
                dist.all_reduce(flat, group=mesh.get_group(dim))
        flat /= math.prod(mesh.size(dim) for dim, operation in enumerate(operations) if operation == "avg")
        for i, part, piece in zip(members, parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
            results[i] = like(tensors[i], piece.view(part.shape), _summed_placements(tensors[i]))
    return results
