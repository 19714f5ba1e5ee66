"""The processes that train a model together: each takes its share of every batch, and all know how each one fares."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from descend.compare.tasks import Batch

TIMEOUT = 120.0  # seconds until ranks that wait for each other give up
GRACE = 5.0  # seconds in which all ranks must fail for it to count as the same failure


class Outcome(NamedTuple):
    """How a run ended on one rank.

    Args:
        steps: complete steps.
        state_bytes: memory of the optimizer's state on this rank.
        error: type and text of the exception that ended the run, or None.
        order: the place among the ranks, the first to end being 1.
    """

    steps: int
    state_bytes: int
    error: str | None
    order: int = 1

    def is_like(self, other: Outcome) -> bool:
        """Whether both ended after the same step, both well or both with the same type of exception."""
        kinds = [outcome.error and outcome.error.partition(":")[0] for outcome in (self, other)]
        return self.steps == other.steps and kinds[0] == kinds[1]


class Ending(NamedTuple):
    """How a run ended on all ranks.

    Args:
        outcomes: by rank; None for a rank that was not heard of.
        is_common: whether it ended alike on all of them, so that they can go on together.
    """

    outcomes: Sequence[Outcome | None]
    is_common: bool

    @property
    def state_bytes(self) -> tuple[int | None, ...]:
        return tuple(outcome and outcome.state_bytes for outcome in self.outcomes)

    @property
    def error(self) -> str | None:
        """The first error; it names its rank unless all ranks have the same."""
        failed = [(got.order, rank, got.error) for rank, got in enumerate(self.outcomes) if got and got.error]
        if not failed:
            return None
        _, rank, error = min(failed)
        return error if self.is_common else f"rank {rank}: {error}"


class Ranks(Protocol):
    """What a comparison asks of the processes that it runs in."""

    rank: int
    world: int

    def share(self, batch: Batch) -> Batch:
        """Return this rank's part of a batch, whose size is a multiple of the number of ranks."""

    def measure(self, loss: float, seconds: float) -> tuple[float, tuple[float, ...]]:
        """Return the mean of the ranks' losses, and the seconds of each."""

    def end(self, name: str, outcome: Outcome) -> Ending:
        """Tell the other ranks how the run called ``name`` ended here, and return how it ended there."""


class Alone:
    """One process."""

    rank = 0
    world = 1

    def share(self, batch: Batch) -> Batch:
        return batch

    def measure(self, loss: float, seconds: float) -> tuple[float, tuple[float, ...]]:
        return loss, (seconds,)

    def end(self, name: str, outcome: Outcome) -> Ending:
        return Ending([outcome], is_common=True)


class Group:
    """The default process group, and a store that outlives each of its processes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def share(self, batch: Batch) -> Batch:
        inputs, targets = (part.chunk(self.world)[self.rank] for part in batch)
        return inputs, targets

    def measure(self, loss: float, seconds: float) -> tuple[float, tuple[float, ...]]:
        figures = torch.zeros(1 + self.world, dtype=torch.float64)
        figures[0] = loss / self.world
        figures[1 + self.rank] = seconds
        dist.all_reduce(figures)
        mean, *each = figures.tolist()
        return mean, tuple(each)

    def end(self, name: str, outcome: Outcome) -> Ending:
        # A rank that failed may have left the others waiting in a collective operation, so this needs none: all go
        # through the store, which the launcher keeps. If only some ranks fail, they return without the others and
        # end their processes. That breaks the operation for the others, who then find the error here.
        store = PrefixStore(name, self.store)
        outcome = outcome._replace(order=store.add("order", 1))
        store.set(str(self.rank), json.dumps(outcome))
        is_complete = self._has_all(store, GRACE if outcome.error else TIMEOUT)
        outcomes = [self._read(store, rank) for rank in range(self.world)]
        is_common = is_complete and all(got is not None and got.is_like(outcome) for got in outcomes)
        # The first verdict is that of all ranks, also if another rank ended just after this one stopped waiting.
        verdict = store.compare_set("verdict", "", "together" if is_common else "apart")
        return Ending(outcomes, is_common=verdict == b"together")

    def _has_all(self, store: Store, seconds: float) -> bool:
        """Wait until every rank has ended the run; return False if that takes more than ``seconds``."""
        # Store.wait would not let Ctrl-C through.
        deadline = time.monotonic() + seconds
        while not store.check([str(rank) for rank in range(self.world)]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _read(self, store: Store, rank: int) -> Outcome | None:
        return Outcome(*json.loads(store.get(str(rank)))) if store.check([str(rank)]) else None


def join() -> Group:
    """Join the process group that the environment variables of ``torchrun`` describe."""
    limit = timedelta(seconds=TIMEOUT)
    store, rank, world = next(rendezvous("env://", timeout=limit))
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=rank, world_size=world, timeout=limit)
    return Group(store)
