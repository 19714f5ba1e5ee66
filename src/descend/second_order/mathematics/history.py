"""The pairs of L-BFGS as rows of two matrices, and the passes over them, which take most of an iteration.

s = x_new - x, y = grad_new - grad, D is a diagonal. The rows of S and Y are in no order. All sums are those of the
entries held here, unless a ``Space`` has completed them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from descend.second_order.mathematics.diagonal import Pair, learn_diagonal_, measure
from descend.second_order.mathematics.space import Array, Space

BLOCK = 2**17  # numbers of the history that a product of matrices copies at once


class Place(Protocol):
    """A point and the gradient there."""

    @property
    def x(self) -> Tensor: ...

    @property
    def grad(self) -> Tensor: ...


class History(Protocol):
    """What ``CompactInverse`` asks for. After the constructor nothing of a vector's length is allocated.

    Attributes:
        is_rounded: whether pairs are rounded when they are stored.
        is_numpy: whether small matrices are NumPy arrays.
        learned: the diagonal inverse Hessian learned from all pairs.
        diagonal: D.
    """

    is_rounded: bool
    is_numpy: bool
    learned: Array
    diagonal: Array

    def arrays(self) -> dict[str, Tensor]:
        """Everything that ``load`` needs, by name; tensors share memory."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``arrays``; tensors are taken over."""

    def reset(self) -> None:
        """Forget all pairs."""

    def measure(self, s: Tensor, y: Tensor, space: Space) -> Sequence[Array]:
        """What this rank adds to the ``Pair`` of s and y."""

    def measure_row(self, slot: int, space: Space) -> Sequence[Array]:
        """The same for the pair in a row."""

    def keep(self, slot: int, s: Tensor, y: Tensor, curvature: Any = None) -> None:
        """Store a pair in a row, scaled to s'y = 1. ``curvature``: s'y, to a few digits, if it is known."""

    def keep_between(self, slot: int, old: Place, new: Place, factor: float, curvature: float) -> None:
        """Store the pair of two places, the change of the gradient multiplied by a factor, of which s'y is known."""

    def learn(self, slot: int, pair: Pair | None = None) -> Any:
        """Learn a diagonal from the pair in a row; return s'y, or None if only the vectors' own dtype can hold it.

        ``pair``: where ranks share the vectors.
        """

    def take(self, grad: Tensor, largest: float | None, space: Space) -> Any:
        """A gradient as the methods below want it. ``largest``: its largest absolute entry, if known."""

    def products(self, filled: int, grad: Any, space: Space) -> Sequence[Array]:
        """S grad and Y D grad of the filled rows, in float64."""

    def take_in(self, slot: int, filled: int, grad: Any, gram: Array, curvature: Any, space: Space) -> Sequence[Array]:
        """Complete Y D Y' for the pair in a row, where D may change.

        Args:
            slot: the row.
            filled: how many rows there are.
            grad: from ``take``; None for that pair's y.
            gram: Y D Y', updated in place.
            curvature: s'y of the pair.
            space: completes the sums, all of them together.
        Returns:
            S grad, S y and Y D grad.
        """

    def direction(self, filled: int, grad: Any, u: Array, p: Array) -> Tensor:
        """-(D (grad - Y'u) + S'p), in memory that the next call uses again; ``grad`` is used up."""


