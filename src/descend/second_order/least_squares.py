"""Fit a model to data: minimize a sum of squared residuals, or of robust losses of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from descend.second_order.batched_least_squares import least_squares_batched
from descend.second_order.flat_problem import FlatProblem
from descend.second_order.limits import check_limits, solver_limits
from descend.second_order.mathematics.robust_losses import LOSSES, Rho
from descend.second_order.problem.arguments import with_args
from descend.second_order.problem.bounds import differentiable_bounds
from descend.second_order.problem.custom_loss import custom_loss
from descend.second_order.problem.residuals import FunctionResiduals, ParameterResiduals
from descend.second_order.problem.transforms import check_not_transformed
from descend.second_order.solvers.batched_least_squares_result import BatchedLeastSquaresResult, BestFit, best_fit
from descend.second_order.solvers.implicit_function import differentiable_solution
from descend.second_order.solvers.least_squares_descent import least_squares_descent
from descend.second_order.solvers.least_squares_result import LeastSquaresResult, least_squares_result
from descend.second_order.solvers.least_squares_run import LeastSquaresRun
from descend.second_order.solvers.result import Progress, X
from descend.second_order.solvers.sized_linearization import LINEARIZATIONS, JacobianKind
from descend.second_order.solvers.step_control import Damping, TrustRegion

LeastSquaresMethod: TypeAlias = Literal["trust-region", "lm"]
METHODS = get_args(LeastSquaresMethod)
LOOSEST = 0.01  # default of tol, whatever the precision
WHO = "least_squares"


@overload
def least_squares(
    residuals: Callable[..., Any],
    x0: X,
    bounds: Any = ...,
    loss: str | Callable[[Tensor], Any] = ...,
    method: LeastSquaresMethod = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    loss_scale: float = ...,
    jac: Callable[..., Any] | JacobianKind | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    batched: Literal[True],
) -> BatchedLeastSquaresResult[X]: ...


@overload
def least_squares(
    residuals: Callable[..., Any],
    x0: X,
    bounds: Any = ...,
    loss: str | Callable[[Tensor], Any] = ...,
    method: LeastSquaresMethod = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    loss_scale: float = ...,
    jac: Callable[..., Any] | JacobianKind | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    batched: Literal["best"],
) -> BestFit[X]: ...


@overload
def least_squares(
    residuals: Callable[..., Any],
    x0: X,
    bounds: Any = ...,
    loss: str | Callable[[Tensor], Any] = ...,
    method: LeastSquaresMethod = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    loss_scale: float = ...,
    jac: Callable[..., Any] | JacobianKind | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    batched: Literal[False] = ...,
) -> LeastSquaresResult[X]: ...


def least_squares(
    residuals: Callable[..., Any],
    x0: X,
    bounds: Any = None,
    loss: str | Callable[[Tensor], Any] = "linear",
    method: LeastSquaresMethod = "trust-region",
    tol: float | None = None,
    max_iter: int | None = None,
    max_eval: int | None = None,
    callback: Callable[[Progress], Any] | None = None,
    *,
    loss_scale: float = 1.0,
    jac: Callable[..., Any] | JacobianKind | None = None,
    args: tuple[Any, ...] = (),
    differentiable: bool = False,
    batched: bool | Literal["best"] = False,
) -> LeastSquaresResult[X] | BatchedLeastSquaresResult[X]:
    """Find a local minimum of half the sum of squared residuals, or of robust losses of them.

    The Jacobian of M residuals and N variables takes O(M N) memory, and an iteration O(M N^2) time, or O(M + N) memory
    with ``jac="products"``. Units of variables and residuals do not matter. Where residuals stay large, what
    Gauss-Newton leaves out of the Hessian is learned.

    - ``"trust-region"``: the steps of Moré 1978.
    - ``"lm"``: damped steps, changed as by Nielsen; mostly more evaluations.

    Args:
        residuals: maps a structure like ``x0`` to a tensor, or dicts, lists and tuples of tensors, of any shape, the
            same at each call. Complex residuals count by their magnitude. Where it is not defined, it may return NaN or
            Inf, or raise ``torch.linalg.LinAlgError``, but not at ``x0``.
        x0: the start, as for ``minimize``: a floating point or complex tensor, or dicts, lists and tuples of such. It
            is not changed. An ``nn.Module``, or a structure of ``nn.Parameter`` only, is fitted in place instead.
        bounds: ``(lower, upper)`` as for ``minimize``. ``x0`` is clamped to them; every evaluation is inside. Default:
            None.
        loss: rho in ``loss_scale**2 / 2 * sum(rho((r / loss_scale)**2))``, as in SciPy: ``"linear"`` (z), ``"huber"``,
            ``"soft_l1"``, ``"cauchy"`` or ``"arctan"``; or a function of z, elementwise, that returns rho(z), or rho,
            rho' and rho'' as a tensor of shape (3, M). Default: ``"linear"``, squares.
        method: one of those above. Default: ``"trust-region"``.
        tol: converged when the step to the minimizer of the model would lower the cost by at most ``tol**2`` of it (for
            squares: when the cosine between the residuals and what the variables can change of them is at most
            ``tol``), or change no variable by more than ``tol`` of it, or all by no more than rounding; >= 0. Default:
            the square root of the precision, 1.5e-8 for float64 and 3.5e-4 for float32, at most 0.01.
        max_iter: iterations at most, >= 0. Default: 15,000.
        max_eval: evaluations of ``residuals`` at most, >= 1; Jacobians are not counted. Default: no limit but
            ``max_iter``.
        callback: gets a ``Progress`` after each iteration; stops the solver by returning True or by raising
            ``StopIteration``.
        loss_scale: size of a residual from which a robust loss grows more slowly than its square, > 0. Default: 1.
        jac: a function that returns the Jacobian: shape (M, N), or that of the residuals followed by that of ``x0``, or
            a structure like ``x0`` of such; or how autograd is used: ``"dense"``: as many backward passes as there are
            residuals or variables, whichever are fewer, at once; ``"products"``: products with the Jacobian only, and
            LSMR in place of a factorization, in O(M + N) memory; ``"auto"`` or None: ``"dense"`` where that takes
            seconds at most and fits into memory. Default: None.
        args: a tuple of further arguments, of any kind: ``residuals(x, *args)``, ``jac(x, *args)``. Default: ().
        differentiable: whether ``result.x`` can be differentiated with respect to tensors that require gradients and
            that ``residuals`` takes as ``args`` or closes over, or that are ``bounds``; as for ``minimize``, with the
            exact Hessian of the cost, by autograd even if ``jac`` is given. It takes one evaluation more (within
            ``max_eval``). Default: False.
        batched: True to solve B problems at once. Every tensor in ``x0`` has a first dimension of B; ``residuals``
            returns tensors with a first dimension of B, of each problem from its own rows alone. All else is as for
            ``minimize``: problems that have finished leave, tensors in ``args`` whose first dimension is B are cut to
            the same rows, ``bounds`` broadcast to ``x0``, limits hold for each problem. Steps are those of
            ``"trust-region"``, but bounds are kept by projected steps, so that iterates differ from those of single
            runs there. Each evaluation computes Jacobians, dense, as many backward passes for all problems together as
            one has residuals or variables, whichever are fewer. Not with ``jac`` functions, ``"products"``, ``"lm"`` or
            ``differentiable``. ``"best"``: the same from B starts, to return the best. Default: False.
    Returns:
        A ``LeastSquaresResult``: the best point seen, its residuals, the covariance of the variables, and why the
        solver stopped. ``x`` is never NaN unless ``x0`` is; ``fun`` is NaN only if it is at ``x0``. With
        ``batched=True`` a ``BatchedResult`` that also has ``residuals``, ``jac``, ``rank`` (B,) and ``covariance``
        (B, n, n), whose entries are ``LeastSquaresResult``. With ``"best"`` that of the lowest cost, and as its
        ``starts`` all.
    Raises:
        ValueError, TypeError: if an argument is not as above, or ``residuals`` or ``jac`` return something else.
        RuntimeError: if the residuals do not depend on ``x0`` as far as autograd can see; within ``torch.func``.
        MemoryError: if the Jacobian would not fit.
        Exception: whatever ``residuals`` raises; parameters are then set to the best point seen.
    Example:
        >>> t = torch.linspace(0, 4, 20, dtype=torch.float64)
        >>> y = 3 * torch.exp(-0.7 * t)
        >>> fit = least_squares(lambda p: p[0] * torch.exp(-p[1] * t) - y, torch.tensor([1.0, 1.0]).double())
        >>> fit.status, fit.x.round(decimals=6).tolist(), fit.rank
        (<Status.converged: 'converged'>, [3.0, 0.7], 2)
        >>> y[5] = 100.0
        >>> robust = least_squares(lambda p: p[0] * torch.exp(-p[1] * t) - y, fit.x, loss="cauchy", loss_scale=0.01)
        >>> robust.x.round(decimals=3).tolist()
        [3.0, 0.7]

    Source:
        Moré 1978, https://doi.org/10.1007/BFb0067700; Madsen, Nielsen & Tingleff 2004,
        http://www2.imm.dtu.dk/pubdb/p.php?3215; Dennis, Gay & Welsch 1981, https://doi.org/10.1145/355958.355965;
        Transtrum & Sethna 2012, https://arxiv.org/abs/1201.5885.
    """
    began = time.perf_counter()
    check_not_transformed(WHO)
    _check_method(method, loss, loss_scale)
    check_limits(WHO, tol, max_iter, max_eval, differentiable)
    for name, function in (("residuals", residuals), ("jac", jac), ("callback", callback)):
        if name == "jac" and isinstance(function, str) and function in LINEARIZATIONS:
            continue
        if not callable(function) and (function is not None or name == "residuals"):
            also = {"residuals": "", "jac": f", one of {tuple(LINEARIZATIONS)} or None"}.get(name, " or None")
            raise TypeError(f"{WHO}: {name} must be a function{also}, got {function!r}.")
    rho = LOSSES[loss] if isinstance(loss, str) else custom_loss(loss, f"{WHO}: loss")
    if batched != "best" and not isinstance(batched, bool):
        raise ValueError(f"{WHO}: batched must be False, True or 'best', got {batched!r}.")
    iterations, evaluations = solver_limits(max_iter, max_eval, differentiable)
    if batched:
        if method != "trust-region" or jac not in (None, "auto", "dense") or differentiable:
            raise ValueError(
                f"{WHO}: batched needs method='trust-region', jac=None and differentiable=False, got {method!r}, "
                f"{jac!r} and {differentiable}. Fit the models one by one, or use minimize(batched=True)."
            )
        many = least_squares_batched(
            WHO,
            residuals,
            x0,
            args,
            bounds=bounds,
            rho=rho,
            loss_scale=loss_scale,
            tol=default_tolerance if tol is None else lambda eps: float(tol),
            max_iter=iterations,
            max_eval=evaluations,
            callback=callback,
        )
        return best_fit(many, WHO) if batched == "best" else many
    residuals, jac = with_args(WHO, args, residuals, jac)
    records_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad():
        problem = ResidualProblem(residuals, x0, bounds, jac if callable(jac) else None, rho, loss_scale)
        if differentiable:
            problem.check_values()
        run = LeastSquaresRun(
            problem.objective,
            tol=default_tolerance(problem.structure.eps) if tol is None else float(tol),
            max_iter=iterations,
            max_eval=evaluations,
            callback=None if callback is None else problem.reporter(callback),
        )
        control = TrustRegion() if method == "trust-region" else Damping()
        try:
            linearization = LINEARIZATIONS["dense" if callable(jac) else jac or "auto"](
                problem.objective, run.tol, None
            )
            status = least_squares_descent(run, problem.start, linearization, control)
        finally:
            problem.set_parameters(run)
        x = run.best.x
        if differentiable:
            assert isinstance(problem.objective, FunctionResiduals), "check_values has been called"
            with torch.set_grad_enabled(records_graph):
                ends = differentiable_bounds(bounds, problem.structure, WHO)
                x = differentiable_solution(WHO, problem.objective.as_function(WHO), x, status, *ends)
            problem.objective.n_eval += 1
    return least_squares_result(run, status, problem.tree_of(x), problem.structure.unflatten, began=began)


def default_tolerance(eps: float) -> float:
    """The default of ``tol`` for a precision."""
    return min(math.sqrt(eps), LOOSEST)


class ResidualProblem(FlatProblem[X]):
    """Residuals, a start and bounds, as an objective of a flat vector.

    Args:
        residuals, x0, bounds, jac, loss_scale: as ``least_squares`` takes them.
        rho: the loss; None for squares.
    """

    objective: FunctionResiduals | ParameterResiduals

    def __init__(
        self,
        residuals: Callable[[X], Any],
        x0: X,
        bounds: Any,
        jac: Callable[[X], Any] | None,
        rho: Rho | None,
        loss_scale: float,
    ) -> None:
        self.residuals, self.jac, self.rho, self.loss_scale = residuals, jac, rho, loss_scale
        super().__init__(WHO, x0, bounds, "" if jac is None else "jac")

    def new_objective(self, bounds: tuple[Tensor, Tensor] | None) -> FunctionResiduals | ParameterResiduals:
        if self.parameters is None:
            return FunctionResiduals(
                f"{WHO}: residuals",
                self.residuals,
                self.structure,
                jac=self.jac,
                rho=self.rho,
                loss_scale=self.loss_scale,
                bounds=bounds,
            )
        if self.is_sharded:
            raise ValueError(f"{WHO}: x0 must be in one process, got DTensors. Use minimize on the sum of squares.")
        return ParameterResiduals(
            f"{WHO}: residuals",
            lambda: self.residuals(self.tree),
            self.parameters,
            rho=self.rho,
            loss_scale=self.loss_scale,
            bounds=bounds,
        )


def _check_method(method: str, loss: Any, loss_scale: float) -> None:
    if method not in METHODS:
        raise ValueError(f"{WHO}: method must be one of {METHODS}, got {method!r}.")
    if not callable(loss) and (not isinstance(loss, str) or loss not in LOSSES):
        raise ValueError(f"{WHO}: loss must be one of {tuple(LOSSES)} or a function, got {loss!r}.")
    if not (isinstance(loss_scale, int | float) and 0 < loss_scale < math.inf):
        raise ValueError(f"{WHO}: loss_scale must be a finite number > 0, got {loss_scale!r}.")
