"""All-gathers of what ranks have updated: in buckets, at most two of which are under way."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from descend.core.optimizer import MethodOptimizer
from descend.distributed.dtensors import local_of, redistributed
from descend.distributed.shard_state import as_sharded, part, state_mesh

# As in DistributedDataParallel: a collective of this size costs far more than its latency, and an update of this size
# runs while one is under way.
BUCKET_BYTES = 25 * 2**20
IN_PLACE_BYTES = 2**20  # from here on a collective of its own costs less than copying in and out of a bucket


class Exchange(ABC):
    """What one collective carries: each rank sends what it has updated, and receives what the others have.

    Attributes:
        dtype, device: of all of it.
        width: elements that each rank sends; some may be padding.
    """

    dtype: torch.dtype
    device: torch.device
    width: int

    @abstractmethod
    def pack(self, rank: int, sent: Tensor) -> None:
        """Copy what ``rank`` has updated into a vector of ``width`` elements."""

    @abstractmethod
    def unpack(self, rank: int, received: Tensor) -> None:
        """Copy what ``rank`` has sent into its place."""

    def in_place(self) -> Tensor | None:
        """The memory of all ranks' parts as one vector, in the order of the ranks; None if it is not one."""
        return None


class Slab(NamedTuple):
    """The indices ``first`` to ``last`` (exclusive) of each rank's part of a dimension.

    Attributes:
        whole: the tensor, which is cut along ``dim``.
        dim: the dimension.
        ranks: how many.
        first, last: indices within a part.
    """

    whole: Tensor
    dim: int
    ranks: int
    first: int
    last: int

    @property
    def width(self) -> int:
        """Elements that it has of the first rank, which has most."""
        return (self.last - self.first) * (self.whole.numel() // self.whole.shape[self.dim])

    def of(self, rank: int) -> Tensor:
        """What it has of a rank: a view, as a vector if it is contiguous."""
        start, stop = part(self.whole.shape[self.dim], self.ranks, rank)
        first, last = min(start + self.first, stop), min(start + self.last, stop)
        view = self.whole.narrow(self.dim, first, last - first)
        return view.view(-1) if view.is_contiguous() else view

    def is_whole(self) -> bool:
        """Whether it is all of a tensor in which equal parts lie one after the other."""
        is_outermost = self.whole.is_contiguous() and all(size == 1 for size in self.whole.shape[: self.dim])
        return is_outermost and self.width * self.ranks == self.whole.numel()


class Slabs(Exchange):
    """Slabs of any tensors of one dtype and device. Their views are kept: making them takes longer than copying."""

    def __init__(self, slabs: Sequence[Slab]) -> None:
        self._slabs = slabs
        self.dtype, self.device = slabs[0].whole.dtype, slabs[0].whole.device
        self.width = sum(slab.width for slab in slabs)
        self._views: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, list[int]] = {}

    def pack(self, rank: int, sent: Tensor) -> None:
        views, places = self._pairs(rank, sent)
        if views:
            torch._foreach_copy_(places, views)

    def unpack(self, rank: int, received: Tensor) -> None:
        views, places = self._pairs(rank, received)
        if views:
            torch._foreach_copy_(views, places)

    def in_place(self) -> Tensor | None:
        is_one = len(self._slabs) == 1 and self._slabs[0].is_whole()
        return self._slabs[0].whole.view(-1) if is_one else None

    def _pairs(self, rank: int, vector: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The views of a rank, and the place of each in a vector."""
        if rank not in self._views:
            self._views[rank] = [view for slab in self._slabs if (view := slab.of(rank)).numel()]
            self._sizes[rank] = [view.numel() for view in self._views[rank]]
        views, sizes = self._views[rank], self._sizes[rank]
        places = torch.split_with_sizes(vector[: sum(sizes)], sizes) if sizes else ()
        return views, [
            place if view.dim() == 1 else place.view(view.shape) for view, place in zip(views, places, strict=True)
        ]


class NamedRows(Exchange):
    """Some rows of a tensor that is cut along its first dimension.

    Args:
        whole: the tensor.
        rows: their indices in ascending order, the same on every rank.
        ranks: how many.
    """

    def __init__(self, whole: Tensor, rows: Tensor, ranks: int) -> None:
        self._whole, self.dtype, self.device = whole, whole.dtype, whole.device
        stops = torch.tensor([part(len(whole), ranks, rank)[1] for rank in range(ranks)], device=rows.device)
        bounds = [0, *torch.searchsorted(rows, stops).tolist()]
        self._rows = [rows[start:stop] for start, stop in pairwise(bounds)]
        self.width = max(map(len, self._rows)) * (whole.numel() // len(whole))

    def pack(self, rank: int, sent: Tensor) -> None:
        self._place(rank, sent).copy_(self._whole.index_select(0, self._rows[rank]))

    def unpack(self, rank: int, received: Tensor) -> None:
        self._whole.index_copy_(0, self._rows[rank], self._place(rank, received))

    def _place(self, rank: int, vector: Tensor) -> Tensor:
        rows = self._rows[rank]
        return vector[: len(rows) * (self._whole.numel() // len(self._whole))].view(len(rows), *self._whole.shape[1:])


class Cut(NamedTuple):
    """A tensor that every rank has whole, and updates a part of.

    Attributes:
        whole: the tensor.
        dim: the dimension along which it is cut.
        ranks: into as many parts.
    """

    whole: Tensor
    dim: int
    ranks: int

    def slabs(self) -> list[Slab]:
        """All of it, in pieces that fit into a bucket if single indices do; in one piece if it needs no bucket."""
        size = self.whole.shape[self.dim]
        each = -(-size // self.ranks)
        everything = Slab(self.whole, self.dim, self.ranks, 0, each)
        if everything.is_whole():
            return [everything]
        spans = _spans(each, self.ranks * self.whole.nbytes // size)
        return [Slab(self.whole, self.dim, self.ranks, first, last) for first, last in spans]


class Bucket(NamedTuple):
    """Tensors that are updated together, and then gathered.

    Attributes:
        members: their indices in the list that was bucketed.
        exchanges: what follows.
    """

    members: list[int]
    exchanges: list[Slabs]


def bucketed(cuts: Sequence[Cut]) -> list[Bucket]:
    """Sort tensors into buckets of one dtype and device each, in their order."""
    buckets: list[tuple[list[int], list[list[Slab]]]] = []
    filling: dict[Any, tuple[int, int]] = {}  # the bucket that is being filled, and its bytes
    for index, cut in enumerate(cuts):
        slabs, size, key = cut.slabs(), cut.whole.nbytes, (cut.whole.dtype, cut.whole.device)
        if size >= BUCKET_BYTES or (size >= IN_PLACE_BYTES and slabs[0].is_whole()):
            buckets.append(([index], [[slab] for slab in slabs]))
            continue
        bucket, filled = filling.get(key, (0, BUCKET_BYTES))
        if filled + size > BUCKET_BYTES:
            bucket, filled = len(buckets), 0
            buckets.append(([], [[]]))
        buckets[bucket][0].append(index)
        buckets[bucket][1][0].extend(slabs)
        filling[key] = bucket, filled + size
    return [Bucket(members, [Slabs(slabs) for slabs in lists]) for members, lists in buckets]


class Transfers:
    """Collectives under way. Two may need a buffer each: one is filled while the other is sent.

    Args:
        mesh: of one dimension.
    """

    def __init__(self, mesh: Any) -> None:
        self._group, self._ranks, self._rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        # gloo's all-gather receives into memory of its own, and copies: broadcasts take a third of the time.
        self._broadcasts = mesh.device_type == "cpu"
        self._in_place: list[Any] = []
        self._buffered: deque[tuple[list[Any], Exchange, Tensor]] = deque()
        self._free: defaultdict[Any, list[Tensor]] = defaultdict(list)

    def start(self, exchange: Exchange) -> None:
        """Send this rank's part, and receive those of the others."""
        if not exchange.width or self._ranks == 1:
            return
        if (flat := exchange.in_place()) is not None:
            self._in_place += self._all_gather(flat)
            return
        if len(self._buffered) == 2:
            self._finish_oldest()
        memory = self._memory(exchange, exchange.width * self._ranks)
        buffer = memory[: exchange.width * self._ranks]
        exchange.pack(self._rank, buffer.chunk(self._ranks)[self._rank])
        self._buffered.append((self._all_gather(buffer), exchange, memory))

    def finish(self) -> None:
        """Wait for all that is under way."""
        while self._buffered:
            self._finish_oldest()
        while self._in_place:
            self._in_place.pop().wait()

    def _finish_oldest(self) -> None:
        works, exchange, memory = self._buffered.popleft()
        for work in works:
            work.wait()
        for rank, received in enumerate(memory[: exchange.width * self._ranks].chunk(self._ranks)):
            if rank != self._rank:
                exchange.unpack(rank, received)
        self._free[exchange.dtype, exchange.device].append(memory)

    def _all_gather(self, flat: Tensor) -> list[Any]:
        parts = flat.view(torch.uint8).chunk(self._ranks)  # not every backend sends every dtype
        if self._broadcasts:
            return [
                dist.broadcast(each, group=self._group, group_src=rank, async_op=True)
                for rank, each in enumerate(parts)
            ]
        # torch 2.13 renamed it.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return [all_gather(flat.view(torch.uint8), parts[self._rank], group=self._group, async_op=True)]

    def _memory(self, exchange: Exchange, elements: int) -> Tensor:
        """Memory for a buffer: that of an earlier one if it is large enough."""
        free = self._free[exchange.dtype, exchange.device]
        if free and free[-1].numel() >= elements:
            return free.pop()
        free.clear()
        return torch.empty(elements, dtype=exchange.dtype, device=exchange.device)


def gather_params(optimizer: MethodOptimizer, params: Iterable[Tensor]) -> None:
    """Exchange what ranks have changed, each in its part, of parameters that they have whole; for ``shard_state``."""
    pairs: list[tuple[Tensor, Any]] = [(param, as_sharded(optimizer, param)) for param in params]
    cuts = [
        Cut(param.detach(), sharded.placements[0].dim, sharded.device_mesh.size())
        for param, sharded in pairs
        if sharded is not param
    ]
    if not cuts:
        return
    transfers = Transfers(state_mesh(optimizer))
    for bucket in bucketed(cuts):
        for exchange in bucket.exchanges:
            transfers.start(exchange)
    transfers.finish()


def whole_of(dtensor: Any, to: int) -> Tensor | None:
    """All of a DTensor, in new memory on the CPU, on one rank of its mesh; None on the others.

    Where the mesh has one dimension, the others need memory for one bucket.
    """
    mesh, placement = dtensor.device_mesh, dtensor.placements[0]
    if mesh.ndim > 1 or not placement.is_shard() or not dtensor.numel():
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        whole = local_of(redistributed(dtensor, [replicate] * mesh.ndim))
        return whole.to("cpu", copy=True) if mesh.get_rank() == to else None
    ranks, local, dim, size = mesh.size(), local_of(dtensor).detach(), placement.dim, dtensor.shape[placement.dim]
    is_here = mesh.get_local_rank() == to
    here = torch.empty(dtensor.shape, dtype=dtensor.dtype, device="cpu") if is_here else None
    width = dtensor.numel() // size
    for first, last in _spans(-(-size // ranks), ranks * width * dtensor.itemsize):
        sent = local.new_empty((last - first) * width)
        present = local.narrow(dim, min(first, local.shape[dim]), max(0, min(last, local.shape[dim]) - first))
        sent[: present.numel()].view(present.shape).copy_(present)
        received = [torch.empty_like(sent) for _ in range(ranks)] if is_here else None
        as_bytes = [each.view(torch.uint8) for each in received] if received else None
        dist.gather(sent.view(torch.uint8), as_bytes, group=mesh.get_group(), group_dst=to)
        if here is not None and received:
            slabs = Slabs([Slab(here, dim, ranks, first, last)])
            for rank, values in enumerate(received):
                slabs.unpack(rank, values)
    return here


def _spans(size: int, index_bytes: int) -> list[tuple[int, int]]:
    """First and last index (exclusive) of pieces of at most a bucket, or of single indices."""
    step = max(1, BUCKET_BYTES // index_bytes)
    return [(first, min(first + step, size)) for first in range(0, size, step)]
