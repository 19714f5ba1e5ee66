"""L-BFGS with bounds: minimize a quadratic model in the box, then search the line towards its minimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.diagonal import Pair, learn_diagonal_, measure
from descend.second_order.mathematics.space import Array, Space
from descend.second_order.problem.objective import Point
from descend.second_order.solvers.descent import SearchDirection, first_step, repeat_searches
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import Run

INNER_ITERATIONS = 30  # projected Newton steps on the model; a few usually do
ACCURACY = 1e-2  # of the model's projected gradient, relative to its start


class CompactHessian:
    """The L-BFGS Hessian in compact form, with a diagonal that learns the scale of each variable.

    B = A - W' M^-1 W with A = D^-1, the rows of W those of S A and Y, and M = (S A S', L; L', -E), where L is the
    strictly lower triangle of S Y' and E its diagonal. Pairs are stored scaled to s'y = 1, so that E = I.

    Source: Byrd, Nocedal & Schnabel 1994, Theorem 2.3, https://doi.org/10.1007/BF01582063
    """

    def __init__(
        self, numel: int, history_size: int, dtype: torch.dtype, device: torch.device, space: Space | None = None
    ) -> None:
        self.space = space or Space(numel)
        self.history_size = history_size
        self.steps = torch.empty(0, numel, dtype=dtype, device=device)
        self.changes = self.steps
        self.diagonal = torch.ones(numel, dtype=dtype, device=device)
        self._build()

    @property
    def is_steepest(self) -> bool:
        return len(self.steps) == 0

    def state(self) -> dict[str, Any]:
        """What ``load`` needs to continue from here; tensors share memory."""
        return {"steps": self.steps, "changes": self.changes, "diagonal": self.diagonal}

    def accepts(self, state: Mapping[str, Any] | None) -> bool:
        """Whether this is a ``state`` of the same sizes, on every rank."""
        is_other = state is None or "curvatures" in state or state["diagonal"].shape != self.diagonal.shape
        return not self.space.largest(is_other)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``; its tensors are taken over."""
        self.steps, self.changes, self.diagonal = (state[name].to(self.steps) for name in self.state())
        self._build()

    def reset(self) -> None:
        self.steps = self.changes = self.steps[:0]
        self.diagonal = torch.ones_like(self.diagonal)
        self._build()

    def measure(self, s: Tensor, y: Tensor) -> Sequence[Array]:
        return measure(self.diagonal, s, torch.where(s != 0, y, 0.0), self.space)

    def update(self, s: Tensor, y: Tensor, pair: Pair | None = None) -> None:
        """Learn that the gradient changed by y along s, where s'y > 0."""
        # A variable that stayed on its bound says nothing about its scale, although its part of y is not zero.
        moved = torch.where(s != 0, y, 0.0)
        if pair is None and self.space.is_shared:
            pair = Pair(*self.space.total(*self.measure(s, moved)))
        scale = learn_diagonal_(self.diagonal, s, moved, pair=pair).rsqrt()
        dropped = max(0, len(self.steps) + 1 - self.history_size)
        self.steps = torch.cat([self.steps[dropped:], (scale * s).unsqueeze(0)])
        self.changes = torch.cat([self.changes[dropped:], (scale * y).unsqueeze(0)])
        self._build()

    def _build(self) -> None:
        scaled = self.steps / self.diagonal
        products, gram = self.space.total(self.steps.mm(self.changes.T), scaled.mm(self.steps.T))
        lower = products.tril(-1)
        self.rows = torch.cat([scaled, self.changes])
        self.middle = torch.cat(
            [
                torch.cat([gram, lower], dim=1),
                torch.cat([lower.T, -torch.eye(len(lower)).to(lower)], dim=1),
            ]
        )

    def multiply(self, vector: Tensor) -> Tensor:
        """B times a vector."""
        product = vector / self.diagonal
        if self.is_steepest:
            return product
        (along,) = self.space.total(self.rows.mv(vector))
        return product - self.rows.T.mv(torch.linalg.solve(self.middle, along))

    def slope_and_bend(self, grad: Tensor, step: Tensor) -> Sequence[Any]:
        """grad's and s'B s for a step s."""
        slope, bend = self.space.total(grad.dot(step), step.dot(self.multiply(step)))
        return slope, bend

    def solve(self, vector: Tensor, free: Tensor) -> Tensor:
        """The solution x of (B x)_i = vector_i for the free i, where the other x_i are 0; by Woodbury's formula."""
        diagonal = torch.where(free, self.diagonal, 0.0)
        solution = diagonal * vector
        if self.is_steepest:
            return solution
        scaled = self.rows * diagonal
        gram, along = self.space.total(scaled.mm(self.rows.T), scaled.mv(vector))
        return solution + scaled.T.mv(torch.linalg.solve(self.middle - gram, along))


