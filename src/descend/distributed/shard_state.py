"""``shard_state``: parameters that each rank has whole, of which it updates a part and keeps that part's state.

Such a parameter is treated as a DTensor on this rank's part of its memory. So its state is one: distributed checkpoints
reshard it, and norms count each element once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descend.core.memory import PLAIN
from descend.core.optimizer import MethodOptimizer
from descend.distributed.dtensors import is_dtensor

SMALL = 4096  # elements; the balance of smaller tensors does not matter
MOST_EXCESS = 1.05  # of the largest part over an equal share; above, a dimension that balances better is cut


def state_mesh(optimizer: MethodOptimizer) -> Any:
    """The one-dimensional ``DeviceMesh`` of an optimizer's ``shard_state``; None without it.

    Raises:
        ValueError: if ``shard_state`` is something else, or this rank is not in it.
    """
    given = optimizer.options.shard_state
    if given is None:
        return None
    mesh = optimizer.state_meshes.get(given)
    if mesh is None:
        mesh = optimizer.state_meshes[given] = _mesh(optimizer, given)
    return mesh


def _mesh(optimizer: MethodOptimizer, given: Any) -> Any:
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(given, dist.ProcessGroup):
            devices = [param.device.type for group in optimizer.param_groups for param in group["params"]]
            return DeviceMesh.from_group(given, next(iter(devices), "cpu"))
        if isinstance(given, DeviceMesh) and given.ndim == 1 and given.get_coordinate() is not None:
            return given
    raise ValueError(
        f"{type(optimizer).__name__}: shard_state must be a process group or a one-dimensional DeviceMesh that this "
        f"rank is in, such as torch.distributed.group.WORLD, or None to keep all state on every rank, got {given!r}."
    )


def as_sharded(optimizer: MethodOptimizer, param: Tensor) -> Tensor:
    """A parameter as its state lies on the ranks: with ``shard_state`` a DTensor on this rank's part of its memory.

    Parameters that are sharded already, and those that cannot be cut (0-dim, empty), come back as they are.
    """
    mesh = state_mesh(optimizer)
    if mesh is None or type(param) not in PLAIN or is_dtensor(param):
        return param
    options = optimizer.options
    dim = dim_to_cut(param, mesh.size(), options.may_have_codes or options.rounding == "stochastic")
    if dim is None:
        return param
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    start, stop = part(param.shape[dim], mesh.size(), mesh.get_local_rank())
    local = param.detach().narrow(dim, start, stop - start)
    meta = TensorMeta(param.shape, param.stride(), param.dtype)
    spec = DTensorSpec(mesh, (Shard(dim),), tensor_meta=meta)
    make: Any = DTensor  # the constructor itself, as in ``dtensors.like``: from_local dispatches
    return make(local, spec, requires_grad=False)  # type: ignore[no-any-return]


def part(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """First and last index (exclusive) of a rank's part of a dimension, as ``torch.chunk`` and ``Shard`` cut it."""
    each = -(-size // ranks)
    return min(each * rank, size), min(each * (rank + 1), size)


def dim_to_cut(param: Tensor, ranks: int, by_rows: bool = False) -> int | None:
    """The dimension along which a parameter is cut; None if it stays whole. The same on every rank.

    Parts along the outermost dimension in memory are dense, as kernels need it. It is left only for a better balance.

    Args:
        param: the parameter.
        ranks: how many parts there are.
        by_rows: whether the first dimension is cut in any case. Then blocks of numbers that share a scale stay whole,
            and noise is that of one process; a single row is all one rank's. Default: False.
    """
    if param.layout is not torch.strided or not param.dim() or not param.numel():
        return None
    if by_rows:
        return 0
    strides = param.stride()
    dims = sorted(range(param.dim()), key=lambda dim: (param.shape[dim] == 1, -strides[dim]))
    if param.numel() <= SMALL or _excess(param.shape[dims[0]], ranks) <= MOST_EXCESS:
        return dims[0]
    return min(dims, key=lambda dim: _excess(param.shape[dim], ranks))


def _excess(size: int, ranks: int) -> float:
    """The largest part over an equal share."""
    return -(-size // ranks) * ranks / size
