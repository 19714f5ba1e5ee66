"""What rows miss while they get no gradient: many steps of Adam in closed form, as numbers for ``rules.coast``.

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

import numpy as np

BLOCK = 256  # steps whose sums are settled together
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
        self.steps = start
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

    def append(self, lr: float, weight_decay: float) -> None:
        """One more step of the optimizer has been taken."""
        self._history.extend((lr, weight_decay))
        self.steps += 1

    def missed(self, since: np.ndarray) -> np.ndarray:
        """The numbers of ``rules.coast`` that bring rows up to date.

        Args:
            since: int64 of shape (n,): the step each row is current at, ``start <= since < steps``.
        Returns:
            float64 of shape (rounds, n, 7). The rule is applied to row i with the numbers ``[0, i]``, then with
            ``[1, i]`` if there are two rounds, which takes a row that missed a step with ``lr * weight_decay > 1``.
        """
        self._update()
        rows, later = self._find(since)
        tables = self._tables[:, rows]
        if not tables[1:, :, 1::2].any():
            tables = tables[:1]
        numbers = np.empty((len(tables), len(since), 7))
        numbers[:, :, :5] = tables
        numbers[0, :, 0] *= later
        numbers[:, :, 1:5:2] *= later[:, None]
        numbers[:, :, 5:] = 1.0  # the averages fade once, after all that moves the row
        missed = self.steps - since
        np.exp(missed * self._log1, out=numbers[-1, :, 5])
        np.exp(missed * self._log2, out=numbers[-1, :, 6])
        np.maximum(numbers[-1, :, 6], SMALLEST, out=numbers[-1, :, 6])
        return numbers

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
        schedule.steps += len(history)
        return schedule

    def _find(self, since: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the tables, and D from where they end to the current step."""
        rows = since - self.start
        return rows, self._later[np.minimum(rows // BLOCK, self._settled)]

    @np.errstate(all="ignore")  # D overflows if lr * weight_decay stays above 2, as the parameters do
    def _update(self) -> None:
        """Settle the blocks that can be, and sum anew up to the current step for the others."""
        if self._until == self.steps:
            return
        done = self.steps - self.start
        if done > self._tables.shape[1]:
            more = done + done // 2 + BLOCK - self._tables.shape[1]
            self._tables = np.concatenate([self._tables, np.empty((len(self._tables), more, 5))], 1)
        while (first := self._settled * BLOCK) + self._span <= done:
            sums = self._sums(first, first + self._span)
            self._between = np.append(self._between * sums[0, -BLOCK, 0], 1.0)
            self._put(first, sums[:, :BLOCK])
            self._settled += 1
        sums = self._sums(first, done)
        self._put(first, sums)
        end = self._span - BLOCK  # of the last settled block, in this one's rows
        self._later = np.append(self._between * (sums[0, end, 0] if first + end < done else 1.0), 1.0)
        self._until = self.steps

    def _put(self, first: int, sums: np.ndarray) -> None:
        if len(sums) > len(self._tables):
            self._tables = np.concatenate([self._tables, self._tables])
            self._tables[1] = self._idle
        rows = self._tables[:, first : first + sums.shape[1]]
        rows[: len(sums)] = sums
        rows[len(sums) :] = self._idle

    def _sums(self, first: int, last: int) -> np.ndarray:
        """What the rows current at steps first..last-1 have missed when step ``last`` is done, counted from start.

        Returns:
            Shape (1 or 2, last - first, 5): D, weight, e * eps, weight, e * eps; for the weights above and below zero.
        """
        lr, weight_decay = np.array(self._history[2 * first : 2 * last]).reshape(-1, 2).T
        count = np.arange(1.0, last - first + 1)
        steps = self.start + first + count
        shrink = np.multiply.accumulate((1 - lr * weight_decay)[::-1])[::-1]
        bias2 = np.sqrt(-np.expm1(self._log2 * steps))
        ratio = self.beta1 / math.sqrt(self.beta2)
        weights = ratio * lr * bias2 / -np.expm1(self._log1 * steps)
        weights[:-1] *= shrink[1:]
        # log e as the first row has it; a later row is further to the right by what the second average fades less.
        places = np.log(bias2) - self._log2 / 2 * count
        shift = -self._log2 / 2 * (count - 1)
        low, high = places - shift, np.minimum(places[-1] - shift, LARGEST)
        right = places - places[-1]
        powers = np.stack([np.ones_like(right), right, right * right, right * right * right])
        signs = (1, -1) if (weights < 0).any() else (1,)
        sums = np.ones((len(signs), last - first, 5))
        sums[0, :, 0] = shrink
        for table, sign in zip(sums, signs, strict=True):
            moments = _discounted(np.maximum(sign * weights, 0) * powers, ratio)
            shares, nodes = _two_nodes(moments)
            table[:, 1::2] = (sign * shares * moments[0]).T
            # Rounding, where only one step counts, must not lead away from it.
            table[:, 2::2] = self.eps * np.exp(np.clip(nodes + places[-1] - shift, low, high)).T
        return sums


def _discounted(terms: np.ndarray, ratio: float) -> np.ndarray:
    """Sum over j >= i of ``ratio**(j - i) * terms[..., j]``, for all i.

    By doubling the number of summands: a cumulative sum divided by powers of ratio would underflow.
    """
    sums, reach = terms.copy(), 1
    while reach < terms.shape[-1]:
        sums[..., :-reach] += ratio * sums[..., reach:]
        reach, ratio = 2 * reach, ratio * ratio
    return sums


def _two_nodes(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two-point Gauss quadrature with the moments 0 to 3, shape (4, n): shares of the total, and nodes, (2, n)."""
    total = np.where(moments[0] == 0, 1.0, moments[0])
    mean, square, cube = moments[1:] / total
    variance = np.maximum(square - mean * mean, 1e-30)
    spread = np.sqrt(variance)
    skew = (cube - (3 * square - 2 * mean * mean) * mean) / (2 * variance * spread)
    root = np.sqrt(1 + skew * skew)
    above = 0.5 - 0.5 * skew / root
    return np.stack([1 - above, above]), mean + spread * np.stack([skew - root, skew + root])
