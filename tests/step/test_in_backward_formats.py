"""Steps inside backward with state in 8 bits and rounded bfloat16: whatever comes first, the bits are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backward_cases import assert_same_params_and_state
from cases import params_of
from torch import Tensor

from descend import AdamW, in_backward

SHAPES = ((64, 70), (5,), (1, 4096))


def made(options: dict[str, Any]) -> AdamW:
    random = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=random).bfloat16().requires_grad_() for shape in SHAPES]
    groups = [dict(params=params[:1]), dict(params=params[1:], lr=0.02)]
    return AdamW(groups, lr=0.01, backend="eager", **options)


def backward(params: Sequence[Tensor], seed: int, order: Sequence[int]) -> None:
    """Gradients of some parameters, which come one after the other."""
    for index in order:
        random = torch.Generator().manual_seed(10 * seed + index)
        (params[index] * torch.randn(params[index].shape, generator=random).bfloat16()).sum().backward()


def train(options: dict[str, Any], orders: Sequence[Sequence[int]], inside: Callable[[AdamW], Any]) -> AdamW:
    optimizer = made(options)
    inside(optimizer)
    for seed, order in enumerate(orders):
        optimizer.zero_grad()
        backward(params_of(optimizer), seed, order)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "options", [dict(state_dtype="8bit", rounding="stochastic"), dict(rounding="compensated")], ids=str
)
def test_order_of_gradients_does_not_change_the_bits(options: dict[str, Any]) -> None:
    expected = train(options, [(0, 1, 2), (0, 1, 2), (1, 2), (0, 1, 2)], lambda optimizer: None)
    # The first parameter has taken one step less than the others.
    for orders in ([(0, 1, 2), (0, 1, 2), (1, 2), (0, 1, 2)], [(2, 0, 1), (1, 2, 0), (2, 1), (2, 1, 0)]):
        assert_same_params_and_state(train(options, orders, in_backward), expected)
    if options["rounding"] == "stochastic":
        other = train({**options, "rounding_seed": 1}, [(0, 1, 2)], in_backward)
        again = train(options, [(0, 1, 2)], in_backward)
        assert not any(map(torch.equal, params_of(other), params_of(again)))
