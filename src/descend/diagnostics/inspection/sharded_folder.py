"""Read a folder of ``torch.distributed.checkpoint``, whose index is a pickle, without running anything from it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descend.diagnostics.inspection.stored import Stored, wrapped
from descend.reporting.errors import UsageError

METADATA = ".metadata"

_KNOWN = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class _RefusedError(Exception):
    """The index names a class or function that no index needs."""


class _Unpickler(pickle._Unpickler):
    """An unpickler that makes stand-ins: the classes that the pickle names are never called, nor even imported.

    It is the one in Python: that in C allocates what a forged memo index asks for.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _KNOWN:
            return type(name, (_Record,), {})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in {("torch", "Size"), ("collections", "OrderedDict")}:
            return {"Size": tuple, "OrderedDict": dict}[name]
        raise _RefusedError(f"{module}.{name}")


class _Record:
    """What an object of the index consists of."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {"state": state}

    def __hash__(self) -> int:
        return id(self)

    def get(self, name: str) -> Any:
        """The field ``name``, None if the index has none."""
        return self.__dict__.get("fields", {}).get(name)


def read_folder(folder: Path) -> Any:
    """The content of the checkpoint as it was given to ``save``; tensors are read when they are asked for.

    Raises:
        UsageError: if it is damaged, or its index contains anything that an index does not need.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            index = _Unpickler(file).load()
        parts = _parts(index)
        entries = index.get("state_dict_metadata")
        flat = {name: _entry(folder, name, entry, parts.get(name, [])) for name, entry in entries.items()}
        paths = index.get("planner_data") or {}
        return _nested({name: (paths.get(name) or (name,), value) for name, value in flat.items()})
    except _RefusedError as error:
        raise UsageError(
            f"{folder / METADATA} holds {error}, which an index has no need of; it was not read further."
        ) from None
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{folder / METADATA} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(f"{folder / METADATA} is damaged: {type(error).__name__}: {error}") from None


def _parts(index: Any) -> dict[str, list[tuple[tuple[int, ...] | None, Any]]]:
    """For each entry the offset of every part in it, and where that part is stored."""
    parts: dict[str, list[tuple[tuple[int, ...] | None, Any]]] = {}
    for key, place in index.get("storage_data").items():
        parts.setdefault(key.get("fqn"), []).append((key.get("offset"), place))
    return parts


def _entry(folder: Path, name: str, entry: Any, parts: list[tuple[tuple[int, ...] | None, Any]]) -> Any:
    size = entry.get("size")
    if size is None:
        return wrapped(_part(folder, name, parts[0][1])) if parts else None
    dtype = entry.get("properties").fields["state"][0]
    shape = tuple(size)
    chunks = {tuple(chunk.get("offsets")): tuple(chunk.get("sizes")) for chunk in entry.get("chunks")}
    claimed = prod(shape) * dtype.itemsize
    held = sum(_length(folder, place) for _, place in parts)
    if claimed > held or any(len(at) != len(shape) for at in chunks):
        raise UsageError(f"{folder}: {name} claims {claimed:,} bytes, and the folder has {held:,} for it.")

    def load() -> Tensor:
        whole = torch.zeros(shape, dtype=dtype)
        for offset, place in parts:
            at = tuple(offset) if offset is not None else (0,) * len(shape)
            part = _part(folder, name, place)
            target = whole[tuple(slice(i, i + n) for i, n in zip(at, chunks.get(at, shape), strict=True))]
            if not isinstance(part, Tensor) or part.shape != target.shape:
                raise UsageError(f"{folder}: a part of {name} is damaged.")
            target.copy_(part)
        return whole

    return Stored(shape, dtype, load)


def _file(folder: Path, place: Any) -> Path:
    relative = place.get("relative_path")
    if not isinstance(relative, str) or Path(relative).name != relative:
        raise UsageError(f"{folder / METADATA} points to {relative!r:.80}, outside of its folder.")
    return folder / relative


def _length(folder: Path, place: Any) -> int:
    file = _file(folder, place)
    offset, length = place.get("offset"), place.get("length")
    there = file.stat().st_size if file.is_file() else -1
    if there < 0:
        raise UsageError(f"{folder}: {file.name} is missing.")
    if not 0 <= offset <= offset + length <= there:
        raise UsageError(f"{folder}: {file.name} is cut off: it has {there:,} bytes of {offset + length:,}.")
    return int(length)


def _part(folder: Path, name: str, place: Any) -> Any:
    length = _length(folder, place)
    file = _file(folder, place)
    with file.open("rb") as opened:
        opened.seek(place.get("offset"))
        content = opened.read(length)
    try:
        if content[:2] == b"PK":
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        from safetensors.torch import load

        return next(iter(load(content).values()))
    except Exception as error:  # a damaged pickle can raise anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{file}: {name} cannot be read without running code, or is damaged: {first[:160]}") from None


def _nested(flat: Mapping[str, tuple[Any, Any]]) -> Any:
    """The nested structure, from each entry's path in it; integers in a path are positions in a list."""
    root: dict[Any, Any] = {}
    for path, value in flat.values():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return _with_lists(root)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    entries = {key: _with_lists(value) for key, value in node.items()}
    if entries and all(isinstance(key, int) for key in entries) and sorted(entries) == list(range(len(entries))):
        return [entries[position] for position in range(len(entries))]
    return entries
