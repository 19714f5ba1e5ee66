"""The class ``LBFGS``: options, state and checkpoints of torch's, and which solver takes the step."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from descend.checkpoint.reading import set_state
from descend.core.checks import check_at_least_zero
from descend.core.groups import named
from descend.second_order import flat_checkpoint
from descend.second_order.modern_lbfgs import modern_step
from descend.second_order.objective import Point
from descend.second_order.parameter_bounds import flat_bounds
from descend.second_order.parameters import ClosureFunction, Evaluation, FlatParameters
from descend.second_order.result import MESSAGES, Iteration, Result, Status
from descend.second_order.torch_lbfgs import Memory, Options, TorchSteps, check

if TYPE_CHECKING:
    from descend.core.groups import ParamsT

CHECKS = 10  # steps whose first evaluation is compared with the one before; what is random differs soon
STILL = "lr is 0, so that nothing moves."
TORCH_MESSAGES = {
    **MESSAGES,
    Status.converged: "The largest absolute entry of the gradient is at most tolerance_grad.",
    Status.precision_limit: (
        "The step, the change of the loss or the slope along the direction is below tolerance_change, while the "
        "gradient is above tolerance_grad: lower tolerance_change, use float64, or rescale the loss."
    ),
}


class LBFGS(Optimizer):
    """L-BFGS with the arguments, state and checkpoints of ``torch.optim.LBFGS``.

    With ``line_search_fn`` None or ``"strong_wolfe"`` it takes torch's steps, in float64 bit for bit, as long as torch
    meets neither NaN nor infinity; such a trial is not accepted here, so that parameters stay finite. Several groups
    are one problem: ``weight_decay`` and ``bounds`` may differ between them, every other option is the first group's.
    The closure need not call ``backward``; it runs with gradients enabled, wherever ``step`` is called.

    Args:
        params: parameters, ``(name, parameter)`` pairs, dicts that define groups, or a module. Real or complex, of
            any dtypes and on any devices; inner products are in the widest dtype, at least float32.
        lr: length of a step, or the first one tried by the line search, >= 0; a number or a tensor of one element.
            Default: 1.
        max_iter: iterations in a call of ``step``. Default: 20.
        max_eval: evaluations after which no other iteration begins. Default: ``max_iter * 5 // 4``.
        tolerance_grad: stop when no entry of the gradient is larger. Default: 1e-7.
        tolerance_change: stop when a step moves no entry by more, or the loss changes by less. Default: 1e-9.
        history_size: how many past steps are remembered, >= 1. Default: 100.
        line_search_fn: None, every step has length ``lr``; ``"strong_wolfe"``, torch's line search; or
            ``"hager_zhang"``, the solver of ``minimize``: it stops when no entry of the gradient is larger than
            ``tolerance_grad * max(1, the largest one when it began)``, ``tolerance_change`` has no effect, and
            ``max_eval`` is never exceeded. Default: None.
        maximize: maximize instead of minimize. Default: False.
        weight_decay: adds ``weight_decay / 2 * |param|^2`` to the loss and its gradient to the gradient, >= 0; that
            of groups without one of their own. Default: 0.
        bounds: ``(lower, upper)`` for every entry of every parameter, each a number, a tensor that broadcasts to the
            parameters' shapes, or None; or a dict from parameters' names to such pairs. A group's own ``"bounds"``
            take precedence. A start outside is moved to the nearest point inside. Only with ``"hager_zhang"``.
    Attributes:
        result: what the last ``step`` did, and why it stopped; None before.
    Raises:
        ValueError: if an option is out of range.
    Source: Liu & Nocedal 1989, https://doi.org/10.1007/BF01589116
    Example:
        >>> weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> optimizer = LBFGS([weight], tolerance_change=0, line_search_fn="strong_wolfe")
        >>> first_loss = optimizer.step(lambda: ((weight - 1) ** 4 + weight**2).sum())
        >>> print(weight.detach(), optimizer.result.status)
        tensor([0.4102, 0.4102], dtype=torch.float64) converged
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
        weight_decay: float = 0,
        bounds: Any = None,
    ) -> None:
        self.maximize, self.weight_decay, self.bounds = maximize, weight_decay, None
        self.result: Result | None = None
        self._is_loose = False  # the last step has not been evaluated yet
        self._endpoint: tuple[float, list[tuple[int, int]]] | None = None  # value and place where a line search ended
        self._checks_left = CHECKS
        check_at_least_zero(self, "weight_decay value", "weight_decay", weight_decay)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        self.check_options(defaults)
        super().__init__(named(params), defaults)
        self.bounds = bounds
        self.check_bounds(self.param_groups)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take up to ``max_iter`` iterations.

        Args:
            closure: computes the loss at the present parameters, and may call ``backward``; called many times. Without
                it only the state is made.
        Returns:
            What the closure returned the first time; None without one.
        Raises:
            TypeError, ValueError, RuntimeError: if the closure gives no real scalar, or no gradient. Whatever the
                closure raises leaves the parameters at the last accepted point, and the next step goes on from there.
        """
        if torch.compiler.is_compiling():  # a graph break: a compiled program calls the step, it does not trace it
            return _untraced_step(self, closure)
        if type(self).step is not LBFGS.step:  # a subclass's step, which torch has wrapped for hooks already
            return self._step(closure)
        return _hooked_step(self) if closure is None else _hooked_step(self, closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            return self.init_state()
        if torch.is_inference_mode_enabled():  # what is made there could not be used outside of it later
            with torch.inference_mode(False):
                return self._step(closure)
        with torch.no_grad():
            name = type(self).__name__
            point = FlatParameters(self.param_groups, name)
            function = ClosureFunction(
                closure,
                point,
                self.param_groups,
                weight_decay=self.weight_decay,
                maximize=self.maximize,
                who=name,
            )
            self.check_options(self.param_groups[0])  # people edit groups
            self.check_bounds(self.param_groups)
            if self.param_groups[0]["line_search_fn"] == "hager_zhang":
                return self._step_modern(function, point)
            return self._step_as_torch(function, point)

    def _step_modern(self, function: ClosureFunction, point: FlatParameters) -> Any:
        began, options, state = time.perf_counter(), Options.of(self.param_groups[0]), self._counters()
        bounds = flat_bounds(point, self.param_groups, self.bounds, type(self).__name__)
        first = partial(self._first_evaluation, function, self._is_at_endpoint(point))
        loss, run, status = modern_step(function, first, point, bounds, options, state)
        self._is_loose, self._endpoint = False, (run.best.value, _marks(point))
        message = MESSAGES[status] if options.lr or status is not Status.max_iter else STILL
        self._report(function, began, status, message, run.best, run.n_iter, run.history)
        return loss

    def _step_as_torch(self, function: ClosureFunction, point: FlatParameters) -> Any:
        began, options, state = time.perf_counter(), Options.of(self.param_groups[0]), self._counters()
        first = current = self._first_evaluation(function, self._is_at_endpoint(point))
        memory = Memory.read(state, point)
        steps = TorchSteps(function, point, memory, options)
        was_loose, self._is_loose = self._is_loose, False
        try:
            if not current.is_finite and was_loose and memory.n_iter:
                current = steps.retreat() or current
            if not current.is_finite:
                status = Status.non_finite
            elif current.norm <= options.tolerance_grad:
                status = Status.converged
            else:
                status, current = steps.run(current)
        finally:
            state["func_evals"] += function.n_eval
            if memory.d is not None:
                memory.write(state, point, options)
        is_fixed = options.line_search_fn is None
        self._is_loose = is_fixed and status is Status.max_iter
        self._endpoint = None if is_fixed else (current.value, _marks(point))
        self._report(function, began, status, TORCH_MESSAGES[status], current, steps.n_iter, steps.history)
        return first.loss

    def _report(
        self,
        function: ClosureFunction,
        began: float,
        status: Status,
        message: str,
        last: Evaluation | Point,
        n_iter: int,
        history: list[Iteration],
    ) -> None:
        sign = -1 if self.maximize else 1
        self.result = Result(
            x=function.point.params,
            fun=sign * last.value,
            grad=function.point.split(-last.grad if self.maximize else last.grad),
            status=status,
            message=message,
            grad_norm=last.norm,
            n_iter=n_iter,
            n_eval=function.n_eval,
            n_hvp=0,
            time=time.perf_counter() - began,
            history=[entry._replace(fun=sign * entry.fun) for entry in history] if self.maximize else history,
        )

    def _is_at_endpoint(self, point: FlatParameters) -> bool:
        """Whether nobody has touched the parameters since a line search ended where it had evaluated."""
        return self._endpoint is not None and self._endpoint[1] == _marks(point)

    def _first_evaluation(self, function: ClosureFunction, is_at_endpoint: bool) -> Evaluation:
        """Evaluate where the last step ended, and warn, once, if random numbers have made another value of it.

        Other data make another value too, so it counts only if torch's generators have moved while the closure ran.
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
            warnings.warn(
                f"{type(self).__name__}: the closure draws random numbers, and two evaluations at one point differ: "
                f"{last_value:g}, then {first.value:g}. A line search needs a function: call model.eval(), or "
                "torch.manual_seed at the closure's start.",
                stacklevel=6,  # where ``step`` is called
            )
        return first

    # State.

    def init_state(self) -> None:
        """Make the state without a step, as ``torch.distributed.checkpoint`` wants it: for every parameter.

        All of it belongs to the first parameter; the others get an empty one.
        """
        with torch.inference_mode(False), torch.no_grad():
            point, state = FlatParameters(self.param_groups, type(self).__name__), self._counters()
            for param in point.params:
                self.state.setdefault(param, {})
            if "d" not in state:
                zeros = torch.zeros(point.numel, dtype=point.dtype, device=point.device)
                memory = Memory(d=zeros, prev_flat_grad=zeros.clone())
                memory.write(state, point, Options.of(self.param_groups[0]))

    def _counters(self) -> dict[str, Any]:
        """The state, which has at least its two counters."""
        state: dict[str, Any] = self.state[next(param for group in self.param_groups for param in group["params"])]
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, match: str = "auto", hyperparameters: str = "loaded"
    ) -> None:
        """Load what ``state_dict`` (this library's or torch's) returned.

        Everything is copied; tensors keep their dtype if it is wider than this optimizer's own.

        Args:
            state_dict: a dictionary.
            match: ``"auto"``: where parameters have names, there and here, they must be in the same order; ``"name"``:
                they must have names; ``"order"``: names do not count. Default: ``"auto"``.
            hyperparameters: options of the groups, the ``"loaded"`` or the ``"current"`` ones. Default: ``"loaded"``.
        Raises:
            TypeError, ValueError: if groups, options or the state do not fit; nothing has been changed then.
        """
        flat_checkpoint.load(self, state_dict, match, hyperparameters)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_state(self, state)
        for name, default in (_OWN | _TRANSIENT).items():
            self.__dict__.setdefault(name, default)
        for group in self.param_groups:
            for name in Options._fields:
                group.setdefault(name, self.defaults[name])

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked first; what it lacks is the first group's. Later steps start afresh."""
        if isinstance(param_group, dict):
            for name in Options._fields if self.param_groups else ():
                param_group.setdefault(name, self.param_groups[0][name])
            self.check_options({**self.defaults, **param_group})
            self.check_agreement([*self.param_groups, {**self.defaults, **param_group}])
        # torch's wrapper imports all of torch._dynamo, a second, to keep the compiler out of here.
        inherited = Optimizer.add_param_group
        if not torch.compiler.is_compiling():
            inherited = getattr(inherited, "__wrapped__", inherited)
        inherited(self, param_group)
        try:
            self.check_bounds(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are out of range."""
        check(self, options)

    def check_agreement(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ``ValueError`` if an option that all groups share differs between them."""
        for index, group in enumerate(groups[1:], 1):
            for name in Options._fields:
                if group[name] is not groups[0][name] and group[name] != groups[0][name]:
                    raise ValueError(
                        f"{type(self).__name__}: all groups are one problem with one {name}, got {groups[0][name]!r} "
                        f"in group 0 and {group[name]!r} in group {index}. Only weight_decay and bounds may differ."
                    )

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ``ValueError`` if groups do not go together."""
        self.check_agreement(groups)
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
        flat_bounds(FlatParameters(groups, name), groups, self.bounds, name)

    # Loss scaling.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler asks for this before it steps, and this is the only time to stop it: it would then call ``step``
        # without the closure, or with losses and gradients of different scales. Others who ask get torch's answer.
        if isinstance(sys._getframe(1).f_locals.get("self"), torch.amp.GradScaler):
            raise RuntimeError(
                f"{type(self).__name__} does not work with GradScaler: it evaluates the closure many times, and its "
                "loss and gradients must have one scale. Use bfloat16 autocast without a scaler, or float32."
            )
        return False


_hooked_step = Optimizer.profile_hook_step(LBFGS._step)
_untraced_step = _disable_dynamo(LBFGS.step)

_OWN = {"maximize": False, "weight_decay": 0, "bounds": None, "result": None}
_TRANSIENT = {"_is_loose": False, "_endpoint": None, "_checks_left": CHECKS}


def _marks(point: FlatParameters) -> list[tuple[int, int]]:
    """Changes whenever a parameter is replaced or written to."""
    return [(id(param), param._version) for param in point.params]


def _random_states(point: FlatParameters) -> list[Tensor]:
    """States of torch's generators that a closure may draw from."""
    devices = {param.device for param in point.params if param.device.type in ("cuda", "xpu")}
    return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in devices)]
