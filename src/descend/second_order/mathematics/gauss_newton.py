"""Steps of Gauss-Newton, Levenberg and Marquardt: minimize |r + J s|^2 / 2 in a trust region or with damping."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.mathematics.trust_region import TrialStep

MAX_SECULAR = 60  # Newton steps on the secular equation; ten usually do
WITHIN = 0.1  # relative error of the length of a step in a box, as in MINPACK
MAX_REGION = 10  # dampings tried for a step in a box


class LinearModel(Protocol):
    """A model |r + J s|^2 / 2 of the cost around a point, with a norm |D s| for steps."""

    @property
    def grad(self) -> Tensor:
        """J'r, the gradient of the cost."""

    @property
    def is_solved(self) -> bool:
        """Whether ``newton`` is the minimizer, and not just somewhere on the way."""

    def length(self, step: Tensor) -> float:
        """|D s|."""

    def newton(self) -> TrialStep:
        """The shortest minimizer of the model inside the bounds."""

    def step(self, radius: float) -> TrialStep:
        """The minimizer over |D s| <= radius inside the bounds."""

    def damped_step(self, damping: float) -> TrialStep:
        """The minimizer of |r + J s|^2 / 2 + damping |D s|^2 / 2 inside the bounds."""


def column_norms(jacobian: Tensor) -> Tensor:
    """The 2-norms of the columns, without overflow or underflow."""
    if not jacobian.shape[-2]:
        return jacobian.new_zeros(jacobian.shape[:-2] + jacobian.shape[-1:])
    largest = jacobian.abs().amax(-2)
    safe = torch.where(largest > 0, largest, 1.0)
    return safe * torch.linalg.vector_norm(jacobian / safe.unsqueeze(-2), dim=-2)


def damped(values: Tensor, parts: Tensor, damping: Tensor | float) -> Tensor:
    """The minimizer of |S t + c|^2 + damping |t|^2 for a diagonal S = ``values`` >= 0; zero where S and damping are."""
    bottom = values.square() + damping
    return torch.where(bottom > 0, -values * parts / torch.where(bottom > 0, bottom, 1.0), 0.0)


def damping_for(values: Tensor, parts: Tensor, radius: Tensor) -> Tensor:
    """The least damping >= 0 at which |damped(values, parts, damping)| <= radius; dimensions before the last are a batch.

    Newton's method on 1 / |t(damping)| = 1 / radius, which is concave. Started where no entry of t is longer than the
    radius, a lower bound, it rises to the solution and never passes it.

    Source: Moré 1978, section 5, https://doi.org/10.1007/BFb0067700
    """
    radius = radius.unsqueeze(-1)
    above = (values * parts).abs() / radius - values.square()
    damping = above.amax(-1, keepdim=True).clamp(min=0.0) if values.shape[-1] else torch.zeros_like(radius)
    for _ in range(MAX_SECULAR):
        t = damped(values, parts, damping)
        norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
        bottom = values.square() + damping
        bend = (t.square() / torch.where(bottom > 0, bottom, 1.0)).sum(-1, keepdim=True)
        rise = (norm / radius - 1) * norm.square() / torch.where(bend > 0, bend, 1.0)
        higher = torch.where((norm > radius) & (bend > 0), damping + rise, damping)
        if not bool((higher > damping * (1 + 1e-14)).any()):
            break
        damping = torch.maximum(higher, damping)
    return damping.squeeze(-1)


