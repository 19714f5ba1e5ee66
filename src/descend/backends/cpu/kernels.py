"""Compiles a rule with Numba into one loop over a chunk table, for any mix of floating dtypes.

This module is imported only to compile: ``object_files`` loads cached kernels without it.

A kernel receives the address of seven int64 arguments, see ``launch.ChunkCall``:

    0 chunk table      rows of (tensor, offset in parameter and state, offset in gradient, length, scalars row, times):
                       the rule is applied so many times, with consecutive rows of scalars from that one on
    1 number of chunks
    2 address table    a row per tensor: parameter, gradient, state tensors
    3 scalars table    rows of (scale of the gradient, then the rule's scalars) in the compute dtype
    4 block            chunks that a thread claims at a time
    5 next chunk       the counter through which threads share the work
    6 partial sums     float64, one per chunk (the norm kernel's result), or a row (``sums_kernel``)
"""

from __future__ import annotations

import math
from functools import partial
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
    fetch_add,
    load_double,
    load_int,
    loader,
    prefetcher,
    scalars_loader,
    store_double,
    store_int,
    storer,
)
from descend.backends.retarget import retarget

# Wrappers would make these functions callable from Python, which nobody does; they take a third of the time.
njit: Any = partial(numba.njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)

# With Python's own division check nothing would vectorise; these flags keep NaN and Inf exact.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}
_SUM_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}

ROW = 48  # bytes of a row of the chunk table
AHEAD = 8  # chunks between a prefetch and its use
PREFETCHED = 256  # elements of a chunk that are prefetched; the processor prefetches the rest of a long chunk itself


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


def compiler_of(compute: torch.dtype) -> Any:
    """What compiles a rule, and the helpers that it calls, for arithmetic in this dtype."""
    return lambda function: njit(pipeline_class=_COMPILERS[compute], **OPTIONS)(function)


def operations(compiled: Any) -> dict[Any, Any]:
    """What a rule calls for the functions of ``descend.ops``."""
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


