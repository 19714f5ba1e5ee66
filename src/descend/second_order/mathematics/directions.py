"""Descent directions of quasi-Newton methods, from steps and changes of the gradient. Nothing is evaluated here.

Letters are the papers': s = x_new - x, y = grad_new - grad, H the approximation of the inverse Hessian, D a diagonal.
All numbers stay on the vectors' device; nothing waits for a GPU. Short vectors on a CPU are NumPy arrays internally: an
operation costs a third of what it costs for tensors. The formulas are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from descend.second_order.mathematics.space import SAMPLE, Array, Space

SHORT = 2**13  # elements in a history for which NumPy is faster, and starts no threads of its own
LARGE = 2**17  # elements in a history that no longer fits in a cache
SPREAD = 1e3  # entries of the diagonal stay within this factor of their median
LEAST_COSINE = 1e-12  # of the angle between s and y, in the metric of the diagonal
LEAST_FACTOR = 1e-8  # by which a modified secant equation may scale y


class Pair(NamedTuple):
    """Inner products of s and y, over all ranks, in the metric of a diagonal D; and samples of all three vectors."""

    y_dy: Any
    s_ds: Any
    curvature: Any  # s'y
    diagonal: Array
    s: Array
    y: Array

    def scaled(self, s_factor: Any, y_factor: Any) -> Pair:
        """That of s and y multiplied by factors."""
        return Pair(
            self.y_dy * (y_factor * y_factor),
            self.s_ds * (s_factor * s_factor),
            self.curvature * (s_factor * y_factor),
            self.diagonal,
            self.s * s_factor,
            self.y * y_factor,
        )


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
    s'y = 1, which leaves H unchanged.

    A small history uses the newest D. A large one is limited by memory bandwidth: a new D would need another pass over
    the history, so D is renewed once in ``history_size`` pairs and scaled in between; and the history is stored in
    float32, as if gradients were known to seven digits. Inner products are those of the stored pairs, so that H stays
    positive definite. After the constructor nothing of the length of a vector is allocated.

    Where ranks share the vectors, everything of a vector's length is this rank's part, and all small matrices are the
    whole ones: the inner products of a direction are reduced together.

    Args:
        numel: length of the vectors.
        history_size: number of pairs kept, >= 1.
        dtype, device: of the vectors.
        space: theirs. Default: all entries are here.
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

    _ARRAYS: ClassVar = ("steps", "changes", "learned", "diagonal", "r_inverse", "gram", "curvatures")

    def __init__(
        self, numel: int, history_size: int, dtype: torch.dtype, device: torch.device, space: Space | None = None
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Array:
            return self._array(torch.zeros(shape, dtype=dtype, device=device))

        self.space = space or Space(numel)
        whole = self.space.numel
        self.history_size = history_size
        self.is_large = history_size * whole > LARGE
        is_short = not self.is_large and history_size * whole <= SHORT and history_size**2 * whole <= 32 * SHORT
        self.is_tensor = not is_short or device.type != "cpu"
        self.count = 0  # pairs taken so far
        self.is_new = False  # whether the newest pair's inner products are still to be taken
        stored = torch.float32 if self.is_large else dtype
        self.steps = zeros(history_size, numel, dtype=stored)
        self.changes = zeros(history_size, numel, dtype=stored)
        self.learned = zeros(numel, dtype=stored)
        self.diagonal = zeros(numel, dtype=stored) if self.is_large else self.learned
        self.r_inverse = zeros(history_size, history_size)
        self.gram = zeros(history_size, history_size)  # Y D Y'
        self.curvatures = zeros(history_size)  # the diagonal of E
        self.work = zeros(3, numel, dtype=stored) if self.is_large else None
        self.product = zeros(numel, dtype=dtype) if self.is_large else None
        self.reset()

    def _array(self, tensor: Tensor) -> Array:
        return tensor if self.is_tensor else tensor.numpy()

    def _tensor(self, array: Array) -> Tensor:
        return array if self.is_tensor else torch.from_numpy(array)

    @property
    def is_steepest(self) -> bool:
        return self.count == 0

    def state(self) -> dict[str, Any]:
        """What ``load`` needs to continue from here; tensors share memory."""
        arrays = {name: self._tensor(getattr(self, name)) for name in self._ARRAYS}
        return {"count": self.count, "is_new": self.is_new, **arrays}

    def accepts(self, state: Mapping[str, Any] | None) -> bool:
        """Whether this is a ``state`` of the same sizes, on every rank."""
        is_other = state is None or "curvatures" not in state or state["steps"].shape != self.steps.shape
        return not self.space.largest(is_other)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``; its tensors are taken over."""
        self.count, self.is_new = int(state["count"]), bool(state["is_new"])
        for name in self._ARRAYS:
            like = self._tensor(getattr(self, name))
            setattr(self, name, self._array(state[name].to(like)))
        if not self.is_large:
            self.diagonal = self.learned

    @np.errstate(all="ignore")
    def write_to(self, matrix: Tensor) -> None:
        """Write H into a matrix; O(history_size * numel**2) time."""
        if self.is_new:
            self._take_in(None)
        filled = min(self.count, self.history_size)
        inverse, gram = (self._tensor(small)[:filled, :filled] for small in (self.r_inverse, self.gram))
        # With Z = R^-1 S and W = Y D: H = D + Z' ((Y D Y' + E) Z - W) - W' Z.
        z = inverse @ self._tensor(self.steps)[:filled].double()
        w = self._tensor(self.changes)[:filled].double() * self._tensor(self.diagonal)
        middle = gram + self._tensor(self.curvatures)[:filled].diag()
        left, right = torch.cat([z, w]).to(matrix), torch.cat([middle @ z - w, -z]).to(matrix)
        matrix.zero_().diagonal().copy_(self._tensor(self.diagonal))
        add_symmetric_(matrix, 1.0, left, right)

    def reset(self) -> None:
        self.count = 0
        self.is_new = False
        self.learned[:] = 1.0
        self.diagonal[:] = 1.0
        for small in (self.r_inverse, self.gram, self.curvatures):
            small[:] = 0.0

    def measure(self, s: Tensor, y: Tensor) -> Sequence[Array]:
        return measure(self.learned, self._array(s), self._array(y), self.space)

    @np.errstate(all="ignore")  # as for tensors: an overflow shows in the direction
    def update(self, s: Tensor, y: Tensor, pair: Pair | None = None) -> None:
        if self.is_new:
            self._take_in(None)
        slot = self.count % self.history_size
        if self.space.is_shared:
            pair = pair or Pair(*self.space.total(*self.measure(s, y)))
            scale = pair.curvature**-0.5
            pair = pair.scaled(scale, scale)
        else:
            scale = self._array(s).dot(self._array(y)) ** -0.5
        self._keep(self.steps, slot, self._array(s), scale)
        self._keep(self.changes, slot, self._array(y), scale)
        if self.space.is_shared and self.is_large:  # rounding to float32 has changed it
            stored = measure(self.learned, self.steps[slot], self.changes[slot], self.space)
            pair = Pair(*self.space.total(*stored))
        work = None if self.work is None else self.work[:2]
        self.curvatures[slot] = learn_diagonal_(self.learned, self.steps[slot], self.changes[slot], work, pair)
        self.count += 1
        self.is_new = True

    def direction(self, grad: Tensor, largest: float | None = None) -> Tensor:
        """The direction -H grad; the next call reuses its memory."""
        if self.is_steepest:
            return -grad
        if self.work is None:
            return self._tensor(-self._multiply(self._array(grad)))
        # Scaled, because its own size may be outside the range of float32.
        if self.space.is_shared:
            scale = grad.new_tensor(self.space.length(grad) if largest is None else largest)
        else:
            low, high = torch.aminmax(grad)
            scale = torch.maximum(-low, high)
        self._keep(self.work, 0, grad, 1 / scale)
        product = self._multiply(self.work[0])
        return torch.mul(product, -scale, out=self.product)

    def _keep(self, rows: Array, slot: int, vector: Array, scale: Any) -> None:
        """Write a scaled vector into a row, in the dtype of the history."""
        if self.work is None:
            rows[slot] = vector * scale
        else:  # one operation that scales and rounds takes four times as long
            rows[slot].copy_(torch.mul(vector, scale, out=self.product))

    @np.errstate(all="ignore")
    def _multiply(self, grad: Array) -> Array:
        """H grad; a large ``grad`` is overwritten."""
        along_steps, along_changes = self._take_in(grad) if self.is_new else self._products(grad)
        filled = min(self.count, self.history_size)
        inverse = self.r_inverse[:filled, :filled]
        u = inverse @ along_steps
        p = (self.gram[:filled, :filled] @ u + self.curvatures[:filled] * u - along_changes) @ inverse
        product = add_rows(grad, self.changes[:filled], -u)
        product *= self.diagonal
        return add_rows(product, self.steps[:filled], p)

    def _products(self, grad: Array) -> tuple[Array, Array]:
        """S grad and Y D grad."""
        filled = min(self.count, self.history_size)
        (along_steps,) = products(self.steps[:filled], grad)
        (along_changes,) = products(self.changes[:filled], self._scaled(grad, 1))
        along_steps, along_changes = self.space.total(along_steps, along_changes)
        return along_steps, along_changes

    def _scaled(self, vector: Array, row: int) -> Array:
        return self.diagonal * vector if self.work is None else torch.mul(self.diagonal, vector, out=self.work[row])

    def _take_in(self, grad: Array | None) -> tuple[Array, Array]:
        """Complete the matrices for the newest pair; return ``_products(grad)``, from the same pass."""
        self.is_new = False
        slot, filled = (self.count - 1) % self.history_size, min(self.count, self.history_size)
        steps, changes, curvature = self.steps[:filled], self.changes[:filled], self.curvatures[slot]
        y = changes[slot]
        if grad is None:
            grad = y
        is_renewed = not self.is_large or slot == 0
        if is_renewed:
            self.diagonal[:] = self.learned
        along_steps, column = products(steps, grad, y)
        if is_renewed:
            (along_changes,) = products(changes, self._scaled(grad, 1))
            gram = scaled_gram(changes, self.diagonal)
            along_steps, column, along_changes, gram = self.space.total(along_steps, column, along_changes, gram)
            self.gram[:filled, :filled] = gram
        else:
            along_changes, row = products(changes, self._scaled(grad, 1), self._scaled(y, 2))
            along_steps, column, along_changes, row = self.space.total(along_steps, column, along_changes, row)
            # D is scaled so that y'D y = s'y for the newest pair.
            scale = curvature / row[slot]
            self.diagonal *= scale
            self.gram *= scale
            along_changes = scale * along_changes
            self.gram[slot, :filled] = self.gram[:filled, slot] = scale * row
        inverse = self.r_inverse[:filled, :filled]
        inverse[slot] = 0.0
        inverse[:, slot] = 0.0
        inverse[:, slot] = inverse @ column / -curvature
        inverse[slot, slot] = 1 / curvature
        return along_steps, along_changes


