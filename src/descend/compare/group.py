"""Processes that train a model together: each takes its share of every batch, and all know how each one fares."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from descend.compare.ranks import Ending, Outcome
from descend.compare.tasks.task import Batch

TIMEOUT = 120.0  # seconds until ranks that wait for each other give up
GRACE = 5.0  # seconds in which all ranks must fail for it to count as the same failure


class Group:
    """The default process group, and a store that outlives each of its processes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def share(self, batch: Batch) -> Batch:
        inputs, targets = (part.chunk(self.world)[self.rank] for part in batch)
        return inputs, targets

    def mean(self, loss: float) -> float:
        total = torch.tensor(loss / self.world, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def tell(self, text: str) -> str:
        box = [text]
        dist.broadcast_object_list(box, src=0)
        return box[0]

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