class DenseGaussNewton:
    """The model with a dense Jacobian, of any rank, and its exact minimizers.

    J is scaled by D, then reduced to a triangle by QR. The singular values of the triangle, computed once for a point,
    give the step of any radius. Singular values within rounding of zero count as zero.

    Args:
        jacobian: J, shape (M, N), finite.
        residuals: r, shape (M,), finite.
        scale: the diagonal of D, shape (N,), > 0, at least about the norms of J's columns.
        low, high: bounds on the step, <= 0 and >= 0; both or none.
    Source: Moré 1978, https://doi.org/10.1007/BFb0067700
    """

    is_solved = True

    def __init__(
        self, jacobian: Tensor, residuals: Tensor, scale: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> None:
        self.grad = jacobian.T.mv(residuals)
        self._scale = scale.double().cpu()
        self._like = jacobian
        self._low = self._high = None
        if low is not None and high is not None:
            self._low, self._high = (bound.double().cpu() * self._scale for bound in (low, high))
        largest = float(residuals.abs().amax()) if residuals.numel() else 0.0
        self._unit = largest if largest > 0 else 1.0  # residuals in units of the largest: their squares may overflow
        both = torch.cat([jacobian / scale, (residuals / self._unit).unsqueeze(1)], dim=1)
        triangle = (torch.linalg.qr(both, mode="r")[1] if min(both.shape) else both).double().cpu()
        self._triangle, self._right = triangle[:, :-1], triangle[:, -1]
        self._eps = max(jacobian.shape) * torch.finfo(jacobian.dtype).eps

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular values of the scaled Jacobian, coefficients of the residuals, right singular vectors as rows."""
        left, values, right = torch.linalg.svd(self._triangle, full_matrices=False)
        values = torch.where(values > self._eps * values[:1], values, 0.0)
        return values, left.T.mv(self._right), right

    @property
    def rank(self) -> int:
        """Singular values beyond rounding."""
        return int((self._spectrum[0] > 0).sum())

    def length(self, step: Tensor) -> float:
        return float(torch.linalg.vector_norm(step.double().cpu() * self._scale))

    def newton(self) -> TrialStep:
        return self._newton

    @cached_property
    def _newton(self) -> TrialStep:
        return self._trial(self._scaled_step(0.0), False)

    def step(self, radius: float) -> TrialStep:
        newton = self._newton
        if newton.norm <= radius:
            return newton
        scaled_radius = radius / self._unit
        values, parts, right = self._spectrum
        damping = float(damping_for(values, parts, torch.tensor(scaled_radius, dtype=torch.float64)))
        t = right.T.mv(damped(values, parts, damping))
        if not self._is_inside(t):
            t = self._boxed_region(damping, scaled_radius)
        return self._trial(t, True)

    def damped_step(self, damping: float) -> TrialStep:
        return self._trial(self._scaled_step(damping), damping > 0)

    def _trial(self, t: Tensor, on_boundary: bool) -> TrialStep:
        """A step from its scaled form, in units of the residuals; the decrease is -(g's + |J s|^2 / 2)."""
        along = self._triangle.mv(t)
        decrease = -float(along.dot(self._right + 0.5 * along)) * self._unit**2
        norm = float(torch.linalg.vector_norm(t)) * self._unit
        step = (t * self._unit / self._scale).to(self._like)
        return TrialStep(step, norm, decrease, on_boundary, False)

    def _scaled_step(self, damping: float) -> Tensor:
        values, parts, right = self._spectrum
        t = right.T.mv(damped(values, parts, damping))
        return t if self._is_inside(t) else self._boxed(damping, torch.zeros_like(t))

    def _is_inside(self, t: Tensor) -> bool:
        if self._low is None or self._high is None:
            return True
        t = t * self._unit
        return bool(((t >= self._low) & (t <= self._high)).all())

    def _boxed(self, damping: float, start: Tensor) -> Tensor:
        assert self._low is not None
        assert self._high is not None
        matrix, right = self._triangle, self._right
        if damping > 0:
            matrix = torch.cat([matrix, math.sqrt(damping) * torch.eye(len(start), dtype=torch.float64)])
            right = torch.cat([right, torch.zeros_like(start)])
        return boxed_least_squares(matrix, right, self._low / self._unit, self._high / self._unit, start, self._eps)

    def _boxed_region(self, damping: float, radius: float) -> Tensor:
        """The minimizer in the box and the region, its length within ``WITHIN`` of the radius, or less.

        Hebden's iteration as in Moré 1978, section 5, on the variables that are not at a bound.
        """
        assert self._low is not None
        assert self._high is not None
        low, high = self._low / self._unit, self._high / self._unit
        least, most = 0.0, math.inf
        t = torch.zeros_like(low)
        for _ in range(MAX_REGION):
            t = self._boxed(damping, t)
            norm = float(torch.linalg.vector_norm(t))
            if abs(norm - radius) <= WITHIN * radius or (norm < radius and damping == 0):
                break
            least, most = (damping, most) if norm > radius else (least, damping)
            free = (t > low) & (t < high)
            bend = self._bend(t, free, damping)
            damping = damping + (norm / radius - 1) * norm**2 / bend if bend > 0 else math.inf
            if not least < damping < most:
                damping = 0.5 * (least + most) if most < math.inf else 10 * max(least, 1e-3)
        return t * min(1.0, radius / max(float(torch.linalg.vector_norm(t)), 1e-300))

    def _bend(self, t: Tensor, free: Tensor, damping: float) -> float:
        """t'(A'A + damping)^-1 t over the free variables: minus the derivative of |t|^2 / 2 by the damping."""
        columns = self._triangle[:, free]
        gram = columns.T @ columns
        gram.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) or not free.any():
            return 0.0
        half = torch.linalg.solve_triangular(factor, t[free].unsqueeze(1), upper=False)
        return float(half.square().sum())


def boxed_least_squares(matrix: Tensor, right: Tensor, low: Tensor, high: Tensor, start: Tensor, eps: float) -> Tensor:
    """Minimize |A t + b| over low <= t <= high by projected Newton steps, from a start inside.

    Source: Bertsekas 1982, https://doi.org/10.1137/0320018
    """
    t = start
    for _ in range(3 * len(t) + 10):
        residual = matrix.mv(t) + right
        slope = matrix.T.mv(residual)
        free = ((t > low) | (slope < 0)) & ((t < high) | (slope > 0))
        if not bool(free.any()):
            break
        columns = matrix[:, free]
        solution = torch.linalg.lstsq(columns, -residual.unsqueeze(1), rcond=eps, driver="gelsd").solution
        move = torch.zeros_like(t)
        move[free] = solution.squeeze(1)
        moved, is_whole = _projected_search(matrix, residual, slope, t, move, low, high)
        if moved is None:
            break
        t = moved
        if is_whole:
            slope = matrix.T.mv(matrix.mv(t) + right)
            # The free variables are solved for; those at a bound stay if the slope pushes them outwards.
            noise = eps * torch.linalg.vector_norm(matrix, dim=0) * torch.linalg.vector_norm(right)
            if not bool((~free & (((t <= low) & (slope < -noise)) | ((t >= high) & (slope > noise)))).any()):
                break
    return t


def _projected_search(
    matrix: Tensor, residual: Tensor, slope: Tensor, t: Tensor, move: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor | None, bool]:
    """The first of t + move, t + move / 2, ... whose projection lowers the model sufficiently; whether it is t + move."""
    length = 1.0
    for _ in range(30):
        wanted = t + length * move
        moved = torch.clamp(wanted, low, high)
        change = moved - t
        along = matrix.mv(change)
        fall = float(slope.dot(change))
        if fall < 0 and fall + 0.5 * float(along.dot(along)) <= 1e-4 * fall:
            return moved, length == 1.0 and bool((moved == wanted).all())
        length /= 2
    return None, False
