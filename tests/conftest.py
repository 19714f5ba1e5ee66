"""Every test starts from the same random numbers and leaves torch's settings as it found them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from descend.backends.cpu import probe


@pytest.fixture(autouse=True)
def clean_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "DESCEND_TEST_BACKEND" in os.environ:  # mutants of rules are wrapped, which no compiler takes: see `make mutate`
        monkeypatch.setenv("DESCEND_BACKEND", os.environ["DESCEND_TEST_BACKEND"])
    else:
        monkeypatch.delenv("DESCEND_BACKEND", raising=False)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    # Torch warns once per process about sparse tensors until somebody decides.
    torch.sparse.check_sparse_tensor_invariants.disable()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=["native", "python"])
def either_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the probe in native code, and with the one in Python."""
    if request.param == "python":
        monkeypatch.setattr(probe, "_bindings", lambda: None)
    return request.param
