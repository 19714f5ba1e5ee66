"""The mathematics of methods that see whole matrices, in order of complexity.

``muon``, ``normuon`` and ``soap`` make rules; ``adafactor`` is one. As in ``descend.rules``, a rule takes a parameter,
its gradient, its state, then numbers; it returns the new parameter and the new state, and modifies nothing. What is no
number of a step (coefficients, how often to iterate, how a tensor is cut into matrices) is given once, to the function
that makes the rule; equal options give the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from descend.newton_schulz import Form, Triple, dtype_of_products, iterated, iterations
from descend.ops import elementwise, maximum, of_matrices, sqrt

Rule: TypeAlias = Callable[..., Any]
Shape: TypeAlias = tuple[int, ...]
Adjustment: TypeAlias = Literal["original", "match_rms_adamw", "spectral_unclamped"]

# How a tensor is cut into matrices.


def as_matrices(tensor: Tensor, leading: int) -> Tensor:
    """Shape (..., m, n): the ``leading`` dimensions are a batch, the next one has the rows, the others the columns."""
    if tensor.dim() < leading + 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no matrices after {leading} dimensions.")
    return tensor.flatten(leading + 1)


def rows_of_pieces(rows: int, split: int | tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of rows of the pieces that a matrix is cut into.

    Args:
        rows: of the matrix.
        split: number of equal pieces; or the rows of each.
    Raises:
        ValueError: if they are not those of the matrix.
    """
    if isinstance(split, int):
        if split < 1 or rows % split:
            raise ValueError(f"{rows} rows cannot be cut into {split} equal pieces.")
        return (rows // split,) * split
    if sum(split) != rows or any(piece < 1 for piece in split):
        raise ValueError(f"{rows} rows cannot be cut into pieces of {split} rows.")
    return tuple(split)


def lr_ratio(rows: int, columns: int, adjust_lr_fn: Adjustment = "original") -> float:
    """What the learning rate of a matrix is multiplied by, so that it suits matrices of any shape.

    Args:
        rows, columns: of the matrix.
        adjust_lr_fn: ``"original"``, Jordan's: sqrt(max(1, rows / columns)); ``"match_rms_adamw"``: 0.2
            sqrt(max(rows, columns)), so that updates are as large as AdamW's, Liu et al. 2025,
            https://arxiv.org/abs/2502.16982; ``"spectral_unclamped"``: sqrt(rows / columns), Bernstein 2025,
            https://jeremybernste.in/writing/deriving-muon.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if adjust_lr_fn == "spectral_unclamped" else max(1, ratio))


# Muon.


def _averaged(momentum_buffer, grad, momentum, gain, nesterov):
    """The average of the gradients, and the direction that it gives."""
    momentum_buffer = momentum * momentum_buffer + gain * grad
    return momentum_buffer, momentum * momentum_buffer + gain * grad if nesterov else momentum_buffer


def _orthogonal(
    matrix: Tensor,
    triples: Sequence[Triple],
    eps: Any,
    form: Form,
    dtype: torch.dtype | None,
    adjust_lr_fn: Adjustment | None = None,
) -> Tensor:
    """The orthogonalized matrix, times the ratio of the learning rate if that is asked for."""
    result = iterated(matrix, triples, eps, form, dtype or dtype_of_products(matrix))
    ratio = 1.0 if adjust_lr_fn is None else lr_ratio(matrix.size(-2), matrix.size(-1), adjust_lr_fn)
    return result if ratio == 1 else result * ratio


def _balanced(matrix, squares, norm_eps, adjust_lr_fn):
    """Rows divided by their root mean squares; the whole has the norm of before, times the ratio of the lr."""
    rows = matrix / (sqrt(squares) + norm_eps)
    norm, norm_of_rows = (torch.linalg.matrix_norm(each, keepdim=True) for each in (matrix, rows))
    return rows * (lr_ratio(matrix.size(-2), matrix.size(-1), adjust_lr_fn) * norm / (norm_of_rows + norm_eps))


def _moved(param, update, lr, weight_decay):
    """A step with decoupled weight decay."""
    return (1 - lr * weight_decay) * param - lr * update.to(param.dtype)


@cache
def muon(
    nesterov: bool = True,
    adjust_lr_fn: Adjustment = "original",
    coefficients: str | tuple[float, ...] | tuple[Triple, ...] = "jordan",
    steps: int | None = None,
    split: int | tuple[int, ...] = 1,
    leading: int = 0,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> Rule:
    """Muon: Jordan 2024, https://kellerjordan.github.io/posts/muon/; weight decay is decoupled, as in PyTorch.

    Args:
        nesterov: look ahead: orthogonalize the average of the momentum buffer and the gradient.
        adjust_lr_fn: see ``lr_ratio``.
        coefficients, steps, form: see ``orthogonalize``.
        split: each matrix is cut along its rows into so many equal pieces, or into pieces of so many rows, each
            orthogonalized by itself: query, key and value, or heads.
        leading: so many leading dimensions are a batch of matrices. All dimensions after the rows are columns.
        dtype: of the products. Default: see ``dtype_of_products``.
    Returns:
        ``rule(param, grad, momentum_buffer, lr, weight_decay, momentum, gain, eps)``; gain is 1 - momentum.
    """
    triples = iterations(coefficients, steps)

    def stacked() -> Rule:
        return muon(nesterov, adjust_lr_fn, coefficients, steps, split, leading + 1, form, dtype)

    def rule(param, grad, momentum_buffer, lr, weight_decay, momentum, gain, eps):
        momentum_buffer, direction = elementwise(_averaged, momentum_buffer, grad, momentum, gain, nesterov, replaces=1)
        orthogonal = partial(_orthogonal, triples=triples, eps=eps, form=form, dtype=dtype, adjust_lr_fn=adjust_lr_fn)
        update = _by_pieces(orthogonal, as_matrices(direction, leading), split).reshape(param.shape)
        return elementwise(_moved, param, update, lr, weight_decay, replaces=1), momentum_buffer

    return of_matrices(rule, state=1, stacked=stacked, overwrites=True)


@cache
def normuon(
    nesterov: bool = True,
    adjust_lr_fn: Adjustment = "original",
    coefficients: str | tuple[float, ...] | tuple[Triple, ...] = "jordan",
    steps: int | None = None,
    split: int | tuple[int, ...] = 1,
    leading: int = 0,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> Rule:
    """NorMuon: Li et al. 2025, https://arxiv.org/abs/2510.05491, in the form of the authors' implementation.

    Each row of the orthogonal matrix is divided by the root of its running mean square; then the matrix gets the norm
    back that it had. (Algorithm 1 of the paper gives it the norm 0.2 sqrt(m n) instead, which is nearly the same as
    ``"match_rms_adamw"`` here.)

    Args:
        nesterov, adjust_lr_fn, coefficients, steps, split, leading, form, dtype: see ``muon``.
    Returns:
        ``rule(param, grad, momentum_buffer, second_momentum_buffer, lr, weight_decay, momentum, gain, gain2, eps,
        norm_eps)``; gain is 1 - momentum, gain2 is 1 - beta2. ``second_momentum_buffer`` has one number a row: the
        parameter's shape with 1 for each dimension of columns.
    """
    triples = iterations(coefficients, steps)

    def stacked() -> Rule:
        return normuon(nesterov, adjust_lr_fn, coefficients, steps, split, leading + 1, form, dtype)

    def rule(
        param,
        grad,
        momentum_buffer,
        second_momentum_buffer,
        lr,
        weight_decay,
        momentum,
        gain,
        gain2,
        eps,
        norm_eps,
    ):
        momentum_buffer, direction = elementwise(_averaged, momentum_buffer, grad, momentum, gain, nesterov, replaces=1)
        orthogonal = partial(_orthogonal, triples=triples, eps=eps, form=form, dtype=dtype)
        update = _by_pieces(orthogonal, as_matrices(direction, leading), split).to(param.dtype)
        squares = as_matrices(second_momentum_buffer, leading)
        squares = (1 - gain2) * squares + gain2 * (update * update).mean(-1, keepdim=True)
        balanced = partial(_balanced, norm_eps=norm_eps, adjust_lr_fn=adjust_lr_fn)
        update = _by_pieces(balanced, update, split, squares).reshape(param.shape)
        param = elementwise(_moved, param, update, lr, weight_decay, replaces=1)
        return param, momentum_buffer, squares.reshape(second_momentum_buffer.shape)

    return of_matrices(rule, state=2, stacked=stacked, overwrites=True)


def _by_pieces(
    function: Callable[..., Tensor], matrices: Tensor, split: int | tuple[int, ...], *others: Tensor
) -> Tensor:
    """A function of matrices, applied to pieces of rows; equal pieces together."""
    if not matrices.numel():
        return matrices
    pieces = rows_of_pieces(matrices.size(-2), split)
    if len(pieces) == 1:
        return function(matrices, *others)
    if len({*pieces}) == 1:
        cut = [torch.unflatten(tensor, -2, (len(pieces), pieces[0])) for tensor in (matrices, *others)]
        return function(*cut).flatten(-3, -2)
    cut_unequally = [torch.split(tensor, list(pieces), -2) for tensor in (matrices, *others)]
    return torch.cat([function(*piece) for piece in zip(*cut_unequally, strict=True)], -2)


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

BLOCK = 128  # largest part of a factor that is computed as if it were not symmetric; files depend on it


@cache
def soap(max_precond_dim: int = 10000, precondition_1d: bool = False, flatten: bool = False) -> Rule:
    """SOAP: Vyas et al. 2024, Algorithm 3, https://arxiv.org/abs/2409.11321, in the order of its authors' code.

    Adam in the eigenbases of Shampoo's factors. ``factors`` holds, for each preconditioned dimension, the average of
    the gradient's Gram matrix, see ``_blocks``; ``bases`` holds its eigenvectors, one basis after the other. The
    moments are stored in these bases. In a parameter's first step (``starts``) only factors and bases begin. After a
    step that ``turns``, each basis takes a step of power iteration, and the moments follow it.

    Args:
        max_precond_dim, precondition_1d, flatten: see ``preconditioned``.
    Returns:
        ``rule(param, grad, exp_avg, exp_avg_sq, factors, bases, lr, gain1, gain2, factor_gain, eps, weight_decay,
        bias1, bias2, starts, turns)``; factor_gain is 1 - shampoo_beta.
    """

    def rule(
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
        shape, dims = preconditioned(param.shape, max_precond_dim, precondition_1d, flatten)
        grad = grad.reshape(shape)
        factors = _with_gram(factors, grad, dims, factor_gain)
        if starts:
            return param, exp_avg, exp_avg_sq, factors, _eigenvectors(factors, shape, dims) if dims else bases
        old = _split(bases, shape, dims)
        flat = exp_avg if exp_avg.shape == shape else exp_avg.reshape(shape)
        flat_sq = exp_avg_sq if exp_avg_sq.shape == shape else exp_avg_sq.reshape(shape)
        averages = elementwise(_adam, flat, flat_sq, _rotated(grad, old), gain1, gain2, eps, replaces=2)
        exp_avg, exp_avg_sq, direction = averages
        update = _rotated_back(direction, old).reshape(param.shape)
        param = elementwise(_shrunk, param, update, lr * bias2**0.5 / bias1, 1 - lr * weight_decay, replaces=1)
        if turns and dims:
            exp_avg = _rotated_back(exp_avg, old)
            exp_avg_sq, bases = _turned(exp_avg_sq, factors, old)
            exp_avg = _rotated(exp_avg, _split(bases, shape, dims))
        if exp_avg.shape != param.shape:
            exp_avg, exp_avg_sq = exp_avg.reshape(param.shape), exp_avg_sq.reshape(param.shape)
        return param, exp_avg, exp_avg_sq, factors, bases

    return of_matrices(rule, state=4, overwrites=True)


def _adam(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, gain1: float, gain2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The averages, and the direction of a step before bias correction."""
    exp_avg = (1 - gain1) * exp_avg + gain1 * grad
    exp_avg_sq = (1 - gain2) * exp_avg_sq + gain2 * grad * grad
    return exp_avg, exp_avg_sq, exp_avg / (sqrt(exp_avg_sq) + eps)


def _shrunk(param: Tensor, update: Tensor, step_size: float, shrinkage: float) -> Tensor:
    """The parameter after a step, then decayed: in the authors' code decay comes last."""
    return shrinkage * (param - step_size * update)


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
    return sum(len(rows) * len(columns) for dim in dims for rows, columns in _blocks(range(shape[dim])))


def bases_size(shape: Sequence[int], dims: Sequence[int]) -> int:
    """How many numbers ``bases`` holds for the dimensions ``dims`` of a shape."""
    return sum(shape[dim] ** 2 for dim in dims)


def _blocks(rows: range) -> Iterator[tuple[range, range]]:
    """Rows and columns of the blocks of a symmetric matrix that are stored, one after the other.

    Of the two blocks beside the diagonal only the upper one; those on the diagonal are cut again. So nearly half of a
    large factor is neither stored nor computed, and the products are as large as can be.
    """
    if len(rows) <= BLOCK:
        yield rows, rows
        return
    upper, lower = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    yield upper, lower
    yield from _blocks(upper)
    yield from _blocks(lower)


def _split_factors(factors: Tensor, shape: Shape, dims: tuple[int, ...]) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Dimension, rows, columns and view of each block."""
    offset = 0
    for dim in dims:
        for rows, columns in _blocks(range(shape[dim])):
            block = factors[offset : offset + len(rows) * len(columns)].view(len(rows), len(columns))
            yield dim, slice(rows.start, rows.stop), slice(columns.start, columns.stop), block
            offset += block.numel()


def _with_gram(factors: Tensor, grad: Tensor, dims: tuple[int, ...], gain: float) -> Tensor:
    """The factors after the gradient's Gram matrix of each dimension has been averaged in."""
    averaged = torch.empty_like(factors)
    vectors: dict[int, Tensor] = {dim: grad.movedim(dim, 0).reshape(grad.shape[dim], -1) for dim in dims}
    old = _split_factors(factors, tuple(grad.shape), dims)
    new = _split_factors(averaged, tuple(grad.shape), dims)
    for (dim, rows, columns, block), (*_, out) in zip(old, new, strict=True):
        torch.addmm(block, vectors[dim][rows], vectors[dim][columns].mT, beta=1 - gain, alpha=gain, out=out)
    return averaged


def _whole_factors(factors: Tensor, shape: Shape, dims: tuple[int, ...]) -> dict[int, Tensor]:
    """Each dimension's factor as a symmetric matrix."""
    whole = {dim: factors.new_empty(shape[dim], shape[dim]) for dim in dims}
    for dim, rows, columns, block in _split_factors(factors, shape, dims):
        whole[dim][rows, columns] = block
        if rows != columns:
            whole[dim][columns, rows] = block.mT
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
    return torch.cat([basis.reshape(-1) for basis in bases])


def _turned(exp_avg_sq: Tensor, factors: Tensor, bases: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The bases after a step of power iteration, sorted by falling eigenvalues, and the squares in the same order."""
    turned = []
    for dim, factor in _whole_factors(factors, tuple(exp_avg_sq.shape), tuple(bases)).items():
        product = factor @ bases[dim]
        order = (bases[dim] * product).sum(0).argsort(descending=True, stable=True)
        exp_avg_sq = exp_avg_sq.index_select(dim, order)
        turned.append(_finite_or_nan(product.index_select(1, order), _orthonormal).reshape(-1))
    return exp_avg_sq, torch.cat(turned)


def _finite_or_nan(matrix: Tensor, decomposition: Callable[[Tensor], Tensor]) -> Tensor:
    """The result of a decomposition; NaN for a matrix that is not finite, for which LAPACK may raise."""
    return decomposition(matrix) if matrix.isfinite().all() else torch.full_like(matrix, torch.nan)


def _eigh(matrix: Tensor) -> Any:
    """Eigenvectors; where LAPACK does not converge even in float64, the identity, which power iteration will turn."""
    for dtype in (matrix.dtype, torch.float64):
        with suppress(RuntimeError):
            return torch.linalg.eigh(matrix.to(dtype)).eigenvectors.to(matrix.dtype)
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _orthonormal(matrix: Tensor) -> Any:
    return torch.linalg.qr(matrix).Q
