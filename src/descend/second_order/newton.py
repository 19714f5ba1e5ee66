"""The class ``Newton``: options and state. ``newton_descent`` has the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from descend.core.checks import check_at_least_zero, check_kind
from descend.core.groups import ParamsT, named
from descend.second_order.closure_optimizer import ClosureOptimizer
from descend.second_order.problem.objective import CG_INSTEAD, check_dense_fits
from descend.second_order.problem.parameter_objective import ParameterObjective
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.solvers.compiled_history import compact_inverse
from descend.second_order.solvers.newton_descent import (
    PAIRS,
    DenseNewton,
    NewtonCG,
    TrustRegionMethod,
    trust_region_descent,
)
from descend.second_order.solvers.result import MESSAGES, Solver, Status
from descend.second_order.solvers.run import Run

NewtonSolver: TypeAlias = Literal["auto", "cholesky", "cg"]
SOLVERS = get_args(NewtonSolver)
MAX_DENSE = 200  # parameters up to which "auto" takes the dense Hessian; beyond, that is many times slower


class Newton(ClosureOptimizer):
    """Newton's method in a trust region, for losses that are deterministic functions: no dropout, the whole data set.

    The Hessian may be indefinite or singular: a step minimizes the quadratic model within the region, so that it
    follows directions of negative curvature instead of converging to a saddle. A strictly convex quadratic takes one
    iteration. The closure returns the loss with its graph: it need not call ``backward``, and must not use the graph
    up. ``.grad`` is not touched. If the closure raises, the parameters are set to the best point seen. There is no
    learning rate, so learning-rate schedulers cannot drive it. Sharded parameters are as in ``LBFGS``; where FSDP keeps
    autograd from them, a product with the Hessian is a difference of two more gradients.

    Args:
        params: parameters, ``(name, parameter)`` pairs, dicts that define groups, or a module; all are one problem.
        max_iter: iterations in a call of ``step``, >= 0. Default: 20.
        max_eval: evaluations of the closure in a call of ``step``, never exceeded, >= 1. Default: ``2 * max_iter + 1``.
        tolerance_grad: converged when no entry of the gradient is larger than this times max(1, the largest one at
            the first start), >= 0. Default: 1e-7.
        solver: ``"cholesky"``: the dense Hessian and the exact minimizer of the model, O(n^2) memory and O(n^3) time;
            ``"cg"``: truncated conjugate gradients, about a hundred vectors of memory; ``"auto"``: ``"cholesky"`` up to
            200 parameters, else ``"cg"``, also for sharded parameters. Default: ``"auto"``.
        maximize: maximize instead of minimize. Default: False.
    Attributes:
        result: what the last ``step`` did, and why it stopped; None before.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> import torch
        >>> weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = Newton([weight])
        >>> start = optimizer.step(lambda: ((weight - 1) * torch.tensor([1.0, 1e6]) * (weight - 1)).sum())
        >>> weight.detach(), optimizer.result.n_iter
        (tensor([1., 1.], dtype=torch.float64), 1)

    Source:
        Moré & Sorensen 1983, https://doi.org/10.1137/0904038; Steihaug 1983, https://doi.org/10.1137/0720042
    """

    counters = ("func_evals", "n_iter", "n_hvp")

    def __init__(
        self,
        params: ParamsT,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        solver: NewtonSolver = "auto",
        *,
        maximize: bool = False,
    ) -> None:
        check_at_least_zero(self, "max_iter value", "max_iter", max_iter)
        defaults = {
            "max_iter": max_iter,
            "max_eval": 2 * max_iter + 1 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "solver": solver,
            "maximize": maximize,
        }
        self.check_options(defaults)
        super().__init__(named(params), defaults)

    def run_solver(self, closure: Callable[[], Any], point: FlatParameters) -> tuple[Any, Solver, Status, str]:
        self.check_agreement(self.param_groups)  # groups may have been edited
        name, group, state = type(self).__name__, self.param_groups[0], self.shared_state()
        x = point.gather()
        is_small = point.numel <= MAX_DENSE and not point.space.is_shared
        is_dense = group["solver"] == "cholesky" or (group["solver"] == "auto" and is_small)
        if is_dense:
            check_dense_fits(name, x, CG_INSTEAD, point.space)
        objective = ParameterObjective(
            f"{name}: the closure", closure, point, needs_curvature=True, maximize=self.is_maximizing
        )
        run = Run(
            objective, tol=group["tolerance_grad"], max_iter=group["max_iter"], max_eval=max(1, group["max_eval"])
        )
        inverse = compact_inverse(0 if is_dense else point.numel, PAIRS, point.dtype, point.device, point.space)
        radius = state.get("radius")
        if inverse.accepts(state.get("learned")):
            inverse.load(state["learned"])
        elif not is_dense:
            radius = None  # it was measured in the norm of the inverse that is lost
        try:
            start = run.start(x, state.get("scale"))
            method: TrustRegionMethod = (
                DenseNewton(objective) if is_dense else NewtonCG(objective, run, start, inverse, state.get("scale"))
            )
            status, radius = trust_region_descent(run, start, method, radius)
        finally:
            point.restore_(run.best.x if run.history else x)
            state["func_evals"] += objective.n_eval
            state["n_iter"] += run.n_iter
            state["n_hvp"] += objective.n_hvp
            if radius is not None:
                state["radius"] = radius
            if not is_dense:
                state["learned"] = inverse.state()
        if start.is_finite:
            state.setdefault("scale", start.norm)
        return objective.first_loss, run, status, MESSAGES[status]

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_at_least_zero(self, "max_iter value", "max_iter", options["max_iter"])
        check_at_least_zero(self, "max_eval value", "max_eval", options["max_eval"])
        check_at_least_zero(self, "tolerance_grad value", "tolerance_grad", options["tolerance_grad"])
        check_kind(self, options, "maximize")
        if options["solver"] not in SOLVERS:
            raise ValueError(f"{type(self).__name__}: solver must be one of {SOLVERS}, got {options['solver']!r}.")
