"""A small model and its loss, for tests of steps inside backward."""

from __future__ import annotations

import torch
from cases import assert_same_bits, params_of, state_of
from torch import Tensor, nn

from descend import FirstOrder


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a few layers, one of them used twice."""
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(5, 6), shared, nn.Tanh(), shared, nn.Linear(6, 3)).to(dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.tanh(model(inputs(seed, dtype)).float()).square().sum()


def assert_same_params_and_state(one: FirstOrder, other: FirstOrder) -> None:
    """Assert that parameters and state of two optimizers are equal bit for bit."""
    assert all(map(torch.equal, params_of(one), params_of(other)))
    assert_same_bits(state_of(one), state_of(other))
