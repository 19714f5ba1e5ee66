"""Addresses of compiled functions. Each is compiled at most once per machine; Numba is imported only to compile."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files
from types import FunctionType
from typing import Any

import torch

from descend import ops
from descend.backends.backend import RuleError
from descend.backends.cpu import object_files
from descend.backends.retarget import fingerprint
from descend.core.codecs import Formats, element_dtype, is_plain
from descend.core.measures import COLUMNS
from descend.core.signature import signature

_OPS = {getattr(ops, name): name for name in ops.__all__}


@cache
def update(rule: FunctionType, scalars: int, formats: Formats, compute: torch.dtype) -> int:
    """The loop that applies ``rule`` to the chunks of tensors in ``formats`` (parameter, gradient, state)."""
    part: Any = signature(rule).averaged
    key = f"update|{_sources()}|{_described(rule)}|{part and _described(part)}|{scalars}|{formats}|{compute}"

    def compile_update() -> str:
        from descend.backends.cpu import formats_kernel, kernels, row_rule_kernel

        dtypes = tuple(map(element_dtype, formats))
        try:
            if part is not None:
                return row_rule_kernel.row_update_kernel(rule, part, scalars, dtypes, compute)
            if not is_plain(formats):
                return formats_kernel.update_kernel(rule, scalars, formats, compute)
            return kernels.update_kernel(rule, scalars, dtypes, compute)
        except Exception as error:  # Numba raises many kinds, all of them about the rule
            raise RuleError(_explain(rule, error)) from error

    return object_files.load(rule.__name__, key, compile_update)


@cache
def measures(formats: Formats, compute: torch.dtype, moments: tuple[int, int] | None) -> int:
    """The loop that runs another one, and sums up what ``core.measures.COLUMNS`` lists."""

    def compile_measures() -> str:
        from descend.backends.cpu import measures_kernel

        return measures_kernel.measures_kernel(formats, compute, moments)

    key = f"measures|{_sources()}|{COLUMNS}|{formats}|{compute}|{moments}"
    return object_files.load("measures", key, compile_measures)


@cache
def sums(rule: FunctionType, formats: Formats, compute: torch.dtype) -> int:
    """The loop that sums what the part of ``rule`` returns over the chunks of tensors in ``formats``."""
    takes = signature(rule)
    part: Any = takes.summed
    given, scalars = len(takes.given), len(takes.scalars)

    def compile_sums() -> str:
        from descend.backends.cpu import sums_kernel

        try:
            return sums_kernel.sums_kernel(part, given, scalars, takes.sums, formats, compute)
        except Exception as error:  # Numba raises many kinds, all of them about the part
            raise RuleError(_explain(part, error)) from error

    key = f"sums|{_sources()}|{_described(part)}|{given}|{scalars}|{takes.sums}|{formats}|{compute}"
    return object_files.load(part.__name__, key, compile_sums)


@cache
def sums_of_squares(dtype: torch.dtype, column: int, columns: int) -> int:
    """The loop that sums the squares of each chunk of the tensors in one column of the address table."""

    def compile_norm() -> str:
        from descend.backends.cpu import kernels

        return kernels.norm_kernel(dtype, column, columns)

    return object_files.load("norm", f"norm|{_sources()}|{dtype}|{column}|{columns}", compile_norm)


@cache
def scalar_state(dtype: torch.dtype) -> int:
    """The loop that checks or sets 0-dim state tensors of ``dtype``."""

    def compile_scalar_state() -> str:
        from descend.backends.cpu import kernels

        return kernels.scalar_state_kernel(dtype)

    return object_files.load("scalar_state", f"scalar_state|{_sources()}|{dtype}", compile_scalar_state)


@cache
def sequence() -> int:
    """The loop that makes several calls one after the other, see ``threads.CallSequence``."""

    def compile_sequence() -> str:
        from descend.backends.cpu import kernels

        return kernels.sequence_kernel()

    return object_files.load("sequence", f"sequence|{_sources()}", compile_sequence)


@cache
def shared() -> int:
    """The loop that calls one function with many arguments, see ``loops.run_in_parts``."""

    def compile_shared() -> str:
        from descend.backends.cpu import kernels

        return kernels.shared_kernel()

    return object_files.load("shared", f"shared|{_sources()}", compile_shared)


@cache
def versions() -> int:
    """The loop that calls one function with each of many tensors, see ``versions.Versions``."""

    def compile_versions() -> str:
        from descend.backends.cpu import kernels

        return kernels.versions_kernel()

    return object_files.load("versions", f"versions|{_sources()}", compile_versions)


@cache
def probe() -> int:
    """The loop behind ``probe.NativeProbe``."""

    def compile_probe() -> str:
        from descend.backends.cpu import probe_kernel

        return probe_kernel.probe_kernel()

    return object_files.load("probe", f"probe|{_sources()}", compile_probe)


@cache
def rows(name: str, *dtypes: torch.dtype) -> int:
    """A loop of ``rows_kernel`` by name: touched, sums, stale or mark."""

    def compile_rows() -> str:
        from descend.backends.cpu import rows_kernel

        return str(getattr(rows_kernel, f"{name}_kernel")(*dtypes))

    return object_files.load(f"rows_{name}", f"rows|{name}|{_sources()}|{dtypes}", compile_rows)


@cache
def vectors(name: str, *options: Any) -> int:
    """A loop of ``vectors_kernel`` by name: keep, learn, products or direction."""

    def compile_vectors() -> str:
        from descend.backends.cpu import vectors_kernel

        return str(getattr(vectors_kernel, f"{name}_kernel")(*options))

    return object_files.load(f"vectors_{name}", f"vectors|{name}|{_sources()}|{options}", compile_vectors)


@cache
def loop(function: FunctionType, arrays: int) -> int:
    """A plain function of ``arrays`` float64 arrays, see ``loops``."""

    def compile_loop() -> str:
        from descend.backends.cpu import kernels

        return kernels.loop_kernel(function, arrays)

    key = f"loop|{_sources()}|{fingerprint(function, _OPS)}|{arrays}"
    return object_files.load(function.__name__, key, compile_loop)


def _described(rule: FunctionType) -> str:
    try:
        return fingerprint(rule, _OPS)
    except RecursionError as error:
        raise RuleError(_explain(rule, TypeError("its helpers call each other in a circle"))) from error


@cache
def _sources() -> str:
    """A digest of the code that writes kernels: an edit there invalidates every cached kernel."""
    kernels = (
        "codes",
        "columns",
        "formats_kernel",
        "intrinsics",
        "kernels",
        "measures_kernel",
        "probe_kernel",
        "row_loops",
        "row_rule_kernel",
        "rows_kernel",
        "stored",
        "sums_kernel",
        "vectors_kernel",
    )
    names = (
        *(f"backends/cpu/{name}.py" for name in kernels),
        "backends/retarget.py",
        "core/codecs.py",
        "core/noise.py",
    )
    texts = [files("descend").joinpath(name).read_bytes() for name in names]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def _explain(rule: FunctionType, error: Exception) -> str:
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # Numba writes in colours if colorama is installed
    lines = re.findall(r'File "([^"]*)", line (\d+)', text)
    file, line = lines[0] if lines else (rule.__code__.co_filename, rule.__code__.co_firstlineno)
    reasons = [line for line in text.splitlines() if line.strip() and not line.startswith("Failed in nopython mode")]
    return (
        f"the rule {rule.__name__} cannot be compiled for the CPU ({file}, line {line}): "
        f"{reasons[0] if reasons else repr(error)}\n"
        "A rule may use arithmetic, comparisons, the functions of descend.ops imported by name, and helpers made of "
        "these. To run it as it is on tensors, pass backend='eager'."
    )
