"""One step: its scale, and whether it is taken at all. Knows no hooks and no closures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from descend.backends.backend import Declined
from descend.core.interrupts import DeferredSignals
from descend.core.measures import Sample
from descend.core.optimizer import MethodOptimizer
from descend.norms.clip import clip_coefficient
from descend.sparse.attach import Tables
from descend.step.capture import check_capture, refuse_new_plan
from descend.step.plan import Plan, Position
from descend.step.scaling import UNSCALED, loss_scale, wait_for


def take_step(
    optimizer: MethodOptimizer,
    tables: Tables,
    plan: Plan | None,
    position: Position | None = None,
    norm_to_clip: Callable[[Any], Any] | None = None,
) -> Plan | None:
    """Take one step, of all parameters or of the one at ``position``.

    Args:
        optimizer: the optimizer.
        tables: its parameters in exact mode.
        plan: the plan of the previous step; None to make a new one.
        position: of the only parameter to update. Default: all parameters with a gradient.
        norm_to_clip: returns the norm that ``max_norm`` limits, given the norm of these gradients, both numbers or both
            tensors on the device that decides. Default: that norm itself, which is then stored as ``grad_norm``.
    Returns:
        The plan, for the next step.
    Raises:
        FloatingPointError: for a gradient with NaN or Inf if ``nonfinite="raise"``; nothing has moved then.
    """
    loss = loss_scale(optimizer)
    if loss is None:
        return _skip(optimizer, plan)
    if plan is None or not plan.is_valid(optimizer):
        refuse_new_plan(optimizer)
        plan = Plan(optimizer, tables, position=position, previous=plan)
    try:
        plan = compiled(plan, optimizer, tables)
        if plan.is_on_cuda:
            check_capture(optimizer, waits=plan.waits)
        if plan.decider is None and loss is not UNSCALED:
            loss = wait_for(optimizer, loss)
            if loss is None:
                return _skip(optimizer, plan)
        plan.shake_hands(optimizer)
        plan.read(optimizer)
        if plan.decider is not None:
            scale, coefficient = plan.decider.decide(optimizer, loss, norm_to_clip), 1.0
        else:
            scale = 1 / float(loss.grad_scale)
            found = _coefficient(optimizer, plan, scale, norm_to_clip)
            if found is None:
                optimizer.skipped_steps += 1
                return plan
            coefficient = found
        if plan.is_atomic:
            plan.set_scalars(optimizer, scale * coefficient)
            plan.form_scalars(optimizer)
            plan.run(optimizer, _sample(optimizer, scale, coefficient))
        else:
            with DeferredSignals():
                plan.set_scalars(optimizer, scale * coefficient)
                plan.make_state(optimizer)
                plan.form_scalars(optimizer)
                plan.confirm(optimizer)
                plan.run(optimizer, _sample(optimizer, scale, coefficient))
                if position is None:
                    plan.end_step(optimizer)
    finally:
        plan.release()
    return plan


def compiled(plan: Plan, optimizer: MethodOptimizer, tables: Tables) -> Plan:
    """The plan, compiled; another one if a backend finds out that it cannot compile a rule: others may."""
    while True:
        try:
            plan.compile()
        except Declined:
            plan = plan.again(optimizer, tables)
        else:
            return plan


def _skip(optimizer: MethodOptimizer, plan: Plan | None) -> Plan | None:
    """A gradient has overflowed: the step is left out."""
    if optimizer.observer is not None:
        optimizer.observer.skip(())
    return plan


def _sample(optimizer: MethodOptimizer, scale: float, coefficient: float) -> Sample | None:
    """Tell the observer that parameters step now: nothing that is checked before has failed."""
    return None if optimizer.observer is None else optimizer.observer.begin(scale, coefficient)


def _coefficient(
    optimizer: MethodOptimizer, plan: Plan, scale: float, norm_to_clip: Callable[[float], float] | None
) -> float | None:
    """The clipping coefficient, 1 without clipping; None to skip the step."""
    options = optimizer.options
    if not options.wants_norm:
        return 1.0
    norm = plan.total_norm(optimizer) * scale
    if norm_to_clip is None:
        optimizer.grad_norm = norm
    if options.nonfinite != "step" and not math.isfinite(norm) and (names := plan.nonfinite_gradients(optimizer)):
        if options.nonfinite == "raise":
            raise FloatingPointError(
                f"{type(optimizer).__name__}: NaN or Inf in the gradient of {', '.join(names)}. Nothing has moved; "
                "nonfinite='skip' skips such steps."
            )
        if optimizer.observer is not None:
            optimizer.observer.skip(names)
        return None
    if norm_to_clip is not None:
        norm = norm_to_clip(norm)
    return 1.0 if options.max_norm is None else clip_coefficient(options.max_norm, norm)
