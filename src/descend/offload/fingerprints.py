"""A number that tells, on a device, whether somebody has written to a tensor since it was last looked at.

Version counters do not tell: writing to ``param.data`` leaves them alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SMALLEST = 65_536  # numbers; copying fewer costs less than looking at them
_WIDTH = 2**16  # numbers in a row, which are added up first
_ROWS = 64  # rows at a time: 32 MiB of products
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def has_fingerprint(tensor: Tensor) -> bool:
    """Whether ``fingerprint`` takes it, and is worth its time."""
    return tensor.is_contiguous() and SMALLEST <= tensor.numel() <= _WIDTH**2 // 2


def fingerprint(tensor: Tensor) -> Tensor:
    """A weighted sum of the bits of all elements, modulo 2**64: int64 of shape (), on the tensor's device.

    The weight of an element is a random odd number for its row times one for its column. So one changed element always
    changes the sum, and any other edit misses it with a probability of about 2**-64.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS.get(tensor.itemsize, torch.int64))
    weights = _weights(tensor.device)
    rows = len(bits) // _WIDTH
    whole, rest = bits[: rows * _WIDTH].view(rows, _WIDTH), bits[rows * _WIDTH :]
    sums = [(piece * weights[0]).sum(1) for piece in torch.split(whole, _ROWS)] if rows else []
    if len(rest):
        sums.append((rest * weights[0, : len(rest)]).sum()[None])
    joined = torch.cat(sums)
    return (joined * weights[1, : len(joined)]).sum()


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        weights = torch.randint(-(2**63), 2**63 - 1, (2, _WIDTH), generator=generator, dtype=torch.int64)
        return (weights | 1).to(device)
