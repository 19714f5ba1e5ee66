"""The methods of ``minimize`` by name."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor

from descend.second_order.mathematics.broyden_family import bfgs, self_scaled_bfgs, self_scaled_broyden
from descend.second_order.mathematics.dense_inverse import DenseInverse
from descend.second_order.mathematics.directions import Directions, Steepest
from descend.second_order.problem.objective import CG_INSTEAD, Curved, Point, check_dense_fits
from descend.second_order.solvers.box import CompactHessian, bounded_descent
from descend.second_order.solvers.compiled_history import compact_inverse
from descend.second_order.solvers.descent import line_search_descent
from descend.second_order.solvers.newton_descent import PAIRS, DenseNewton, NewtonCG, trust_region_descent
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import Descend, Run

MinimizeMethod: TypeAlias = Literal["gd", "bfgs", "ss-bfgs", "ss-broyden", "l-bfgs", "newton-cg", "newton"]
METHODS = get_args(MinimizeMethod)
DENSE = {"bfgs": bfgs, "ss-bfgs": self_scaled_bfgs, "ss-broyden": self_scaled_broyden}


def check_method_fits(who: str, method: str, objective: Curved, x: Tensor) -> None:
    """Raise an error if the method needs a dense matrix that does not fit into memory, or if ``x`` is sharded then."""
    if method == "newton" or method in DENSE:
        instead = CG_INSTEAD if method == "newton" else "method='l-bfgs'"
        check_dense_fits(f"{who}: method={method!r}", x, instead, objective.space)


def descent_of(method: str, objective: Curved, x: Tensor, history_size: int) -> Descend:
    """The descent of a method, which minimizes from a point. Later calls go on with the curvature learned so far.

    Args:
        method: one of ``METHODS``.
        objective: the function; with bounds only for ``"l-bfgs"``.
        x: a flat vector of the right length, dtype and device.
        history_size: steps that ``"l-bfgs"`` keeps.
    """
    space = objective.space
    options = x.dtype, x.device, space
    if method == "newton":
        return lambda run, point: trust_region_descent(run, point, DenseNewton(objective))[0]
    if method == "newton-cg":
        inverse = compact_inverse(x.numel(), PAIRS, *options)

        def newton_cg(run: Run, point: Point) -> Status:
            newton = NewtonCG(objective, run, point, inverse, may_be_dense=True)
            return trust_region_descent(run, point, newton)[0]

        return newton_cg
    if objective.lower is not None:
        model = CompactHessian(x.numel(), history_size, *options)
        return lambda run, point: bounded_descent(run, point, model)
    directions: Directions
    if method == "gd":
        directions = Steepest(space)
    elif method in DENSE:
        directions = DenseInverse(x.numel(), x.dtype, x.device, DENSE[method])
    else:
        directions = compact_inverse(x.numel(), history_size, *options)
    return lambda run, point: line_search_descent(run, point, directions)
