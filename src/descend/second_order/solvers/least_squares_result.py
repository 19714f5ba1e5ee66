"""What a fit returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.covariance import covariance
from descend.second_order.mathematics.gauss_newton import DenseGaussNewton
from descend.second_order.solvers.least_squares_run import LeastSquaresRun
from descend.second_order.solvers.result import MESSAGES, Result, Status, X, shortened

FIT_MESSAGES = {
    **MESSAGES,
    Status.converged: (
        "A further step would lower the cost by at most tol**2 of it, or change no variable by more than tol of it, or "
        "x by no more than rounding."
    ),
    Status.non_finite: (
        "The residuals or their Jacobian are NaN or infinite at the start or wherever a step could lead: start "
        "elsewhere, bound the variables, work with logarithms, or look for NaN in the data."
    ),
    Status.precision_limit: (
        "No step lowers the cost by more than rounding, while the model of the residuals still promises more than tol: "
        "use float64, accept a larger tol, or, if the fit is poor, look for a kink or a wrong jac."
    ),
}


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class LeastSquaresResult(Result[X]):
    """What ``least_squares`` returns: a ``Result``, and what the residuals tell about the solution.

    Attributes:
        fun: the cost, half the sum of the losses of the residuals, as SciPy's.
        grad: of the cost.
        residuals: at ``x``, as the function returned them.
        n_eval: evaluations of the residuals.
        n_jac: Jacobians.
        n_hvp: products with the Jacobian or its transpose, where no Jacobian was formed.
        jac: the Jacobian at ``x``, shape (M, N), of all residuals and variables flattened, its rows multiplied for the
            loss as in ``grad``; a complex number counts as two real ones. None where it was not formed or not finite.
    """

    residuals: Any
    n_jac: int
    jac: Tensor | None
    _model: DenseGaussNewton | None
    _unflatten: Callable[[Tensor], Any]

    @property
    def rank(self) -> int | None:
        """Rank of the Jacobian: its singular values, with columns of about unit length, beyond rounding; or None."""
        return None if self._model is None else int((self._model.plain_spectrum.values > 0).sum())

    @cached_property
    def covariance(self) -> Tensor | None:
        """Estimated covariance of the flattened variables, shape (N, N), as if no bound were active.

        ``2 * fun / (M - rank)`` times the inverse of J'J. A variable that the residuals do not determine has infinite
        variance, and NaN as covariance with others. All are NaN if there are no more residuals than the rank. None
        where ``jac`` is None.
        """
        if self._model is None or self.jac is None or self.rank is None:
            return None
        left = len(self.jac) - self.rank
        variance = 2 * self.fun / left if left > 0 else torch.nan
        values, _, rows = self._model.plain_spectrum
        return covariance(values, rows, self._model.scale, variance).to(self.jac)

    @cached_property
    def standard_errors(self) -> Any:
        """Square roots of the diagonal of ``covariance``; like ``x``, a dict for a module; or None."""
        return None if self.covariance is None else self._unflatten(self.covariance.diagonal().sqrt())

    def __repr__(self) -> str:
        return (
            f"LeastSquaresResult(status={self.status}, message={self.message!r}, x={shortened(self.x)}, "
            f"fun={self.fun:.6g}, grad_norm={self.grad_norm:.3g}, rank={self.rank}, n_iter={self.n_iter}, "
            f"n_eval={self.n_eval}, n_jac={self.n_jac}, n_hvp={self.n_hvp}, time={self.time:.3g} s)"
        )


def least_squares_result(
    run: LeastSquaresRun, status: Status, x: X, unflatten: Callable[[Tensor], Any], *, began: float
) -> LeastSquaresResult[X]:
    """The result of a run.

    Args:
        run: its ``best`` point is the result.
        status: why it stopped.
        x: the best point as the caller gets it.
        unflatten: maps the flat gradient to its structure.
        began: ``time.perf_counter()`` at the start.
    """
    best = run.best
    model = best.model if isinstance(best.model, DenseGaussNewton) else None
    return LeastSquaresResult(
        x=x,
        fun=best.value,
        grad=unflatten(best.grad),
        status=status,
        message=FIT_MESSAGES[status],
        grad_norm=best.norm,
        n_iter=run.n_iter,
        n_eval=run.n_eval,
        n_hvp=run.n_hvp,
        time=time.perf_counter() - began,
        history=run.history,
        residuals=best.tree,
        n_jac=run.objective.n_jac,
        jac=None if model is None else model.jacobian,
        _model=model,
        _unflatten=unflatten,
    )
