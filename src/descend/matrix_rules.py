"""The mathematics of methods that look at whole matrices, in order of complexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from descend.core.signature import of_matrices
from descend.ops import maximum, sqrt

Shape: TypeAlias = tuple[int, ...]


# Adafactor.


@of_matrices
def adafactor(param, grad, row_var, col_var, lr, gain, step_size, weight_decay, eps1, eps2, clip):
    """Adafactor: Shazeer & Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235, in PyTorch's variant.

    Of the squared gradients of each matrix (the last two dimensions) only the means of rows and columns are kept.
    ``step_size`` is relative to the root mean square of the parameter, but not below ``eps2`` of it; steps longer than
    ``clip`` times that are shortened. As in PyTorch, weight_decay is multiplied by lr, and ``eps1`` bounds the
    denominators from below instead of being added to the squares.
    """
    row_var = (1 - gain) * row_var + gain * _mean_square(grad, -1)
    col_var = (1 - gain) * col_var + gain * _mean_square(grad, -2)
    variance = row_var @ col_var / maximum(row_var.mean(-2, keepdim=True), eps1)
    return _relative_step(param, grad, variance, lr, step_size, weight_decay, eps1, eps2, clip), row_var, col_var


@of_matrices
def adafactor_vector(param, grad, variance, lr, gain, step_size, weight_decay, eps1, eps2, clip):
    """Adafactor for vectors and single numbers: the squared gradients are kept as they are."""
    variance = (1 - gain) * variance + gain * grad * grad
    return _relative_step(param, grad, variance, lr, step_size, weight_decay, eps1, eps2, clip), variance


def _relative_step(
    param: Tensor,
    grad: Tensor,
    variance: Tensor,
    lr: float,
    step_size: float,
    weight_decay: float,
    eps1: float,
    eps2: float,
    clip: float,
) -> Any:
    update = grad / sqrt(maximum(variance, eps1 * eps1))
    length = maximum(_root_mean_square(param), eps2) * step_size / maximum(_root_mean_square(update) / clip, 1.0)
    return (1 - lr * weight_decay) * param - length * update


def _mean_square(values: Tensor, dim: int) -> Any:
    return torch.linalg.vector_norm(values, dim=dim, keepdim=True).square() / max(values.shape[dim], 1)


def _root_mean_square(values: Tensor, chunk: int = 4096) -> Tensor:
    """Of all elements. Summed chunk by chunk: the bits do not depend on the number of threads."""
    flat = values.reshape(-1)
    squares = flat * flat
    while squares.numel() > chunk:
        whole = squares.numel() // chunk * chunk
        rest = squares[whole:].sum(dtype=torch.float64)
        squares = torch.cat((squares[:whole].view(-1, chunk).sum(-1, dtype=torch.float64), rest[None]))
    return (squares.sum(dtype=torch.float64) / max(flat.numel(), 1)).sqrt().to(values.dtype)


# SOAP.

PANEL = 256  # rows of a factor that one product updates


@cache
def soap(max_precond_dim: int = 10000, precondition_1d: bool = False, flatten: bool = False) -> Callable[..., Any]:
    """The rule of SOAP with these options, which ``preconditioned`` explains. The same object for equal options."""

    @of_matrices
    def soap(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        factors,
        bases,
        lr,
        gain1,
        gain2,
        factor_gain,
        eps,
        weight_decay,
        bias1,
        bias2,
        starts,
        turns,
    ):
        """SOAP: Vyas et al. 2024, Algorithm 3, https://arxiv.org/abs/2409.11321, in the order of its authors' code.

        Adam in the eigenbases of Shampoo's factors. ``factors`` holds, for each preconditioned dimension, the average
        of the gradient's Gram matrix, see ``_panels``; ``bases`` holds its eigenvectors, one basis after the other.
        The moments are stored in these bases. In a parameter's first step (``starts``) only factors and bases begin.
        After a step that ``turns``, each basis takes a step of power iteration, and the moments follow it.
        """
        shape, dims = preconditioned(param.shape, max_precond_dim, precondition_1d, flatten)
        grad = grad.reshape(shape)
        factors = _with_gram(factors, grad, dims, factor_gain)
        if starts:
            return param, exp_avg, exp_avg_sq, factors, _eigenvectors(factors, shape, dims)
        old = _split(bases, shape, dims)
        grad = _rotated(grad, old)
        # Written in place to what has just been made: memory is what these operations wait for.
        exp_avg = ((1 - gain1) * exp_avg.reshape(shape)).add_(grad, alpha=gain1)
        exp_avg_sq = ((1 - gain2) * exp_avg_sq.reshape(shape)).addcmul_(grad, grad, value=gain2)
        denom = exp_avg_sq.sqrt().add_(eps)
        update = _rotated_back(torch.div(exp_avg, denom, out=denom), old).reshape(param.shape)
        shrinkage = 1 - lr * weight_decay
        param = (shrinkage * param).sub_(update, alpha=shrinkage * lr * bias2**0.5 / bias1)
        if turns:
            exp_avg = _rotated_back(exp_avg, old)
            exp_avg_sq, bases = _turned(exp_avg_sq, factors, old)
            exp_avg = _rotated(exp_avg, _split(bases, shape, dims))
        return param, exp_avg.reshape(param.shape), exp_avg_sq.reshape(param.shape), factors, bases

    return soap


def preconditioned(
    shape: Sequence[int], max_precond_dim: int, precondition_1d: bool, flatten: bool
) -> tuple[Shape, tuple[int, ...]]:
    """The shape as SOAP sees it, and those of its dimensions that have a factor and a basis.

    Args:
        shape: of the parameter.
        max_precond_dim: longer dimensions keep the identity, as do those of length 1.
        precondition_1d: whether vectors have a factor.
        flatten: whether all dimensions after the first count as one: a convolution is a matrix of outputs x rest.
    """
    shape = tuple(shape)
    if flatten and len(shape) > 2:
        shape = (shape[0], math.prod(shape[1:]))
    if 0 in shape or (len(shape) == 1 and not precondition_1d):
        return shape, ()
    return shape, tuple(dim for dim, size in enumerate(shape) if 1 < size <= max_precond_dim)


def factors_size(shape: Sequence[int], dims: Sequence[int]) -> int:
    """How many numbers ``factors`` holds for the dimensions ``dims`` of a shape."""
    return sum((stop - start) * (shape[dim] - start) for dim in dims for start, stop in _panels(shape[dim]))


def bases_size(shape: Sequence[int], dims: Sequence[int]) -> int:
    """How many numbers ``bases`` holds for the dimensions ``dims`` of a shape."""
    return sum(shape[dim] ** 2 for dim in dims)


def _panels(size: int) -> Iterator[tuple[int, int]]:
    """The rows of each panel of a factor. A factor is symmetric: a panel starts at the diagonal, at column ``start``.

    So half of a large factor is neither stored nor computed. The panels lie one after the other.
    """
    return ((start, min(start + PANEL, size)) for start in range(0, size, PANEL))


def _split_factors(factors: Tensor, shape: Shape, dims: tuple[int, ...]) -> Iterator[tuple[int, int, int, Tensor]]:
    """Dimension, first and last row, and view of each panel."""
    offset = 0
    for dim in dims:
        size = shape[dim]
        for start, stop in _panels(size):
            count = (stop - start) * (size - start)
            yield dim, start, stop, factors[offset : offset + count].view(stop - start, size - start)
            offset += count


def _with_gram(factors: Tensor, grad: Tensor, dims: tuple[int, ...], gain: float) -> Tensor:
    """The factors after the gradient's Gram matrix of each dimension has been averaged in."""
    averaged = torch.empty_like(factors)
    rows: dict[int, Tensor] = {dim: grad.movedim(dim, 0).reshape(grad.shape[dim], -1) for dim in dims}
    old = _split_factors(factors, tuple(grad.shape), dims)
    new = _split_factors(averaged, tuple(grad.shape), dims)
    for (dim, start, stop, panel), (*_, out) in zip(old, new, strict=True):
        these, those = rows[dim][start:stop], rows[dim][start:]
        torch.addmm(panel, these, those.mT, beta=1 - gain, alpha=gain, out=out)
    return averaged


