"""``scipy.optimize.minimize`` with this library's solvers: NumPy arrays in, SciPy's result out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descend.fit.scipy_constrained import constrained_result
from descend.fit.scipy_constraints import array_constraints
from descend.fit.scipy_options import LBFGSB, Method, Options, bounds_of_pairs, method_of, options_of, steps_of
from descend.fit.scipy_result import Reporter, result_of_run
from descend.second_order.mathematics.dense_inverse import DenseInverse
from descend.second_order.mathematics.differences import EVALUATIONS, SCHEMES
from descend.second_order.problem.array_objective import ArrayObjective
from descend.second_order.problem.domain import domain_errors_of
from descend.second_order.problem.objective import CG_INSTEAD, check_dense_fits
from descend.second_order.solvers.box import CompactHessian, bounded_descent
from descend.second_order.solvers.compiled_history import compact_inverse
from descend.second_order.solvers.descent import line_search_descent
from descend.second_order.solvers.newton_descent import PAIRS, DenseNewton, NewtonCG, trust_region_descent
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import Run

WHO = "scipy_minimize"


def scipy_minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: str | None = None,
    jac: Callable[..., Any] | bool | str | None = None,
    hess: Callable[..., Any] | str | None = None,
    hessp: Callable[..., Any] | None = None,
    bounds: Any = None,
    constraints: Any = (),
    tol: float | None = None,
    callback: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    domain_errors: type[Exception] | tuple[type[Exception], ...] = (),
) -> Any:
    """Find a local minimum of a function of NumPy arrays, as ``scipy.optimize.minimize`` does.

    Scripts change one line: ``from descend import scipy_minimize as minimize``. The arguments are SciPy's, and so is
    the result; the solvers are those of ``descend.minimize``. What differs:

    - A run goes on until the gradient is within ``gtol``. SciPy's L-BFGS-B stops earlier, where an iteration lowers
      the value by less than 2.2e-9 of it; here only if ``ftol`` is given. With finite differences, whose gradients
      have few digits, three such iterations in a row end the run.
    - NaN, infinity, ``numpy.linalg.LinAlgError`` and ``domain_errors`` away from ``x0`` are walls: a shorter step is
      tried. The best point evaluated is returned. ``maxiter`` and ``maxfun`` are not exceeded.
    - ``jac=None`` is ``jac="2-point"``: differences of length 1.5e-8 times max(1, abs(x)), within the bounds.

    Args:
        fun: maps an array of the shape of ``x0``, and ``args``, to a number. Called with a copy.
        x0: the start: a number or an array of any shape, computed with in float64. It is clipped to the bounds.
        args: a tuple of further arguments of ``fun``, ``jac``, ``hess`` and ``hessp``. Default: ``()``.
        method: upper or lower case. ``"L-BFGS-B"``, ``"BFGS"``, ``"CG"`` (which is L-BFGS); ``"Newton-CG"``,
            ``"trust-ncg"``, ``"trust-krylov"`` (conjugate gradients in a trust region); ``"trust-exact"``,
            ``"dogleg"`` (the dense Hessian); ``"SLSQP"``, ``"trust-constr"`` (an augmented Lagrangian). None is SLSQP
            with constraints, else L-BFGS-B with bounds, else BFGS. Default: None.
        jac: a function that returns the gradient; True if ``fun`` returns (value, gradient); ``"2-point"`` or None,
            or ``"3-point"``, for finite differences, whose evaluations all count. Newton's methods need a gradient.
        hess: a function that returns the Hessian, as an array, a sparse matrix or a ``LinearOperator``, for Newton's
            methods.
        hessp: a function of x, a vector and ``args`` that returns the Hessian's product with the vector. With neither,
            Newton's methods take differences of gradients. Default: None.
        bounds: pairs (lower, upper), one for each variable, None where there is no bound; or ``scipy.optimize.Bounds``.
            For ``"L-BFGS-B"``, ``"SLSQP"`` and ``"trust-constr"``. Every evaluation is inside, differences included.
            Default: None.
        constraints: for ``"SLSQP"`` and ``"trust-constr"``: dicts with ``"type"``, ``"fun"``, ``"jac"`` and ``"args"``;
            ``scipy.optimize.NonlinearConstraint`` or ``LinearConstraint``. ``fun`` may be evaluated where they do not
            hold. The gradient and the violations, each divided by the largest entry of its gradient at ``x0`` if that
            exceeds 1, are at most ``gtol`` at the end. Default: none.
        tol: stands for ``gtol`` where that is not given, and for the ``ftol`` or ``xtol`` by which a run that rounding
            ends is judged: see ``status`` below. Default: those of the method.
        callback: called as ``callback(x)`` after each iteration, or as ``callback(intermediate_result=...)`` if that is
            the name of its parameter; stops the solver by raising ``StopIteration``.
        options: those of SciPy: ``maxiter``, ``gtol``, ``disp``, ``return_all``; ``maxfun``, ``maxcor`` and ``ftol``
            for L-BFGS-B; ``norm`` for BFGS and CG; ``xtol`` for Newton-CG; ``eps`` and ``finite_diff_rel_step`` for
            differences. ``gtol`` is absolute: for the largest entry of the (projected) gradient, 1e-5, or 1e-8 for
            Newton-CG; for the 2-norm, 1e-4, with ``"trust-..."`` and ``"dogleg"``. Others are ignored with a
            ``scipy.optimize.OptimizeWarning``.
        domain_errors: exceptions that ``fun`` and ``jac`` raise outside their domain; as for ``minimize``.
    Returns:
        ``scipy.optimize.OptimizeResult`` with x, fun, jac, nit, nfev, njev, nhev, status, success and message, and
        ``hess_inv`` as SciPy has it for BFGS and L-BFGS-B. ``status`` is 0 where the solver converged, 1 at a limit, 2
        where no step lowered the function further, 3 for NaN at the start or in all directions, 4 where ``constraints``
        seem to have no solution, 99 if ``callback`` stopped. With ``constraints`` there are ``maxcv``, the largest
        violation, and ``multipliers``, one for each entry of each constraint, equalities first. Instead of 2 the status
        is 0 if the last iteration of L-BFGS-B gained less than ``ftol``, 2.2e-9 by default, or the last step of
        Newton-CG was shorter than ``xtol``, 1e-5: rounding allows no more, and the message says so.
    Raises:
        ValueError, TypeError: if an argument is not as above; before ``fun`` is called.
        ImportError: without SciPy.
        Exception: whatever ``fun`` raises.
    Example:
        >>> def rosenbrock(x, a):
        ...     return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = scipy_minimize(rosenbrock, [-1.2, 1.0], args=(1.0,), bounds=[(None, 0.5), (None, None)])
        >>> result.success, result.x.round(3).tolist()
        (True, [0.5, 0.25])

    Source:
        https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.minimize.html
    """
    _check_scipy()
    constraints = () if constraints is None else constraints
    chosen = method_of(method, bounds is not None, bool(constraints), WHO)
    settings = options_of(chosen, options, tol, WHO)
    _check_functions(chosen, fun=fun, jac=jac, hess=hess, hessp=hessp, callback=callback)
    walls = domain_errors_of(domain_errors, WHO)
    gradient: Any = _with_args(jac, args) if callable(jac) else jac or SCHEMES[0]
    array = _start(x0)
    with torch.inference_mode(False), torch.no_grad():
        x = torch.from_numpy(array.reshape(-1))
        relative_step = steps_of("finite_diff_rel_step", settings.finite_diff_rel_step, len(x), WHO)
        objective = ArrayObjective(
            WHO,
            _with_args(fun, args),
            array.shape,
            jac=gradient,
            hess=_with_args(hess, args) if callable(hess) else None,
            hessp=None if hessp is None else _with_args(hessp, args),
            bounds=bounds_of_pairs(bounds, x, WHO),
            absolute_step=steps_of("eps", settings.eps, len(x), WHO),
            relative_step=relative_step,
        )
        conditions = array_constraints(constraints, array.shape, objective.box, relative_step, WHO)
        objective.domain_errors = (np.linalg.LinAlgError, *walls)
        if objective.lower is not None:
            x = torch.clamp(x, objective.lower, objective.upper)
        if constraints:
            return constrained_result(chosen, settings, objective, x, conditions, callback, array.shape)
        reporter = Reporter(chosen, settings, callback, array.shape, has_differences=isinstance(gradient, str))
        run = Run(
            objective,
            tol=settings.tolerance(chosen, len(x)),
            max_iter=settings.max_iter(chosen, len(x)),
            max_eval=_max_eval(chosen, settings, objective),
            callback=reporter,
        )
        status, learner = _solve(chosen, run, objective, x, settings.maxcor, reporter)
        return result_of_run(run, status, objective, reporter, learner, settings.disp)


def _check_scipy() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{WHO} returns SciPy's OptimizeResult: pip install 'descend[scipy]'.") from error


def _check_functions(method: Method, **functions: Any) -> None:
    for name, function in functions.items():
        if name == "jac" and (isinstance(function, bool) or function in SCHEMES):
            continue
        if name == "hess" and function in SCHEMES:
            continue
        if not callable(function) and (function is not None or name == "fun"):
            also = {"jac": f", True, one of {SCHEMES} or None", "hess": f", one of {SCHEMES} or None", "fun": ""}
            raise TypeError(f"{WHO}: {name} must be a function{also.get(name, ' or None')}, got {function!r}.")
    for name in ("hess", "hessp"):
        if functions[name] is not None and not method.is_newton:
            raise ValueError(f"{WHO}: {name} is for Newton's methods, got method='{method.name}'. Leave it out.")
    if method.is_newton and not (callable(functions["jac"]) or functions["jac"] is True):
        raise ValueError(
            f"{WHO}: method='{method.name}' needs the gradient: give jac, or take method='{LBFGSB}', which does with "
            "differences of fun."
        )


def _start(x0: Any) -> NDArray[np.float64]:
    array = np.atleast_1d(np.asarray(x0))
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{WHO}: x0 must be an array of real numbers, got {array.dtype}.")
    return array.astype(np.float64)


def _with_args(function: Callable[..., Any], args: Any) -> Callable[..., Any]:
    further = args if isinstance(args, tuple) else (args,)
    return (lambda *arguments: function(*arguments, *further)) if further else function


def _max_eval(method: Method, options: Options, objective: ArrayObjective) -> float:
    """Evaluations with a gradient that need at most ``maxfun`` calls of the function; one at least."""
    if method.name != LBFGSB or options.maxfun == math.inf:
        return math.inf
    differences = EVALUATIONS[objective.jac] * objective.space.numel if isinstance(objective.jac, str) else 0
    return max(1, options.maxfun // (1 + differences))


def _solve(
    method: Method, run: Run, objective: ArrayObjective, x: Tensor, history_size: int, reporter: Reporter
) -> tuple[Status, Any]:
    """Run the solver; return why it stopped, and its model of the curvature."""
    if method.solver in ("newton", "bfgs"):
        instead = CG_INSTEAD if method.solver == "newton" else f"method='{LBFGSB}'"
        check_dense_fits(f"{WHO}: method='{method.name}'", x, instead, objective.space)
    point, options = run.start(x, scale=0.0), (x.dtype, x.device)  # so that tolerances are absolute
    reporter.start(point.x)
    if method.solver == "newton":
        return trust_region_descent(run, point, DenseNewton(objective))[0], None
    if method.solver == "newton-cg":
        inverse = compact_inverse(len(x), PAIRS, *options)
        return trust_region_descent(run, point, NewtonCG(objective, run, point, inverse))[0], None
    if objective.lower is not None:
        hessian = CompactHessian(len(x), history_size, *options)
        return bounded_descent(run, point, hessian), hessian
    learner = (
        DenseInverse(len(x), *options) if method.solver == "bfgs" else compact_inverse(len(x), history_size, *options)
    )
    return line_search_descent(run, point, learner), learner
