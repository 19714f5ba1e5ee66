"""Newton's step on the conditions of Karush, Kuhn and Tucker, dense, for a guess of the active constraints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RANK = 1e-10  # singular values below it, relative to the largest, count as zero
FLAT = 1e-10  # eigenvalues of the reduced Hessian below it, relative to its largest entry, count as zero


class KKTStep(NamedTuple):
    """A step to where the linearized conditions hold.

    Attributes:
        step: of the variables.
        multipliers: at its end, zero for inactive constraints.
        is_minimum: whether the Hessian is not negative along the active constraints.
    """

    step: Tensor
    multipliers: Tensor
    is_minimum: bool


def kkt_step(
    hessian: Tensor,
    jacobian: Tensor,
    grad: Tensor,
    c: Tensor,
    active: Tensor,
    free: Tensor,
    held: Tensor | None = None,
) -> KKTStep:
    """Solve Hs - A'm = -g and As = -c for the free variables and the active constraints.

    By a basis of the null space of A from its singular values, so that dependent constraints do no harm: they get the
    shortest multipliers. Negative curvature along the constraints is reversed, so that the step leads downhill.

    Args:
        hessian: of the Lagrangian, shape (N, N).
        jacobian: of all constraints, shape (M, N).
        grad: of the function, shape (N,).
        c: values of the constraints, shape (M,).
        active: which constraints are to be zero, shape (M,).
        free: which variables may move, shape (N,).
        held: step of the others, shape (N,); None for zero.
    Source: Nocedal & Wright 2006, section 16.2, the null-space method.
    """
    whole = torch.zeros_like(grad)
    if held is not None:
        whole = torch.where(free, 0.0, held)
        grad, c = grad + hessian @ whole, c + jacobian @ whole
    rows = jacobian[active][:, free]
    left, sizes, right = torch.linalg.svd(rows, full_matrices=True)
    rank = int((sizes > RANK * sizes[:1]).sum())
    inverse = 1 / sizes[:rank]
    across, along = right[:rank].T, right[rank:].T
    inner = hessian[free][:, free]
    step = -across @ (inverse * (left[:, :rank].T @ c[active]))
    curvatures, axes = torch.linalg.eigh(along.T @ inner @ along)
    size = float(inner.abs().amax()) if inner.numel() else 0.0
    floor = FLAT * size
    bent = curvatures.abs() > floor
    slopes = axes.T @ (along.T @ (grad[free] + inner @ step))
    moves = torch.where(bent, -slopes / torch.where(bent, curvatures.abs(), 1.0), 0.0)
    step = step + along @ (axes @ moves)
    dual = left[:, :rank] @ (inverse * (across.T @ (grad[free] + inner @ step)))
    multipliers = torch.zeros_like(c)
    whole[free], multipliers[active] = step, dual
    return KKTStep(whole, multipliers, bool((curvatures >= -1e-6 * max(size, 1e-300)).all()))
