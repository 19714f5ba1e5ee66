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
    over its ranks that belong to all meshes: on its ranks everything counts, and all of them get the same bits. If no
    mesh holds the ranks of all others (slices of one along different dimensions do not), more rounds follow, in which
    the ranks agree on the largest total that one of them has found.

    Args:
        shares: of the tensors, see ``share_of``.
    Attributes:
        meshes: their meshes, those of one rank left out.
        rounds: over all meshes, until each rank knows what the others do.
    """

    def __init__(self, shares: Iterable[Share | None]) -> None:
        meshes = {share.mesh for share in shares if share is not None}
        own = [mesh for mesh in meshes if mesh.get_coordinate() is not None]
        self.meshes = sorted((mesh for mesh in own if mesh.size() > 1), key=_order)
        self._is_in_all = len(own) == len(meshes)
        ranks = [{*mesh.mesh.flatten().tolist()} for mesh in meshes]
        largest = max(ranks, key=len, default=set())
        self.rounds = 1 if all(others <= largest for others in ranks) else len(meshes)
        self._groups = {mesh: _groups(mesh) for mesh in self.meshes}

    def sum(self, values: Mapping[Share | None, Sequence[float]]) -> list[float]:
        """Totals over all ranks in which each element counts once.

        Args:
            values: sums over the local elements of each share, as many for each.
        """
        return self.agree(self.reduce(values, {})[0])

    def reduce(
        self, values: Mapping[Share | None, Sequence[float]], beside: Mapping[Any, Sequence[float]]
    ) -> tuple[list[float], dict[Any, list[float]]]:
        """The totals of ``sum``, before ``agree``; in the same collectives, sums of what the ranks of each mesh pass.

        Args:
            values: as in ``sum``.
            beside: numbers for each mesh.
        """
        # Python's numbers are float64 as well, and a small tensor for each sum would cost more than the collective.
        zeros = [0.0] * max(map(len, values.values()), default=0)
        own: dict[Any, list[float]] = dict.fromkeys(self.meshes, zeros)
        total = zeros
        for share, numbers in values.items():
            if share and share.mesh in own:
                own[share.mesh] = _add(own[share.mesh], numbers, share.replicas)
            elif not share or share.mesh.get_coordinate() is not None:
                total = _add(total, numbers, share.replicas if share else 1)
        width, summed = len(zeros), {}
        for mesh in self.meshes:
            takes_along = mesh is self.meshes[-1] and self._is_in_all
            others = [*total, 1.0] if takes_along else [*zeros, 0.0]
            reduced = self._all_reduce(mesh, [*own[mesh], *others, *beside.get(mesh, ())], dist.ReduceOp.SUM)
            found, others, count = reduced[:width], reduced[width : 2 * width], reduced[2 * width]
            total = _add(found, others, count) if count > 0 else _add(found, total, 1)
            summed[mesh] = reduced[2 * width + 1 :]
        return total, summed

    def agree(self, totals: list[float]) -> list[float]:
        """The totals on which all ranks agree. Nothing is sent if one mesh holds all of them: they are the same."""
        return totals if self.rounds == 1 else self.max(totals)

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each over all ranks; NaN if one is NaN."""
        is_nan = [*map(math.isnan, values)]
        numbers = [*(-math.inf if bad else value for bad, value in zip(is_nan, values, strict=True)), *is_nan]
        for mesh in self.meshes * self.rounds:
            numbers = self._all_reduce(mesh, numbers, dist.ReduceOp.MAX)
        largest, flags = numbers[: len(values)], numbers[len(values) :]
        return [math.nan if bad else number for bad, number in zip(flags, largest, strict=True)]

    def _all_reduce(self, mesh: Any, numbers: Sequence[float], op: Any) -> list[float]:
        """Reduce numbers over a mesh, one collective a dimension."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device=mesh.device_type)
        for group in self._groups[mesh]:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor.tolist()

    def gather(self, item: Any) -> dict[int, Any]:
        """What each rank passes, by its global rank."""
        return gather(self.meshes * self.rounds, item)


def gather(meshes: Iterable[Any], item: Any) -> dict[int, Any]:
    """What each rank of some meshes passes, by its global rank."""
    found = {dist.get_rank() if dist.is_initialized() else 0: item}
    for mesh in meshes:
        for group in _groups(mesh):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = {rank: value for part in parts for rank, value in part.items()}
    return dict(sorted(found.items()))


def _order(mesh: Any) -> tuple[Any, ...]:
    """A place among all meshes, the same on every rank; with one for each mesh, no two ranks wait for each other.

    Slices of a larger mesh along the same dimensions come together, so that each rank has the same kind of mesh last.
    """
    ranks = mesh.mesh.flatten().tolist()
    distances = [rank - ranks[0] for rank in ranks]
    return mesh.size(), mesh.mesh_dim_names or (), tuple(mesh.shape), distances, ranks


def _groups(mesh: Any) -> list[Any]:
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def _add(numbers: Sequence[float], others: Sequence[float], parts: float) -> list[float]:
    """A part of the others added to each number."""
    return [number + other / parts for number, other in zip(numbers, others, strict=True)]
