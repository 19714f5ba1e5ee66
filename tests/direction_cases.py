"""Curvature pairs (steps and the gradient changes they cause), for tests of quasi-Newton directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Pair = tuple[Tensor, Tensor]
CPU = torch.device("cpu")
NUMEL = 9
# Rounding, amplified by the condition number of the curvature.
RTOL = {torch.float64: 1e-9, torch.float32: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", RTOL, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """With short vectors threads only wait for each other. ``conftest.py`` restores their number."""
    torch.set_num_threads(1)


def random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def pairs(dtype: torch.dtype, seed: int = 0, numel: int = NUMEL) -> Iterator[Pair]:
    """Yield steps and the gradient changes they cause in a function whose curvature ranges from 1 to 100."""
    normal = random(seed)
    basis = torch.linalg.qr(normal(numel, numel)).Q
    while True:
        curvature = torch.logspace(0, 2, numel, dtype=torch.float64) * (1 + 0.5 * torch.rand(1).double())
        s = normal(numel).to(dtype)
        yield s, (basis @ (curvature * (basis.T @ s.double()))).to(dtype)


def double(values: Any) -> Array:
    array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(np.float64)


def assert_near(ours: Any, reference: Array, rtol: float) -> None:
    """Assert that the error is at most ``rtol`` times the largest entry of the reference."""
    np.testing.assert_allclose(double(ours), reference, rtol=0, atol=rtol * np.abs(reference).max())
