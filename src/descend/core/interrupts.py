"""Defers Ctrl-C and other signals while tensors are half-way between two steps."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums, ten microseconds a step
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Signals whose handlers programs write in Python. A handler that raises, as Ctrl-C's does, would leave half a step.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF", "SIGBREAK")
    if hasattr(signal, name)
]


class DeferredSignals:
    """Defers Python's signal handlers until the block ends. They run then, and may raise.

    Python runs handlers in its main thread only, so in other threads there is nothing to defer.
    """

    def __enter__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in _SIGNALS:
                if callable(handler := _signal.getsignal(number)):
                    self._handlers[number] = handler
                    _signal.signal(number, self._record)
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        handlers = dict(self._handlers)
        self._restore()
        self._run(handlers)

    def _run(self, handlers: dict[int, Any]) -> None:
        try:
            while self._arrived:
                number, frame = self._arrived.pop(0)
                handlers[number](number, frame)
        finally:  # one that raises does not keep the others from running
            if self._arrived:
                self._run(handlers)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))

    def _restore(self) -> None:
        try:
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                _signal.signal(number, handler)
                del self._handlers[number]
        finally:  # a handler restored first may have raised
            if self._handlers:
                self._restore()
