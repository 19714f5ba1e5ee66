"""Ctrl-C and SIGTERM end a command in order: at once while nothing is at stake, else with what it has."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """What ``interruptible`` raises.

    Attributes:
        status: the exit status that a shell expects, 128 + the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


@contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """Inside, a signal ends the process with ``message`` on stderr.

    Raising would not do: libraries that are being imported turn ``KeyboardInterrupt`` into tracebacks of their own.
    """

    def end(number: int, _: FrameType | None) -> None:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        os._exit(128 + number)

    with _handled(end):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first signal raises ``Interrupted``; a second ends the process at once."""

    def interrupt(number: int, _: FrameType | None) -> None:
        for each in NUMBERS:
            if signal.getsignal(each) is interrupt:
                signal.signal(each, leave)
        raise Interrupted(number)

    def leave(number: int, _: FrameType | None) -> None:
        os._exit(128 + number)

    with _handled(interrupt):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that are not ignored; other threads than the main one have none."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in NUMBERS}
        # None: a handler that was not set from Python, which could not be given back.
        before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
