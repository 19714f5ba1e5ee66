"""Inner loops over a few rows of a matrix at once, in explicit vectors, for code that Numba compiles.

A compiler keeps no prefetch in a loop that it vectorises. A chunk of a row ends before the processor has recognised a
stream, so what lies ``AHEAD`` in each row is fetched meanwhile: at the end of a chunk, that is the start of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir as llvm_ir
from numba.core import cgutils, types

from descend.backends.cpu.intrinsics import intrinsic, pack, prefetch_line

GROUP = 5  # rows that are read together
LINE = 16  # elements in a cache line; loops take multiples of it
AHEAD = 512  # elements between a prefetch and its use
SEGMENT = 2048  # elements that are summed in float32
# Elements of a vector. With 512 bits there are 32 registers, else 16: sums with two vectors of factors fit either.
WIDTH = 16 if llvm.get_host_cpu_features().get("avx512f") else 8

_I64, _F32, _F64 = llvm_ir.IntType(64), llvm_ir.FloatType(), llvm_ir.DoubleType()
_VECTOR, _WIDE = llvm_ir.VectorType(_F32, WIDTH), llvm_ir.VectorType(_F64, WIDTH)
_CONTRACT = ("contract",)


def row_products(vectors: int) -> Any:
    """Inner products of ``GROUP`` rows with one vector or two, of so many elements: row by row, vector by vector."""
    kind = types.UniTuple(types.float64, GROUP * vectors)

    @intrinsic
    def products(typing: Any, rows: Any, factors: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row_addresses, factor_addresses = _unpack(builder, args[0], GROUP), _unpack(builder, args[1], vectors)
            number = GROUP * vectors
            sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(number)]
            totals = [cgutils.alloca_once_value(builder, llvm_ir.Constant(_F64, 0.0)) for _ in range(number)]
            with _steps(builder, _integer(0), args[2], SEGMENT) as begin:
                for total in sums:
                    builder.store(llvm_ir.Constant(_VECTOR, None), total)
                after = builder.add(begin, _integer(SEGMENT))
                end = builder.select(builder.icmp_signed("<", after, args[2]), after, args[2])
                with _steps(builder, begin, end, LINE) as first:
                    _prefetch(builder, row_addresses, first)
                    for index in _vectors_of_line(builder, first):
                        loaded = [_load(builder, address, index) for address in factor_addresses]
                        for position, address in enumerate(row_addresses):
                            row = _load(builder, address, index)
                            for factor, total in zip(loaded, sums[position * vectors :], strict=False):
                                builder.store(_multiply_add(builder, row, factor, builder.load(total)), total)
                for part, total in zip(sums, totals, strict=True):
                    builder.store(builder.fadd(builder.load(total), _sum(builder, builder.load(part))), total)
            return pack(context, builder, [builder.load(total) for total in totals], types.float64)

        return kind(rows, factors, types.int64), generate

    return products


@intrinsic
def add_rows(typing: Any, target: Any, rows: Any, weights: Any, count: Any) -> Any:
    """Add ``GROUP`` weighted rows to the vector at an address, so many elements of them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_addresses = _unpack(builder, args[1], GROUP)
        factors = [_spread(builder, weight) for weight in _unpack(builder, args[2], GROUP)]
        with _steps(builder, _integer(0), args[3], LINE) as first:
            _prefetch(builder, row_addresses, first)
            for index in _vectors_of_line(builder, first):
                total = _load(builder, args[0], index)
                for address, factor in zip(row_addresses, factors, strict=True):
                    total = _multiply_add(builder, _load(builder, address, index), factor, total)
                builder.store(total, _pointer(builder, args[0], index, _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, rows, weights, types.int64), generate


def _unpack(builder: Any, values: Any, count: int) -> list[Any]:
    return [builder.extract_value(values, position) for position in range(count)]


@contextmanager
def _steps(builder: Any, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """A loop over the indices from ``start`` on, before ``stop``."""
    with cgutils.for_range_slice(builder, start, stop, _integer(step), _I64) as (index, _):
        yield index


def _integer(number: int) -> Any:
    return llvm_ir.Constant(_I64, number)


def _vectors_of_line(builder: Any, first: Any) -> list[Any]:
    """Indices of the vectors in a line."""
    return [builder.add(first, _integer(offset)) for offset in range(0, LINE, WIDTH)]


def _pointer(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """Of an element in float32 memory."""
    place = builder.add(address, builder.shl(index, _integer(2)))
    return builder.inttoptr(place, kind.as_pointer())


def _load(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(_pointer(builder, address, index, _VECTOR), align=4)


def _prefetch(builder: Any, addresses: list[Any], first: Any) -> None:
    ahead = builder.add(first, _integer(AHEAD))
    for address in addresses:
        prefetch_line(builder, _pointer(builder, address, ahead, _F32))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(c, builder.fmul(a, b, flags=_CONTRACT), flags=_CONTRACT)


def _spread(builder: Any, number: Any) -> Any:
    """A vector of equal elements."""
    zero = llvm_ir.Constant(llvm_ir.IntType(32), 0)
    one = builder.insert_element(llvm_ir.Constant(_VECTOR, llvm_ir.Undefined), number, zero)
    mask = llvm_ir.Constant(llvm_ir.VectorType(llvm_ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, one, mask)


def _sum(builder: Any, vector: Any) -> Any:
    """The sum of a vector's elements, in float64."""
    kind = llvm_ir.FunctionType(_F64, [_F64, _WIDE])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{WIDTH}f64")
    arguments = llvm_ir.Constant(_F64, 0.0), builder.fpext(vector, _WIDE)
    return builder.call(function, arguments, fastmath=("reassoc",))