class ShortHistory:
    """Pairs in the vectors' own dtype, as tensors or as NumPy arrays. D is always the learned diagonal."""

    is_rounded = False
    names: ClassVar = ("steps", "changes", "learned", "diagonal")

    def __init__(self, numel: int, history_size: int, dtype: torch.dtype, device: torch.device, is_numpy: bool) -> None:
        self.is_numpy = is_numpy
        self.steps = self._array(torch.zeros(history_size, numel, dtype=dtype, device=device))
        self.changes = self._array(torch.zeros(history_size, numel, dtype=dtype, device=device))
        self.learned = self.diagonal = self._array(torch.ones(numel, dtype=dtype, device=device))

    def _array(self, tensor: Tensor) -> Array:
        return tensor.numpy() if self.is_numpy else tensor

    def arrays(self) -> dict[str, Tensor]:
        return {name: torch.as_tensor(getattr(self, name)) for name in self.names}

    def load(self, state: Mapping[str, Any]) -> None:
        like = torch.as_tensor(self.steps)
        self.steps, self.changes, self.learned, _ = (self._array(state[name].to(like)) for name in self.names)
        self.diagonal = self.learned

    def reset(self) -> None:
        self.learned[:] = 1.0

    def measure(self, s: Tensor, y: Tensor, space: Space) -> Sequence[Array]:
        return measure(self.learned, self._array(s), self._array(y), space)

    def measure_row(self, slot: int, space: Space) -> Sequence[Array]:
        return measure(self.learned, self.steps[slot], self.changes[slot], space)

    def keep(self, slot: int, s: Tensor, y: Tensor, curvature: Any = None) -> None:
        step, change = self._array(s), self._array(y)
        scale = (step.dot(change) if curvature is None else curvature) ** -0.5
        self.steps[slot], self.changes[slot] = step * scale, change * scale

    def keep_between(self, slot: int, old: Place, new: Place, factor: float, curvature: float) -> None:
        step, change, scale = self.steps[slot], self.changes[slot], curvature**-0.5
        subtract = np.subtract if self.is_numpy else torch.sub
        subtract(self._array(new.x), self._array(old.x), out=step)
        subtract(self._array(new.grad), self._array(old.grad), out=change)
        step *= scale
        change *= scale * factor

    def learn(self, slot: int, pair: Pair | None = None) -> Any:
        return learn_diagonal_(self.learned, self.steps[slot], self.changes[slot], pair=pair)

    def take(self, grad: Tensor, largest: float | None, space: Space) -> Array:
        return self._array(grad)

    def products(self, filled: int, grad: Any, space: Space) -> Sequence[Array]:
        along_steps = _double(self.steps[:filled] @ grad)
        return space.total(along_steps, _double(self.changes[:filled] @ (self.diagonal * grad)))

    def take_in(self, slot: int, filled: int, grad: Any, gram: Array, curvature: Any, space: Space) -> Sequence[Array]:
        steps, changes = self.steps[:filled], self.changes[:filled]
        y = changes[slot]
        grad = y if grad is None else grad
        scaled = changes * self.diagonal
        sums = steps @ grad, steps @ y, scaled @ grad, scaled @ changes.T
        along_steps, column, along_changes, whole = space.total(*map(_double, sums))
        gram[:filled, :filled] = whole
        return along_steps, column, along_changes

    def direction(self, filled: int, grad: Any, u: Array, p: Array) -> Tensor:
        if self.is_numpy:
            u, p = u.astype(grad.dtype, copy=False), p.astype(grad.dtype, copy=False)
        else:
            u, p = u.to(grad.dtype), p.to(grad.dtype)
        product = u @ self.changes[:filled]
        product -= grad
        product *= self.diagonal
        product -= p @ self.steps[:filled]
        return torch.from_numpy(product) if self.is_numpy else product


