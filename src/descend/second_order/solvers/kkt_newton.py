"""The end of a constrained minimization: Newton's method on its conditions, for small dense problems.

Source: Birgin & Martínez 2008, Improving ultimate convergence of an augmented Lagrangian method,
    https://doi.org/10.1080/10556780701577730, with an active set renewed within each step as in Hintermüller,
    Ito & Kunisch 2002, https://doi.org/10.1137/S1052623401383558
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descend.second_order.mathematics.augmented_lagrangian import complementarity, largest
from descend.second_order.mathematics.kkt import KKTStep, kkt_step
from descend.second_order.problem.constrained_objective import Candidate, ConstrainedObjective

SHRINKAGE = 0.5  # of the residual, for a step to be progress
PATIENCE = 4  # steps in a row without progress
GUESSES = 20  # of what holds the variables at the end of one step
DIVERGED = 1e3  # growth of the residual


def residual(objective: ConstrainedObjective, candidate: Candidate) -> float:
    """How far a candidate is from the conditions: gradient of the Lagrangian, feasibility and complementarity."""
    c, (point, multipliers) = objective.scaled(candidate.values), candidate
    grad = objective.projected(point.x, point.grad)
    return max(largest(grad), largest(complementarity(c, multipliers, objective.equal)))


def newton_end(
    objective: ConstrainedObjective,
    candidate: Candidate,
    *,
    target: float,
    floor: float,
    may_go_on: Callable[[], bool],
    report: Callable[[Candidate, float], None],
) -> Candidate | None:
    """Take Newton's steps from near a solution.

    Args:
        objective: f and the constraints; its penalty weighs constraints against multipliers to tell active ones.
        candidate: where from.
        target: residual at which the conditions hold.
        floor: residual that is rounding: there the best point is taken when steps make no more progress.
        may_go_on: whether another evaluation is allowed.
        report: is shown each new point, and the length of the step to it.
    Returns:
        A point at which the conditions hold, to the target or to rounding, and the Hessian is that of a minimum; None
        if none was reached.
    """
    first = best = size = residual(objective, candidate)
    failures, rounded = 0, None
    while True:
        if not (objective.functions.is_usable(candidate.values) or may_go_on()):
            return None
        candidate = candidate._replace(point=candidate.point._replace(graph=objective.usable(candidate.values)))
        step = _step(objective, candidate)
        if step is None:
            return None
        if size <= target:
            return candidate if step.is_minimum else None
        if size <= min(floor, best):
            rounded = candidate if step.is_minimum else None
        if failures > PATIENCE or not may_go_on():
            return rounded
        origin = candidate.point
        x = origin.x + step.step
        if objective.lower is not None and objective.upper is not None:
            x = torch.clamp(x, objective.lower, objective.upper)
        point = objective.evaluate(x, step.step, origin)
        if not point.is_finite:
            return None
        multipliers = torch.where(objective.equal, step.multipliers, step.multipliers.clamp(min=0.0))
        grad = objective.lagrangian_gradient(point.graph, multipliers)
        norm = largest(objective.projected(x, grad))
        candidate = Candidate(point._replace(grad=grad, norm=norm), multipliers)
        report(candidate, objective.space.length(step.step))
        size = residual(objective, candidate)
        if not size <= DIVERGED * first:
            return None
        failures = 0 if size <= SHRINKAGE * best else failures + 1
        best = min(best, size)


def _step(objective: ConstrainedObjective, candidate: Candidate) -> KKTStep | None:
    """Newton's step; None if derivatives or factorizations fail.

    What is active is guessed from the point and its multipliers, then again from the end of the step, until both agree:
    the step then solves a quadratic program. If they never agree, the first guess counts.
    """
    x, values, multipliers = candidate.point.x, candidate.values, candidate.multipliers
    try:
        hessian = objective.lagrangian_hessian(values, multipliers)
    except RuntimeError:  # an operation without second derivatives
        return None
    jacobian, grad, c = objective.jacobian(values), objective.function_gradient(values), objective.scaled(values)
    if not (_is_finite(hessian) and _is_finite(jacobian) and _is_finite(grad)):
        return None
    lower = torch.full_like(x, -torch.inf) if objective.lower is None else objective.lower
    upper = torch.full_like(x, torch.inf) if objective.upper is None else objective.upper
    active = objective.equal | (multipliers - objective.penalty * c > 0)
    slope = grad - jacobian.T @ multipliers
    at_lower, at_upper = (x <= lower) & (slope > 0), (x >= upper) & (slope < 0)
    first: KKTStep | None = None
    for _ in range(GUESSES):
        held = torch.where(at_lower, lower - x, torch.where(at_upper, upper - x, 0.0))
        try:
            step = kkt_step(hessian, jacobian, grad, c, active, ~(at_lower | at_upper), held)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return first
        if not (_is_finite(step.step) and _is_finite(step.multipliers)):
            return first
        first = first or step
        guess = active, at_lower, at_upper
        active = objective.equal | (step.multipliers - objective.penalty * (c + jacobian @ step.step) > 0)
        slope, end = grad + hessian @ step.step - jacobian.T @ step.multipliers, x + step.step
        at_lower = torch.where(at_lower, slope > 0, end < lower)
        at_upper = torch.where(at_upper, slope < 0, end > upper)
        if all(map(torch.equal, guess, (active, at_lower, at_upper))):
            return step
    return first


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
