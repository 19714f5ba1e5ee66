"""Loops over long vectors and the rows of two matrices, for L-BFGS. Each reads everything from memory once.

Every loop gets the address of int64 arguments, the first ones alike:

    0 length of the vectors
    1 elements of a chunk
    2 counters         of the next chunk, 64 bytes apart: one for each of the parts into which chunks are divided
    3 partial sums     float64, one row per chunk, so that their total does not depend on the threads
   17 parts            one for each thread
   18 the function that tells a thread its number, 0 if there is none; and 19 the next number then

A thread takes the chunks of its own part first, as torch's operations do: what it has written is in its own cache.

Rows, diagonals and scratch memory are float32; other vectors have the dtype that the loop is compiled for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from descend.backends.cpu.intrinsics import (
    call_address,
    fetch_add,
    load_double,
    load_int,
    load_word,
    loader,
    store_double,
    store_int,
    storer,
)
from descend.backends.cpu.kernels import assembly, njit

# The order of sums is free, so that they are vectorised; NaN and Inf stay exact.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc", "arcp"}}
_F32, _F64 = torch.float32, torch.float64
GROUP = 4  # rows that are added to a vector at once


@njit(**_OPTIONS)
def number_of_thread(call: int) -> int:
    """This thread's number, from 0 on."""
    function = load_int(call, 18)
    if function != 0:
        return call_address(function, 0, 0) & 0xFFFF
    return fetch_add(call + 152, 1)


@njit(**_OPTIONS)
def next_chunk(call: int, thread: int, count: int) -> int:
    """A chunk that nobody has taken: of this thread's part, then of the others'; -1 if there is none."""
    parts = load_int(call, 17)
    for k in range(parts):
        part = (thread + k) % parts
        chunk = part * count // parts + fetch_add(load_int(call, 2) + 64 * part, 1)
        if chunk < (part + 1) * count // parts:
            return chunk
    return -1


