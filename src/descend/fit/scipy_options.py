"""SciPy's methods, options and bounds, and their meaning here."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descend.core.caller import warn_caller
from descend.fit.flatness import FTOL
from descend.second_order.problem.bounds import bounds_of
from descend.second_order.problem.structure import Structure

Solver: TypeAlias = Literal["l-bfgs", "bfgs", "newton-cg", "newton"]


class Method(NamedTuple):
    """What stands behind a name of SciPy's.

    Attributes:
        name: SciPy's.
        solver: this library's.
        gtol: default tolerance of the gradient.
        norm: of the gradient that is compared with it.
        options: those that the method has beside the common ones.
        has_bounds, has_constraints: whether it takes these.
    """

    name: str
    solver: Solver
    gtol: float
    norm: float
    options: tuple[str, ...] = ()
    has_bounds: bool = False
    has_constraints: bool = False

    @property
    def is_newton(self) -> bool:
        return self.solver in ("newton", "newton-cg")


STEPS = ("eps", "finite_diff_rel_step")
LBFGSB, BFGS, NEWTON_CG, SLSQP, TRUST_CONSTR = "L-BFGS-B", "BFGS", "Newton-CG", "SLSQP", "trust-constr"
METHODS = {
    method.name.lower(): method
    for method in (
        Method(LBFGSB, "l-bfgs", 1e-5, math.inf, ("ftol", "maxcor", "maxfun", *STEPS), has_bounds=True),
        Method(BFGS, "bfgs", 1e-5, math.inf, ("norm", *STEPS)),
        Method("CG", "l-bfgs", 1e-5, math.inf, ("norm", *STEPS)),
        Method(NEWTON_CG, "newton-cg", 1e-8, math.inf, ("xtol",)),
        Method("trust-ncg", "newton-cg", 1e-4, 2),
        Method("trust-krylov", "newton-cg", 1e-4, 2),
        Method("trust-exact", "newton", 1e-4, 2),
        Method("dogleg", "newton", 1e-4, 2),
        Method(SLSQP, "l-bfgs", 1e-8, math.inf, ("ftol", *STEPS), has_bounds=True, has_constraints=True),
        Method(TRUST_CONSTR, "l-bfgs", 1e-8, math.inf, STEPS, has_bounds=True, has_constraints=True),
    )
}
COMMON = ("maxiter", "gtol", "disp", "return_all")


@dataclass(frozen=True)
class Options:
    """SciPy's options.

    Attributes:
        maxiter: iterations at most. Default: 15,000 with bounds or constraints, and 200 a variable for methods without.
        maxfun: calls of the function at most, those for differences included.
        gtol: converged when the gradient's norm is at most this.
        ftol: stop when an iteration lowers the value by less than this, relative to max(1, abs(value)).
        flat: a run of L-BFGS-B that rounding ends has succeeded if its last iteration lowered the value by less.
        xtol: the same for the mean absolute entry of the last step of Newton-CG.
        norm: order of the gradient's norm.
        maxcor: steps from which L-BFGS approximates the Hessian.
        eps, finite_diff_rel_step: absolute and relative lengths of differences.
        disp: print why the solver stopped.
        return_all: return all iterates.
    """

    maxiter: float | None = None
    maxfun: float = 15_000
    gtol: float | None = None
    ftol: float | None = None
    flat: float = FTOL
    xtol: float = 1e-5
    norm: float | None = None
    maxcor: int = 10
    eps: Any = None
    finite_diff_rel_step: Any = None
    disp: bool = False
    return_all: bool = False

    def max_iter(self, method: Method, numel: int) -> float:
        """The limit of iterations."""
        return self.maxiter if self.maxiter is not None else 15_000 if method.has_bounds else 200 * max(numel, 1)

    def tolerance(self, method: Method, numel: int) -> float:
        """What the largest entry of the gradient must be at most for its norm to be within ``gtol``."""
        gtol = method.gtol if self.gtol is None else self.gtol
        order = method.norm if self.norm is None else self.norm
        return float(gtol * max(numel, 1) ** (-1 / order))


def method_of(name: Any, has_bounds: bool, has_constraints: bool, who: str) -> Method:
    """The method with one of SciPy's names, or that of SciPy's choice for None.

    Raises:
        ValueError: if there is none, or it knows no bounds or constraints.
        TypeError: if the name is no string.
    """
    if name is None:
        name = SLSQP if has_constraints else LBFGSB if has_bounds else BFGS
    if not isinstance(name, str):
        raise TypeError(f"{who}: method must be a name or None, got {name!r}.")
    method = METHODS.get(name.lower())
    if method is None:
        allowed = ", ".join(f"'{method.name}'" for method in METHODS.values())
        raise ValueError(
            f"{who}: method must be one of {allowed}, got {name!r}. Without derivatives take '{LBFGSB}' with jac=None, "
            "which takes differences, if the function is smooth; else scipy.optimize.minimize."
        )
    for what, is_given, is_known in (
        ("bounds", has_bounds, method.has_bounds),
        ("constraints", has_constraints, method.has_constraints),
    ):
        if is_given and not is_known:
            able = SLSQP if has_constraints else LBFGSB
            raise ValueError(f"{who}: {what} are for method='{able}', got method={name!r}. Leave one of them out.")
    return method


def options_of(method: Method, given: Mapping[str, Any] | None, tol: float | None, who: str) -> Options:
    """The options of a call.

    Raises:
        ValueError, TypeError: if one of them is out of range.
    """
    from scipy.optimize import OptimizeWarning

    known = (*COMMON, *method.options)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{who}: options must be a dict or None, got {given!r:.80}.")
    given = dict(given or {})
    unknown = [name for name in given if name not in known]
    if unknown:
        warn_caller(
            f"{who}: options that method='{method.name}' does not have are ignored: {', '.join(map(str, unknown))}. "
            f"It has {', '.join(known)}.",
            OptimizeWarning,
        )
    chosen = {name: value for name, value in given.items() if name in known and value is not None}
    if tol is not None:
        _check_tolerance("tol", tol, who)
        chosen = {"gtol": tol, "flat": tol, "xtol": tol, **chosen}
    if "ftol" in chosen:
        chosen["flat"] = chosen["ftol"]
    _check(chosen, who)
    if "maxcor" in chosen:
        chosen["maxcor"] = int(chosen["maxcor"])
    return replace(Options(), **chosen)


def _check(options: Mapping[str, Any], who: str) -> None:
    for name, least in (("maxiter", 0), ("maxfun", 1), ("maxcor", 1)):
        value = options.get(name, least)
        is_whole = isinstance(value, int | float | np.number) and (value == math.inf or float(value).is_integer())
        if not is_whole or value < least or (name == "maxcor" and value == math.inf):
            raise ValueError(f"{who}: option {name} must be an integer >= {least}, got {value!r}.")
    for name in ("gtol", "ftol", "xtol"):
        _check_tolerance(f"option {name}", options.get(name, 0), who)
    order = options.get("norm", 1)
    if not (isinstance(order, int | float | np.number) and order >= 1):
        raise ValueError(f"{who}: option norm must be a number >= 1 or infinity, got {order!r}.")


def _check_tolerance(name: str, value: Any, who: str) -> None:
    if not (isinstance(value, int | float | np.number) and 0 <= value < math.inf):
        raise ValueError(f"{who}: {name} must be a finite number >= 0, got {value!r}.")


def steps_of(name: str, given: Any, numel: int, who: str) -> NDArray[np.float64] | None:
    """Lengths of finite differences, one for each variable, from an option; None if it is not given.

    Raises:
        ValueError: if it is neither a number nor as many numbers as there are variables.
    """
    if given is None:
        return None
    try:
        return np.broadcast_to(np.asarray(given, dtype=np.float64).reshape(-1), (numel,))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: option {name} must be a number, or one for each of {numel} variables, got {given!r:.80}."
        ) from error


def bounds_of_pairs(bounds: Any, x: Tensor, who: str) -> tuple[Tensor, Tensor] | None:
    """Flat lower and upper bounds from pairs, or from ``scipy.optimize.Bounds``; None if there is no finite one.

    Raises:
        ValueError: if they do not fit.
    """
    if bounds is None:
        return None
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        sides = [torch.from_numpy(np.array(side, dtype=np.float64).reshape(-1)) for side in (bounds.lb, bounds.ub)]
    else:
        ends = (-math.inf, math.inf)
        try:
            pairs = [
                [default if end is None else float(end) for end, default in zip(pair, ends, strict=True)]
                for pair in bounds
            ]
        except (TypeError, ValueError):
            pairs = []
        if len(pairs) != len(x):
            raise ValueError(
                f"{who}: bounds must be {len(x)} pairs (lower, upper) of numbers or None, one for each variable, got "
                f"{reprlib.repr(bounds)}."
            )
        sides = [torch.tensor([pair[side] for pair in pairs], dtype=x.dtype) for side in (0, 1)]
    lower, upper = bounds_of(tuple(sides), Structure(x, who), who)
    return (lower, upper) if bool((torch.isfinite(lower) | torch.isfinite(upper)).any()) else None
