"""One step: its scale, and whether it is taken at all. Knows no hooks and no closures."""

from __future__ import annotations

import math
from collections.abc import Callable

from descend.core.interrupts import DeferredSignals
from descend.core.measures import Sample
from descend.core.method import Method
from descend.norms.clip import clip_coefficient
from descend.sparse.attach import Tables
from descend.step.plan import Plan, Position
from descend.step.scaling import gradient_scale


def take_step(
    method: Method,
    tables: Tables,
    plan: Plan | None,
    position: Position | None = None,
    norm_to_clip: Callable[[float], float] | None = None,
) -> Plan | None:
    """Take one step, of all parameters or of the one at ``position``.

    Args:
        method: the optimizer.
        tables: its parameters in exact mode.
        plan: the plan of the previous step; None to make a new one.
        position: of the only parameter to update. Default: all parameters with a gradient.
        norm_to_clip: returns the norm that ``max_norm`` limits, given the norm of these gradients. Default: that norm
            itself, which is then stored as the optimizer's ``grad_norm``.
    Returns:
        The plan, for the next step.
    Raises:
        FloatingPointError: for a gradient with NaN or Inf if ``nonfinite="raise"``; nothing has moved then.
    """
    scale = gradient_scale(method)
    if scale is None:
        if method.observer is not None:
            method.observer.skip(())
        return plan
    if plan is None or not plan.is_valid(method):
        plan = Plan(method, tables, position=position, previous=plan)
    try:
        plan.compile()
        plan.shake_hands(method)
        plan.read(method)
        coefficient = _coefficient(method, plan, scale, norm_to_clip)
        if coefficient is None:
            method.skipped_steps += 1
            return plan
        if plan.is_atomic and type(method).end_step is Method.end_step:
            plan.set_scalars(method, scale * coefficient)
            plan.run(method, _sample(method, scale, coefficient))
        else:
            with DeferredSignals():
                plan.set_scalars(method, scale * coefficient)
                plan.make_state(method)
                plan.confirm(method)
                plan.run(method, _sample(method, scale, coefficient))
                if position is None:
                    method.end_step()
    finally:
        plan.release()
    return plan


def _sample(method: Method, scale: float, coefficient: float) -> Sample | None:
    """Tell the observer that parameters step now: nothing that is checked before has failed."""
    return None if method.observer is None else method.observer.begin(scale, coefficient)


def _coefficient(
    method: Method, plan: Plan, scale: float, norm_to_clip: Callable[[float], float] | None
) -> float | None:
    """The clipping coefficient, 1 without clipping; None to skip the step."""
    options = method.options
    if not options.wants_norm:
        return 1.0
    norm = plan.total_norm(method) * scale
    if norm_to_clip is None:
        method.grad_norm = norm
    if options.nonfinite != "step" and not math.isfinite(norm) and (names := plan.nonfinite_gradients(method)):
        if options.nonfinite == "raise":
            raise FloatingPointError(
                f"{type(method).__name__}: NaN or Inf in the gradient of {', '.join(names)}. Nothing has moved; "
                "nonfinite='skip' skips such steps."
            )
        if method.observer is not None:
            method.observer.skip(names)
        return None
    if norm_to_clip is not None:
        norm = norm_to_clip(norm)
    return 1.0 if options.max_norm is None else clip_coefficient(options.max_norm, norm)
