"""The class ``Newton``: options and state; the method is in ``newton_descent``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from descend.checkpoint.reading import set_state
from descend.core.checks import check_at_least_zero
from descend.core.groups import named
from descend.second_order import flat_checkpoint
from descend.second_order.directions import CompactInverse
from descend.second_order.newton_descent import PAIRS, Conjugate, Dense, Method, trust_region
from descend.second_order.objective import CG_INSTEAD, check_dense_fits
from descend.second_order.parameter_objective import ParameterObjective
from descend.second_order.parameters import FlatParameters
from descend.second_order.result import MESSAGES, Result
from descend.second_order.run import Run

if TYPE_CHECKING:
    from descend.core.groups import ParamsT

SOLVERS = ("auto", "cholesky", "cg")
MOST_DENSE = 200  # parameters up to which "auto" takes the dense Hessian: beyond, it costs many times the time


class Newton(Optimizer):
    """Newton's method in a trust region, for losses that are functions: no dropout, the whole data.

    The Hessian may be indefinite or singular: a step minimizes the quadratic model in a ball, so that it goes down
    directions of negative curvature instead of up to a saddle. A strictly convex quadratic takes one iteration.

    Args:
        params: parameters, ``(name, parameter)`` pairs, dicts that define groups, or a module; all are one problem.
        max_iter: iterations in a call of ``step``, >= 0. Default: 20.
        max_eval: evaluations of the closure in a call of ``step``, never exceeded, >= 1. Default: ``2 * max_iter + 1``.
        tolerance_grad: converged when no entry of the gradient is larger than this times max(1, the largest one when
            the optimizer began), >= 0. Default: 1e-7.
        solver: ``"cholesky"``: the dense Hessian and the exact minimizer of the model, O(n^2) memory and O(n^3) time;
            ``"cg"``: truncated conjugate gradients, in about a hundred vectors of memory; ``"auto"``: the first up to
            200 parameters. Default: ``"auto"``.
        maximize: maximize instead. Default: False.
    Attributes:
        result: what the last ``step`` did, and why it stopped; None before.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = Newton([weight])
        >>> start = optimizer.step(lambda: ((weight - 1) * torch.tensor([1.0, 1e6]) * (weight - 1)).sum())
        >>> weight.detach(), optimizer.result.n_iter
        (tensor([1., 1.], dtype=torch.float64), 1)

    Source:
        Moré & Sorensen 1983, https://doi.org/10.1137/0904038; Steihaug 1983, https://doi.org/10.1137/0720042
    """

    def __init__(
        self,
        params: ParamsT,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        solver: str = "auto",
        *,
        maximize: bool = False,
    ) -> None:
        self.result: Result | None = None
        defaults = {
            "max_iter": max_iter,
            "max_eval": 2 * max_iter + 1 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "solver": solver,
            "maximize": maximize,
        }
        self.check_options(defaults)
        super().__init__(named(params), defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take up to ``max_iter`` iterations, and leave the parameters at the best point seen.

        Args:
            closure: returns the loss at the present parameters, a scalar tensor with its graph; it need not call
                ``backward``, and must not use the graph up. Without it only the state is made.
        Returns:
            The loss where the step began; None without a closure.
        Raises:
            TypeError, ValueError, RuntimeError: if the closure returns no real scalar, or one that does not depend on
                the parameters. Whatever it raises leaves the parameters at the best point seen.
            MemoryError: if a dense Hessian would not fit; nothing has been evaluated then.
        """
        if torch.compiler.is_compiling():  # a graph break: a compiled program calls the step, it does not trace it
            return _untraced_step(self, closure)
        if type(self).step is not Newton.step:  # a subclass's step, which torch has wrapped for hooks already
            return self._step(closure)
        return _hooked_step(self) if closure is None else _hooked_step(self, closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            return self.init_state()
        began, name = time.perf_counter(), type(self).__name__
        group = self.param_groups[0]
        self.check_groups(self.param_groups)
        with torch.inference_mode(False), torch.no_grad():
            point, state = FlatParameters(self.param_groups, name), self._counters()
            x = point.gather()
            is_dense = group["solver"] == "cholesky" or (group["solver"] == "auto" and point.numel <= MOST_DENSE)
            if is_dense:
                check_dense_fits(name, x, CG_INSTEAD)
            sign = -1.0 if group["maximize"] else 1.0
            objective = ParameterObjective(
                f"{name}: the closure", closure, point, needs_curvature=True, maximize=group["maximize"]
            )
            run = Run(
                objective, tol=group["tolerance_grad"], max_iter=group["max_iter"], max_eval=max(1, group["max_eval"])
            )
            inverse = CompactInverse(0 if is_dense else point.numel, PAIRS, point.dtype, point.device)
            radius = state.get("radius")
            if inverse.accepts(state.get("learned")):
                inverse.load(state["learned"])
            elif not is_dense:
                radius = None  # it was in the norm of what was learned
            try:
                start = run.start(x, state.get("scale"))
                method: Method = (
                    Dense(objective) if is_dense else Conjugate(objective, run, start, inverse, state.get("scale"))
                )
                status, radius = trust_region(run, start, method, radius)
            finally:
                point.scatter_(run.best.x if run.history else x)
                state["func_evals"] += objective.n_eval
                state["n_iter"] += run.n_iter
                state["n_hvp"] += objective.n_hvp
                if radius is not None:
                    state["radius"] = radius
                if not is_dense:
                    state["learned"] = inverse.state()
            if start.is_finite:
                state.setdefault("scale", start.norm)
            self.result = Result(
                x=point.params,
                fun=sign * run.best.value,
                grad=point.split(sign * run.best.grad),
                status=status,
                message=MESSAGES[status],
                grad_norm=run.best.norm,
                n_iter=run.n_iter,
                n_eval=objective.n_eval,
                n_hvp=objective.n_hvp,
                time=time.perf_counter() - began,
                history=[entry._replace(fun=sign * entry.fun) for entry in run.history],
                n_negative_curvature=run.n_negative_curvature,
            )
        return objective.first_loss

    def init_state(self) -> None:
        """Make the state without a step. All of it belongs to the first parameter; the others get an empty one."""
        self._counters()
        for group in self.param_groups:
            for param in group["params"]:
                self.state.setdefault(param, {})

    def _counters(self) -> dict[str, Any]:
        state: dict[str, Any] = self.state[FlatParameters(self.param_groups, type(self).__name__).params[0]]
        for name in ("func_evals", "n_iter", "n_hvp"):
            state.setdefault(name, 0)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, match: str = "auto", hyperparameters: str = "loaded"
    ) -> None:
        """Load what ``state_dict`` returned: everything is copied, tensors keep a wider dtype.

        Args:
            state_dict: a dictionary.
            match: ``"auto"``: where parameters have names, there and here, they must be in the same order; ``"name"``:
                they must have names; ``"order"``: names do not count. Default: ``"auto"``.
            hyperparameters: options of the groups, the ``"loaded"`` or the ``"current"`` ones. Default: ``"loaded"``.
        Raises:
            TypeError, ValueError: if groups, options or the state do not fit; nothing has been changed then.
        """
        flat_checkpoint.load(self, state_dict, match, hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked first; what it lacks is the first group's."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **(self.param_groups[0] if self.param_groups else {}), **param_group}
            self.check_options(options)
            self.check_groups([*self.param_groups, options])
            for name in self.defaults:
                param_group.setdefault(name, options[name])
        super().add_param_group(param_group)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are out of range."""
        check_at_least_zero(self, "max_iter value", "max_iter", options["max_iter"])
        check_at_least_zero(self, "max_eval value", "max_eval", options["max_eval"])
        check_at_least_zero(self, "tolerance_grad value", "tolerance_grad", options["tolerance_grad"])
        if options["solver"] not in SOLVERS:
            raise ValueError(f"{type(self).__name__}: solver must be one of {SOLVERS}, got {options['solver']!r}.")

    def check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ``ValueError`` if an option that all groups share differs between them."""
        for index, group in enumerate(groups):
            self.check_options(group)
            for name in self.defaults:
                if group[name] != groups[0][name]:
                    raise ValueError(
                        f"{type(self).__name__}: all groups are one problem with one {name}, got {groups[0][name]!r} "
                        f"in group 0 and {group[name]!r} in group {index}."
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "result": self.result}

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_state(self, state)
        self.__dict__.setdefault("result", None)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)


_hooked_step = Optimizer.profile_hook_step(Newton._step)
_untraced_step = _disable_dynamo(Newton.step)
