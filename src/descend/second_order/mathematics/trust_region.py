"""Steps in a trust region: minimize the model m(s) = g's + s'Hs / 2 over |s| <= radius.

``DenseModel`` does so exactly for a dense symmetric H, also if it is indefinite or singular; ``steihaug`` by truncated
conjugate gradients, from products with H alone. Either gives an object whose ``step(radius)`` can be called again for a
smaller radius without new work on H, so that a rejected step is cheap. Lengths and decreases are floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descend.second_order.mathematics.dense_steps import (
    ROUNDING,
    definite_minimizers,
    on_spheres,
    predicted,
    rounding,
    shortest_minimizers,
    without_noise,
)
from descend.second_order.mathematics.space import Space

_CHUNK = 1 << 17  # longer float32 dot products lose digits: on one thread 7e-6 relative at 1 M elements

_Array: TypeAlias = NDArray[np.float64]
_Scaled: TypeAlias = tuple[_Array, float, Tensor | None]  # a step and its decrease for H and g scaled, eigenvectors


class TrialStep(NamedTuple):
    """A step in the trust region and the decrease that the model predicts for it."""

    step: Tensor  # not to be changed in place
    norm: float  # its length in the norm of the region, at most the radius
    decrease: float  # m(0) - m(s), a sum of positive terms; 0 only for a step of zero
    on_boundary: bool  # whether the radius limits the step
    negative_curvature: bool  # whether the step owes its length to negative curvature beyond rounding


class DenseModel:
    """The model with a dense Hessian, and its exact minimizer in a ball.

    If H is positive definite and the Newton step inside, one Cholesky factorization is enough. Otherwise a symmetric
    eigendecomposition is computed once, for all radii, and the secular equation is solved in float64 on the host. If H
    is singular and g in its range, the step is the shortest minimizer. Eigenvalues of H and coefficients of g within
    rounding of zero count as zero. Magnitudes from 1e-300 to 1e300 (1e-30 to 1e30 in float32) are safe.

    Args:
        hessian: H, shape (N, N), symmetric; float32 or float64. Kept, not copied: leave it unchanged meanwhile.
        grad: g, shape (N,), N >= 0, of H's dtype and device. An eigendecomposition takes the memory of five matrices.
    Raises:
        ValueError: if the shapes do not fit.
    Example:
        >>> model = DenseModel(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 4.0]))
        >>> model.step(radius=2.0).step
        tensor([-1., -1.])
        >>> DenseModel(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.zeros(2)).step(radius=2.0).step.abs()
        tensor([0., 2.])

    Source: Moré & Sorensen 1983, https://doi.org/10.1137/0904038
    """

    finite: bool  # whether H and g are; if not, every step is zero

    def __init__(self, hessian: Tensor, grad: Tensor) -> None:
        if grad.ndim != 1 or hessian.shape != (grad.numel(), grad.numel()):
            shapes = f"{tuple(hessian.shape)} and {tuple(grad.shape)}"
            raise ValueError(f"DenseModel: the Hessian must be (N, N) and the gradient (N,), got {shapes}.")
        self._hessian, self._grad = hessian.detach(), grad.detach()
        self._noise = rounding(grad.numel(), torch.finfo(grad.dtype).eps)
        largest = [0.0, 0.0]
        if grad.numel():
            both = (torch.linalg.vector_norm(tensor, math.inf) for tensor in (self._hessian, self._grad))
            largest = torch.stack(list(both)).tolist()
        self.finite = all(map(math.isfinite, largest))
        # H and g are divided by powers of two, which is exact; beyond the limit the factor would overflow.
        limit = 1000 if grad.dtype == torch.float64 else 120
        self._hessian_exponent, self._grad_exponent = (max(-limit, min(math.frexp(x)[1], limit)) for x in largest)
        self._grad = self._grad * 2.0**-self._grad_exponent

    @np.errstate(all="ignore")
    def step(self, radius: float) -> TrialStep:
        """The minimizer of the model over |s| <= ``radius`` (> 0, finite), larger or smaller than in earlier calls.

        It is zero if the gradient is zero and no curvature negative, and if ``finite`` is False.
        """
        _check("DenseModel.step", radius=radius)
        if not self.finite or not self._grad.numel():
            return TrialStep(torch.zeros_like(self._grad), 0.0, 0.0, False, False)
        return self._inside(self._newton, radius) or self._inside(self._shortest, radius) or self._on_boundary(radius)

    @cached_property
    def _newton(self) -> _Scaled | None:
        """The minimizer in all space by Cholesky; None unless H is positive definite."""
        hessian = self._hessian * 2.0**-self._hessian_exponent
        step, decrease, is_definite = definite_minimizers(hessian[None], self._grad[None], self._noise)
        row = torch.cat([step[0], decrease, is_definite]).cpu().numpy()
        return (row[:-2], float(row[-2]), None) if row[-1] else None

    @cached_property
    def _spectrum(self) -> tuple[_Array, _Array, Tensor]:
        """Eigenvalues, ascending, of the scaled H, coefficients of the scaled g, eigenvectors."""
        eigenvalues, vectors = torch.linalg.eigh(self._hessian * 2.0**-self._hessian_exponent)
        values, parts = torch.stack([eigenvalues, vectors.mT @ self._grad]).cpu().double().numpy()
        values, parts = without_noise(values[None], parts[None], self._noise)
        return values[0], parts[0], vectors

    @cached_property
    def _shortest(self) -> _Scaled | None:
        """The shortest minimizer in all space by eigenvectors; None if H is indefinite."""
        values, parts, vectors = self._spectrum
        step, decrease = shortest_minimizers(values[None], parts[None])
        return (step[0], float(decrease[0]), vectors) if values[0] >= 0 else None

    def _inside(self, minimizer: _Scaled | None, radius: float) -> TrialStep | None:
        if minimizer is None:
            return None
        scaled, decrease, vectors = minimizer
        exponent = self._grad_exponent - self._hessian_exponent
        norm = float(np.ldexp(np.linalg.norm(scaled), exponent))
        if not norm <= radius:
            return None
        step = self._on_device(np.ldexp(scaled, exponent), vectors)
        return TrialStep(step, norm, _predicted(decrease, self._grad_exponent + exponent, norm), False, False)

    def _on_boundary(self, radius: float) -> TrialStep:
        values, parts, vectors = self._spectrum
        exponents = np.array([self._hessian_exponent]), np.array([self._grad_exponent])
        (unit,), (decrease,) = on_spheres(values[None], parts[None], exponents, np.array([radius]))
        return TrialStep(self._on_device(radius * unit, vectors), radius, float(decrease), True, bool(values[0] < 0))

    def _on_device(self, numbers: _Array, vectors: Tensor | None) -> Tensor:
        tensor = torch.from_numpy(numbers).to(self._grad.dtype).to(self._grad.device)
        return tensor if vectors is None else vectors @ tensor


class End(str, Enum):
    """Why a path of conjugate gradients ends."""

    converged = "converged"  # the residual is at most the tolerance
    boundary = "boundary"  # the next iterate is outside, or the curvature zero to rounding
    negative_curvature = "negative_curvature"  # a direction of negative curvature, followed to the boundary
    max_products = "max_products"  # the limit on products, reached inside
    non_finite = "non_finite"  # the gradient or a product (preconditioned or not); the path ends before it


class _Piece(NamedTuple):
    """A straight piece of the path, from s along a direction u of unit length; products are those of the region."""

    length: float
    norm: float  # |s|
    along: float  # s'u >= 0
    turn: float  # u'u of the piece before
    slope: float  # -dm/du at s, > 0
    curvature: float  # u'Hu

    def decrease(self, length: float) -> float:
        return length * (self.slope - length * self.curvature / 2)


class CGPath:
    """The path of conjugate gradients from 0, along which |s| grows and the model falls; made by ``steihaug``."""

    end: End  # why it ends
    n_products: int  # products with H used
    radius: float  # the one it was made for
    norm: float  # length of the last point, in the norm of the region

    def __init__(self, grad: Tensor, radius: float, keep: int) -> None:
        self.n_products, self.radius, self.norm = 0, radius, 0.0
        self._last, self._keep = torch.zeros_like(grad), keep
        self._pieces: list[_Piece] = []
        self._directions: list[Tensor] = []

    def step(self, radius: float) -> TrialStep:
        """The point where the path crosses the sphere of ``radius``, else its last point; without further products.

        Within the stored directions this is the step of ``steihaug`` for the radius. The rest of the path is replaced
        by its chord, along which the model falls too. ``radius`` is > 0 and at most that of the path. The step is zero
        if the gradient is within the tolerance, and if it or the first product is not finite.
        """
        _check("CGPath.step", radius=radius)
        if radius > self.radius:
            raise ValueError(f"CGPath.step: radius must be at most the path's, {self.radius}, got {radius}.")
        negative = self.end is End.negative_curvature
        decrease = 0.0
        for number, piece in enumerate(self._pieces):
            if radius < self.radius and (length := _crossing(piece.norm, piece.along, radius)) <= piece.length:
                decrease += piece.decrease(length)
                negative = negative and number == len(self._pieces) - 1
                return TrialStep(self._point(number, length), radius, _predicted(decrease, 0, radius), True, negative)
            decrease += piece.decrease(piece.length)
        on_boundary = negative or self.end is End.boundary
        return TrialStep(self._last, min(self.norm, radius), _predicted(decrease, 0, self.norm), on_boundary, negative)

    def _point(self, number: int, length: float) -> Tensor:
        """The point ``length`` into a piece."""
        step = torch.zeros_like(self._last)
        for direction, piece in zip(self._directions[:number], self._pieces, strict=False):
            step.add_(direction, alpha=piece.length)
        if number < len(self._directions):
            return step.add_(self._directions[number], alpha=length)
        return step.lerp_(self._last, length / self._pieces[number].length)

    def _follow(self, direction: Tensor, turn: float, slope: float, curvature: float) -> bool:
        """Add the piece to the minimizer along the direction, or to the boundary; whether it stays inside."""
        along = turn * (self._pieces[-1].along + self._pieces[-1].length) if self._pieces else 0.0
        wanted = slope / curvature if curvature > 0 else math.inf
        most = _crossing(self.norm, along, self.radius)
        self._pieces.append(_Piece(min(wanted, most), self.norm, along, turn, slope, curvature))
        self._last.add_(direction, alpha=min(wanted, most))
        self.norm = _longer(self.norm, along, wanted) if wanted < most else self.radius
        if len(self._directions) < self._keep:
            self._directions.append(direction)
        return wanted < most

    def _ended(self, end: End) -> CGPath:
        self.end = end
        if len(self._pieces) > self._keep:
            self._pieces[self._keep :] = [_chord(self._pieces[self._keep :])]
        return self


def _chord(pieces: Sequence[_Piece]) -> _Piece:
    """The straight line from the first point of the pieces to their last.

    Directions are conjugate: slopes and curvatures add up. Residuals are orthogonal to the points before them, so that
    the product of such a point with the direction changes from piece to piece by the turn alone.
    """
    fall = bend = along = length = 0.0  # along: product of the first point and the chord
    first, growing = pieces[0].along, 0.0  # products of the first point, and of the chord so far, with the direction
    for number, piece in enumerate(pieces):
        if number:
            first, growing = piece.turn * first, piece.turn * (growing + pieces[number - 1].length)
        along += piece.length * first
        fall += piece.length * piece.slope
        bend += piece.length * (piece.length * piece.curvature)
        length = _longer(length, growing, piece.length)
    length = max(length, math.ulp(0.0))
    return _Piece(length, pieces[0].norm, along / length, 0.0, fall / length, bend / length / length)


def _crossing(norm: float, along: float, radius: float) -> float:
    """How far from s, with s'u = along, the sphere is in direction u."""
    # Relative to the radius nothing overflows, and this form of the root does not cancel.
    room, along = max(0.0, 1 - norm / radius) * (1 + norm / radius), along / radius
    return radius * (room / (along + math.sqrt(along * along + room))) if room > 0 else 0.0


