"""Gauss-Newton steps from products with the Jacobian: LSMR in a trust region or with damping, and in a box."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from descend.second_order.mathematics.lsmr import End, Product, lsmr
from descend.second_order.mathematics.trust_region import TrialStep

MAX_FACES = 10  # of the box, visited one after the other
MAX_CONDITION = 1e8
SUFFICIENT = 1e-4  # fraction of the slope's promise that a projected step must keep
SHORTENINGS = 20


class _Vertex(NamedTuple):
    """A point of the path: t, the change J s of the residuals there, |t|, and how far the model has fallen."""

    t: Tensor
    change: Tensor
    norm: float
    decrease: float


class ProductGaussNewton:
    """The model |r + J s|^2 / 2 where J is known by its products only, in O(M + N) memory.

    LSMR's iterates for min |r + J s| are the vertices of a path on which the model falls and |D s| grows; the 1st, 2nd,
    4th, 8th and so on are kept. A step in a region is where the path leaves it; a damped step is the best point on the
    path. So a step that is rejected costs no products. In a box the path follows LSMR in the face of the variables that
    are not at a bound, bends where it is projected into the box, and goes on in the next face.

    Args:
        multiply: v -> J v.
        multiply_transposed: u -> J'u.
        residuals: r, shape (M,), finite.
        grad: J'r, shape (N,), finite.
        scale: the diagonal of D, shape (N,), > 0.
        low, high: bounds on the step, <= 0 and >= 0; both or none.
        reduction: of the slope of the model at which LSMR stops, > 0.
        max_lsmr: its iterations at most, >= 1, for each face of the box.
    Attributes:
        is_usable: whether the first products were finite.
        is_solved: whether the Newton step is one: LSMR reached the reduction, in the last face of the box.
    Source: Fong & Saunders 2011, https://doi.org/10.1137/10079687X; the path: Steihaug 1983,
        https://doi.org/10.1137/0720042; the projection: Bertsekas 1982, https://doi.org/10.1137/0320018
    """

    def __init__(
        self,
        multiply: Product,
        multiply_transposed: Product,
        residuals: Tensor,
        grad: Tensor,
        scale: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
        *,
        reduction: float,
        max_lsmr: int,
    ) -> None:
        self.grad = grad
        self._multiply, self._multiply_transposed = multiply, multiply_transposed
        self._residuals, self._scale, self._reduction = residuals, scale, reduction
        self._max_lsmr = max_lsmr
        self._low = self._high = None
        if low is not None and high is not None:
            self._low, self._high = low * scale, high * scale
        self._vertices = [_Vertex(torch.zeros_like(self.grad), torch.zeros_like(residuals), 0.0, 0.0)]
        self.is_solved = False
        self.is_usable = self._walk() is not End.non_finite or len(self._vertices) > 1

    def change(self, step: Tensor) -> float:
        return float(torch.linalg.vector_norm(self._multiply(step)))

    def length(self, step: Tensor) -> float:
        return _norm(step * self._scale)

    def rounding(self, x: Tensor) -> float:
        return self.length(x)  # D is an estimate of the columns' norms

    def newton(self) -> TrialStep:
        return self._trial(self._vertices[-1], on_boundary=False)

    def step(self, radius: float) -> TrialStep:
        for before, vertex in zip(self._vertices, self._vertices[1:], strict=False):
            if vertex.norm > radius:
                return self._trial(self._between(before, vertex, _crossing(before, vertex, radius)), on_boundary=True)
        return self.newton()

    def damped_step(self, damping: float) -> TrialStep:
        def cost(vertex: _Vertex) -> float:
            return 0.5 * damping * vertex.norm**2 - vertex.decrease

        best = self._vertices[0]
        for before, vertex in zip(self._vertices, self._vertices[1:], strict=False):
            move, change = vertex.t - before.t, vertex.change - before.change
            slope = _dot(change, self._residuals + before.change) + damping * _dot(move, before.t)
            bend = _dot(change, change) + damping * _dot(move, move)
            share = min(1.0, max(0.0, -slope / bend)) if bend > 0 else 1.0
            best = min(best, self._between(before, vertex, share), key=cost)
        return self._trial(best, on_boundary=damping > 0)

    def bend(self, change: Tensor, step: Tensor) -> Tensor | None:
        """None: a correction would cost as many products as the step."""
        return None

    def correction(self, bend: Tensor) -> Tensor:
        raise NotImplementedError("steps from products are not corrected")

    def share(self, step: Tensor, other: Tensor) -> float:
        """What multiple of ``other`` is nearest to ``step`` in the norm of the region."""
        step, other = step * self._scale, other * self._scale
        square = _dot(other, other)
        return _dot(step, other) / square if square > 0 else 0.0

    # The path.

    def _walk(self) -> End:
        """Add vertices until the model is minimized in the box; return how the last LSMR ended."""
        end, first = End.solved, 0.0
        for _ in range(MAX_FACES):
            start = self._vertices[-1]
            slope = self._slope(start)
            free = self._free(start.t, slope)
            left = _norm(slope if free is None else torch.where(free, slope, 0.0))
            first = first or left
            if left <= self._reduction * first:  # also of a variable that was held, and would leave its bound now
                self.is_solved = True
                break
            moves, end = self._face(start, free)
            has_moved = bool(moves) and self._follow(start, slope, moves)
            is_minimized = end in (End.solved, End.least_squares, End.condition)
            if free is None or not (has_moved and is_minimized):
                self.is_solved = free is None and is_minimized
                break
        return end

    def _slope(self, vertex: _Vertex) -> Tensor:
        """The gradient of the model by t."""
        if vertex.norm == 0:
            return self.grad / self._scale
        return self._multiply_transposed(self._residuals + vertex.change) / self._scale

    def _free(self, t: Tensor, slope: Tensor) -> Tensor | None:
        """Which variables are not held at a bound; None without bounds."""
        if self._low is None or self._high is None:
            return None
        return ((t > self._low) | (slope < 0)) & ((t < self._high) | (slope > 0))

    def _face(self, start: _Vertex, free: Tensor | None) -> tuple[list[Tensor], End]:
        """LSMR's iterates for the free variables, as moves from a vertex; the last one is its solution."""
        units = 1 / self._scale if free is None else torch.where(free, 1 / self._scale, 0.0)
        kept: list[Tensor] = []
        number = 0

        def keep(t: Tensor, norm: float) -> bool:
            nonlocal number
            number += 1
            if number & (number - 1) == 0:
                kept.append(t.clone())
            return False

        solution = lsmr(
            lambda t: self._multiply(units * t),
            lambda u: units * self._multiply_transposed(u),
            -(self._residuals + start.change),
            atol=0.0,
            btol=0.0,
            reduction=self._reduction,
            condition_limit=min(MAX_CONDITION, 0.1 / torch.finfo(units.dtype).eps),
            max_iter=self._max_lsmr,
            visit=keep,
        )
        if solution.n_iter and number & (number - 1):
            kept.append(solution.x)
        return kept, solution.end

    def _follow(self, start: _Vertex, slope: Tensor, moves: list[Tensor]) -> bool:
        """Add the iterates that are in the box, or a projected step; whether the model has fallen."""
        for move in moves:
            t = start.t + move
            if not self._is_inside(t):
                break
            self._add(t)
        else:
            return self._vertices[-1] is not start
        # A variable close to a bound may keep the projected solution from falling, but not the projected gradient.
        vertex = self._projected(start, slope, moves[-1]) or self._projected(start, slope, self._steepest(slope))
        if vertex is None:
            return False
        while self._vertices[-1].decrease >= vertex.decrease and self._vertices[-1] is not start:
            self._vertices.pop()
        self._vertices.append(vertex)
        return True

    def _projected(self, start: _Vertex, slope: Tensor, move: Tensor) -> _Vertex | None:
        """The first of start + move, start + move / 2, ... whose projection into the box is sufficiently lower."""
        for halvings in range(SHORTENINGS):
            t = torch.clamp(start.t + move / 2**halvings, self._low, self._high)
            promise = -_dot(slope, t - start.t)
            if promise > 0:
                vertex = self._vertex(t)
                if vertex.decrease - start.decrease >= SUFFICIENT * promise:
                    return vertex
        return None

    def _steepest(self, slope: Tensor) -> Tensor:
        """The minimizer along the steepest descent, without the box."""
        change = self._multiply(slope / self._scale)
        bend = _dot(change, change)
        return -slope * (_dot(slope, slope) / bend if bend > 0 else 1.0)

    def _add(self, t: Tensor) -> None:
        """Add a vertex where the model has fallen further, as it has but for rounding."""
        vertex = self._vertex(t)
        if vertex.decrease > self._vertices[-1].decrease:
            self._vertices.append(vertex)

    def _vertex(self, t: Tensor) -> _Vertex:
        change = self._multiply(t / self._scale)
        return _Vertex(t, change, _norm(t), -_dot(change, self._residuals + 0.5 * change))

    def _is_inside(self, t: Tensor) -> bool:
        if self._low is None or self._high is None:
            return True
        return bool(((t >= self._low) & (t <= self._high)).all())

    def _between(self, first: _Vertex, second: _Vertex, share: float) -> _Vertex:
        """The point at a share of the way from one vertex to the next."""
        t, change = torch.lerp(first.t, second.t, share), torch.lerp(first.change, second.change, share)
        return _Vertex(t, change, _norm(t), -_dot(change, self._residuals + 0.5 * change))

    def _trial(self, vertex: _Vertex, *, on_boundary: bool) -> TrialStep:
        return TrialStep(vertex.t / self._scale, vertex.norm, vertex.decrease, on_boundary, False)


def _crossing(first: _Vertex, second: _Vertex, radius: float) -> float:
    """The share of the way from a vertex inside the radius to one outside at which the path leaves."""
    move = second.t - first.t
    square, along, room = _dot(move, move), _dot(move, first.t), (radius - first.norm) * (radius + first.norm)
    root = math.sqrt(max(0.0, along * along + square * room))
    # The form of the root that does not cancel.
    return min(1.0, max(0.0, room / (along + root) if along > 0 else (root - along) / square))


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
