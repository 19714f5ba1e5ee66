"""Numba: compiles a rule into one loop over a chunk table, for any mix of floating dtypes.

Only imported when something has to be compiled; a kernel found on disk needs none of this (``native.py``).

A call receives the address of seven int64 numbers (``chunks.Table`` fills them):

    0 chunk table      rows of (tensor, offset in parameter and state, offset in gradient, length, scalars row, times):
                       the rule is applied as many times, with as many rows of scalars from that one on
    1 number of chunks
    2 address table    a row per tensor: parameter, gradient, state tensors
    3 scalars table    rows of (scale of the gradient, then the rule's numbers) in the compute dtype
    4 chunks to take at a time
    5 next chunk to take: the threads share the work through this counter
    6 partial sums     float64, one per chunk (the norm kernel's result)
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba.core import compiler, ir, types
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.untyped_passes import IRProcessing

from descend import ops
from descend.backends.cpu import object_files
from descend.backends.cpu.intrinsics import (
    arrays_loader,
    call_address,
    call_parallel,
    chunk_addresses,
    load_double,
    load_int,
    loader,
    numbers_loader,
    prefetcher,
    store_double,
    store_int,
    storer,
    take,
)
from descend.backends.retarget import retarget

njit: Any = numba.njit

# With Python's own division check nothing would vectorise; these flags keep NaN and Inf exact.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}
_SUM_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}

ROW = 48  # bytes of a row of the chunk table
AHEAD = 8  # chunks between asking for memory and using it
PREFETCHED = 256  # elements asked for; the processor sees by itself how longer chunks go on

_ENTRY_OPTIONS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _literals_as(number: Any) -> Any:
    """A compiler that gives literals the compute dtype: a plain 2 would drag float32 arithmetic into float64."""

    @register_pass(mutates_CFG=False, analysis_only=False)
    class LiteralsInComputeDtype(FunctionPass):  # type: ignore[misc]
        _name = f"descend_literals_{number.__name__}"

        def __init__(self) -> None:
            super().__init__()

        def run_pass(self, state: Any) -> bool:
            for block in state.func_ir.blocks.values():
                for assign in block.find_insts(ir.Assign):
                    value = assign.value
                    if isinstance(value, ir.Const | ir.Global | ir.FreeVar) and type(value.value) in (int, float):
                        assign.value = ir.Const(number(value.value), value.loc)
            return True

    class Compiler(compiler.CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            passes = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes.add_pass_after(LiteralsInComputeDtype, IRProcessing)
            passes.finalize()
            return [passes]

    return Compiler


_COMPILERS = {torch.float32: _literals_as(np.float32), torch.float64: _literals_as(np.float64)}


def _maximum(a: Any, b: Any) -> Any:
    return a if a > b or a != a else b


def _minimum(a: Any, b: Any) -> Any:
    return a if a < b or a != a else b


def _sign(x: Any) -> Any:
    return 1.0 if x > 0.0 else (-1.0 if x < 0.0 else 0.0)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def _operations(compiled: Any) -> dict[Any, Any]:
    return {
        ops.abs: math.fabs,
        ops.exp: math.exp,
        ops.log: math.log,
        ops.sqrt: math.sqrt,
        ops.maximum: compiled(_maximum),
        ops.minimum: compiled(_minimum),
        ops.sign: compiled(_sign),
        ops.where: compiled(_where),
    }


def update_kernel(rule: Any, numbers: int, dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> str:
    """LLVM assembly of the loop that applies ``rule`` to every element of every chunk.

    Args:
        rule: the function to compile.
        numbers: how many numbers the rule takes.
        dtypes: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """

    def compiled(function: Any) -> Any:
        return njit(pipeline_class=_COMPILERS[compute], **OPTIONS)(function)

    apply = retarget(rule, _operations(compiled), compiled)
    addresses_of, load, store = chunk_addresses(dtypes), loader(dtypes, compute), storer(dtypes, compute)
    load_numbers = numbers_loader(numbers + 1, compute)
    prefetch, line = prefetcher(dtypes), 64 // max(dtype.itemsize for dtype in dtypes)
    tensors = len(dtypes)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars, block = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        while True:
            first = take(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                if chunk + AHEAD < count:  # rows scattered in a large table would wait for memory one by one
                    row = chunks + ROW * (chunk + AHEAD)
                    where = addresses_of(addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 2))
                    for i in range(0, min(load_int(row, 3), PREFETCHED), line):
                        prefetch(where, i)
                row = chunks + ROW * chunk
                tensor, length = load_int(row, 0), load_int(row, 3)
                where = addresses_of(addresses + 8 * tensors * tensor, load_int(row, 1), load_int(row, 2))
                for application in range(load_int(row, 5)):
                    scale_and_numbers = load_numbers(scalars, load_int(row, 4) + application)
                    scale, rule_numbers = scale_and_numbers[0], scale_and_numbers[1:]
                    for i in range(length):
                        values = load(where, i)
                        arguments = (values[0], scale * values[1]) + values[2:] + rule_numbers
                        store(where, i, apply(*arguments))

    return assembly(kernel, OPTIONS)


def norm_kernel(dtype: torch.dtype, column: int, columns: int) -> str:
    """LLVM assembly of the sums of squares in one column of the address table, one float64 per chunk."""
    load = loader((dtype,), torch.float64)
    size = dtype.itemsize

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, block, sums = load_int(call, 2), load_int(call, 4), load_int(call, 6)
        while True:
            first = take(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                row = chunks + ROW * chunk
                start = load_int(addresses, columns * load_int(row, 0) + column)
                where = (start + size * load_int(row, 2),)
                total = 0.0
                for i in range(load_int(row, 3)):
                    value = load(where, i)[0]
                    total += value * value
                store_double(sums, chunk, total)

    return assembly(kernel, _SUM_OPTIONS)


def stored_numbers_kernel(dtype: torch.dtype) -> str:
    """LLVM assembly that compares numbers of ``dtype``, each at its own address, with expected ones, or sets them.

    A call receives the address of five int64 numbers: 0 addresses of the numbers, 1 expected numbers (float64), 2 how
    many, 3 what to do (0 compare, 1 add one to both, 2 store the expected), 4 set to 1 if all were as expected (or
    have been set). What is expected afterwards is what the dtype could hold.
    """
    load, store = loader((dtype,), torch.float64), storer((dtype, dtype), torch.float64)

    def kernel(call: int) -> None:
        table, expected, action = load_int(call, 0), load_int(call, 1), load_int(call, 3)
        for i in range(load_int(call, 2)):
            where = (load_int(table, i),)
            number = load(where, 0)[0]
            if action == 0:
                if number != load_double(expected, i):
                    return
            else:
                store((where[0], 0), 0, number + 1.0 if action == 1 else load_double(expected, i))
                store_double(expected, i, load(where, 0)[0])
        store_int(call, 4, 1)

    return assembly(kernel, OPTIONS)


def sequence_kernel() -> str:
    """LLVM assembly that makes one call after the other.

    A call receives the address of int64 numbers: ``GOMP_parallel``, how many calls, and for each of them the address of
    a kernel, its argument, and on how many threads to run it.
    """

    def kernel(call: int) -> None:
        parallel = load_int(call, 0)
        for i in range(load_int(call, 1)):
            address, argument, threads = load_int(call, 3 * i + 2), load_int(call, 3 * i + 3), load_int(call, 3 * i + 4)
            if threads > 1:
                call_parallel(parallel, address, argument, threads)
            else:
                call_address(address, argument, 0)

    return assembly(kernel, OPTIONS)


def loop_kernel(function: Any, arrays: int) -> str:
    """LLVM assembly of a plain function of float64 arrays. A call receives addresses and lengths, array by array."""
    exactly = {"error_model": "numpy"}  # what it does must not be less precise than in Python
    run = retarget(function, {}, njit(**exactly))
    load = arrays_loader(arrays)

    def kernel(call: int) -> None:
        run(*load(call))

    return assembly(kernel, exactly)


def assembly(kernel: Any, options: dict[str, Any]) -> str:
    """LLVM assembly of ``kernel`` behind a plain C entry point."""
    signature = types.void(types.int64)
    compiled = njit(signature, **options, **_ENTRY_OPTIONS)(kernel)
    ((arguments, overload),) = compiled.overloads.items()
    name = overload.fndesc.llvm_func_name
    # Numba's calling convention: places for the result and for an exception come first.
    entry = f"""
define void @{object_files.ENTRY}(i64 %call) {{
  %unused = alloca ptr
  %status = call i32 @{name}(ptr %unused, ptr %unused, i64 %call)
  ret void
}}
"""
    return compiled.inspect_llvm(arguments) + entry