def _longer(norm: float, along: float, length: float) -> float:
    """|s + length u| from |s|, s'u and |u| = 1."""
    return math.hypot(along + length, math.sqrt(max(0.0, norm - along)) * math.sqrt(norm + along))


def steihaug(
    hvp: Callable[[Tensor], Tensor],
    grad: Tensor,
    radius: float,
    tolerance: float,
    max_products: int,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    keep: int = 50,
    space: Space | None = None,
) -> CGPath:
    """Conjugate gradients on Hs = -g, until the residual is small, the boundary reached or the curvature negative.

    One product with H, and one transfer from the device, per iteration; lengths come from recurrences.
    ``hvp`` always gets a direction of length 1 in the region's norm, however small or large the gradient is.

    Args:
        hvp: v -> Hv, of the shape, dtype and device of ``grad``; must not change v.
        grad: g, shape (N,), N >= 0; float32 or float64.
        radius: > 0 and finite, in the units of the parameters.
        tolerance: stop when the Euclidean norm of the residual g + Hs is at most this; >= 0, in the units of g.
        max_products: most calls of ``hvp``, >= 1.
        preconditioner: r -> M^-1 r, where M resembles H and is symmetric positive definite; the region is then
            sqrt(s'Ms) <= radius. Default: None, M = I.
        keep: directions kept (N numbers each) for steps with smaller radii, >= 0. Default: 50.
        space: of the vectors. Default: all of their entries are here.
    Returns:
        The path; ``path.step(radius)`` is the step.
    Raises:
        ValueError: if a number is outside its range, or the preconditioner turns out not to be positive definite.
    Example:
        >>> path = steihaug(lambda v: torch.tensor([1.0, 4.0]) * v, torch.tensor([1.0, 1.0]), 9.0, 1e-4, 10)
        >>> path.step(9.0).step, path.n_products, path.end.value
        (tensor([-1.0000, -0.2500]), 2, 'converged')
        >>> path.step(0.1).norm, path.step(0.1).on_boundary
        (0.1, True)

    Source: Steihaug 1983, https://doi.org/10.1137/0720042; Conn, Gould & Toint 2000, Algorithm 7.5.1
    """
    _check("steihaug", radius=radius, max_products=max_products)
    _check("steihaug", 0.0, tolerance=tolerance, keep=keep)
    path, space = CGPath(grad, radius, keep), space or Space(grad.numel())
    scale, residual, inverse, rz = _start(grad.detach(), preconditioner, space)
    if scale <= tolerance or not math.isfinite(rz):
        return path._ended(End.converged if scale <= tolerance else End.non_finite)
    # From here on the residual is divided by |g|, and the direction by its length.
    direction, carried, largest = torch.zeros_like(residual), 0.0, 0.0
    while True:
        if not rz > 0:
            raise ValueError(f"steihaug: preconditioner must be positive definite, got r'M^-1 r = {rz}; leave it out.")
        # p <- -M^-1 r + beta p, beta = rz / (rz before); the two terms are orthogonal in the region's norm.
        length = math.hypot(math.sqrt(rz), carried)
        turn = carried / length
        direction = (inverse / -length).add_(direction, alpha=turn)
        product = hvp(direction).detach()
        slope = rz / length
        (bend,) = space.total(_dot(direction, product))
        # Whether this iterate exists is known only after the transfer, in which its own scalars travel.
        following = torch.addcmul(residual, product, slope / bend)
        inverse = following if preconditioner is None else preconditioner(following)
        rr_part, rz_part = space.total(_dot(following, following), _dot(following, inverse))
        curvature, rr, next_rz = torch.stack([bend, rr_part, rz_part]).tolist()
        path.n_products += 1
        if not math.isfinite(curvature):
            return path._ended(End.non_finite)
        largest = max(largest, abs(curvature))
        if not path._follow(direction, turn, scale * slope, curvature):
            negative = curvature < -ROUNDING * torch.finfo(grad.dtype).eps * largest
            return path._ended(End.negative_curvature if negative else End.boundary)
        residual = following
        if scale * math.sqrt(rr) <= tolerance:
            return path._ended(End.converged)
        if path.n_products == max_products:
            return path._ended(End.max_products)
        if not math.isfinite(next_rz):
            return path._ended(End.non_finite)
        rz, carried = next_rz, length * next_rz / rz


