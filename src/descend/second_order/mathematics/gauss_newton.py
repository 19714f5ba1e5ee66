"""Steps of Gauss-Newton, Levenberg and Marquardt: minimize |r + J s|^2 / 2 in a trust region or with damping."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from descend.second_order.mathematics.boxed_least_squares import boxed_least_squares
from descend.second_order.mathematics.spectrum import (
    Spectrum,
    curved_spectrum,
    damped,
    damping_for,
    fall,
    resolved,
    spectrum_of,
    triangle_of,
)
from descend.second_order.mathematics.trust_region import TrialStep

WITHIN = 0.1  # relative error of the length of a step in a box, as in MINPACK
MAX_REGION = 20  # dampings tried for a step in a box


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

    def change(self, step: Tensor) -> float:
        """|J s|."""

    def rounding(self, x: Tensor) -> float:
        """What independent relative changes of all variables change the residuals by, relative to them."""

    def newton(self) -> TrialStep:
        """The shortest minimizer of the model inside the bounds."""

    def step(self, radius: float) -> TrialStep:
        """The minimizer over |D s| <= radius inside the bounds."""

    def damped_step(self, damping: float) -> TrialStep:
        """The minimizer of |r + J s|^2 / 2 + damping |D s|^2 / 2 inside the bounds."""

    def bend(self, change: Tensor, step: Tensor) -> Tensor | None:
        """What residuals, weighted as in the model, change by beyond J s; None where steps cannot be corrected."""

    def correction(self, bend: Tensor) -> Tensor:
        """-(J'J + damping D^2)^-1 J'bend, with the damping of the last step, in disregard of the bounds."""

    def share(self, step: Tensor, other: Tensor) -> float:
        """What multiple of ``other`` is nearest to ``step`` in the norm of the region."""


class DenseGaussNewton:
    """The model with a dense Jacobian, of any rank, and its exact minimizers.

    J is scaled by D, then reduced to a triangle by QR. The singular values of the triangle, computed once for a point,
    give the step of any radius. Singular values within rounding of zero count as zero.

    With ``curvature`` the Hessian of the model is J'J + S, its eigenvalues replaced by their absolute values.

    Args:
        jacobian: J, shape (M, N), finite. Kept, not copied.
        residuals: r, shape (M,), finite.
        scale: the diagonal of D, shape (N,), > 0, at least about the norms of J's columns.
        factors: of a robust loss, by which the rows of J have been multiplied, shape (M,); None for 1.
        curvature: S, shape (N, N), float64 on the CPU; None for 0.
        low, high: bounds on the step, <= 0 and >= 0; both or none.
    Attributes:
        damping: of the last step.
    Source: Moré 1978, https://doi.org/10.1007/BFb0067700; for S, Dennis, Gay & Welsch 1981,
        https://doi.org/10.1145/355958.355965
    """

    is_solved = True

    def __init__(
        self,
        jacobian: Tensor,
        residuals: Tensor,
        scale: Tensor,
        *,
        factors: Tensor | None = None,
        curvature: Tensor | None = None,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> None:
        self.jacobian, self.factors = jacobian, factors
        self.grad = jacobian.T.mv(residuals)
        self.scale = scale.double().cpu()
        self.damping = 0.0
        matrix, right, unit = triangle_of(jacobian, residuals, scale)
        self._triangle, self._right, self._unit = matrix.cpu(), right.cpu(), float(unit)
        self._rounding = max(jacobian.shape) * torch.finfo(jacobian.dtype).eps
        self._curvature = curvature
        self._box: tuple[Tensor, Tensor] | None = None
        if low is not None and high is not None:
            self._box = low.double().cpu() * self.scale / self._unit, high.double().cpu() * self.scale / self._unit

    @cached_property
    def plain_spectrum(self) -> Spectrum:
        """That of the scaled Jacobian and the residuals in their unit, without curvature."""
        return spectrum_of(self._triangle, self._right, self._rounding)

    @cached_property
    def _spectrum(self) -> Spectrum:
        if self._curvature is None:
            return self.plain_spectrum
        return curved_spectrum(self.plain_spectrum, self.scale, self._curvature, self._rounding)

    def length(self, step: Tensor) -> float:
        return float(torch.linalg.vector_norm(step.double().cpu() * self.scale))

    def change(self, step: Tensor) -> float:
        return float(torch.linalg.vector_norm(self.jacobian.mv(step)))

    def rounding(self, x: Tensor) -> float:
        norms = torch.linalg.vector_norm(self._triangle, dim=0)  # of the columns of J, divided by D
        return float(torch.linalg.vector_norm(x.double().cpu() * self.scale * norms))

    def share(self, step: Tensor, other: Tensor) -> float:
        step, other = step.double().cpu() * self.scale, other.double().cpu() * self.scale
        square = float(other.dot(other))
        return float(step.dot(other)) / square if square > 0 else 0.0

    def newton(self) -> TrialStep:
        return self._newton

    @cached_property
    def _newton(self) -> TrialStep:
        return self._trial(self._minimizer(0.0), on_boundary=False)

    def step(self, radius: float) -> TrialStep:
        self.damping = 0.0
        if self._newton.norm <= radius:
            return self._newton
        radius = radius / self._unit
        values, parts, rows = self._spectrum
        self.damping = float(damping_for(values, parts, torch.tensor(radius, dtype=torch.float64)))
        t = rows.T.mv(damped(values, parts, self.damping))
        return self._trial(t if self._is_inside(t) else self._boxed_region(radius), on_boundary=True)

    def damped_step(self, damping: float) -> TrialStep:
        self.damping = damping
        return self._trial(self._minimizer(damping), on_boundary=damping > 0)

    def bend(self, change: Tensor, step: Tensor) -> Tensor | None:
        change = change if self.factors is None else self.factors * change
        return change - self.jacobian.mv(step)

    def correction(self, bend: Tensor) -> Tensor:
        values, _, rows = self._spectrum
        slope = rows.mv(self.jacobian.T.mv(bend).double().cpu() / self.scale)
        return (rows.T.mv(resolved(values, slope, self.damping)) / self.scale).to(self.jacobian)

    def _trial(self, t: Tensor, *, on_boundary: bool) -> TrialStep:
        """A step from D s in units of the largest residual; the decrease is -(g's + s'Hs / 2)."""
        values, parts, rows = self._spectrum
        along = values * rows.mv(t)
        decrease = float(fall(along, parts, self._unit))
        norm = float(torch.linalg.vector_norm(t)) * self._unit
        return TrialStep((t * self._unit / self.scale).to(self.jacobian), norm, decrease, on_boundary, False)

    def _minimizer(self, damping: float) -> Tensor:
        values, parts, rows = self._spectrum
        t = rows.T.mv(damped(values, parts, damping))
        return t if self._is_inside(t) else self._boxed(damping, torch.zeros_like(t))

    def _is_inside(self, t: Tensor) -> bool:
        return self._box is None or bool(((t >= self._box[0]) & (t <= self._box[1])).all())

    def _boxed(self, damping: float, start: Tensor) -> Tensor:
        assert self._box is not None
        values, right, rows = self._spectrum
        matrix = values.unsqueeze(1) * rows
        if damping > 0:
            matrix = torch.cat([matrix, math.sqrt(damping) * torch.eye(len(start), dtype=torch.float64)])
            right = torch.cat([right, torch.zeros_like(start)])
        return boxed_least_squares(matrix, right, *self._box, start, self._rounding)

    def _boxed_region(self, radius: float) -> Tensor:
        """The minimizer in the box and the region, its length within ``WITHIN`` of the radius, or less.

        Hebden's iteration as in Moré 1978, section 5, on the variables that are not at a bound.
        """
        assert self._box is not None
        low, high = self._box
        least, most = 0.0, math.inf
        best = t = torch.zeros_like(low)
        longest = 0.0
        for _ in range(MAX_REGION):
            t = self._boxed(self.damping, t)
            norm = float(torch.linalg.vector_norm(t))
            if longest < norm <= (1 + WITHIN) * radius:
                best, longest = t, norm
            if abs(norm - radius) <= WITHIN * radius:
                break
            least, most = (self.damping, most) if norm > radius else (least, self.damping)
            bend = self._bend(t, (t > low) & (t < high))
            damping = self.damping + (norm / radius - 1) * norm**2 / bend if bend > 0 else math.inf
            if not least < damping < most:
                damping = 10 * least if most == math.inf else 0.1 * most if least == 0 else math.sqrt(least * most)
            self.damping = damping
        return best * min(1.0, radius / longest) if longest > 0 else best

    def _bend(self, t: Tensor, free: Tensor) -> float:
        """t'(A'A + damping)^-1 t over the free variables: minus the derivative of |t|^2 / 2 by the damping."""
        values, _, rows = self._spectrum
        columns = values.unsqueeze(1) * rows[:, free]
        gram = columns.T @ columns
        gram.diagonal().add_(self.damping)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) or not bool(free.any()):
            return 0.0
        return float(torch.linalg.solve_triangular(factor, t[free].unsqueeze(1), upper=False).square().sum())
