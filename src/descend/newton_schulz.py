"""Orthogonalization by Newton-Schulz: the singular values of a matrix become numbers near one, with products alone."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from descend.ops import elementwise, maximum

Level: TypeAlias = "float | Tensor"
Triple: TypeAlias = tuple[float, float, float]
Form: TypeAlias = Literal["auto", "direct", "gram"]

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
    return iterated(matrix, triples, eps, form, dtype).to(matrix.dtype)


def iterated(matrix: Tensor, triples: Sequence[Triple], eps: Any, form: Form, dtype: torch.dtype) -> Tensor:
    """``orthogonalize`` with the coefficients of each iteration; the result has the dtype of the products."""
    x = _normalized(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), eps, dtype)
    is_tall = x.size(-2) > x.size(-1)
    wide = x.mT if is_tall else x
    x = wide.reshape(-1, *wide.shape[-2:])
    x = x[0] if len(x) == 1 else x
    m, n = x.shape[-2:]
    if form == "auto":  # as measured: small products cost calls, and those of large Gram matrices are half ones
        form = "gram" if n >= (2 if m >= _BLOCK * 4 else 2.5) * m and m > _BLOCK and len(triples) > 2 else "direct"
    result = (_iterate_gram if form == "gram" else _iterate_directly)(x, triples).reshape(wide.shape)
    return result.mT if is_tall else result


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
