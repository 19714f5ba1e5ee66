"""The functions of ``descend.ops`` and numbers of a known dtype, as Triton compiles them.

They are plain functions. ``library`` binds those that they call, then compiles them for a GPU or for Triton's
interpreter. Arithmetic is in float32, or in float64 with ``WIDE`` behind the names.

In float32, Triton's division on CUDA is within 2 units in the last place, its ``exp`` and ``log`` within a few; the
rest is correctly rounded, products and sums fused.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from descend import ops


def number(x: Any) -> Any:
    """``x`` in the compute dtype: two literals alone would become integers or float32. Multiplying by 1 is exact."""
    return x * tl.full((), 1, tl.float32)


def wide_number(x: Any) -> Any:
    """The same for float64."""
    return x * tl.full((), 1, tl.float64)


def root(x: Any) -> Any:
    """Correctly rounded: ``tl.sqrt`` is approximate in float32, and flushes denormal numbers."""
    return tl.sqrt_rn(number(x))


def wide_root(x: Any) -> Any:
    """``tl.sqrt`` is correctly rounded in float64."""
    return tl.sqrt(wide_number(x))


def absolute(x: Any) -> Any:
    return tl.abs(number(x))


def exponential(x: Any) -> Any:
    return tl.exp(number(x))


def logarithm(x: Any) -> Any:
    return tl.log(number(x))


def sign(x: Any) -> Any:
    """0 for NaN, as on the CPU."""
    return tl.where(x > 0, number(1), tl.where(x < 0, number(-1), number(0)))


def maximum(a: Any, b: Any) -> Any:
    return tl.maximum(number(a), number(b), propagate_nan=tl.PropagateNan.ALL)


def minimum(a: Any, b: Any) -> Any:
    return tl.minimum(number(a), number(b), propagate_nan=tl.PropagateNan.ALL)


def where(condition: Any, a: Any, b: Any) -> Any:
    return tl.where(condition, number(a), number(b))


OPERATIONS: dict[Any, Any] = {
    ops.abs: absolute,
    ops.exp: exponential,
    ops.log: logarithm,
    ops.maximum: maximum,
    ops.minimum: minimum,
    ops.sign: sign,
    ops.sqrt: root,
    ops.where: where,
}
WIDE: dict[Any, Any] = {number: wide_number, root: wide_root}
