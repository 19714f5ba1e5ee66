"""Compiles and runs plain Python functions that loop over float64 arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from descend.backends.cpu import library, object_files


def run(function: Any, *arrays: np.ndarray) -> None:
    """Call ``function``, compiled, with contiguous float64 arrays, each of them flattened.

    Args:
        function: uses only arithmetic, ``math`` and helpers made of these; returns nothing.
        arrays: its arguments, which it reads and writes.
    """
    arguments = np.array([(array.ctypes.data, array.size) for array in arrays], np.int64)
    object_files.call(library.loop(function, len(arrays)), arguments.ctypes.data)
