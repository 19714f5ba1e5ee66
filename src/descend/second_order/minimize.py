"""Find a local minimum of a smooth function of tensors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend.distributed.dtensors import is_dtensor
from descend.second_order.box import CompactHessian, bounded_descent
from descend.second_order.descent import line_search_descent
from descend.second_order.directions import CompactInverse, DenseInverse, Steepest
from descend.second_order.newton_descent import PAIRS, DenseNewton, NewtonCG, trust_region_descent
from descend.second_order.objective import CG_INSTEAD, Curved, FunctionObjective, Point, check_dense_fits
from descend.second_order.parameter_objective import ParameterObjective
from descend.second_order.parameters import FlatParameters
from descend.second_order.result import MESSAGES, Progress, Result, Status, X, result_of
from descend.second_order.run import Run
from descend.second_order.sharded_parameters import flat_parameters
from descend.second_order.shared_space import full_of
from descend.second_order.structure import Structure

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
    with torch.inference_mode(False), torch.no_grad():
        problem = _Problem(fun, x0, bounds, jac, hvp, needs_curvature=method in ("newton", "newton-cg"))
        run = Run(
            problem.objective,
            tol=default_tolerance(problem.structure.eps) if tol is None else tol,
            max_iter=MAX_ITER if max_iter is None else max_iter,
            max_eval=math.inf if max_eval is None else max_eval,
            callback=None if callback is None else problem.reporter(callback),
        )
        try:
            status = _solve(method, run, problem.objective, problem.start, history_size or HISTORY_SIZE)
        finally:
            problem.set_parameters(run)
    x = problem.tree_of(run.best.x)
    return result_of(run, status, MESSAGES[status], x, problem.split_tree, began=began)


class _Problem(Generic[X]):
    """The function, start and bounds of ``minimize``, as an objective of a flat vector."""

    def __init__(
        self,
        fun: Callable[[X], Any],
        x0: Any,
        bounds: Any,
        jac: Callable[[X], Any] | bool | None,
        hvp: Callable[[X, X], Any] | None,
        needs_curvature: bool,
    ) -> None:
        self.tree: Any = list(x0) if hasattr(x0, "__next__") else x0  # module.parameters() can be read only once
        self.structure = structure = Structure(self.tree, WHO)
        flat_bounds = None if bounds is None else _flat_bounds(bounds, structure)
        self.parameters: FlatParameters | None = None
        self.objective: Curved
        is_sharded = any(map(is_dtensor, structure.leaves))
        self.is_in_place = all(isinstance(leaf, nn.Parameter) for leaf in structure.leaves)
        if is_sharded or self.is_in_place:
            if len({id(leaf) for leaf in structure.leaves}) < len(structure.leaves):
                raise ValueError(f"{WHO}: x0 must hold each parameter once, got one twice. Remove the duplicate.")
            if jac is not None or hvp is not None:
                kind = "DTensors" if is_sharded else "nn.Parameter"
                instead = "Leave" if is_sharded else "Detach x0, or leave"
                raise ValueError(
                    f"{WHO}: jac and hvp are functions of values, but x0 is made of {kind}, which are set in "
                    f"place. {instead} jac and hvp out."
                )
            if not self.is_in_place:
                self._copy_leaves()
            self.parameters = flat_parameters([{"params": structure.leaves}], WHO)
            if flat_bounds is not None:
                flat_bounds = self.parameters.narrow(flat_bounds[0]), self.parameters.narrow(flat_bounds[1])
            self.start = self.parameters.gather()
            self.objective = ParameterObjective(
                f"{WHO}: fun",
                lambda: fun(self.tree),
                self.parameters,
                needs_curvature=needs_curvature,
                bounds=flat_bounds,
            )
        else:
            self.start = structure.flatten(structure.leaves).clone()
            self.objective = FunctionObjective(
                WHO, fun, structure, jac=jac, hvp=hvp, needs_curvature=needs_curvature, bounds=flat_bounds
            )
        if flat_bounds is not None:
            self.start.clamp_(*flat_bounds)

    def _copy_leaves(self) -> None:
        """Sharded values are optimized in place, in copies that require gradients."""
        self.structure.leaves = [leaf.detach().clone().requires_grad_() for leaf in self.structure.leaves]
        self.tree = self.structure.tree_of(self.structure.leaves)

    def split_tree(self, x: Tensor) -> Any:
        """The structure of a flat vector, with tensors of its own."""
        return (
            self.structure.unflatten(x) if self.parameters is None else self.structure.tree_of(self.parameters.split(x))
        )

    def set_parameters(self, run: Run) -> None:
        """Set parameters to the best point seen."""
        if self.parameters is not None:
            self.parameters.scatter_(run.best.x if run.history else self.start)

    def tree_of(self, x: Tensor) -> X:
        """The structure of a flat vector; the parameters themselves, which have been set to it."""
        tree: X = self.tree if self.is_in_place else self.split_tree(x)
        return tree

    def reporter(self, callback: Callable[[Progress], Any]) -> Callable[[Run, Point], bool]:
        """The user's callback as a ``Run`` calls it. What the callback writes to is a copy, or is restored."""

        def report(run: Run, point: Point) -> bool:
            if not isinstance(self.objective, ParameterObjective):
                return call(run, point)
            self.objective.move_to(point.x)
            before = self.objective.point.gather()
            is_stopped = call(run, point)
            is_same = torch.equal(before, self.objective.point.gather())
            if self.objective.space.largest(not is_same):
                self.objective.forget_x()
            return is_stopped

        def call(run: Run, point: Point) -> bool:
            progress = Progress(
                x=self.tree_of(point.x.clone()),
                fun=point.value,
                grad=self.split_tree(point.grad.clone()),
                grad_norm=point.norm,
                n_iter=run.n_iter,
                n_eval=run.objective.n_eval,
                n_hvp=run.objective.n_hvp,
            )
            try:
                with torch.enable_grad():
                    return bool(callback(progress))
            except StopIteration:
                return True

        return report


