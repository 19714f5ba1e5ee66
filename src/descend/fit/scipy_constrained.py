"""The part of ``scipy_minimize`` that has constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from descend.fit.scipy_constraints import ArrayConstraint
from descend.fit.scipy_options import Method, Options
from descend.fit.scipy_result import Reporter, print_result
from descend.second_order.minimize import minimize
from descend.second_order.problem.array_objective import ArrayObjective
from descend.second_order.solvers.result import Progress, Status

CODES = {
    Status.converged: 0,
    Status.max_iter: 1,
    Status.max_eval: 1,
    Status.non_finite: 3,
    Status.infeasible: 4,
    Status.stopped_by_callback: 99,
}


class _Value(torch.autograd.Function):
    """The objective's value, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, objective: ArrayObjective) -> Tensor:
        value, grad, _ = objective.value_and_grad(x.detach())
        ctx.grad = grad
        return torch.tensor(value, dtype=x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        return weight * ctx.grad, None


def constrained_result(
    method: Method,
    options: Options,
    objective: ArrayObjective,
    x: Tensor,
    constraints: Sequence[ArrayConstraint],
    callback: Callable[..., Any] | None,
    shape: tuple[int, ...],
) -> Any:
    """Minimize an objective under constraints; return SciPy's result."""
    from scipy.optimize import OptimizeResult

    reporter = Reporter(method, options, callback, shape, has_differences=False)

    def report(progress: Progress) -> bool:
        state = OptimizeResult(x=reporter.array(progress.x), fun=progress.fun, nit=progress.n_iter)
        if options.return_all:
            reporter.iterates.append(reporter.array(progress.x))
        return reporter.show(state)

    bounded = objective.lower is not None
    tol = options.tolerance(method, len(x)) if options.gtol is not None or options.ftol is None else options.ftol
    found = minimize(
        lambda point: _Value.apply(point, objective),  # type: ignore[no-untyped-call]
        x,
        bounds=(objective.lower, objective.upper) if bounded else None,
        tol=tol,
        max_iter=int(min(options.max_iter(method, len(x)), 2**62)),
        callback=report,
        constraints=[each for constraint in constraints for each in constraint.as_constraints()],
        domain_errors=objective.domain_errors,
    )
    point = found.x.numpy()
    _, grad, _ = objective.value_and_grad(found.x)
    code = CODES.get(found.status, 2)
    result = OptimizeResult(
        x=reporter.array(found.x),
        fun=found.fun,
        jac=reporter.array(grad),
        nit=found.n_iter,
        nfev=objective.n_fun,
        njev=objective.n_jac,
        status=code,
        success=code == 0,
        message=found.message,
        maxcv=max(constraint.violation(point) for constraint in constraints),
        multipliers=np.concatenate([part.numpy() for part in found.multipliers]),
    )
    if options.return_all:
        result.allvecs = reporter.iterates
    print_result(result, options.disp)
    return result
