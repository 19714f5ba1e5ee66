"""The base of ``LBFGS``, ``Newton`` and ``LeastSquares``: of optimizers that call their closure many times."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from descend.backends.cpu.threads import serial_in_forked_child
from descend.checkpoint.matching import check_choices
from descend.checkpoint.reading import restore, set_state, unusable_is_value_error
from descend.core.undecorated import undecorated
from descend.distributed.agreement import check_agreement
from descend.second_order import flat_checkpoint
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.sharded_parameters import flat_parameters
from descend.second_order.solvers.result import Result, Solver, Status, result_of


class ClosureOptimizer(Optimizer, ABC):
    """An optimizer whose ``step`` evaluates the closure many times. All groups are one problem, with shared options.

    Attributes:
        result: what the last ``step`` did, and why it stopped; None before.
    """

    counters: ClassVar[tuple[str, ...]] = ("func_evals", "n_iter")  # in the state
    per_group: ClassVar[tuple[str, ...]] = ()  # options that may differ between groups
    saved_attributes: ClassVar[tuple[str, ...]] = ("result",)  # beside what torch pickles
    result: Result[list[Tensor]] | None = None
    maximize = False  # where the groups have no such option

    # What a subclass defines.

    @abstractmethod
    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are out of range."""

    @abstractmethod
    def run_solver(self, closure: Callable[[], Any], point: FlatParameters) -> tuple[Any, Solver, Status, str]:
        """Take the step; return the first loss, the finished run, why it stopped, and that in words."""

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take up to ``max_iter`` iterations.

        Args:
            closure: returns the loss (for ``LeastSquares`` the residuals) at the present parameters; called many times,
                with gradients enabled. Without it only the state is made.
        Returns:
            The loss at the start; None without a closure.
        Raises:
            TypeError, ValueError, RuntimeError: if the closure returns no such thing, or gives no gradient. After an
                exception from the closure the parameters are at the last accepted point, and the next step continues
                from there.
            RuntimeError: if ranks that share the parameters disagree about the optimizer.
            MemoryError: if a dense Hessian would not fit; nothing has been evaluated then.
        """
        if torch.compiler.is_compiling():  # a graph break: a compiled program calls the step, it does not trace it
            return _untraced_step(self, closure)
        if type(self).step is not ClosureOptimizer.step:  # a subclass's step, already wrapped by torch for hooks
            return self._step(closure)
        return _hooked_step(self) if closure is None else _hooked_step(self, closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        began = time.perf_counter()
        if closure is not None and not callable(closure):
            raise TypeError(
                f"{type(self).__name__}: closure must be a function, got {type(closure).__name__}. Pass the function "
                "itself, not what it returns."
            )
        # Tensors made in inference mode could not be used outside of it later.
        with torch.inference_mode(False), torch.no_grad(), serial_in_forked_child():
            if not any(group["params"] for group in self.param_groups):
                with torch.enable_grad():
                    return None if closure is None else closure()
            if closure is None:
                return self.init_state()
            point = flat_parameters(self.param_groups, type(self).__name__)
            self.check_options(self.param_groups[0])  # groups may have been edited
            check_agreement(self)
            loss, solver, status, message = self.run_solver(closure, point)
            self.result = self.make_result(solver, status, message, point, began)
        return loss

    def make_result(
        self, solver: Any, status: Status, message: str, point: FlatParameters, began: float
    ) -> Result[list[Tensor]]:
        """What ``result`` becomes after a step that began at ``began``."""
        return result_of(solver, status, message, point.params, point.split, began=began, maximize=self.is_maximizing)

    @property
    def is_maximizing(self) -> bool:
        """Whether the loss is maximized, by the first group's option or else the constructor's."""
        return bool(self.param_groups[0].get("maximize", self.maximize))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. See ``torch.optim.Optimizer.zero_grad``."""
        undecorated(Optimizer.zero_grad)(self, set_to_none)

    # State.

    def init_state(self) -> None:
        """Make the state without a step, as ``torch.distributed.checkpoint`` needs it.

        All of it belongs to the first parameter; the others get an empty one.
        """
        self.shared_state()
        for group in self.param_groups:
            for param in group["params"]:
                self.state.setdefault(param, {})

    def shared_state(self) -> dict[str, Any]:
        """The state, under the first parameter, with its counters."""
        state: dict[str, Any] = self.state[next(param for group in self.param_groups for param in group["params"])]
        for name in self.counters:
            state.setdefault(name, 0)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Groups and state; see ``torch.optim.Optimizer.state_dict``.

        Where parameters are sharded, every rank must call it: it gathers the vectors of the state, whole ones for each
        rank. They can be loaded by any number of ranks, and by one process.
        """
        with torch.no_grad():
            return flat_checkpoint.whole_state(type(self).__name__, self.param_groups, super().state_dict())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, match: str = "auto", hyperparameters: str = "loaded"
    ) -> None:
        """Load a ``state_dict``; for ``LBFGS`` also one of torch's.

        Everything is copied; tensors keep their dtype if it is wider than this optimizer's own.

        Args:
            state_dict: a dictionary.
            match: ``"auto"``: if parameters have names here and there, they must be in the same order; ``"name"``: they
                must have names; ``"order"``: names are ignored. Default: ``"auto"``.
            hyperparameters: use the ``"loaded"`` or the ``"current"`` options of the groups. Default: ``"loaded"``.
        Raises:
            TypeError, ValueError: if groups, options or the state do not fit; nothing has been changed then.
        """
        who = type(self).__name__
        check_choices(who, match, hyperparameters)

        def read(saved: Mapping[str, Any]) -> tuple[list[dict[str, Any]], defaultdict[Any, dict[str, Any]]]:
            flat_checkpoint.check_order(who, self.param_groups, saved["param_groups"], match)
            groups = [{**group} for group in self.param_groups]
            if hyperparameters == "loaded":
                groups = flat_checkpoint.read_groups(who, groups, saved["param_groups"], self.check_options)
                with unusable_is_value_error(who, 0):
                    self.check_groups(groups)
            return groups, flat_checkpoint.read_state(who, groups, saved)

        restore(self, state_dict, read)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.saved_attributes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_state(self, state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked first; those it lacks are the first group's."""
        if isinstance(param_group, dict):
            first = self.param_groups[0] if self.param_groups else {}
            shared = {name: first.get(name, default) for name, default in self.defaults.items()}
            options = {**shared, **param_group}
            self.check_options(options)
            self.check_agreement([*self.param_groups, options])
            for name, value in shared.items():
                param_group.setdefault(name, value)
        undecorated(Optimizer.add_param_group)(self, param_group)

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ``ValueError`` if groups do not fit together."""
        self.check_agreement(groups)

    def check_agreement(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ``ValueError`` if a shared option differs between groups."""
        for index, group in enumerate(groups[1:], 1):
            for name in self.defaults:
                if group[name] is not groups[0][name] and group[name] != groups[0][name]:
                    only = f" Only {' and '.join(self.per_group)} may differ." if self.per_group else ""
                    raise ValueError(
                        f"{type(self).__name__}: all groups are one problem with one {name}, got {groups[0][name]!r} "
                        f"in group 0 and {group[name]!r} in group {index}.{only}"
                    )

    # Loss scaling.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler reads this before it steps, and only here can it be stopped: it would call ``step`` without the
        # closure, or with losses and gradients of different scales. Anybody else gets torch's answer.
        if isinstance(sys._getframe(1).f_locals.get("self"), torch.amp.GradScaler):
            raise RuntimeError(
                f"{type(self).__name__} does not work with GradScaler: it evaluates the closure many times, and its "
                "loss and gradients must have one scale. Use bfloat16 autocast without a scaler, or float32."
            )
        return False


_hooked_step = Optimizer.profile_hook_step(ClosureOptimizer._step)
_untraced_step = _disable_dynamo(ClosureOptimizer.step)