def _whole_factors(factors: Tensor, shape: Shape, dims: tuple[int, ...]) -> dict[int, Tensor]:
    """Each dimension's factor as a symmetric matrix."""
    whole = {dim: factors.new_empty(shape[dim], shape[dim]) for dim in dims}
    for dim, start, stop, panel in _split_factors(factors, shape, dims):
        whole[dim][start:stop, start:] = panel
        whole[dim][stop:, start:stop] = panel[:, stop - start :].mT
    return whole


def _split(bases: Tensor, shape: Shape, dims: tuple[int, ...]) -> dict[int, Tensor]:
    """Each dimension's basis, a view: eigenvectors are columns."""
    sizes = [shape[dim] for dim in dims]
    parts = torch.split(bases, [size * size for size in sizes]) if dims else ()
    return {dim: part.view(size, size) for dim, size, part in zip(dims, sizes, parts, strict=True)}


def _rotated(values: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """The coordinates of ``values`` in the bases of its dimensions."""
    for dim, basis in bases.items():
        is_last = dim == values.dim() - 1
        values = values @ basis if is_last else (basis.mT @ values.flatten(dim + 1)).view(values.shape)
    return values


def _rotated_back(values: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """What has the coordinates ``values`` in the bases of its dimensions."""
    return _rotated(values, {dim: basis.mT for dim, basis in bases.items()})


def _eigenvectors(factors: Tensor, shape: Shape, dims: tuple[int, ...]) -> Tensor:
    """The bases of new factors, the largest eigenvalues first."""
    bases = [_finite_or_nan(factor, _eigh).flip(1) for factor in _whole_factors(factors, shape, dims).values()]
    return torch.cat([basis.reshape(-1) for basis in bases]) if dims else factors.clone()


def _turned(exp_avg_sq: Tensor, factors: Tensor, bases: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The bases after a step of power iteration, sorted by falling eigenvalues, and the squares in the same order."""
    turned = []
    for dim, factor in _whole_factors(factors, tuple(exp_avg_sq.shape), tuple(bases)).items():
        product = factor @ bases[dim]
        order = (bases[dim] * product).sum(0).argsort(descending=True, stable=True)
        exp_avg_sq = exp_avg_sq.index_select(dim, order)
        turned.append(_finite_or_nan(product.index_select(1, order), _orthogonal).reshape(-1))
    return exp_avg_sq, torch.cat(turned) if turned else factors.clone()


def _finite_or_nan(matrix: Tensor, decomposition: Callable[[Tensor], Tensor]) -> Tensor:
    """The result of a decomposition; NaN for a matrix that is not finite, for which LAPACK may raise."""
    return decomposition(matrix) if matrix.isfinite().all() else torch.full_like(matrix, torch.nan)


def _eigh(matrix: Tensor) -> Any:
    """Eigenvectors; where LAPACK does not converge even in float64, the identity, which power iteration will turn."""
    for dtype in (matrix.dtype, torch.float64):
        with suppress(RuntimeError):
            return torch.linalg.eigh(matrix.to(dtype)).eigenvectors.to(matrix.dtype)
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _orthogonal(matrix: Tensor) -> Any:
    return torch.linalg.qr(matrix).Q
