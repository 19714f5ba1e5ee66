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
from descend.backends.cpu.row_loops import GROUP, LINE, SEGMENT, add_rows, row_products

# The order of sums is free, so that they are vectorised; NaN and Inf stay exact.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc", "arcp"}}
_F32, _F64 = torch.float32, torch.float64


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
    load_stored, store, zero = loader((_F32,) * 3, _F32), storer((_F32,) * 3, _F32), np.float32(0)

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
            for start in range(0, n, SEGMENT):
                part_y_dy, part_s_ds, part_sy = zero, zero, zero
                for i in range(start, min(start + SEGMENT, n)):
                    values = load_stored(stored, i)
                    d, s, y = values[0], values[1], values[2]
                    part_y_dy += d * y * y
                    part_s_ds += s / d * s
                    part_sy += s * y
                y_dy += np.float64(part_y_dy)
                s_ds += np.float64(part_s_ds)
                sy += np.float64(part_sy)
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
    row; 12 scratch memory, three chunks of float32 per thread. Sums: S g of each row, then Y D g; ``with_y`` then
    S y and Y D y.
    """
    load_grad, load, store_one = loader((dtype,), _F64), loader((_F32,), _F32), storer((_F32, _F32), _F32)
    multiply = _products_of_group(with_y)
    size, width = dtype.itemsize, 4 if with_y else 2

    def kernel(call: int) -> None:
        numel, length, sums = load_int(call, 0), load_int(call, 1), load_int(call, 3)
        stride, n_rows, scale = load_int(call, 6), load_int(call, 7), load_double(call, 10)
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        grad = load_int(call, 12) + 12 * length * thread
        scaled_grad, scaled_y = grad + 4 * length, grad + 8 * length
        while True:
            chunk = next_chunk(call, thread, count)
            if chunk < 0:
                break
            begin = chunk * length
            n, place = min(length, numel - begin), 4 * begin
            diagonal, source = (load_int(call, 8) + place,), (load_int(call, 9) + size * begin,)
            for i in range(n):
                g = np.float32(scale * load_grad(source, i)[0])
                store_one((grad, 0), i, g)
                store_one((scaled_grad, 0), i, g * load(diagonal, i)[0])
            y = load_int(call, 11) + place
            if with_y:
                for i in range(n):
                    store_one((scaled_y, 0), i, load((y,), i)[0] * load(diagonal, i)[0])
            target, second = sums + 8 * width * n_rows * chunk, 2 * n_rows
            s_rows, y_rows = load_int(call, 4) + place, load_int(call, 5) + place
            for i in range(0, n_rows, GROUP):
                multiply(s_rows, stride, i, n_rows, grad, y, n, target, second)
            target += 8 * n_rows
            for i in range(0, n_rows, GROUP):
                multiply(y_rows, stride, i, n_rows, scaled_grad, scaled_y, n, target, second)

    return assembly(kernel, _OPTIONS)


def _products_of_group(with_second: bool) -> Any:
    """A compiled function that stores the products of ``GROUP`` rows with one vector or two.

    Those with the second vector go so many places behind those with the first one. The last group repeats the last row,
    and stores the same products again.
    """
    load, width = loader((_F32,), _F32), 2 if with_second else 1
    multiply = row_products(width)

    def store_products(
        base: int, stride: int, first: int, n_rows: int, u: int, v: int, n: int, target: int, distance: int
    ) -> None:
        last, whole = n_rows - 1, n // LINE * LINE
        indices = (first, min(first + 1, last), min(first + 2, last), min(first + 3, last), min(first + 4, last))
        rows = (
            base + stride * indices[0],
            base + stride * indices[1],
            base + stride * indices[2],
            base + stride * indices[3],
            base + stride * indices[4],
        )
        totals = multiply(rows, (u, v) if with_second else (u,), whole)
        for k in range(width * GROUP):
            total, row, vector = totals[k], rows[k // width], v if k % width else u
            for i in range(whole, n):
                total += np.float64(load((row,), i)[0] * load((vector,), i)[0])
            store_double(target, distance * (k % width) + indices[k // width], total)

    return njit(**_OPTIONS)(store_products)


def gram_kernel() -> str:
    """LLVM assembly of the loop that multiplies rows by each other: Y D Y'.

    Arguments: 4 elements of a block, whose rows stay in the cache; 5 Y; 6 bytes of a row; 7 number of rows; 8 diagonal
    D; 9 scratch memory, per thread two blocks of float32 and two float64 a row. Sums: the lower triangle of the matrix,
    at least.
    """
    load, store, multiply = loader((_F32, _F32), _F32), storer((_F32, _F32), _F32), _products_of_group(True)

    def kernel(call: int) -> None:
        numel, length, sums, block = load_int(call, 0), load_int(call, 1), load_int(call, 3), load_int(call, 4)
        stride, n_rows = load_int(call, 6), load_int(call, 7)
        count = (numel + length - 1) // length
        thread = number_of_thread(call)
        one = load_int(call, 9) + (8 * block + 16 * n_rows) * thread
        other = one + 4 * block
        products = one + 8 * block
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
                for j in range(0, n_rows, 2):
                    k = min(j + 1, n_rows - 1)
                    for i in range(n):
                        values = load((base + stride * j, diagonal), i)
                        store((one, 0), i, values[0] * values[1])
                        values = load((base + stride * k, diagonal), i)
                        store((other, 0), i, values[0] * values[1])
                    for i in range(0, k + 1, GROUP):
                        multiply(base, stride, i, n_rows, one, other, n, products, n_rows)
                    for i in range(k + 1):
                        here = n_rows * j + i
                        store_double(target, here, load_double(target, here) + load_double(products, i))
                        if k > j:
                            here += n_rows
                            store_double(target, here, load_double(target, here) + load_double(products, n_rows + i))

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
    """LLVM assembly of the loop that adds up a direction: a (c D (b g + Y'u) + S'p).

    Arguments: 4 S; 5 Y; 6 bytes of a row; 7 length of the table, a multiple of ``GROUP``; 8 diagonal D; 9 g; 10 b
    and 11 a, float64; 12 a table of (row, u, p) of float64; 13 scratch memory, a chunk of float32 per thread; 14 the
    result; 15 c, float64.
    """
    load_grad, store_result = loader((dtype,), _F64), storer((dtype, dtype), _F64)
    load, store = loader((_F32,), _F32), storer((_F32, _F32), _F32)
    size = dtype.itemsize

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
            whole = n // LINE * LINE
            grad, result = (load_int(call, 9) + size * begin,), (load_int(call, 14) + size * begin, 0)
            diagonal = load_int(call, 8) + place
            for i in range(n):
                store((total, 0), i, np.float32(inner * load_grad(grad, i)[0]))
            for matrix in range(2):
                base = load_int(call, 5 - matrix) + place
                if matrix == 1:
                    for i in range(n):
                        store((total, 0), i, load((total,), i)[0] * (stretch * load((diagonal,), i)[0]))
                for first in range(0, n_rows, GROUP):
                    row = table + 24 * first
                    rows = (
                        base + stride * np.int64(load_double(row, 0)),
                        base + stride * np.int64(load_double(row, 3)),
                        base + stride * np.int64(load_double(row, 6)),
                        base + stride * np.int64(load_double(row, 9)),
                        base + stride * np.int64(load_double(row, 12)),
                    )
                    weights = (
                        np.float32(load_double(row, 1 + matrix)),
                        np.float32(load_double(row, 4 + matrix)),
                        np.float32(load_double(row, 7 + matrix)),
                        np.float32(load_double(row, 10 + matrix)),
                        np.float32(load_double(row, 13 + matrix)),
                    )
                    add_rows(total, rows, weights, whole)
                    for i in range(whole, n):
                        value = load((total,), i)[0]
                        for k in range(GROUP):
                            value += weights[k] * load((rows[k],), i)[0]
                        store((total, 0), i, value)
            for i in range(n):
                store_result(result, i, outer * np.float64(load((total,), i)[0]))

    return assembly(kernel, _OPTIONS)
