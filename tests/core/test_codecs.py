"""Codes of 8 bits and rounded bfloat16, against a loop over the documented format and against exact expectations."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from descend.core import codecs
from descend.core.codecs import BLOCK, Codec, Rounded, decode, encode, joined, rounded_stochastically, split
from descend.core.noise import Stream

SIGNED, UNSIGNED = Codec(signed=True), Codec(signed=False)
MANTISSAS = {SIGNED: (4, 3, 2, 1, 0), UNSIGNED: (5, 4, 3, 2, 1, 0)}  # bits, of each four octaves below 1
LAST = {SIGNED: (2.0**-22, 2.0**-24), UNSIGNED: (2.0**-26, 2.0**-28)}
SMALLEST_SCALE = 2.0**-125
BOTH = pytest.mark.parametrize("codec", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


def documented_values(codec: Codec) -> list[float]:
    """Return the values of codes 0, 1, 2, ..., as the module's docstring has them."""
    values = [0.0, 1.0, *LAST[codec]]
    for four, mantissa in enumerate(MANTISSAS[codec]):
        for octave in range(4 * four + 1, 4 * four + 5):
            values += [(1 + i / 2**mantissa) / 2**octave for i in range(2**mantissa)]
    return sorted(values)


VALUES = {codec: documented_values(codec) for codec in (SIGNED, UNSIGNED)}


def allowed_codes(number: float, scale: float, codec: Codec) -> set[int]:
    """Return the nearest code, or both of two that are equally near but for float32's rounding."""
    values, unit = VALUES[codec], abs(number) / scale if scale else 0.0
    upper = bisect.bisect_left(values, unit)
    if values[min(upper, len(values) - 1)] == unit:
        nearest = {upper}
    elif upper <= 1:  # below the smallest
        limit = values[1] / 4
        nearest = {0} if unit < limit * (1 - 2**-19) else {1} if unit > limit * (1 + 2**-19) else {0, 1}
        nearest = nearest if codec.signed else {1}
    elif upper == len(values):
        nearest = {upper - 1}
    else:
        two_octaves = upper <= 3
        middle = (
            math.sqrt(values[upper - 1] * values[upper]) if two_octaves else (values[upper - 1] + values[upper]) / 2
        )
        nearest = {upper - 1} if unit < middle * (1 - 2**-19) else {upper} if unit > middle * (1 + 2**-19) else set()
        nearest = nearest or {upper - 1, upper}
    is_negative = codec.signed and math.copysign(1, number) < 0
    return {code + 128 * is_negative for code in nearest}


def assert_nearest(numbers: Tensor, codec: Codec) -> None:
    """Encode finite numbers, and compare with a loop over rows and blocks."""
    codes, scale = encode(numbers, codec)
    assert (codes.shape, codes.dtype, scale.dtype) == (numbers.shape, torch.uint8, torch.float32)
    rows = numbers.shape[0] if numbers.dim() > 1 else 1
    number_rows, code_rows = numbers.reshape(rows, -1).tolist(), codes.reshape(rows, -1).tolist()
    blocks = -(-len(number_rows[0]) // BLOCK)
    assert scale.shape == ((rows, blocks) if numbers.dim() > 1 else (blocks,))
    for row, (row_numbers, row_codes) in enumerate(zip(number_rows, code_rows, strict=True)):
        for block in range(blocks):
            part = slice(BLOCK * block, BLOCK * block + BLOCK)
            largest = max(map(abs, row_numbers[part]))
            expected = max(largest, SMALLEST_SCALE) if largest else 0.0
            assert scale.reshape(rows, blocks)[row, block] == expected
            for number, code in zip(row_numbers[part], row_codes[part], strict=True):
                assert code in allowed_codes(number, expected, codec), (number, expected)


def heavy_tailed(shape: tuple[int, ...], codec: Codec, seed: int = 0) -> Tensor:
    """Return numbers over many octaves, some of them zero."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=random) * torch.exp2(-25 * torch.rand(shape, generator=random))
    numbers = torch.where(torch.rand(shape, generator=random) < 0.1, 0.0, numbers)
    return numbers if codec.signed else numbers.square()


@pytest.fixture
def _flushed() -> Iterator[None]:
    """Flush denormal numbers to zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    yield
    torch.set_flush_denormal(False)


@BOTH
def test_codes_have_the_documented_values_in_ascending_order(codec: Codec) -> None:
    values = torch.tensor(VALUES[codec], dtype=torch.float32)
    codes = torch.arange(codec.largest + 1).to(torch.uint8)
    decoded = decode(codes, torch.ones(1), codec)
    assert torch.equal(decoded, values)
    assert (decoded.diff() > 0).all()
    if codec.signed:
        negative = decode(codes + 128, torch.ones(1), codec)
        assert torch.equal(negative, -values)
        assert negative[0].signbit()


@BOTH
@pytest.mark.parametrize("scale", [1.0, 0.3, 3e38, 3.4028234e38, 1.7e-27])
def test_decoded_numbers_have_the_same_codes(codec: Codec, scale: float) -> None:
    codes = torch.arange(256).to(torch.uint8)
    scales = torch.tensor([scale])
    numbers = decode(codes, scales, codec)
    assert numbers[codec.largest] == scales
    again, scale_again = encode(numbers, codec)
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, scales)


