"""Kernels, made once for each rule and dtypes, and once more for each device."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from threading import RLock
from types import FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from descend.backends.backend import Declined
from descend.backends.retarget import retarget
from descend.backends.triton import audit, formats, kernels, operations, source, tuning
from descend.core.codecs import compute_dtype
from descend.core.signature import signature

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_TORCH = {name: dtype for dtype, name in _NAMES.items()}
_TYPES = {name: tl.dtype(name) for name in _NAMES.values()}
_NAMES |= {torch.int16: "i16", torch.uint8: "u8"}
_TYPES |= {"i16": tl.int16, "u8": tl.uint8}

# Pointers that are beginnings of allocations, and therefore multiples of 16. Others may lead into the midst of one.
_ALLOCATIONS = ("chunks", "addresses", "scalars", "sums")

Signature: TypeAlias = Mapping[str, str | tuple[str, ...]]
Argument: TypeAlias = Tensor | int | tuple[Tensor | int, ...]


class Kernel:
    """A kernel for any device.

    Args:
        function: what Triton has made of it.
        pointers: for each pointer it takes, the dtype behind it; for each number, its dtype;
            for a tuple, those of its members.
        constants: values that are compiled in, by the names of its last arguments.
        aligned: names of pointers that are multiples of 16. Default: those that are beginnings of allocations.
        checks_rule: whether it does nothing but apply a rule, so that what it computes can be checked, see ``audit``.
    Attributes:
        constants: the same.
    """

    def __init__(
        self,
        function: Any,
        pointers: Signature,
        constants: Mapping[str, Any],
        aligned: Collection[str] = _ALLOCATIONS,
        checks_rule: bool = False,
    ) -> None:
        self._function, self.constants, self._checks_rule = function, constants, checks_rule
        self._signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
        self._attributes = {
            path: [["tt.divisibility", 16]]
            for i, (name, kinds) in enumerate(pointers.items())
            for path in ([(i,)] if isinstance(kinds, str) else [(i, member) for member in range(len(kinds))])
            if name in aligned
        }
        self._compiled: dict[int, Any] = {}

    def compile_for(self, target: GPUTarget) -> Any:
        """Compile it, or load it from Triton's cache.

        Raises:
            TypeError: if it would compute something else than its rule does in Python.
        """
        constants = {(list(self._signature).index(name),): value for name, value in self.constants.items()}
        made = triton.compiler.ASTSource(self._function, self._signature, constants, self._attributes)
        # Products and sums are fused, as the CPU backend does: said, because Triton's default is about to change.
        options = {"num_warps": tuning.THREADS // target.warp_size, "enable_fp_fusion": True}
        with _cache_folder():
            compiled = triton.compile(made, target=target, options=options)
        is_wide = self._checks_rule and self.constants["COMPUTE"] == tl.float64
        sums = self.constants.get("SUMS", 0)
        if self._checks_rule and (reason := audit.unsound(compiled.asm.get("ttir", ""), is_wide, sums)):
            raise TypeError(reason)
        return compiled

    def compile(self, device: torch.device) -> None:
        """Compile it for a device, and load it there: whatever can fail does so now."""
        if device.type != "cpu" and device.index not in self._compiled:
            with torch.cuda.device(device), _cache_folder():
                compiled = self.compile_for(triton.runtime.driver.active.get_current_target())
                compiled[1, 1, 1]
            self._compiled[device.index] = compiled

    def bind(self, programs: int, device: torch.device, *arguments: Argument) -> Callable[[], None]:
        """A function that launches it on the current stream of ``device``, which must be the current device.

        It is given what Triton's launcher wants, so that little is looked up when it is called.
        """
        if device.type == "cpu":
            return partial(self._interpret, programs, arguments)
        self.compile(device)
        launcher = self._compiled[device.index][programs, 1, 1]
        addresses = map(_address, arguments)
        return _OnCurrentStream(partial(launcher, *addresses, *self.constants.values()), device, _tensors(arguments))

    def _interpret(self, programs: int, arguments: tuple[Argument, ...]) -> None:
        with np.errstate(all="ignore"):
            self._function[programs,](*arguments, *self.constants.values())


class _OnCurrentStream:
    """A launch on whatever stream is the current one.

    The allocator gives memory to others when the stream that it was allocated on is done with it; so it is told of each
    other stream.

    Args:
        launch: takes the stream's handle.
        device: where the stream is.
        tensors: what the kernel reads and writes.
    """

    def __init__(self, launch: Callable[..., None], device: torch.device, tensors: Sequence[Tensor]) -> None:
        self._launch, self._device, self._tensors = launch, device, tensors
        self._seen: set[Any] = set()

    def __call__(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if stream not in self._seen:
            for tensor in self._tensors:
                tensor.record_stream(stream)
            self._seen.add(stream)
        self._launch(stream=stream.cuda_stream)


def _tensors(arguments: Iterable[Argument]) -> list[Tensor]:
    members = (member for each in arguments for member in (each if isinstance(each, tuple) else (each,)))
    return [member for member in members if isinstance(member, Tensor)]


def _address(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_address, argument))
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def interprets() -> bool:
    """Whether Triton's interpreter is on: then kernels run on CPU tensors."""
    return bool(knobs.runtime.interpret)


