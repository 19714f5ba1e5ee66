"""Every test starts with the same random seed, and torch's settings are restored after it.

Tests marked ``gpu`` have their tensors on a GPU; without one they are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from browser import browser  # noqa: F401, a fixture
from cases import on

from descend.backends.cpu import probe


@pytest.fixture(autouse=True)
def clean_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "DESCEND_TEST_BACKEND" in os.environ:  # `make mutate` wraps rules in functions that cannot be compiled
        monkeypatch.setenv("DESCEND_BACKEND", os.environ["DESCEND_TEST_BACKEND"])
    else:
        monkeypatch.delenv("DESCEND_BACKEND", raising=False)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    # Otherwise torch warns once per process that sparse tensors are not checked.
    torch.sparse.check_sparse_tensor_invariants.disable()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def tensors_on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with on(torch.device("cuda")):
        yield


@pytest.fixture(params=["native", "python"])
def either_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the native probe and with the Python probe."""
    if request.param == "python":
        monkeypatch.setattr(probe, "_bindings", lambda: None)
    return request.param