@BOTH
def test_exact_numbers_do_not_move_at_random(codec: Codec) -> None:
    codes = torch.arange(256).to(torch.uint8)
    numbers = decode(codes, torch.ones(1), codec)
    for noise in (0, 65535):
        stochastic = encode(numbers, codec._replace(stochastic=True), torch.full((256,), noise))
        assert torch.equal(stochastic[0], codes)


@BOTH
def test_numbers_go_to_the_nearest_value(codec: Codec) -> None:
    """Beside each middle of two values, and on it."""
    values = torch.tensor(VALUES[codec], dtype=torch.float64)
    middles = (values[:-1] + values[1:]) / 2
    near = torch.cat(
        [middles * (1 + step * 2.0**-18) for step in (-1, 0, 1)] + [values[1] / 4 * torch.tensor([0.9, 1.1])]
    )
    units = near.to(torch.float32).reshape(1, -1)
    rows = -(-units.shape[1] // (BLOCK - 1))
    padded = torch.nn.functional.pad(units, (0, rows * (BLOCK - 1) - units.shape[1])).reshape(rows, -1)
    for scale in (1.0, 0.7e-3, 3e38):
        assert_nearest(torch.cat([torch.ones(rows, 1), padded], 1) * scale, codec)


@BOTH
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (600,), (3, 300), (2, 4, 90), (5, 1)], ids=str)
def test_each_block_of_each_row_has_its_scale(codec: Codec, shape: tuple[int, ...]) -> None:
    numbers = heavy_tailed(shape, codec) * torch.logspace(-6, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    assert_nearest(numbers, codec)
    assert encode(numbers, codec)[1].shape == codecs.scale_shape(numbers.shape)
    if len(shape) > 1:
        whole = encode(numbers, codec)
        for row in range(shape[0]):
            for tensor, part in zip(whole, encode(numbers[row : row + 1], codec), strict=True):
                assert torch.equal(tensor[row : row + 1], part)


@BOTH
def test_relative_error_is_bounded_in_all_octaves(codec: Codec) -> None:
    for four, mantissa in enumerate(MANTISSAS[codec]):
        numbers = torch.logspace(-4 * four - 4, -4 * four, 255, base=2.0).clamp(max=1)
        codes, scale = encode(torch.cat([torch.ones(1), numbers]), codec)
        decoded = decode(codes, scale, codec)[1:]
        error = ((decoded - numbers) / numbers).abs().max().item()
        half_way = 2.0 ** -(mantissa + 1)  # between 1 and the next value
        assert 0.9 * half_way < error * (1 + half_way) < half_way * (1 + 2**-18)


@BOTH
def test_zeros_stay_zeros(codec: Codec) -> None:
    codes, scale = encode(torch.zeros(300), codec)
    assert not codes.any()
    assert not scale.any()
    assert not decode(codes, scale, codec).any()
    assert torch.equal(decode(*encode(torch.tensor([-0.0, 2.0]), codec), codec), torch.tensor([-0.0, 2.0]))


def test_squares_that_are_not_zero_do_not_become_zero() -> None:
    """A first average divided by the root of zero would be a step of any length."""
    squares = torch.tensor([1.0, 1e-3, 1e-12, 1e-30, 1e-44, 0.0])
    for noise in (None, torch.zeros(6, dtype=torch.int64)):
        decoded = decode(*encode(squares, UNSIGNED._replace(stochastic=noise is not None), noise), UNSIGNED)
        assert torch.equal(decoded > 0, squares > 0)
        assert torch.equal(decoded[2:5], torch.full((3,), 2.0**-28))


@BOTH
def test_one_huge_number_stays_what_it_is(codec: Codec) -> None:
    numbers = torch.full((300,), 1e-3)
    numbers[7] = 3e38
    codes, scale = encode(numbers, codec)
    decoded = decode(codes, scale, codec)
    assert decoded[7] == numbers[7]
    assert torch.equal(decoded[:7] == 0, torch.full((7,), codec.signed))
    torch.testing.assert_close(decoded[256:], numbers[256:])
    assert (decode(*encode(numbers, codec), codec).isfinite()).all()


@BOTH
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_nan_and_inf_are_seen_in_their_block_only(codec: Codec, bad: float) -> None:
    numbers = torch.linspace(0, 1, 300)
    numbers[5] = bad
    decoded = decode(*encode(numbers, codec), codec)
    assert not decoded[:256].isfinite().any()
    assert decoded[:256].isnan().all() == math.isnan(bad) or decoded[5] == bad
    torch.testing.assert_close(decoded[256:], numbers[256:], rtol=2**-5, atol=0)


@BOTH
def test_denormal_numbers_lose_digits_but_not_their_size(codec: Codec) -> None:
    numbers = torch.tensor([1e-38, 1e-39, 1e-40, 0.0])
    codes, scale = encode(numbers, codec)
    assert scale.item() == SMALLEST_SCALE
    torch.testing.assert_close(decode(codes, scale, codec), numbers, rtol=2**-4, atol=0)


@BOTH
@pytest.mark.usefixtures("_flushed")
def test_flushing_denormal_numbers_changes_no_others(codec: Codec) -> None:
    for scale in (1e-30, 1.0, 3e38):
        numbers = heavy_tailed((4, 300), codec)
        numbers = numbers / numbers.abs().max() * scale
        codes, scales = encode(numbers, codec)
        decoded = decode(codes, scales, codec)
        torch.set_flush_denormal(False)
        assert torch.equal(codes, encode(numbers, codec)[0])
        assert torch.equal(decoded, decode(codes, scales, codec))
        torch.set_flush_denormal(True)
    tiny = torch.tensor([71_362, 0], dtype=torch.int32).view(torch.float32)  # 1e-40, which torch.tensor would flush
    codes, scales = encode(tiny, codec)
    assert codes.tolist() == [0 if codec.signed else 1, 0]
    assert decode(codes, scales, codec).isfinite().all()


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 3.4028234663852886e38, 1.1754943508222875e-38, 2.350988701644575e-38, 1e-45, 1.0]),
)


