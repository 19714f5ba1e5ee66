"""The per-parameter state, and how an optimizer knows that nobody has touched it."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from descend.backends.cpu.threads import serial_in_forked_child
from descend.core import codecs, memory
from descend.core.codecs import COMPENSATION, SCALE, Codec
from descend.core.memory import as_real, row_state_shape, widest
from descend.core.method import Method, StateSpec
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.distributed.dtensors import (
    has_whole_rows,
    is_dtensor,
    layout_of,
    like,
    local_of,
    rows_of,
    same_layout,
    scales_of,
)
from descend.distributed.shard_state import as_sharded
from descend.state import lazy_memory

CPU = torch.device("cpu")


def _exposing(name: str) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    def exposing(self: State, *args: Any, **kwargs: Any) -> Any:
        self.exposed = True
        return method(self, *args, **kwargs)

    exposing.__name__, exposing.__doc__ = name, method.__doc__
    return exposing


class InitialState(dict[str, Any]):
    """State made before the first step. Without a step count, plain state would mean that a step has been taken."""


class State(defaultdict[Any, Any]):
    """``optimizer.state``: a ``defaultdict(dict)`` that remembers whether it ever let its content out.

    A state tensor that nobody else has seen cannot have been replaced or edited, so the next step need not look at
    it. Once anything was read or written from outside, every step looks at everything again. The optimizer itself
    reads through ``dict``'s own methods, which do not count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exposed = True
        self.was_saved = False  # tensors on its memory have been handed out
        self.owner: Callable[[], Any] = lambda: None

    @classmethod
    def owned_by(cls, optimizer: Any) -> State:
        """An empty state that only ``optimizer`` has seen."""
        state = cls(dict)
        state.exposed = False
        state.owner = weakref.ref(optimizer)
        return state

    @property
    def is_private(self) -> bool:
        """Whether nobody can have written to its tensors."""
        return not self.exposed and not self.was_saved

    def __reduce__(self) -> Any:
        return defaultdict, (dict, {key: copy.copy(value) for key, value in dict.items(self)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As ``deepcopy`` does it, but pages of zeros in the state of sparse parameters stay uncommitted."""
        if getattr(self.owner(), "sparse", None) is not None:
            for content in dict.values(self):
                for tensor in content.values():
                    if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.layout is torch.strided:
                        copied = lazy_memory.copied(local_of(tensor))
                        memo[id(tensor)] = like(tensor, copied) if is_dtensor(tensor) else copied
        return defaultdict(dict, deepcopy(dict(dict.items(self)), memo))

    def __copy__(self) -> Any:
        self.exposed = True
        return defaultdict(dict, dict.items(self))

    copy = __copy__

    __getitem__ = _exposing("__getitem__")
    __setitem__ = _exposing("__setitem__")
    __delitem__ = _exposing("__delitem__")
    __iter__ = _exposing("__iter__")
    __reversed__ = _exposing("__reversed__")
    __or__ = _exposing("__or__")
    __ror__ = _exposing("__ror__")
    __ior__ = _exposing("__ior__")
    clear = _exposing("clear")
    get = _exposing("get")
    items = _exposing("items")
    keys = _exposing("keys")
    pop = _exposing("pop")
    popitem = _exposing("popitem")
    setdefault = _exposing("setdefault")
    update = _exposing("update")
    values = _exposing("values")


@contextmanager
def updatable_tensors() -> Iterator[None]:
    """Make ordinary tensors, in inference mode too: those of that mode cannot be updated outside of it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # leaving the mode enables gradients
        yield


def new_state(param: Tensor, spec: StateSpec, lazy: bool = False) -> dict[str, Tensor]:
    """The tensors of new state, by name: one, or codes and scales.

    Args:
        param: the parameter, or what ``as_sharded`` made of it.
        spec: what to make.
        lazy: whether zeros lie in lazily committed memory.
    """
    if isinstance(spec.format, Codec):
        return _new_codes(param, spec, spec.format, lazy)
    return {spec.name: new_tensor(param, spec, lazy)}


@updatable_tensors()
def _new_codes(param: Tensor, spec: StateSpec, codec: Codec, lazy: bool) -> dict[str, Tensor]:
    name = spec.name
    if isinstance(spec.start, Tensor) or spec.start != 0:
        numbers = new_tensor(param, spec._replace(format=torch.float32))
        local_codes, local_scales = codecs.encode(local_of(numbers), codec)
        codes, scales = new_tensor(param, spec._replace(format=torch.uint8, start=0)), new_scales(param)
        local_of(codes).copy_(local_codes)
        local_of(scales).copy_(local_scales)
        return {name: codes, name + SCALE: scales}
    codes = new_tensor(param, spec._replace(format=torch.uint8), lazy)
    return {name: codes, name + SCALE: new_scales(param, lazy)}


def new_scales(param: Tensor, lazy: bool = False) -> Tensor:
    """Scales of zeros, for the state of a parameter."""
    if is_dtensor(param):
        return scales_of(param)
    shape = codecs.scale_shape(param.shape)
    if lazy and param.is_cpu:
        return lazy_memory.zeros(shape, torch.float32)
    with serial_in_forked_child():
        return torch.zeros(shape, device=param.device, dtype=torch.float32)


@updatable_tensors()
def new_tensor(param: Tensor, spec: StateSpec, lazy: bool = False) -> Tensor:
    """A new state tensor, in the memory order of ``param`` where it has its shape.

    Both parts of a complex number start as the number: a step treats them as two real ones.

    Args:
        param: the parameter, or what ``as_sharded`` made of it.
        spec: what to make.
        lazy: whether zeros lie in lazily committed memory.
    """
    if is_dtensor(param) and spec.shape == param.shape:
        start = local_of(spec.start) if isinstance(spec.start, Tensor) else spec.start
        local = local_of(param)
        return like(param, new_tensor(local, spec._replace(shape=local.shape, start=start), lazy))
    if is_dtensor(param) and spec.shape == row_state_shape(param) and has_whole_rows(param):
        rows = rows_of(param)
        return like(rows, new_tensor(local_of(rows), spec._replace(shape=local_of(rows).shape), lazy))
    start, dtype = spec.start, codecs.element_dtype(spec.format)
    is_zero = not isinstance(start, Tensor) and start == 0
    if lazy and is_zero and param.is_cpu and param.is_contiguous():
        return lazy_memory.zeros(spec.shape, dtype)
    with serial_in_forked_child():
        if spec.shape == param.shape:
            tensor = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        else:
            tensor = torch.zeros(spec.shape, dtype=dtype, device=param.device)
        if isinstance(start, Tensor):
            start = as_real(start)
            as_real(tensor).copy_(start.reshape(()) if start.numel() == 1 else start)
        elif not is_zero:
            as_real(tensor).fill_(start)
    return tensor


def checked_state(
    optimizer: MethodOptimizer,
    param: Tensor,
    local: Tensor,
    names: Sequence[str],
    group: Mapping[str, Any],
    state: Mapping[str, Any],
) -> list[tuple[str, Tensor]]:
    """Those of the state tensors called ``names`` that exist; of sharded ones, this rank's part.

    Args:
        optimizer: the optimizer.
        param: the parameter.
        local: the plain tensor that is updated, with its gradient.
        names: of the state tensors, as ``codecs.stored_names`` lists them.
        group: the parameter's group.
        state: the parameter's state.

    Raises:
        RuntimeError: if a step could not update the parameter or its state: a state tensor has another shape; the
            memory of a state tensor, the parameter or the gradient has been freed; the parameter holds integers; or
            torch would refuse to write in place.
    """
    who, method = type(optimizer).__name__, optimizer.method_of(group)
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(
            f"{who}: a step makes fractions, which {optimizer.name_of(param)} cannot hold: it is "
            f"{param.dtype}. Nothing has moved."
        )
    tensors = [(name, state[name]) for name in names if isinstance(state.get(name), Tensor)]
    for name, tensor in tensors:
        expected = _expected_shape(method, name, param, group)
        if tensor.shape != expected:
            raise RuntimeError(
                f"{who}: {name} of {optimizer.name_of(param)} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected)}. Nothing has moved."
            )
        if name == COMPENSATION and tensor.dtype != torch.int16:
            raise RuntimeError(
                f"{who}: {name} of {optimizer.name_of(param)} must be torch.int16, got {tensor.dtype}. Load the state "
                "again, or delete it to begin anew. Nothing has moved."
            )
        is_scale = name.endswith(SCALE) and tensor.shape != param.shape
        follows = is_scale or tensor.shape == param.shape or signature(method.rule_of(param, group)).kind == "row"
        if follows and not same_layout(tensor, sharded := as_sharded(optimizer, param)):
            raise RuntimeError(
                f"{who}: {name} of {optimizer.name_of(param)} has {layout_of(tensor)}, the parameter "
                f"{layout_of(sharded)}. They must lie on the same ranks: load the state with set_optimizer_state_dict "
                "of torch.distributed.checkpoint.state_dict; after setting shard_state, load_state_dict(state_dict()) "
                "moves it. Nothing has moved."
            )
    if local is not param:
        tensors = [(name, local_of(tensor)) for name, tensor in tensors]
    for name, tensor in (("it", local), ("its gradient", local.grad), *tensors):
        if tensor is not None and memory.is_freed(tensor):
            raise RuntimeError(
                f"{who}: {optimizer.name_of(param)}: the memory of {name} has been freed "
                "(untyped_storage().resize_). Restore it before the step, or set the gradient to None."
            )
    for name, tensor in (("the parameter", local), *tensors):
        is_inference = tensor.is_inference() or (tensor is local and param.is_inference())
        if is_inference and not torch.is_inference_mode_enabled():
            reason = "was made in inference mode, and torch allows no update of it outside of that mode"
        elif _is_expanded(tensor):
            reason = "is expanded: several of its elements share memory, so torch allows no update in place"
        else:
            continue
        raise RuntimeError(f"{who}: {optimizer.name_of(param)}: {name} {reason}. Use a clone. Nothing has moved.")
    return tensors


def _expected_shape(method: Method, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.Size:
    """Shape of a tensor of a state: of its rule's, or what formats add to that."""
    names = signature(method.rule_of(param, group)).state
    if name in names or name == "ema":
        return method.state_shape(name, param, group)
    return param.shape if name == COMPENSATION else codecs.scale_shape(param.shape)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements along a dimension share memory, as ``Tensor.expand`` makes them."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def scalar_tensor(state: Mapping[str, Any], name: str, start: Any, device: torch.device = CPU) -> Tensor:
    """A scalar of a state, a 0-dim tensor; a new one if there is none that kernels can write.

    Args:
        state: a parameter's state.
        name: the key in it.
        start: what a new one starts as.
        device: where it must be. Default: the CPU, as in torch.
    """
    value: Any = state.get(name)
    if _is_writable_scalar(value, device):
        return value  # type: ignore[no-any-return]
    value = start if value is None else value
    is_wide = torch.get_default_dtype() == widest(device) == torch.float64
    with updatable_tensors():
        scalar = torch.as_tensor(value, dtype=torch.float64 if is_wide else torch.float32, device=device)
        return scalar.reshape(()).clone()


def _is_writable_scalar(value: Any, device: torch.device) -> bool:
    """Whether kernels of a device can read it, and write it in place."""
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.device == device
        and value.dtype in (torch.float32, torch.float64)
    )
