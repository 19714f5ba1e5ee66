"""Codes of 8 bits and rounded bfloat16, against a loop over the documented format and against exact expectations."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from descend.core import codecs
from descend.core.codecs import BLOCK, Codec, Rounded, decode, encode, joined, rounded_stochastically, split

SIGNED, UNSIGNED = Codec(signed=True), Codec(signed=False)
TOP = {SIGNED: 494.0, UNSIGNED: 126_974.0}
SMALLEST_SCALE = 2.0**-123
BOTH = pytest.mark.parametrize("codec", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
ALL_CODES = torch.arange(256).to(torch.uint8)

# The values of codes 0, 1, 2, ..., as the module's docstring has them.
VALUES = {
    codec: [2**e * (2 + m / 8) - 2 for e in range(exponents) for m in range(16)]
    for codec, exponents in ((SIGNED, 8), (UNSIGNED, 16))
}


def allowed_codes(number: float, scale: float, codec: Codec) -> set[int]:
    """Return the nearest code, or both of two that are equally near but for float32's rounding."""
    values, unit = VALUES[codec], abs(number) / scale if scale else 0.0
    upper = min(bisect.bisect_left(values, unit), len(values) - 1)
    lower = max(upper - 1, 0)
    middle = (values[lower] + values[upper]) / 2
    margin = (middle + 2) * 2.0**-22
    nearest = {lower} if unit < middle - margin else {upper} if unit > middle + margin else {lower, upper}
    if codec == UNSIGNED:
        return {max(code, 1) for code in nearest} if number else {0}
    return {code + 128 * (number < 0) for code in nearest}


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
            expected = max(np.float32(largest / TOP[codec]).item(), SMALLEST_SCALE) if largest else 0.0
            assert scale.reshape(rows, blocks)[row, block] == expected
            for number, code in zip(row_numbers[part], row_codes[part], strict=True):
                assert code in allowed_codes(number, expected, codec), (number, expected)


def heavy_tailed(shape: tuple[int, ...], codec: Codec, seed: int = 0) -> Tensor:
    """Return numbers over many octaves, some of them zero."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=random) * torch.exp2(-15 * torch.rand(shape, generator=random))
    numbers = torch.where(torch.rand(shape, generator=random) < 0.1, 0.0, numbers)
    return numbers if codec.signed else numbers.square()


def every_code(codec: Codec) -> tuple[Tensor, Tensor]:
    """Return rows with all codes, and scales that blocks with largest numbers of every size have."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(1, 0x7F80_0000, (2000,), generator=random)
    extremes = [1, 0x0080_0000, 0x7F00_0000, 0x7F7F_FFFE, 0x7F7F_FFFF]
    largest = torch.cat([bits, torch.tensor(extremes)]).to(torch.int32).view(torch.float32)
    scale = (largest.double() / TOP[codec]).float().clamp(min=SMALLEST_SCALE)
    return ALL_CODES.repeat(len(scale), 1), scale[:, None]


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
    assert values[-1] == TOP[codec] == codec.top
    decoded = decode(ALL_CODES, torch.ones(1), codec)
    assert torch.equal(decoded[: codec.largest + 1], values)
    assert (values.diff() > 0).all()
    if codec.signed:
        assert torch.equal(decoded[128:], -values)
    tripled = decode(ALL_CODES, torch.tensor([3.0]), codec)
    assert torch.equal(tripled, 3 * decoded)


@BOTH
def test_decoded_numbers_have_the_same_codes_and_scales(codec: Codec) -> None:
    """With the smallest and the largest noise, too: exact numbers do not move at random."""
    codes, scale = every_code(codec)
    numbers = decode(codes, scale, codec)
    assert numbers.isfinite().all()
    if codec.signed:
        codes[:, 128] = 0  # a negative number that became zero
    for noise in (None, 0, 65535):
        some = None if noise is None else torch.full(codes.shape, noise)
        again, scale_again = encode(numbers, codec._replace(stochastic=noise is not None), some)
        assert torch.equal(again, codes)
        assert torch.equal(scale_again, scale)