@np.errstate(all="ignore")
def measure(diagonal: Array, s: Array, y: Array, space: Space) -> Sequence[Array]:
    """What this rank adds to the ``Pair`` of s and y; nothing where no other rank holds entries."""
    if not space.is_shared:
        return ()
    return [(diagonal * y).dot(y), (s / diagonal).dot(s), s.dot(y), *space.samples(diagonal, s, y)]


def learn_diagonal_(diagonal: Array, s: Array, y: Array, work: Array = None, pair: Pair | None = None) -> Any:
    """Update a diagonal inverse Hessian in place by a pair; return s'y.

    ``work``: two vectors of scratch memory, for tensors; None to allocate them. ``pair``: where ranks share the
    vectors, of which these are parts.

    The diagonal is scaled so that y'D y = s'y, then replaced by the diagonal of the BFGS update. s'y is raised to
    ``LEAST_COSINE`` where rounding has made it smaller.

    Source: Gilbert & Lemaréchal 1989, section 4.2, https://doi.org/10.1007/BF01589113, scaled as in M1QN3.
    """
    if work is None:
        growth, shrinkage = diagonal * y, s / diagonal
    else:
        growth, shrinkage = torch.mul(diagonal, y, out=work[0]), torch.div(s, diagonal, out=work[1])
    if pair is None:
        y_dy, s_ds, curvature = growth.dot(y), shrinkage.dot(s), s.dot(y)
    else:
        y_dy, s_ds, curvature = pair[:3]
    least = LEAST_COSINE * y_dy**0.5 * s_ds**0.5
    # Without a branch, which would wait for the device.
    curvature = curvature + (least - curvature) * (curvature < least)
    _update_diagonal_(diagonal, s, y, growth, shrinkage, y_dy, s_ds, curvature)
    sample = None
    if pair is not None:  # every rank updates the sampled entries, and so has their median
        sample, growth, shrinkage = pair.diagonal, pair.diagonal * pair.y, pair.s / pair.diagonal
        _update_diagonal_(sample, pair.s, pair.y, growth, shrinkage, y_dy, s_ds, curvature)
    clip_around_median_(diagonal, sample)
    return curvature


