"""Optimizers on meshes: the table of cases, layouts of tensors over ranks, and a comparison with one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, Case
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import descend

SHAPES = ((7, 3), (4,), (1, 5), (8, 2), (0, 3), (), (5, 1, 3))
# Sums of the same numbers in another order, over a few steps in float64.
CLOSE = dict(rtol=1e-12, atol=1e-12)


def heavy_ball(param, grad, momentum_buffer, lr, momentum):
    momentum_buffer = momentum * momentum_buffer + grad
    return param - lr * momentum_buffer, momentum_buffer


HeavyBall = descend.from_rule(heavy_ball, "HeavyBall", momentum=0.9)
TABLE = {str(case): case for case in (*CASES, Case(HeavyBall, torch.optim.SGD, dict(lr=0.1, momentum=0.9)))}
SOME = [name for name, case in TABLE.items() if case.ours in (descend.AdamW, descend.NAdam, descend.Rprop, HeavyBall)]

Put = Callable[[int, Tensor], Tensor]


def values(seed: int, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Random numbers, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def place(tensor: Tensor, mesh: DeviceMesh, *placements: Any) -> Tensor:
    """The part of a tensor that this rank holds, as a DTensor. Sends nothing."""
    fitting = [Replicate() if getattr(p, "dim", -1) >= tensor.ndim else p for p in placements]
    return distribute_tensor(tensor, mesh, fitting, src_data_rank=None)


def _line(*placements: Any) -> Callable[[], Put]:
    return lambda: _on(init_device_mesh("cpu", (dist.get_world_size(),)), *placements)


def _square(*placements: Any) -> Callable[[], Put]:
    return lambda: _on(init_device_mesh("cpu", (2, 2)), *placements)


def _on(mesh: DeviceMesh, *placements: Any) -> Put:
    return lambda index, tensor: place(tensor, mesh, *placements)


def _several() -> Put:
    """Experts on a mesh of their own, a mesh of fewer ranks, and plain tensors beside them."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    kinds: list[Put] = [
        lambda index, tensor: place(tensor, line, Shard(0)),
        lambda index, tensor: place(tensor, square, Shard(0), Shard(1)),
        lambda index, tensor: place(tensor, square["tp"], Shard(0)),
        lambda index, tensor: tensor.clone(),
    ]
    return lambda index, tensor: kinds[index % 4](index, tensor)


def _some_ranks() -> Put:
    """Every other tensor on two of three ranks only."""
    line = init_device_mesh("cpu", (3,))
    # Without a name it would equal a mesh of all of two ranks, and torch remembers those of earlier process groups.
    few = DeviceMesh("cpu", [0, 1], mesh_dim_names=("few",))
    return lambda index, tensor: place(tensor, few if index % 2 else line, Shard(0))


# Called on every rank; the placing function that comes back sends nothing.
LAYOUTS: dict[str, tuple[int, Callable[[], Put]]] = {
    "one rank": (1, _line(Shard(0))),
    "rows of 2": (2, _line(Shard(0))),
    "rows of 3": (3, _line(Shard(0))),
    "columns": (2, _line(Shard(1))),
    "copies": (2, _line(Replicate())),
    "copies of rows": (4, _square(Replicate(), Shard(0))),
    "rows and columns": (4, _square(Shard(0), Shard(1))),
    "rows twice": (4, _square(Shard(0), Shard(0))),
    "strided rows": (4, _square(_StridedShard(0, split_factor=2), Shard(0))),
    "several meshes": (4, _several),
    "some ranks": (3, _some_ranks),
}


def local(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def is_here(tensor: Tensor) -> bool:
    """Whether this rank holds something of it."""
    return not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is not None


def whole(tensor: Tensor) -> Tensor:
    """What all ranks hold together. A collective."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class Sharded:
    """Our optimizer on tensors that lie on ranks, and torch's on the whole tensors, in float64.

    Args:
        case: the optimizers.
        put: places tensors.
        both: options of both.
        ours: options of ours only. The other one is clipped by torch if there is a ``max_norm``.
    """

    def __init__(self, case: Case, put: Put, both: dict[str, Any] | None = None, **ours: Any) -> None:
        self.put = put
        self.params = [torch.nn.Parameter(put(index, value)) for index, value in enumerate(values(0))]
        self.whole = [torch.nn.Parameter(value) for value in values(0)]
        self.max_norm = ours.get("max_norm")
        options = copy.deepcopy({**case.options, **(both or {})})  # schedulers write to a tensor lr
        self.ours = case.ours(self._groups(self.params, case), **options, **ours)
        options = copy.deepcopy({**case.options, **(both or {})})
        self.theirs = case.theirs(self._groups(self.whole, case), **options)

    @staticmethod
    def _groups(params: list[Tensor], case: Case) -> list[Any]:
        decay = dict(weight_decay=0.2) if case.takes("weight_decay") else {}
        return [dict(params=params[:3]), dict(params=params[3:], **decay)]

    def give_grads(self, seed: int, factor: float = 1.0) -> None:
        """New gradients, the same for both."""
        for index, (param, whole, value) in enumerate(zip(self.params, self.whole, values(100 + seed), strict=True)):
            whole.grad = value * factor
            param.grad = self.put(index, whole.grad)

    def step(self, seed: int) -> None:
        """Take a step with both."""
        self.give_grads(seed)
        self.ours.step()
        if self.max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.whole, self.max_norm)
            torch.testing.assert_close(self.ours.grad_norm, norm.item(), **CLOSE)
        self.theirs.step()

    def assert_equal(self) -> None:
        """Assert that parameters and state are those of the whole tensors."""
        for index, (param, whole) in enumerate(zip(self.params, self.whole, strict=True)):
            if not is_here(param):
                continue
            torch.testing.assert_close(local(param), local(self.put(index, whole.detach())), **CLOSE)
            state = self.ours.state.get(param, {})
            for name, value in self.theirs.state.get(whole, {}).items():
                if isinstance(value, Tensor) and value.shape == whole.shape and whole.ndim:
                    assert type(state[name]) is type(param.data), name
                    torch.testing.assert_close(local(state[name]), local(self.put(index, value)), **CLOSE)
                elif isinstance(value, Tensor):
                    torch.testing.assert_close(local(state[name]), value, **CLOSE)


def bits(optimizer: torch.optim.Optimizer) -> list[bytes]:
    """Parameters and state that this rank holds, bit for bit."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            tensors = [param, *(v for v in optimizer.state.get(param, {}).values() if isinstance(v, Tensor))]
            found += [local(tensor).contiguous().numpy().tobytes() for tensor in tensors]
    return found


def mismatches(work: Callable[..., None], names: Iterable[str], *args: Any, **options: Any) -> list[str]:
    """What ``work(name, ...)`` finds wrong. Ranks go through all names together."""
    found = []
    for name in names:
        try:
            work(name, *args, **options)
        except AssertionError as error:
            found.append(f"{name}: {error}")
    return found