def keep_kernel(dtype: torch.dtype, between: bool) -> str:
    """LLVM assembly of the loop that stores a pair s, y, and sums it up in the metric of a diagonal.

    Arguments: 4 s; 5 y; 6 what is subtracted from s and 7 from y, if ``between``; 8 row of S; 9 row of Y; 10 diagonal
    D; 11 the factor of s and 12 that of y, float64; 13 a table of float64 of D, s and y at one in so many elements, 14.
    Sums: y'D y, s'D^-1 s, s'y of what has been stored.
    """
    size = dtype.itemsize
    given_dtypes = (dtype,) * (4 if between else 2)
    load = loader(given_dtypes, _F64)
    load_stored, store = loader((_F32, _F32, _F32), _F32), storer((_F32, _F32, _F32), _F32)

    def kernel(call: int) -> None:
        numel, length, sums, every = load_int(call, 0), load_int(call, 1), load_int(call, 3), load_int(call, 14)
        s_factor, y_factor = load_double(call, 11), load_double(call, 12)
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            begin = chunk * length
            n, place, row = min(length, numel - begin), size * begin, 4 * begin
            given = (
                load_int(call, 4) + place,
                load_int(call, 5) + place,
                load_int(call, 6) + place,
                load_int(call, 7) + place,
            )
            rows = (load_int(call, 8) + row, 0, load_int(call, 9) + row)
            stored = (load_int(call, 10) + row, load_int(call, 8) + row, load_int(call, 9) + row)
            for i in range(n):
                values = load(given, i)
                if between:
                    s, y = s_factor * (values[0] - values[2]), y_factor * (values[1] - values[3])
                else:
                    s, y = s_factor * values[0], y_factor * values[1]
                store(rows, i, (np.float32(s), np.float32(y)))
            y_dy, s_ds, sy = 0.0, 0.0, 0.0
            for i in range(n):
                values = load_stored(stored, i)
                d, s, y = values[0], values[1], values[2]
                y_dy += np.float64(d * y) * np.float64(y)
                s_ds += np.float64(s / d) * np.float64(s)
                sy += np.float64(s) * np.float64(y)
            store_double(sums, 3 * chunk, y_dy)
            store_double(sums, 3 * chunk + 1, s_ds)
            store_double(sums, 3 * chunk + 2, sy)
            first = (begin + every - 1) // every
            for sample in range(first, (begin + n - 1) // every + 1):
                values = load_stored(stored, sample * every - begin)
                target = load_int(call, 13) + 24 * sample
                store_double(target, 0, np.float64(values[0]))
                store_double(target, 1, np.float64(values[1]))
                store_double(target, 2, np.float64(values[2]))

    return assembly(kernel, _OPTIONS)


def learn_kernel() -> str:
    """LLVM assembly of the loop that updates a diagonal by a pair: the diagonal of the BFGS update, clipped.

    Arguments: 4 s; 5 y; 6 diagonal; then float64: 7 1 / y'D y; 8 1 / s'D^-1 s; 9 s'y / y'D y; 10 least and 11 largest
    entry.
    """
    load, store = loader((_F32, _F32, _F32), _F32), storer((_F32, _F32), _F32)
    one = np.float32(1)

    def kernel(call: int) -> None:
        numel, length = load_int(call, 0), load_int(call, 1)
        per_y_dy, per_s_ds = np.float32(load_double(call, 7)), np.float32(load_double(call, 8))
        ratio = np.float32(load_double(call, 9))
        least, most = np.float32(load_double(call, 10)), np.float32(load_double(call, 11))
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            place = 4 * chunk * length
            vectors = (load_int(call, 4) + place, load_int(call, 5) + place, load_int(call, 6) + place)
            target = (load_int(call, 6) + place, 0)
            for i in range(min(length, numel - chunk * length)):
                values = load(vectors, i)
                s, y, d = values[0], values[1], values[2]
                new = d * ratio / (d * y * y * per_y_dy - s * s / d * per_s_ds + one)
                # NaN goes through, as in torch.
                new = least if new < least else new
                store(target, i, most if new > most else new)

    return assembly(kernel, _OPTIONS)


def products_kernel(dtype: torch.dtype, with_y: bool) -> str:
    """LLVM assembly of the loop that multiplies rows by vectors.

    Arguments: 4 S; 5 Y; 6 bytes of a row; 7 number of rows; 8 diagonal D; 9 g; 10 the factor of g, float64; 11 y, a
    row; 12 scratch memory, four chunks of float32 per thread. Sums: S g of each row, then Y D g; ``with_y`` then
    S y and Y D y.
    """
    load_grad, load, store = loader((dtype,), _F64), loader((_F32,), _F32), storer((_F32, _F32), _F32)
    add_products = _products_of_group(with_y)
    size, width = dtype.itemsize, 4 if with_y else 2

    def kernel(call: int) -> None:
        numel, length, sums = load_int(call, 0), load_int(call, 1), load_int(call, 3)
        stride, n_rows, scale = load_int(call, 6), load_int(call, 7), load_double(call, 10)
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        grad = load_int(call, 12) + 16 * length * thread
        scaled_grad, y, scaled_y = grad + 4 * length, grad + 8 * length, grad + 12 * length
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            begin = chunk * length
            n, place = min(length, numel - begin), 4 * begin
            diagonal, source = (load_int(call, 8) + place,), (load_int(call, 9) + size * begin,)
            for i in range(n):
                g = np.float32(scale * load_grad(source, i)[0])
                store((grad, 0), i, g)
                store((scaled_grad, 0), i, g * load(diagonal, i)[0])
            if with_y:
                change = (load_int(call, 11) + place,)
                for i in range(n):
                    v = load(change, i)[0]
                    store((y, 0), i, v)
                    store((scaled_y, 0), i, v * load(diagonal, i)[0])
            target = sums + 8 * width * n_rows * chunk
            for first in range(0, n_rows, GROUP):
                add_products(load_int(call, 4) + place, stride, first, n_rows, grad, y, n, target)
            for first in range(0, n_rows, GROUP):
                add_products(
                    load_int(call, 5) + place, stride, first, n_rows, scaled_grad, scaled_y, n, target + 8 * n_rows
                )

    return assembly(kernel, _OPTIONS)


def _products_of_group(with_y: bool) -> Any:
    """A compiled function that stores the products of ``GROUP`` rows with one vector or two, read together.

    The last group repeats the last row, and stores the same products again.
    """
    load, load_both, zero = loader((_F32,) * (GROUP + 1), _F32), loader((_F32,) * (GROUP + 2), _F32), np.float32(0)

    def one(base: int, stride: int, first: int, n_rows: int, u: int, v: int, n: int, target: int) -> None:
        last = n_rows - 1
        i1, i2, i3 = min(first + 1, last), min(first + 2, last), min(first + 3, last)
        rows = (base + stride * first, base + stride * i1, base + stride * i2, base + stride * i3, u)
        a, b, c, d = zero, zero, zero, zero
        for i in range(n):
            values = load(rows, i)
            a += values[0] * values[4]
            b += values[1] * values[4]
            c += values[2] * values[4]
            d += values[3] * values[4]
        store_double(target, first, np.float64(a))
        store_double(target, i1, np.float64(b))
        store_double(target, i2, np.float64(c))
        store_double(target, i3, np.float64(d))

    def two(base: int, stride: int, first: int, n_rows: int, u: int, v: int, n: int, target: int) -> None:
        last = n_rows - 1
        i1, i2, i3 = min(first + 1, last), min(first + 2, last), min(first + 3, last)
        rows = (base + stride * first, base + stride * i1, base + stride * i2, base + stride * i3, u, v)
        a, b, c, d = zero, zero, zero, zero
        e, f, g, h = zero, zero, zero, zero
        for i in range(n):
            values = load_both(rows, i)
            a += values[0] * values[4]
            b += values[1] * values[4]
            c += values[2] * values[4]
            d += values[3] * values[4]
            e += values[0] * values[5]
            f += values[1] * values[5]
            g += values[2] * values[5]
            h += values[3] * values[5]
        store_double(target, first, np.float64(a))
        store_double(target, i1, np.float64(b))
        store_double(target, i2, np.float64(c))
        store_double(target, i3, np.float64(d))
        second = target + 16 * n_rows
        store_double(second, first, np.float64(e))
        store_double(second, i1, np.float64(f))
        store_double(second, i2, np.float64(g))
        store_double(second, i3, np.float64(h))

    return njit(**_OPTIONS)(two if with_y else one)


def gram_kernel() -> str:
    """LLVM assembly of the loop that multiplies rows by each other: Y D Y'.

    Arguments: 4 elements of a block, whose rows stay in the cache; 5 Y; 6 bytes of a row; 7 number of rows; 8 diagonal
    D; 9 scratch memory, per thread a block of float32 and a float64 a row. Sums: the lower
    triangle of the matrix, at least.
    """
    load, store, add_products = loader((_F32, _F32), _F32), storer((_F32, _F32), _F32), _products_of_group(False)

    def kernel(call: int) -> None:
        numel, length, sums, block = load_int(call, 0), load_int(call, 1), load_int(call, 3), load_int(call, 4)
        stride, n_rows = load_int(call, 6), load_int(call, 7)
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        row = load_int(call, 9) + (4 * block + 8 * n_rows) * thread
        products = row + 4 * block
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            target = sums + 8 * n_rows * n_rows * chunk
            for i in range(n_rows * n_rows):
                store_double(target, i, 0.0)
            end = min(numel, (chunk + 1) * length)
            for begin in range(chunk * length, end, block):
                n, place = min(block, end - begin), 4 * begin
                base, diagonal = load_int(call, 5) + place, load_int(call, 8) + place
                for j in range(n_rows):
                    for i in range(n):
                        values = load((base + stride * j, diagonal), i)
                        store((row, 0), i, values[0] * values[1])
                    for first in range(0, j + 1, GROUP):
                        add_products(base, stride, first, n_rows, row, row, n, products)
                    for i in range(j + 1):
                        store_double(
                            target, n_rows * j + i, load_double(target, n_rows * j + i) + load_double(products, i)
                        )

    return assembly(kernel, _OPTIONS)


def look_kernel(dtype: torch.dtype) -> str:
    """LLVM assembly of the loop that looks at a new gradient.

    Arguments: 4 gradient g; 5 direction d; 6 gradient g0 where d begins. Sums: g'd, g0'd; and, as an integer, the
    largest entry of g without its sign: integers have the order of such numbers, and NaN is the largest.
    """
    load, size = loader((dtype, dtype, dtype), _F64), dtype.itemsize
    load_bits: Any = load_word if dtype == _F32 else load_int
    without_sign = 2 ** (8 * size - 1) - 1

    def kernel(call: int) -> None:
        numel, length, sums = load_int(call, 0), load_int(call, 1), load_int(call, 3)
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            place = size * chunk * length
            grad = load_int(call, 4) + place
            vectors = (grad, load_int(call, 5) + place, load_int(call, 6) + place)
            slope, before, largest = 0.0, 0.0, 0
            for i in range(min(length, numel - chunk * length)):
                values = load(vectors, i)
                slope += values[0] * values[1]
                before += values[2] * values[1]
                bits = load_bits(grad, i) & without_sign
                largest = bits if bits > largest else largest
            store_double(sums, 3 * chunk, slope)
            store_double(sums, 3 * chunk + 1, before)
            store_int(sums, 3 * chunk + 2, largest)

    return assembly(kernel, _OPTIONS)


def direction_kernel(dtype: torch.dtype) -> str:
    """LLVM assembly of the loop that adds up a direction: a D (b g + Y'u) + S'p.

    Arguments: 4 S; 5 Y; 6 bytes of a row; 7 length of the table, a multiple of ``GROUP``; 8 diagonal D; 9 g; 10 b
    and 11 a, float64; 12 a table of (row, u, p) of float64; 13 scratch memory, a chunk of float32 per thread; 14 the
    result; 15 a factor of D, float64, by which it is multiplied first.
    """
    load_grad, store_result = loader((dtype,), _F64), storer((dtype, dtype), _F64)
    load, store = loader((_F32,), _F32), storer((_F32, _F32), _F32)
    load_five = loader((_F32,) * (GROUP + 1), _F32)
    size, one = dtype.itemsize, np.float32(1)

    def kernel(call: int) -> None:
        numel, length = load_int(call, 0), load_int(call, 1)
        stride, n_rows, table = load_int(call, 6), load_int(call, 7), load_int(call, 12)
        inner, outer, stretch = load_double(call, 10), load_double(call, 11), np.float32(load_double(call, 15))
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        total = load_int(call, 13) + 4 * length * thread
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            begin = chunk * length
            n, place = min(length, numel - begin), 4 * begin
            grad, result = (load_int(call, 9) + size * begin,), (load_int(call, 14) + size * begin, 0)
            diagonal = load_int(call, 8) + place
            for i in range(n):
                store((total, 0), i, np.float32(inner * load_grad(grad, i)[0]))
            for matrix in range(2):
                base = load_int(call, 5 - matrix) + place
                if matrix == 1:
                    if stretch != one:
                        for i in range(n):
                            store((diagonal, 0), i, stretch * load((diagonal,), i)[0])
                    for i in range(n):
                        store((total, 0), i, load((total,), i)[0] * load((diagonal,), i)[0])
                for first in range(0, n_rows, GROUP):
                    row = table + 24 * first
                    a, b = np.float32(load_double(row, 1 + matrix)), np.float32(load_double(row, 4 + matrix))
                    c, d = np.float32(load_double(row, 7 + matrix)), np.float32(load_double(row, 10 + matrix))
                    rows = (
                        total,
                        base + stride * np.int64(load_double(row, 0)),
                        base + stride * np.int64(load_double(row, 3)),
                        base + stride * np.int64(load_double(row, 6)),
                        base + stride * np.int64(load_double(row, 9)),
                    )
                    for i in range(n):
                        values = load_five(rows, i)
                        sum_of_two = a * values[1] + b * values[2]
                        store((total, 0), i, values[0] + (sum_of_two + (c * values[3] + d * values[4])))
            for i in range(n):
                store_result(result, i, outer * np.float64(load((total,), i)[0]))

    return assembly(kernel, _OPTIONS)
