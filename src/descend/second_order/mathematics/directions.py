"""Descent directions of quasi-Newton methods, from steps and changes of the gradient. Nothing is evaluated here.

Letters are the papers': s = x_new - x, y = grad_new - grad, H the approximation of the inverse Hessian, D a diagonal.
All numbers stay on the vectors' device; nothing waits for a GPU. Short vectors on a CPU are NumPy arrays internally: an
operation costs a third of what it costs for tensors. The formulas are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from descend.second_order.mathematics.diagonal import Pair
from descend.second_order.mathematics.history import History, LongHistory, Place, ShortHistory
from descend.second_order.mathematics.space import Array, Space

SHORT = 2**13  # elements in a history for which NumPy is faster, and starts no threads of its own
LARGE = 2**17  # elements in a history that no longer fits in a cache
LEAST_FACTOR = 1e-8  # by which a modified secant equation may scale y


class Learner(Protocol):
    """A model of the curvature that learns from steps."""

    @property
    def is_steepest(self) -> bool:
        """Whether nothing has been learned."""

    def update(self, s: Tensor, y: Tensor, pair: Pair | None = None) -> None:
        """Learn that the gradient changed by y along s, where s'y > 0; ``pair`` if that is known already."""

    def measure(self, s: Tensor, y: Tensor) -> Sequence[Array]:
        """What this rank adds to the ``Pair`` of s and y; nothing if ``update`` has no use for one."""

    def reset(self) -> None:
        """Forget all pairs."""


class Directions(Learner, Protocol):
    """A model of the curvature that gives search directions."""

    def direction(self, grad: Tensor, largest: float | None = None) -> Tensor:
        """The direction -H grad; the negative gradient if nothing has been learned. ``largest``: entry, if known."""


class Steepest:
    """The negative gradient, scaled by s's / s'y of the last step.

    Source: Barzilai & Borwein 1988, https://doi.org/10.1093/imanum/8.1.141
    """

    def __init__(self, space: Space | None = None) -> None:
        self.length: Tensor | None = None
        self.space = space or Space(0)

    @property
    def is_steepest(self) -> bool:
        return self.length is None

    def update(self, s: Tensor, y: Tensor, pair: Pair | None = None) -> None:
        ss, sy = self.space.total(s.dot(s), s.dot(y))
        self.length = ss / sy

    def measure(self, s: Tensor, y: Tensor) -> Sequence[Array]:
        return ()

    def direction(self, grad: Tensor, largest: float | None = None) -> Tensor:
        return -grad if self.length is None else -self.length * grad

    def reset(self) -> None:
        self.length = None


