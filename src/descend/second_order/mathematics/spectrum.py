"""Linear models |r + J s|^2 / 2 reduced to triangles, and their singular values; of one problem, or of many.

Leading dimensions count problems. Steps s are in units of their own: t = D s / unit, with the largest residual of a
problem as its unit, because the squares of residuals may overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_SECULAR = 60  # Newton steps on the secular equation; ten usually do
SECULAR_ROUNDING = 1e-14
LEAST_EIGENVALUE = 1e-8  # of a Hessian with curvature, relative to that without
LARGEST_INDEFINITE = 1e3  # eigenvalue, by its absolute value, of one that is indefinite
LIFT = 0.7  # of an entry of D, as a power: 0 for the norm of its column, 1 for steps relative to the start
MAX_LIFT = 1e17  # before the power


class Triangle(NamedTuple):
    """A and b in float64, with |A t + b| = |r + J s| / unit but for a constant.

    Attributes:
        matrix: A, shape (..., K, N), upper triangular; K is at most N + 1.
        right: b, shape (..., K).
        unit: the largest residual, 1 if all are zero; shape (...).
    """

    matrix: Tensor
    right: Tensor
    unit: Tensor


class Spectrum(NamedTuple):
    """A triangle A and a vector b by the singular value decomposition of A.

    Attributes:
        values: singular values, descending; those within rounding of zero are zero.
        parts: coefficients of b in the left singular vectors.
        rows: right singular vectors.
    """

    values: Tensor
    parts: Tensor
    rows: Tensor


def column_norms(jacobian: Tensor) -> Tensor:
    """The 2-norms of the columns of matrices, without overflow or underflow."""
    if not jacobian.shape[-2]:
        return jacobian.new_zeros(jacobian.shape[:-2] + jacobian.shape[-1:])
    largest = jacobian.abs().amax(-2)
    safe = torch.where(largest > 0, largest, 1.0)
    norms: Tensor = safe * torch.linalg.vector_norm(jacobian / safe.unsqueeze(-2), dim=-2)
    return norms


def first_scale(norms: Tensor, x: Tensor) -> Tensor:
    """The diagonal of D at a start: norms of the columns of J, lifted towards steps relative to the start.

    With the norms alone, a variable on which the residuals hardly depend at a far start may go so far that they no
    longer depend on it at all. With |D x| the same for all variables, one that starts close to zero would hardly move.
    ``LIFT`` is between the two. A variable that starts at zero has the norm of its column: its size is not known.

    Args:
        norms: of the columns of J, shape (..., N).
        x: the start, shape (..., N).
    """
    if not x.shape[-1]:
        return norms
    alike = (norms * x.abs()).amax(-1, keepdim=True) / x.abs()
    lifted = torch.where(norms > 0, norms * (alike / norms).clamp(max=MAX_LIFT) ** LIFT, alike)
    return torch.where(alike.isfinite(), torch.maximum(norms, lifted), norms)


def triangle_of(jacobian: Tensor, residuals: Tensor, scale: Tensor, held: Tensor | None = None) -> Triangle:
    """The model reduced by QR of J D^-1.

    Args:
        jacobian: J, shape (..., M, N), finite.
        residuals: r, shape (..., M), finite.
        scale: the diagonal of D, shape (..., N), > 0.
        held: variables that do not move, (..., N); their columns of J count as zero, but not for the rank.
    """
    largest = residuals.abs().amax(-1) if residuals.shape[-1] else residuals.sum(-1)
    unit = torch.where(largest > 0, largest, 1.0)
    columns, last = jacobian.mT / scale.unsqueeze(-1), (residuals / unit.unsqueeze(-1)).unsqueeze(-2)
    if held is not None:
        columns = torch.cat([columns.masked_fill(held.unsqueeze(-1), 0.0), torch.diag_embed(held.to(columns))], -1)
        last = torch.cat([last, torch.zeros_like(held, dtype=last.dtype).unsqueeze(-2)], -1)
    both = torch.cat([columns, last], -2).mT
    triangle = (torch.linalg.qr(both, mode="r")[1] if both.shape[-2] else both).double()
    return Triangle(triangle[..., :-1], triangle[..., -1], unit)


def spectrum_of(matrix: Tensor, right: Tensor, rounding: float) -> Spectrum:
    """The singular values of a triangle; those below ``rounding`` times the largest are zero."""
    left, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(torch.where(values > rounding * values[..., :1], values, 0.0), times(left.mT, right), rows)


def curved_spectrum(plain: Spectrum, scale: Tensor, curvature: Tensor, rounding: float) -> Spectrum:
    """That of a model whose Hessian is J'J + S, its eigenvalues, relative to J'J, replaced by their absolute values.

    Where J'J is nearly singular and J'J + S is indefinite, absolute values would make the model stiff in directions
    that J knows well, so that it promises nothing far from a minimum. There S is left out.

    Args:
        plain: without S.
        scale: the diagonal of D, shape (..., N), > 0.
        curvature: S, shape (..., N, N).
        rounding: relative, of singular values.
    """
    # V S V' in units of the singular values: H = V s (1 + E) s V', so that J'J is never formed.
    values, parts, rows = plain
    is_something = values.sum(-1, keepdim=True) > 0
    values = torch.where(is_something, torch.maximum(values, rounding * values[..., :1]), values + 1)
    scaled = rows / scale.unsqueeze(-2)
    relative = scaled @ curvature @ scaled.mT / values.unsqueeze(-1) / values.unsqueeze(-2)
    is_finite = relative.isfinite().all(-1).all(-1)
    relative = torch.where(is_finite[..., None, None], relative, 0.0)
    hessian = relative + torch.eye(values.shape[-1], dtype=values.dtype).to(values)
    # Entries may differ by many orders of magnitude, which Cholesky bears and eigenvalues do not.
    matrix, right, is_definite = definite_root(hessian, parts)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    roots = eigenvalues.abs().clamp(min=LEAST_EIGENVALUE).sqrt()
    is_used = is_finite & (is_definite | (eigenvalues.abs() <= LARGEST_INDEFINITE).all(-1))
    matrix = torch.where(is_definite[..., None, None], matrix, roots.unsqueeze(-1) * vectors.mT)
    right = torch.where(is_definite.unsqueeze(-1), right, times(vectors.mT, parts) / roots)
    curved = spectrum_of(matrix * values.unsqueeze(-2) @ rows, right, 0.0)
    return Spectrum(
        *(
            torch.where(is_used.reshape(is_used.shape + (1,) * (new.dim() - is_used.dim())), new, old)
            for new, old in zip(curved, plain, strict=True)
        )
    )


def definite_root(hessian: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R with R'R = H, the solution c of R'c = ``parts``, and whether H is definite; the identity where it is not.

    Args:
        hessian: H, shape (..., N, N).
        parts: shape (..., N).
    """
    factor, info = torch.linalg.cholesky_ex(hessian)
    unit = torch.eye(hessian.shape[-1], dtype=hessian.dtype).to(hessian).expand_as(hessian)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
    is_definite = (info == 0) & (inverse.square().sum((-2, -1)) < 1 / LEAST_EIGENVALUE)
    root, right = factor.mT, times(inverse, parts)
    return (
        torch.where(is_definite[..., None, None], root, unit),
        torch.where(is_definite.unsqueeze(-1), right, parts),
        is_definite,
    )


