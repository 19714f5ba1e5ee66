"""All-gathers of what ranks have updated: in buckets, at most two of which are under way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from descend.core.method import Method
from descend.distributed.dtensors import local_of
from descend.distributed.shard_state import as_sharded, part, state_mesh

# As in DistributedDataParallel: a collective of this size costs far more than its latency, and an update of this size
# runs while one is under way.
BUCKET_BYTES = 25 * 2**20
IN_PLACE_BYTES = 2**20  # from here on a collective of its own costs less than copying in and out of a bucket


class Piece(ABC):
    """A part of a tensor that ranks have in equal numbers, some of it perhaps padding.

    Attributes:
        whole: the tensor, on every rank.
        width: elements that each rank sends.
    """

    whole: Tensor
    width: int

    @abstractmethod
    def read(self, rank: int) -> Tensor:
        """What ``rank`` has of it."""

    @abstractmethod
    def write(self, rank: int, values: Tensor) -> None:
        """Put what ``rank`` has sent, ``width`` elements in a row, into its place."""

    def in_place(self) -> Tensor | None:
        """The tensor as one vector of equal parts, in the order of the ranks; None if it is none."""
        return None


class Slab(Piece):
    """The indices ``first`` to ``last`` (exclusive) of each rank's part of a dimension.

    Args:
        whole: the tensor, which is cut along ``dim``.
        dim: the dimension.
        ranks: how many.
        first, last: indices within a part.
    """

    def __init__(self, whole: Tensor, dim: int, ranks: int, first: int, last: int) -> None:
        self.whole, self._dim, self._ranks, self._first, self._last = whole, dim, ranks, first, last
        self.width = (last - first) * (whole.numel() // whole.shape[dim])

    def read(self, rank: int) -> Tensor:
        start, stop = part(self.whole.shape[self._dim], self._ranks, rank)
        first, last = min(start + self._first, stop), min(start + self._last, stop)
        return self.whole.narrow(self._dim, first, last - first)

    def write(self, rank: int, values: Tensor) -> None:
        target = self.read(rank)
        target.copy_(values[: target.numel()].view(target.shape))

    def in_place(self) -> Tensor | None:
        is_all = self.width * self._ranks == self.whole.numel()
        is_outermost = self.whole.is_contiguous() and all(size == 1 for size in self.whole.shape[: self._dim])
        return self.whole.view(-1) if is_all and is_outermost else None


class NamedRows(Piece):
    """Some rows of a tensor that is cut along its first dimension.

    Args:
        whole: the tensor.
        rows: their indices in ascending order, the same on every rank.
        ranks: how many.
    """

    def __init__(self, whole: Tensor, rows: Tensor, ranks: int) -> None:
        self.whole = whole
        stops = torch.tensor([part(len(whole), ranks, rank)[1] for rank in range(ranks)], device=rows.device)
        bounds = [0, *torch.searchsorted(rows, stops).tolist()]
        self._rows = [rows[start:stop] for start, stop in pairwise(bounds)]
        self.width = max(map(len, self._rows)) * (whole.numel() // len(whole))

    def read(self, rank: int) -> Tensor:
        return self.whole.index_select(0, self._rows[rank])

    def write(self, rank: int, values: Tensor) -> None:
        rows = self._rows[rank]
        shape = len(rows), *self.whole.shape[1:]
        self.whole.index_copy_(0, rows, values[: shape[0] * (self.whole.numel() // len(self.whole))].view(shape))


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
        if everything.in_place() is not None:
            return [everything]
        spans = _spans(each, self.ranks * self.whole.nbytes // size)
        return [Slab(self.whole, self.dim, self.ranks, first, last) for first, last in spans]


class Bucket(NamedTuple):
    """Tensors that are updated together, and then gathered.

    Attributes:
        members: their indices in the list that was bucketed.
        gathers: the pieces of each collective.
    """

    members: list[int]
    gathers: list[list[Piece]]


def bucketed(cuts: Sequence[Cut]) -> list[Bucket]:
    """Sort tensors into buckets of one dtype and device each, in their order."""
    buckets: list[Bucket] = []
    filling: dict[Any, tuple[Bucket, int]] = {}
    for index, cut in enumerate(cuts):
        slabs = cut.slabs()
        is_in_place = len(slabs) == 1 and slabs[0].in_place() is not None and cut.whole.nbytes >= IN_PLACE_BYTES
        if is_in_place or cut.whole.nbytes >= BUCKET_BYTES:
            buckets.append(Bucket([index], [[slab] for slab in slabs]))
            continue
        key, size = (cut.whole.dtype, cut.whole.device), cut.whole.nbytes
        bucket, filled = filling.get(key, (None, 0))
        if bucket is None or filled + size > BUCKET_BYTES:
            bucket, filled = Bucket([], [[]]), 0
            buckets.append(bucket)
        bucket.members.append(index)
        bucket.gathers[0].extend(slabs)
        filling[key] = bucket, filled + size
    return buckets


class Transfers:
    """Collectives under way. Two have a buffer each: one is filled while the other is sent.

    Args:
        mesh: of one dimension.
    """

    def __init__(self, mesh: Any) -> None:
        self._group, self._ranks, self._rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self._under_way: deque[tuple[Any, Callable[[], None]]] = deque()
        self._free: defaultdict[Any, list[Tensor]] = defaultdict(list)

    def start(self, pieces: Sequence[Piece]) -> None:
        """Send this rank's part of some pieces, all of one dtype and device, and receive those of the others."""
        if len(self._under_way) == 2:
            self._finish_one()
        width = sum(piece.width for piece in pieces)
        if not width or self._ranks == 1:
            return
        flat = pieces[0].in_place() if len(pieces) == 1 else None
        if flat is not None:
            self._under_way.append((self._all_gather(flat), _nothing))
            return
        memory = self._memory(pieces[0].whole, width * self._ranks)
        buffer = memory[: width * self._ranks]
        own = buffer[self._rank * width :][:width]
        for piece, values in _split(pieces, own):
            sent = piece.read(self._rank)
            values[: sent.numel()].view(sent.shape).copy_(sent)
        self._under_way.append((self._all_gather(buffer), lambda: self._receive(pieces, buffer, memory)))

    def finish(self) -> None:
        """Wait for all that is under way."""
        while self._under_way:
            self._finish_one()

    def _finish_one(self) -> None:
        work, receive = self._under_way.popleft()
        work.wait()
        receive()

    def _receive(self, pieces: Sequence[Piece], buffer: Tensor, memory: Tensor) -> None:
        for rank, sent in enumerate(buffer.chunk(self._ranks)):
            if rank != self._rank:
                for piece, values in _split(pieces, sent):
                    piece.write(rank, values)
        self._free[memory.dtype, memory.device].append(memory)

    def _all_gather(self, flat: Tensor) -> Any:
        flat = flat.view(torch.uint8)  # not every backend sends every dtype
        own = flat.chunk(self._ranks)[self._rank]
        # torch 2.13 renamed it.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return all_gather(flat, own, group=self._group, async_op=True)

    def _memory(self, like: Tensor, elements: int) -> Tensor:
        """Memory for a buffer: that of an earlier one if it is large enough."""
        free = self._free[like.dtype, like.device]
        if free and free[-1].numel() >= elements:
            return free.pop()
        free.clear()
        return torch.empty(elements, dtype=like.dtype, device=like.device)


