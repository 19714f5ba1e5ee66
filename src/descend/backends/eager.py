"""Runs a rule with torch's own operations: any device, any dtype, any layout, differentiable if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def run(
    rule: Callable[..., Any],
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    numbers: Sequence[Any],
    scale: float,
    differentiable: bool = False,
) -> None:
    """Apply ``rule`` to one parameter and write the results in place.

    Arithmetic is in float32, or wider where a tensor is; complex numbers are pairs of real ones, as in torch.
    ``differentiable`` keeps the graph: what the rule saw is cloned first, so that writing does not invalidate it.
    """
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    written = [as_real(tensor) for tensor in (param, *state)]
    seen = [tensor.clone() for tensor in written] if differentiable else written
    grad = as_real(grad)
    compute = torch.float32
    for tensor in (grad, *seen):
        compute = torch.promote_types(compute, tensor.dtype)
    first, *rest = [tensor.to(compute) for tensor in seen]
    grad = grad.to(compute)
    results = rule(first, grad if scale == 1 else grad * scale, *rest, *numbers)
    for tensor, result in zip(written, results if state else (results,), strict=True):
        tensor.copy_(result)


def run_rows(
    rule: Callable[..., Any],
    param: Tensor,
    index: tuple[Tensor, ...],
    grad: Tensor | None,
    state: Sequence[Tensor],
    numbers: Sequence[Any],
    scale: float = 1.0,
) -> None:
    """Apply ``rule`` to the rows of ``param`` and of the state tensors that ``index`` names, each once.

    Args:
        rule: the function to apply.
        param: the parameter.
        index: a list of indices for each of the first dimensions.
        grad: gradients of the rows; None for a rule that does not use them.
        state: state tensors.
        numbers: one value for all rows, or a tensor with one a row.
        scale: of the gradient.
    """
    # Not seen by autograd: rows may be brought up to date between a forward pass and its backward pass.
    tables = [tensor.data for tensor in (param, *state)]
    first, *rest = [table[index] for table in tables]
    aligned = [
        x.view(-1, *[1] * (as_real(first).dim() - 1)) if isinstance(x, Tensor) and x.dim() == 1 else x for x in numbers
    ]
    run(rule, first, first if grad is None else grad, rest, aligned, scale)
    for table, rows in zip(tables, (first, *rest), strict=True):
        table[index] = rows


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, in the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
