"""Tensors as memory: their spans, which of them overlap, whether the memory is still there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may mean anything


def has_address(tensor: Tensor) -> bool:
    """Whether its elements have addresses, which no tensor on another device shares."""
    return type(tensor) in PLAIN and (tensor.is_cpu or tensor.is_cuda)


def row_count(tensor: Tensor) -> int:
    """How many rows it has, one an index of the first dimension; a 0-dim tensor is one row."""
    return tensor.shape[0] if tensor.dim() else 1


def row_width(tensor: Tensor) -> int:
    """How many elements a row has; 0 if there are no rows."""
    return tensor.numel() // row_count(tensor) if tensor.numel() else 0


def row_state_shape(tensor: Tensor) -> torch.Size:
    """Shape of a state of one number for each of its rows."""
    return torch.Size([row_count(tensor), 1])


def is_on_device(value: object) -> bool:
    """Whether it is a tensor that the host would have to wait for."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def widest(device: torch.device) -> torch.dtype:
    """The widest real dtype that a device computes in: not all GPUs have float64."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """In the widest real dtype of its device."""
    return tensor.to(widest(tensor.device))


def span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address (exclusive) of a tensor's memory; None if it has none to compare.

    Of other devices than CPUs and GPUs of CUDA and ROCm, the tensors in one storage count as the same memory.
    """
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return None
    if not has_address(tensor):
        start = 0 if tensor.is_meta else _storage_address(tensor)
        return (start, start + 1) if start else None
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _storage_address(tensor: Tensor) -> int:
    """Something that tells the storages of a device apart; 0 if there is nothing."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a device whose tensors have no storage
        return 0


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
    """Whether the storage of a tensor has been freed or shrunk below what its shape needs."""
    addresses = span(tensor)
    if addresses is None or not has_address(tensor):
        return False
    storage = tensor.untyped_storage()
    return addresses[0] == 0 or addresses[1] > storage.data_ptr() + storage.nbytes()


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, in the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
