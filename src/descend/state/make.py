"""State of one parameter: what it has, and making what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.core.codecs import COMPENSATED, COMPENSATION, SCALE
from descend.core.memory import wide
from descend.core.method import Method, StateSpec
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.distributed.shard_state import as_sharded
from descend.offload.host_params import where_state_is
from descend.state.container import CPU, InitialState, new_state, new_tensor, scalar_tensor
from descend.state.formats import check_blocks


def ensure_state(
    optimizer: MethodOptimizer,
    param: Tensor,
    rule: Callable[..., Any],
    group: Mapping[str, Any],
    lazy: bool = False,
    scalars_on: torch.device = CPU,
) -> dict[str, Any]:
    """The state of ``param``, made where it is missing.

    Args:
        optimizer: the optimizer.
        param: the parameter.
        rule: the rule that will use the state.
        group: the parameter's group.
        lazy: whether new tensors of zeros lie in lazily committed memory.
        scalars_on: where the step count and the scalar state are. Default: the CPU.
    """
    method, names = optimizer.method_of(group), signature(rule).state
    is_compensated = method.format_of_param(param) == COMPENSATED
    if not names and not method.counts_steps and not is_compensated:
        return {}
    state = dict.get(optimizer.state, param)
    if state is None or type(state) is InitialState:
        state = dict(state or {})
        dict.__setitem__(optimizer.state, param, state)
    if method.step_is_int:
        state.setdefault("step", 0)
    if method.counts_for_noise:  # the state may be of a run that did not count
        state.setdefault("step", step_count(method, rule, state))
    scalars = scalar_names(method)
    state.update(zip(scalars, scalar_tensors(method, scalars, param, group, state, scalars_on), strict=True))
    for name in names:
        if not isinstance(state.get(name), Tensor):
            sharded = as_sharded(optimizer, param)
            format = method.format_of_state(name, param, group)
            check_blocks(optimizer, param, name, format)
            spec = method.state_spec(name, sharded, group, format)
            if name + SCALE not in names:
                state.pop(name + SCALE, None)  # of codes that were here
            state.update(new_state(where_state_is(optimizer, sharded), spec, lazy))
    if is_compensated and not isinstance(state.get(COMPENSATION), Tensor):
        spec = StateSpec(COMPENSATION, param.shape, torch.int16, 0)
        state[COMPENSATION] = new_tensor(where_state_is(optimizer, as_sharded(optimizer, param)), spec, lazy)
    return state


def reserve_state(optimizer: MethodOptimizer, params: Iterable[tuple[Method, Tensor, Callable[..., Any]]]) -> None:
    """Give parameters with these rules their places in ``optimizer.state``, in this order, whatever is made first."""
    for method, param, rule in params:
        is_compensated = method.format_of_param(param) == COMPENSATED
        if method.counts_steps or signature(rule).state or is_compensated:
            dict.setdefault(optimizer.state, param, {})


def scalar_names(method: Method) -> tuple[str, ...]:
    """The state that is a 0-dim tensor a parameter: the step count, where it is one, and ``scalar_state``."""
    return ("step", *method.scalar_state) if method.counts_steps and not method.step_is_int else method.scalar_state


def scalar_tensors(
    method: Method,
    names: Sequence[str],
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    device: torch.device = CPU,
) -> list[Tensor]:
    """The 0-dim tensors called ``names``: those in ``state``, new ones for those that are missing or elsewhere."""
    return [scalar_tensor(state, name, method.initial_state(name, param, group), device) for name in names]


def step_count(method: Method, rule: Callable[..., Any], state: Mapping[str, Any]) -> float:
    """Number of steps a parameter has taken; without ``counts_steps``, 0 before the first and 1 after."""
    if method.counts_steps and not (method.counts_for_noise and "step" not in state):
        return float(state.get("step", 0.0))
    names = [name for name in signature(rule).state if name not in method.optional_state]
    if method.counts_for_noise and not names:
        return 0.0
    return float(type(state) is not InitialState and all(isinstance(state.get(name), Tensor) for name in names))


def step_counts(method: Method, rule: Callable[..., Any], states: Sequence[Mapping[str, Any]]) -> list[float]:
    """The same of many parameters. Counts on a device are read together: each wait costs as much as all of them."""
    counts: list[Any] = [state.get("step") if method.counts_steps else None for state in states]
    on_device: dict[torch.device, list[int]] = {}
    for i, count in enumerate(counts):
        if isinstance(count, Tensor) and count.device != CPU and count.numel() == 1:
            on_device.setdefault(count.device, []).append(i)
    for places in on_device.values():
        numbers = torch.stack([wide(counts[i].detach()).reshape(()) for i in places]).tolist()
        for i, count in zip(places, numbers, strict=True):
            counts[i] = count
    return [
        step_count(method, rule, state) if count is None else float(count)
        for count, state in zip(counts, states, strict=True)
    ]


@torch.no_grad()
def init_state(optimizer: MethodOptimizer) -> None:
    """Make the state of all parameters that require gradients."""
    for group in optimizer.param_groups:
        method = optimizer.method_of(group)
        for param in group["params"]:
            if param.requires_grad:
                rule = method.rule_of(param, group)
                state = dict.get(optimizer.state, param)
                if not state:
                    optimizer.note_made_by(param, group)
                made = ensure_state(optimizer, param, rule, group, lazy=optimizer.options.sparse is not None)
                if made and not method.counts_steps and (not state or type(state) is InitialState):
                    dict.__setitem__(optimizer.state, param, InitialState(made))
