"""A sample of sharded parameters, over all ranks."""

from __future__ import annotations

import copy

import numpy as np

from descend.core.optimizer import MethodOptimizer
from descend.diagnostics.monitoring.records import Record
from descend.distributed.ranks import Ranks, Share, share_of
from descend.distributed.shard_state import as_sharded


def reduced(optimizer: MethodOptimizer, record: Record) -> Record:
    """The record with the sums of all ranks, in which each element counts once. All ranks must call it."""
    shares = [share_of(as_sharded(optimizer, param)) for param in record.names.params]
    values: dict[Share | None, np.ndarray] = {None: np.zeros_like(record.sums)}
    for i, share in enumerate(shares):
        values.setdefault(share, np.zeros_like(record.sums))[i] = record.sums[i]
    totals = Ranks(shares).sum({share: sums.ravel().tolist() for share, sums in values.items()})
    whole = copy.copy(record)
    whole.sums = np.array(totals).reshape(record.sums.shape)
    whole.stepped = record.stepped | (whole.sums != 0).any(axis=1)
    return whole
