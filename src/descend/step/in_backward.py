"""Steps inside the backward pass: each parameter steps, and frees its gradient, as soon as the gradient is complete."""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.sparse.attach import Tables
from descend.step.backward_passes import LastGrad, Passes
from descend.step.driver import Driver
from descend.step.plan import Plan, Position
from descend.step.scaling import is_scaled
from descend.step.take import take_step

Clip: TypeAlias = Literal["previous", "parameter"]
CLIPS = (None, *get_args(Clip))

# Errors that leave ``backward`` as what they are; all others become a RuntimeError.
_KINDS = (FloatingPointError, IndexError, TypeError, ValueError)


class InBackward(Driver):
    """Each parameter steps as soon as its gradient is complete. What ``in_backward`` returns.

    Args:
        optimizer: the optimizer.
        tables: its parameters in exact mode.
        accumulate: gradients of a parameter that are summed before it steps.
        clip: how ``max_norm`` is applied, see ``descend.in_backward``.
        nonfinite: whether the optimizer's ``nonfinite`` acts on single parameters.
        on_remove: called when the optimizer becomes ordinary again.
    """

    takes_scaler = True  # so that a GradScaler calls step, which then refuses it

    def __init__(
        self,
        optimizer: MethodOptimizer,
        tables: Tables,
        accumulate: int,
        clip: Clip | None,
        nonfinite: Literal["parameter"] | None,
        on_remove: Callable[[], None],
    ) -> None:
        _check_step_options(optimizer, clip, nonfinite)
        _check_params(optimizer, tables)
        self.optimizer, self.accumulate, self.clip, self.nonfinite = optimizer, accumulate, clip, nonfinite
        self._tables, self._on_remove = tables, on_remove
        self._lock = threading.RLock()  # the gradients of several devices come on several threads
        self._slots: dict[Tensor, _Slot] = {}
        self._passes = Passes()
        self._stepped: set[Tensor] = set()  # since the last step was completed
        self._norm: Any = None  # of the gradients they have stepped with; a number, or on a device
        self._previous_norm: Any = 0.0
        self.watch()

    @property
    def handle(self) -> InBackward:
        return self

    def remove(self) -> None:
        """Make the optimizer ordinary again. Incomplete sums of gradients stay in ``.grad``, for its next step."""
        for slot in self._slots.values():
            slot.remove_hooks()
        self._slots.clear()
        self._on_remove()

    def __enter__(self) -> InBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def watch(self) -> None:
        """Register hooks for the gradients of parameters that have joined the optimizer."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param not in self._slots:
                    self._watch(param)

    def forget_plan(self) -> None:
        for slot in self._slots.values():
            slot.plan = None

    def step(self, optimizer: MethodOptimizer) -> None:
        """Complete a step: parameters that still have a gradient take theirs."""
        if is_scaled(self.optimizer):
            raise RuntimeError(f"{type(self.optimizer).__name__} has stepped with scaled gradients. {NO_SCALER}")
        with self._lock:
            self.watch()
            for index, group in enumerate(self.optimizer.param_groups):
                for position, param in enumerate(group["params"]):
                    if param.grad is not None:
                        self._check_nothing_came_back(param, self._slots[param])
                        self._step_param(param, self._slots[param], Position(index, position))
            self._passes.end()
            self._complete()

    def arrive(self, param: Tensor) -> None:
        """A gradient of ``param`` is complete; called inside ``backward``."""
        with self._lock:
            slot = self._slots.get(param)
            if slot is None or param.grad is None or (position := self._position_of(param, slot)) is None:
                return
            if self._passes.is_partial(slot.last_grad):
                raise RuntimeError(
                    f"in_backward: {self.optimizer.name_of(param)} got its gradient in several parts in one backward "
                    "pass, and may have stepped with the first. Reentrant checkpointing of a parameter that several "
                    "parts of a model share does that: pass use_reentrant=False. If these were several backward "
                    "passes, call optimizer.step() after each."
                )
            slot.count += 1
            if slot.count >= self.accumulate:
                if param in self._stepped:
                    self._complete()
                self._step_param(param, slot, position)
            else:
                slot.version = param.grad._version

    def _watch(self, param: Tensor) -> None:
        slot = self._slots[param] = _Slot()
        is_trained = param.requires_grad
        if is_trained or param.is_floating_point() or param.is_complex():
            # A frozen parameter may be trained later, but takes no hooks now.
            param.requires_grad_(True)
            # The garbage collector does not see what a post-accumulate hook holds, so that one is weak; the other
            # keeps this object alive as long as the parameter.
            slot.hooks = (
                param.register_post_accumulate_grad_hook(_Arrival(self)),  # type: ignore[no-untyped-call]
                param.register_hook(partial(self._before, param, slot)),  # type: ignore[no-untyped-call]
            )
            param.requires_grad_(is_trained)

    def _before(self, param: Tensor, slot: _Slot, grad: Tensor) -> None:
        if slot.was_discarded(param.grad):
            slot.count = 0
        else:
            self._check_nothing_came_back(param, slot)

    def _check_nothing_came_back(self, param: Tensor, slot: _Slot) -> None:
        if slot.count == 0 and param in self._stepped and param.grad is not None:
            raise RuntimeError(
                f"in_backward: {self.optimizer.name_of(param)} has stepped and its gradient was let go, but there is "
                "one again. DistributedDataParallel does that: it averages gradients after parameters have stepped, so "
                "that replicas drift apart. Step after backward there."
            )

    def _position_of(self, param: Tensor, slot: _Slot) -> Position | None:
        groups = self.optimizer.param_groups
        if slot.position is not None:
            index, position = slot.position
            params = groups[index]["params"] if index < len(groups) else ()
            if position < len(params) and params[position] is param:
                return slot.position
        return next(
            (
                Position(index, position)
                for index, group in enumerate(groups)
                for position, candidate in enumerate(group["params"])
                if candidate is param
            ),
            None,
        )

    def _step_param(self, param: Tensor, slot: _Slot, position: Position) -> None:
        """Take the step of one parameter and free its gradient."""
        optimizer = self.optimizer
        plan, slot.plan, slot.position = slot.plan if position == slot.position else None, None, position
        try:
            _check_step_options(optimizer, self.clip, self.nonfinite)
            _check_group(optimizer, optimizer.param_groups[position.group])
            slot.plan = take_step(optimizer, self._tables, plan, position, self._norm_to_clip)
        except Exception as error:
            kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
            raise kind(
                f"in_backward: the step of {optimizer.name_of(param)} failed: {error} Of the others, those whose "
                "gradients came earlier have taken theirs; zero_grad() lets go of the gradients that are left."
            ) from error
        param.grad = None
        slot.count = 0
        self._stepped.add(param)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning rate schedulers ask

    def _norm_to_clip(self, norm: Any) -> Any:
        """The norm that ``max_norm`` limits, given that of one gradient: both numbers, or both on its device."""
        others = norm if self._norm is None else _beside(self._norm, norm)
        self._norm = norm if self._norm is None else _joint(others, norm)
        skips = self.optimizer.nonfinite == "skip"
        if skips:  # a device asks for gradients too that it will leave out: they do not count
            self._norm = _finite_or(self._norm, _finite_or(norm, others))
        if self.clip == "parameter":
            return norm
        limited = _larger(self._previous_norm, self._norm)
        return limited + (norm - norm) if skips else limited  # NaN for one that is left out

    def _complete(self) -> None:
        """End a step: all parameters that take part have stepped."""
        has_stepped = bool(self._stepped)
        self._stepped.clear()
        if self._norm is not None:
            self.optimizer.note_grad_norm(self._norm)
            self._previous_norm = _finite_or(self._norm, _beside(0.0, self._norm))
            self._norm = None
        if has_stepped and self.optimizer.observer is not None:
            self.optimizer.observer.end_step()  # may raise


def _beside(value: Any, other: Any) -> Any:
    """A number or tensor where ``other`` is: on its device, or on the host."""
    if isinstance(other, Tensor):
        return value.to(other, non_blocking=True) if isinstance(value, Tensor) else torch.full_like(other, value)
    return float(value)


def _joint(norm: Any, other: Any) -> Any:
    """The norm of two sets of gradients together; both numbers, or both on one device."""
    return torch.hypot(norm, other) if isinstance(other, Tensor) else math.hypot(norm, other)


def _larger(norm: Any, other: Any) -> Any:
    """The larger norm; NaN if ``other`` is."""
    norm = _beside(norm, other)
    if isinstance(other, Tensor):
        return torch.where(norm > other, norm, other)
    return norm if other < norm else other


def _finite_or(norm: Any, other: Any) -> Any:
    """The norm, or ``other`` if it is NaN or infinite; both numbers, or both on one device."""
    if isinstance(norm, Tensor):
        return torch.where(norm.isfinite(), norm, other)
    return norm if math.isfinite(norm) else other


class _Slot:
    """What the handle remembers of one parameter."""

    def __init__(self) -> None:
        self.position: Position | None = None
        self.plan: Plan | None = None
        self.count = 0  # gradients summed in ``.grad``
        self.version = 0  # of ``.grad`` when the last of them came
        self.hooks: tuple[Any, ...] = ()
        self.last_grad = LastGrad()

    def was_discarded(self, grad: Tensor | None) -> bool:
        """Whether the gradients summed in ``grad`` were discarded by ``zero_grad``, with ``set_to_none`` or without."""
        if grad is None:
            return True
        was_written = self.count > 0 and grad._version != self.version
        return was_written and grad.layout is torch.strided and not grad.any()

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Arrival:
    """The hook of a parameter whose gradient is complete."""

    def __init__(self, handle: InBackward) -> None:
        self._handle = weakref.ref(handle)

    def __call__(self, param: Tensor) -> None:
        if torch.compiler.is_compiling():  # backward called in a compiled function, which would trace its hooks too
            _untraced(self, param)
        elif (handle := self._handle()) is not None:
            handle.arrive(param)

    def belongs_to_other(self) -> bool:
        """Whether a living handle waits for gradients with it."""
        return self._handle() is not None


_untraced = _disable_dynamo(_Arrival.__call__)


NO_SCALER = (
    "A GradScaler finds out whether gradients overflowed when all of them have come, which is too late here: use "
    "bfloat16 or float32, or step after backward."
)


def _check_step_options(optimizer: MethodOptimizer, clip: str | None, nonfinite: str | None) -> None:
    """Raise if an option would silently do something else. Options may be edited at any time."""
    if optimizer.shard_state is not None:
        raise ValueError(
            "in_backward: with shard_state all ranks step together, but inside backward gradients come in any order. "
            "Leave out shard_state: whole state, but no gradients are kept; or step after backward."
        )
    if optimizer.max_norm is not None and clip is None:
        raise ValueError(
            f"in_backward: max_norm={optimizer.max_norm} limits the norm of all gradients together, which is only "
            "known when all have come. Pass clip='previous' or clip='parameter', or step after backward."
        )
    if optimizer.nonfinite != "step" and nonfinite is None:
        raise ValueError(
            f"in_backward: nonfinite={optimizer.nonfinite!r} is about whole steps, but inside backward some parameters "
            "have stepped when the next gradient comes. Pass nonfinite='parameter', or step after backward."
        )


def _check_group(optimizer: MethodOptimizer, group: Mapping[str, Any]) -> None:
    if group.get("differentiable"):
        name = type(optimizer).__name__
        raise ValueError(f"in_backward: a step inside backward cannot be differentiated, {name} has differentiable.")
    method = optimizer.method_of(group)
    if method.sums_over == "all" and signature(method.rule_for(group)).summed is not None:
        raise ValueError(
            f"in_backward: {type(method).__name__} needs sums over all parameters, which are only known when all "
            "gradients have come. Step after backward."
        )


def _check_params(optimizer: MethodOptimizer, tables: Tables) -> None:
    """Raise if a parameter cannot step by itself."""
    name = type(optimizer).__name__
    counts = Counter(param for group in optimizer.param_groups for param in group["params"])
    for param, count in counts.items():
        if count > 1:
            raise ValueError(f"in_backward: {optimizer.name_of(param)} of {name} is listed {count} times.")
        hooks = (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()
        if any(isinstance(hook, _Arrival) and hook.belongs_to_other() for hook in hooks):
            raise RuntimeError(
                f"in_backward: {optimizer.name_of(param)} of {name} steps inside backward with another optimizer; "
                "remove() the handle of that one first."
            )
    for group in optimizer.param_groups:
        _check_group(optimizer, group)
    for placement in Plan(optimizer, tables, only_with_grad=False).placements(optimizer):
        if placement.reason.startswith("shares memory"):
            raise ValueError(f"in_backward: {placement.name} of {name} {placement.reason}; their order would matter.")