def _update_diagonal_(
    diagonal: Array, s: Array, y: Array, growth: Array, shrinkage: Array, y_dy: Any, s_ds: Any, curvature: Any
) -> None:
    """Scale a diagonal and take that of the BFGS update; ``growth`` is D y and ``shrinkage`` D^-1 s, overwritten."""
    growth *= y
    growth /= y_dy
    shrinkage *= s
    shrinkage /= s_ds
    growth -= shrinkage
    growth += 1.0
    diagonal *= curvature / y_dy
    diagonal /= growth


def clip_around_median_(diagonal: Array, sample: Array = None) -> None:
    """Clip all entries to within a factor of their median, which is estimated from about 1,000 of them."""
    some = diagonal[:: 1 + len(diagonal) // SAMPLE] if sample is None else sample
    if isinstance(some, np.ndarray):
        middle = np.partition(some, (len(some) - 1) // 2)[(len(some) - 1) // 2]
        np.minimum(np.maximum(diagonal, middle / SPREAD, out=diagonal), middle * SPREAD, out=diagonal)
    else:
        middle = some.median()
        torch.clamp(diagonal, middle / SPREAD, middle * SPREAD, out=diagonal)


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


def products(rows: Array, *vectors: Array) -> list[Any]:
    """Inner products of each row with each vector, in float64; each row is read from memory once."""
    if isinstance(rows, np.ndarray):
        return [rows.dot(vector).astype(np.float64, copy=False) for vector in vectors]
    if not rows.is_cpu or rows.numel() <= LARGE:
        return [rows.mv(vector).double() for vector in vectors]
    # On a CPU row by row is 1.5 times as fast as a product with the matrix.
    return list(torch.stack([torch.stack([row.dot(vector) for vector in vectors]) for row in rows]).double().T)


def add_rows(start: Array, rows: Array, weights: Array) -> Any:
    """start + the sum of the weighted rows; a large ``start`` is overwritten."""
    if isinstance(rows, np.ndarray):
        return start + weights.astype(rows.dtype, copy=False).dot(rows)
    weights = weights.to(rows.dtype)
    if rows.numel() <= LARGE:
        return torch.addmv(start, rows.T, weights)
    if not rows.is_cpu:
        return start.addmv_(rows.T, weights)
    for row, weight in zip(rows, weights.tolist(), strict=True):
        start.add_(row, alpha=weight)
    return start


def scaled_gram(rows: Array, diagonal: Array) -> Any:
    """rows D rows', block by block, so that long rows are never copied as a whole."""
    if isinstance(rows, np.ndarray):
        return (rows * diagonal).dot(rows.T)
    block = max(1, LARGE // len(rows))
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block]
        total += (part * diagonal[start : start + block]).mm(part.T)
    return total


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