def bounded_descent(run: Run, point: Point, model: CompactHessian, lr: float = 1.0) -> Status:
    """Minimize from ``point`` inside the bounds until there is a reason to stop.

    Args:
        run: limits and line searches; its best point is the result.
        point: the start.
        model: the Hessian; learns from every step.
        lr: first step tried towards a minimizer of the model.
    """
    lower, upper = run.objective.lower, run.objective.upper
    assert lower is not None
    assert upper is not None
    space = run.objective.space
    is_boxed = not space.largest(not (torch.isfinite(lower) & torch.isfinite(upper)).all())

    def propose(point: Point, has_failed: bool) -> SearchDirection:
        low, high = lower - point.x, upper - point.x
        if model.is_steepest:
            length = 1.0 if is_boxed and not has_failed else first_step(run, point)
            direction, step = torch.clamp(-length * point.grad, low, high), 1.0
        else:
            direction, step = minimizer(model, point.grad, low, high), lr
        return SearchDirection(direction, step, max_feasible_step(direction, low, high, space))

    return repeat_searches(run, point, model, propose)


def max_feasible_step(direction: Tensor, low: Tensor, high: Tensor, space: Space) -> float:
    """The largest step along a direction that stays between low and high, at least 1."""
    limits = torch.where(direction > 0, high, torch.where(direction < 0, low, math.inf)) / direction
    nearest = float(limits.abs().amin()) if len(limits) else math.inf
    return max(1.0, -space.largest(-nearest))


def minimizer(model: CompactHessian, grad: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Minimize grad'd + d'B d / 2 over low <= d <= high, where low <= 0 <= high, by projected Newton steps.

    Source: Bertsekas 1982, https://doi.org/10.1137/0320018
    """
    d = torch.zeros_like(grad)
    residual = grad
    first = None
    for _ in range(INNER_ITERATIONS):
        free = ((d > low) | (residual < 0)) & ((d < high) | (residual > 0))
        wanted = torch.where(free, residual, 0.0)
        moves = d - torch.clamp(d - model.diagonal * wanted, low, high)
        norm = model.space.largest(float(moves.abs().amax()) if len(moves) else 0.0)
        first = first or norm
        if norm <= ACCURACY * first:
            break
        newton = -model.solve(wanted, free)
        moved = _projected_search(model, d, residual, newton, low, high)
        if moved is None:
            moved = _projected_search(model, d, residual, -model.diagonal * wanted, low, high)
        if moved is None:
            break
        d, residual = moved, grad + model.multiply(moved)
    return d


def _projected_search(
    model: CompactHessian, d: Tensor, residual: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> Tensor | None:
    """The first of d + step, d + step / 2, ... whose projection lowers the model sufficiently; None without one."""
    for _ in range(10):
        moved = torch.clamp(d + step, low, high)
        change = moved - d
        slope, bend = model.slope_and_bend(residual, change)
        if slope < 0 and slope + 0.5 * bend <= 1e-4 * slope:
            return moved
        step = step / 2
    return None
