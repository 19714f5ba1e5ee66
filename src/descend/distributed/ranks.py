"""Reductions over the ranks that share parameters: in float64, with the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from descend.distributed.dtensors import is_dtensor


class Share(NamedTuple):
    """Which ranks hold the elements of a tensor.

    Attributes:
        mesh: a ``DeviceMesh``.
        replicas: how many of its ranks hold each element.
    """

    mesh: Any
    replicas: int


def share_of(tensor: Tensor) -> Share | None:
    """The share of a DTensor; None for any other tensor, which counts as equal on all ranks.

    Raises:
        ValueError: if a placement is ``Partial``: its elements are on no rank.
    """
    if not is_dtensor(tensor):
        return None
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a tensor of placements {placements} must be reduced first: call redistribute.")
    replicas = [mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate()]
    return Share(mesh, math.prod(replicas))


class Ranks:
    """The ranks that share some tensors.

    Meshes are visited from the smallest to the largest. The largest takes along what the others have found, on average
    over its ranks that belong to all meshes: on its ranks everything counts, and all of them get the same bits.

    Args:
        shares: of the tensors, see ``share_of``.
    Attributes:
        meshes: their meshes, those of one rank left out.
    """

    def __init__(self, shares: Iterable[Share | None]) -> None:
        meshes = {share.mesh for share in shares if share is not None}
        own = [mesh for mesh in meshes if mesh.get_coordinate() is not None]
        self.meshes = sorted((mesh for mesh in own if mesh.size() > 1), key=_order)
        self._is_in_all = len(own) == len(meshes)

    def sum(self, values: Mapping[Share | None, Sequence[float]]) -> list[float]:
        """Totals over all ranks in which each element counts once.

        Args:
            values: sums over the local elements of each share, as many for each.
        """
        return self.reduce(values, {})[0]

    def reduce(
        self, values: Mapping[Share | None, Sequence[float]], beside: Mapping[Any, Sequence[float]]
    ) -> tuple[list[float], dict[Any, list[float]]]:
        """The totals of ``sum``; and in the same collectives, for each mesh, sums of the numbers that its ranks pass.

        Args:
            values: as in ``sum``.
            beside: numbers for each mesh.
        """
        width = max(map(len, values.values()), default=0)
        total = _float64([0.0] * width)
        own = {mesh: torch.zeros_like(total) for mesh in self.meshes}
        for share, numbers in values.items():
            if share and share.mesh.get_coordinate() is None:
                continue
            target = own.get(share.mesh, total) if share else total
            target += _float64(numbers) / (share.replicas if share else 1)
        summed = {}
        for mesh in self.meshes:
            takes_along = mesh is self.meshes[-1] and self._is_in_all
            others = torch.cat([total, _float64([1.0])]) if takes_along else _float64([0.0] * (width + 1))
            reduced = all_reduce(mesh, torch.cat([own[mesh], others, _float64(beside.get(mesh, ()))]))
            found, others, count = reduced[:width], reduced[width : 2 * width], reduced[2 * width]
            total = found + (others / count if count > 0 else total)
            summed[mesh] = reduced[2 * width + 1 :].tolist()
        return total.tolist(), summed

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each over all ranks; NaN if one is NaN."""
        numbers = _float64(values)
        flagged = torch.cat([numbers.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), numbers.isnan()])
        for mesh in self.meshes:
            flagged = all_reduce(mesh, flagged, largest=True)
        largest, is_nan = flagged.chunk(2)
        return torch.where(is_nan > 0, math.nan, largest).tolist()


def gather(meshes: Iterable[Any], item: Any) -> dict[int, Any]:
    """What each rank of some meshes passes, by its global rank."""
    found = {dist.get_rank() if dist.is_initialized() else 0: item}
    for mesh in meshes:
        for group in _groups(mesh):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = {rank: value for part in parts for rank, value in part.items()}
    return dict(sorted(found.items()))


def all_reduce(mesh: Any, numbers: Tensor, largest: bool = False) -> Tensor:
    """Sum numbers over a mesh, or take the largest, one collective a dimension; they come back on the CPU."""
    numbers = numbers.to(mesh.device_type)
    for group in _groups(mesh):
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return numbers.cpu()


def _order(mesh: Any) -> tuple[Any, ...]:
    """A place among all meshes, the same on every rank; with one for each mesh, no two ranks wait for each other."""
    return mesh.size(), mesh.mesh.flatten().tolist(), tuple(mesh.shape), mesh.mesh_dim_names or ()


def _groups(mesh: Any) -> list[Any]:
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def _float64(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
