"""Compiled functions as object files: written once per machine and rule, loaded without a compiler.

Numba's own disk cache does not serve here: functions made in a factory or typed at a prompt never hit it. A kernel
is a C function ``void f(int64_t address)``, its object file is named after everything that went into it, and loading
it needs llvmlite alone, not Numba: a few milliseconds instead of a second.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

ENTRY = "descend_kernel"

_lock = threading.RLock()
_loaded: dict[str, int] = {}
_engines: list[Any] = []  # an engine owns the memory of its code


def load(name: str, key: str, compile_to_llvm: Callable[[], str]) -> int:
    """Address of the compiled function ``key``: from memory, from disk, or compiled now.

    Args:
        name: readable beginning of the file's name.
        key: text that changes whenever the compiled function would.
        compile_to_llvm: returns LLVM assembly that defines ``ENTRY``.
    """
    with _lock:
        if key not in _loaded:
            # Making an engine is also what lets LLVM see the symbols of this process.
            engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _new_target_machine())
            digest = hashlib.sha256(f"{key}|{_machine()}".encode()).hexdigest()
            path = cache_directory() / f"{name}-{digest[:40]}.o"
            object_code = _read(path)
            if object_code is None:
                module = llvm.parse_assembly(compile_to_llvm())
                symbols = _called_symbols(module)
                object_code = _target_machine().emit_object(module)
                _write(path, object_code, symbols)
            engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
            engine.finalize_object()
            _engines.append(engine)
            _loaded[key] = engine.get_function_address(ENTRY)
        return _loaded[key]


def assembly(llvm_assembly: str) -> str:
    """The machine's own assembly for ``llvm_assembly``."""
    return str(_target_machine().emit_assembly(llvm.parse_assembly(llvm_assembly)))


def cache_directory() -> Path:
    """Where object files are kept: ``DESCEND_CACHE_DIR``, or the user's cache folder."""
    if chosen := os.environ.get("DESCEND_CACHE_DIR"):
        return Path(chosen)
    home = Path.home() if os.environ.get("HOME") or sys.platform == "win32" else Path(os.devnull)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    return base / "descend"


def _new_target_machine() -> Any:
    """A target machine that may be given away: an engine owns its own, and ends it with itself."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )


_target_machine = cache(_new_target_machine)


@cache
def _machine() -> str:
    versions = [version(package) for package in ("numba", "llvmlite")]
    features = llvm.get_host_cpu_features().flatten()
    return repr((versions, sys.version, sys.platform, platform.machine(), llvm.get_host_cpu_name(), features))


def _called_symbols(module: Any) -> list[str]:
    """The functions outside ``module`` that it calls; an error if one is missing, where LLVM would end the process."""
    declared = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    # Conversions without an instruction of their own become calls only in the code generator: __truncsfhf2 and such.
    generated = set(re.findall(r"(?<![\w.])__[a-z]\w+", _target_machine().emit_assembly(module)))
    names = sorted(declared | generated)
    missing = [name for name in names if not llvm.address_of_symbol(name)]
    if missing:
        raise NotImplementedError(f"this machine lacks {missing}, which the kernel calls. Pass backend='eager'.")
    return names


def _read(path: Path) -> bytes | None:
    """The object code in ``path``; None if there is none, or it is damaged, or what it calls is not loaded."""
    try:
        header, object_code = path.read_bytes().split(b"\n", 1)
        facts = json.loads(header)
        intact = facts["sha256"] == hashlib.sha256(object_code).hexdigest()
        complete = all(llvm.address_of_symbol(name) for name in facts["symbols"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return object_code if intact and complete else None


def _write(path: Path, object_code: bytes, symbols: list[str]) -> None:
    """Keep ``object_code``, all of it or nothing; a folder that cannot be written is no error."""
    facts = {"sha256": hashlib.sha256(object_code).hexdigest(), "symbols": symbols}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(facts).encode() + b"\n" + object_code)
        os.replace(temporary, path)
    except OSError:
        pass


def call(address: int, argument: int) -> None:
    """Run a kernel on the caller's thread, the interpreter lock released."""
    _prototype(address)(argument)


@cache
def _prototype(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


@cache
def locked(address: int) -> Any:
    """A kernel as a function of its argument that runs on the caller's thread, the interpreter lock kept."""
    return ctypes.PYFUNCTYPE(None, ctypes.c_int64)(address)
