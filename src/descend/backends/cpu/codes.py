"""The 8-bit codes and the rounding of ``core.codecs``, and the noise of ``core.noise``, as LLVM instructions.

Each function emits instructions for one number; loops over numbers are vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir as llvm_ir

from descend.core.codecs import INFINITY, MAGNITUDE, NAN, NOISE_HALF, SHIFT, SMALLEST_SCALE, TWO, Codec
from descend.core.noise import FIRST_MULTIPLIER, GOLDEN64, MASK32, MIX1, MIX2, second_multiplier

BYTE, I16, I32, I64, F32, F64 = (
    *(llvm_ir.IntType(bits) for bits in (8, 16, 32, 64)),
    llvm_ir.FloatType(),
    llvm_ir.DoubleType(),
)  # fmt: skip
# The flag of operations that must round as torch's do: it keeps off those of kernels, which allow fused multiply-adds.
ROUNDED = ("nsz",)


def word(value: int) -> Any:
    """A constant of 32 bits."""
    return llvm_ir.Constant(I32, value & MASK32)


def real(value: float) -> Any:
    """A float32 constant."""
    return llvm_ir.Constant(F32, value)


def bits_of(builder: Any, number: Any) -> Any:
    """The bits of a float32."""
    return builder.bitcast(number, I32)


def magnitude_bits(builder: Any, number: Any) -> Any:
    """The bits of a float32 without its sign. As integers they are in the order of magnitudes, and NaN is largest."""
    return builder.and_(bits_of(builder, number), word(MAGNITUDE))


def decoded(builder: Any, code: Any, scale: Any, codec: Codec) -> Any:
    """The float32 that a code stands for."""
    two, wide = word(TWO), builder.sext(code, I32) if codec.signed else builder.zext(code, I32)
    bits = builder.shl(wide, word(SHIFT))
    if codec.signed:
        sign = 1 << 31
        bits = builder.and_(bits, word(sign | codec.largest << SHIFT))
        two = builder.or_(builder.and_(wide, word(sign)), two)
    value = builder.fsub(builder.bitcast(builder.or_(bits, word(TWO)), F32), builder.bitcast(two, F32), flags=ROUNDED)
    return builder.fmul(value, scale, flags=ROUNDED)


def scale_of(builder: Any, largest: Any, codec: Codec) -> tuple[Any, Any, Any]:
    """The scale of a block, from the bits of its largest magnitude, and the two numbers that ``encoded`` takes."""
    is_zero = builder.icmp_unsigned("==", largest, word(0))
    scale = builder.fdiv(builder.bitcast(largest, F32), real(codec.top), flags=ROUNDED)
    is_small = builder.fcmp_ordered("<", scale, real(SMALLEST_SCALE))
    scale = builder.select(is_small, real(SMALLEST_SCALE), scale)
    inverse = builder.fdiv(real(1.0), scale, flags=ROUNDED)
    is_finite = builder.icmp_unsigned("<", largest, word(INFINITY))
    return (
        builder.select(is_zero, real(0.0), scale),
        builder.select(is_zero, real(0.0), inverse),
        builder.sext(is_finite, I32),
    )


def encoded(builder: Any, number: Any, inverse: Any, mask: Any, codec: Codec, noise: Any = None) -> Any:
    """The code of a float32, 8 bits.

    Args:
        builder: emits the instructions.
        number: the number; its magnitude, if the code is unsigned.
        inverse: of the scale, see ``scale_of``.
        mask: all bits, but none if the block is not finite.
        codec: how to encode.
        noise: 16 bits, 32 bits wide; only for a stochastic codec.
    """
    value = builder.fmul(number, inverse, flags=ROUNDED)
    if codec.signed:
        value = builder.bitcast(builder.and_(bits_of(builder, value), builder.and_(mask, word(MAGNITUDE))), F32)
    bits = bits_of(builder, builder.fadd(value, real(2.0), flags=ROUNDED))
    if noise is None:
        bits = builder.add(bits, word((1 << (SHIFT - 1)) - TWO))
    else:
        bits = builder.add(builder.add(bits, word(NOISE_HALF - TWO)), builder.shl(noise, word(SHIFT - 16)))
    code = builder.lshr(bits, word(SHIFT))
    if codec.signed:
        is_negative = builder.fcmp_ordered("<", number, real(0.0))
        sign = builder.and_(mask, word(128))
        return builder.trunc(builder.select(is_negative, builder.or_(code, sign), code), BYTE)
    code = builder.select(builder.icmp_signed(">", code, word(1)), code, word(1))
    is_zero = builder.icmp_unsigned("==", builder.and_(bits_of(builder, number), mask), word(0))
    return builder.trunc(builder.select(is_zero, word(0), code), BYTE)


def rounded_stochastically(builder: Any, number: Any, noise: Any) -> Any:
    """The bits of a bfloat16: a float32, rounded up or down by 16 bits of noise. NaN and Inf stay what they are."""
    moved = builder.add(bits_of(builder, number), noise)  # of Inf, the upper half stays
    is_nan = builder.fcmp_unordered("uno", number, number)
    return upper_half(builder, builder.select(is_nan, word(NAN), moved))


def upper_half(builder: Any, bits: Any) -> Any:
    """The upper 16 of 32 bits."""
    return builder.trunc(builder.lshr(bits, word(16)), I16)


def joined(builder: Any, high: Any, compensation: Any) -> Any:
    """The float32 whose bits lie in a bfloat16 and its compensation, see ``core.codecs.joined``."""
    bits, low = builder.shl(builder.zext(high, I32), word(16)), builder.sext(compensation, I32)
    is_zero = builder.icmp_unsigned("==", builder.and_(bits, word(MAGNITUDE)), word(0))
    is_below = builder.and_(is_zero, builder.icmp_signed("<", low, word(0)))
    return builder.bitcast(builder.add(bits, builder.select(is_below, word(0), low)), F32)


def split(builder: Any, number: Any) -> tuple[Any, Any]:
    """The bits of the bfloat16 nearest to a float32, and the compensation."""
    is_nan = builder.fcmp_unordered("uno", number, number)
    bits = builder.select(is_nan, word(NAN), bits_of(builder, number))
    # What is left is the lower half, as a signed number.
    return upper_half(builder, builder.add(bits, word(0x8000))), builder.trunc(bits, I16)


def noise_words(builder: Any, key: Any, number: Any) -> tuple[Any, Any]:
    """The two 32-bit words that one step of one parameter starts from, see ``noise.words``."""

    def long(value: int) -> Any:
        return llvm_ir.Constant(I64, value)

    x = builder.add(key, builder.mul(number, long(GOLDEN64)))
    x = builder.mul(builder.xor(x, builder.lshr(x, long(30))), long(MIX1))
    x = builder.mul(builder.xor(x, builder.lshr(x, long(27))), long(MIX2))
    x = builder.xor(x, builder.lshr(x, long(31)))
    return builder.trunc(x, I32), builder.trunc(builder.lshr(x, long(32)), I32)


class Noise:
    """The noise of one element, as it is asked for: four columns share a hash.

    Args:
        builder: emits the instructions.
        words: see ``noise_words``.
        place: of the element, its lower 32 bits.
    """

    def __init__(self, builder: Any, words: Sequence[Any], place: Any) -> None:
        self._builder, self._words, self._place = builder, words, place
        self._hashes: dict[int, Any] = {}
        self._first: Any = None

    def sixteen_bits(self, column: int) -> Any:
        """What ``core.noise.sixteen_bits`` gives, 32 bits wide."""
        builder, four = self._builder, column // 4
        if four not in self._hashes:
            self._hashes[four] = self._hash(four)
        bits = self._hashes[four]
        if column % 4 >= 2:
            bits = builder.or_(builder.shl(bits, word(8)), builder.lshr(bits, word(24)))
        return builder.and_(bits, word(0xFFFF)) if column % 2 else builder.lshr(bits, word(16))

    def _hash(self, four: int) -> Any:
        builder, (first, second) = self._builder, self._words
        if self._first is None:  # the part that all columns share
            x = builder.add(self._place, first)
            x = builder.mul(builder.xor(x, builder.lshr(x, word(16))), word(FIRST_MULTIPLIER))
            self._first = builder.add(builder.xor(x, builder.lshr(x, word(15))), second)
        x = builder.mul(self._first, word(second_multiplier(four)))
        return builder.xor(x, builder.lshr(x, word(16)))
