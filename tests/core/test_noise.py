"""The noise of stochastic rounding: known answers, nothing but the counter decides, uniform and uncorrelated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descend.core import noise
from descend.core.noise import GOLDEN64, MASK32, MASK64, sixteen_bits, step_key

COUNT = 1 << 16
PLACES = torch.arange(COUNT)


def by_hand(place: int, key: int, number: int, four: int) -> int:
    """Return the 32 bits of one place, in Python's integers."""
    state = (key + number * GOLDEN64) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    state ^= state >> 31
    x = (place + state) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) + (state >> 32)
    x = x % 2**32 * (0x846CA68B + four * 0x9E3779B8) % 2**32
    return x ^ x >> 16


def test_the_64_bit_hash_is_that_of_splitmix64() -> None:
    """The first numbers of the generator with the seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [noise.mixed((1234567 + i * GOLDEN64) & MASK64) for i in range(1, 6)] == expected


def test_noise_has_known_values() -> None:
    """They are part of what a run computes: whoever changes them changes every run that rounds at random."""
    key = step_key(seed=3, step=17)
    places = [0, 1, 255, 65536, 2**31, 2**32 - 1, 2**32 + 5, 2**40]
    for number in (0, 1, 9999):
        for four in range(3):
            expected = [by_hand(place, key, number, four) for place in places]
            assert noise.noise(torch.tensor(places), key, number, four).tolist() == expected
    assert (step_key(0, 1), step_key(-1, 1)) == (16294208416658607535, 11923130667873509210)
    assert noise.noise(torch.tensor([0, 1, 2]), step_key(0, 1), 0, 0).tolist() == [691272643, 2640032286, 3680754266]


def test_columns_get_two_bytes_of_a_word_each() -> None:
    places = PLACES[:100]
    for four in range(2):
        a, b, c, d = noise.noise(places, 5, 6, four).to(torch.int32).view(torch.uint8).view(-1, 4).long().unbind(1)
        for column, (low, high) in enumerate([(c, d), (a, b), (b, c), (d, a)]):
            assert torch.equal(sixteen_bits(places, 5, 6, 4 * four + column), low + 256 * high)


def test_a_place_has_the_same_noise_in_every_chunk() -> None:
    whole = noise.noise(PLACES, 1, 2, 0)
    for start, stop in ((0, 1), (7, 1000), (COUNT - 3, COUNT)):
        assert torch.equal(noise.noise(torch.arange(start, stop), 1, 2, 0), whole[start:stop])
    assert torch.equal(noise.noise(PLACES.view(256, 256).t(), 1, 2, 0), whole.view(256, 256).t())


def variants() -> dict[str, Tensor]:
    """Return noise of neighbouring counters, keys, numbers and columns."""
    key = step_key(0, 1)
    return {
        "first": noise.noise(PLACES, key, 0, 0),
        "next place": noise.noise(PLACES + 1, key, 0, 0),
        "next row": noise.noise(PLACES + 256, key, 0, 0),
        "next step": noise.noise(PLACES, step_key(0, 2), 0, 0),
        "next seed": noise.noise(PLACES, step_key(1, 1), 0, 0),
        "next number": noise.noise(PLACES, key, 1, 0),
        "next word": noise.noise(PLACES, key, 0, 1),
        "third word": noise.noise(PLACES, key, 0, 2),
    }


def test_noise_is_uniform() -> None:
    """Each byte: chi-square with 255 degrees of freedom is below 391 but in one case of ten million."""
    for name, word in variants().items():
        assert word.min() >= 0
        assert word.max() <= MASK32
        for shift in (0, 8, 16, 24):
            counts = torch.bincount((word >> shift) & 0xFF, minlength=256).double()
            chi_square = ((counts - COUNT / 256).square() / (COUNT / 256)).sum().item()
            assert chi_square < 391, (name, shift)


def test_noise_of_neighbours_is_uncorrelated() -> None:
    """In both halves, between them, and in other columns: five standard deviations of 65,536 independent pairs."""
    halves = {
        (name, half): ((word >> (16 * half)) & 0xFFFF).double() - 32767.5
        for name, word in variants().items()
        for half in range(2)
    }
    for column in (2, 3):
        halves["first", column] = sixteen_bits(PLACES, step_key(0, 1), 0, column).double() - 32767.5
    for first in [("first", part) for part in range(4)]:
        for second in halves.keys() - {first}:
            correlation = halves[first] @ halves[second] / (halves[first].norm() * halves[second].norm())
            assert abs(correlation.item()) < 5 / COUNT**0.5, (first, second)


@pytest.mark.parametrize("seeds", [(0, 1), (0, 2**63), (-1, 1)])
def test_seeds_give_different_keys(seeds: tuple[int, int]) -> None:
    keys = {step_key(seed, step) for seed in seeds for step in range(1, 1000)}
    assert len(keys) == 2 * 999
