"""Triton's interpreter runs kernels on CPU tensors; without it they are compiled for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def interpreter() -> Iterator[None]:
    """Run kernels on CPU tensors. Kernels are made apart for the interpreter, so both kinds of test share a process."""
    knobs = pytest.importorskip("triton").knobs
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        yield
