"""State that lies on several ranks, whole on one of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from descend.core.optimizer import MethodOptimizer
from descend.distributed.dtensors import is_dtensor
from descend.distributed.gather import whole_of
from descend.distributed.shard_state import state_mesh


def consolidated(optimizer: MethodOptimizer, packed: dict[str, Any], to: int) -> dict[str, Any] | None:
    """A state dictionary without DTensors on rank ``to``; None on the others. See ``FirstOrder``."""
    mesh = state_mesh(optimizer)
    ranks = mesh.size() if mesh else dist.get_world_size() if dist.is_initialized() else 1
    rank = mesh.get_local_rank() if mesh else dist.get_rank() if dist.is_initialized() else 0
    if not isinstance(to, int) or not 0 <= to < ranks:
        raise ValueError(f"{type(optimizer).__name__}: to must be a rank, 0 <= to < {ranks}, got {to!r}.")
    state: dict[Any, Any] = {}
    for key, content in packed["state"].items():
        whole = {name: whole_of(value, to) if is_dtensor(value) else value for name, value in content.items()}
        if rank == to:
            state[key] = whole
    return {**packed, "state": state} if rank == to else None
