"""Memory of zeros of which only the touched pages cost anything."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**20  # bytes; below, what is left untouched is not worth a mapping
PIECE = 2**24  # bytes read at once
SAMPLE = 1000  # pages looked at before a copy
WORTHWHILE = 0.1  # of the pages must be zero; else ordinary memory, which the system may give in huge pages, is faster


def zeros(shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that is there only where it is written.

    ``torch.zeros`` writes all of it. ``numpy.zeros`` asks the system for huge pages: one written byte costs 2 MiB. So
    the memory is mapped here, and huge pages are declined. Where that cannot be had, and for small tensors, it is
    NumPy's. As with other memory of a process, a forked child gets its own.

    Args:
        shape: of the result.
        dtype: of the result.
    Example:
        >>> zeros((2, 3), torch.float32)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    shape = torch.Size([shape] if isinstance(shape, int) else shape)
    mapping = _mapped(shape.numel() * dtype.itemsize)
    if mapping is None and not shape.numel():
        return torch.empty(shape, dtype=dtype, device="cpu")
    if mapping is None:
        # Not torch.zeros, which would wait for its threads in a forked child, where there are none.
        data = torch.from_numpy(np.zeros(shape.numel() * dtype.itemsize, np.uint8))
        return data.view(dtype).view(shape)
    # The tensor keeps the mapping alive, and the mapping ends with it.
    return torch.frombuffer(mapping, dtype=dtype).view(shape)


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy of a CPU tensor that costs no memory where it is zero (not where it is -0.0).

    Args:
        tensor: what to copy, of any strides. Little of it is in memory twice at any time.
        dtype: of the result. Default: the tensor's.
    Example:
        >>> copied(torch.tensor([1.0, -0.0]), torch.float64)
        tensor([1., -0.], dtype=torch.float64)
    """
    dtype = dtype or tensor.dtype
    source = tensor.detach().resolve_conj().resolve_neg()
    if source.numel() * dtype.itemsize < SMALLEST or not _is_often_zero(source):
        return torch.empty(source.shape, dtype=dtype, device="cpu").copy_(source)
    result = zeros(source.shape, dtype)
    _fill(result, source)
    return result


def _mapped(size: int) -> mmap.mmap | None:
    """``size`` bytes of zeros without huge pages; None if they are too few, or the platform does not offer that."""
    if size < SMALLEST or sys.platform == "win32" or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return None
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:
        return None  # no memory, which torch says better; or a kernel without huge pages
    return mapping


def _is_often_zero(source: Tensor) -> bool:
    """Whether enough of some pages, evenly spread, are zero."""
    if not source.is_contiguous():
        return True
    pages, _ = _pages_of(source.view(-1))
    sample = pages[:: max(1, len(pages) // SAMPLE)]
    return bool(np.mean(_used(sample)) <= 1 - WORTHWHILE)


def _fill(result: Tensor, source: Tensor) -> None:
    """Write ``source`` into zeros of its shape, leaving alone the pages where it is zero."""
    if result.numel() * result.itemsize > PIECE and not source.is_contiguous():
        half = len(source) // 2
        for part in (slice(half), slice(half, None)) if half else (0,):
            _fill(result[part], source[part])
        return
    source, result = source.contiguous().view(-1), result.view(-1)
    count = PIECE // result.itemsize
    for first in range(0, len(source), count):
        pages, rest = _pages_of(source[first : first + count].to(result.dtype))
        targets, target_rest = _pages_of(result[first : first + count])
        used = np.flatnonzero(_used(pages))
        targets[used] = pages[used]
        if rest.any():
            target_rest[:] = rest


def _used(pages: np.ndarray) -> np.ndarray:
    """Which pages are not zero, by their bits."""
    return np.asarray(np.bitwise_or.reduce(pages, axis=1) != 0)


def _pages_of(flat: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The memory of a one-dimensional tensor: its pages as rows, and what is left of it, in bytes."""
    data = flat.view(torch.uint8).numpy()
    whole = len(data) - len(data) % mmap.PAGESIZE
    return data[:whole].view(np.uint64).reshape(-1, mmap.PAGESIZE // 8), data[whole:]
