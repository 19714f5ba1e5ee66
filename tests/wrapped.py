"""Models that torch wraps for several ranks, and the same model in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sharded import CLOSE, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

BATCH, WORDS = 12, 4  # multiples of every number of ranks
DATA, SEQUENCE = "data", "sequence"


class Net(nn.Module):
    """Uneven and empty shards, and a layer of each kind of tensor parallelism. Takes (batch, words, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 3)
        self.norm = nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(x * self.scale))))


def network() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(BATCH, WORDS, 6, generator=random, dtype=torch.float64)
    return inputs, torch.sin(inputs[..., :3] * 3)


def ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def sharded(**options: Any) -> Callable[[Net], nn.Module]:
    def wrap(net: Net) -> nn.Module:
        for layer in (net.up, net.down):
            fully_shard(layer, **options)
        fully_shard(net, **options)
        return net

    return wrap


def hybrid(net: Net) -> nn.Module:
    return sharded(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))(net)


TENSOR_PARALLEL = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(use_local_output=True),
}


def tensor_parallel(net: Net) -> nn.Module:
    return parallelize_module(net, init_device_mesh("cpu", (dist.get_world_size(),)), TENSOR_PARALLEL)


def both_parallel(net: Net) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return sharded(mesh=mesh["dp"])(net)


class Wrapping(NamedTuple):
    """How a model is wrapped.

    Attributes:
        world: number of ranks.
        wrap: wraps the model.
        replicas: in how many parts the batch is split.
        along: whether by samples or by words.
    """

    world: int
    wrap: Callable[[Net], nn.Module]
    parts: int
    along: str = DATA


WRAPPINGS = {
    "DDP": Wrapping(2, ddp, 2),
    "FSDP2 of 2": Wrapping(2, sharded(), 2),
    "FSDP2 of 3": Wrapping(3, sharded(), 3),
    "FSDP2, not resharded": Wrapping(2, sharded(reshard_after_forward=False), 2),
    "FSDP2, offloaded": Wrapping(2, sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), 2),
    "HSDP": Wrapping(4, hybrid, 4),
    "TP": Wrapping(2, tensor_parallel, 2, SEQUENCE),
    "FSDP2 x TP": Wrapping(4, both_parallel, 2),
}


def loss_on(rank: int, wrapping: Wrapping, model: nn.Module, seed: int) -> Tensor:
    """The loss of this rank's part of a batch."""
    x, y = batch(seed)
    if wrapping.along == DATA:
        part = rank * wrapping.parts // wrapping.world
        x, y = (t.chunk(wrapping.parts)[part] for t in (x, y))
        return (model(x) - y).square().mean()
    y = y.chunk(wrapping.parts, dim=1)[rank]
    return (model(x) - y).square().mean() / wrapping.parts


def reference_loss(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed)
    return (model(x) - y).square().mean()


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): param for name, param in model.named_parameters()}


def assert_same(model: nn.Module, ours: Any, net: Net, theirs: Any) -> None:
    """Assert that parameters and state are those of one process."""
    alone = dict(net.named_parameters())
    for name, param in named(model).items():
        torch.testing.assert_close(whole(param), alone[name].detach(), **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
        state = ours.state.get(param, {})
        for key, value in theirs.state.get(alone[name], {}).items():
            if isinstance(value, Tensor):
                assert state[key].shape == value.shape
                torch.testing.assert_close(whole(state[key]), value, **CLOSE)
