"""Which tensors compiled backends can take, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.core.memory import PLAIN, row_width
from descend.core.signature import signature

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


_KINDS = {"element": None, "row": "a rule of rows", "matrix": "a rule of whole matrices"}


def why_not_kind(rule: Callable[..., Any] | None) -> str | None:
    """Why a rule cannot be applied to one element after the other; None if it can."""
    return None if rule is None else _KINDS[signature(rule).kind]


def why_not(param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why a parameter cannot be updated in the order of its memory; None if it can."""
    if reason := _unsuitable(param):
        return reason
    if not _is_dense(param):
        return f"not dense in memory (stride {param.stride()})"
    for name, tensor in state if grad is None else (("gradient", grad), *state):
        if tensor.device != param.device:
            return f"{name}: on {tensor.device}"
        if reason := _unsuitable(tensor):
            return f"{name}: {reason}"
        if tensor.shape != param.shape or not _same_order(tensor, param):
            return f"{name}: shape {tuple(tensor.shape)} stride {tensor.stride()} differs from the parameter's"
    return None


def why_not_by_rows(
    rule: Callable[..., Any], longest: int, param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]
) -> str | None:
    """Why a rule of rows cannot update a parameter row by row, in the order of its memory; None if it can.

    Args:
        rule: the rule.
        longest: most elements of a row.
        param: the parameter.
        grad: its gradient, if that is dense.
        state: names and tensors, each of one number a row.
    """
    if not signature(rule).state:
        return "a rule of rows without state"
    if row_width(param) > longest:
        return f"rows of {row_width(param):,} elements, more than {longest:,}"
    for name, tensor in (("", param), *state):
        if not tensor.is_contiguous():
            return f"{name or 'rows'}: not contiguous (stride {tensor.stride()})"
        if tensor.device != param.device:
            return f"{name}: on {tensor.device}"
        if reason := _unsuitable(tensor):
            return f"{name}: {reason}" if name else reason
    return why_not(param, grad, ())


def why_not_rows(param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why single rows of a parameter cannot be updated; None if they can."""
    for _, tensor in (("", param), *state):
        if not tensor.is_contiguous():
            return f"rows that are not contiguous (stride {tensor.stride()})"
    return why_not(param, None, state)


def why_not_formats(param: Tensor, stored: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why a parameter that ``why_not`` accepts cannot have codes, scales, compensation or noise; None if it can."""
    for name, tensor in (("", param), *stored):
        # Blocks, and the places of noise, are in the logical order of elements.
        if not tensor.is_contiguous():
            return f"{name or 'formats that are no dtypes'}: not contiguous (stride {tensor.stride()})"
        if tensor.device != param.device:
            return f"{name}: on {tensor.device}"
        if type(tensor) not in PLAIN:
            return f"{name}: a {type(tensor).__name__}"
    return None


def _unsuitable(tensor: Tensor) -> str | None:
    if type(tensor) not in PLAIN:
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype}"
    return "an inference tensor or a lazy negation" if tensor.is_inference() or tensor.is_neg() else None


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory are equal elements."""
    if a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()):
        return True
    return all(s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, each place once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
