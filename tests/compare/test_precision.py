"""A model in another dtype: inputs and parameters are converted, outputs are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from descend.compare.precision import convert_


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_outputs_stay_what_they_were(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    inside: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: inside.append(output))
    convert_(model, dtype)
    duplicate = copy.deepcopy(model)
    assert {param.dtype for param in duplicate.parameters()} == {dtype}
    output = duplicate(torch.randn(5, 3))
    assert inside[-1].dtype == dtype
    assert output.dtype == torch.float32
    output.sum().backward()
    assert {param.grad.dtype for param in duplicate.parameters()} == {dtype}  # type: ignore[union-attr]


def test_integers_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Embedding(3, 2))
    convert_(model, torch.bfloat16)
    assert model(torch.tensor([2])).dtype == torch.float32
