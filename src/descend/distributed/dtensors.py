"""DTensors as the plain tensors that this rank holds. Nothing here imports ``torch.distributed.tensor``.

The inner tensor is read and wrapped without DTensor's dispatch, which costs more than a step. ``to_local`` and
``from_local`` also move: a shard that is offloaded to the CPU would go back to the device of its mesh.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from descend.core.codecs import keeps_blocks, scale_shape
from descend.core.memory import PLAIN, row_state_shape


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a ``DTensor``. A program that has none need not have loaded the class."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_here(dtensor: Any) -> bool:
    """Whether this rank is one of those of its mesh."""
    return dtensor.device_mesh.get_coordinate() is not None


def local_of(tensor: Any) -> Tensor:
    """The tensor that this rank holds of a DTensor, in the same memory; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    local: Tensor = tensor._local_tensor
    functional = sys.modules["torch.distributed._functional_collectives"]
    if isinstance(local, functional.AsyncCollectiveTensor):
        return local.wait()  # type: ignore[no-any-return]
    return local


def like(dtensor: Any, local: Tensor, placements: tuple[Any, ...] | None = None) -> Tensor:
    """A DTensor on ``local``, of the shape, mesh and, unless others are given, placements of ``dtensor``."""
    spec = dtensor._spec
    if placements is not None:
        spec = type(spec)(spec.mesh, placements, tensor_meta=spec.tensor_meta)
    if local.dtype != dtensor.dtype:
        spec = copy.copy(spec)
        spec.tensor_meta = spec.tensor_meta._replace(dtype=local.dtype)
    return type(dtensor)(local, spec, requires_grad=False)  # type: ignore[no-any-return]


def beside(dtensor: Any, local: Tensor, shape: torch.Size) -> Tensor:
    """A DTensor on ``local``, of another shape than ``dtensor``, but of its mesh and placements.

    The parts of both must match: rows to rows, say.
    """
    spec = copy.copy(dtensor._spec)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    spec.tensor_meta = spec.tensor_meta._replace(shape=shape, stride=stride, dtype=local.dtype)
    return type(dtensor)(local, spec, requires_grad=False)  # type: ignore[no-any-return]


def rows_of(dtensor: Any) -> Tensor:
    """A DTensor of one number, not initialized, for each row of another, on the ranks that have the row."""
    local = local_of(dtensor)
    return beside(dtensor, local.new_empty(row_state_shape(local)), row_state_shape(dtensor))


def scales_of(dtensor: Any) -> Tensor:
    """A DTensor of zeros for the scales of state in 8 bits, on the ranks that have the codes."""
    local = local_of(dtensor)
    scales = local.new_zeros(scale_shape(local.shape), dtype=torch.float32)
    return beside(dtensor, scales, scale_shape(dtensor.shape))


def has_whole_rows(tensor: Any) -> bool:
    """Whether no row of a tensor is cut: of a DTensor, each is on one rank, or whole on several."""
    return not is_dtensor(tensor) or all(getattr(placement, "dim", 0) == 0 for placement in tensor.placements)


def has_whole_blocks(tensor: Any) -> bool:
    """Whether no block of numbers that share a scale is cut, see ``codecs.keeps_blocks``. The same on every rank."""
    if not is_dtensor(tensor):
        return True
    parts: Counter[int] = Counter()
    for mesh_dim, placement in enumerate(tensor.placements):
        if (dim := getattr(placement, "dim", None)) is not None:
            parts[dim] = (parts[dim] or 1) * tensor.device_mesh.size(mesh_dim)
    return all(keeps_blocks(tensor.shape, dim, count) for dim, count in parts.items())


def part_of(whole: Tensor, dtensor: Any) -> Tensor:
    """This rank's part of a plain tensor of the whole shape, cut as ``dtensor`` is: a view; nothing is sent.

    Raises:
        ValueError: if the placements do not tell where the part lies.
    """
    if not is_here(dtensor):
        return whole.new_empty(local_of(dtensor).shape)
    part = whole
    for dim, start, length in _cuts(dtensor):
        part = part.narrow(dim, start, length)
    if part.shape != (here := local_of(dtensor).shape):
        raise ValueError(
            f"{layout_of(dtensor)} make a part of shape {tuple(part.shape)} here, but it has shape {tuple(here)}"
        )
    return part


