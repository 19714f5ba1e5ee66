"""Noise for stochastic rounding: 32 bits for each place of a tensor, from a hash of a counter.

What an element gets depends on the seed, the parameter, its step and the element's place in the parameter, and on
nothing else: not on threads, chunks or ranks. The same hash runs in every backend.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MASK32, MASK64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
FIRST_MULTIPLIER, SECOND_MULTIPLIER = 0x7FEB_352D, 0x846C_A68B  # of "lowbias32", by C. Wellons
MIX1, MIX2 = 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB  # of SplitMix64
GOLDEN64 = 0x9E37_79B9_7F4A_7C15


class Stream(NamedTuple):
    """Where a parameter's noise comes from.

    Attributes:
        number: the parameter's number in its optimizer.
        place: of its first element here; of shards, in the whole parameter.
    """

    number: int
    place: int


def mixed(x: int) -> int:
    """A 64-bit hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> 30)) * MIX1 & MASK64
    x = (x ^ (x >> 27)) * MIX2 & MASK64
    return x ^ (x >> 31)


def step_key(seed: int, step: int) -> int:
    """64 bits for each step of all parameters that have taken as many."""
    return mixed((mixed(seed & MASK64) + step * GOLDEN64) & MASK64)


def words(key: int, number: int) -> tuple[int, int]:
    """The two 32-bit words that one step of one parameter starts from."""
    both = mixed((key + number * GOLDEN64) & MASK64)
    return both & MASK32, both >> 32


def second_multiplier(four: int) -> int:
    """What the last product is with, for the columns that share a word. The hash up to there is the same for all."""
    # Two sums of the same number with different constants would be correlated after one product.
    return (SECOND_MULTIPLIER + four * 0x9E37_79B8) & MASK32


def noise(places: Tensor, key: int, number: int, four: int) -> Tensor:
    """32 bits for each of the ``places`` (int64): the reference, with torch's operations.

    Args:
        places: of the elements in their parameter; the lower 32 bits count.
        key: see ``step_key``.
        number: of the parameter.
        four: which columns share them: 0 for the parameter and its first three state tensors, 1 for the next four,
            and so on.
    """
    first, second = words(key, number)
    x = (places + first) & MASK32
    x = x ^ (x >> 16)
    x = x * FIRST_MULTIPLIER & MASK32
    x = x ^ (x >> 15)
    x = (x + second) & MASK32
    x = x * second_multiplier(four) & MASK32
    return x ^ (x >> 16)


def sixteen_bits(places: Tensor, key: int, number: int, column: int) -> Tensor:
    """The 16 bits that ``column`` gets: 0 for the parameter, then 1, 2, ... for the state tensors of its rule.

    Four columns share a word: its upper and lower half, and those of the word rotated by 8 bits. Each half is uniform,
    so every column is rounded without bias. But columns of one element are not independent: the upper byte of one is
    the lower byte of another. More columns than four get another word.
    """
    word = noise(places, key, number, column // 4)
    if column % 4 >= 2:
        word = word << 8 | word >> 24
    return (word if column % 2 else word >> 16) & 0xFFFF
