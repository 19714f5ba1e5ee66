"""Linear systems of the conditions of Karush, Kuhn and Tucker: Hw + A'u = v and Aw = r, in the null space of A.

Source: Nocedal & Wright 2006, section 16.2, https://doi.org/10.1007/978-0-387-40065-5
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from descend.second_order.mathematics.definite import ROUNDING, solve_by_factor


class KKTRows:
    """The rows of A, in variables of which some are held and get w = 0.

    Args:
        rows: A, shape (M, N).
        free: which variables are not held, shape (N,).
        has_null_basis: whether ``along`` is wanted; it takes O(N^2) memory.
    Attributes:
        basis: orthonormal, of the space that the rows span, shape (N, min(M, N)).
        along: orthonormal, of what A maps to zero, shape (N, K); None unless wanted.
        independence: the least singular value of A in the free variables, after scaling its rows to length 1; 0 if
            there are more rows than variables.
        relation: weights of the rows, of length 1, with which their sum is as long as ``independence``; scaled rows.
        sizes: lengths of the rows in the free variables; 1 where they are zero.
    """

    def __init__(self, rows: Tensor, free: Tensor, *, has_null_basis: bool) -> None:
        self.rows = rows
        inner = rows[:, free]
        sizes = torch.linalg.vector_norm(inner, dim=1)
        self.sizes = torch.where(sizes > 0, sizes, 1.0)
        mode = "complete" if has_null_basis else "reduced"
        orthonormal, triangle = torch.linalg.qr((inner / self.sizes[:, None]).T, mode=mode)
        rank = min(inner.shape)
        self.triangle = triangle[:rank]
        whole = rows.new_zeros(rows.shape[1], orthonormal.shape[1])
        whole[free] = orthonormal
        self.basis = whole[:, :rank]
        self.along = whole[:, rank:] if has_null_basis else None
        left, singular, _ = torch.linalg.svd(self.triangle.T, full_matrices=True)
        self.independence, self.relation = 1.0, rows.new_zeros(0)
        if len(rows):
            self.independence = float(singular[-1]) if rank == len(rows) else 0.0
            self.relation = left[:, -1]

    def are_independent(self, eps: float) -> bool:
        """Whether the rows are linearly independent by more than rounding."""
        return self.independence > ROUNDING * math.sqrt(len(self.rows)) * eps

    def across(self, values: Tensor) -> Tensor:
        """The shortest w with A w = ``values``."""
        inner: Tensor = torch.linalg.solve_triangular(self.triangle.T, (values / self.sizes)[:, None], upper=False)
        return self.basis @ inner[:, 0]

    def dual(self, vector: Tensor) -> Tensor:
        """u with A'u nearest to ``vector`` in the free variables."""
        inner: Tensor = torch.linalg.solve_triangular(self.triangle, (self.basis.T @ vector)[:, None], upper=True)
        return inner[:, 0] / self.sizes

    def project(self, vector: Tensor, free: Tensor) -> Tensor:
        """The part of ``vector`` that A maps to zero, and that is zero where variables are held.

        If nothing but rounding is left, the result is zero.
        """
        inner = torch.where(free, vector, 0.0)
        rest = inner - self.basis @ (self.basis.T @ inner)
        rest = rest - self.basis @ (self.basis.T @ rest)  # what the first time has left to rounding
        rounding = ROUNDING * torch.finfo(vector.dtype).eps * inner.norm()
        return torch.where(rest.norm() > rounding, rest, 0.0)

    def solve(
        self, multiply: Callable[[Tensor], Tensor], solve_along: Callable[[Tensor], Tensor], v: Tensor, r: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """w and u.

        Args:
            multiply: w -> H w.
            solve_along: maps a vector g to s with A s = 0 and s'(H s - g) = 0 for all such s.
            v, r: right-hand sides; None for zeros.
        """
        if r is None:
            w = solve_along(v)
        else:
            first = self.across(r)
            w = first + solve_along(v - multiply(first))
        return w, self.dual(v - multiply(w))


class ReducedHessian:
    """A Hessian on a subspace, factorized.

    Args:
        parts: matrices whose sum is the Hessian, (N, N) each; they tell its rounding error where they cancel.
        along: an orthonormal basis of the subspace, (N, K).
        eps: relative rounding error of the parts.
    Attributes:
        is_finite: whether all entries are.
        is_definite: whether it is positive definite by more than rounding, in units in which the parts are of size 1.
        least: its least eigenvalue, for messages.
    """

    def __init__(self, parts: list[Tensor], along: Tensor, eps: float) -> None:
        self.along, n = along, along.shape[1]
        reduced = along.T @ torch.stack(parts).sum(0) @ along
        self.is_finite = self.is_definite = bool(reduced.isfinite().all())
        self.factor, self.least = torch.eye(n).to(along), math.inf
        if not self.is_finite or n == 0:
            return
        # The diagonal, had nothing cancelled: what is small against it is rounding.
        sizes = torch.stack([part.abs() for part in parts]).sum(0)
        bound = (along.abs() * (sizes @ along.abs())).sum(0)
        roots = torch.where(bound > 0, bound, 1.0).sqrt()
        self.least = float(torch.linalg.eigvalsh(reduced)[0])
        least = float(torch.linalg.eigvalsh(reduced / roots / roots[:, None])[0])
        factor, info = torch.linalg.cholesky_ex(reduced)
        self.is_definite = least > ROUNDING * math.sqrt(n) * eps and int(info) == 0
        if self.is_definite:
            self.factor = factor

    def relative(self, change: Tensor) -> float:
        """The largest change of a curvature, relative to it, by adding a matrix, (N, N), to the Hessian."""
        if not self.along.shape[1]:
            return 0.0
        half = torch.linalg.solve_triangular(self.factor, self.along.T @ change @ self.along, upper=False)
        return float(torch.linalg.matrix_norm(torch.linalg.solve_triangular(self.factor, half.T, upper=False), 2))

    def solve(self, vector: Tensor) -> Tensor:
        """s in the subspace such that H s and ``vector`` are the same there."""
        return self.along @ solve_by_factor(self.factor, self.along.T @ vector)
