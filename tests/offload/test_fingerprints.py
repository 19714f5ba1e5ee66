"""Fingerprints change with every edit, and with nothing else."""

from __future__ import annotations

import pytest
import torch

from descend.offload.fingerprints import SMALLEST, fingerprint, has_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("numel", [SMALLEST, 3 * SMALLEST + 17])
def test_every_bit_counts(numel: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(numel, dtype=dtype)
    bits, before = tensor.view(torch.uint8), int(fingerprint(tensor))
    for place in (0, 1, SMALLEST - 1, numel - 1):
        for bit in (0, 7):
            bits[place * tensor.itemsize + bit % tensor.itemsize] ^= 1 << bit
            assert int(fingerprint(tensor)) != before
            bits[place * tensor.itemsize + bit % tensor.itemsize] = 0
    assert int(fingerprint(tensor.clone())) == before


def test_the_order_of_elements_counts() -> None:
    tensor = torch.eye(512)
    others = [tensor.flip(0), tensor.roll(1, 0), tensor.roll(128, 0), -tensor, tensor[torch.randperm(512)]]
    found = {int(fingerprint(each.contiguous())) for each in (tensor, *others)}
    assert len(found) == 1 + len(others)


def test_nan_is_itself_and_zeros_have_signs() -> None:
    tensor = torch.full((SMALLEST,), torch.nan)
    assert int(fingerprint(tensor)) == int(fingerprint(tensor.clone()))
    assert int(fingerprint(torch.zeros(SMALLEST))) != int(fingerprint(-torch.zeros(SMALLEST)))


def test_small_and_strided_tensors_have_none() -> None:
    assert has_fingerprint(torch.zeros(SMALLEST))
    assert not has_fingerprint(torch.zeros(SMALLEST - 1))
    assert not has_fingerprint(torch.zeros(SMALLEST, 2)[:, 0])
    assert not has_fingerprint(torch.zeros(2, SMALLEST).t())