def update(rule: Any, scalars: int, dtypes: tuple[torch.dtype, ...]) -> Kernel:
    """The kernel that applies a rule to chunks, see ``kernels.update``.

    Raises:
        Declined: if the rule cannot be made a kernel.
    """
    return declining(_update, rule, scalars, dtypes)


def declining(make: Callable[..., Kernel], rule: Any, *arguments: Any) -> Kernel:
    """``make(rule, ..., interprets())``. Raise ``Declined`` if the rule cannot be made a kernel."""
    try:
        if not isinstance(rule, FunctionType):
            raise TypeError("it is not a function made by def")
        return make(rule, *arguments, interprets())
    except RecursionError as error:
        raise _decline(rule, TypeError("its helpers call each other in a circle")) from error
    except Exception as error:  # rules may be anything
        raise _decline(rule, error) from error


@cache
def _update(rule: FunctionType, scalars: int, dtypes: tuple[torch.dtype, ...], interpreted: bool) -> Kernel:
    compute = compute_dtype(dtypes)
    constants = {
        "RULE": inlined(rule, compute),
        "DTYPES": tuple(map(triton_type, dtypes)),
        "COMPUTE": triton_type(compute),
        "SCALARS": scalars,
        "BLOCK": tuning.block(dtypes),
        "RAGGED": tuning.block(dtypes) // 2,  # were it equal, Triton would give both the same layout in registers
    }
    pointers = {"chunks": "*i64", "addresses": "*i64", "scalars": f"*{_NAMES[compute]}", "decision": "*fp64"}
    return Kernel(_jitted(kernels.update), pointers, constants, checks_rule=True)


def sums(rule: Any, dtypes: tuple[torch.dtype, ...]) -> Kernel:
    """The kernel that sums what the part of a rule returns, see ``kernels.sums``.

    Raises:
        Declined: if the part cannot be made a kernel.
    """
    return declining(_sums, rule, dtypes)


@cache
def _sums(rule: FunctionType, dtypes: tuple[torch.dtype, ...], interpreted: bool) -> Kernel:
    takes, compute = signature(rule), compute_dtype(dtypes)
    constants = {
        "PART": inlined(part_of(rule), compute),
        "DTYPES": tuple(map(triton_type, dtypes)),
        "COMPUTE": triton_type(compute),
        "SCALARS": len(takes.scalars),
        "GIVEN": len(takes.given),
        "SUMS": takes.sums,
        "BLOCK": tuning.NORM,
    }
    pointers = {"chunks": "*i64", "addresses": "*i64", "scalars": f"*{_NAMES[compute]}", "sums": "*fp64"}
    return Kernel(made(kernels.sums, interpreted), pointers, constants, checks_rule=True)


def part_of(rule: FunctionType) -> FunctionType:
    """What is summed before a rule is applied.

    Raises:
        TypeError: if that is no plain function.
    """
    part = signature(rule).summed
    if not isinstance(part, FunctionType):
        raise TypeError("its part is not a function made by def")
    return part


@cache
def totals(sums: int, interpreted: bool) -> Kernel:
    """The kernel that adds the sums of each tensor's chunks, see ``kernels.totals``."""
    pointers = {"sums": "*fp64", "spans": "*i64", "results": "*fp64"}
    return Kernel(made(kernels.totals, interpreted), pointers, {"SUMS": sums, "BLOCK": tuning.NORM})


@cache
def made(function: FunctionType, interpreted: bool) -> Any:
    """What Triton makes of a kernel."""
    bound = _operations(torch.float64, interpreted)
    if interpreted:
        bound = {
            **bound,
            kernels.added: _jitted(kernels.added_by_interpreter),
            formats.largest: _jitted(formats.largest_by_interpreter),
        }
    return _jitted(function, bound)


@cache
def sums_of_squares(dtype: torch.dtype, column: int, columns: int, interpreted: bool) -> Kernel:
    """The kernel that sums the squares of chunks, see ``kernels.sums_of_squares``."""
    constants = {"COLUMN": column, "COLUMNS": columns, "DTYPE": triton_type(dtype), "BLOCK": tuning.NORM}
    pointers = {"chunks": "*i64", "addresses": "*i64", "sums": "*fp64"}
    return Kernel(made(kernels.sums_of_squares, interpreted), pointers, constants)


@cache
def total(interpreted: bool) -> Kernel:
    """The kernel that sums numbers, see ``kernels.total``."""
    pointers = {"sums": "*fp64", "count": "i32", "result": "*fp64"}
    return Kernel(made(kernels.total, interpreted), pointers, {"BLOCK": tuning.SUMS})


