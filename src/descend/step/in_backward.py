"""Steps inside the backward pass: each parameter as soon as its gradient is complete, which is then let go."""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from descend.first_order.optimizer import FirstOrder
from descend.step.backward_passes import Passes, Seen
from descend.step.plan import Place, Plan
from descend.step.take import advance, is_scaled

CLIPS = (None, "previous", "parameter")

# What keeps its kind when it leaves ``backward``; everything else is a RuntimeError there.
_KINDS = (FloatingPointError, IndexError, TypeError, ValueError)


def in_backward(
    optimizer: FirstOrder, accumulate: int = 1, *, clip: str | None = None, nonfinite: str | None = None
) -> InBackward:
    """Take the steps of ``optimizer`` inside ``backward``: each parameter as soon as its gradient is complete.

    The gradient is let go at once, so that gradients never take more memory than that of one parameter. Where the
    program calls ``optimizer.step()``, the step is completed: parameters whose gradients still wait take theirs, step
    hooks run, and the loss of a closure is returned. As long as a parameter gets at most ``accumulate`` gradients
    between two calls of ``step()``, every result is that of the ordinary optimizer, bit for bit. Without calls of
    ``step()`` a parameter steps at every ``accumulate``-th gradient.

    Args:
        optimizer: of this library, not ``LBFGS`` or ``Newton``. Parameters added to it later are included.
        accumulate: gradients of a parameter that are summed before it steps, >= 1. Default: 1.
        clip: how ``max_norm`` is kept, since the joint norm of all gradients is only known when all have come.
            ``"previous"``: by the norm of the step before, or by that of the gradients that have come so far, if that
            is larger, as it always is in a first step. ``"parameter"``: each parameter by its own norm. Default: None,
            an error if there is a ``max_norm``.
        nonfinite: ``"parameter"``: what ``nonfinite="skip"`` and ``"raise"`` of the optimizer do, they do to single
            parameters, whose gradients come one after the other. Default: None, an error if they are asked for.
    Returns:
        A handle: ``remove()``, or the end of a ``with`` block, makes the optimizer ordinary again.
    Raises:
        TypeError: if the optimizer is of another kind, or its class has a ``step`` of its own.
        ValueError: if an option cannot be kept in one pass.
        RuntimeError: if the optimizer, or another one with the same parameters, is in backward already.
    Example:
        >>> from descend import SGD
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = SGD([weight], lr=0.1)
        >>> with in_backward(optimizer):
        ...     weight.square().sum().backward()
        >>> weight, weight.grad
        (tensor([0.8000, 0.8000], requires_grad=True), None)
    """
    _check_kind(optimizer)
    name = type(optimizer).__name__
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"in_backward: accumulate must be a whole number >= 1, got {accumulate!r}.")
    if clip not in CLIPS:
        raise ValueError(f"in_backward: clip must be one of {CLIPS}, got {clip!r}.")
    if nonfinite not in (None, "parameter"):
        raise ValueError(f"in_backward: nonfinite must be None or 'parameter', got {nonfinite!r}.")
    if optimizer.in_backward is not None:
        raise RuntimeError(f"in_backward: this {name} is in backward already; remove() its handle first.")
    if clip is not None and optimizer.max_norm is None:
        raise ValueError(f"in_backward: clip={clip!r} says how max_norm is kept, but this {name} has none.")
    if nonfinite is not None and optimizer.nonfinite == "step":
        raise ValueError(
            f"in_backward: nonfinite='parameter' is for nonfinite='skip' or 'raise', but this {name} has 'step'."
        )
    if optimizer.amp is not None:
        raise ValueError(f"in_backward: {name} has amp={optimizer.amp!r}. {_NO_SCALER}")
    _check_options(optimizer, clip, nonfinite)
    _check_params(optimizer)
    return InBackward(optimizer, accumulate, clip, nonfinite)


