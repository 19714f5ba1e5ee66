"""The averages that ``ema`` keeps, in the place of the weights for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from descend.core.interrupts import DeferredSignals
from descend.core.optimizer import MethodOptimizer
from descend.distributed.dtensors import is_dtensor, local_of
from descend.distributed.gather import gather_params
from descend.distributed.shard_state import as_sharded
from descend.state.container import checked_state

CHUNK = 2**20  # elements that are exchanged at a time


@contextmanager
def averages_in_place(optimizer: MethodOptimizer) -> Iterator[None]:
    """Exchange the weights and their averages for a block of code. See ``FirstOrder.averaged``.

    Raises:
        RuntimeError: if a step could not write a parameter or its average either; nothing has moved then.
    """
    exchange = _Exchange(optimizer)
    try:
        with DeferredSignals():  # Ctrl-C comes when all have been exchanged
            exchange.begin()
        yield
    finally:
        with DeferredSignals():
            exchange.end()


class _Exchange:
    """Parameters that have an average; with ``shard_state`` each rank exchanges its part and sends it to the others.

    Args:
        optimizer: their optimizer.
    """

    def __init__(self, optimizer: MethodOptimizer) -> None:
        self._optimizer = optimizer
        self._members: dict[Tensor, tuple[Tensor, Tensor]] = {}  # this rank's part of each, and of its average
        for group in optimizer.param_groups:
            for param in group["params"]:
                state = optimizer.state_of(param)
                if "ema" in state:
                    part = local_of(as_sharded(optimizer, param))
                    for _, average in checked_state(optimizer, param, part, ("ema",), group, state):
                        self._members[param] = part.detach(), average.detach()
        self._kept: dict[Tensor, Tensor] = {}
        self._exchanged: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Make the parameters the averages."""
        # A parameter that is narrower than its average cannot hold it: the weights are kept elsewhere.
        self._kept = {
            param: part.clone() for param, (part, average) in self._members.items() if part.dtype != average.dtype
        }
        for param, (part, average) in self._members.items():
            if param in self._kept:
                part.copy_(average)
            else:
                _swap(part, average)
            self._exchanged.append(param)
        self._send()

    @torch.no_grad()
    def end(self) -> None:
        """Make the parameters the weights again."""
        for param in reversed(self._exchanged):  # some may share memory
            part, average = self._members[param]
            if param in self._kept:
                part.copy_(self._kept[param])
            else:
                _swap(part, average)
        self._send()

    def _send(self) -> None:
        moved = self._exchanged
        torch.autograd.graph.increment_version([param for param in moved if is_dtensor(param)])
        gather_params(self._optimizer, moved)


def _swap(first: Tensor, second: Tensor) -> None:
    """Exchange what two tensors of one dtype hold, with little memory."""
    pairs = [(first, second)]
    if first.is_contiguous() and second.is_contiguous():
        pairs = list(zip(torch.split(first.view(-1), CHUNK), torch.split(second.view(-1), CHUNK), strict=True))
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