def gather_params(method: Method, params: Iterable[Tensor]) -> None:
    """Exchange what ranks have changed, each in its part, of parameters that they have whole; for ``shard_state``."""
    pairs: list[tuple[Tensor, Any]] = [(param, as_sharded(method, param)) for param in params]
    cuts = [
        Cut(param.detach(), sharded.placements[0].dim, sharded.device_mesh.size())
        for param, sharded in pairs
        if sharded is not param
    ]
    if not cuts:
        return
    transfers = Transfers(state_mesh(method))
    for bucket in bucketed(cuts):
        for pieces in bucket.gathers:
            transfers.start(pieces)
    transfers.finish()


def whole_of(dtensor: Any, to: int) -> Tensor | None:
    """All of a DTensor, in new memory on the CPU, on one rank of its mesh; None on the others.

    Where the mesh has one dimension, the others need memory for one bucket.
    """
    mesh, placement = dtensor.device_mesh, dtensor.placements[0]
    if mesh.ndim > 1 or not placement.is_shard() or not dtensor.numel():
        whole: Tensor = dtensor.full_tensor()
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
            slab = Slab(here, dim, ranks, first, last)
            for rank, values in enumerate(received):
                slab.write(rank, values)
    return here


def _spans(size: int, index_bytes: int) -> list[tuple[int, int]]:
    """First and last index (exclusive) of pieces of at most a bucket, or of single indices."""
    step = max(1, BUCKET_BYTES // index_bytes)
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _nothing() -> None:
    """What was gathered in place needs no copying."""


def _split(pieces: Iterable[Piece], flat: Tensor) -> Iterable[tuple[Piece, Tensor]]:
    """Each piece, and its place in a rank's part of a buffer."""
    offset = 0
    for piece in pieces:
        yield piece, flat[offset : offset + piece.width]
        offset += piece.width
