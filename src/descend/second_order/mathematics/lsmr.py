"""Linear least squares from products with the matrix and its transpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class End(str, Enum):
    """Why the iteration ended."""

    solved = "solved"  # the residual is at most btol |b| + atol |A| |x|, or there was nothing to do
    least_squares = "least_squares"  # |A'r| is at most atol |A| |r|, or ``reduction`` of what it was at 0
    condition = "condition"  # the condition of A exceeds the limit
    max_iter = "max_iter"
    visited = "visited"  # the visitor asked to stop
    non_finite = "non_finite"  # a product holds NaN or infinity; x is the iterate before


class Lsmr(NamedTuple):
    """What ``lsmr`` returns.

    Attributes:
        x: the solution, or the last iterate.
        end: why it is the last.
        n_iter: iterations; each took one product with A and one with A', after one with A' at the start.
        residual_norm: estimate of |(b - A x, damping x)|.
        slope_norm: estimate of |A'(b - A x) - damping^2 x|.
        norm, condition: estimates of the Frobenius norm and the condition number of A with the damping.
        x_norm: |x|.
    """

    x: Tensor
    end: End
    n_iter: int
    residual_norm: float
    slope_norm: float
    norm: float
    condition: float
    x_norm: float


def lsmr(
    multiply: Product,
    multiply_transposed: Product,
    b: Tensor,
    *,
    damping: float = 0.0,
    atol: float = 1e-6,
    btol: float = 1e-6,
    reduction: float = 0.0,
    condition_limit: float = 1e8,
    max_iter: int | None = None,
    visit: Callable[[Tensor, float], bool] | None = None,
) -> Lsmr:
    """Minimize |A x - b|^2 + damping^2 |x|^2; the shortest x where there are several.

    MINRES on the normal equations A'A x = A'b, by the bidiagonalization of Golub and Kahan: |A'r| falls in each
    iteration, and so does |r|, while |x| grows. Four vectors of N numbers and two of M.

    Args:
        multiply: v -> A v; shape (N,) to (M,). It must not change v.
        multiply_transposed: u -> A'u; shape (M,) to (N,). It must not change u.
        b: shape (M,), float32 or float64.
        damping: >= 0. Default: 0.
        atol, btol: relative errors of A and b, >= 0, or the precision if that is larger; see ``End``. Default: 1e-6.
        reduction: of |A'r| that is enough, >= 0. Default: 0.
        condition_limit: of A; > 0. Default: 1e8.
        max_iter: iterations at most. Default: the larger of M and N, plus 10.
        visit: called after each iteration with x, which is overwritten later, and |x|; stops by returning True.
    Returns:
        An ``Lsmr``.
    Example:
        >>> matrix = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> lsmr(matrix.mv, matrix.T.mv, torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)).x
        tensor([1.0000, 2.0000], dtype=torch.float64)

    Source: Fong & Saunders 2011, section 2.8 (the algorithm) and 3 (the estimates), https://doi.org/10.1137/10079687X.
        Their alphas and betas are the bidiagonal, c and s rotations, theta and rho triangles.
    """
    beta = _length(b)
    u = b / beta if beta > 0 else b
    v = multiply_transposed(u)
    x = torch.zeros_like(v)
    alpha = _length(v)
    first = alpha * beta
    if not 0 < first < math.inf:
        end = End.solved if first == 0 else End.non_finite
        return Lsmr(x, end, 0, beta, first, alpha, 1.0, 0.0)
    v = v / alpha
    atol, btol = (max(tolerance, torch.finfo(b.dtype).eps) for tolerance in (atol, btol))
    most = max(len(b), len(x)) + 10 if max_iter is None else max_iter
    alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar, zeta = alpha, first, 1.0, 1.0, 1.0, 0.0, 0.0
    h, h_bar = v.clone(), torch.zeros_like(v)
    residual, spectrum = _Residual(beta), _Spectrum(alpha)
    x_norm, slope_norm, end, n_iter = 0.0, first, End.max_iter, 0
    while n_iter < most:
        # Section 2.1: the next column of the bidiagonal.
        u = torch.sub(multiply(v), u, alpha=alpha)
        beta = _length(u)
        following = None
        if beta > 0:
            u /= beta
            following = torch.sub(multiply_transposed(u), v, alpha=beta)
        alpha = 0.0 if following is None else _length(following)
        if not math.isfinite(alpha + beta):
            end = End.non_finite
            break
        n_iter += 1
        # Section 2.8: rotations that fold the damping in and make both triangles.
        c_hat, s_hat, alpha_hat = _rotation(alpha_bar, damping)
        rho_before, rho_bar_before, zeta_before = rho, rho_bar, zeta
        c, s, rho = _rotation(alpha_hat, beta)
        theta_next, alpha_bar = s * alpha, c * alpha
        theta_bar, rho_temporary = s_bar * rho, c_bar * rho
        c_bar, s_bar, rho_bar = _rotation(rho_temporary, theta_next)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        h_bar.mul_(-theta_bar * rho / (rho_before * rho_bar_before)).add_(h)
        x.add_(h_bar, alpha=zeta / (rho * rho_bar))
        x_norm, slope_norm = _length(x), abs(zeta_bar)
        residual.update(c_hat, s_hat, c, s, theta_bar, rho_bar, zeta_before, zeta)
        spectrum.update(alpha, beta, rho_bar_before, rho_temporary)
        reached = _reached(residual, spectrum, slope_norm, x_norm, atol, btol, condition_limit)
        if reached is None and slope_norm <= reduction * first:
            reached = End.least_squares
        is_stopped = visit is not None and visit(x, x_norm)
        if reached is not None or is_stopped:
            end = reached or End.visited
            break
        assert following is not None
        v = following.div_(alpha)
        h.mul_(-theta_next / rho).add_(v)
    return Lsmr(x, end, n_iter, residual.norm, slope_norm, spectrum.norm, spectrum.condition, x_norm)


def _reached(
    residual: _Residual,
    spectrum: _Spectrum,
    slope_norm: float,
    x_norm: float,
    atol: float,
    btol: float,
    condition_limit: float,
) -> End | None:
    """Which of section 3.3's rules is met, if any."""
    if residual.norm <= btol * residual.first + atol * spectrum.norm * x_norm:
        return End.solved
    if slope_norm <= atol * spectrum.norm * residual.norm:
        return End.least_squares
    return End.condition if spectrum.condition >= condition_limit else None


