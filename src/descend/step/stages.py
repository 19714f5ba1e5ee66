"""The updates of a step in their order; with ``shard_state`` in stages, each followed by what its ranks exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from descend.backends.backend import Backend
from descend.core.measures import Sample
from descend.core.method import MethodRef
from descend.core.optimizer import MethodOptimizer
from descend.core.update import Update
from descend.distributed.gather import Cut, Exchange, NamedRows, Slabs, Transfers, bucketed
from descend.distributed.local_params import LocalParams
from descend.distributed.ranks import Share
from descend.sparse.attach import Tables
from descend.sparse.update import SparseUpdate
from descend.step.updates import Entry, LaunchUpdate, SingleUpdate


class Stage(NamedTuple):
    """Updates that run together.

    Attributes:
        updates: the updates.
        exchanges: what the ranks exchange then.
        waits: whether the next stage needs what is exchanged.
    """

    updates: list[Update]
    exchanges: Callable[[], Sequence[Exchange]]
    waits: bool = False


def make_updates(optimizer: MethodOptimizer, tables: Tables, entries: Sequence[Entry]) -> list[Update]:
    """Launches first, then sparse updates, then those that must keep the order of the groups."""
    launched: dict[tuple[str, MethodRef, Share | None, torch.device], tuple[Backend, list[Entry]]] = {}
    sparse: list[Update] = []
    in_order: list[Update] = []
    for entry in entries:
        if entry.sparse:
            table = tables.of(entry.param) if entry.sparse == "exact" else None
            update = SparseUpdate(
                optimizer,
                entry.param,
                entry.local,
                entry.share,
                entry.group,
                entry.method,
                entry.rule,
                entry.sparse,
                entry.backend,
                table,
                entry.formats,
            )
            (in_order if entry.in_order else sparse).append(update)
        elif entry.in_order:
            differentiable = bool(optimizer.param_groups[entry.group].get("differentiable"))
            in_order.append(SingleUpdate(entry, differentiable))
        else:
            place = entry.backend.name, entry.method, entry.share, entry.local.device
            launched.setdefault(place, (entry.backend, []))[1].append(entry)
    launches = [LaunchUpdate(optimizer, backend, entries) for backend, entries in launched.values()]
    return [*launches, *sparse, *in_order]


def make_stages(
    optimizer: MethodOptimizer, tables: Tables, entries: Sequence[Entry], params: LocalParams
) -> list[Stage]:
    """The updates of parameters that this rank has whole, and updates in part; the others come first.

    Parameters that share memory come last, one a stage: the next may need all of what the last one has become.
    """
    stages, dense, last = [], [], []
    others: list[Entry] = []
    for entry in entries:
        cut = params.cut_of(entry.param)
        if entry.shares_memory:
            exchanges = _exchanges(entry, cut) if cut else _none
            last.append(Stage(make_updates(optimizer, tables, [entry]), exchanges, waits=True))
        elif cut is None:
            others.append(entry)
        elif entry.sparse:
            stages.append(Stage(make_updates(optimizer, tables, [entry]), _exchanges(entry, cut)))
        else:
            dense.append((entry, cut))
    for bucket in bucketed([cut for _, cut in dense]):
        updates = make_updates(optimizer, tables, [dense[member][0] for member in bucket.members])
        stages.append(Stage(updates, lambda exchanges=bucket.exchanges: exchanges))  # type: ignore[misc]
    return [Stage(make_updates(optimizer, tables, others), _none), *stages, *last]


def run_stages(optimizer: MethodOptimizer, stages: Sequence[Stage], mesh: Any, sample: Sample | None = None) -> None:
    """Run updates while the results of earlier ones travel."""
    transfers = Transfers(mesh)
    for stage in stages:
        for update in stage.updates:
            update.run(optimizer, sample)
        for exchange in stage.exchanges():
            transfers.start(exchange)
        if stage.waits:
            transfers.finish()
    transfers.finish()


def _none() -> Sequence[Exchange]:
    return ()


def _exchanges(entry: Entry, cut: Cut) -> Callable[[], Sequence[Exchange]]:
    """What changes in one parameter: the rows that its sparse gradient names, or all of it."""

    def exchanges() -> Sequence[Exchange]:
        grad = entry.param.grad
        if entry.sparse == "touched" and grad is not None and cut.dim == 0 and grad.sparse_dim() > 0:
            return [NamedRows(cut.whole, torch.unique(grad._indices()[0]), cut.ranks)]
        return [Slabs([slab]) for slab in cut.slabs()]

    return exchanges
