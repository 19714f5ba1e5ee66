"""What a device decides about a step, in one small kernel."""

from __future__ import annotations

import struct

from torch import Tensor

from descend.backends.triton import library
from descend.backends.triton.tables import constants, current


def judge(
    values: Tensor,
    total: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    scale: float,
    max_norm: float,
    skips_nonfinite: bool,
) -> None:
    """See ``backend.Decisions``."""
    device = values.device
    with current(device):
        _, one, zero = constants(device)
        given = total, one if grad_scale is None else grad_scale, zero if found_inf is None else found_inf
        kernel = library.judge(*(tensor.dtype for tensor in given), library.interprets())
        numbers = map(_bits, (scale, max_norm, float(skips_nonfinite)))
        kernel.bind(1, device, values, *given, *numbers)()


def _bits(number: float) -> int:
    """Triton passes numbers as float32; so float64 goes as the integer of the same bits."""
    return int(struct.unpack("q", struct.pack("d", number))[0])