def _start(
    grad: Tensor, preconditioner: Callable[[Tensor], Tensor] | None, space: Space
) -> tuple[float, Tensor, Tensor, float]:
    """|g|, r = g / |g|, M^-1 r and their product, in one transfer; all zero where g is."""
    if not space.numel:
        return 0.0, grad, grad, 0.0
    tiny = torch.finfo(grad.dtype).tiny
    largest = torch.linalg.vector_norm(grad, math.inf) if grad.numel() else grad.new_zeros(())
    if space.is_shared:
        largest = grad.new_tensor(space.largest(float(largest)))
    residual = grad / largest.clamp(min=tiny)
    norm = space.total(_dot(residual, residual))[0].sqrt()
    residual = residual / norm.clamp(min=tiny)
    inverse = residual if preconditioner is None else preconditioner(residual)
    (product,) = space.total(_dot(residual, inverse))
    scale, relative, rz = torch.stack([largest, norm, product]).tolist()
    return scale * relative, residual, inverse, rz


def _dot(left: Tensor, right: Tensor) -> Tensor:
    pairs = zip(torch.split(left, _CHUNK), torch.split(right, _CHUNK), strict=True)
    return torch.stack([torch.dot(*pair) for pair in pairs]).sum()


def _check(who: str, least: float = math.ulp(0.0), **numbers: float) -> None:
    for name, number in numbers.items():
        if not least <= number < math.inf:
            raise ValueError(f"{who}: {name} must be {'>=' if least == 0 else '>'} 0 and finite, got {number}.")


def _predicted(mantissa: float, exponent: int, norm: float) -> float:
    return float(predicted(np.float64(mantissa), exponent, norm))
