"""How fast this machine's memory is, and with it the least time that a step can take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

FOOTPRINTS = tuple(2**power for power in (18, 21, 24, 27, 29))
_SECONDS = 0.3
_FEWEST = 5


class Bandwidth(NamedTuple):
    """What was measured on arrays of one size.

    Attributes:
        footprint: bytes of all arrays together.
        rate: bytes read or written per second, in the fastest pass.
    """

    footprint: int
    rate: float


def measure(footprint: int, device: str = "cpu") -> Bandwidth:
    """Return the rate at which torch's threads update float32 arrays in place: ``a += s * b`` or ``a *= s``.

    Both write only what they have read, as a step does. A copy or STREAM's triad also fetches what it overwrites, which
    nobody counts, and so seems slower than memory is. The fastest pass counts, as in STREAM: other programs only take
    time away.

    Args:
        footprint: bytes of both arrays.
        device: where they are.
    Source: McCalpin 1995, https://www.cs.virginia.edu/stream/; its kernels are copy, scale, add and triad.
    """
    target, source = (torch.full((footprint // 8,), 1.0, device=device) for _ in range(2))
    kernels: Sequence[tuple[int, Callable[[], object]]] = (
        (3, lambda: target.add_(source, alpha=1e-9)),
        (2, lambda: target.mul_(1.0)),
    )
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < 2 * (_FEWEST + 1) or time.perf_counter() - begin < _SECONDS:
        for arrays, kernel in kernels:
            started = time.perf_counter()
            kernel()
            if target.is_cuda:
                torch.cuda.synchronize(device)
            rates.append(arrays * target.nbytes / (time.perf_counter() - started))
    return Bandwidth(footprint, max(rates[2:]))


def measure_all(device: str, memory: int) -> Iterator[Bandwidth]:
    """Yield the bandwidth for each of ``FOOTPRINTS`` that fits in a quarter of ``memory`` bytes; 0 for unknown."""
    for footprint in FOOTPRINTS:
        if not memory or footprint <= memory // 4:
            yield measure(footprint, device)


def bandwidth_for(bandwidths: Sequence[Bandwidth], footprint: int) -> Bandwidth:
    """Return the one measured on arrays whose size is nearest, in proportion, to ``footprint`` bytes.

    If larger arrays were faster, which only a disturbance explains, it is the fastest of those.

    Example:
        >>> bandwidth_for([Bandwidth(1_000, 9e9), Bandwidth(1_000_000, 1e9)], 100_000).rate
        1000000000.0
    """
    nearest = min(bandwidths, key=lambda each: abs(math.log(each.footprint / max(1, footprint))))
    return max((each for each in bandwidths if each.footprint >= nearest.footprint), key=lambda each: each.rate)
