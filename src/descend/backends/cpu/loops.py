"""Compiles and runs plain Python functions that loop over float64 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from descend.backends.cpu import library, object_files, threads


def run(function: Any, *arrays: np.ndarray) -> None:
    """Call ``function``, compiled, with contiguous float64 arrays, each of them flattened.

    Args:
        function: uses only arithmetic, ``math`` and helpers made of these; returns nothing.
        arrays: its arguments, which it reads and writes.
    """
    arguments = np.array([(array.ctypes.data, array.size) for array in arrays], np.int64)
    object_files.call(library.loop(function, len(arrays)), arguments.ctypes.data)


def run_in_parts(function: Any, arrays: Sequence[np.ndarray], scratch: np.ndarray, elements: int) -> None:
    """Call ``function``, compiled, for each part of arrays that are cut along their first dimension.

    Args:
        function: as for ``run``; no row may depend on another.
        arrays: contiguous float64 arrays (K, ...).
        scratch: (parts, size), contiguous float64, with at most K parts; the last argument is a row of it.
        elements: how much work it is; much goes to several threads.
    """
    count, (parts, size) = len(arrays[0]), scratch.shape
    ends = count * np.arange(parts + 1) // parts
    starts, lengths = ends[:-1, None], np.diff(ends)[:, None]
    widths = np.array([array.size // count for array in arrays])
    table = np.empty((parts, len(arrays) + 1, 2), np.int64)
    table[:, :-1, 0] = np.array([array.ctypes.data for array in arrays]) + 8 * widths * starts
    table[:, :-1, 1] = widths * lengths
    table[:, -1, 0] = scratch.ctypes.data + 8 * size * np.arange(parts)
    table[:, -1, 1] = size
    kernel, rows = library.loop(function, len(arrays) + 1), table.ctypes.data + table[0].nbytes * np.arange(parts)
    call = np.array([kernel, parts, 0, *rows], np.int64)
    threads.run(library.shared(), call.ctypes.data, elements)
