"""SciPy's callbacks during a run, and its result at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from descend.fit.flatness import SEVERAL, Flatness, is_flat
from descend.fit.scipy_options import LBFGSB, NEWTON_CG, TRUST_CONSTR, Method, Options
from descend.second_order.mathematics.dense_inverse import DenseInverse
from descend.second_order.mathematics.directions import CompactInverse
from descend.second_order.problem.array_objective import ArrayObjective
from descend.second_order.problem.objective import Point
from descend.second_order.solvers.box import CompactHessian
from descend.second_order.solvers.result import MESSAGES, Status
from descend.second_order.solvers.run import Run

CODES = {Status.converged: 0, Status.max_iter: 1, Status.max_eval: 1, Status.non_finite: 3}
FAILED, STOPPED = 2, 99  # no step lowered the function further; the callback raised StopIteration
SCIPYS = {
    Status.converged: "Optimization terminated successfully: the gradient is within gtol.",
    Status.max_iter: "Maximum number of iterations has been exceeded: raise maxiter.",
    Status.max_eval: "Maximum number of function evaluations has been exceeded: raise maxfun.",
}
FLAT = "Optimization terminated successfully: the last iteration lowered the function by less than ftol, relatively."
SHORT = "Optimization terminated successfully: the last step was shorter than xtol, and rounding allows no further one."


class Reporter:
    """Shows each iterate to a callback, and knows when to stop.

    Args:
        method, options: of the call.
        callback: SciPy's, in one of its two forms; or None.
        shape: of the point.
        has_differences: whether gradients are finite differences.
    """

    def __init__(
        self,
        method: Method,
        options: Options,
        callback: Callable[..., Any] | None,
        shape: tuple[int, ...],
        has_differences: bool,
    ) -> None:
        self.method, self.options, self.shape = method, options, shape
        self.callback = callback
        self.takes_result = callback is not None and _parameters(callback) == {"intermediate_result"}
        self.is_halted = False
        # Differences have half the digits of the function: below, a gradient is noise, and may never meet gtol.
        patience = 1 if options.ftol is not None else SEVERAL if has_differences else np.inf
        self.flatness = Flatness(options.flat, patience)
        self.iterates: list[Any] = []
        self.last_step = np.inf  # mean absolute entry

    def start(self, x: Tensor) -> None:
        self.last_x = x
        if self.options.return_all:
            self.iterates.append(self.array(x))

    def __call__(self, run: Run, point: Point) -> bool:
        """Whether to stop after an iteration that ended at a point."""
        self.last_step = float((point.x - self.last_x).abs().mean()) if len(point.x) else 0.0
        self.last_x = point.x
        if self.options.return_all:
            self.iterates.append(self.array(point.x))
        if self.callback is not None:
            from scipy.optimize import OptimizeResult

            self.show(OptimizeResult(x=self.array(point.x), fun=point.value))
        return self.flatness.look(run) or self.is_halted

    def show(self, state: Any) -> bool:
        """Show a state to the callback; return whether it stops the run."""
        try:
            if self.callback is None:
                return False
            if self.takes_result:
                self.callback(intermediate_result=state)
            elif self.method.name == TRUST_CONSTR:
                self.is_halted = self.callback(state.x, state) is True
            else:
                self.callback(state.x)
        except StopIteration:
            self.is_halted = True
        return self.is_halted

    def array(self, flat: Tensor) -> Any:
        """A flat vector as the caller's array, in memory of its own."""
        return flat.numpy().reshape(self.shape).copy()

    def verdict(self, run: Run, status: Status) -> tuple[int, str]:
        """SciPy's code for the end of a run, and why it ended."""
        if status is Status.converged:
            return 0, SCIPYS[status]
        if self.is_halted:
            return STOPPED, "`callback` raised `StopIteration`."
        if self.flatness.is_reached:
            return 0, FLAT
        if status not in CODES and run.n_iter:
            if self.method.name == LBFGSB and is_flat(run, self.options.flat):
                return 0, FLAT
            if self.method.name == NEWTON_CG and self.last_step <= self.options.xtol:
                return 0, SHORT
        return CODES.get(status, FAILED), SCIPYS.get(status, MESSAGES[status])


def result_of_run(
    run: Run, status: Status, objective: ArrayObjective, reporter: Reporter, learner: Any, disp: bool
) -> Any:
    """SciPy's result."""
    from scipy.optimize import OptimizeResult

    code, message = reporter.verdict(run, status)
    result = OptimizeResult(
        x=reporter.array(run.best.x),
        fun=run.best.value,
        jac=reporter.array(run.best.grad),
        nit=run.n_iter,
        nfev=objective.n_fun,
        njev=objective.n_jac,
        status=code,
        success=code == 0,
        message=message,
    )
    if reporter.method.is_newton:
        result.nhev = objective.n_hess
    else:
        result.hess_inv = inverse_hessian(learner)
    if reporter.options.return_all:
        result.allvecs = reporter.iterates
    print_result(result, disp)
    return result


def inverse_hessian(learner: DenseInverse | CompactInverse | CompactHessian) -> Any:
    """The inverse Hessian as SciPy gives it: dense, or the operator of pairs of steps and changes of the gradient."""
    if isinstance(learner, DenseInverse):
        return learner.matrix().numpy()
    from scipy.optimize import LbfgsInvHessProduct

    steps, changes = learner.pairs() if isinstance(learner, CompactInverse) else (learner.steps, learner.changes)
    return LbfgsInvHessProduct(steps.double().numpy(), changes.double().numpy())


def print_result(result: Any, disp: bool) -> None:
    """Print the summary that SciPy prints with ``disp``."""
    if disp:
        print(
            result.message,
            f"         Current function value: {result.fun:f}",
            f"         Iterations: {result.nit:d}",
            f"         Function evaluations: {result.nfev:d}",
            f"         Gradient evaluations: {result.njev:d}",
            sep="\n",
        )


def _parameters(callback: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(callback).parameters)
    except (TypeError, ValueError):  # a function of an extension that does not say
        return set()
