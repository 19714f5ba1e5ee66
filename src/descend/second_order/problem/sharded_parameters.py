"""Sharded parameters as one flat vector of which every rank holds other entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from descend.distributed.dtensors import is_dtensor, layout_of, like, local_of, part_of, same_layout
from descend.second_order.problem.parameters import FlatParameters, ParamGroups
from descend.second_order.problem.shared_space import SharedSpace, all_gather, mesh_of


class Replicas(NamedTuple):
    """Parameters that the same ranks hold in common, and the range of their entries that is this rank's.

    Attributes:
        indices: of the parameters.
        groups: process groups, one for each dimension of a mesh, whose ranks hold the same entries; none if sharded.
        chunk: entries of each rank but the last ones, which have fewer.
        start, stop: this rank's range, in the local tensors one after the other.
    """

    indices: list[int]
    groups: list[Any]
    chunk: int
    start: int
    stop: int


class ShardedParameters(FlatParameters):
    """Parameters of which some are DTensors, as the flat vector of this rank's entries.

    Each entry is held by one rank: of entries that several ranks have in common, each holds an equal part. So inner
    products count every entry once, vectors take 1 / ranks of the memory, and each new entry is computed once:
    ``scatter_`` gathers it for the others, and replicas stay equal to the last bit. A plain tensor beside DTensors is
    in common to all ranks, and so must be its gradient.

    Args:
        groups: an optimizer's ``param_groups``.
        who: the optimizer's name, for errors.
    Raises:
        ValueError: if a parameter is a partial sum, or no mesh holds the ranks of all others.
    """

    def __init__(self, groups: ParamGroups, who: str) -> None:
        super().__init__(groups, who)
        self.who = who
        locals_ = self._locals()
        self._sizes = [local.numel() * (1 + local.is_complex()) for local in locals_]
        self.device = locals_[0].device
        self.is_uniform = all(local.dtype == self.dtype for local in locals_)
        mesh = mesh_of([param.device_mesh for param in self.params if is_dtensor(param)], who)  # type: ignore[attr-defined]
        self._device_type = mesh.device_type
        self.space: SharedSpace = SharedSpace(self.structure.numel, mesh, lambda: self.positions)
        self._replicas = self._shared_out()
        self.numel = sum(part.stop - part.start for part in self._replicas)

    def _locals(self) -> list[Tensor]:
        return [local_of(param) for param in self.params]

    def _shared_out(self) -> list[Replicas]:
        shared: dict[tuple[int, ...], tuple[list[int], list[Any]]] = {}
        for index, param in enumerate(self.params):
            groups = self._groups_in_common(param)
            key = tuple(map(id, groups))
            shared.setdefault(key, ([], groups))[0].append(index)
        replicas = []
        for indices, groups in shared.values():
            total, n_ranks, rank = sum(self._sizes[index] for index in indices), 1, 0
            for group in groups:
                n_ranks, rank = n_ranks * dist.get_world_size(group), rank * dist.get_world_size(group)
                rank += dist.get_rank(group)
            chunk = -(-total // n_ranks)
            replicas.append(Replicas(indices, groups, chunk, min(rank * chunk, total), min((rank + 1) * chunk, total)))
        return replicas

    def _groups_in_common(self, param: Any) -> list[Any]:
        """Process groups whose ranks hold the same entries of a parameter."""
        if not is_dtensor(param):
            return self.space.groups
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(f"{self.who}: a parameter has {layout_of(param)}: it is a partial sum. Redistribute it.")
        mesh = param.device_mesh
        others = self._slices_beside(mesh) if mesh.size() < self.space.n_ranks else []
        return others + [
            mesh.get_group(dim)
            for dim, placement in enumerate(param.placements)
            if placement.is_replicate() and mesh.size(dim) > 1
        ]

    def _slices_beside(self, mesh: Any) -> list[Any]:
        """Process groups that connect a slice of a mesh with the other slices, which hold the same."""
        root = mesh._get_root_mesh()
        names = [name for name in root.mesh_dim_names or () if name not in (mesh.mesh_dim_names or ())]
        n_slices = math.prod(root[name].size() for name in names)
        if mesh.size() * n_slices != self.space.n_ranks:
            raise ValueError(
                f"{self.who}: a parameter is on {mesh}, others are on {self.space.mesh}. Which ranks have it in common "
                "is known only if the smaller mesh is a slice of one with all ranks, as in mesh['tp']."
            )
        return [root.get_group(name) for name in names if root[name].size() > 1]

    # Values.

    def gather(self) -> Tensor:
        return self.held(self._locals())

    def gather_grad(self) -> Tensor:
        return self.flatten([param.grad for param in self.params])

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(self.params, tensors, strict=True)
        return self.held([None if tensor is None else self._local_like(param, tensor) for param, tensor in pairs])

    def scatter_(self, flat: Tensor) -> None:
        pairs = zip(self._locals(), self._local_values(flat), strict=True)
        filled = [(local, values) for local, values in pairs if local.numel()]
        if filled:
            torch._foreach_copy_([local for local, _ in filled], [values for _, values in filled])
        torch.autograd.graph.increment_version([param for param in self.params if is_dtensor(param)])

    def split(self, flat: Tensor) -> list[Tensor]:
        pairs = zip(self.params, self._local_values(flat), strict=True)
        return [like(param, values) if is_dtensor(param) else values for param, values in pairs]

    def _local_like(self, param: Tensor, tensor: Any) -> Tensor:
        """This rank's tensor of one that belongs to a parameter, as its gradient does."""
        if is_dtensor(param) and is_dtensor(tensor) and not same_layout(param, tensor):
            tensor = tensor.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
        if is_dtensor(param) != is_dtensor(tensor):
            raise TypeError(
                f"{self.who}: a parameter with {layout_of(param)} has a gradient with {layout_of(tensor)}. "
                "They must be of one kind."
            )
        return local_of(tensor)

    def held(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """This rank's entries of tensors like the local ones, as a flat vector; zeros for None."""
        parts = []
        for replicas in self._replicas:
            position = 0
            for index in replicas.indices:
                tensor, size = tensors[index], self._sizes[index]
                start, stop = max(replicas.start - position, 0), min(replicas.stop - position, size)
                position += size
                if start < stop:
                    parts.append(
                        torch.zeros(stop - start, dtype=self.dtype, device=self.device)
                        if tensor is None
                        else _real(tensor)[start:stop].to(self.device, self.dtype)
                    )
        return torch.cat([torch.zeros(0, dtype=self.dtype, device=self.device), *parts])

    def _local_values(self, flat: Tensor) -> list[Tensor]:
        """The local tensors with the values of a flat vector; those in common are gathered."""
        values: list[Any] = [None] * len(self.params)
        locals_ = self._locals()
        held = torch.split(flat, [part.stop - part.start for part in self._replicas])
        for part, entries in zip(self._replicas, held, strict=True):
            sizes = [self._sizes[index] for index in part.indices]
            pieces = torch.split(_gathered(entries, part, self._device_type)[: sum(sizes)], sizes)
            for index, piece in zip(part.indices, pieces, strict=True):
                local = locals_[index]
                piece = piece.to(local.device, local.dtype.to_real())
                shaped = torch.view_as_complex(piece.reshape(-1, 2).clone()) if local.is_complex() else piece
                values[index] = shaped.view(local.shape)
        return values

    # Where the entries are.

    def spans(self, groups: ParamGroups) -> list[tuple[dict[str, Any], int, int]]:
        group_of = [group for group in groups for _ in group["params"]]
        spans, offset = [], 0
        for part in self._replicas:
            position = 0
            for index in part.indices:
                start, stop = max(part.start, position), min(part.stop, position + self._sizes[index])
                position += self._sizes[index]
                if start < stop:
                    spans.append((group_of[index], offset + start - part.start, offset + stop - part.start))
            offset += part.stop - part.start
        return spans

    @cached_property
    def positions(self) -> Tensor:
        """The place of each entry held here in the whole vector, which is that of one process."""
        offset, places = 0, []
        for param, local, size in zip(self.params, self._locals(), self.structure.sizes, strict=True):
            place = _places(param, self.who)
            if local.is_complex():
                place = torch.stack([2 * place, 2 * place + 1], dim=1).flatten()
            places.append(place + offset)
            offset += size
        parts = []
        for part in self._replicas:
            together = torch.cat([places[index] for index in part.indices])
            parts.append(together[part.start : part.stop])
        return torch.cat(parts).to(self.device)

    def narrow(self, whole: Tensor) -> Tensor:
        return whole[..., self.positions.to(whole.device)].to(self.device)

    def whole(self, held: Tensor) -> Tensor:
        """Vectors of one process, on every rank, from those held here, one a row. Collective."""
        places = torch.full((self._most,), -1, dtype=torch.int64, device=self.device)
        places[: self.numel] = self.positions
        whole = held.new_zeros(*held.shape[:-1], self.space.numel)
        padded = held.new_zeros(*held.shape[:-1], self._most)
        padded[..., : self.numel] = held
        everywhere = self.space.gather(places).view(-1, self._most)
        rows = self.space.gather(padded.reshape(-1)).view(-1, *padded.shape)
        for place, row in zip(everywhere, rows, strict=True):
            n_held = int((place >= 0).sum())
            whole[..., place[:n_held]] = row[..., :n_held]
        return whole

    @cached_property
    def _most(self) -> int:
        """Entries of the rank that holds most."""
        return int(self.space.largest(self.numel))


def flat_parameters(groups: ParamGroups, who: str) -> FlatParameters:
    """The parameters of some groups as one flat vector, of which ranks hold parts if one is a DTensor."""
    is_sharded = any(is_dtensor(param) for group in groups for param in group["params"])
    return (ShardedParameters if is_sharded else FlatParameters)(groups, who)


def _gathered(entries: Tensor, part: Replicas, device_type: str) -> Tensor:
    """The entries of all ranks that have them in common, zeros at the end."""
    if not part.groups or not part.chunk:
        return entries
    padded = entries.new_zeros(part.chunk)
    padded[: len(entries)] = entries
    return all_gather(padded, part.groups, device_type)


def _real(tensor: Tensor) -> Tensor:
    """A tensor, which may be complex or sparse, as a real vector."""
    dense = tensor.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).reshape(-1)


def _places(param: Any, who: str) -> Tensor:
    """The place of each entry of the local tensor in the whole one, both in row-major order."""
    if not is_dtensor(param):
        return torch.arange(param.numel())
    places, stride = torch.zeros(local_of(param).shape, dtype=torch.int64), 1
    for dim in reversed(range(param.ndim)):
        shape = [-1 if axis == dim else 1 for axis in range(param.ndim)]
        indices = torch.arange(param.shape[dim]).view(shape).expand(param.shape)  # a view, however large
        try:
            places += stride * part_of(indices, param)
        except ValueError as error:
            raise ValueError(f"{who}: {error}.") from None
        stride *= param.shape[dim]
    return places.reshape(-1)
