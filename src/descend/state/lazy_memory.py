"""Zero tensors in lazily committed memory; untouched pages use no RAM."""

from __future__ import annotations

import errno
import mmap
import sys
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from descend.core.memory import PLAIN
from descend.core.options import StatePages
from descend.state.available_memory import available_memory

MIN_LAZY_BYTES = 2**20  # smaller tensors are committed at once
BLOCK_BYTES = 2**21  # a huge page
SCATTERED = 1 / 16  # of the blocks of a tensor: rows in more of them are scattered,
DENSE = 0.5  # of pages: rows in more of them are dense, not scattered
MAX_SHARE = 0.5  # of the available memory that "auto" commits ahead of use, for all tensors together
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; Python does not name it

COPIED_BYTES = 2**24  # at a time
SAMPLED_PAGES = 1000  # of a tensor that is to be copied
MIN_ZERO_PAGES = 0.1  # of the sample; with fewer, a copy in ordinary memory is faster


def zeros(shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that is committed page by page, when it is first written.

    ``torch.zeros`` writes all of it. ``numpy.zeros`` asks for huge pages, so one written byte costs 2 MiB. This maps
    the memory itself and declines huge pages. Where mappings are not available, the zeros are NumPy's. A forked child
    has its own copy, as with any other memory.

    Args:
        shape: shape of the result.
        dtype: dtype of the result.
    Example:
        >>> zeros((2, 3), torch.float32)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    shape = torch.Size([shape] if isinstance(shape, int) else shape)
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if size >= MIN_LAZY_BYTES and (mapping := _mapped(size)) is not None:
        # The tensor keeps the mapping alive, and the mapping ends with it.
        tensor = torch.frombuffer(mapping, dtype=dtype).view(shape)
        _mappings[tensor.data_ptr()] = mapping
        return tensor
    # Not torch.zeros: in a forked child it would wait for threads that do not exist there.
    data = np.zeros(size, np.uint8)
    if size < MIN_LAZY_BYTES:
        data.fill(0)
    return torch.from_numpy(data).view(dtype).view(shape)


def commit(tensors: Iterable[Tensor]) -> None:
    """Commit all pages of the tensors that ``zeros`` made; others are left alone."""
    for tensor in tensors:
        if (mapping := _mapping_of(tensor)) is not None:
            mapping.commit()


def commit_rows(tensors: Iterable[Tensor], rows: np.ndarray, count: int, pages: StatePages = "auto") -> None:
    """Commit what a step is about to write, on this thread: faults of several threads wait for each other.

    Measured, a page costs 1.4 us on one thread, and 10 us on two. Tensors that ``zeros`` did not make are left alone.

    Args:
        tensors: tensors whose memory is divided into rows.
        rows: numbers of the rows that are written, in ascending order.
        count: number of rows of each tensor.
        pages: ``"touched"`` commits the pages of these rows. ``"all"`` commits the whole tensor, in huge pages where
            the system has them. ``"auto"`` is ``"all"`` if memory is plentiful and the rows are scattered or in more
            than half of the tensor's pages, else ``"touched"``. Rows are scattered if they lie in more than a
            sixteenth of the tensor's 2 MiB blocks and in less than half of the pages of these blocks. Memory is
            plentiful if all tensors committed as a whole take at most half of what would be available without them.
            Default: ``"auto"``.
    """
    touched: dict[int, np.ndarray] = {}  # by bytes in a row
    for tensor in tensors:
        mapping = _mapping_of(tensor)
        if mapping is not None and not mapping.is_committed and len(rows):
            size = tensor.nbytes // count
            if size not in touched:
                touched[size] = _pages_of_rows(rows, size)
            mapping.commit_pages(touched[size], pages)


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy of a CPU tensor that uses no memory where it is zero (except where it is -0.0).

    Args:
        tensor: the tensor to copy, of any strides. At any time only a small part of it is in memory twice.
        dtype: dtype of the result. Default: the tensor's.
    Example:
        >>> copied(torch.tensor([1.0, -0.0]), torch.float64)
        tensor([1., -0.], dtype=torch.float64)
    """
    dtype = dtype or tensor.dtype
    source = tensor.detach().resolve_conj().resolve_neg()
    if source.numel() * dtype.itemsize < MIN_LAZY_BYTES or not _is_often_zero(source):
        return torch.empty(source.shape, dtype=dtype, device="cpu").copy_(source)
    result = zeros(source.shape, dtype)
    _fill(result, source)
    return result


class _Mapping(mmap.mmap):
    """Anonymous private memory that knows which of its pages exist.

    Attributes:
        is_committed: whether all of them do.
    """

    is_committed = False
    _has_run_out = False  # of memory for all of them
    _exists: np.ndarray  # by page

    def commit_pages(self, pages: np.ndarray, policy: StatePages) -> None:
        """Commit ``pages``, in ascending order, or all; see ``commit_rows``."""
        new = pages[~self._exists[pages]]
        if len(new) == 0:
            return
        if policy == "all" or (policy == "auto" and self._is_worth_all(pages) and self._is_affordable()):
            self.commit()
        if not self.is_committed:
            self._write(new)

    def commit(self) -> None:
        """Commit all pages, huge ones where the system has them; stop where memory runs out."""
        if self.is_committed or self._has_run_out:
            return
        self.madvise(mmap.MADV_HUGEPAGE)
        try:
            self.madvise(POPULATE_WRITE)
            self.is_committed = True
        except OSError as error:
            if error.errno == errno.EINVAL:  # an older kernel
                self._write(np.arange(len(self._exists)))
            else:
                self._has_run_out = True
                self.madvise(mmap.MADV_NOHUGEPAGE)

    def _is_worth_all(self, pages: np.ndarray) -> bool:
        total, in_block = len(self._exists), BLOCK_BYTES // mmap.PAGESIZE
        touched, in_blocks = _distinct(pages), _distinct(pages // in_block) * in_block
        is_scattered = in_blocks > SCATTERED * total and touched < DENSE * in_blocks
        return is_scattered or touched > DENSE * total

    def _is_affordable(self) -> bool:
        committed = sum(len(mapping) for mapping in _mappings.values() if mapping.is_committed)
        return committed + len(self) <= MAX_SHARE * (committed + available_memory())

    def _write(self, pages: np.ndarray) -> None:
        """Write to each page what it has already."""
        np.frombuffer(self, np.uint8)[pages * mmap.PAGESIZE] |= 0
        self._exists[pages] = True
        self.is_committed = bool(self._exists.all())


_mappings: WeakValueDictionary[int, _Mapping] = WeakValueDictionary()  # by address


def _mapped(size: int) -> _Mapping | None:
    """``size`` bytes of zeros in small pages; None if the platform does not offer them."""
    if sys.platform == "win32" or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return None
    try:
        mapping = _Mapping(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:
        return None  # no memory, which torch says better; or a kernel without huge pages
    mapping._exists = np.zeros(-(-size // mmap.PAGESIZE), np.bool_)
    return mapping


def _mapping_of(tensor: Tensor) -> _Mapping | None:
    return _mappings.get(tensor.data_ptr()) if type(tensor) in PLAIN and tensor.is_cpu else None


def _pages_of_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """The pages that rows of ``size`` bytes lie in."""
    first, last = rows * size // mmap.PAGESIZE, ((rows + 1) * size - 1) // mmap.PAGESIZE
    most = int((last - first).max()) + 1
    return first if most == 1 else np.minimum(first[:, None] + np.arange(most), last[:, None]).ravel()


def _distinct(ascending: np.ndarray) -> int:
    return 1 + int(np.count_nonzero(np.diff(ascending)))


def _is_often_zero(source: Tensor) -> bool:
    """Whether enough of some pages, evenly spread, are zero."""
    if not source.is_contiguous():
        return True
    pages, _ = _pages_of(source.view(-1))
    sample = pages[:: max(1, len(pages) // SAMPLED_PAGES)]
    return bool(np.mean(_used(sample)) <= 1 - MIN_ZERO_PAGES)


def _fill(result: Tensor, source: Tensor) -> None:
    """Write ``source`` into zeros of its shape, leaving alone the pages where it is zero."""
    if result.numel() * result.itemsize > COPIED_BYTES and not source.is_contiguous():
        half = len(source) // 2
        for part in (slice(half), slice(half, None)) if half else (0,):
            _fill(result[part], source[part])
        return
    source, result = source.contiguous().view(-1), result.view(-1)
    count = COPIED_BYTES // result.itemsize
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
