"""How a rule runs: on tensors, on lists of tensors, or compiled for CPUs or GPUs. A backend imports no rules.

The engine asks ``available`` which backends to try, in order of preference; eager takes whatever the others decline.
"""

from __future__ import annotations

from descend.backends.backend import Backend
from descend.backends.cpu.backend import CpuBackend
from descend.backends.eager import EagerBackend
from descend.backends.foreach import ForeachBackend
from descend.backends.triton.backend import TritonBackend
from descend.core.options import BACKENDS

EAGER: Backend = EagerBackend()
FOREACH: Backend = ForeachBackend()
_compiled: list[Backend] = [CpuBackend(), TritonBackend()]
_uncompiled: list[Backend] = [FOREACH]


def register(backend: Backend) -> None:
    """Let ``backend="auto"`` try one more backend, before those that are there, and let options name it."""
    _compiled.insert(0, backend)
    BACKENDS.append(backend.name)


def unregister(backend: Backend) -> None:
    """Undo ``register``."""
    _compiled.remove(backend)
    BACKENDS.remove(backend.name)


def available(requested: str) -> list[Backend]:
    """The backends to try before the eager one.

    Args:
        requested: a name, or ``"auto"`` for all.
    """
    return [backend for backend in (*_compiled, *_uncompiled) if requested in ("auto", backend.name)]