@BOTH
@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(FLOATS, min_size=1, max_size=40), repeat=st.sampled_from([1, 7]))
def test_any_finite_block_is_coded_to_the_nearest(codec: Codec, numbers: list[float], repeat: int) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32).repeat(repeat)
    tensor = tensor if codec.signed else tensor.abs()
    assert_nearest(tensor, codec)
    decoded = decode(*encode(tensor, codec), codec)
    # A scale that was raised is not the largest number: its code may then move once more.
    if tensor.abs().max() > 2.0**-90:
        assert torch.equal(decode(*encode(decoded, codec), codec), decoded)


ALL_NOISE = torch.arange(65536)


@BOTH
@pytest.mark.parametrize("number", [0.7123, 0.51, 0.3, 3e-3, 1e-6])
def test_stochastic_codes_have_the_number_as_expectation(codec: Codec, number: float) -> None:
    """Over every noise there is."""
    sign = -1 if codec.signed else 1
    rows = -(-len(ALL_NOISE) // (BLOCK - 1))
    numbers = torch.full((rows, BLOCK), sign * number)
    numbers[:, 0] = 1
    noise = torch.zeros(rows, BLOCK, dtype=torch.int64)
    noise[:, 1:] = torch.nn.functional.pad(ALL_NOISE, (0, rows * (BLOCK - 1) - 65536)).view(rows, -1)
    stochastic = codec._replace(stochastic=True)
    decoded = decode(*encode(numbers, stochastic, noise), stochastic)[:, 1:].flatten()[:65536].double() * sign
    values = VALUES[codec]
    upper = bisect.bisect_left(values, number)
    assert set(decoded.tolist()) == set(values[upper - 1 : upper + 1])
    assert (decoded.diff() >= 0).all()
    quantum = values[upper] - values[upper - 1]
    assert abs(decoded.mean().item() - numbers[0, 1].item() * sign) < 2 * quantum / 65536


@pytest.mark.parametrize("number", [1.2345, -0.1, 3e-39, -1e-45, 3.3e38, 1.0, 0.0])
def test_stochastic_bfloat16_has_the_number_as_expectation(number: float) -> None:
    numbers = torch.full((65536,), number)
    rounded = rounded_stochastically(numbers, ALL_NOISE)
    assert rounded.dtype == torch.bfloat16
    assert len(set(rounded.tolist())) <= 2
    assert rounded.double().mean().item() == numbers[0].double().item()


def test_stochastic_bfloat16_keeps_nan_and_inf() -> None:
    numbers = torch.tensor([math.nan, math.inf, -math.inf])
    payload = torch.tensor([0x7F80_0001, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, 65535):
        rounded = rounded_stochastically(numbers, torch.full((3,), noise)).float()
        torch.testing.assert_close(rounded, numbers, rtol=0, atol=0, equal_nan=True)
        assert rounded_stochastically(payload, torch.full((2,), noise)).isnan().all()


def test_compensated_bfloat16_holds_every_float32() -> None:
    patterns = torch.arange(-(2**31), 2**31, 9973)
    special = torch.tensor([0, 0x8000, 0x7FFF, 0x18000, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 1, 0x7FFF_FFFF])
    patterns = torch.cat([patterns, special, special - 2**31]).to(torch.int32)
    numbers = patterns.view(torch.float32)
    high, compensation = split(numbers)
    assert (high.dtype, compensation.dtype) == (torch.bfloat16, torch.int16)
    known = ~numbers.isnan()
    assert torch.equal(joined(high, compensation)[known].view(torch.int32), patterns[known])
    assert joined(high, compensation)[~known].isnan().all()
    assert high[~known].isnan().all()
    # Rounded to nearest: as torch does, but for half-way cases.
    half_way = (patterns & 0xFFFF) == 0x8000
    assert torch.equal(high[known & ~half_way], numbers[known & ~half_way].to(torch.bfloat16))


def test_a_parameter_that_was_set_to_zero_has_no_bits_below_it() -> None:
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0]).to(torch.bfloat16)
    numbers = joined(zeros, torch.tensor([-1, -32768, 5, 7], dtype=torch.int16))
    expected = torch.tensor([0, -(2**31), 5, 7 - 2**31], dtype=torch.int32)
    assert torch.equal(numbers.view(torch.int32), expected)


