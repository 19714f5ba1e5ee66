"""The line searches of many problems: ``line_search.begin`` and ``advance``, compiled, for one row after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from descend.backends.cpu import loops
from descend.second_order.mathematics.arrays import full, library, on_device_of, on_host, take, tensor_of
from descend.second_order.mathematics.line_search import (
    LOWEST,
    N_EVAL,
    NOISE,
    OUTCOME,
    RUNNING,
    SLOPE0,
    STEP,
    WIDTH,
    advance,
    begin,
)
from descend.second_order.mathematics.space import Array

FEW = 100  # problems, below which Python has advanced their searches before a compiler would have been loaded


class Lines:
    """The searches of K problems, each on a line of its own.

    ``begin`` starts some searches, ``advance`` takes a trial of each. The rows are in the host's memory: arrays on a
    device go there and back once in each of these.

    Args:
        count: K.
        like: an array on the device of those that are passed.
    Attributes:
        trial: the newest trials: steps, values and slopes; (3, K).
        rows: the searches, on the device; (K, WIDTH).
    """

    def __init__(self, count: int, like: Array) -> None:
        self._searches = np.full((count, WIDTH), np.nan)
        self._like, self._run = like, loops.run if count >= FEW else run_in_python
        self.rows, self.trial = on_device_of(like, self._searches), full(like, (3, count), np.nan)

    @property
    def step(self) -> Array:
        """The next trials' steps, (K,)."""
        return self.rows[:, STEP]

    @property
    def outcome(self) -> Array:
        """How the searches ended: a position in ``line_search.OUTCOMES``, ``RUNNING`` or ``NO_DESCENT``; (K,)."""
        return self.rows[:, OUTCOME]

    @property
    def n_eval(self) -> Array:
        """Trials of each search, (K,)."""
        return self.rows[:, N_EVAL]

    @property
    def slope0(self) -> Array:
        """Slopes at the starts, (K,)."""
        return self.rows[:, SLOPE0]

    @property
    def noise(self) -> Array:
        """Rounding errors of values, (K,)."""
        return self.rows[:, NOISE]

    @property
    def lowest(self) -> Array:
        """The lowest trials, with the start among them; of equals the earliest; (3, K)."""
        return self.rows[:, LOWEST : LOWEST + 3].T

    @property
    def is_lowest(self) -> Array:
        """Where the newest trial is the lowest, (K,)."""
        step, value = self.rows[:, LOWEST], self.rows[:, LOWEST + 1]
        return (self.trial[0] == step) & (self.trial[1] == value)

    def keep(self, rows: Array) -> None:
        """Forget all searches but these."""
        self._searches = self._searches.take(tensor_of(rows).cpu().numpy(), 0)
        self.rows, self.trial = on_device_of(self._like, self._searches), take(self.trial, rows, 1)

    def begin(
        self, where: Array, value: Array, slope: Array, step: Array, max_step: Array, max_eval: Array, noise: Array
    ) -> None:
        """Begin searches in some problems; the arguments are those of ``hager_zhang``, (K,) each."""
        self._run(begin_some, self._searches, *on_host(where, value, slope, step, max_step, max_eval, noise))
        self.rows = on_device_of(self._like, self._searches)

    def advance(self, value: Array, slope: Array) -> None:
        """Take values and slopes at ``step``, (K,). Searches that have ended stay as they are."""
        self.trial = library(value).stack([self.step, value, slope])
        self._run(advance_all, self._searches, *on_host(value, slope))
        self.rows = on_device_of(self._like, self._searches)


def begin_some(
    searches: Any, where: Any, value: Any, slope: Any, step: Any, max_step: Any, max_eval: Any, noise: Any
) -> None:
    """Begin searches where ``where`` is not 0; all arrays are flat, and the others are (K,)."""
    for k in range(len(where)):
        if where[k]:
            search = searches[k * WIDTH : (k + 1) * WIDTH]
            begin(search, value[k], slope[k], step[k], max_step[k], max_eval[k], noise[k])


def advance_all(searches: Any, value: Any, slope: Any) -> None:
    """Advance the searches that are running."""
    for k in range(len(value)):
        search = searches[k * WIDTH : (k + 1) * WIDTH]
        if search[OUTCOME] == RUNNING:
            advance(search, value[k], slope[k])


def run_in_python(function: Callable[..., None], *arrays: np.ndarray) -> None:
    """What ``loops.run`` does, without a compiler; items of a memoryview are Python's numbers."""
    function(*(array.reshape(-1).data for array in arrays))