def damped(values: Tensor, parts: Tensor, damping: Tensor | float) -> Tensor:
    """The minimizer of |S t + c|^2 + damping |t|^2 for a diagonal S = ``values`` >= 0; zero where S and damping are."""
    return resolved(values, values * parts, damping)


def resolved(values: Tensor, slope: Tensor, damping: Tensor | float) -> Tensor:
    """-(S^2 + damping)^-1 ``slope`` for a diagonal S = ``values`` >= 0; zero where S and damping are."""
    bottom = values.square() + damping
    return torch.where(bottom > 0, -slope / torch.where(bottom > 0, bottom, 1.0), 0.0)


def damping_for(values: Tensor, parts: Tensor, radius: Tensor) -> Tensor:
    """The least damping >= 0 with which ``damped`` is no longer than a radius.

    Newton's method on 1 / |t(damping)| = 1 / radius, which is concave. From where no entry of t is longer than the
    radius, a lower bound, it rises to the solution and never passes it.

    Args:
        values: singular values, shape (..., N).
        parts: coefficients of the residuals, shape (..., N).
        radius: > 0, shape (...).
    Returns:
        Shape (...).
    Source: Moré 1978, section 5, https://doi.org/10.1007/BFb0067700
    """
    radius = radius.unsqueeze(-1)
    if not values.shape[-1]:
        return torch.zeros_like(radius).squeeze(-1)
    damping = ((values * parts).abs() / radius - values.square()).amax(-1, keepdim=True).clamp(min=0.0)
    for _ in range(MAX_SECULAR):
        t = damped(values, parts, damping)
        norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
        bottom = values.square() + damping
        bend = (t.square() / torch.where(bottom > 0, bottom, 1.0)).sum(-1, keepdim=True)
        rise = (norm / radius - 1) * norm.square() / torch.where(bend > 0, bend, 1.0)
        higher = torch.where((norm > radius) & (bend > 0), damping + rise, damping)
        if not bool((higher > damping * (1 + SECULAR_ROUNDING)).any()):
            break
        damping = torch.maximum(higher, damping)
    return damping.squeeze(-1)


def fall(along: Tensor, right: Tensor, unit: Tensor | float) -> Tensor:
    """By how much a model |A t + b|^2 unit^2 / 2 falls, from A t and b."""
    return -inner(along, right + 0.5 * along) * unit**2


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products (..., M) of matrices (..., M, N) with vectors (..., N)."""
    return matrix.mv(vector) if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products (...) of vectors (..., N)."""
    return left.dot(right) if left.dim() == 1 else (left * right).sum(-1)
