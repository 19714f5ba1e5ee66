"""Numba: compiles a rule into one loop over a chunk table, for any mix of floating dtypes.

Only imported when something has to be compiled; a kernel found on disk needs none of this (``native.py``).

A call receives the address of eight int64 numbers (``chunks.Launch`` fills them):

    0 chunk table      rows of (tensor, offset in parameter and state, offset in gradient, length, scalars row)
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

import numpy as np
import torch
from llvmlite import ir as llvm_ir
from numba import njit, types
from numba.core import compiler, errors, ir
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.untyped_passes import IRProcessing
from numba.extending import intrinsic

from descend import ops
from descend.kernels import native
from descend.kernels.retarget import retarget

# With Python's own division check nothing would vectorise; these flags keep NaN and Inf exact.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}
_SUM_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
_ENTRY_OPTIONS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_I16, _I32, _I64 = (llvm_ir.IntType(bits) for bits in (16, 32, 64))
_F16, _F32, _F64 = llvm_ir.HalfType(), llvm_ir.FloatType(), llvm_ir.DoubleType()
_STORED = {torch.float16: _F16, torch.bfloat16: _I16, torch.float32: _F32, torch.float64: _F64}
_COMPUTED: dict[Any, Any] = {torch.float32: types.float32, torch.float64: types.float64}


def _element(builder: Any, address: Any, index: Any, stored: Any) -> Any:
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])


def _widen(builder: Any, value: Any, dtype: torch.dtype, computed: Any) -> Any:
    """From the stored dtype to the compute dtype."""
    if dtype == torch.bfloat16:  # the upper half of a float32
        bits = builder.shl(builder.zext(value, _I32), llvm_ir.Constant(_I32, 16))
        value = builder.bitcast(bits, _F32)
    return value if value.type == computed else builder.fpext(value, computed)


def _narrow(builder: Any, value: Any, dtype: torch.dtype) -> Any:
    """From the compute dtype to the stored one, to nearest even, NaN staying NaN."""
    stored = _STORED[dtype]
    if dtype != torch.bfloat16:
        return value if value.type == stored else builder.fptrunc(value, stored)
    if value.type == _F64:
        value = builder.fptrunc(value, _F32)
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, llvm_ir.Constant(_I32, 16)), llvm_ir.Constant(_I32, 1))
    rounded = builder.add(builder.add(bits, llvm_ir.Constant(_I32, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(is_nan, llvm_ir.Constant(_I32, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(bits, llvm_ir.Constant(_I32, 16)), _I16)


def _pack(context: Any, builder: Any, values: list[Any], kind: Any) -> Any:
    return context.make_tuple(builder, types.UniTuple(kind, len(values)), values)


@intrinsic
def _load_int(typing: Any, address: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_element(builder, args[0], args[1], _I64))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _store_double(typing: Any, address: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _element(builder, args[0], args[1], _F64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), generate


@intrinsic
def _take(typing: Any, address: Any, count: Any) -> Any:
    """Advance the shared counter at ``address`` by ``count``; its value before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


