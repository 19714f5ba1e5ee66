"""How a rule runs: on tensors, on lists of tensors, or compiled for CPUs or GPUs. A backend imports no rules.

The engine asks ``available`` which backends to try, in order of preference; eager takes whatever the others decline.
"""

from __future__ import annotations

from descend.backends.backend import Backend
from descend.backends.cpu.backend import CpuBackend
from descend.backends.eager import EagerBackend
from descend.backends.foreach import ForeachBackend
from descend.backends.matrix import MatrixBackend
from descend.backends.triton.backend import TritonBackend
from descend.core.options import BACKENDS
from descend.core.signature import Kind

EAGER: Backend = EagerBackend()
FOREACH: Backend = ForeachBackend()
MATRIX: Backend = MatrixBackend()
_registered: list[Backend] = []
_of_elements: list[Backend] = [CpuBackend(), TritonBackend(), FOREACH]


def register(backend: Backend) -> None:
    """Let ``backend="auto"`` try one more backend, before those that are there, and let options name it."""
    _registered.insert(0, backend)
    BACKENDS.append(backend.name)


def unregister(backend: Backend) -> None:
    """Undo ``register``."""
    _registered.remove(backend)
    BACKENDS.remove(backend.name)


def available(requested: str, kind: Kind = "element") -> list[Backend]:
    """The backends to try before the eager one.

    Args:
        requested: a name, or ``"auto"`` for all. A name says how rules of elements run. Unless it is that of the eager
            backend, rules of matrices have their own beside it.
        kind: of the rule.
    """
    if kind == "matrix" and requested != EAGER.name:
        return [*(backend for backend in _registered if requested in ("auto", backend.name)), MATRIX]
    every = [*_registered, *_of_elements]
    return every if requested == "auto" else [backend for backend in (*every, MATRIX) if backend.name == requested]