class CompactInverse:
    """The L-BFGS inverse Hessian in compact form, with a diagonal that learns the scale of each variable.

    With the pairs as rows of S and Y, R the upper triangle of S Y' and E its diagonal,

        H grad = D (grad - Y' u) + S' p,    u = R^-1 S grad,    p = R^-T ((Y D Y' + E) u - Y D grad)

    S and Y are ring buffers: their rows are in no order, and R is triangular up to a permutation. R^-1 gains a column
    with each new pair and loses a row and a column with each dropped one; the rest of it stays. A pair is scaled to
    s'y = 1, which leaves H unchanged. Inner products are those of the stored pairs, so that H stays positive definite.

    What is of a vector's length is in a ``History``. Where ranks share the vectors, that is this rank's part, and all
    small matrices are the whole ones: the inner products of a direction are reduced together.

    Args:
        numel: length of the vectors.
        history_size: number of pairs kept, >= 1.
        dtype, device: of the vectors.
        space: theirs. Default: all entries are here.
        make: makes the history. Default: what suits its size, with operations of NumPy or torch.
    Example:
        >>> curvature = torch.tensor([1.0, 100.0], dtype=torch.float64)
        >>> inverse = CompactInverse(2, history_size=10, dtype=torch.float64, device=torch.device("cpu"))
        >>> for s in torch.eye(2, dtype=torch.float64):
        ...     inverse.update(s, curvature * s)
        >>> inverse.direction(torch.tensor([3.0, 100.0], dtype=torch.float64))
        tensor([-3., -1.], dtype=torch.float64)

    Source:
        Byrd, Nocedal & Schnabel 1994, Theorem 2.2, https://doi.org/10.1007/BF01582063
    """

    _SMALL: ClassVar = ("r_inverse", "gram", "curvatures")

    def __init__(
        self,
        numel: int,
        history_size: int,
        dtype: torch.dtype,
        device: torch.device,
        space: Space | None = None,
        make: Callable[[int, int, torch.dtype, torch.device], History] | None = None,
    ) -> None:
        self.space = space or Space(numel)
        self.history_size, self.dtype = history_size, dtype
        whole = history_size * self.space.numel
        self.history: History
        if make is not None:
            self.history = make(numel, history_size, dtype, device)
        elif is_large(whole):
            self.history = LongHistory(numel, history_size, dtype, device)
        else:
            is_short = whole <= SHORT and history_size * whole <= 32 * SHORT
            self.history = ShortHistory(numel, history_size, dtype, device, is_short and device.type == "cpu")
        self.count = 0  # pairs taken so far
        self.is_new = False  # whether the newest pair's inner products are still to be taken
        self.r_inverse = self._small(torch.zeros(history_size, history_size, dtype=torch.float64, device=device))
        self.gram = self._small(torch.zeros_like(torch.as_tensor(self.r_inverse)))  # Y D Y'
        self.curvatures = self._small(torch.zeros(history_size, dtype=torch.float64, device=device))  # E's diagonal

    def _small(self, tensor: Tensor) -> Array:
        return tensor.numpy() if self.history.is_numpy else tensor

    @property
    def is_steepest(self) -> bool:
        return self.count == 0

    @property
    def newest(self) -> tuple[Tensor, float]:
        """The newest pair's s, as it is stored, and its s'y."""
        slot = (self.count - 1) % self.history_size
        return self.history.arrays()["steps"][slot], float(self.curvatures[slot])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The steps and changes of the gradient that are stored, scaled, the oldest one first."""
        filled = min(self.count, self.history_size)
        order = [(self.count - filled + i) % self.history_size for i in range(filled)]
        arrays = self.history.arrays()
        return arrays["steps"][order], arrays["changes"][order]

    def state(self) -> dict[str, Any]:
        """What ``load`` needs to continue from here; tensors share memory."""
        small = {name: torch.as_tensor(getattr(self, name)) for name in self._SMALL}
        return {"count": self.count, "is_new": self.is_new, **self.history.arrays(), **small}

    def accepts(self, state: Mapping[str, Any] | None) -> bool:
        """Whether this is a ``state`` of the same sizes, on every rank."""
        steps = self.history.arrays()["steps"]
        is_other = state is None or "curvatures" not in state or state["steps"].shape != steps.shape
        return not self.space.largest(is_other)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``; its tensors are taken over."""
        self.count, self.is_new = int(state["count"]), bool(state["is_new"])
        if self._may_widen and not all(map(_is_float32, (state["learned"], *state["steps"]))):
            self._widen()
        self.history.load(state)
        for name in self._SMALL:
            like = torch.as_tensor(getattr(self, name))
            setattr(self, name, self._small(state[name].to(like)))

    @np.errstate(all="ignore")
    def write_to(self, matrix: Tensor) -> None:
        """Write H into a matrix; O(history_size * numel**2) time."""
        if self.is_new:
            self._take_in(None)
        filled = min(self.count, self.history_size)
        arrays = self.history.arrays()
        steps, changes, diagonal = arrays["steps"][:filled], arrays["changes"][:filled], arrays["diagonal"]
        inverse, gram, curvatures = (torch.as_tensor(getattr(self, name)) for name in self._SMALL)
        # With Z = R^-1 S and W = Y D: H = D + Z' ((Y D Y' + E) Z - W) - W' Z.
        z = inverse[:filled, :filled] @ steps.double()
        w = changes.double() * diagonal
        middle = gram[:filled, :filled] + curvatures[:filled].diag()
        left, right = torch.cat([z, w]).to(matrix), torch.cat([middle @ z - w, -z]).to(matrix)
        matrix.zero_().diagonal().copy_(diagonal)
        add_symmetric_(matrix, 1.0, left, right)

    def reset(self) -> None:
        self.count = 0
        self.is_new = False
        self.history.reset()
        for name in self._SMALL:
            getattr(self, name)[:] = 0.0

    def measure(self, s: Tensor, y: Tensor) -> Sequence[Array]:
        return self.history.measure(s, y, self.space)

    @np.errstate(all="ignore")  # as for tensors: an overflow shows in the direction
    def update(self, s: Tensor, y: Tensor, pair: Pair | None = None) -> None:
        if self.is_new:
            self._take_in(None)
        count, history = self._take_apart(), self.history
        slot = count % self.history_size
        if self.space.is_shared:
            pair = pair or Pair(*self.space.total(*self.measure(s, y)))
            history.keep(slot, s, y, pair.curvature)
            scale = pair.curvature**-0.5
            pair = pair.scaled(scale, scale)
            if history.is_rounded:
                pair = Pair(*self.space.total(*history.measure_row(slot, self.space)))
        else:
            history.keep(slot, s, y)
        if not self._learn(count, pair):
            self.update(s, y)

    @np.errstate(all="ignore")
    def update_between(self, old: Place, new: Place, factor: float, curvature: float) -> None:
        """``update`` with x_new - x and factor * (grad_new - grad), where no ranks share them.

        Args:
            old, new: two places; read once, and not kept.
            factor: of the change of the gradient.
            curvature: s'y > 0, to a few digits.
        """
        if self.is_new:
            self._take_in(None)
        count = self._take_apart()
        self.history.keep_between(count % self.history_size, old, new, factor, np.float64(curvature))
        if not self._learn(count):
            self.update_between(old, new, factor, curvature)

    def _learn(self, count: int, pair: Pair | None = None) -> bool:
        """Learn from the pair in a row; False if it has to be kept again, in a history that now can hold it."""
        slot = count % self.history_size
        curvature = self.history.learn(slot, pair)
        if curvature is None:
            self._widen()
            return False
        self.curvatures[slot] = curvature
        self.count, self.is_new = count + 1, True
        return True

    @property
    def _may_widen(self) -> bool:
        """Whether rounded pairs may move to a wider dtype. Not on a device, which every question would keep waiting."""
        return (
            self.history.is_rounded
            and self.history.is_numpy
            and self.dtype == torch.float64
            and not self.space.is_shared
        )

    def _widen(self) -> None:
        """Go on with an empty history in the vectors' own dtype."""
        steps = self.history.arrays()["steps"]
        self.history = ShortHistory(steps.shape[1], self.history_size, self.dtype, steps.device, is_numpy=True)

    def _take_apart(self) -> int:
        """The number of pairs, which is 0 until it is set again: an interrupt meanwhile forgets all, not a part."""
        count = self.count
        self.count, self.is_new = 0, False
        return count

    def direction(self, grad: Tensor, largest: float | None = None) -> Tensor:
        """The direction -H grad; the next call reuses its memory."""
        return -grad if self.is_steepest else self._direction(grad, largest)

    @np.errstate(all="ignore")
    def _direction(self, grad: Tensor, largest: float | None) -> Tensor:
        taken = self.history.take(grad, largest, self.space)
        known = self._take_in(taken) if self.is_new else None
        count = self._take_apart()
        filled = min(count, self.history_size)
        along_steps, along_changes = known or self.history.products(filled, taken, self.space)
        inverse = self.r_inverse[:filled, :filled]
        u = inverse @ along_steps
        p = (self.gram[:filled, :filled] @ u + self.curvatures[:filled] * u - along_changes) @ inverse
        direction = self.history.direction(filled, taken, u, p)
        self.count = count
        return direction

    def _take_in(self, grad: Any) -> tuple[Array, Array]:
        """Complete the matrices for the newest pair; return S grad and Y D grad, from the same pass."""
        count = self._take_apart()
        slot, filled = (count - 1) % self.history_size, min(count, self.history_size)
        curvature = self.curvatures[slot]
        along_steps, column, along_changes = self.history.take_in(slot, filled, grad, self.gram, curvature, self.space)
        inverse = self.r_inverse[:filled, :filled]
        inverse[slot] = 0.0
        inverse[:, slot] = 0.0
        inverse[:, slot] = inverse @ column / -curvature
        inverse[slot, slot] = 1 / curvature
        self.count = count
        return along_steps, along_changes


