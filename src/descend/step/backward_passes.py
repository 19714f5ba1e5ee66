"""Which gradients come from one backward pass."""

from __future__ import annotations

import sys

import torch
from torch.autograd.function import BackwardCFunction


class Seen:
    """When a parameter got its last gradient."""

    def __init__(self) -> None:
        self.in_pass = -1
        self.was_nested = False


class Passes:
    """Tells one backward pass from the next, of which reentrant checkpointing nests many in one.

    Torch numbers passes in the order in which they begin, nested ones too, but does not say in which one another is
    nested. A pass that is not nested ends all that came before.
    """

    def __init__(self) -> None:
        self._current = 0
        self._task = self._latest = -1
        self._is_nested = False

    def gives_part(self, seen: Seen) -> bool:
        """Whether the gradient that came is not the parameter's first in this pass."""
        self._enter()
        is_part = seen.in_pass == self._current and (seen.was_nested or self._is_nested)
        seen.in_pass, seen.was_nested = self._current, self._is_nested
        return is_part

    def end(self) -> None:
        """The pass is over."""
        self._current += 1

    def _enter(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._task or task < 0:
            return
        self._task, self._is_nested = task, _is_nested()
        if not self._is_nested:
            if task > self._latest:
                self.end()
            torch.autograd.Variable._execution_engine.queue_callback(self.end)
        self._latest = max(self._latest, task)


def _is_nested() -> bool:
    """Whether this backward pass was started by a function's ``backward``, inside of another one."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
    return False
