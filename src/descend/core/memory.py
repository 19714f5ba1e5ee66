"""Tensors as memory: their spans, which of them overlap, whether the memory is still there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may mean anything


def span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address (exclusive) of a tensor's memory; None if it has none to compare.

    On devices other than CPU and CUDA's, which may share no address space, its storage's object stands for all of it.
    """
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return None
    if not tensor.is_cpu and not tensor.is_cuda:
        storage = tensor.untyped_storage()._cdata
        return storage, storage + 1
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def overlapping(spans: Sequence[tuple[int, int, bool, int]]) -> set[int]:
    """Owners of spans of memory ``(start, end, is written, owner)`` that meet others, where at least one is written."""
    if not spans:
        return set()
    start, end, written, owner = np.array(sorted(spans), np.int64).T
    # A cluster begins where everything before has ended.
    begins = np.flatnonzero(np.r_[True, start[1:] >= np.maximum.accumulate(end)[:-1]])
    members = np.diff(np.r_[begins, len(start)])
    shared = (members > 1) & (np.add.reduceat(written, begins) > 0)
    return set(owner[np.repeat(shared, members)].tolist())


def is_freed(tensor: Tensor) -> bool:
    """Whether the storage of a CPU tensor has been freed or shrunk below what its shape needs."""
    addresses = span(tensor) if tensor.is_cpu else None
    if addresses is None:
        return False
    storage = tensor.untyped_storage()
    return addresses[0] == 0 or addresses[1] > storage.data_ptr() + storage.nbytes()


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, in the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