class InBackward:
    """What ``in_backward`` returns."""

    def __init__(self, optimizer: FirstOrder, accumulate: int, clip: str | None, nonfinite: str | None) -> None:
        self.optimizer, self.accumulate, self.clip, self.nonfinite = optimizer, accumulate, clip, nonfinite
        self._lock = threading.RLock()  # the gradients of several devices come on several threads
        self._slots: dict[Tensor, _Slot] = {}
        self._passes = Passes()
        self._stepped: set[Tensor] = set()  # since the last step was completed
        self._norm: float | None = None  # of the gradients they stepped with
        self._previous_norm = 0.0
        self.watch()
        optimizer.in_backward = self
        optimizer._step_supports_amp_scaling = True  # so that a GradScaler calls step, which then refuses it
        optimizer._plan = None

    def remove(self) -> None:
        """Make the optimizer ordinary again. Gradients that wait for others stay, for its next step."""
        for slot in self._slots.values():
            slot.remove_hooks()
        self._slots.clear()
        if self.optimizer.in_backward is self:
            self.optimizer.in_backward = None
            self.optimizer._step_supports_amp_scaling = False

    def __enter__(self) -> InBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def watch(self) -> None:
        """Wait for the gradients of parameters that have joined the optimizer."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param not in self._slots:
                    self._watch(param)

    def finish(self) -> None:
        """Complete a step, see ``FirstOrder.step``: parameters that still have a gradient take theirs."""
        if is_scaled(self.optimizer):
            raise RuntimeError(f"{type(self.optimizer).__name__} has stepped with scaled gradients. {_NO_SCALER}")
        with self._lock:
            self.watch()
            for index, group in enumerate(self.optimizer.param_groups):
                for position, param in enumerate(group["params"]):
                    if param.grad is not None:
                        self._check_nothing_came_back(param, self._slots[param])
                        self._take(param, self._slots[param], Place(index, position))
            self._complete()
            self._passes.end()

    def arrive(self, param: Tensor) -> None:
        """A gradient of ``param`` is complete; called inside ``backward``."""
        with self._lock:
            slot = self._slots.get(param)
            if slot is None or param.grad is None or (place := self._place_of(param, slot)) is None:
                return
            if self._passes.gives_part(slot.seen):
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
                self._take(param, slot, place)
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
        if slot.was_thrown_away(param.grad):
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

    def _place_of(self, param: Tensor, slot: _Slot) -> Place | None:
        groups = self.optimizer.param_groups
        if slot.place is not None:
            index, position = slot.place
            params = groups[index]["params"] if index < len(groups) else ()
            if position < len(params) and params[position] is param:
                return slot.place
        return next(
            (
                Place(index, position)
                for index, group in enumerate(groups)
                for position, candidate in enumerate(group["params"])
                if candidate is param
            ),
            None,
        )

    def _take(self, param: Tensor, slot: _Slot, place: Place) -> None:
        """The step of one parameter."""
        optimizer = self.optimizer
        plan, slot.plan, slot.place = slot.plan if place == slot.place else None, None, place
        try:
            _check_options(optimizer, self.clip, self.nonfinite)
            _check_group(optimizer, optimizer.param_groups[place.group])
            slot.plan = advance(optimizer, plan, place, self._norm_to_clip)
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

    def _norm_to_clip(self, norm: float) -> float:
        self._norm = math.hypot(self._norm or 0.0, norm)
        if self.clip == "parameter":
            return norm
        return self._previous_norm if self._norm < self._previous_norm else self._norm

    def _complete(self) -> None:
        """All parameters have stepped that will."""
        self._stepped.clear()
        if self._norm is not None:
            self.optimizer.grad_norm = self._norm
            self._previous_norm = self._norm if math.isfinite(self._norm) else 0.0
            self._norm = None


class _Slot:
    """What is known of one parameter."""

    def __init__(self) -> None:
        self.place: Place | None = None
        self.plan: Plan | None = None
        self.count = 0  # gradients that wait in ``.grad``
        self.version = 0  # of ``.grad`` since the last of them came
        self.hooks: tuple[Any, ...] = ()
        self.seen = Seen()

    def was_thrown_away(self, grad: Tensor | None) -> bool:
        """Whether gradients that waited in ``grad`` are gone: ``zero_grad``, with ``set_to_none`` or without."""
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


_NO_SCALER = (
    "A GradScaler finds out whether gradients overflowed when all of them have come, which is too late here: use "
    "bfloat16 or float32, or step after backward."
)


def _check_kind(optimizer: Any) -> None:
    kind = type(optimizer)
    if not isinstance(optimizer, FirstOrder):
        raise TypeError(
            f"in_backward takes an optimizer of descend that updates each parameter by itself (SGD, Adam, AdamW, "
            f"SparseAdam, classes of from_rule), got {kind.__module__}.{kind.__name__}."
        )
    if kind.end_step is not FirstOrder.end_step:
        raise TypeError(
            f"in_backward: {kind.__name__} counts for all parameters together, which inside backward are never there."
        )
    if kind.step is not FirstOrder.step:
        raise TypeError(
            f"in_backward: {kind.__name__} has a step of its own, which gradients inside backward would never reach."
        )


def _check_options(optimizer: FirstOrder, clip: str | None, nonfinite: str | None) -> None:
    """Raise if an option would silently do something else. They may be edited at any time."""
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


def _check_group(optimizer: FirstOrder, group: Mapping[str, Any]) -> None:
    if group.get("differentiable"):
        name = type(optimizer).__name__
        raise ValueError(f"in_backward: a step inside backward cannot be differentiated, {name} has differentiable.")


def _check_params(optimizer: FirstOrder) -> None:
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
    for placement in optimizer.backends():
        if placement.reason.startswith("shares memory"):
            raise ValueError(f"in_backward: {placement.name} of {name} {placement.reason}; their order would matter.")
