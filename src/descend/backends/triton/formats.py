"""Numbers in formats, as Triton compiles them: the same bits as the reference in ``core.codecs`` and ``core.noise``.

How a tensor is stored is an integer: a sum of the flags below, or ``PLAIN``. The numbers at hand have the shape
(blocks, 256), or fewer columns where all rows are shorter; those of a block share a scale.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from descend.backends.triton.kernels import load, store
from descend.core.codecs import INFINITY, MAGNITUDE, NAN, NOISE_HALF, SHIFT, SMALLEST_SCALE, TWO, Codec
from descend.core.noise import FIRST_MULTIPLIER, MASK32, SECOND_MULTIPLIER, second_multiplier

PLAIN = 0
RANDOM = 1  # rounded at random
HALF = 2  # the upper half of a float32, as int16
KEPT = 4  # with what rounding has taken away from it, as int16
CODES = 8  # codes, and a scale a block
SIGNED = 16  # codes that have a sign

SIGNED_TOP, UNSIGNED_TOP = Codec(signed=True).top, Codec(signed=False).top
NEXT_MULTIPLIER = second_multiplier(1) - SECOND_MULTIPLIER  # the same from word to word


def read(
    pointer: Any,
    beside: Any,
    at: Any,
    block: Any,
    mask: Any,
    present: Any,
    HOW: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> Any:
    """Numbers in the dtype of the arithmetic; 0 where there are none.

    Args:
        pointer: to the first element.
        beside: to the first element of its scales, or of its compensation.
        at: which elements.
        block: which blocks they are.
        mask: which of the elements exist.
        present: which of the blocks exist.
        HOW: the format.
        COMPUTE: the dtype.
    """
    if HOW & CODES:
        codes = tl.load(pointer + at, mask, 0).to(tl.int32)
        value = decode(codes, HOW & SIGNED) * tl.load(beside + block, present, 0.0)[:, None]
    elif HOW & HALF:
        value = tl.load(pointer + at, mask, 0).to(tl.int32) << 16
        if HOW & KEPT:
            low = tl.load(beside + at, mask, 0).to(tl.int32)
            value += tl.where((value & MAGNITUDE) == 0, tl.maximum(low, 0), low)  # see core.codecs.joined
        value = value.to(tl.float32, bitcast=True)
    else:
        value = load(pointer + at, mask, COMPUTE)
    return value.to(COMPUTE)


def write(
    pointer: Any,
    beside: Any,
    at: Any,
    block: Any,
    mask: Any,
    present: Any,
    value: Any,
    noise: Any,
    COLUMN: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """Store numbers.

    Args:
        pointer, beside, at, block, mask, present, HOW: see ``read``.
        value: the numbers.
        noise: of the places, see ``hashed``; and the second of ``core.noise.words``.
        COLUMN: see ``core.noise.sixteen_bits``.
    """
    random: Any = sixteen_bits(noise[0], noise[1], COLUMN) if HOW & RANDOM else 0
    if HOW & CODES:
        codes, scale = encode(value.to(tl.float32), mask, random, HOW & SIGNED, HOW & RANDOM)
        tl.store(pointer + at, codes.to(tl.uint8), mask)
        tl.store(beside + block, scale, present)
    elif HOW & HALF:
        value = value.to(tl.float32)
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), NAN)
        if HOW & KEPT:
            high = (bits + 0x8000) >> 16
            tl.store(beside + at, (bits - (high << 16)).to(tl.int16), mask)
        else:
            is_finite = (bits & INFINITY) != INFINITY
            high = tl.where(is_finite, bits + random.to(tl.int32), bits) >> 16
        tl.store(pointer + at, high.to(tl.int16), mask)
    else:
        store(pointer + at, value, mask, pointer.dtype.element_ty)


def decode(codes: Any, SIGNED: tl.constexpr) -> Any:
    """The values of codes: float32. See ``core.codecs.decode``."""
    bits, two = (codes & (127 if SIGNED else 255)) << SHIFT | TWO, codes * 0 + TWO
    if SIGNED:
        sign = (codes >> 7) << 31
        bits, two = bits | sign, two | sign
    return bits.to(tl.float32, bitcast=True) - two.to(tl.float32, bitcast=True)


def encode(value: Any, mask: Any, random: Any, SIGNED: tl.constexpr, IS_RANDOM: tl.constexpr) -> Any:
    """Codes, int32, and scales; ``random`` has 16 bits for each number. See ``core.codecs.encode``."""
    # As integers, magnitudes are in the same order, and NaN is the largest.
    magnitude = tl.where(mask, value.to(tl.int32, bitcast=True) & MAGNITUDE, 0)
    top, one = largest(magnitude), tl.full((), 1, tl.float32)
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), one * (SIGNED_TOP if SIGNED else UNSIGNED_TOP))
    scale = tl.where(top > 0, tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale), 0.0)
    inverse = tl.where(top > 0, tl.div_rn(one, scale), 0.0)
    # The minimum changes nothing. Without it the product would be fused with the sum, and round otherwise.
    unit = tl.minimum(magnitude.to(tl.float32, bitcast=True) * inverse[:, None], 2 * UNSIGNED_TOP)
    up = random.to(tl.int32) << (SHIFT - 16) | NOISE_HALF if IS_RANDOM else 1 << (SHIFT - 1)
    code = ((unit + 2).to(tl.int32, bitcast=True) - TWO + up) >> SHIFT
    code = tl.where(value < 0, code | 128, code) if SIGNED else tl.where(magnitude > 0, tl.maximum(code, 1), 0)
    return tl.where((top < INFINITY)[:, None], code, 0), scale


def largest(x: Any) -> Any:
    """The largest of each row of ``x``."""
    return tl.max(x, 1)


def largest_by_interpreter(x: Any) -> Any:
    """The same, see ``kernels.added_by_interpreter``."""
    return tl.reduce(x, 1, tl.standard._elementwise_max)


def hashed(places: Any, first: Any) -> Any:
    """What all noise of places starts from, uint32, with the first of ``core.noise.words``."""
    x = places + first.to(tl.uint32)
    x ^= x >> 16
    x *= FIRST_MULTIPLIER
    return x ^ (x >> 15)


def sixteen_bits(hashed: Any, second: Any, COLUMN: tl.constexpr) -> Any:
    """Of ``hashed`` places, uint32, with the second of ``core.noise.words``. See ``core.noise.sixteen_bits``."""
    x = (hashed + second) * ((SECOND_MULTIPLIER + COLUMN // 4 * NEXT_MULTIPLIER) & MASK32)
    x ^= x >> 16
    if COLUMN % 4 >= 2:
        x = (x << 8) | (x >> 24)
    return x & 0xFFFF if COLUMN % 2 else x >> 16
