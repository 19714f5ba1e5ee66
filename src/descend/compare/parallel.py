"""Ways to train one model on several ranks: how the model is wrapped, and how its optimizer is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import descend
from descend.compare.models import Block
from descend.reporting.errors import UsageError, unknown

Params: TypeAlias = Any  # parameters, or the module for classes of descend
Construct = Callable[[type[Optimizer], Params, Mapping[str, Any]], Optimizer]


def construct(optimizer: type[Optimizer], params: Params, options: Mapping[str, Any]) -> Optimizer:
    """Return ``optimizer(params, **options)``."""
    return optimizer(params, **options)


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        name: its name on the command line; None for one process.
        wrap: makes the module to call, from a model with the same weights on all ranks; it may change the model.
        construct: makes an optimizer from its class, the parameters of the wrapped module, and options.
        takes_sparse: whether gradients may be sparse.
    """

    name: str | None
    wrap: Callable[[nn.Module], nn.Module]
    construct: Construct
    takes_sparse: bool = True


def _unwrapped(model: nn.Module) -> nn.Module:
    return model


def _replicated(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The logits may be a view, which must not be written to. Nothing here does.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return model


def _with_sharded_state(optimizer: type[Optimizer], params: Params, options: Mapping[str, Any]) -> Optimizer:
    if issubclass(optimizer, descend.FirstOrder):
        return optimizer(params, **{**options, "shard_state": dist.group.WORLD})
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=optimizer, **options)


ALONE = Way(None, _unwrapped, construct)
WAYS = {
    "ddp": Way("ddp", _replicated, construct),
    "fsdp": Way("fsdp", _sharded, construct, takes_sparse=False),
    "zero1": Way("zero1", _replicated, _with_sharded_state),
}


def choose(name: str | None, nproc: int, batch_size: int, sparse: Sequence[str]) -> Way:
    """Return the way called ``name``, by default the first; raise a ``UsageError`` if the other options rule it out.

    Args:
        name: as on the command line; None for the first, or for one process.
        nproc: number of processes.
        batch_size: samples in a batch.
        sparse: the optimizers that take sparse gradients, as the user wrote them.
    """
    if name is not None and name not in WAYS:
        raise unknown("--parallel: there is no way to train", name, WAYS)
    if nproc == 1:
        if name is not None:
            raise UsageError(f"--parallel {name} needs several processes: give --nproc, 2 or more.")
        return ALONE
    way = WAYS[name or next(iter(WAYS))]
    if batch_size % nproc:
        raise UsageError(
            f"{nproc} processes take equal shares of a batch, so its size must be a multiple of {nproc}, "
            f"got {batch_size}: choose another --batch-size or --nproc."
        )
    if sparse and not way.takes_sparse:
        raise UsageError(
            f"--parallel {way.name} has no sparse gradients, which {', '.join(sparse)} needs: "
            "give other optimizers, or --parallel ddp."
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise UsageError("--nproc needs a torch that is built with torch.distributed and gloo.")
    return way