def update_kernel(rule: Any, scalars: int, dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> str:
    """LLVM assembly of the loop that applies ``rule`` to every element of every chunk.

    Args:
        rule: the function to compile.
        scalars: how many scalars the rule takes.
        dtypes: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """
    compiled = compiler_of(compute)
    apply = retarget(rule, operations(compiled), compiled)
    addresses_of, load, store = chunk_addresses(dtypes), loader(dtypes, compute), storer(dtypes, compute)
    load_scalars = scalars_loader(1 + scalars, compute)
    prefetch, line = prefetcher(dtypes), 64 // max(dtype.itemsize for dtype in dtypes)
    tensors = len(dtypes)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, block = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        while True:
            first = fetch_add(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                if chunk + AHEAD < count:  # else scattered rows of a large table would wait for memory one by one
                    row = chunks + ROW * (chunk + AHEAD)
                    pointers = addresses_of(
                        addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 2)
                    )
                    for i in range(0, min(load_int(row, 3), PREFETCHED), line):
                        prefetch(pointers, i)
                row = chunks + ROW * chunk
                tensor, length = load_int(row, 0), load_int(row, 3)
                pointers = addresses_of(addresses + 8 * tensors * tensor, load_int(row, 1), load_int(row, 2))
                for application in range(load_int(row, 5)):
                    scale_and_scalars = load_scalars(scalars_table, load_int(row, 4) + application)
                    scale, rule_scalars = scale_and_scalars[0], scale_and_scalars[1:]
                    for i in range(length):
                        values = load(pointers, i)
                        arguments = (values[0], scale * values[1]) + values[2:] + rule_scalars
                        store(pointers, i, apply(*arguments))

    return assembly(kernel, OPTIONS)


def norm_kernel(dtype: torch.dtype, column: int, columns: int) -> str:
    """LLVM assembly of the loop that sums the squares of each chunk in one column of the address table, in float64."""
    load = loader((dtype,), torch.float64)
    size = dtype.itemsize

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, block, sums = load_int(call, 2), load_int(call, 4), load_int(call, 6)
        while True:
            first = fetch_add(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                row = chunks + ROW * chunk
                start = load_int(addresses, columns * load_int(row, 0) + column)
                pointers = (start + size * load_int(row, 2),)
                total = 0.0
                for i in range(load_int(row, 3)):
                    value = load(pointers, i)[0]
                    total += value * value
                store_double(sums, chunk, total)

    return assembly(kernel, _SUM_OPTIONS)


def scalar_state_kernel(dtype: torch.dtype) -> str:
    """LLVM assembly of the loop that compares 0-dim state tensors of ``dtype`` with expected values, or sets them.

    Arguments: 0 addresses of the tensors; 1 expected values (float64); 2 how many; 3 action (0 compare, 1 add one to
    both, 2 store the expected values); 4 set to 1 if all values are as expected (or have been set). After a store the
    expected values are rounded to ``dtype``.
    """
    load, store = loader((dtype,), torch.float64), storer((dtype, dtype), torch.float64)

    def kernel(call: int) -> None:
        table, expected, action = load_int(call, 0), load_int(call, 1), load_int(call, 3)
        for i in range(load_int(call, 2)):
            pointers = (load_int(table, i),)
            value = load(pointers, 0)[0]
            if action == 0:
                if value != load_double(expected, i):
                    return
            else:
                store((pointers[0], 0), 0, value + 1.0 if action == 1 else load_double(expected, i))
                store_double(expected, i, load(pointers, 0)[0])
        store_int(call, 4, 1)

    return assembly(kernel, OPTIONS)


def sequence_kernel() -> str:
    """LLVM assembly that makes one call after the other.

    A call receives the address of int64 values: the address of ``GOMP_parallel``; how many calls; how many threads; the
    number of elements from which on to use them; and for each call the address of a kernel, its argument, its number of
    elements, and the address of a counter to set to 0 first (0 for none).
    """

    def kernel(call: int) -> None:
        parallel, threads, least = load_int(call, 0), load_int(call, 2), load_int(call, 3)
        for i in range(load_int(call, 1)):
            row = call + 32 * (i + 1)
            address, argument, counter = load_int(row, 0), load_int(row, 1), load_int(row, 3)
            if counter != 0:
                store_int(counter, 0, 0)
            if threads > 1 and load_int(row, 2) >= least:
                call_parallel(parallel, address, argument, threads)
            else:
                call_address(address, argument, 0)

    return assembly(kernel, OPTIONS)


def shared_kernel() -> str:
    """LLVM assembly that calls one function with each of many arguments; the threads that run it share them.

    A call receives the address of int64 values: the function, how many arguments, the counter of those taken, and the
    arguments.
    """

    def kernel(call: int) -> None:
        function, count = load_int(call, 0), load_int(call, 1)
        while True:
            i = fetch_add(call + 16, 1)
            if i >= count:
                break
            call_address(function, load_int(call, 3 + i), 0)

    return assembly(kernel, OPTIONS)


def versions_kernel() -> str:
    """LLVM assembly that calls one function with each of many arguments.

    A call receives the address of int64 values: the function, how many arguments, and the arguments.
    """

    def kernel(call: int) -> None:
        function = load_int(call, 0)
        for i in range(load_int(call, 1)):
            call_address(function, load_int(call, i + 2), 0)

    return assembly(kernel, OPTIONS)


def loop_kernel(function: Any, arrays: int) -> str:
    """LLVM assembly of a plain function of float64 arrays. Arguments: address and length of each array."""
    # No fastmath: results must be those of Python. Nobody owns the arrays, so slices of them need no reference counts,
    # which would need Numba's runtime.
    exactly = {"error_model": "numpy", "_nrt": False}
    run = retarget(function, {}, njit(**exactly))
    load = arrays_loader(arrays)

    def kernel(call: int) -> None:
        run(*load(call))

    return assembly(kernel, exactly)


def assembly(kernel: Any, options: dict[str, Any]) -> str:
    """LLVM assembly of ``kernel`` behind a plain C entry point."""
    signature = types.void(types.int64)
    compiled = njit(signature, **options)(kernel)
    ((arguments, overload),) = compiled.overloads.items()
    name = overload.fndesc.llvm_func_name
    # Numba's calling convention: pointers to the result and to an exception come first.
    entry = f"""
define void @{object_files.ENTRY}(i64 %call) {{
  %unused = alloca ptr
  %status = call i32 @{name}(ptr %unused, ptr %unused, i64 %call)
  ret void
}}
"""
    return compiled.inspect_llvm(arguments) + entry
