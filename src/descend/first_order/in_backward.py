"""How users ask for steps inside the backward pass."""

from __future__ import annotations

from typing import Any, Literal

from descend.first_order.optimizer import FirstOrder
from descend.step.in_backward import CLIPS, NO_SCALER, Clip, InBackward


def in_backward(
    optimizer: FirstOrder,
    accumulate: int = 1,
    *,
    clip: Clip | None = None,
    nonfinite: Literal["parameter"] | None = None,
) -> InBackward:
    """Take the steps of ``optimizer`` inside ``backward``: each parameter as soon as its gradient is complete.

    Each gradient is freed at once, so only one is held. ``optimizer.step()`` completes the step: parameters that still
    have a gradient are updated, step hooks run, and the loss of a closure is returned. As long as a parameter gets at
    most ``accumulate`` gradients between two calls of ``step()``, every result equals that of the ordinary optimizer,
    bit for bit. Without calls of ``step()`` a parameter steps at every ``accumulate``-th gradient.

    Args:
        optimizer: of this library, not ``LBFGS`` or ``Newton``. Parameters added to it later are included.
        accumulate: gradients of a parameter that are summed before it steps, >= 1. Default: 1.
        clip: how ``max_norm`` is applied. The joint norm of all gradients is known only when all have arrived.
            ``"previous"``: uses the norm of the last step, or that of the gradients so far if it is larger, as it
            always is in a first step. ``"parameter"``: limits each parameter by its own norm. Default: None, an error
            if the optimizer has a ``max_norm``.
        nonfinite: ``"parameter"``: ``nonfinite="skip"`` and ``"raise"`` of the optimizer act on single parameters, as
            their gradients arrive. Default: None, an error if the optimizer has one of them.
    Returns:
        A handle: ``remove()``, or the end of a ``with`` block, makes the optimizer ordinary again.
    Raises:
        TypeError: if the optimizer is of another kind, or its class has a ``step`` of its own.
        ValueError: if an option cannot be kept in one pass.
        RuntimeError: if the optimizer, or another one with the same parameters, is in backward already.
    Example:
        >>> import torch
        >>> from descend import SGD
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = SGD([weight], lr=0.1)
        >>> with in_backward(optimizer):
        ...     weight.square().sum().backward()
        >>> weight, weight.grad
        (tensor([0.8000, 0.8000], requires_grad=True), None)
    """
    _check_kind(optimizer)
    name = type(optimizer).__name__
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"in_backward: accumulate must be a whole number >= 1, got {accumulate!r}.")
    if clip not in CLIPS:
        raise ValueError(f"in_backward: clip must be one of {CLIPS}, got {clip!r}.")
    if nonfinite not in (None, "parameter"):
        raise ValueError(f"in_backward: nonfinite must be None or 'parameter', got {nonfinite!r}.")
    if optimizer.in_backward is not None:
        raise RuntimeError(f"in_backward: this {name} is in backward already; remove() its handle first.")
    if clip is not None and optimizer.max_norm is None:
        raise ValueError(f"in_backward: clip={clip!r} says how max_norm is kept, but this {name} has none.")
    if nonfinite is not None and optimizer.nonfinite == "step":
        raise ValueError(
            f"in_backward: nonfinite='parameter' is for nonfinite='skip' or 'raise', but this {name} has 'step'."
        )
    if optimizer.amp is not None:
        raise ValueError(f"in_backward: {name} has amp={optimizer.amp!r}. {NO_SCALER}")
    return optimizer.step_in_backward(accumulate, clip, nonfinite)


def _check_kind(optimizer: Any) -> None:
    kind = type(optimizer)
    if not isinstance(optimizer, FirstOrder):
        raise TypeError(
            f"in_backward takes an optimizer of descend that updates each parameter by itself (SGD, Adam, AdamW, "
            f"SparseAdam, classes of from_rule), got {kind.__module__}.{kind.__name__}."
        )
    if kind.end_step is not FirstOrder.end_step:
        raise TypeError(
            f"in_backward: {kind.__name__} counts for all parameters together, which inside backward are never there."
        )
    if kind.step is not FirstOrder.step:
        raise TypeError(
            f"in_backward: {kind.__name__} has a step of its own, which gradients inside backward would never reach."
        )
