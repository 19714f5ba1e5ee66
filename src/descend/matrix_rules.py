"""The mathematics of methods that see whole matrices, in order of complexity.

``orthogonalize`` replaces the singular values of a matrix by numbers near one, with products alone. ``muon``,
``normuon`` and ``soap`` make rules; ``adafactor`` is one. As in ``descend.rules``, a rule takes a parameter, its
gradient, its state, then numbers; it returns the new parameter and the new state, and modifies nothing. What is no
number of a step (coefficients, how often to iterate, how a tensor is cut into matrices) is given once, to the function
that makes the rule; equal options give the same rule.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from descend.ops import elementwise, maximum, of_matrices, sqrt

Rule: TypeAlias = Callable[..., Any]
Level: TypeAlias = "float | Tensor"
Triple: TypeAlias = tuple[float, float, float]
Form: TypeAlias = Literal["auto", "direct", "gram"]
Shape: TypeAlias = tuple[int, ...]
Adjustment: TypeAlias = Literal["original", "match_rms_adamw", "spectral_unclamped"]

# One (a, b, c) for each iteration, which maps each singular value s to a s + b s^3 + c s^5; the last one is repeated.
# A. "jordan": Jordan 2024, https://kellerjordan.github.io/posts/muon/. Steep at zero; five iterations bring values
#    above 0.002 into [0.68, 1.21].
# B. "polar_express": Amsel et al. 2025, Algorithm 1, https://arxiv.org/abs/2505.16932: each polynomial is the best for
#    what the ones before it leave. All but the last are stretched by 1.02, so that rounding pushes no value too far.
# C. "cans": Grishina, Smirnov & Rakhuba 2025, Appendix G, https://arxiv.org/abs/2506.10935: the best cubic polynomials
#    for values in [0.0009, 1], which end in [0.7, 1.3]. Two products an iteration instead of three.
_SAFETY = 1.02
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *(
            (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            )
        ),
        (1.875, -1.25, 0.375),
    ),
    "cans": (
        (5.181702879894027, -5.177039351076183, 0.0),
        (2.585422564566848, -0.647862782007566, 0.0),
        (2.565592012027513, -0.645264570196127, 0.0),
        (2.516223347431526, -0.638782620243433, 0.0),
        (2.401068707564606, -0.623585125272674, 0.0),
        (2.170844761790119, -0.592849780534662, 0.0),
        (1.839437716819516, -0.547668362229117, 0.0),
    ),
}

# An iteration multiplies the rounding errors of a Gram matrix by a^2, as long as they are small. How far they may grow
# before the matrix is computed anew, in units of 1 / eps: less far when most of its eigenvalues are near one, for then
# its norm, and with it the errors, are the root of its size larger.
_GROWTH_AT_FIRST, _GROWTH_LATER = 1.5, 0.125
_BLOCK, _BLOCKS = 128, 4  # rows of a product that are computed at once, so that half of a symmetric one is left out


# Orthogonalization.


def iterations(coefficients: str | Sequence[float] | Sequence[Triple], steps: int | None = None) -> tuple[Triple, ...]:
    """The coefficients of each iteration.

    Args:
        coefficients: a key of ``COEFFICIENTS``, one triple, or one for each iteration; the last is repeated.
        steps: how many iterations. Default: 5, or one for each triple if there are several.
    Raises:
        ValueError: if no set has that name, or a set is empty or has something else than triples.
    Example:
        >>> iterations("jordan", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients must be one of {tuple(COEFFICIENTS)} or triples, got {coefficients!r}.")
        triples: Any = COEFFICIENTS[coefficients]
    else:
        triples = tuple(coefficients)
        triples = triples if triples and isinstance(triples[0], Sequence) else (triples,)
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError("Coefficients must be a tuple of exactly 3 values, or several of them")
    steps = steps if steps is not None else len(triples) if len(triples) > 1 else 5
    return tuple(triples[min(step, len(triples) - 1)] for step in range(steps))


def orthogonalize(
    matrix: Tensor,
    coefficients: str | Sequence[float] | Sequence[Triple] = "jordan",
    steps: int | None = None,
    eps: float | Tensor = 1e-7,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace the singular values of a matrix by numbers near one, as a polynomial of the matrix: Newton-Schulz.

    ``U diag(s) V^T`` becomes ``U diag(p(s / norm)) V^T``: ``p`` is odd, the composition of all iterations, and ``norm``
    is the Frobenius norm. Singular values far below the norm stay below one: ``"jordan"`` brings those above 0.002
    times the norm to at least 0.68.

    The result differs from that of exact arithmetic by at most 20 % of its norm in bfloat16, 0.2 % in float32, 1e-10 in
    float64. Most of it is the rounding of the matrix itself, which adds small singular values that grow. So in bfloat16
    a matrix of lower rank becomes one of full rank, whose additional singular values are at most 0.5. A matrix with NaN
    or Inf gives NaN. Nothing overflows that is finite in float32.

    Args:
        matrix: shape (..., m, n), with any strides; leading dimensions are a batch.
        coefficients: ``"jordan"``, ``"polar_express"`` or ``"cans"``; or a triple for all iterations; or one for each.
        steps: how many iterations. Default: 5, or one for each triple if there are several.
        eps: smallest number that the matrix is divided by, > 0.
        form: ``"direct"`` iterates on the matrix, ``"gram"`` on its product with its transpose, which is smaller if the
            matrix is far from square. Default: the one with fewer operations.
        dtype: of the products. Default: that of the matrix, but at least float32.
    Returns:
        Shape of ``matrix``; its dtype.
    Raises:
        ValueError: if the matrix has less than two dimensions, or ``coefficients`` or ``form`` is not one of those.
    Example:
        >>> orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "polar_express", steps=8)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.0000]])

    Source:
        Bernstein & Newhouse 2024, https://arxiv.org/abs/2409.20325; Jordan 2024,
        https://kellerjordan.github.io/posts/muon/
    """
    triples = iterations(coefficients, steps)
    if matrix.dim() < 2:
        raise ValueError(f"Input tensor must be a matrix, or a batch of matrices, got shape {tuple(matrix.shape)}.")
    if form not in ("auto", "direct", "gram"):
        raise ValueError(f"form must be 'auto', 'direct' or 'gram', got {form!r}.")
    if not matrix.numel():
        return matrix.clone()
    dtype = dtype or torch.promote_types(matrix.dtype, torch.float32)
    return _orthogonal(matrix, triples, eps, form, dtype).to(matrix.dtype)


def _orthogonal(
    matrix: Tensor,
    triples: Sequence[Triple],
    eps: Any,
    form: Form,
    dtype: torch.dtype | None,
    adjust_lr_fn: Adjustment | None = None,
) -> Tensor:
    """``orthogonalize``, in the dtype of the products, times the ratio of the learning rate if that is asked for."""
    dtype = dtype or dtype_of_products(matrix)
    x = _normalized(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), eps, dtype)
    is_tall = x.size(-2) > x.size(-1)
    wide = x.mT if is_tall else x
    x = wide.reshape(-1, *wide.shape[-2:])
    x = x[0] if len(x) == 1 else x
    m, n = x.shape[-2:]
    if form == "auto":  # as measured: small products cost calls, and those of large Gram matrices are half ones
        form = "gram" if n >= (2 if m >= _BLOCK * 4 else 2.5) * m and m > _BLOCK and len(triples) > 2 else "direct"
    result = (_iterate_gram if form == "gram" else _iterate_directly)(x, triples).reshape(wide.shape)
    result = result.mT if is_tall else result
    ratio = 1.0 if adjust_lr_fn is None else lr_ratio(matrix.size(-2), matrix.size(-1), adjust_lr_fn)
    return result if ratio == 1 else result * ratio


def _normalized(matrix: Tensor, eps: Any, dtype: torch.dtype) -> Tensor:
    """Matrices divided by their Frobenius norms, or by ``eps`` where that is larger, then rounded to ``dtype``.

    Sums go along rows, then over them, so that the bits do not depend on the number of threads. Where squares may
    overflow or vanish, the matrix is divided by its largest magnitude first.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    norm = _norm(matrix)
    if _may_be_read(matrix) and float(norm.min()) > 1e-15 and float(norm.max()) < 1e18:
        return _quotient(matrix, maximum(norm, eps), dtype)
    low, high = matrix.amin((-2, -1), keepdim=True), matrix.amax((-2, -1), keepdim=True)
    largest = maximum(maximum(high, -low), tiny)
    matrix = _quotient(matrix, largest, matrix.dtype)
    return _quotient(matrix, maximum(maximum(_norm(matrix), eps / largest), tiny), dtype)


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norms, shape (..., 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(
        torch.linalg.vector_norm(matrix, dim=-1, keepdim=True), dim=-2, keepdim=True
    )
    return norm


def _quotient(matrix: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    quotient: Tensor = elementwise(_divided, matrix, divisor, dtype)
    return quotient


def _divided(matrix: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    return (matrix / divisor).to(dtype)


def _iterate_directly(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Each iteration on the matrix itself, which may be written over."""
    for a, b, c in triples:
        gram = _symmetric(x, x.mT)
        change = _symmetric(gram, gram, gram, b, c) if c else b * gram
        x = _applied(change, a, x)
    return x


def _iterate_gram(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Iterations on the Gram matrix: Zhang, Amsel, Chen & Dao 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz.

    With G = X X^T an iteration is X <- P X, P = a I + b G + c G^2. So G <- P G P, and all P are multiplied by each
    other before they are multiplied by X. Rounding leaves negative eigenvalues in G, which grow; before they count, X
    is formed and G is computed from it again.

    Each matrix is kept as a multiple of I, called its level, and a rest whose diagonal has mean zero: sums of nearly
    opposite multiples of I would lose what a rest in bfloat16 knows.
    """
    first, limit = 0, _GROWTH_AT_FIRST / torch.finfo(x.dtype).eps
    while first < len(triples):
        last, growth = first + 1, triples[first][0] ** 2
        while last < len(triples) and growth <= limit:
            growth *= triples[last][0] ** 2
            last += 1
        x = _iterate_block(x, triples[first:last])
        first, limit = last, _GROWTH_LATER / torch.finfo(x.dtype).eps
    return x


def _iterate_block(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Iterations between two computations of G; ``x`` may be written over."""
    gram, gram_level = _leveled(_symmetric(x, x.mT))
    factor, factor_level = gram, gram_level  # replaced by the first iteration
    for position, (a, b, c) in enumerate(triples):
        slope = b + 2 * c * gram_level
        change = _symmetric(gram, gram, gram, slope, c) if c else _scaled(gram, slope)
        change, level = _leveled(change, a + gram_level * (b + c * gram_level))
        if position == 0:
            factor, factor_level = change, level
        else:
            factor, factor_level = _multiplied(factor, factor_level, change, level)
        if position < len(triples) - 1:
            half, half_level = _multiplied(gram, gram_level, change, level)
            gram, gram_level = _multiplied(half, half_level, change, level)
    return _applied(factor, factor_level, x)


def _multiplied(a: Tensor, a_level: Level, b: Tensor, b_level: Level) -> tuple[Tensor, Level]:
    """(a_level I + a) (b_level I + b), for symmetric matrices that commute."""
    return _leveled(_symmetric(a, b, a, b_level, more=b, gamma=a_level), a_level * b_level)


def _leveled(matrix: Tensor, level: Level = 0.0) -> tuple[Tensor, Level]:
    """The matrix with a diagonal of mean zero, and the level it lies above: for a batch and on devices a tensor."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=matrix.dim() > 2)  # rounded: what is taken away is what is added to the level
    diagonal.sub_(mean)
    if matrix.dim() == 2 and _may_be_read(matrix):
        return matrix, level + float(mean)
    mean = mean.to(torch.promote_types(matrix.dtype, torch.float32))
    return matrix, level + (mean if matrix.dim() == 2 else mean[..., None])


def _may_be_read(tensor: Tensor) -> bool:
    """Whether the host knows its values: they are in its memory, and nobody differentiates or traces."""
    return tensor.is_cpu and not tensor.requires_grad and not torch._C._len_torch_dispatch_stack()


def _scaled(matrix: Tensor, factor: Level) -> Tensor:
    """The matrix, or each of a batch, times a number, in the matrix's dtype."""
    return (matrix * factor).to(matrix.dtype)


# Products.


def _product(a: Tensor, b: Tensor, added: Tensor, beta: Level = 1.0, alpha: float = 1.0) -> Tensor:
    """``beta * added + alpha * a @ b``."""
    multiply = torch.addmm if a.dim() == 2 else torch.baddbmm
    if isinstance(beta, Tensor):
        added, beta = _scaled(added, beta), 1.0
    return multiply(added, a, b, beta=beta, alpha=alpha)


def _applied(factor: Tensor, level: Level, x: Tensor) -> Tensor:
    """``(level I + factor) x``, which a CPU writes over a wide ``x``: new memory would cost a tenth of it."""
    columns = 4 * _BLOCK
    if x.dim() > 2 or x.size(-1) < 2 * columns or not _may_be_read(x):
        return _product(factor, x, x, level)
    for first in range(0, x.size(-1), columns):
        part = x[:, first : first + columns]
        part.copy_(_product(factor, part, part, level))
    return x


def _symmetric(
    a: Tensor,
    b: Tensor,
    added: Tensor | None = None,
    beta: Level = 1.0,
    alpha: float = 1.0,
    more: Tensor | None = None,
    gamma: Level = 0.0,
) -> Tensor:
    """``beta * added + gamma * more + alpha * a @ b``, which is symmetric: large ones on a CPU are computed by half.

    Rows are computed in blocks, each as far as the diagonal; the rest is mirrored.
    """
    m = a.size(-2)
    blocks = min(_BLOCKS, m // _BLOCK)
    if blocks < 4 or a.dim() > 2 or not _may_be_read(a):
        result = a @ b if added is None else _product(a, b, added, beta, alpha)
        return result if more is None else result + _scaled(more, gamma)
    result = a.new_empty(m, m)
    edges = [m * block // blocks for block in range(blocks + 1)]
    for first, last in pairwise(edges):
        block = result[first:last, :last]
        if added is None:
            torch.mm(a[first:last], b[:, :last], out=block)
        else:
            torch.addmm(added[first:last, :last], a[first:last], b[:, :last], beta=beta, alpha=alpha, out=block)  # type: ignore[arg-type]
        if more is not None:
            # Not with alpha: where a thread's vectors end, torch rounds in another order.
            block.add_(_scaled(more[first:last, :last], gamma))
        result[:first, first:last] = result[first:last, :first].mT
    return result


@cache
def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def dtype_of_products(matrix: Tensor) -> torch.dtype:
    """What ``muon`` multiplies in: bfloat16 where that is faster than float32; float64 for float64."""
    if matrix.dtype == torch.float64:
        return torch.float64
    has_fast = _has_fast_bfloat16() if matrix.is_cpu else matrix.device.type == "cuda"
    return torch.bfloat16 if has_fast else torch.float32


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


# Rules.


def _averaged(momentum_buffer, grad, momentum, gain, nesterov):
    """The average of the gradients, and the direction that it gives."""
    momentum_buffer = momentum * momentum_buffer + gain * grad
    return momentum_buffer, momentum * momentum_buffer + gain * grad if nesterov else momentum_buffer


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
