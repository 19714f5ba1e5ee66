"""Arrays of many problems: NumPy on a CPU, where an operation costs a third of torch's, and torch on a device.

The names that both libraries share are called on ``library(array)``; the few that differ are here. A number of each of
K problems is an array (K,), several are (k, K), and a vector of each is (K, n).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.second_order.mathematics.space import Array


def library(array: Array) -> Any:
    """NumPy or torch, whichever the array is of."""
    return np if isinstance(array, np.ndarray) else torch


def array_of(tensor: Tensor) -> Array:
    """A tensor as the array that solvers compute with; it shares memory."""
    return tensor.detach().numpy() if tensor.is_cpu else tensor.detach()


def tensor_of(array: Array) -> Tensor:
    """The tensor of an array; it shares memory."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def full(like: Array, shape: Any, number: float | bool) -> Array:
    """An array of one number, on the device of another; float64, int64 or bool as the number is."""
    dtype = {float: "float64", int: "int64", bool: "bool"}[type(number)]
    if isinstance(like, np.ndarray):
        return np.full(shape, number, dtype)
    return torch.full((shape,) if isinstance(shape, int) else shape, number, dtype=getattr(torch, dtype)).to(
        like.device
    )


def cast(array: Array, like: Array) -> Array:
    """An array in the dtype of another."""
    return array.astype(like.dtype, copy=False) if isinstance(array, np.ndarray) else array.to(like.dtype)


def doubles(array: Array) -> Array:
    """An array in float64."""
    return array.astype(np.float64, copy=False) if isinstance(array, np.ndarray) else array.double()


def positions(mask: Array) -> Array:
    """Where a mask (K,) is True. Waits for the device."""
    return np.flatnonzero(mask) if isinstance(mask, np.ndarray) else mask.nonzero().reshape(-1)


def take(array: Array, rows: Array, axis: int = 0) -> Array:
    """Copies of some rows, or of some columns."""
    return array.take(rows, axis) if isinstance(array, np.ndarray) else array.index_select(axis, rows)


def replaced(array: Array, new: Array, rows: Array) -> Array:
    """A copy of an array with some rows replaced."""
    copy = array.copy() if isinstance(array, np.ndarray) else array.clone()
    copy[rows] = new
    return copy


def keep(holder: Any, names: tuple[str, ...], rows: Array, axis: int = 0) -> None:
    """Keep some rows, or some columns, of the arrays that are attributes of an object."""
    arrays = vars(holder)
    if isinstance(rows, np.ndarray):
        for name in names:
            arrays[name] = arrays[name].take(rows, axis)
    else:
        for name in names:
            arrays[name] = arrays[name].index_select(axis, rows)


def identity(like: Array) -> Array:
    """The identity matrix (n, n) for vectors (K, n)."""
    if isinstance(like, np.ndarray):
        return np.eye(like.shape[1], dtype=like.dtype)
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def row_products(left: Array, right: Array) -> Array:
    """Inner products (K,) of the rows of two arrays (K, n), in float64."""
    if isinstance(left, np.ndarray):
        return np.einsum("kn,kn->k", left, right, dtype=np.float64)
    return torch.linalg.vecdot(left.double(), right.double())


def multiply(matrices: Array, vectors: Array) -> Array:
    """Products (K, m) of matrices (K, m, n) with vectors (K, n)."""
    return library(matrices).matmul(matrices, vectors[:, :, None])[:, :, 0]


def combine(vectors: Array, matrices: Array) -> Array:
    """Sums (K, n) of the rows of matrices (K, m, n), weighted by vectors (K, m)."""
    return library(matrices).matmul(vectors[:, None, :], matrices)[:, 0]


def largest_entries(vectors: Array) -> Array:
    """The largest absolute entry (K,) of each vector (K, n), in float64; NaN if an entry is, 0 if n is 0."""
    # Over a short last axis torch's reduction is three times as fast as NumPy's.
    tensor = tensor_of(vectors)
    if not tensor.shape[1]:
        return full(vectors, len(vectors), 0.0)
    return array_of(tensor.abs().amax(1).double())


def lengths(vectors: Array) -> Array:
    """2-norms (K,) of vectors (K, n), in float64, without overflow or underflow."""
    xp: Any = library(vectors)
    scale = largest_entries(vectors)
    scale = xp.where((scale > 0) & xp.isfinite(scale), scale, 1.0)
    unit = doubles(vectors) / scale[:, None]
    return scale * row_products(unit, unit) ** 0.5


def times_power(numbers: Array, exponents: Array) -> Array:
    """Numbers times two to the power of integers, exactly."""
    if isinstance(numbers, np.ndarray):
        return np.ldexp(numbers, exponents)
    half = exponents // 2
    for part in (half, exponents - half):  # each within the range of numbers
        numbers = numbers * torch.exp2(part.double()).to(numbers.dtype)
    return numbers
