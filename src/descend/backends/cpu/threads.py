"""Runs one kernel on several threads: torch's own OpenMP workers where they can be reached.

After a forward and backward pass torch's workers are still spinning; a second pool would compete with them for the
cores (measured: 0.2 ms in an update of a million elements). A forked child must not enter libgomp, where it would wait
for threads that fork did not copy. There, and where there is no OpenMP runtime, Python threads do the work.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import torch

from descend.backends.cpu import library, object_files

# With fewer elements, waking a second thread costs more than it saves.
SERIAL_BELOW = 32_768


class _OpenMP:
    """``GOMP_parallel``, which every OpenMP runtime exports; None where there is none."""

    def __init__(self) -> None:
        self.forked = False
        self.parallel: Any = None
        self.parallel_locked: Any = None  # the same, the interpreter lock kept
        self.address = self.number_address = 0
        try:
            self.parallel = ctypes.CDLL(None).GOMP_parallel
            self.parallel_locked = ctypes.PyDLL(None).GOMP_parallel
        except (AttributeError, OSError, TypeError):  # no such symbol, or Windows
            return
        for function in (self.parallel, self.parallel_locked):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
        self.address = ctypes.cast(self.parallel, ctypes.c_void_p).value or 0
        with suppress(AttributeError):
            self.number_address = ctypes.cast(ctypes.CDLL(None).omp_get_thread_num, ctypes.c_void_p).value or 0

    def disable_in_child(self) -> None:
        """Stop using OpenMP, in a forked child."""
        self.forked, self.address, self.number_address = True, 0, 0
        self.parallel = self.parallel_locked = None


_openmp = _OpenMP()


def number_of_thread() -> int:
    """Address of the C function that tells the threads of ``run`` their numbers; 0 if there is none."""
    return _openmp.number_address


def has_openmp() -> bool:
    """Whether this process may use an OpenMP runtime."""
    return _openmp.parallel is not None


@cache
def _executor(workers: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix=f"descend-{process}")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_openmp.disable_in_child)


@contextmanager
def serial_in_forked_child() -> Iterator[None]:
    """Run torch's own operations on one thread in a forked child, where they would wait for threads that are gone."""
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
    """Call the kernel at ``address`` with ``argument`` on ``torch.get_num_threads()`` threads at once.

    The kernel divides the work among them itself; one thread would do all of it.
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


class Call(NamedTuple):
    """One call of a compiled loop.

    Attributes:
        kernel: its address.
        argument: what it gets.
        elements: how much work it shares out; many go to several threads.
        counter: address of the counter that its threads share, to be set to 0 before; 0 if there is none.
    """

    kernel: int
    argument: int
    elements: int = 0
    counter: int = 0


class CallSequence:
    """Calls made one after the other as one native call: no exception can fall between two of them.

    Where there is no OpenMP runtime, calls large enough for several threads are made one by one.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._is_large = any(call.elements >= SERIAL_BELOW for call in calls)
        self._table = array("q", (_openmp.address, len(calls), 1, SERIAL_BELOW))
        for call in calls:
            self._table.extend(call)
        self._address = self._table.buffer_info()[0]
        self._kernel = library.sequence()

    def run(self) -> None:
        """Make the calls."""
        if not self._is_large:
            object_files.call(self._kernel, self._address)
        elif _openmp.parallel is not None:
            self._table[2] = torch.get_num_threads()
            object_files.call(self._kernel, self._address)
        else:
            for kernel, argument, elements, counter in self._calls:
                if counter:
                    ctypes.c_int64.from_address(counter).value = 0
                run(kernel, argument, elements)
