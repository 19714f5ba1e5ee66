"""An optimizer that can be timed: parameters, gradients and state of its own.

- **Own tensors.** Each contender has its own parameters, gradients and state, equal at the start.
- **Fresh gradients** are allocated before every step, outside the clock and in backward's order
  (last parameter first), while the old ones are still alive: every address differs from the step
  before. After ``zero_grad(set_to_none=True)`` and a backward pass most of them do.
- **Clipping peers write to their gradients**, ours does not. With fixed gradients the peers' norm
  is therefore the limit from the second step on. Their work stays the same: ``clip_grad_norm_``
  multiplies whatever the norm is, and no number gets so small that arithmetic on it slows down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import descend
from descend.bench.clock import Contender, keep_gradients
from descend.bench.methods import OURS, Method


class Entry(NamedTuple):
    """A contender and what it trains."""

    params: list[Tensor]
    optimizer: Optimizer
    contender: Contender


def reallocate_gradients(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give each parameter a new gradient with the given value."""
    grads = [value.clone() for value in reversed(values)]
    for param, grad in zip(reversed(params), grads, strict=True):
        param.grad = grad


def clip_and_step(params: Sequence[Tensor], optimizer: Optimizer, max_norm: float) -> None:
    """Take a step of an optimizer that does not clip by itself."""
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()


def enter(name: str, method: Method, values: Sequence[Tensor], max_norm: float | None, fresh: bool) -> Entry:
    """Return an optimizer that is ready to be timed.

    Args:
        name: ``"ours"``, or one of ``PEERS``.
        method: which optimizer; for a peer its yardstick, if it has one.
        values: what the parameters start from, and the value of the gradients; read only.
        max_norm: limit of the gradients' joint norm; None not to clip.
        fresh: whether gradients are allocated anew before each step.
    """
    params = [value.clone().requires_grad_() for value in values]
    reallocate_gradients(params, values)
    prepare: Callable[[], None] = partial(reallocate_gradients, params, values) if fresh else keep_gradients
    optimizer = _optimizer(name, method, params, max_norm)
    step: Callable[[], object] = optimizer.step
    if name != OURS and max_norm is not None:
        step = partial(clip_and_step, params, optimizer, max_norm)
    if params and params[0].is_cuda:  # a step has been taken when the device is done, not when the call returns
        step, prepare = _finished(step, params[0].device), _finished(prepare, params[0].device)
    return Entry(params, optimizer, Contender(step, prepare))


def _optimizer(name: str, method: Method, params: list[Tensor], max_norm: float | None) -> Optimizer:
    if name == OURS:
        ours: Optimizer = getattr(descend, method.name)(params, **method.options, max_norm=max_norm)
        return ours
    peer: Optimizer = getattr(torch.optim, method.yardstick or method.name)(params, **method.peer_options(name))
    return peer


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def finish() -> None:
        call()
        torch.cuda.synchronize(device)

    return finish
