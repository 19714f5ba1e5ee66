"""How numbers lie in memory: as a dtype, or in a format that needs more than one tensor or more than a cast.

A rule sees numbers in the compute dtype. A **format** says how a parameter or a state tensor is stored; kernels load
and store through it.

**8 bits.** A tensor of codes (uint8, in the shape of the parameter), and one of scales (float32), by the name of the
state with ``_scale``. A row is one index of the first dimension; a tensor of one dimension is one row. Each row is cut
into blocks of 256 numbers, the last of which may be shorter; so scales have the shape (rows, blocks), or (blocks,). A
number is the value of its code times the scale of its block. With exponent ``e`` and mantissa ``m``, the upper bits and
the four lower bits of a code, its value is

    2**e * (2 + m / 8) - 2             e up to 15, or up to 7 if numbers have a sign, which is the upper bit then

so that values are 0, 1/8, 2/8, ..., 2, 2 + 2/8, ..., 6, 6 + 4/8, ..., up to 126,974, or 494: evenly spaced up to 2,
and 3 to 8 % apart from 6 on. The scale is the block's largest magnitude divided by the largest value. Such codes are
bits of a float32, but for an addition and a shift.

Numbers go to the nearest value; or, at random, to one of the two beside them, with the number as expectation. But an
unsigned number that is not zero never becomes zero: AdamW divides by the root of its average square. Numbers that have
been decoded are encoded to themselves, at random, too.

Blocks do not cross rows, so that a step which touches some rows leaves the others alone, and rows may be sharded.

**bfloat16 without stalling.** ``Rounded("stochastic")``: a bfloat16 tensor, rounded up or down at random, so that the
expectation is exact. ``Rounded("compensated")``: what rounding to nearest has taken away is kept in an int16 tensor
called ``compensation``: the bits of a float32 are the bits of the bfloat16, shifted left by 16, plus that integer.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from descend.core.memory import PLAIN

BLOCK = 256  # numbers that share a scale
MIN_NUMEL = 4096  # smaller tensors are not worth it
MIN_WIDTH = 16  # nor are shorter rows: each has a scale
MIN_VECTOR = 65_536  # nor are biases and weights of norms, which ranks could not cut along blocks

SCALE = "_scale"
COMPENSATION = "compensation"

# The bits of float32 numbers.
TWO, INFINITY, NAN = 0x4000_0000, 0x7F80_0000, 0x7FC0_0000
MAGNITUDE = 0x7FFF_FFFF
SHIFT = 19  # of a code to where a float32 has its exponent
NOISE_HALF = 1 << (SHIFT - 17)  # half of the last bit of noise is added: exact numbers do not move
SMALLEST_SCALE = 2.0**-123  # the smallest value, an eighth of it, is not denormal


class Codec(NamedTuple):
    """Numbers of 8 bits, in blocks that share a scale.

    Attributes:
        signed: whether numbers may be negative.
        stochastic: whether they are rounded up or down at random, and not to the nearest.
    """

    signed: bool
    stochastic: bool = False

    @property
    def largest(self) -> int:
        """The largest code, without the sign."""
        return 127 if self.signed else 255

    @property
    def top(self) -> float:
        """The value of the largest code."""
        return 494.0 if self.signed else 126_974.0


class Rounded(NamedTuple):
    """bfloat16, in which steps that are smaller than its digits are not lost."""

    how: Literal["stochastic", "compensated"]


STOCHASTIC, COMPENSATED = Rounded("stochastic"), Rounded("compensated")

Format: TypeAlias = torch.dtype | Codec | Rounded
Formats: TypeAlias = tuple[Format, ...]  # of the parameter, the gradient and the state tensors of a rule


def element_dtype(format: Format) -> torch.dtype:
    """Dtype of the tensor that has an element for each number."""
    if isinstance(format, Codec):
        return torch.uint8
    return torch.bfloat16 if isinstance(format, Rounded) else format


def compute_dtype(formats: Formats) -> torch.dtype:
    """What a rule computes in: float64 if any of its tensors is, else float32."""
    return torch.float64 if torch.float64 in formats else torch.float32


@cache  # plans ask for each parameter
def is_plain(formats: Formats) -> bool:
    """Whether all of them are dtypes."""
    return all(isinstance(format, torch.dtype) for format in formats)


@cache
def needs_noise(formats: Formats) -> bool:
    """Whether anything is rounded at random."""
    return any(format.stochastic if isinstance(format, Codec) else format == STOCHASTIC for format in formats)


@cache
def stored_names(names: tuple[str, ...], formats: Formats) -> tuple[str, ...]:
    """Names of all tensors that a parameter's state has: those of the rule's state, then what their formats add.

    That is the compensation of the parameter, then scales in the order of the state. Launches get tensors in this
    order.
    """
    added = [COMPENSATION] if formats[0] == COMPENSATED else []
    scales = [name + SCALE for name, format in zip(names, formats[2:], strict=True) if isinstance(format, Codec)]
    return (*names, *added, *scales)


def stored_dtypes(formats: Formats) -> tuple[torch.dtype, ...]:
    """Dtypes of the parameter, the gradient, and of what ``stored_names`` lists, in that order."""
    added = [torch.int16] if formats[0] == COMPENSATED else []
    scales = [torch.float32 for format in formats[2:] if isinstance(format, Codec)]
    return (*map(element_dtype, formats), *added, *scales)


def scale_shape(shape: torch.Size) -> torch.Size:
    """Shape of the scales of a tensor of codes."""
    rows, width = rows_and_width(shape)
    blocks = -(-width // BLOCK)
    return torch.Size([rows, blocks] if len(shape) > 1 else [blocks])


def is_worth_coding(tensor: Tensor) -> bool:
    """Whether the state of a parameter is large enough for codes, and its blocks would lie whole on one rank."""
    if tensor.dim() < 2:
        return tensor.numel() >= MIN_VECTOR and type(tensor) in PLAIN
    return tensor.numel() >= MIN_NUMEL and rows_and_width(tensor.shape)[1] >= MIN_WIDTH


def rows_and_width(shape: torch.Size) -> tuple[int, int]:
    """How many rows a tensor of codes has, and how many numbers are in each."""
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], math.prod(shape[1:])


def keeps_blocks(shape: torch.Size, dim: int, parts: int) -> bool:
    """Whether no block of a tensor of codes is cut, if the tensor is, along ``dim`` into ``parts``, as ``Shard`` does.

    Any cut between rows keeps them. Within rows the parts must be equal, and each a contiguous piece of whole blocks;
    then the parts of codes and scales match.
    """
    if parts == 1 or (dim == 0 and len(shape) > 1):
        return True
    return dim <= 1 and shape[dim] % parts == 0 and rows_and_width(shape)[1] % (parts * BLOCK) == 0


# The reference: with torch's operations, on any device.


def decode(codes: Tensor, scale: Tensor, codec: Codec) -> Tensor:
    """The numbers that codes stand for: float32, in their shape."""
    wide = codes.to(torch.int32)
    bits, two = (wide & codec.largest) << SHIFT | TWO, torch.full_like(wide, TWO)
    if codec.signed:
        sign = (wide >> 7) << 31
        bits, two = bits | sign, two | sign
    value = bits.view(torch.float32) - two.view(torch.float32)
    rows, width = rows_and_width(codes.shape)
    blocks = scale.reshape(rows, -(-width // BLOCK))
    return (value.reshape(rows, width) * blocks.repeat_interleave(BLOCK, 1)[:, :width]).reshape(codes.shape)


def encode(numbers: Tensor, codec: Codec, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of numbers.

    A NaN or Inf makes its whole block NaN: codes are 0 there, and the scale is NaN or Inf. Scales below 2**-123 are
    raised to it, but for that of zeros; so no decoded number is denormal.

    Args:
        numbers: float32, of at least one dimension.
        codec: how to encode.
        noise: 16 bits for each number, in any integer dtype; only for a stochastic codec.
    """
    rows, width = rows_and_width(numbers.shape)
    padded = torch.nn.functional.pad(numbers.reshape(rows, width), (0, -width % BLOCK))
    padded = padded.view(rows, padded.shape[1] // BLOCK, BLOCK)
    # As integers, magnitudes are in the same order, and NaN is the largest.
    magnitude = padded.view(torch.int32) & MAGNITUDE
    largest = magnitude.amax(2)
    # Of tensors, divisions round to the nearest on every device; so encoding what was decoded changes nothing.
    scale = largest.view(torch.float32) / torch.full_like(largest, codec.top, dtype=torch.float32)
    scale = torch.where(largest > 0, torch.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale), 0.0)
    inverse = torch.where(largest > 0, torch.ones_like(scale) / scale, 0.0)
    value = magnitude.view(torch.float32) * inverse[..., None]
    up: Tensor | int = 1 << (SHIFT - 1)
    if noise is not None:
        noise = noise.reshape(rows, width).to(torch.int32)
        up = torch.nn.functional.pad(noise, (0, -width % BLOCK)).view(padded.shape) << (SHIFT - 16) | NOISE_HALF
    # What was decoded is now at most one unit in the last place away from where it was.
    code = ((value + 2).view(torch.int32) - TWO + up) >> SHIFT
    if codec.signed:
        code = torch.where(padded < 0, code | 128, code)
    else:
        code = torch.where(magnitude > 0, code.clamp(min=1), 0)
    code = torch.where((largest < INFINITY)[..., None], code, 0).flatten(1)[:, :width].reshape(numbers.shape)
    return code.to(torch.uint8), scale.reshape(scale_shape(numbers.shape))


def rounded_stochastically(numbers: Tensor, noise: Tensor) -> Tensor:
    """float32 numbers as bfloat16: up or down, by 16 bits of noise for each. NaN and Inf stay what they are."""
    bits = numbers.view(torch.int32)
    finite = (bits & INFINITY) != INFINITY
    moved = torch.where(finite, bits + noise.to(torch.int32), bits) & ~0xFFFF
    return torch.where(torch.isnan(numbers), numbers, moved.view(torch.float32)).to(torch.bfloat16)


def joined(high: Tensor, compensation: Tensor) -> Tensor:
    """The float32 numbers whose bits lie in a bfloat16 tensor and its compensation.

    The parameter may have been written since. Its old compensation is at most half a digit then; but bits below those
    of a zero would be NaN.
    """
    bits, low = high.view(torch.int16).to(torch.int32) << 16, compensation.to(torch.int32)
    return (bits + torch.where(bits & MAGNITUDE == 0, low.clamp(min=0), low)).view(torch.float32)


def split(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """float32 numbers as bfloat16, half-way cases rounded away from zero, and the compensation."""
    bits = torch.where(torch.isnan(numbers), NAN, numbers.view(torch.int32))
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)