class LongHistory:
    """Pairs in float32, as if gradients were known to seven digits: a long history is limited by memory bandwidth.

    A new D needs another pass over the pairs. Unless it ``renews_always``, D is the learned diagonal only once in
    ``history_size`` pairs; in between it is scaled, so that y'D y = s'y for the newest one.
    """

    is_rounded = True
    is_numpy = False
    renews_always = False
    names: ClassVar = ("steps", "changes", "learned", "diagonal")

    def __init__(self, numel: int, history_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.steps = torch.zeros(history_size, numel, device=device)
        self.changes = torch.zeros(history_size, numel, device=device)
        self.learned, self.diagonal = torch.ones(numel, device=device), torch.ones(numel, device=device)
        self.work = torch.zeros(3, numel, device=device)
        self.result = torch.zeros(numel, dtype=dtype, device=device)
        self.scale: Any = 1.0  # of the gradient, whose own size may be outside the range of float32

    def arrays(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def load(self, state: Mapping[str, Any]) -> None:
        self.steps, self.changes, self.learned, self.diagonal = (state[name].to(self.steps) for name in self.names)

    def reset(self) -> None:
        self.learned.fill_(1.0)
        self.diagonal.fill_(1.0)

    def measure(self, s: Tensor, y: Tensor, space: Space) -> Sequence[Array]:
        return measure(self.learned, s, y, space)

    def measure_row(self, slot: int, space: Space) -> Sequence[Array]:
        return measure(self.learned, self.steps[slot], self.changes[slot], space)

    def keep(self, slot: int, s: Tensor, y: Tensor, curvature: Any = None) -> None:
        scale = (s.dot(y) if curvature is None else curvature) ** -0.5
        self._round(self.steps[slot], s, scale)
        self._round(self.changes[slot], y, scale)

    def _round(self, row: Tensor, vector: Tensor, scale: Any) -> None:
        # One operation that scales and rounds takes four times as long.
        row.copy_(torch.mul(vector, scale, out=self.result))

    def keep_between(self, slot: int, old: Place, new: Place, factor: float, curvature: float) -> None:
        self.keep(slot, new.x - old.x, factor * (new.grad - old.grad), curvature)

    def learn(self, slot: int, pair: Pair | None = None) -> Any:
        return learn_diagonal_(self.learned, self.steps[slot], self.changes[slot], self.work[:2], pair)

    def take(self, grad: Tensor, largest: float | None, space: Space) -> Any:
        if space.is_shared:
            self.scale = grad.new_tensor(space.length(grad) if largest is None else largest)
        else:
            low, high = torch.aminmax(grad)
            self.scale = torch.maximum(-low, high)
        self._round(self.work[0], grad, 1 / self.scale)
        return self.work[0]

    def products(self, filled: int, grad: Any, space: Space) -> Sequence[Array]:
        return space.total(*self._products(filled, grad))

    def _products(self, filled: int, grad: Any, slot: int | None = None) -> list[Array]:
        """S grad and Y D grad; with a slot also S y and Y D y of the y there. Each row is read once."""
        vectors = [grad] if slot is None else [grad, self.changes[slot]]
        scaled = [torch.mul(self.diagonal, vector, out=self.work[1 + i]) for i, vector in enumerate(vectors)]
        along = _row_products(self.steps[:filled], vectors), _row_products(self.changes[:filled], scaled)
        return [product for both in zip(*along, strict=True) for product in both]

    def take_in(self, slot: int, filled: int, grad: Any, gram: Array, curvature: Any, space: Space) -> Sequence[Array]:
        is_renewed = self.renews_always or slot == 0
        if is_renewed:
            self._renew()
        grad = self._change(slot) if grad is None else grad
        sums = self._products(filled, grad, slot)
        if is_renewed:
            along_steps, along_changes, column, _, whole = space.total(*sums, self._gram(filled))
            gram[:filled, :filled] = whole
            return along_steps, column, along_changes
        along_steps, along_changes, column, row = space.total(*sums)
        scale = curvature / row[slot]
        self._stretch(scale)
        gram *= scale
        gram[slot, :filled] = gram[:filled, slot] = scale * row
        return along_steps, column, scale * along_changes

    def _change(self, slot: int) -> Any:
        return self.changes[slot]

    def _renew(self) -> None:
        self.diagonal.copy_(self.learned)

    def _stretch(self, scale: Any) -> None:
        self.diagonal *= scale

    def _gram(self, filled: int) -> Array:
        """Y D Y', block by block, so that long rows are never copied as a whole."""
        rows = self.changes[:filled]
        block = max(1, BLOCK // filled)
        total = torch.zeros(filled, filled, dtype=torch.float64, device=rows.device)
        for start in range(0, rows.shape[1], block):
            part = rows[:, start : start + block]
            total += (part * self.diagonal[start : start + block]).mm(part.T)
        return total

    def direction(self, filled: int, grad: Any, u: Array, p: Array) -> Tensor:
        product = _add_rows_(grad, self.changes[:filled], -u)
        product *= self.diagonal
        return torch.mul(_add_rows_(product, self.steps[:filled], p), -self.scale, out=self.result)


def _double(array: Array) -> Array:
    return array.astype(np.float64, copy=False) if isinstance(array, np.ndarray) else array.double()


def _row_products(rows: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
    """Inner products of each row with each vector, in float64."""
    if not rows.is_cpu:
        return [rows.mv(vector).double() for vector in vectors]
    # On a CPU row by row is 1.5 times as fast as a product with the matrix.
    return list(torch.stack([torch.stack([row.dot(vector) for vector in vectors]) for row in rows]).double().T)


def _add_rows_(start: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Add the sum of the weighted rows, in place."""
    if not rows.is_cpu:
        return start.addmv_(rows.T, weights.to(rows.dtype))
    for row, weight in zip(rows, weights.tolist(), strict=True):
        start.add_(row, alpha=weight)
    return start
