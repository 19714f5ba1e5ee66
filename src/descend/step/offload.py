"""Updates of parameters whose state is in the host's memory: one bucket is stepped while others come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.core.measures import Sample
from descend.core.optimizer import MethodOptimizer
from descend.core.update import Cell, Summed, Update
from descend.offload.buckets import Bucket, Rows
from descend.offload.host_params import HostParams
from descend.sparse.attach import Tables
from descend.step.stages import make_updates
from descend.step.updates import Entry


class Traffic(NamedTuple):
    """How what one update works on comes to the host and leaves it.

    Attributes:
        arrive: waits for the gradients.
        prepare: waits for the parameters, right before they are updated.
        leave: sends the parameters back.
    """

    arrive: Callable[[], None]
    prepare: Callable[[], None]
    leave: Callable[[], None]


class OffloadedUpdate(Update):
    """An update of copies in the host's memory, between their arrival and their leaving.

    Args:
        inner: updates the copies.
        device: where the parameters are.
        traffic: how they come and leave.
    """

    def __init__(self, inner: Update, device: torch.device, traffic: Traffic) -> None:
        self._inner, self._device, self._traffic = inner, device, traffic
        self.params, self.share = inner.params, inner.share
        self.summed = [each._replace(sums=self._after_arrival(each)) for each in inner.summed]

    def _after_arrival(self, summed: Summed) -> Callable[[MethodOptimizer], Any]:
        def sums(optimizer: MethodOptimizer) -> Any:
            self._traffic.arrive()
            return summed.sums(optimizer)

        return sums

    @property
    def device(self) -> torch.device:
        return self._device

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        self._inner.compile(wants_norm, measures)

    def read(self, optimizer: MethodOptimizer) -> None:
        self._inner.read(optimizer)

    def sum_of_squares(self) -> float | Tensor:
        self._traffic.arrive()
        return self._inner.sum_of_squares()

    def set_scalars(self, optimizer: MethodOptimizer, scale: float) -> None:
        self._inner.set_scalars(optimizer, scale)

    def make_state(self, optimizer: MethodOptimizer) -> None:
        self._inner.make_state(optimizer)

    def run(self, optimizer: MethodOptimizer, sample: Sample | None = None) -> None:
        self._traffic.arrive()
        self._traffic.prepare()
        self._inner.run(optimizer, sample)
        self._traffic.leave()

    def release(self) -> None:
        self._inner.release()

    def is_valid(self, optimizer: MethodOptimizer) -> bool:
        return self._inner.is_valid(optimizer)

    def state_tensors(self) -> list[tuple[Tensor, str, Tensor]]:
        return self._inner.state_tensors()

    def cells(self) -> dict[Tensor, Cell]:
        return self._inner.cells()

    def written(self) -> np.ndarray:
        return self._inner.written()


def make_offloaded(
    optimizer: MethodOptimizer, tables: Tables, entries: Sequence[Entry], params: HostParams
) -> list[Update]:
    """Updates of what is on the CPU anyway, of buckets, of sparse gradients, and of what must keep its order."""
    here: list[Entry] = []
    buckets: dict[Bucket, list[Entry]] = {}
    sparse, in_order = [], []
    for entry in entries:
        bucket = params.bucket_of(entry.param)
        if entry.in_order:
            in_order.append(entry)
        elif bucket is None:
            here.append(entry)
        elif entry.sparse:
            sparse.append(entry)
        else:
            buckets.setdefault(bucket, []).append(entry)
    updates = make_updates(optimizer, tables, here)
    for bucket, members in buckets.items():
        for update in make_updates(optimizer, tables, members):
            updates.append(OffloadedUpdate(update, bucket.device, _together(bucket, update.params)))
    for entry in (*sparse, *in_order):
        (update,) = make_updates(optimizer, tables, [entry])
        bucket = params.bucket_of(entry.param)
        if bucket is not None:
            update = OffloadedUpdate(update, bucket.device, _alone(optimizer, bucket, entry))
        updates.append(update)
    return updates


def _together(bucket: Bucket, tensors: Sequence[Tensor]) -> Traffic:
    """Of copies that have come with their bucket."""
    return Traffic(bucket.arrive, lambda: bucket.touch(tensors), lambda: bucket.leave(tensors))


def _alone(optimizer: MethodOptimizer, bucket: Bucket, entry: Entry) -> Traffic:
    """Of one parameter, as it is when its turn comes: whole, or the rows that its gradient names."""
    if entry.sparse == "touched" and entry.local.grad is not None and entry.local.grad.sparse_dim() == 1:
        rows = Rows(bucket, entry.param)

        def bring_rows() -> None:
            bucket.touch([entry.local])
            if entry.in_order:  # what shares its memory may have been updated
                bucket.transfers.begin()
            rows.come()

        return Traffic(bucket.arrive, bring_rows, rows.leave)

    def bring() -> None:
        bucket.touch([entry.local])
        bucket.fetch(entry.param)

    return Traffic(bucket.arrive, bring, lambda: bucket.leave([entry.local]))
