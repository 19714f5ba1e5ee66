"""Open a checkpoint: a file of ``torch.save``, safetensors, or a folder of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import importlib
import logging
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descend.diagnostics.inspection.sharded_folder import METADATA, read_folder
from descend.diagnostics.inspection.stored import Stored, wrapped
from descend.reporting.errors import UsageError

# What torch.save wrote before it wrote zip archives begins with this number, pickled.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)")
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer.pth")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: where it lies.
        kind: its format, in words.
        size: bytes on disk.
        content: dictionaries, lists, numbers and strings; every tensor is a ``Stored``.
    """

    path: Path
    kind: str
    size: int
    content: Any


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. No code from the file is run, whatever it contains.

    Raises:
        UsageError: if it cannot be read, and why.
    """
    if path.is_dir():
        if not (path / METADATA).is_file():
            inside = [name for name in _OPTIMIZER_FILES if (path / name).is_file()]
            hint = f" It has {path / inside[0]}: give that." if inside else ""
            raise UsageError(f"{path} is a folder without {METADATA}, so no distributed checkpoint.{hint}")
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return Checkpoint(path, "torch.distributed.checkpoint", size, read_folder(path))
    if not path.exists():
        raise UsageError(f"{path} does not exist.")
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if not head:
        raise UsageError(f"{path} is empty.")
    if head.startswith(b"PK"):
        _check_archive(path)
        return Checkpoint(path, "torch.save", size, _torch_content(path, mmap=True))
    if head.startswith(_LEGACY_MAGIC):
        return Checkpoint(path, "torch.save (legacy format)", size, _torch_content(path, mmap=False))
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= size - 8:
        return Checkpoint(path, "safetensors", size, _safetensors_content(path))
    if head.startswith(b"\x80"):
        raise UsageError(
            f"{path} is a plain pickle, which can run any code when it is read; inspect reads files of torch.save."
        )
    raise UsageError(
        f"{path} is no checkpoint: it is neither a file of torch.save nor safetensors. "
        "inspect also reads folders of torch.distributed.checkpoint."
    )


def _check_archive(path: Path) -> None:
    """Refuse archives that are cut off, or that claim more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}.") from None
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise UsageError(f"{path} is no checkpoint: torch.save never compresses, and {packed[0]!r} is compressed.")
    size = path.stat().st_size
    if sum(entry.file_size for entry in entries) > size or any(
        entry.header_offset + entry.file_size > size for entry in entries
    ):
        raise UsageError(f"{path} is damaged: its entries claim more than its {size:,} bytes.")
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise UsageError(f"{path} is a zip archive, but not one of torch.save.")


def _torch_content(path: Path, mmap: bool) -> Any:
    try:
        loaded = _load(path, mmap)
    except MemoryError:
        raise UsageError(f"{path} claims more memory than there is.") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(f"{path} {_why(error)}") from None
    try:
        return wrapped(loaded)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is no checkpoint: it is nested too deeply.") from None


def _load(path: Path, mmap: bool) -> Any:
    log = logging.getLogger("torch.distributed.device_mesh")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if "must be imported to load DTensors" not in str(error):
                raise
        importlib.import_module("torch.distributed.tensor")  # it tells torch.load which of its classes are data
        log.setLevel(logging.ERROR)  # the mesh of the file has no processes here, and needs none
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
        finally:
            log.setLevel(level)


def _why(error: Exception) -> str:
    text = str(error)
    found = _UNSAFE.search(text)
    if found:
        name = found.group(1) or found.group(2)
        return (
            f"holds {name}, which cannot be rebuilt without running code from the file; inspect never does. "
            "Save tensors, numbers, strings, lists and dictionaries only."
        )
    # What torch says before advises the user to let the file run code.
    lines = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
    return f"is damaged, or no checkpoint: {lines[0][:200]}"


def _safetensors_content(path: Path) -> dict[str, Stored]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UsageError("reading safetensors needs the package: pip install safetensors.") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _safetensor(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except UsageError:
        raise
    except Exception as error:  # SafetensorError has no public base
        raise UsageError(f"{path} is damaged, or no checkpoint: {error}") from None


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


def _safetensor(path: Path, name: str, header: Any) -> Stored:
    dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())

    def load() -> Tensor:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    if dtype is None:
        raise UsageError(f"{path}: {name} has the dtype {header.get_dtype()}, which inspect does not know.")
    return Stored(tuple(header.get_shape()), dtype, load)
