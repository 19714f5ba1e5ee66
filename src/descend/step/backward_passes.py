"""Which gradients come from one backward pass."""

from __future__ import annotations

import sys

import torch
from torch.autograd.function import BackwardCFunction


class LastGrad:
    """The backward pass in which a parameter got its last gradient."""

    def __init__(self) -> None:
        self.in_pass = -1
        self.was_nested = False


class Passes:
    """Counts backward passes; those that reentrant checkpointing nests in another belong to that one.

    Torch numbers passes in the order in which they begin, nested ones too, but does not say which is nested in which. A
    pass that is not nested ends all earlier ones.
    """

    def __init__(self) -> None:
        self._current = 0
        self._task = self._latest = -1
        self._is_nested = False

    def is_partial(self, last: LastGrad) -> bool:
        """Whether the gradient that just came is not the parameter's first in this pass. Records the gradient."""
        self._enter()
        is_partial = last.in_pass == self._current and (last.was_nested or self._is_nested)
        last.in_pass, last.was_nested = self._current, self._is_nested
        return is_partial

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
    """Whether this backward pass was started by a function's ``backward``, inside another pass."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
    return False