def _chunk_addresses(dtypes: tuple[torch.dtype, ...]) -> Any:
    """Where one chunk of each tensor begins: parameter, gradient (with an offset of its own), state."""

    @intrinsic
    def addresses(typing: Any, row: Any, offset: Any, grad_offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            found = []
            for column, dtype in enumerate(dtypes):
                base = builder.load(_element(builder, args[0], llvm_ir.Constant(_I64, column), _I64))
                elements = args[2] if column == 1 else args[1]
                size = llvm_ir.Constant(_I64, dtype.itemsize)
                found.append(builder.add(base, builder.mul(elements, size)))
            return _pack(context, builder, found, types.int64)

        return types.UniTuple(types.int64, len(dtypes))(types.int64, types.int64, types.int64), generate

    return addresses


def _loader(dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> Any:
    """Element ``index`` of every tensor of a chunk, in the compute dtype."""
    number = _COMPUTED[compute]

    @intrinsic
    def load(typing: Any, addresses: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = []
            for column, dtype in enumerate(dtypes):
                address = builder.extract_value(args[0], column)
                value = builder.load(_element(builder, address, args[1], _STORED[dtype]))
                values.append(_widen(builder, value, dtype, _STORED[compute]))
            return _pack(context, builder, values, number)

        return types.UniTuple(number, len(dtypes))(addresses, types.int64), generate

    return load


def _numbers_loader(count: int, compute: torch.dtype) -> Any:
    """A row of the scalars table."""

    @intrinsic
    def load(typing: Any, table: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = builder.mul(args[1], llvm_ir.Constant(_I64, count))
            indices = [builder.add(first, llvm_ir.Constant(_I64, i)) for i in range(count)]
            values = [builder.load(_element(builder, args[0], i, _STORED[compute])) for i in indices]
            return _pack(context, builder, values, _COMPUTED[compute])

        return types.UniTuple(_COMPUTED[compute], count)(types.int64, types.int64), generate

    return load


def _storer(dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> Any:
    """Write what a rule returned into element ``index`` of the parameter and the state tensors."""
    columns = [column for column in range(len(dtypes)) if column != 1]  # gradients are never written
    number = _COMPUTED[compute]

    @intrinsic
    def store(typing: Any, addresses: Any, index: Any, values: Any) -> Any:
        kinds = list(values) if isinstance(values, types.BaseTuple) else [values]
        if len(kinds) != len(columns):
            raise errors.TypingError(f"the rule returned {len(kinds)} values, not {len(columns)}")

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for position, (column, kind) in enumerate(zip(columns, kinds, strict=True)):
                value = args[2]
                if isinstance(values, types.BaseTuple):
                    value = builder.extract_value(value, position)
                value = context.cast(builder, value, kind, number)
                address = builder.extract_value(args[0], column)
                place = _element(builder, address, args[1], _STORED[dtypes[column]])
                builder.store(_narrow(builder, value, dtypes[column]), place)
            return context.get_dummy_value()

        return types.void(addresses, types.int64, values), generate

    return store


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
        return njit(pipeline_class=_COMPILERS[compute], **_OPTIONS)(function)

    apply = retarget(rule, _operations(compiled), compiled)
    addresses_of, load, store = _chunk_addresses(dtypes), _loader(dtypes, compute), _storer(dtypes, compute)
    load_numbers = _numbers_loader(numbers + 1, compute)
    tensors = len(dtypes)

    def kernel(call: int) -> None:
        chunks, count = _load_int(call, 0), _load_int(call, 1)
        addresses, scalars, block = _load_int(call, 2), _load_int(call, 3), _load_int(call, 4)
        while True:
            first = _take(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                row = chunks + 40 * chunk
                tensor, length = _load_int(row, 0), _load_int(row, 3)
                where = addresses_of(addresses + 8 * tensors * tensor, _load_int(row, 1), _load_int(row, 2))
                scale_and_numbers = load_numbers(scalars, _load_int(row, 4))
                scale, rule_numbers = scale_and_numbers[0], scale_and_numbers[1:]
                for i in range(length):
                    values = load(where, i)
                    arguments = (values[0], scale * values[1]) + values[2:] + rule_numbers
                    store(where, i, apply(*arguments))

    return _assembly(kernel, _OPTIONS)


def norm_kernel(dtype: torch.dtype, column: int, columns: int) -> str:
    """LLVM assembly of the sums of squares in one column of the address table, one float64 per chunk."""
    load = _loader((dtype,), torch.float64)
    size = dtype.itemsize

    def kernel(call: int) -> None:
        chunks, count = _load_int(call, 0), _load_int(call, 1)
        addresses, block, sums = _load_int(call, 2), _load_int(call, 4), _load_int(call, 6)
        while True:
            first = _take(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                row = chunks + 40 * chunk
                start = _load_int(addresses, columns * _load_int(row, 0) + column)
                where = (start + size * _load_int(row, 2),)
                total = 0.0
                for i in range(_load_int(row, 3)):
                    value = load(where, i)[0]
                    total += value * value
                _store_double(sums, chunk, total)

    return _assembly(kernel, _SUM_OPTIONS)


@intrinsic
def _store_int(typing: Any, address: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _element(builder, args[0], args[1], _I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _call(typing: Any, function: Any, first: Any, second: Any) -> Any:
    """Call the C function at an address with two integers or pointers (those it does not take, it ignores)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prototype = llvm_ir.FunctionType(_I64, [_I64, _I64])
        return builder.call(builder.inttoptr(args[0], prototype.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64), generate


def probe_kernel() -> str:
    """LLVM assembly that looks at every tensor of a plan: see ``probe.py`` for what and why."""

    @njit
    def fact(functions: int, which: int, tensor: int, scratch: int) -> int:
        _store_int(scratch, 0, 0)
        _call(_load_int(functions, which), tensor, scratch)
        return _load_int(scratch, 0)

    @njit
    def mixed(seed: int, value: int) -> int:
        seed = (seed ^ value) * 0x100000001B3
        return seed ^ (seed >> 29)

    @njit
    def layout(functions: int, tensor: int, scratch: int) -> int:
        """A hash of dtype, device, layout, sign bit, sizes and strides; 0 for no tensor."""
        if fact(functions, 0, tensor, scratch) & 1 == 0:
            return 0
        kind = fact(functions, 3, tensor, scratch)
        seed = mixed(mixed(fact(functions, 1, tensor, scratch), fact(functions, 2, tensor, scratch)), kind)
        seed = mixed(seed, _call(_load_int(functions, 8), tensor, 0) & 1)
        if kind == 0:  # strided
            sizes, strides = fact(functions, 5, tensor, scratch), fact(functions, 6, tensor, scratch)
            for dim in range(fact(functions, 4, tensor, scratch)):
                seed = mixed(mixed(seed, _load_int(sizes, dim)), _load_int(strides, dim))
        return seed | 1

    @njit
    def meets(start: int, end: int, starts: int, ends: int, count: int) -> bool:
        """Whether [start, end) meets one of the sorted, disjoint intervals."""
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if _load_int(ends, middle) > start:
                high = middle
            else:
                low = middle + 1
        return low < count and _load_int(starts, low) < end

    def kernel(call: int) -> None:
        functions, scratch, record = _load_int(call, 0), _load_int(call, 1), _load_int(call, 2)
        tensors, expected, count = _load_int(call, 3), _load_int(call, 4), _load_int(call, 5)
        starts, ends, written = _load_int(call, 6), _load_int(call, 7), _load_int(call, 8)
        for i in range(count):
            tensor, row = _load_int(tensors, i), expected + 48 * i
            found_layout = layout(functions, tensor, scratch)
            found_address = fact(functions, 7, tensor, scratch)
            grad_layout, grad_address, cell = 0, 0, _load_int(row, 4)
            if cell >= 0:  # a parameter; state tensors have no gradient
                grad = _call(_load_int(functions, 9), _load_int(tensor, 0), 0)
                grad_layout = layout(functions, grad, scratch)
                if grad_layout != 0 and (record == 1 or grad_layout == _load_int(row, 2)):
                    grad_address = fact(functions, 7, grad, scratch)
            if record == 1:
                _store_int(row, 0, found_address)
                _store_int(row, 1, found_layout)
                _store_int(row, 2, grad_layout)
                _store_int(row, 3, grad_address)
            elif (
                found_address != _load_int(row, 0)
                or found_layout != _load_int(row, 1)
                or grad_layout != _load_int(row, 2)
            ):
                return
            elif grad_address != _load_int(row, 3):
                if meets(grad_address, grad_address + _load_int(row, 5), starts, ends, written):
                    return
                _store_int(row, 3, grad_address)
                if cell > 0:
                    _store_int(cell, 0, grad_address)
        _store_int(call, 9, 1)

    return _assembly(kernel, _OPTIONS)


def advance_kernel(dtype: torch.dtype) -> str:
    """LLVM assembly that adds one to every step count of ``dtype`` in a table of addresses."""
    load, store = _loader((dtype,), dtype), _storer((dtype, dtype), dtype)

    def kernel(call: int) -> None:
        table = _load_int(call, 0)
        for i in range(_load_int(call, 1)):
            address = (_load_int(table, i), 0)
            store(address, 0, load(address[:1], 0)[0] + 1)

    return _assembly(kernel, _OPTIONS)


def _assembly(kernel: Any, options: dict[str, Any]) -> str:
    """LLVM assembly of ``kernel`` behind a plain C entry point."""
    signature = types.void(types.int64)
    compiled = njit(signature, **options, **_ENTRY_OPTIONS)(kernel)
    ((arguments, overload),) = compiled.overloads.items()
    name = overload.fndesc.llvm_func_name
    # Numba's calling convention: places for the result and for an exception come first.
    return (
        compiled.inspect_llvm(arguments)
        + f"""
define void @{native.ENTRY}(i64 %call) {{
  %unused = alloca ptr
  %status = call i32 @{name}(ptr %unused, ptr %unused, i64 %call)
  ret void
}}
"""
    )
