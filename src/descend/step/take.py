"""One step: what the gradients are multiplied by, and whether it is taken at all. Knows no hooks and no closures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from descend.step.plan import Place, Plan

if TYPE_CHECKING:
    from descend.first_order.optimizer import FirstOrder

AMP = (None, "fused")
NONFINITE = ("step", "skip", "raise")


def advance(
    optimizer: FirstOrder,
    plan: Plan | None,
    place: Place | None = None,
    norm_to_clip: Callable[[float], float] | None = None,
) -> Plan | None:
    """Take one step, of all parameters or of the one at ``place``.

    Args:
        optimizer: whose step it is.
        plan: of the step before, if there is one.
        place: of the only parameter to update. Default: all parameters with a gradient.
        norm_to_clip: from the norm of these gradients to the one that is limited by ``max_norm``. Default: the same,
            which is also noted as the optimizer's ``grad_norm``.
    Returns:
        The plan, for the next step.
    Raises:
        FloatingPointError: for a gradient with NaN or Inf if ``nonfinite="raise"``; nothing has moved then.
    """
    scale = _unscale(optimizer)
    if scale is None:
        return plan
    if plan is None or not plan.holds(optimizer):
        plan = Plan(optimizer, place=place)  # validates everything, touches nothing
    try:
        is_taken = _take(optimizer, plan, scale, norm_to_clip)
    finally:
        plan.forget()
    if is_taken and place is None:
        optimizer.end_step()
    return plan


def _take(optimizer: FirstOrder, plan: Plan, scale: float, norm_to_clip: Callable[[float], float] | None) -> bool:
    plan.read(optimizer)
    if optimizer.max_norm is not None or optimizer.nonfinite != "step":
        norm = plan.total_norm() * scale
        if norm_to_clip is None:
            optimizer.grad_norm = norm
        if optimizer.nonfinite != "step" and not math.isfinite(norm) and (names := plan.nonfinite_gradients(optimizer)):
            if optimizer.nonfinite == "raise":
                raise FloatingPointError(
                    f"{type(optimizer).__name__}: NaN or Inf in the gradient of {', '.join(names)}. Nothing has moved; "
                    "nonfinite='skip' skips such steps."
                )
            optimizer.skipped_steps += 1
            return False
        if norm_to_clip is not None:
            norm = norm_to_clip(norm)
        if optimizer.max_norm is not None:
            check_max_norm(optimizer, optimizer.max_norm)  # it may have been edited
            # As torch's clamp: a NaN norm stays NaN. Python's min(1, nan) is 1.
            coefficient = optimizer.max_norm / (norm + 1e-6)
            scale *= 1.0 if coefficient > 1 else coefficient
    plan.set_scalars(optimizer, scale)
    plan.prepare(optimizer)
    plan.run(optimizer)
    return True


def check_max_norm(optimizer: FirstOrder, max_norm: Any) -> None:
    """Raise ``ValueError`` unless it is a number > 0, or None."""
    if max_norm is not None and not (isinstance(max_norm, int | float) and max_norm > 0):
        name = type(optimizer).__name__
        raise ValueError(f"{name}: max_norm must be a number > 0, or None not to clip, got {max_norm!r}.")


def is_scaled(optimizer: FirstOrder) -> bool:
    """Whether a ``GradScaler``, or the user, has said by what the loss was multiplied."""
    return "grad_scale" in optimizer.__dict__ or "found_inf" in optimizer.__dict__


def refuse_closure(optimizer: FirstOrder) -> None:
    """Raise if a ``GradScaler`` calls: the closure would make new gradients after it has looked at the old ones."""
    if "found_inf" in optimizer.__dict__:
        name = type(optimizer).__name__
        raise RuntimeError(
            f"{name}: GradScaler has checked the gradients before the closure makes new ones. Call the closure first, "
            "then scaler.step(optimizer) without it. Nothing has moved."
        )


def forget_scale(optimizer: FirstOrder) -> None:
    """Do what a ``GradScaler`` does after a ``step``, unless it raised: the next scale would be multiplied by this."""
    if "found_inf" in optimizer.__dict__:
        optimizer.__dict__.pop("grad_scale", None)
        del optimizer.__dict__["found_inf"]


def _unscale(optimizer: FirstOrder) -> float | None:
    """One over what the loss was multiplied by; None if that made a gradient overflow."""
    if not is_scaled(optimizer):
        return 1.0
    name = type(optimizer).__name__
    if optimizer.amp is None:
        raise RuntimeError(
            f"{name}: grad_scale and found_inf are read by optimizers made with amp='fused', this one was not. "
            "Nothing has moved."
        )
    found: Any = optimizer.__dict__.get("found_inf")
    if found is not None and float(found) != 0:
        return None
    given: Any = optimizer.__dict__.get("grad_scale")
    grad_scale = 1.0 if given is None else float(given)
    if not 0 < grad_scale < math.inf:
        raise ValueError(f"{name}: grad_scale must be a number > 0, got {grad_scale}. Nothing has moved.")
    return 1 / grad_scale


def warmup(optimizer: FirstOrder) -> None:
    """Compile, or load from disk, all that ``optimizer.step`` will need, so that the first step is fast.

    Gradients are assumed to have their parameters' dtypes where there are none yet. State is not touched.

    Example:
        >>> import torch
        >>> from descend import AdamW
        >>> optimizer = AdamW([torch.zeros(3, requires_grad=True)])
        >>> warmup(optimizer)
    """
    Plan(optimizer, only_with_grad=False).warm_up(optimizer)
