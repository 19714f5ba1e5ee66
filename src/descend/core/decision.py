"""What a device decides about a step: how gradients are scaled, and whether the step is taken at all.

The host enqueues kernels that read it, and never waits for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from descend.ops import minimum, sqrt, where

FACTOR, TAKE, NORM, SKIPPED = range(4)  # places in ``Decision.values``


class Decision(NamedTuple):
    """Numbers on one device, float64 (float32 where the device has nothing wider), of shape (4,).

    Attributes:
        values: what gradients are multiplied by, beside what the host knows; 1 to take the step, 0 to leave it out; the
            norm of the gradients before clipping, unscaled; how many steps have been left out because the norm was NaN
            or Inf.
        may_skip: whether the second number can be 0.
    """

    values: Tensor
    may_skip: bool

    @property
    def factor(self) -> Tensor:
        """What gradients are multiplied by, shape ()."""
        return self.values[FACTOR]

    @property
    def take(self) -> Tensor:
        """1 to take the step, 0 to leave it out, shape ()."""
        return self.values[TAKE]


def judge(
    total: Any, grad_scale: Any, found_inf: Any, skipped: Any, scale: Any, max_norm: Any, skips_nonfinite: Any
) -> tuple[Any, Any, Any, Any]:
    """The numbers of a ``Decision``, from the sum of squares of the gradients. Written like a rule; all are float64.

    Args:
        total: sum of the squares of the gradients, as they are stored; 0 if nothing needs it.
        grad_scale: what the loss was multiplied by, as the device knows it.
        found_inf: not 0 if a ``GradScaler`` has found that the step must be left out.
        skipped: how many steps have been left out before because their norm was not finite.
        scale: what stored gradients are multiplied by, as the host knows it.
        max_norm: see ``StepOptions``; 0 for no clipping.
        skips_nonfinite: 1 if a NaN or Inf in a gradient leaves the step out, else 0.
    """
    norm = sqrt(total) * scale / grad_scale
    clipped = minimum(max_norm / (norm + 1e-6), 1.0)  # NaN for a NaN norm, as in torch
    factor = where(max_norm > 0, clipped, 1.0) / grad_scale
    is_bad = where(norm - norm == 0, 0.0, skips_nonfinite)
    has_passed = where(found_inf == 0, 1.0, 0.0)
    return factor, has_passed * (1.0 - is_bad), norm, skipped + has_passed * is_bad
