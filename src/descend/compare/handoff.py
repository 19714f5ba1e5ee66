"""A solver that has a loop of its own, run one iteration at a time."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch.optim import Optimizer

from descend.compare.tasks.task import Batch
from descend.compare.trainer import Step


class Iterate(NamedTuple):
    """Where an iteration ended.

    Args:
        loss: there.
        evaluations: gradients evaluated since the solver's start; a product with the Hessian counts as one.
    """

    loss: float
    evaluations: int


class End(NamedTuple):
    """How a solver ended.

    Args:
        message: why it stopped, in words.
        evaluations: as in ``Iterate``.
    """

    message: str
    evaluations: int


Report = Callable[[Iterate], None]
Solve = Callable[[Batch, Report], End]


class Abandoned(BaseException):
    """Raised in a solver whose trainer does not exist any more. No solver may catch it, as ``Exception`` would be."""


class SolverTrainer:
    """Trains with a solver that calls a function after each of its iterations.

    The solver runs in a thread of its own that waits there until the next step is asked for, so that never more than
    one of the two threads works. The first step evaluates the loss once more, for its value at the start; this is not
    counted.

    Args:
        start: returns the loss at the start.
        solve: runs the solver on a batch. It calls the given function after each iteration, when the model has the
            weights of that point.
    """

    optimizers: Sequence[Optimizer] = ()

    def __init__(self, start: Callable[[Batch], float], solve: Solve) -> None:
        self.stopped: str | None = None
        self._start, self._solve = start, solve
        self._loss, self._evaluations = 0.0, 0
        self._news: queue.SimpleQueue[Iterate | End | BaseException] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: go on; False: give up
        self._is_running = False

    def step(self, batch: Batch) -> Step:
        """Run the solver to the end of its next iteration, on the first step's ``batch``."""
        if self._is_running:
            self._turns.put(True)
        else:
            self._loss, self._is_running = self._start(batch), True
            arguments = self._solve, batch, self._news, self._turns
            threading.Thread(target=_run, args=arguments, daemon=True).start()
            weakref.finalize(self, self._turns.put, False)
        news = self._news.get()
        if isinstance(news, BaseException):
            raise news
        step = Step(self._loss, news.evaluations - self._evaluations, {})
        self._evaluations = news.evaluations
        if isinstance(news, End):
            self.stopped = news.message
        else:
            self._loss = news.loss
        return step

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has the weights that it should be judged by: it always has."""
        yield


def _run(
    solve: Solve,
    batch: Batch,
    news: queue.SimpleQueue[Iterate | End | BaseException],
    turns: queue.SimpleQueue[bool],
) -> None:
    """Run a solver; knows no trainer, so that a trainer nobody needs is freed, and ends the solver."""

    def report(iterate: Iterate) -> None:
        news.put(iterate)
        if not turns.get():
            raise Abandoned

    try:
        news.put(solve(batch, report))
    except Abandoned:
        pass
    except BaseException as error:
        news.put(error)
