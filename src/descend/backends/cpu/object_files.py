"""Object files of compiled kernels: written once per machine and rule, loaded without a compiler.

Numba's own disk cache never finds functions that were made in a factory or typed at a prompt. Here a kernel is a C
function ``void f(int64_t address)``. Its file is named after a digest of everything that determines its code, and
contains a checksum over the same. Loading needs llvmlite, not Numba: a few milliseconds instead of a second.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from descend.backends.cpu import private_files

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
            # Making an engine also lets LLVM see the symbols of this process.
            engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _new_target_machine())
            full_key = f"{key}|{_machine()}"
            digest = hashlib.sha256(full_key.encode()).hexdigest()
            path = cache_directory() / f"{_readable(name)}-{digest[:40]}.o"
            object_code = _unpack(full_key, private_files.read(path) or b"")
            if object_code is None:
                # Ranks of one machine need the same kernels at the same time: one of them compiles each.
                with private_files.alone(path.parent, int(digest[:15], 16)):
                    object_code = _unpack(full_key, private_files.read(path) or b"")
                    if object_code is None:
                        object_code = _compile(full_key, path, compile_to_llvm)
            engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
            engine.finalize_object()
            _engines.append(engine)
            _loaded[key] = engine.get_function_address(ENTRY)
        return _loaded[key]


def _compile(full_key: str, path: Path, compile_to_llvm: Callable[[], str]) -> bytes:
    """The object code of a function, now also in the file ``path``."""
    module = llvm.parse_assembly(compile_to_llvm())
    symbols = _called_symbols(module)
    object_code: bytes = _target_machine().emit_object(module)
    private_files.write(path, _pack(full_key, object_code, symbols))
    return object_code


def _readable(name: str) -> str:
    """``name`` as part of a file's name: rules may be called ``<lambda>``, and anything else that is a string."""
    return re.sub(r"\W", "", name, flags=re.ASCII)[:40]


def machine_assembly(llvm_assembly: str) -> str:
    """Translate LLVM assembly to this machine's assembly."""
    return str(_target_machine().emit_assembly(llvm.parse_assembly(llvm_assembly)))


def cache_directory() -> Path:
    """The folder of object files: ``DESCEND_CACHE_DIR``, or ``descend`` in the user's cache folder."""
    if chosen := os.environ.get("DESCEND_CACHE_DIR"):
        return Path(chosen)
    home = Path.home() if os.environ.get("HOME") or sys.platform == "win32" else Path(os.devnull)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        chosen = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(chosen) if os.path.isabs(chosen) else home / ".cache"  # XDG: ignore relative paths
    return base / "descend"


def _new_target_machine() -> Any:
    """Make a target machine. An engine takes ownership of its own, and frees it."""
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
    """The external functions that ``module`` calls. Raise if one is missing, where LLVM would end the process."""
    declared = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    # Conversions without an instruction of their own become calls only in the code generator: __truncsfhf2 and such.
    generated = set(re.findall(r"(?<![\w.])__[a-z]\w+", _target_machine().emit_assembly(module)))
    names = sorted(declared | generated)
    missing = [name for name in names if not llvm.address_of_symbol(name)]
    if missing:
        raise NotImplementedError(f"this machine lacks {missing}, which the kernel calls. Pass backend='eager'.")
    return names


def _pack(key: str, object_code: bytes, symbols: list[str]) -> bytes:
    """The content of an object file: a checksum, the functions that the code calls, and the code."""
    content = " ".join(symbols).encode() + b"\n" + object_code
    return _checksum(key, content) + b"\n" + content


def _unpack(key: str, file: bytes) -> bytes | None:
    """The object code in ``file``; None if it is damaged, made for another key, or calls what is not loaded."""
    checksum, _, content = file.partition(b"\n")
    if checksum != _checksum(key, content):
        return None
    symbols, _, object_code = content.partition(b"\n")
    return object_code if all(map(llvm.address_of_symbol, symbols.decode().split())) else None


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()


def call(address: int, argument: int) -> None:
    """Run a kernel on this thread, without the interpreter lock."""
    _prototype(address)(argument)


@cache
def _prototype(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


@cache
def locked(address: int) -> Any:
    """A kernel as a function of its argument that runs on the caller's thread, the interpreter lock kept."""
    return ctypes.PYFUNCTYPE(None, ctypes.c_int64)(address)