@cache
def judge(total: torch.dtype, grad_scale: torch.dtype, found_inf: torch.dtype, interpreted: bool) -> Kernel:
    """The kernel that decides, see ``kernels.judge``; for the dtypes of what it reads."""
    numbers = dict.fromkeys(("scale", "max_norm", "skips_nonfinite"), "i64")
    pointers = {
        "values": "*fp64",
        "total": f"*{_NAMES[total]}",
        "grad_scale": f"*{_NAMES[grad_scale]}",
        "found_inf": f"*{_NAMES[found_inf]}",
        **numbers,
    }
    return Kernel(made(kernels.judge, interpreted), pointers, {})


@cache
def scalar_state(dtype: torch.dtype, interpreted: bool) -> Kernel:
    """The kernel that writes 0-dim tensors, see ``kernels.scalar_state``."""
    pointers = {"addresses": "*i64", "places": "*i64", "values": "*fp64", "decision": "*fp64", "count": "i32"}
    return Kernel(
        made(kernels.scalar_state, interpreted), pointers, {"DTYPE": triton_type(dtype), "BLOCK": tuning.THREADS}
    )


def check(rule: Any, kernel: Kernel, device: torch.device) -> None:
    """Compile the kernel of a rule. Raise ``Declined`` if it cannot be compiled for the device."""
    try:
        kernel.compile(device)
        if device.type == "cpu":
            _try(kernel)
    except Exception as error:  # Triton raises many kinds
        raise _decline(rule, error) from error


def _try(kernel: Kernel) -> None:
    """Run the kernel of a rule on one element: the interpreter compiles nothing beforehand."""
    dtypes, scalars = kernel.constants["DTYPES"], kernel.constants["SCALARS"]
    with torch.device("cpu"):
        chunks = torch.tensor([0, 0, 0, 1])
        numbers = torch.ones(scalars + 1, dtype=_TORCH[str(kernel.constants["COMPUTE"])])
        elements = [torch.ones((), dtype=_TORCH[str(dtype)]) for dtype in dtypes]
        addresses = torch.tensor([element.data_ptr() for element in elements])
        decision_or_sums = torch.ones(4 + kernel.constants.get("SUMS", 0), dtype=torch.float64)
    kernel.bind(1, chunks.device, chunks, addresses, numbers, decision_or_sums)()


_declined: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _decline(rule: Any, error: BaseException) -> Declined:
    _declined[rule] = reason = explain(rule, error)
    return Declined(reason)


def declined(rule: Any) -> str | None:
    """Why a rule could not be compiled; None if it has been, or has not been tried."""
    return _declined.get(rule)


def inlined(rule: FunctionType, compute: torch.dtype) -> Any:
    """A rule that kernels can call, its arithmetic in ``compute``."""
    return _jitted(rule, _operations(compute, interprets()))


@cache
def _operations(compute: torch.dtype, interpreted: bool) -> dict[Any, Any]:
    wide = operations.WIDE if compute == torch.float64 else {}
    bound = {narrow: _jitted(function) for narrow, function in wide.items()}
    return {op: bound.get(function) or _jitted(function, bound) for op, function in operations.OPERATIONS.items()}


def _jitted(function: Any, ops: Mapping[Any, Any] | None = None) -> Any:
    return retarget(function, ops or {}, source.jitted)


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return _TYPES[_NAMES[dtype]]


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to a dtype."""
    return f"*{_NAMES[dtype]}"


_compiling = RLock()


@contextmanager
def _cache_folder() -> Iterator[None]:
    """Compiled kernels lie below ``DESCEND_CACHE_DIR`` if that is set and Triton's own folder is not.

    One thread at a time: the folder is a variable of the process, and each puts back what it has found.
    """
    with _compiling:
        chosen = os.environ.get("DESCEND_CACHE_DIR")
        if not chosen or os.environ.get("TRITON_CACHE_DIR"):
            yield
            return
        with knobs.cache.scope():
            knobs.cache.dir = str(Path(chosen).absolute() / "triton")
            yield


def explain(rule: Any, error: BaseException) -> str:
    """Why a rule cannot be compiled, and where it says so."""
    code = getattr(rule, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code else ("no file", 0)
    reason = str(error)
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, triton.CompilationError) and inner.src is not None:
            reason = inner.error_message or reason
            found = source.origin(inner.src)
            number = getattr(inner.node, "lineno", 0)
            if found is not None and number in found.lines:
                file, line = found.file, found.lines[number]
        inner = inner.__cause__
    return (
        f"the rule {getattr(rule, '__name__', rule)} cannot be compiled for GPUs ({file}, line {line}): "
        f"{reason.splitlines()[0] if reason else repr(error)}\n"
        "A rule may use arithmetic, comparisons, the functions of descend.ops imported by name, and helpers made of "
        "these. It runs with backend='foreach' or backend='eager'"
    )