def test_formats_list_what_they_store() -> None:
    names = ("exp_avg", "exp_avg_sq")
    plain = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64)
    coded = (Rounded("compensated"), torch.bfloat16, SIGNED, Rounded("stochastic"))
    assert codecs.is_plain(plain)
    assert not codecs.is_plain(coded)
    assert codecs.stored_names(names, plain) == names
    assert codecs.stored_names(names, coded) == (*names, "compensation", "exp_avg_scale")
    bfloat16, int16 = torch.bfloat16, torch.int16
    assert codecs.stored_dtypes(plain) == plain
    assert codecs.stored_dtypes(coded) == (bfloat16, bfloat16, torch.uint8, bfloat16, int16, torch.float32)
    assert codecs.compute_dtype(plain) == torch.float64
    assert codecs.compute_dtype(coded) == torch.float32
    assert not codecs.needs_noise(plain)
    assert codecs.needs_noise(coded)
    assert not codecs.needs_noise((Rounded("compensated"), torch.float32, SIGNED))
    assert codecs.needs_noise((torch.float32, torch.float32, SIGNED, Codec(signed=False, stochastic=True)))


def test_places_count_from_the_start_of_the_parameter() -> None:
    assert codecs.places(torch.zeros(2, 3), Stream(number=4, place=100)).tolist() == [[100, 101, 102], [103, 104, 105]]