def _flat_bounds(bounds: Any, structure: Structure) -> tuple[Tensor, Tensor]:
    if not (isinstance(bounds, tuple | list) and len(bounds) == 2):
        raise ValueError(f"{WHO}: bounds must be (lower, upper), got {bounds!r}.")
    if any(dtype.is_complex for dtype in structure.dtypes):
        raise ValueError(f"{WHO}: complex numbers have no order, so x0 cannot have bounds if it is complex.")
    lower, upper = pytree.tree_map(lambda end: full_of(end) if isinstance(end, Tensor) else end, tuple(bounds))
    lower = structure.bound(lower, -math.inf, f"{WHO}: the lower bound")
    upper = structure.bound(upper, math.inf, f"{WHO}: the upper bound")
    is_wrong = ~(lower <= upper) | (lower == math.inf) | (upper == -math.inf)
    if bool(is_wrong.any()):
        worst = int(is_wrong.long().argmax())
        raise ValueError(
            f"{WHO}: bounds must have lower <= upper, lower < inf and upper > -inf, without NaN, got {lower[worst]:g} "
            f"and {upper[worst]:g} at position {worst} of the flattened x0."
        )
    return lower, upper


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


def _solve(method: str, run: Run, objective: Curved, x: Tensor, history_size: int) -> Status:
    space = objective.space
    if method in ("newton", "bfgs"):
        instead = CG_INSTEAD if method == "newton" else "method='l-bfgs'"
        check_dense_fits(f"{WHO}: method={method!r}", x, instead, space)
    point, options = run.start(x), (x.dtype, x.device, space)
    if method == "newton":
        return trust_region_descent(run, point, DenseNewton(objective))[0]
    if method == "newton-cg":
        inverse = CompactInverse(x.numel(), PAIRS, *options)
        return trust_region_descent(run, point, NewtonCG(objective, run, point, inverse))[0]
    if run.objective.lower is not None:
        return bounded_descent(run, point, CompactHessian(x.numel(), history_size, *options))
    if method == "gd":
        return line_search_descent(run, point, Steepest(space))
    if method == "bfgs":
        return line_search_descent(run, point, DenseInverse(x.numel(), x.dtype, x.device))
    return line_search_descent(run, point, CompactInverse(x.numel(), history_size, *options))


def default_tolerance(eps: float) -> float:
    """The default of ``tol`` for a precision: 1e-6 for float64, 1e-4 for float32, 1e-2 for half precision."""
    return 1e-6 if eps < 1e-12 else 1e-4 if eps < 1e-6 else 1e-2