@BOTH
def test_numbers_go_to_the_nearest_value(codec: Codec) -> None:
    """Beside each middle of two values, and on it."""
    values = torch.tensor(VALUES[codec], dtype=torch.float64)
    middles = (values[:-1] + values[1:]) / 2
    near = torch.cat([middles + (middles + 2) * step * 2.0**-21 for step in (-1, 0, 1)])
    rows = -(-len(near) // (BLOCK - 1))
    padded = torch.nn.functional.pad(near, (0, rows * (BLOCK - 1) - len(near))).reshape(rows, -1)
    units = torch.cat([torch.full((rows, 1), TOP[codec], dtype=torch.float64), padded], 1)
    for scale in (1.0, 0.7e-3, 2e33, 2.0**-123):
        assert_nearest((units * scale).float(), codec)


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
@pytest.mark.parametrize("shape", [(0,), (0, 300), (3, 0), (2, 0, 300)], ids=str)
def test_tensors_without_numbers_have_no_scales(codec: Codec, shape: tuple[int, ...]) -> None:
    codes, scale = encode(torch.zeros(shape), codec)
    assert codes.shape == shape
    assert scale.shape == codecs.scale_shape(codes.shape)
    assert scale.numel() == 0
    assert decode(codes, scale, codec).shape == shape


@BOTH
def test_blocks_are_in_logical_order(codec: Codec) -> None:
    """Whatever the strides, and with a row of just one block, too."""
    for numbers in (heavy_tailed((300, 256), codec).t(), heavy_tailed((256, 3), codec)[:, 1]):
        for tensor, expected in zip(encode(numbers, codec), encode(numbers.contiguous(), codec), strict=True):
            assert torch.equal(tensor, expected)


@BOTH
def test_zeros_stay_zeros(codec: Codec) -> None:
    codes, scale = encode(torch.zeros(300), codec)
    assert not codes.any()
    assert not scale.any()
    assert not decode(codes, scale, codec).any()
    assert encode(torch.tensor([-0.0, 2.0]), codec)[0].tolist() == [0, codec.largest]


def test_squares_that_are_not_zero_do_not_become_zero() -> None:
    """A first average divided by the root of zero would be a step of any length."""
    squares = torch.tensor([126_974.0, 1.0, 1e-3, 1e-12, 1e-44, 0.0])
    for noise in (None, torch.zeros(6, dtype=torch.int64)):
        decoded = decode(*encode(squares, UNSIGNED._replace(stochastic=noise is not None), noise), UNSIGNED)
        assert decoded.tolist() == [126_974, 1, 0.125, 0.125, 0.125, 0]


@BOTH
def test_one_huge_number_stays_what_it_is(codec: Codec) -> None:
    numbers = torch.full((300,), 1e-3)
    numbers[7] = 3.4028234663852886e38
    codes, scale = encode(numbers, codec)
    decoded = decode(codes, scale, codec)
    torch.testing.assert_close(decoded[7], numbers[7], rtol=2**-23, atol=0)
    assert torch.equal(decoded[:7] == 0, torch.full((7,), codec.signed))
    torch.testing.assert_close(decoded[256:], numbers[256:])


@BOTH
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_nan_and_inf_are_seen_in_their_block_only(codec: Codec, bad: float) -> None:
    numbers = torch.linspace(0, 1, 300)
    numbers[5] = bad
    for noise in (None, torch.full((300,), 65535)):
        codes, scale = encode(numbers, codec._replace(stochastic=noise is not None), noise)
        assert not codes[:256].any()
        decoded = decode(codes, scale, codec)
        assert decoded[:256].isnan().all()
        torch.testing.assert_close(decoded[256:], numbers[256:], rtol=2**-4, atol=0)


@BOTH
def test_no_decoded_number_is_denormal(codec: Codec) -> None:
    numbers = torch.tensor([1e-37, 1e-38, 1e-39, 1e-45, 0.0])
    assert_nearest(numbers, codec)
    decoded = decode(*encode(numbers, codec), codec)
    assert decoded[0] == 9 * 2.0**-126
    assert set(decoded[1:].tolist()) == {0, 2.0**-126}


@BOTH
@pytest.mark.usefixtures("_flushed")
def test_flushing_denormal_numbers_changes_no_others(codec: Codec) -> None:
    for largest in (1e-34, 1.0, 3e38):
        numbers = heavy_tailed((4, 300), codec)
        numbers = numbers / numbers.abs().max() * largest
        numbers = torch.where(numbers.abs() < 2.0**-126, 0.0, numbers)
        codes, scales = encode(numbers, codec)
        decoded = decode(codes, scales, codec)
        torch.set_flush_denormal(False)
        assert torch.equal(codes, encode(numbers, codec)[0])
        assert torch.equal(decoded, decode(codes, scales, codec))
        torch.set_flush_denormal(True)
    tiny = torch.tensor([71_362, 0], dtype=torch.int32).view(torch.float32)  # 1e-40, which torch.tensor would flush
    assert decode(*encode(tiny, codec), codec).tolist() == [0 if codec.signed else 2.0**-126, 0]


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
    assert torch.equal(decode(*encode(decoded, codec), codec), decoded)


ALL_NOISE = torch.arange(65536)


@BOTH
@pytest.mark.parametrize("number", [391.23, 100.0, 5.0621, 1.0301, 0.0713])
def test_stochastic_codes_have_the_number_as_expectation(codec: Codec, number: float) -> None:
    """Over every noise there is."""
    sign = -1 if codec.signed else 1
    rows = -(-len(ALL_NOISE) // (BLOCK - 1))
    numbers = torch.full((rows, BLOCK), sign * number)
    numbers[:, 0] = TOP[codec]
    noise = torch.zeros(rows, BLOCK, dtype=torch.int64)
    noise[:, 1:] = torch.nn.functional.pad(ALL_NOISE, (0, rows * (BLOCK - 1) - 65536)).view(rows, -1)
    stochastic = codec._replace(stochastic=True)
    decoded = decode(*encode(numbers, stochastic, noise), stochastic)[:, 1:].flatten()[:65536].double() * sign
    values = VALUES[codec]
    upper = bisect.bisect_left(values, number)
    lowest = 1 if codec == UNSIGNED else 0
    assert set(decoded.tolist()) == set(values[max(upper - 1, lowest) : upper + 1])
    assert (decoded.diff() >= 0).all()
    if upper > lowest:
        quantum = values[upper] - values[upper - 1]
        assert abs(decoded.mean().item() - numbers[0, 1].item() * sign) < 0.75 * quantum / 65536


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
