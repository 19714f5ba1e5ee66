"""A model whose parameters are in another dtype than its task's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def convert_(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters and buffers of ``model`` in place.

    When it is called, inputs become ``dtype``, and outputs what its parameters were: losses are computed as without
    conversion.
    """
    before = next(model.parameters()).dtype
    model.to(dtype)
    model.register_forward_pre_hook(partial(_convert_inputs, dtype))
    model.register_forward_hook(partial(_convert_outputs, before))


def _convert_inputs(dtype: torch.dtype, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_converted(value, dtype) for value in inputs)


def _convert_outputs(dtype: torch.dtype, _: nn.Module, __: object, outputs: Any) -> Any:
    return _converted(outputs, dtype)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
