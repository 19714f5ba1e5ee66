"""How work is cut for GPUs: the one place to tune, with ``benchmarks/gpu.py``. Unmeasured, chosen by Little's law.

The memory of an H200 delivers 4.8 TB/s and answers after about 0.7 us. It is busy while 3.4 MB are under way: 25 KB on
each of 132 multiprocessors. A thread of AdamW has 16 bytes of each of 4 tensors under way, a program of 128 threads
8 KB. With at most ``REGISTERS`` registers a thread, 4 programs share a multiprocessor's 65,536: 32 KB. AdamW in float32
takes 40, so that 12 do, and most of them may wait for tables, or at their ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from descend.core import codecs
from descend.core.codecs import Codec, Formats, compute_dtype

THREADS = 128  # of a program
BYTES = 16  # that a thread reads at once, of the narrowest tensor or of float64
REGISTERS = 128  # of a thread, at most; tests compile every rule and look
NORM = 1024  # elements that a program summing squares has under way
PROGRAMS = 2048  # a launch should have so many, about 15 a multiprocessor, for the last ones to cost little
CHUNK = (1024, 8192)  # fewest and most elements of a chunk: reading tables costs a program about a microsecond
ENTRIES = 1024  # of a sparse gradient that a program takes which handles one number of each
SUMMED = (
    4096  # bytes of rows that a program sums: 8 numbers of float32 a thread, so registers let 6 programs wait at once
)
COLUMNS = 128  # of a row, at most, that a program takes
TILE = (4, 128)  # fewest and most rows; the longer, the fewer pieces of long runs, and the slower each of them
CARRIES = 64  # pieces of a long run that are added at a time
SUMS = 4096  # partial sums that one program adds at a time: 32 KB under way


def block(dtypes: Sequence[torch.dtype]) -> int:
    """Elements that a program has under way of each tensor.

    Arithmetic in float64 takes two registers a number: with eight elements a thread they would not suffice.
    """
    sizes = [dtype.itemsize for dtype in dtypes]
    return THREADS * BYTES // (max(sizes) if max(sizes) == 8 else min(sizes))


def blocks(formats: Formats) -> int:
    """Blocks of 256 numbers that a program has under way.

    Eight numbers a thread, so that sixteen bytes of what is not coded are read at once. Where codes are rounded at
    random, or arithmetic is in float64, registers suffice for four.
    """
    are_random = any(isinstance(format, Codec) and format.stochastic for format in formats)
    return 2 if are_random or compute_dtype(formats) == torch.float64 else 4


def chunk_table(sizes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cut tensors of these sizes into chunks; ``rows`` holds each tensor's row of scalars. See ``kernels``.

    The length of chunks depends on the sizes alone, and so do the bits of a norm.
    """
    return _cut(sizes, rows, _chunk_length(sizes))


def block_table(sizes: np.ndarray, widths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The same for tensors in formats, with rows of these widths: chunks of blocks. See ``formats_kernel``."""
    return _cut(sizes // widths * -(-widths // codecs.BLOCK), rows, _chunk_length(sizes) // codecs.BLOCK)


def _chunk_length(sizes: np.ndarray) -> int:
    """Elements of a chunk."""
    fewest, most = CHUNK
    length = fewest
    while length < most and sizes.sum() >= 2 * length * PROGRAMS:
        length *= 2
    return length


def _cut(sizes: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """Chunks of so many elements, or blocks."""
    counts = -(-sizes // length)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = np.cumsum(counts) - counts
    offset = (np.arange(counts.sum()) - first[tensor]) * length
    table = tensor, rows[tensor], offset, np.minimum(sizes[tensor] - offset, length)
    return np.ascontiguousarray(np.stack(table, axis=1), np.int64)
