"""Find a local minimum of a smooth function of tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from descend.second_order.batched import minimize_batched
from descend.second_order.constrained_minimize import ConstrainedProblem, constraint_functions, minimize_constrained
from descend.second_order.constraints import Constraint
from descend.second_order.function_problem import FunctionProblem
from descend.second_order.limits import check_limits, solver_limits
from descend.second_order.problem.arguments import with_args
from descend.second_order.problem.bounds import differentiable_bounds
from descend.second_order.problem.domain import domain_errors_of
from descend.second_order.problem.objective import FunctionObjective
from descend.second_order.problem.transforms import check_not_transformed
from descend.second_order.solvers.batched_result import BatchedResult, BestResult, best_of
from descend.second_order.solvers.budget import Limits
from descend.second_order.solvers.constrained_result import ConstrainedResult
from descend.second_order.solvers.implicit_function import differentiable_solution
from descend.second_order.solvers.methods import METHODS, MinimizeMethod, check_method_fits, descent_of
from descend.second_order.solvers.result import MESSAGES, Progress, Result, Status, X, result_of
from descend.second_order.solvers.run import Descend, Run

HISTORY_SIZE = 10
WHO = "minimize"


@overload
def minimize(
    fun: Callable[..., Any],
    x0: X,
    method: MinimizeMethod = ...,
    bounds: Any = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    jac: Callable[..., Any] | bool | None = ...,
    hvp: Callable[..., Any] | None = ...,
    history_size: int | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    domain_errors: type[Exception] | tuple[type[Exception], ...] = ...,
    batched: Literal[True],
) -> BatchedResult[X]: ...


@overload
def minimize(
    fun: Callable[..., Any],
    x0: X,
    method: MinimizeMethod = ...,
    bounds: Any = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    jac: Callable[..., Any] | bool | None = ...,
    hvp: Callable[..., Any] | None = ...,
    history_size: int | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    domain_errors: type[Exception] | tuple[type[Exception], ...] = ...,
    batched: Literal["best"],
) -> BestResult[X]: ...


@overload
def minimize(
    fun: Callable[..., Any],
    x0: X,
    method: MinimizeMethod = ...,
    bounds: Any = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    jac: Callable[..., Any] | bool | None = ...,
    hvp: Callable[..., Any] | None = ...,
    history_size: int | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    domain_errors: type[Exception] | tuple[type[Exception], ...] = ...,
    constraints: Sequence[Constraint] | Constraint,
) -> ConstrainedResult[X]: ...


@overload
def minimize(
    fun: Callable[..., Any],
    x0: X,
    method: MinimizeMethod = ...,
    bounds: Any = ...,
    tol: float | None = ...,
    max_iter: int | None = ...,
    max_eval: int | None = ...,
    callback: Callable[[Progress], Any] | None = ...,
    *,
    jac: Callable[..., Any] | bool | None = ...,
    hvp: Callable[..., Any] | None = ...,
    history_size: int | None = ...,
    args: tuple[Any, ...] = ...,
    differentiable: bool = ...,
    domain_errors: type[Exception] | tuple[type[Exception], ...] = ...,
    batched: Literal[False] = ...,
    constraints: tuple[()] = ...,
) -> Result[X]: ...


def minimize(
    fun: Callable[..., Any],
    x0: X,
    method: MinimizeMethod = "l-bfgs",
    bounds: Any = None,
    tol: float | None = None,
    max_iter: int | None = None,
    max_eval: int | None = None,
    callback: Callable[[Progress], Any] | None = None,
    *,
    jac: Callable[..., Any] | bool | None = None,
    hvp: Callable[..., Any] | None = None,
    history_size: int | None = None,
    args: tuple[Any, ...] = (),
    differentiable: bool = False,
    domain_errors: type[Exception] | tuple[type[Exception], ...] = (),
    batched: bool | Literal["best"] = False,
    constraints: Sequence[Constraint] | Constraint = (),
) -> Result[X] | BatchedResult[X]:
    """Find a local minimum of a smooth function, and say why the solver stopped.

    - ``"l-bfgs"``: BFGS from the last ``history_size`` steps, O(n) memory; with ``bounds``, L-BFGS-B.
    - ``"newton-cg"``: truncated conjugate gradients in a trust region, O(n) memory; up to 100 variables the dense
      Hessian takes over where rounding makes them long.
    - ``"newton"``: the dense Hessian in a trust region, O(n^2) memory.
    - ``"bfgs"``: BFGS, O(n^2) memory.
    - ``"ss-broyden"``, ``"ss-bfgs"``: the same with self-scaled updates, for physics-informed networks, O(n^2) memory.
    - ``"gd"``: gradient descent with a line search.

    Args:
        fun: maps a structure like ``x0`` to a scalar tensor. Where it is not defined, it may return NaN or Inf, or
            raise ``torch.linalg.LinAlgError`` or one of ``domain_errors``, but not at ``x0``.
        x0: the start: a floating point or complex tensor, or dicts, lists and tuples of such in any nesting, dtypes and
            devices mixed. It is not changed. An ``nn.Module``, or a structure of ``nn.Parameter`` only, is optimized
            in place instead: ``fun`` gets the module or the parameters themselves, set to each trial, and they hold
            the result at the end. If tensors are sharded (``DTensor``), every rank calls ``minimize`` alike; ``fun``
            returns a DTensor, or a plain tensor of which the mean over the ranks is minimized, as FSDP averages
            gradients. A plain tensor beside DTensors must be equal on all ranks, and so must be its gradient.
        method: one of those above. Default: ``"l-bfgs"``.
        bounds: ``(lower, upper)``, each a number, a tensor that broadcasts to every tensor of ``x0``, or a structure
            like ``x0``; infinite or None where there is none. ``x0`` is clamped to them; every evaluation is inside.
            Only for ``"l-bfgs"``. Default: None.
        tol: converged when the largest absolute entry of the gradient (with bounds, of its projection
            x - clamp(x - grad)) is at most ``tol * max(1, its value at x0)``; >= 0. Default: 1e-6 for float64, 1e-4
            for float32, 1e-2 for half precision.
        max_iter: iterations at most, >= 0. Default: 15,000.
        max_eval: evaluations of ``fun`` with its gradient at most, >= 1. Default: no limit but ``max_iter``.
        callback: gets a ``Progress`` after each iteration; stops the solver by returning True or by raising
            ``StopIteration``.
        jac: None for autograd; True if ``fun`` returns (value, gradient); or a function that returns the gradient.
        hvp: None for autograd; or a function of (x, v) that returns the Hessian at x times v; for ``"newton"`` and
            ``"newton-cg"``. Operations marked ``once_differentiable`` need it: autograd takes their curvature for 0.
        history_size: steps from which ``"l-bfgs"`` approximates the Hessian, >= 1; only for this method. Default: 10.
        args: a tuple of further arguments, of any kind: ``fun(x, *args)``, ``jac(x, *args)``, ``hvp(x, v, *args)``.
            Default: ().
        differentiable: whether ``result.x`` can be differentiated, backward or forward, with respect to any tensors
            that require gradients and that ``fun`` takes as ``args`` or closes over, that are ``bounds``, or that
            ``constraints`` close over. The derivatives are those of the implicit function theorem: variables at a bound
            stay there, and active constraints stay active; backward solves one linear system with the Hessian (with
            constraints, the Lagrangian's, along them), by Cholesky's factorization for up to 200 variables, else by
            conjugate gradients. Its relative error is about that of ``x``: lower ``tol`` if that is too much. It takes
            one evaluation more at most (within ``max_eval``). Backward raises ``RuntimeError`` if the status is not
            ``converged``, if the Hessian is singular or not positive definite, if an active bound or inequality has a
            multiplier of zero, if gradients of active constraints are linearly dependent, and if a derivative is
            differentiated again; with ``batched`` only if a derivative of that problem is asked for. With ``jac``, it
            must be computed from ``x`` and ``args`` with torch operations. Not for parameters and DTensors. Default:
            False.
        domain_errors: an exception class, or a tuple of such: exceptions that ``fun`` and ``jac`` raise outside their
            domain, as ``math.log`` raises ``ValueError``. The point counts as evaluated, and a shorter step is tried.
            At ``x0`` and in second derivatives they propagate, and ``StopIteration`` and ``MemoryError`` always do.
            Default: none.
        batched: True to solve B problems at once, each as by itself. Every tensor in ``x0`` has a first dimension of
            B, ``fun`` returns B values, of each problem from its own rows alone, and the same again when asked again.
            Problems that have finished leave: ``fun`` then gets fewer rows, of ``x`` and of every tensor in ``args``
            whose first dimension is B, which is where data of single problems belong. One more call without gradient
            at the start, of half of the problems, checks all that. ``bounds`` broadcast to ``x0``, and ``tol`` and
            the limits hold for each problem. ``callback`` gets a ``Progress`` with a first dimension of B, after each
            call of ``fun`` that ends an iteration, and may return a bool tensor of the problems to stop. Where ``fun``
            raises one of ``domain_errors`` at a start, the problem ends as ``non_finite``. For ``"l-bfgs"``,
            ``"bfgs"`` and ``"newton"``, plain tensors, and without ``hvp``. ``"best"``: the same from B starts, to
            return the best. Default: False.
        constraints: a list of ``eq(g)`` and ``ineq(h)``, for g(x) == 0 and h(x) >= 0, where g and h map ``x`` alone to
            real tensors of any shape. ``x0`` and other points evaluated may violate them, but never ``bounds``.
            ``max_eval`` counts evaluations of ``fun`` and all constraints together. Not with ``jac``, ``hvp``,
            ``batched`` or DTensors. Default: none.
    Returns:
        A ``Result``: the best point seen, and why the solver stopped. ``x`` is never NaN unless ``x0`` is; ``fun`` is
        NaN only if it is at ``x0``. With ``constraints`` a ``ConstrainedResult``, which has multipliers. With
        ``batched=True`` a ``BatchedResult``. With ``"best"`` a ``BestResult``: the ``Result`` of the lowest value, and
        as its ``starts`` the ``BatchedResult`` of all; starts that failed (``line_search_failed``, ``non_finite``,
        ``unbounded``) count only if all did.
    Raises:
        ValueError, TypeError: if an argument is not as above, or ``fun`` returns no real scalar; for methods with
            O(n^2) memory if tensors are sharded.
        RuntimeError: if the value does not depend on ``x0`` as far as autograd can see; within ``torch.func``.
        MemoryError: if a dense matrix would not fit.
        Exception: whatever ``fun`` raises; parameters are then set to the best point seen.
    Example:
        >>> def rosenbrock(x):
        ...     return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> result = minimize(rosenbrock, torch.zeros(4, dtype=torch.float64))
        >>> result.status, result.success, bool((result.x - 1).abs().max() < 1e-5)
        (<Status.converged: 'converged'>, True, True)
        >>> fit = minimize(lambda p: (p["scale"] * 2 - 1).square() + p["shift"] ** 2, dict(
        ...     scale=torch.tensor(3.0), shift=torch.tensor(1.0)), bounds=(dict(scale=1, shift=None), None))
        >>> fit.x["scale"]
        tensor(1.)
        >>> starts = torch.linspace(-4, 4, 9, dtype=torch.float64)
        >>> best = minimize(lambda x: torch.cos(3 * x) + 0.1 * x**2, starts, batched="best")
        >>> f"{best.x:.3f}", len(best.starts), bool(best.starts.success.all())
        ('-1.024', 9, True)

    Source:
        Nocedal & Wright 2006, https://doi.org/10.1007/978-0-387-40065-5; each method's module names its own.
    """
    began = time.perf_counter()
    check_not_transformed(WHO)
    _check_method(method, bounds, history_size)
    check_limits(WHO, tol, max_iter, max_eval, differentiable, history_size)
    _check_functions(method, fun=fun, jac=jac, hvp=hvp, callback=callback)
    walls = domain_errors_of(domain_errors, WHO)
    conditions = constraint_functions(constraints, WHO, jac=jac, hvp=hvp, batched=batched or None)
    if batched != "best" and not isinstance(batched, bool):
        raise ValueError(f"{WHO}: batched must be False, True or 'best', got {batched!r}.")
    iterations, evaluations = solver_limits(max_iter, max_eval, differentiable)
    if batched:
        many = minimize_batched(
            WHO,
            fun,
            x0,
            args,
            method=method,
            bounds=bounds,
            tol=default_tolerance if tol is None else lambda eps: float(tol),
            max_iter=iterations,
            max_eval=evaluations,
            callback=callback,
            jac=jac,
            hvp=hvp,
            history_size=history_size or HISTORY_SIZE,
            domain_errors=walls,
            differentiable=differentiable,
        )
        return best_of(many, WHO) if batched == "best" else many
    fun, jac, hvp = with_args(WHO, args, fun, jac, hvp)
    records_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad():
        # Whether autograd sees how the gradient from jac depends on x is known from its graph, at the first evaluation.
        needs_curvature = method in ("newton", "newton-cg") or (differentiable and jac is not None)
        problem: ConstrainedProblem[X] | FunctionProblem[X]
        if conditions:
            problem = ConstrainedProblem(WHO, fun, x0, bounds, conditions, walls)
        else:
            problem = FunctionProblem(WHO, fun, x0, bounds, jac, hvp, needs_curvature, walls)
        ends: list[Tensor | None] | None = None
        if differentiable:
            problem.check_values()
            with torch.set_grad_enabled(records_graph):
                ends = differentiable_bounds(bounds, problem.structure, WHO)
        check_method_fits(WHO, method, problem.objective, problem.start)
        limits = Limits(
            tol=default_tolerance(problem.structure.eps) if tol is None else float(tol),
            max_iter=iterations,
            max_eval=evaluations,
            callback=None if callback is None else problem.reporter(callback),
        )

        def new_descent() -> Descend:
            return descent_of(method, problem.objective, problem.start, history_size or HISTORY_SIZE)

        if isinstance(problem, ConstrainedProblem):
            return minimize_constrained(
                problem, new_descent, limits, began=began, ends=ends, records_graph=records_graph
            )
        run, status = _run(problem, new_descent(), limits)
        x = run.best.x
        if ends is not None:
            assert isinstance(problem.objective, FunctionObjective), "check_values has been called"
            with torch.set_grad_enabled(records_graph):
                x = differentiable_solution(WHO, problem.objective, x, status, *ends)
    return result_of(run, status, MESSAGES[status], problem.tree_of(x), problem.split_tree, began=began)


def _run(problem: FunctionProblem[X], descend: Descend, limits: Limits) -> tuple[Run, Status]:
    """Minimize; parameters are set to the best point, also if ``fun`` raises."""
    run = Run(problem.objective, **limits._asdict())
    try:
        status = descend(run, run.start(problem.start))
    finally:
        problem.set_parameters(run)
    return run, status


def _check_method(method: str, bounds: Any, history_size: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"{WHO}: method must be one of {METHODS}, got {method!r}.")
    if method != "l-bfgs" and (bounds is not None or history_size is not None):
        what = "bounds" if bounds is not None else "history_size"
        raise ValueError(f"{WHO}: {what} is for method='l-bfgs', got method={method!r}. Leave one of them out.")


def _check_functions(method: str, **functions: Any) -> None:
    if functions["hvp"] is not None and not method.startswith("newton"):
        raise ValueError(f"{WHO}: hvp is for method='newton' or 'newton-cg', got method={method!r}. Leave it out.")
    for name, function in functions.items():
        is_optional = name != "fun" and (function is None or (name == "jac" and isinstance(function, bool)))
        if not callable(function) and not is_optional:
            also = {"fun": "", "jac": ", True or None"}.get(name, " or None")
            raise TypeError(f"{WHO}: {name} must be a function{also}, got {function!r}.")


def default_tolerance(eps: float) -> float:
    """The default of ``tol`` for a precision: 1e-6 for float64, 1e-4 for float32, 1e-2 for half precision."""
    return 1e-6 if eps < 1e-12 else 1e-4 if eps < 1e-6 else 1e-2
