"""Kernels, made once for each rule and dtypes, and once more for each device."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from descend.backends.backend import Declined
from descend.backends.retarget import retarget
from descend.backends.triton import kernels, operations, source, tuning

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_TYPES = {name: tl.dtype(name) for name in _NAMES.values()}

Argument: TypeAlias = Tensor | int | tuple[Tensor | int, ...]


class Kernel:
    """A kernel for any device.

    Args:
        function: what Triton has made of it.
        pointers: for each pointer it takes, the dtype behind it; for each number, its dtype.
        constants: values that are compiled in, by the names of its last arguments.
        unaligned: names of pointers that may begin anywhere; the others at multiples of sixteen bytes.
    """

    def __init__(
        self,
        function: Any,
        pointers: Mapping[str, str | tuple[str, ...]],
        constants: Mapping[str, Any],
        unaligned: Collection[str] = (),
    ) -> None:
        self._function, self._constants = function, constants
        self._signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
        self._attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for position, (name, kinds) in enumerate(pointers.items()):
            for path, kind in (((), kinds),) if isinstance(kinds, str) else (((i,), k) for i, k in enumerate(kinds)):
                if kind[0] == "*" and name not in unaligned:  # so that loads may be wide
                    self._attributes[position, *path] = [["tt.divisibility", 16]]
        self._compiled: dict[int, Any] = {}

    def compile_for(self, target: GPUTarget) -> Any:
        """Compile it, or load it from Triton's cache."""
        constants = {(list(self._signature).index(name),): value for name, value in self._constants.items()}
        made = triton.compiler.ASTSource(self._function, self._signature, constants, self._attributes)
        with _cache_folder():
            warps = tuning.THREADS // target.warp_size
            return triton.compile(made, target=target, options={"num_warps": warps, "enable_fp_fusion": True})

    def compile(self, device: torch.device) -> None:
        """Compile it for a device."""
        if device.type != "cpu" and device.index not in self._compiled:
            with torch.cuda.device(device):
                self._compiled[device.index] = self.compile_for(triton.runtime.driver.active.get_current_target())

    def bind(self, programs: int, device: torch.device, *arguments: Argument) -> Callable[[], None]:
        """A function that launches it on the current stream of ``device``, which must be the current device.

        It is given what Triton's launcher wants, so that nothing is looked up when it is called. Whoever calls it keeps
        the tensors.
        """
        if device.type == "cpu":
            return partial(self._interpret, programs, arguments)
        self.compile(device)
        launcher = self._compiled[device.index][programs, 1, 1]
        addresses = map(_address, arguments)
        return partial(launcher, *addresses, *self._constants.values())

    def _interpret(self, programs: int, arguments: tuple[Argument, ...]) -> None:
        with np.errstate(all="ignore"):
            self._function[programs,](*arguments, *self._constants.values())


def _address(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_address, argument))
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def interprets() -> bool:
    """Whether Triton's interpreter is on: then kernels run on CPU tensors."""
    return bool(knobs.runtime.interpret)


def update(rule: FunctionType, scalars: int, dtypes: tuple[torch.dtype, ...]) -> Kernel:
    """The kernel that applies a rule to chunks, see ``kernels.update``.

    Raises:
        Declined: if the rule cannot be made a kernel.
    """
    try:
        return _update(rule, scalars, dtypes, interprets())
    except (ValueError, RecursionError, SyntaxError) as error:
        raise Declined(explain(rule, error)) from error


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
    return Kernel(retarget(kernels.update, {}, source.jitted), pointers, constants)


@cache
def _made(name: str, interpreted: bool) -> Any:
    return retarget(getattr(kernels, name), _operations(torch.float64, interpreted), source.jitted)


@cache
def sums_of_squares(dtype: torch.dtype, column: int, columns: int, interpreted: bool) -> Kernel:
    """The kernel that sums the squares of chunks, see ``kernels.sums_of_squares``."""
    constants = {"COLUMN": column, "COLUMNS": columns, "DTYPE": triton_type(dtype), "BLOCK": tuning.NORM}
    pointers = {"chunks": "*i64", "addresses": "*i64", "sums": "*fp64"}
    return Kernel(_made("sums_of_squares", interpreted), pointers, constants)


@cache
def total(interpreted: bool) -> Kernel:
    """The kernel that sums numbers, see ``kernels.total``."""
    pointers = {"sums": "*fp64", "count": "i32", "result": "*fp64"}
    return Kernel(_made("total", interpreted), pointers, {"BLOCK": tuning.SUMS})


@cache
def judge(grad_scale: torch.dtype, found_inf: torch.dtype, interpreted: bool) -> Kernel:
    """The kernel that decides, see ``kernels.judge``; for the dtypes of what ``GradScaler`` knows."""
    numbers = dict.fromkeys(("scale", "max_norm", "skips_nonfinite"), "i64")
    pointers = {
        "values": "*fp64",
        "total": "*fp64",
        "grad_scale": f"*{_NAMES[grad_scale]}",
        "found_inf": f"*{_NAMES[found_inf]}",
        **numbers,
    }
    return Kernel(_made("judge", interpreted), pointers, {})


@cache
def scalar_state(dtype: torch.dtype, interpreted: bool) -> Kernel:
    """The kernel that writes 0-dim tensors, see ``kernels.scalar_state``."""
    pointers = {"addresses": "*i64", "places": "*i64", "values": "*fp64", "decision": "*fp64", "count": "i32"}
    return Kernel(_made("scalar_state", interpreted), pointers, {"DTYPE": triton_type(dtype), "BLOCK": tuning.THREADS})


def inlined(rule: FunctionType, compute: torch.dtype) -> Any:
    """A rule that kernels can call, its arithmetic in ``compute``."""
    return retarget(rule, _operations(compute, interprets()), source.jitted)


@cache
def _operations(compute: torch.dtype, interpreted: bool) -> dict[Any, Any]:
    wide = operations.WIDE if compute == torch.float64 else {}
    bound = {narrow: retarget(function, {}, source.jitted) for narrow, function in wide.items()}
    return {
        op: bound.get(function) or retarget(function, bound, source.jitted)
        for op, function in operations.OPERATIONS.items()
    }


def compute_dtype(dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return _TYPES[_NAMES[dtype]]


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to a dtype."""
    return f"*{_NAMES[dtype]}"


@contextmanager
def _cache_folder() -> Iterator[None]:
    """Compiled kernels lie below ``DESCEND_CACHE_DIR`` if that is set and Triton's own folder is not."""
    chosen = os.environ.get("DESCEND_CACHE_DIR")
    with knobs.cache.scope():
        if chosen and not os.environ.get("TRITON_CACHE_DIR"):
            knobs.cache.dir = str(Path(chosen).absolute() / "triton")
        yield


def explain(rule: FunctionType, error: BaseException) -> str:
    """Why a rule cannot be compiled, and where it says so."""
    file, line = rule.__code__.co_filename, rule.__code__.co_firstlineno
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
        f"the rule {rule.__name__} cannot be compiled for GPUs ({file}, line {line}): {reason.splitlines()[0]}\n"
        "A rule may use arithmetic, comparisons, the functions of descend.ops imported by name, and helpers made of "
        "these. It runs with backend='foreach' or backend='eager'."
    )
