"""Runs one kernel on several threads: torch's own OpenMP workers where they can be reached.

After a forward and backward pass torch's workers are awake and spinning; a second pool would fight them for the same
cores (measured: 0.2 ms for an update of a million elements where theirs take none). libgomp must not be entered in a
forked child, which would wait for threads that fork did not copy: there, and where no OpenMP runtime is found, plain
Python threads do the work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from descend.backends.cpu import object_files

# Below this many elements waking a second thread costs more than it saves.
SERIAL_BELOW = 32_768


class _OpenMP:
    """``GOMP_parallel``, the entry that every OpenMP runtime offers to compiled code; None where there is none."""

    def __init__(self) -> None:
        self.forked = False
        self.parallel: Any = None
        self.parallel_locked: Any = None  # the same, the interpreter lock kept
        try:
            self.parallel = ctypes.CDLL(None).GOMP_parallel
            self.parallel_locked = ctypes.PyDLL(None).GOMP_parallel
        except (AttributeError, OSError, TypeError):  # no such symbol, or Windows
            return
        for function in (self.parallel, self.parallel_locked):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None

    def forget(self) -> None:
        """Called in a forked child."""
        self.forked, self.parallel, self.parallel_locked = True, None, None


_openmp = _OpenMP()


@cache
def _executor(workers: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix=f"descend-{process}")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_openmp.forget)


@contextmanager
def serial_in_forked_child() -> Iterator[None]:
    """Keep torch's own operations on this thread in a forked child, where they would wait for threads that are gone."""
    count = torch.get_num_threads()
    if not _openmp.forked or count == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def run(address: int, argument: int, elements: int) -> None:
    """Call the kernel at ``address`` with ``argument``, at once on each of ``torch.get_num_threads()`` threads.

    The kernel shares its work out itself; one thread is enough to do all of it.
    """
    threads = 1 if elements < SERIAL_BELOW else torch.get_num_threads()
    if threads == 1:
        object_files.call(address, argument)
    elif _openmp.parallel is not None:
        _openmp.parallel(address, argument, threads, 0)
    else:
        pool = _executor(threads - 1, os.getpid())
        others = [pool.submit(object_files.call, address, argument) for _ in range(threads - 1)]
        object_files.call(address, argument)
        for other in others:
            other.result()


def run_locked(address: int, argument: int) -> None:
    """Like ``run``, while no other Python thread runs. The kernel must not call into Python."""
    threads = torch.get_num_threads()
    if threads == 1 or _openmp.parallel_locked is None:
        object_files.locked(address)(argument)
    else:
        _openmp.parallel_locked(address, argument, threads, 0)
