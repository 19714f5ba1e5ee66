"""How a rule runs: eagerly on tensors (``eager``) or compiled for CPUs (``cpu``). Kernels know no rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "cpu")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_cpu(param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why the compiled CPU backend cannot run this parameter; None if it can."""
    for name, tensor in (("", param), ("gradient ", grad), *((f"{key} ", value) for key, value in state)):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name}is a {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"{name}on {tensor.device}"
        if tensor.layout != torch.strided:
            return f"{name}layout {tensor.layout}"
        if tensor.dtype not in _DTYPES:
            return f"{name}dtype {tensor.dtype}"
        if tensor.shape != param.shape or not _same_order(tensor, param):
            return f"{name}shape {tuple(tensor.shape)} stride {tensor.stride()} differs from the parameter's"
        if tensor.is_neg() or tensor.is_inference():
            return f"{name}is an inference tensor or a lazy negation"
    return None if _is_dense(param) else f"not dense in memory (stride {param.stride()})"


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


def span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address (exclusive) of a CPU tensor's memory; None if it has none to compare."""
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return None
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize
