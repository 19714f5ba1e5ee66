"""Runs a plain Python function that loops over float64 numbers, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from descend.backends.cpu import library, object_files


def run(function: Any, *arrays: np.ndarray) -> None:
    """Call ``function`` with contiguous float64 arrays, each as one row of numbers.

    Args:
        function: uses arithmetic, ``math``, and helpers made of these; it returns nothing.
        arrays: what it reads and writes.
    """
    numbers = [number for array in arrays for number in (array.ctypes.data, array.size)]
    call = np.array(numbers, np.int64)
    object_files.call(library.loop(function, len(arrays)), call.ctypes.data)