class _Residual:
    """The norm of the residual, by recurrence: section 3.1."""

    def __init__(self, beta: float) -> None:
        self.first = self.norm = self.beta_double = beta
        self.beta_dot = self.tau_before = self.theta_before = self.damped = 0.0
        self.rho_dot = 1.0

    def update(
        self,
        c_hat: float,
        s_hat: float,
        c: float,
        s: float,
        theta_bar: float,
        rho_bar: float,
        zeta_before: float,
        zeta: float,
    ) -> None:
        acute, check = c_hat * self.beta_double, -s_hat * self.beta_double
        hat, self.beta_double = c * acute, -s * acute
        theta = self.theta_before
        c_tilde, s_tilde, rho_tilde = _rotation(self.rho_dot, theta_bar)
        self.theta_before, self.rho_dot = s_tilde * rho_bar, c_tilde * rho_bar
        self.beta_dot = -s_tilde * self.beta_dot + c_tilde * hat
        self.tau_before = (zeta_before - theta * self.tau_before) / rho_tilde
        tau = (zeta - self.theta_before * self.tau_before) / self.rho_dot if self.rho_dot else 0.0
        self.damped = math.hypot(self.damped, check)
        self.norm = math.hypot(self.damped, self.beta_dot - tau, self.beta_double)


class _Spectrum:
    """Norm and condition of the matrix: section 3.4."""

    def __init__(self, alpha: float) -> None:
        self.norm = self._bidiagonal = alpha
        self.condition = 1.0
        self._least, self._largest = math.inf, 0.0

    def update(self, alpha: float, beta: float, rho_bar_before: float, rho_temporary: float) -> None:
        if self._largest:  # the first rho_bar is none yet
            self._least = min(self._least, rho_bar_before)
        self._largest = max(self._largest, rho_bar_before)
        least = min(self._least, rho_temporary)
        self.condition = max(self._largest, rho_temporary) / least if least > 0 else math.inf
        self.norm = math.hypot(self._bidiagonal, beta)
        self._bidiagonal = math.hypot(self.norm, alpha)


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """Cosine and sine of the rotation that makes (a, b) to (length, 0), and the length."""
    length = math.hypot(a, b)
    return (a / length, b / length, length) if length > 0 else (1.0, 0.0, 0.0)


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
