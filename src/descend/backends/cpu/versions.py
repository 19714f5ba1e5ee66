"""Version counters: autograd, and whoever else asks, sees that a step has written to the parameters.

``torch.autograd.graph.increment_version`` takes 45 ns a parameter; the C++ function behind it, called from the compiled
sequence of a step, takes a tenth of that. Its name is not a stable interface: at first use it is looked up and tried,
and where it is missing or does something else, torch's function is used.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from descend.backends.cpu import library, object_files
from descend.backends.cpu.probe import tensor_offset
from descend.backends.cpu.threads import Call

_BUMP = (
    "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"  # void torch::autograd::impl::bump_version(const Tensor&)
)


class Versions:
    """The version counters of some plain CPU tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._table = array("q")
        if (function := _bump_version()) is not None:
            offset = tensor_offset()
            self._table = array("q", [function, len(tensors), *(id(tensor) + offset for tensor in tensors)])

    def calls(self) -> list[Call]:
        """The call that adds one to each; none if ``bump`` has to."""
        return [Call(library.versions(), self._table.buffer_info()[0])] if self._table else []

    def bump(self) -> None:
        """Add one to each, unless ``calls`` does."""
        if not self._table:
            torch.autograd.graph.increment_version(self._tensors)


@cache
def _bump_version() -> int | None:
    """Address of the C++ function; None if this torch has it not, or it does something else."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(getattr(torch_cpu, _BUMP), ctypes.c_void_p).value
        offset = tensor_offset()
    except (OSError, AttributeError, ValueError):  # not Linux, or a torch that is built otherwise
        return None
    with torch.inference_mode(False):
        tensor = torch.zeros(1, device="cpu")
    table = array("q", [address or 0, 1, id(tensor) + offset])
    object_files.call(library.versions(), table.buffer_info()[0])
    return address if tensor._version == 1 else None
