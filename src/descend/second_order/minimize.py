"""Find a local minimum of a smooth function of tensors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from descend.second_order.constrained_minimize import constraint_functions, minimize_constrained
from descend.second_order.constraints import Constraint
from descend.second_order.flat_problem import FlatProblem
from descend.second_order.mathematics.directions import DenseInverse, Directions, Steepest
from descend.second_order.problem.objective import CG_INSTEAD, Curved, Point, check_dense_fits
from descend.second_order.solvers.augmented_lagrangian import Limits
from descend.second_order.solvers.box import CompactHessian, bounded_descent
from descend.second_order.solvers.compiled_history import compact_inverse
from descend.second_order.solvers.descent import line_search_descent
from descend.second_order.solvers.newton_descent import PAIRS, DenseNewton, NewtonCG, trust_region_descent
from descend.second_order.solvers.result import MESSAGES, Progress, Result, Status, X, result_of
from descend.second_order.solvers.run import Run

MinimizeMethod: TypeAlias = Literal["gd", "bfgs", "l-bfgs", "newton-cg", "newton"]
METHODS = get_args(MinimizeMethod)
HISTORY_SIZE = 10
MAX_ITER = 15_000
WHO = "minimize"


def minimize(
    fun: Callable[[X], Any],
    x0: X,
    method: MinimizeMethod = "l-bfgs",
    bounds: Any = None,
    tol: float | None = None,
    max_iter: int | None = None,
    max_eval: int | None = None,
    callback: Callable[[Progress], Any] | None = None,
    *,
    jac: Callable[[X], Any] | bool | None = None,
    hvp: Callable[[X, X], Any] | None = None,
    history_size: int | None = None,
    constraints: Sequence[Constraint] | Constraint = (),
) -> Result[X]:
    """Find a local minimum of a smooth function, and say why the solver stopped.

    - ``"l-bfgs"``: BFGS from the last ``history_size`` steps, O(n) memory; with ``bounds``, L-BFGS-B.
    - ``"newton-cg"``: truncated conjugate gradients in a trust region, O(n) memory.
    - ``"newton"``: the dense Hessian in a trust region, O(n^2) memory.
    - ``"bfgs"``: BFGS, O(n^2) memory.
    - ``"gd"``: gradient descent with a line search.

    Args:
        fun: maps a structure like ``x0`` to a scalar tensor. Where it is not defined, it may return NaN or Inf, or
            raise ``torch.linalg.LinAlgError``, but not at ``x0``.
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
        constraints: a list of ``eq(g)`` and ``ineq(h)``, for g(x) == 0 and h(x) >= 0, where g and h map the argument
            of ``fun`` to real tensors of any shape. ``x0`` need not be feasible, and evaluated points are not, except
            for ``bounds``. ``max_eval`` counts evaluations of ``fun`` and all constraints together. The result is a
            ``ConstrainedResult``, with multipliers. Not with ``jac``, ``hvp`` or DTensors. Default: none.
    Returns:
        A ``Result``: the best point seen, and why the solver stopped. ``x`` is never NaN unless ``x0`` is; ``fun`` is
        NaN only if it is at ``x0``.
    Raises:
        ValueError, TypeError: if an argument is not as above, or ``fun`` returns no real scalar; for ``"bfgs"`` and
            ``"newton"`` if tensors are sharded.
        RuntimeError: if the value does not depend on ``x0`` as far as autograd can see.
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

    Source:
        Nocedal & Wright 2006, https://doi.org/10.1007/978-0-387-40065-5; each method's module names its own.
    """
    began = time.perf_counter()
    _check_options(method, bounds, history_size, tol, max_iter, max_eval)
    _check_functions(method, fun=fun, jac=jac, hvp=hvp, callback=callback)
    conditions = constraint_functions(constraints, jac, hvp, WHO)
    with torch.inference_mode(False), torch.no_grad():
        problem = FlatProblem(
            WHO, fun, x0, bounds, jac, hvp, needs_curvature=method in ("newton", "newton-cg"), constraints=conditions
        )
        _check_dense(method, problem)
        limits = Limits(
            tol=default_tolerance(problem.structure.eps) if tol is None else tol,
            max_iter=MAX_ITER if max_iter is None else max_iter,
            max_eval=math.inf if max_eval is None else max_eval,
            callback=None if callback is None else problem.reporter(callback),
        )

        def new_descent() -> Callable[[Run, Point], Status]:
            return _descent(method, problem.objective, problem.start, history_size or HISTORY_SIZE)

        if conditions:
            return minimize_constrained(problem, new_descent, limits, began=began)
        run = Run(problem.objective, **limits._asdict())
        try:
            status = new_descent()(run, run.start(problem.start))
        finally:
            problem.set_parameters(run)
    x = problem.tree_of(run.best.x)
    return result_of(run, status, MESSAGES[status], x, problem.split_tree, began=began)


def _check_options(
    method: str,
    bounds: Any,
    history_size: int | None,
    tol: float | None,
    max_iter: int | None,
    max_eval: int | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"{WHO}: method must be one of {METHODS}, got {method!r}.")
    if method != "l-bfgs" and (bounds is not None or history_size is not None):
        what = "bounds" if bounds is not None else "history_size"
        raise ValueError(f"{WHO}: {what} is for method='l-bfgs', got method={method!r}. Leave one of them out.")
    if tol is not None and not (isinstance(tol, int | float) and 0 <= tol < math.inf):
        raise ValueError(f"{WHO}: tol must be a finite number >= 0, got {tol!r}.")
    for name, value, least in (("max_iter", max_iter, 0), ("max_eval", max_eval, 1), ("history_size", history_size, 1)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{WHO}: {name} must be an integer >= {least}, got {value!r}.")


def _check_functions(method: str, **functions: Any) -> None:
    if functions["hvp"] is not None and not method.startswith("newton"):
        raise ValueError(f"{WHO}: hvp is for method='newton' or 'newton-cg', got method={method!r}. Leave it out.")
    for name, function in functions.items():
        if not callable(function) and function is not None and not (name == "jac" and isinstance(function, bool)):
            also = {"fun": "", "jac": ", True or None"}.get(name, " or None")
            raise TypeError(f"{WHO}: {name} must be a function{also}, got {function!r}.")


def _check_dense(method: str, problem: FlatProblem[Any]) -> None:
    if method in ("newton", "bfgs"):
        instead = CG_INSTEAD if method == "newton" else "method='l-bfgs'"
        check_dense_fits(f"{WHO}: method={method!r}", problem.start, instead, problem.objective.space)


def _descent(method: str, objective: Curved, x: Tensor, history_size: int) -> Callable[[Run, Point], Status]:
    """What minimizes from a point; what it learns of the curvature is used again if it is called again."""
    space = objective.space
    options = x.dtype, x.device, space
    if method == "newton":
        return lambda run, point: trust_region_descent(run, point, DenseNewton(objective))[0]
    if method == "newton-cg":
        inverse = compact_inverse(x.numel(), PAIRS, *options)
        return lambda run, point: trust_region_descent(run, point, NewtonCG(objective, run, point, inverse))[0]
    if objective.lower is not None:
        model = CompactHessian(x.numel(), history_size, *options)
        return lambda run, point: bounded_descent(run, point, model)
    directions: Directions
    if method == "gd":
        directions = Steepest(space)
    elif method == "bfgs":
        directions = DenseInverse(x.numel(), x.dtype, x.device)
    else:
        directions = compact_inverse(x.numel(), history_size, *options)
    return lambda run, point: line_search_descent(run, point, directions)


def default_tolerance(eps: float) -> float:
    """The default of ``tol`` for a precision: 1e-6 for float64, 1e-4 for float32, 1e-2 for half precision."""
    return 1e-6 if eps < 1e-12 else 1e-4 if eps < 1e-6 else 1e-2
