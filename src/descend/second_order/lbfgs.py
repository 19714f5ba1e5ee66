"""The class ``LBFGS``: options, state and checkpoints of torch's, and the solver that takes the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from descend.core.caller import warn_caller
from descend.core.checks import check_at_least_zero, check_kind
from descend.core.groups import ParamsT, named
from descend.second_order.closure_optimizer import ClosureOptimizer
from descend.second_order.problem.parameter_bounds import flat_bounds
from descend.second_order.problem.parameters import ClosureFunction, Evaluation, FlatParameters
from descend.second_order.problem.sharded_parameters import flat_parameters
from descend.second_order.solvers.modern_lbfgs import KeptLearner, modern_step
from descend.second_order.solvers.result import MESSAGES, Solver, Status
from descend.second_order.solvers.torch_lbfgs import LBFGSOptions, LineSearchFn, Memory, TorchSteps, check_lbfgs

HAS_MAXIMIZE = "maximize" in inspect.signature(torch.optim.LBFGS).parameters  # from torch 2.14
RANDOM_CHECKS = 10  # steps whose first evaluation is compared with the last one of the step before
ZERO_LR = "lr is 0, so that nothing moves."
TORCH_MESSAGES = {
    **MESSAGES,
    Status.converged: "The largest absolute entry of the gradient is at most tolerance_grad.",
    Status.precision_limit: (
        "The step, the change of the loss or the slope along the direction is below tolerance_change, while the "
        "gradient is above tolerance_grad: lower tolerance_change, use float64, or rescale the loss."
    ),
}


class LBFGS(ClosureOptimizer):
    """L-BFGS: steps that use curvature learned from the last gradients, for losses that are deterministic functions.

    Drop-in for ``torch.optim.LBFGS``, with its arguments, state and checkpoints. With ``line_search_fn`` None or
    ``"strong_wolfe"`` its steps are torch's, in float64 bit for bit, as long as torch meets neither NaN nor infinity.
    Such a trial is never accepted here, so that parameters stay finite. ``"hager_zhang"`` is the solver of
    ``minimize``, which needs fewer evaluations.

    The closure returns the loss. It need not call ``backward``. In torch's two modes missing gradients count as zero,
    with a warning if none can have been computed; with ``"hager_zhang"`` a closure that gives no new gradient is an
    error.

    Several groups are one problem: ``weight_decay`` and ``bounds`` may differ between them, every other option is the
    first group's.

    If parameters are sharded (``DTensor``), every rank takes each step alike. What is minimized is the loss if that is
    a DTensor, else the mean of the ranks' losses, because FSDP averages gradients; a loss that all ranks agree about is
    its own mean. A plain tensor beside DTensors must be equal on all ranks, and so must be its gradient. Without any
    DTensor, as under DDP, nothing is known of ranks: return a loss that is averaged over them.

    Args:
        params: parameters, ``(name, parameter)`` pairs, dicts that define groups, or a module. Real or complex, of
            any dtypes and on any devices; inner products are in the widest dtype, at least float32.
        lr: length of a step, or the first one tried by the line search, >= 0; a number or a tensor of one element.
            Default: 1.
        max_iter: iterations in a call of ``step``. Default: 20.
        max_eval: evaluations after which no other iteration begins. Default: ``max_iter * 5 // 4``.
        tolerance_grad: stop when no entry of the gradient is larger. Default: 1e-7.
        tolerance_change: stop when a step moves no entry by more, or the loss changes by less. Default: 1e-9.
        history_size: past steps from which the Hessian is approximated, >= 1. Default: 100.
        line_search_fn: None: every step has length ``lr``. ``"strong_wolfe"``: torch's line search. ``"hager_zhang"``:
            the solver of ``minimize``. It stops when no entry of the gradient is larger than ``tolerance_grad * max(1,
            the largest one at the first start)``; ``tolerance_change`` has no effect, and ``max_eval`` is never
            exceeded. Default: None.
        maximize: maximize instead of minimize. From torch 2.14 on it is a key of the groups, as in torch. Default:
            False.
        weight_decay: adds ``weight_decay / 2 * |param|^2`` to the loss, >= 0; for groups without one of their own.
            Default: 0.
        bounds: ``(lower, upper)`` for every entry of every parameter, each a number, a tensor that broadcasts to the
            parameters' shapes, or None; or a dict from parameters' names to such pairs. A group's own ``"bounds"``
            take precedence. The start is clamped to them. Only with ``"hager_zhang"``.
    Attributes:
        result: what the last ``step`` did, and why it stopped; None before.
    Raises:
        ValueError: if an option is out of range.
    Source:
        Liu & Nocedal 1989, https://doi.org/10.1007/BF01589116
    Example:
        >>> weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = LBFGS([weight], tolerance_change=0, line_search_fn="strong_wolfe")
        >>> first_loss = optimizer.step(lambda: ((weight - 1) ** 4 + weight**2).sum())
        >>> print(weight.detach(), optimizer.result.status)
        tensor([0.4102, 0.4102], dtype=torch.float64) converged
    """

    per_group = ("weight_decay", "bounds")
    saved_attributes = ("result", "maximize", "weight_decay", "bounds")
    weight_decay: float = 0
    bounds: Any = None
    _is_unevaluated = False  # the last step ended at a point that has not been evaluated
    _endpoint: tuple[float, list[tuple[int, int]]] | None = None  # value and parameters where a line search ended
    _checks_left = RANDOM_CHECKS
    _kept: KeptLearner | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: LineSearchFn | None = None,
        *,
        maximize: bool = False,
        weight_decay: float = 0,
        bounds: Any = None,
    ) -> None:
        self.maximize, self.weight_decay = maximize, weight_decay
        check_kind(self, {"maximize": maximize}, "maximize")
        check_at_least_zero(self, "weight_decay value", "weight_decay", weight_decay)
        check_at_least_zero(self, "max_iter value", "max_iter", max_iter)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        if HAS_MAXIMIZE:
            defaults["maximize"] = maximize
        self.check_options(defaults)
        super().__init__(named(params), defaults)
        self.bounds = bounds
        self.check_bounds(self.param_groups)

    # The step.

    def run_solver(self, closure: Callable[[], Any], point: FlatParameters) -> tuple[Any, Solver, Status, str]:
        self.check_bounds(self.param_groups)  # groups may have been edited
        options = LBFGSOptions.of(self.param_groups[0])
        is_modern = options.line_search_fn == "hager_zhang"
        function = ClosureFunction(
            closure,
            point,
            self.param_groups,
            weight_decay=self.weight_decay,
            maximize=self.is_maximizing,
            needs_gradient=is_modern,
            who=type(self).__name__,
        )
        return (self._run_modern if is_modern else self._run_as_torch)(function, options)

    def _run_modern(self, function: ClosureFunction, options: LBFGSOptions) -> tuple[Any, Solver, Status, str]:
        point = function.point
        bounds = flat_bounds(point, self.param_groups, self.bounds, type(self).__name__)
        first: Callable[[], Evaluation] = partial(self._first_evaluation, function, self._is_at_endpoint(point))
        if point.space.is_shared:  # the value is known after the reduction only
            first = function.evaluate_here
        self._kept = self._kept or KeptLearner()
        loss, run, status = modern_step(function, first, point, bounds, options, self.shared_state(), self._kept)
        self._is_unevaluated, self._endpoint = False, (run.best.value, _versions(point))
        is_still = status is Status.max_iter and not options.lr
        return loss, run, status, ZERO_LR if is_still else MESSAGES[status]

    def _run_as_torch(self, function: ClosureFunction, options: LBFGSOptions) -> tuple[Any, Solver, Status, str]:
        point, state = function.point, self.shared_state()
        first = self._first_evaluation(function, self._is_at_endpoint(point))
        memory = Memory.read(state, point)
        steps = TorchSteps(function, point, memory, options, first)
        was_unevaluated, self._is_unevaluated = self._is_unevaluated, False
        try:
            if not first.is_finite and was_unevaluated and memory.n_iter:
                steps.shorten_last_step()
            if not steps.best.is_finite:
                status = Status.non_finite
            elif steps.best.norm <= options.tolerance_grad:
                status = Status.converged
            else:
                status = steps.run()
        finally:
            state["func_evals"] += function.n_eval
            if memory.d is not None:
                memory.write(state, point, options)
        is_fixed = options.line_search_fn is None
        self._is_unevaluated = is_fixed and status is Status.max_iter
        self._endpoint = None if is_fixed else (steps.best.value, _versions(point))
        return first.loss, steps, status, TORCH_MESSAGES[status]

    def _is_at_endpoint(self, point: FlatParameters) -> bool:
        """Whether the parameters are unchanged since a line search ended."""
        return self._endpoint is not None and self._endpoint[1] == _versions(point)

    def _first_evaluation(self, function: ClosureFunction, is_at_endpoint: bool) -> Evaluation:
        """Evaluate at the start, and warn, once, if random numbers have changed the value since the last step.

        Other data change the value, too. So it matters only if torch's generators advanced while the closure ran.
        """
        if not (is_at_endpoint and self._checks_left):
            return function.evaluate()
        assert self._endpoint is not None
        self._checks_left -= 1
        before = _random_states(function.point)
        first = function.evaluate()
        last_value = self._endpoint[0]
        is_other = abs(first.value - last_value) > function.point.structure.eps**0.5 * abs(last_value)
        if is_other and not all(map(torch.equal, before, _random_states(function.point))):
            self._checks_left = 0
            warn_caller(
                f"{type(self).__name__}: the closure draws random numbers, and two evaluations at one point differ: "
                f"{last_value:g}, then {first.value:g}. A line search needs a function: call model.eval(), or "
                "torch.manual_seed at the closure's start."
            )
        return first

    # State.

    def init_state(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            super().init_state()
            point, state = flat_parameters(self.param_groups, type(self).__name__), self.shared_state()
            if "d" not in state:
                zeros = torch.zeros(point.numel, dtype=point.dtype, device=point.device)
                memory = Memory(d=zeros, prev_flat_grad=zeros.clone())
                memory.write(state, point, LBFGSOptions.of(self.param_groups[0]))

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check_bounds(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lbfgs(self, options)
        if "maximize" in options:  # of torch 2.14 and newer
            check_kind(self, options, "maximize")

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super().check_groups(groups)
        self.check_bounds(groups)

    def check_bounds(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ``ValueError`` if bounds do not fit the parameters or the line search."""
        if self.bounds is None and all(group.get("bounds") is None for group in groups):
            return
        name, line_search_fn = type(self).__name__, groups[0]["line_search_fn"]
        if line_search_fn != "hager_zhang":
            raise ValueError(
                f"{name}: bounds need line_search_fn='hager_zhang', got {line_search_fn!r}, which knows none."
            )
        flat_bounds(flat_parameters(groups, name), groups, self.bounds, name)


def _versions(point: FlatParameters) -> list[tuple[int, int]]:
    """Identities and versions of the parameters; these change when one is replaced or written to."""
    return [(id(param), param._version) for param in point.params]


def _random_states(point: FlatParameters) -> list[Tensor]:
    """States of the generators from which a closure may draw."""
    devices = {param.device for param in point.params if param.device.type in ("cuda", "xpu")}
    return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in devices)]