def _is_float32(vector: Tensor) -> bool:
    return torch.equal(vector.float().to(vector.dtype), vector)


def is_large(numbers: int) -> bool:
    """Whether a history of so many numbers is too large for the caches."""
    return numbers > LARGE


def add_symmetric_(matrix: Tensor, scale: float, left: Array, right: Array) -> None:
    """Replace a symmetric matrix by ``scale`` times it, plus left' right, which is symmetric, too.

    The lower triangle is computed and copied to the upper one, in one pass over the matrix, block by block. Without the
    copy, rounding would make the matrix asymmetric, and each scaling by more than 1 would make that larger.
    """
    numel = len(matrix)
    block = max(1, LARGE // max(1, numel)) if matrix.is_cpu else max(1, numel)
    for start in range(0, numel, block):
        end = min(start + block, numel)
        matrix[start:end, :end].addmm_(left[:, start:end].T, right[:, :end], beta=scale)
        matrix[:start, start:end] = matrix[start:end, :start].T
        square = matrix[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)


def modified_secant_factor(sy: float, value: float, value_new: float, slopes: float) -> float:
    """Factor for y with which the pair also fits the function values; 1 where that is not safe.

    Args:
        sy: s'y, > 0.
        value, value_new: the function before and after the step.
        slopes: s'(grad + grad_new).

    Source: Zhang, Deng & Chen 1999, https://doi.org/10.1023/A:1021898630001
    """
    theta = 6 * (value - value_new) + 3 * slopes
    return 1 + theta / sy if abs(theta) <= 3 * sy and sy + theta > LEAST_FACTOR * sy else 1.0
