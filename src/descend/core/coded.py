"""Codes and scales of files: what is wrong with them, and converting them without much memory.

``codecs.decode`` and ``encode`` need several times the memory of what they convert. A file may hold tensors of any
size, so they are given some rows at a time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from descend.core.codecs import SCALE, Codec, decode, encode, rows_and_width, scale_shape

PIECE = 1 << 20  # numbers converted together


class Form(Protocol):
    """A tensor, or what is known of one that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def fault_of(name: str, codes: Form | None, scale: Form | None) -> str | None:
    """Why the state called ``name`` cannot be decoded, in words; None if it can, or if it is not coded.

    Args:
        name: of the state.
        codes: the tensor of that name.
        scale: the tensor of that name with ``_scale``.
    """
    is_coded = codes is not None and codes.dtype == torch.uint8
    if scale is None:
        return f"{name} has codes of 8 bits, and {name}{SCALE} is missing" if is_coded else None
    if codes is None:
        return f"{name}{SCALE} is there, and {name} is missing"
    if not is_coded:
        return f"{name} has {name}{SCALE}, so it must be torch.uint8, got {codes.dtype}"
    if scale.dtype != torch.float32:
        return f"{name}{SCALE} must be torch.float32, got {scale.dtype}"
    if tuple(scale.shape) != (expected := tuple(scale_shape(torch.Size(codes.shape)))):
        return f"{name}{SCALE} has shape {tuple(scale.shape)}, expected {expected}"
    return None


def negative_scale(name: str, scale: Tensor) -> str | None:
    """The smallest negative scale, in words; None if there is none. NaN and Inf are those of their blocks."""
    if scale.is_meta:
        return None
    negative = scale[scale < 0]
    return f"{name}{SCALE} must be >= 0, got {float(negative.min()):g}" if negative.numel() else None


def decoded(codes: Tensor, scale: Tensor, codec: Codec) -> Tensor:
    """The numbers that codes stand for: float32, in their shape."""
    if codes.dim() < 2:
        return decode(codes, scale, codec)
    numbers = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in _pieces(codes):
        numbers[rows] = decode(codes[rows], scale[rows], codec)
    return numbers


def encoded(numbers: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Codes and scales of numbers of any floating dtype, rounded to nearest."""
    if numbers.dim() < 2:
        return encode(numbers.float().contiguous(), codec)
    codes = torch.empty(numbers.shape, dtype=torch.uint8, device=numbers.device)
    scale = torch.empty(scale_shape(numbers.shape), dtype=torch.float32, device=numbers.device)
    for rows in _pieces(numbers):
        codes[rows], scale[rows] = encode(numbers[rows].float().contiguous(), codec)
    return codes, scale


def _pieces(tensor: Tensor) -> list[slice]:
    rows, width = rows_and_width(tensor.shape)
    count = max(1, PIECE // max(1, width))
    return [slice(start, start + count) for start in range(0, rows, count)]
