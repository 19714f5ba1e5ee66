"""How a rule runs: eagerly on tensors (``eager``) or compiled for CPUs (``cpu``). Kernels know no rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "cpu")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may mean anything


def why_not_cpu(param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why the compiled CPU backend cannot run this parameter; None if it can."""
    if reason := _unsuitable(param):
        return reason
    if not _is_dense(param):
        return f"not dense in memory (stride {param.stride()})"
    for name, tensor in state if grad is None else (("gradient", grad), *state):
        if reason := _unsuitable(tensor):
            return f"{name}: {reason}"
        if tensor.shape != param.shape or not _same_order(tensor, param):
            return f"{name}: shape {tuple(tensor.shape)} stride {tensor.stride()} differs from the parameter's"
    return None


def why_not_rows(param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why the compiled CPU backend cannot run single rows of this parameter; None if it can."""
    for _, tensor in (("", param), *state):
        if not tensor.is_contiguous():
            return f"rows that are not contiguous (stride {tensor.stride()})"
    return why_not_cpu(param, None, state)


def span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address (exclusive) of a CPU tensor's memory; None if it has none to compare."""
    if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.layout is not torch.strided or not tensor.numel():
        return None
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def meeting(spans: Sequence[tuple[int, int, bool, int]]) -> set[int]:
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
    found = span(tensor)
    if found is None:
        return False
    storage = tensor.untyped_storage()
    return found[0] == 0 or found[1] > storage.data_ptr() + storage.nbytes()


def _unsuitable(tensor: Tensor) -> str | None:
    if type(tensor) not in _PLAIN:
        return f"a {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"dtype {tensor.dtype}"
    return "an inference tensor or a lazy negation" if tensor.is_inference() or tensor.is_neg() else None


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory are equal elements."""
    if a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()):
        return True
    return all(s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, each place once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
