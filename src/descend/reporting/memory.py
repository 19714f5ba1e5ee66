"""Memory of what optimizers keep, measured: the bytes behind tensors that exist."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the plain tensors on this rank in nested mappings and lists, such as L-BFGS's pairs.

    A subclass that wraps tensors yields those: a DTensor this rank's shard, torchao's 8-bit states codes and scales.
    """
    if isinstance(value, Tensor):
        wrapper: Any = value
        if hasattr(wrapper, "__tensor_flatten__"):
            for name in wrapper.__tensor_flatten__()[0]:
                yield from tensors(getattr(wrapper, name))
        else:
            yield value
    elif isinstance(value, Mapping | list | tuple | deque):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def memory(value: object) -> int:
    """Return the bytes of this rank's memory behind all tensors in ``value``.

    Storage that tensors share counts once, and lazily committed memory in full.

    Example:
        >>> import torch
        >>> whole = torch.zeros(6)
        >>> memory({"first": whole[:2], "second": whole[2:], "codes": [torch.zeros(8, dtype=torch.uint8)]})
        32
    """
    return sum(dict(map(_storage, tensors(value))).values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and size of the memory behind it."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or id(tensor), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a device or a layout without storage
        return id(tensor), tensor.nbytes
