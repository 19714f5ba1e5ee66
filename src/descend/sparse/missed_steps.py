"""What rows miss while they get no gradient: many steps of Adam in closed form, as scalars for ``rules.coast``.

A row has the averages m and v after step k of its optimizer, and no gradient in the steps j = k+1..t. As torch's AdamW
computes them, these steps multiply it by D(k, t) and take from it

    sum_j w_j m / (sqrt(v) + e_j eps),
        w_j = lr_j sqrt(1 - beta2^j) / (1 - beta1^j) (beta1 / sqrt(beta2))^(j-k) D(j, t),
        e_j = sqrt(1 - beta2^j) beta2^(-(j-k)/2),
        D(j, t) = the product of 1 - lr weight_decay over the steps j+1..t.

w and e are the same for all elements of all rows with that k. As a function of log e, a summand is a logistic curve,
which is so smooth that two values of e stand for all: the nodes of the two-point Gauss quadrature, found from the first
moments of log e under the weights w (Golub & Welsch 1969, https://doi.org/10.1090/S0025-5718-69-99647-1). So a row
catches up with one application of one rule, however many steps it has missed.

The error, whatever the gradients and the learning rates were, is at most 0.01 of the largest lr for beta1 <= 0.9 and
beta2 >= 0.95, for (0.95, 0.99) and for (0.8, 0.9). The longer the averages remember, the further a row coasts, and
errs: 0.03 lr of up to 240 lr for (0.99, 0.999). Worst is beta2 close to beta1: 0.08 lr of up to 17 lr for (0.9, 0.91).
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np

from descend.backends.cpu import loops

BLOCK = 64  # steps whose sums are settled together
FORGOTTEN = 1e-8  # where so little is left of the first average, a row does not move any more
SMALLEST = 1.2e-38  # of a fade: zero in float32 would turn an average that has overflowed, Inf, into NaN
LARGEST = 60.0  # of log e, so that eps is a number in float32 too; where e is larger, w is below exp(-60)


class Schedule:
    """The steps of an optimizer, and what a row that has missed some of them must catch up with.

    Args:
        beta1: of the first average, in [0, beta2).
        beta2: of the second average, in (beta1, 1).
        eps: as in Adam, > 0.
        start: steps already taken when this schedule begins: no row is older. Default: 0.
    Example:
        >>> schedule = Schedule(0.9, 0.999, 1e-8)
        >>> for lr in (0.1, 0.2, 0.3):
        ...     schedule.append(lr, weight_decay=0.5)
        >>> schedule.shrinkage(np.array([0, 2])).round(3)
        array([0.727, 0.85 ])
        >>> schedule.missed(np.array([1, 2, 2])).shape
        (1, 3, 7)
    """

    def __init__(self, beta1: float, beta2: float, eps: float, start: int = 0) -> None:
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.start = start
        self._history = array("d")  # lr, weight_decay, lr, weight_decay, ...
        self._log1 = math.log(beta1) if beta1 else -math.inf
        self._log2 = math.log(beta2)
        # A block is settled when steps no longer matter to its last row; its sums run over so many steps.
        self._span = (1 + max(1, math.ceil(math.log(FORGOTTEN) / self._log1 / BLOCK))) * BLOCK
        self._settled = 0  # blocks
        # For each step a row may be current at: D, then two pairs of weight and e * eps. One such table, and another
        # for weights below zero once there are any. Settled blocks are summed over _span steps, the others to _until.
        self._tables = np.empty((1, 0, 5))
        self._idle = 1.0, 0.0, eps, 0.0, eps  # of the second table, where no weight is below zero
        self._until = start
        self._between = np.empty(0)  # D from where the sums of a block end to where those of the last block do
        self._later = np.ones(1)  # D from there to _until; 1 for what is not settled

    @property
    def steps(self) -> int:
        """Steps on record, those before ``start`` included."""
        return self.start + len(self._history) // 2

    @property
    def is_behind(self) -> bool:
        """Whether there is a step that rows may have missed."""
        return len(self._history) > 0

    def append(self, lr: float, weight_decay: float) -> None:
        """Put one more step of the optimizer on record."""
        self._history.extend((lr, weight_decay))

    def drop_last(self) -> None:
        """Take the last step off the record: it was not taken."""
        del self._history[-2:]

    def missed(self, since: np.ndarray) -> np.ndarray:
        """The scalars of ``rules.coast`` that bring rows up to date.

        Args:
            since: int64 of shape (n,): the step each row is current at, ``start <= since < steps``.
        Returns:
            float64 of shape (rounds, n, 7). The rule is applied to row i with the scalars ``[0, i]``, then with
            ``[1, i]`` if there are two rounds, which takes a row that missed a step with ``lr * weight_decay > 1``.
        """
        self._update()
        rows, later = self._find(since)
        tables = self._tables[:, rows]
        if not tables[1:, :, 1::2].any():
            tables = tables[:1]
        scalars = np.empty((len(tables), len(since), 7))
        scalars[:, :, :5] = tables
        scalars[0, :, 0] *= later
        scalars[:, :, 1:5:2] *= later[:, None]
        scalars[:, :, 5:] = 1.0  # the averages fade once, after all that moves the row
        missed = self.steps - since
        np.exp(missed * self._log1, out=scalars[-1, :, 5])
        np.exp(missed * self._log2, out=scalars[-1, :, 6])
        np.maximum(scalars[-1, :, 6], SMALLEST, out=scalars[-1, :, 6])
        return scalars

    def shrinkage(self, since: np.ndarray) -> np.ndarray:
        """D(since, steps): all that a row whose averages are zero has missed. For ``rules.decay``."""
        self._update()
        rows, later = self._find(since)
        return np.asarray(self._tables[0, rows, 0] * later)

    def history(self) -> np.ndarray:
        """Learning rate and weight decay of every step; float64 of shape (steps - start, 2), a copy."""
        return np.array(self._history).reshape(-1, 2)

    @classmethod
    def restored(cls, beta1: float, beta2: float, eps: float, start: int, history: np.ndarray) -> Schedule:
        """The schedule whose ``history()`` this was."""
        schedule = cls(beta1, beta2, eps, start)
        schedule._history.frombytes(np.ascontiguousarray(history, np.float64).tobytes())
        return schedule

    def _find(self, since: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the tables, and D from where they end to the current step."""
        rows = since - self.start
        return rows, self._later[np.minimum(rows // BLOCK, self._settled)]

    def _update(self) -> None:
        """Settle the blocks that can be, and sum anew up to the current step for the others."""
        if self._until == self.steps:
            return
        done = self.steps - self.start
        if done > self._tables.shape[1]:
            more = done + done // 2 + BLOCK - self._tables.shape[1]
            self._tables = np.concatenate([self._tables, np.empty((len(self._tables), more, 5))], 1)
        while (first := self._settled * BLOCK) + self._span <= done:
            self._sum(first, first + self._span)
            self._between = np.append(self._between * self._tables[0, first + self._span - BLOCK, 0], 1.0)
            self._settled += 1
        self._sum(first, done)
        end = first + self._span - BLOCK  # of the sums of the last settled block
        self._later = np.append(self._between * (self._tables[0, end, 0] if end < done else 1.0), 1.0)
        self._until = self.steps

    def _sum(self, first: int, last: int) -> None:
        """Write what the rows current at steps first..last-1, counted from start, have missed when ``last`` is done."""
        history = np.array(self._history[2 * first : 2 * last])
        known = np.array([self.beta1, self.beta2, self.eps, self.start + first, 1.0, 0.0])
        loops.run(_missed, history, known, self._tables[0, first:last])
        has_negative = known[5] == 1
        if has_negative and len(self._tables) == 1:
            self._tables = np.concatenate([self._tables, self._tables])
            self._tables[1] = self._idle
        for rows in self._tables[1:, first:last]:
            if has_negative:
                known[4] = -1.0
                loops.run(_missed, history, known, rows)
                rows[:, 0] = 1.0  # D is in the first table
            else:
                rows[:] = self._idle


def _missed(history: Any, known: Any, table: Any) -> None:
    """What rows have missed that are current at steps in a row, when the last of these steps is done.

    It runs at every step that reads rows, so it is compiled: in NumPy it would be sixty operations on short arrays.

    Args:
        history: lr and weight_decay of n steps.
        known: beta1, beta2, eps; the number of steps before these; the sign, 1 or -1, of the weights that are summed.
            One more number is set to 1 if there are weights of the other sign.
        table: set to n times D, weight, e * eps, weight, e * eps.
    """
    beta1, beta2, eps, before, sign = known[0], known[1], known[2], known[3], known[4]
    log1, log2 = math.log(beta1) if beta1 > 0 else -math.inf, math.log(beta2)
    ratio = beta1 / math.sqrt(beta2)
    steps, shrink, after = len(history) // 2, 1.0, 0.0
    last = math.log(-math.expm1(log2 * (before + steps))) / 2
    # Sums of a row's weights, and of their moments: log e, counted from that of the row's first step.
    total, first, second, third = 0.0, 0.0, 0.0, 0.0
    for i in range(steps - 1, -1, -1):
        lr, weight_decay, step = history[2 * i], history[2 * i + 1], before + i + 1
        bias2 = -math.expm1(log2 * step)
        low, high = math.log(bias2) / 2 - log2 / 2, min(last - log2 / 2 * (steps - i), LARGEST)
        # For this row all later steps are further away, and weigh less, than for the row after it.
        move, after = after - low - log2 / 2, low
        third = ratio * (third + move * (3 * second + move * (3 * first + move * total)))
        second = ratio * (second + move * (2 * first + move * total))
        first = ratio * (first + move * total)
        weight = sign * ratio * lr * math.sqrt(bias2) / -math.expm1(log1 * step) * shrink
        total = ratio * total + max(weight, 0.0)
        if weight < 0:
            known[5] = 1.0
        shrink *= 1 - lr * weight_decay
        share, left, right = _two_nodes(total, first, second, third)
        table[5 * i] = shrink
        table[5 * i + 1] = sign * (1 - share) * total
        # Rounding, where only one step counts, must not lead away from it.
        table[5 * i + 2] = eps * math.exp(min(max(low + left, low), high))
        table[5 * i + 3] = sign * share * total
        table[5 * i + 4] = eps * math.exp(min(max(low + right, low), high))


def _two_nodes(total: float, first: float, second: float, third: float) -> tuple[float, float, float]:
    """The two-point Gauss quadrature with these moments: the right node's share of the total, and both nodes."""
    total = total if total != 0 else 1.0
    mean, square, cube = first / total, second / total, third / total
    variance = max(square - mean * mean, 1e-30)
    spread = math.sqrt(variance)
    skew = (cube - (3 * square - 2 * mean * mean) * mean) / (2 * variance * spread)
    root = math.sqrt(1 + skew * skew)
    return 0.5 - 0.5 * skew / root, mean + spread * (skew - root), mean + spread * (skew + root)
