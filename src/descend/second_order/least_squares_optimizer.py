"""The class ``LeastSquares``: options and state. ``least_squares_descent`` has the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from descend.core.checks import check_kind
from descend.core.groups import ParamsT, named
from descend.second_order.closure_optimizer import ClosureOptimizer
from descend.second_order.least_squares import METHODS, LeastSquaresMethod, default_tolerance
from descend.second_order.limits import check_limit, check_tol
from descend.second_order.mathematics.robust_losses import LOSSES
from descend.second_order.problem.parameter_bounds import flat_bounds
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.residuals import ParameterResiduals
from descend.second_order.problem.sharded_parameters import flat_parameters
from descend.second_order.solvers.least_squares_descent import least_squares_descent
from descend.second_order.solvers.least_squares_result import (
    FIT_MESSAGES,
    LeastSquaresResult,
    least_squares_result,
)
from descend.second_order.solvers.least_squares_run import LeastSquaresRun
from descend.second_order.solvers.result import Solver, Status
from descend.second_order.solvers.sized_linearization import LINEARIZATIONS, JacobianKind
from descend.second_order.solvers.step_control import Damping, TrustRegion

JACOBIANS = get_args(JacobianKind)


class LeastSquares(ClosureOptimizer):
    """Gauss-Newton steps in a trust region or with damping, for sums of squared residuals, or of robust losses of them.

    For closures that return residuals and are deterministic functions: no dropout, the whole data set. They return one
    tensor or a structure of tensors with their graph, always of the same shapes, and call no ``backward``. ``.grad`` is
    not touched. If the closure raises, the parameters are set to the best point seen. What is minimized is half the sum
    of the losses; ``step`` returns that cost at the parameters where it began. The region and the scale of the
    variables are carried from step to step. There is no learning rate, so learning-rate schedulers cannot drive it.

    Args:
        params: parameters, ``(name, parameter)`` pairs, dicts that define groups, or a module; all are one problem.
            They may not be sharded.
        max_iter: iterations in a call of ``step``, >= 0. Default: 20.
        max_eval: evaluations of the closure in a call of ``step``, never exceeded, >= 1. Default: ``2 * max_iter + 1``.
        tol: converged when the step to the minimizer of the model would lower the cost by at most ``tol**2`` of it, or
            change no parameter by more than ``tol`` of it, or all by no more than rounding; >= 0. Default: the square
            root of the precision, 1.5e-8 for float64 and 3.5e-4 for float32, at most 0.01.
        method: ``"trust-region"``: MINPACK's radius; ``"lm"``: Nielsen's damping. Default: ``"trust-region"``.
        loss: ``"linear"`` (squares), ``"huber"``, ``"soft_l1"``, ``"cauchy"`` or ``"arctan"``. Default: ``"linear"``.
        loss_scale: size of a residual from which a robust loss grows more slowly than its square, > 0. Default: 1.
        jac: ``"dense"``: the Jacobian as a matrix and exact steps, O(M N) memory for M residuals and N parameters;
            ``"products"``: products with the Jacobian only, and LSMR, O(M + N) memory; ``"auto"``: ``"dense"`` where
            that takes seconds at most and fits into memory. Default: ``"auto"``.
        bounds: ``(lower, upper)`` for every entry of every parameter, each a number, a tensor that broadcasts to the
            parameters' shapes, or None; or a dict from parameters' names to such pairs. A group's own ``"bounds"`` take
            precedence. The start is clamped to them. Default: None.
    Attributes:
        result: a ``LeastSquaresResult``: what the last ``step`` did, and why it stopped; None before.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> import torch
        >>> time = torch.linspace(0, 4, 9, dtype=torch.float64)
        >>> rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> optimizer = LeastSquares([rate])
        >>> start = optimizer.step(lambda: torch.exp(-rate * time) - torch.exp(-0.7 * time))
        >>> round(rate.item(), 6), optimizer.result.status.value
        (0.7, 'converged')

    Source:
        Moré 1978, https://doi.org/10.1007/BFb0067700; Madsen, Nielsen & Tingleff 2004,
        http://www2.imm.dtu.dk/pubdb/p.php?3215; Fong & Saunders 2011, https://doi.org/10.1137/10079687X
    """

    counters = ("func_evals", "n_iter", "n_jac", "n_hvp")
    per_group = ("bounds",)
    saved_attributes = ("result", "bounds")
    result: LeastSquaresResult[list[Tensor]] | None = None
    bounds: Any = None

    def __init__(
        self,
        params: ParamsT,
        max_iter: int = 20,
        max_eval: int | None = None,
        tol: float | None = None,
        method: LeastSquaresMethod = "trust-region",
        loss: str = "linear",
        loss_scale: float = 1.0,
        jac: JacobianKind = "auto",
        *,
        bounds: Any = None,
    ) -> None:
        check_limit(type(self).__name__, "max_iter", max_iter, 0)
        defaults = {
            "max_iter": max_iter,
            "max_eval": 2 * max_iter + 1 if max_eval is None else max_eval,
            "tol": tol,
            "method": method,
            "loss": loss,
            "loss_scale": loss_scale,
            "jac": jac,
        }
        self.check_options(defaults)
        super().__init__(named(params), defaults)
        self.bounds = bounds
        self.check_groups(self.param_groups)

    def run_solver(self, closure: Callable[[], Any], point: FlatParameters) -> tuple[Any, Solver, Status, str]:
        self.check_groups(self.param_groups)  # groups may have been edited
        name, group, state = type(self).__name__, self.param_groups[0], self.shared_state()
        if point.space.is_shared:
            raise ValueError(f"{name}: parameters must be in one process, but they are sharded. Use LBFGS or Newton.")
        bounds = flat_bounds(point, self.param_groups, self.bounds, name)
        objective = ParameterResiduals(
            f"{name}: the closure",
            closure,
            point,
            rho=LOSSES[group["loss"]],
            loss_scale=group["loss_scale"],
            bounds=bounds,
        )
        tol = default_tolerance(point.structure.eps) if group["tol"] is None else group["tol"]
        run = LeastSquaresRun(objective, tol=tol, max_iter=group["max_iter"], max_eval=max(1, group["max_eval"]))
        is_damped = group["method"] == "lm"
        region = Damping(state.get("damping")) if is_damped else TrustRegion(state.get("radius"))
        linearization = LINEARIZATIONS[group["jac"]](objective, tol, _norms_of(state, point))
        x = point.gather()
        if bounds is not None:
            x.clamp_(*bounds)
        status = None
        try:
            status = least_squares_descent(run, x, linearization, region)
        finally:
            point.restore_(run.best.x if run.history else x)
            state["func_evals"] += objective.n_eval
            state["n_iter"] += run.n_iter
            state["n_jac"] += objective.n_jac
            state["n_hvp"] += objective.n_hvp
            self._carry(state, region, has_converged=status is Status.converged)
            if linearization.norms is not None:
                state["norms"] = linearization.norms
        return point.params[0].new_tensor(run.history[0].fun), run, status, FIT_MESSAGES[status]

    def make_result(
        self, solver: LeastSquaresRun, status: Status, message: str, point: FlatParameters, began: float
    ) -> LeastSquaresResult[list[Tensor]]:
        return least_squares_result(solver, status, point.params, _LikeParameters(point.params), began=began)

    def _carry(self, state: dict[str, Any], region: TrustRegion | Damping, *, has_converged: bool) -> None:
        """Keep the region for the next step, unless it has shrunk to a minimum; other data have theirs elsewhere."""
        state.pop("radius", None)
        state.pop("damping", None)
        if has_converged:
            return
        if isinstance(region, Damping):
            state["damping"] = region.damping
        elif region.radius is not None:
            state["radius"] = region.radius

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super().check_groups(groups)
        if self.bounds is not None or any(group.get("bounds") is not None for group in groups):
            name = type(self).__name__
            flat_bounds(flat_parameters(groups, name), groups, self.bounds, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check_groups(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def check_options(self, options: Mapping[str, Any]) -> None:
        name = type(self).__name__
        for limit, least in (("max_iter", 0), ("max_eval", 1)):
            check_limit(name, limit, options[limit], least)
        check_tol(name, options["tol"])
        for option, allowed in (("method", METHODS), ("loss", tuple(LOSSES)), ("jac", JACOBIANS)):
            if options[option] not in allowed:
                raise ValueError(f"{name}: {option} must be one of {allowed}, got {options[option]!r}.")
        check_kind(self, options, "loss_scale")
        if not 0 < options["loss_scale"] < math.inf:
            raise ValueError(f"{name}: loss_scale must be a finite number > 0, got {options['loss_scale']!r}.")


@dataclass(frozen=True)
class _LikeParameters:
    """Maps a flat vector to tensors like some parameters; can be copied and pickled as a part of ``result``."""

    params: list[Tensor]

    def __call__(self, flat: Tensor) -> list[Tensor]:
        return FlatParameters([{"params": self.params}], LeastSquares.__name__).split(flat)


def _norms_of(state: Mapping[str, Any], point: FlatParameters) -> Tensor | None:
    """What the last step has learned of the columns' norms, if the parameters are still as many."""
    norms = state.get("norms")
    return norms.to(point.device, point.dtype) if norms is not None and len(norms) == point.numel else None
