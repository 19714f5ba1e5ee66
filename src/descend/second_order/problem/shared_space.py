"""The space of flat vectors of which each entry is held by one of several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from descend.distributed.dtensors import is_dtensor
from descend.second_order.mathematics.space import SAMPLE, Array, Space, length, to_floats

# Its name from torch 2.13 on, where the old one warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SharedSpace(Space):
    """Vectors of which every rank of a mesh holds other entries.

    A method makes one collective: a sum in float64 over the mesh, or one for each of its dimensions unless it holds all
    ranks there are. A number that is no sum, such as a largest entry, has a place for each rank in the summed vector.
    So all ranks compute with the same bits, and decide alike.

    Args:
        numel: entries of a whole vector.
        mesh: the ranks.
        positions: gives the place of each entry held here in the whole vector.
    """

    is_shared = True

    def __init__(self, numel: int, mesh: Any, positions: Callable[[], Tensor]) -> None:
        super().__init__(numel)
        self.mesh, self.n_ranks, self._positions = mesh, mesh.size(), positions
        dims = range(mesh.ndim)
        if self.n_ranks == dist.get_world_size():
            self.groups, self.rank = [dist.group.WORLD], dist.get_rank()
        else:
            self.groups = [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]
            self.rank = 0
            for dim in dims:
                self.rank = self.rank * mesh.size(dim) + mesh.get_local_rank(dim)

    def total(self, *sums: Array) -> Sequence[Any]:
        return self._reduced([], sums)[1]

    def floats(self, device: torch.device, *sums: Tensor | float) -> list[float]:
        return [float(number) for number in self.total(*sums)]

    def evaluation(
        self,
        device: torch.device,
        value: Tensor | float,
        low: Tensor | float,
        high: Tensor | float,
        *sums: Array | float,
    ) -> list[Any]:
        (values, lows, highs), totals = self._reduced(to_floats(device, value, low, high), sums)
        is_same = bool((values == values[0]).all())
        mean = values[0].item() if is_same else values.sum().item() / self.n_ranks
        return [mean, lows.amin().item(), highs.amax().item(), *totals]

    def largest(self, number: float) -> float:
        (numbers,), _ = self._reduced([number], ())
        return numbers.amax().item()

    def norm(self, vector: Tensor) -> float:
        return self.length(vector)

    def length(self, vector: Tensor) -> float:
        (lengths,), _ = self._reduced([length(vector)], ())
        return math.hypot(*lengths.tolist())

    def random(self, like: Tensor) -> Tensor:
        return super().random(like.new_empty(self.numel))[self._positions()]

    def samples(self, *vectors: Array) -> Sequence[Any]:
        held, places, number = self._sampled
        samples = []
        for vector in vectors:
            if isinstance(vector, np.ndarray):
                sample = np.zeros(number, vector.dtype)
                sample[places.numpy()] = vector[held.numpy()]
            else:
                sample = vector.new_zeros(number)
                sample[places] = vector[held]
            samples.append(sample)
        return samples

    @cached_property
    def _sampled(self) -> tuple[Tensor, Tensor, int]:
        """Which of the entries held here are sampled, their places in the sample, and its size."""
        positions, stride = self._positions(), 1 + self.numel // SAMPLE
        held = (positions % stride == 0).nonzero().flatten()
        return held, positions[held] // stride, -(-self.numel // stride)

    def gather(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, of equal length, one after the other."""
        return all_gather(vector, self.groups, self.mesh.device_type)

    def _reduced(self, numbers: Sequence[float], sums: Sequence[Array]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """Each of some numbers from all ranks, in their order, and sums over the ranks."""
        slots = torch.zeros(len(numbers), self.n_ranks, dtype=torch.float64)
        slots[:, self.rank] = torch.tensor(numbers, dtype=torch.float64)
        parts = [torch.as_tensor(part).detach().reshape(-1).to(self.mesh.device_type, torch.float64) for part in sums]
        buffer = torch.cat([slots.reshape(-1).to(self.mesh.device_type), *parts])
        for group in self.groups:
            dist.all_reduce(buffer, group=group)
        sizes = [slots.numel(), *(part.numel() for part in parts)]
        reduced, *totals = torch.split(buffer.cpu(), sizes)
        return reduced.view(slots.shape).unbind(), [_like(*pair) for pair in zip(sums, totals, strict=True)]


def _like(part: Array, total: Tensor) -> Any:
    """A total as the kind of thing that its parts are."""
    if isinstance(part, Tensor):
        return total.reshape(part.shape).to(part.device, part.dtype)
    if isinstance(part, np.ndarray):
        return total.numpy().reshape(part.shape).astype(part.dtype)
    return np.float64(total.item())


def all_gather(vector: Tensor, groups: Sequence[Any], device_type: str) -> Tensor:
    """The vectors of the ranks of some groups, the dimensions of a mesh, one after the other."""
    gathered = vector.to(device_type)
    for group in reversed(groups):
        own, gathered = gathered, gathered.new_empty(dist.get_world_size(group) * len(gathered))
        _all_gather_single(gathered, own, group=group)
    return gathered.to(vector.device)


def full_of(loss: Tensor) -> Tensor:
    """The whole of a DTensor on every rank, differentiable; any other tensor as it is."""
    return loss.full_tensor() if is_dtensor(loss) else loss  # type: ignore[attr-defined]


def mesh_of(meshes: Sequence[Any], who: str) -> Any:
    """The mesh among some that holds the ranks of all.

    Raises:
        ValueError: if there is none, or this rank does not belong to one of them.
    """
    if any(mesh.get_coordinate() is None for mesh in meshes):
        raise ValueError(
            f"{who}: rank {dist.get_rank()} has a parameter on a mesh that it does not belong to. All parameters are "
            "one problem, so give them only to ranks that hold them."
        )
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    for mesh in meshes:
        if not set(mesh.mesh.flatten().tolist()) <= ranks:
            raise ValueError(
                f"{who}: all parameters are one problem, so one mesh must hold the ranks of all others, got {largest} "
                f"and {mesh}."
            )
    return largest