def first_place(tensor: Any) -> int:
    """The index, in the whole tensor in row-major order, of the first element that this rank holds; nothing is sent.

    Replicas have the same. It is 0 for a plain tensor, and on ranks that hold nothing.

    Raises:
        ValueError: if the placements do not tell where the part lies.
    """
    if not is_dtensor(tensor) or not is_here(tensor):
        return 0
    return sum(start * math.prod(tensor.shape[dim + 1 :]) for dim, start, _ in _cuts(tensor))


def _cuts(dtensor: Any) -> list[tuple[int, int, int]]:
    """Dimension, start and length of each cut that makes this rank's part: of what the cuts before it have left."""
    coordinate, shape, cuts = dtensor.device_mesh.get_coordinate(), list(dtensor.shape), []
    for mesh_dim in _order_of_cuts(dtensor):
        dim, ranks = dtensor.placements[mesh_dim].dim, dtensor.device_mesh.size(mesh_dim)
        size = shape[dim]
        each = -(-size // ranks)  # as torch.chunk does it: the last parts are smaller, or empty
        start = min(each * coordinate[mesh_dim], size)
        shape[dim] = min(each, size - start)
        cuts.append((dim, start, shape[dim]))
    return cuts


def _order_of_cuts(dtensor: Any) -> list[int]:
    """The mesh dimensions that cut a tensor, in their order. Cuts of different dimensions of the tensor commute."""
    shards = [(i, placement) for i, placement in enumerate(dtensor.placements) if hasattr(placement, "dim")]
    if not any(hasattr(placement, "split_factor") for _, placement in shards) and dtensor._spec.shard_order:
        return [mesh_dim for entry in dtensor._spec.shard_order for mesh_dim in entry.mesh_dims]
    cuts: dict[int, list[int]] = {placement.dim: [] for _, placement in shards}
    for mesh_dim, placement in reversed(shards):
        # A strided shard is cut later than those to its right that have made split_factor pieces.
        earlier = cuts[placement.dim]
        pieces = [math.prod(map(dtensor.device_mesh.size, earlier[:i])) for i in range(len(earlier) + 1)]
        factor = getattr(placement, "split_factor", 1)
        if factor not in pieces:
            raise ValueError(f"parts cannot be found by {layout_of(dtensor)}")
        earlier.insert(pieces.index(factor), mesh_dim)
    return [mesh_dim for dim in cuts.values() for mesh_dim in dim]


def redistributed(dtensor: Any, placements: Sequence[Any]) -> Any:
    """A DTensor with other placements on the same mesh. No collective sends int16, so that travels as bytes."""
    if dtensor.dtype != torch.int16:
        return dtensor.redistribute(dtensor.device_mesh, placements)
    local = local_of(dtensor).contiguous()
    sent = beside(dtensor, local.unsqueeze(-1).view(torch.uint8), torch.Size([*dtensor.shape, 2]))
    moved = sent.redistribute(dtensor.device_mesh, placements)  # type: ignore[attr-defined]
    return beside(moved, local_of(moved).contiguous().view(torch.int16).squeeze(-1), dtensor.shape)


layout_in = attrgetter("mesh", "placements", "shard_order")  # in the spec of a DTensor


def layout_of(tensor: Tensor) -> str:
    """Mesh and placements, for messages."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return f"placements {placements} on a mesh of shape {tuple(mesh.shape)}"


def same_layout(a: Any, b: Any) -> bool:
    """Whether two tensors lie on the ranks in the same way."""
    if not (is_dtensor(a) and is_dtensor(b)):
        return is_dtensor(a) == is_dtensor(b)
    return a._spec is b._spec or layout_in(a._spec) == layout_in(b._spec)
