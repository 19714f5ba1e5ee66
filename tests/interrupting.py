"""Ctrl-C after any line of the library."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import descend

OURS = str(Path(descend.__file__).parent)


class CtrlC:
    """Sends SIGINT when so many lines of the library have run in the block."""

    def __init__(self, line: int) -> None:
        self.lines_left = line

    def __enter__(self) -> CtrlC:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if (
            not frame.f_code.co_filename.startswith(OURS) or frame.f_code.co_name == "__del__"
        ):  # Python ignores it there
            return None
        if event == "line":
            self.lines_left -= 1
            if self.lines_left == 0:
                signal.raise_signal(signal.SIGINT)
        return self._trace

    @property
    def was_sent(self) -> bool:
        return self.lines_left <= 0


def interrupted_everywhere(work: Callable[[], Any], stride: int = 1) -> Iterator[bool]:
    """Run ``work`` again and again, with Ctrl-C after 1, 1 + stride, ... lines, until it gets to its end without one.

    Yields whether Ctrl-C was let through.
    """
    for line in count(1, stride):
        was_raised = False
        try:
            with CtrlC(line) as ctrl_c:
                work()
        except KeyboardInterrupt:
            was_raised = True
        assert torch.is_grad_enabled()
        yield was_raised
        if not ctrl_c.was_sent:
            return
