"""Steps that are decided on devices: the host enqueues them, and waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.core.decision import NORM, Decision
from descend.core.memory import is_on_device, widest
from descend.core.optimizer import MethodOptimizer
from descend.core.update import Update
from descend.state.container import updatable_tensors
from descend.step.scaling import LossScale


def counts_on_device(optimizer: MethodOptimizer, groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether step counts belong on the device: the host may not know them, or must not read the scalars they give."""
    options = optimizer.options
    if options.nonfinite == "skip" or options.amp == "fused":
        return True
    return any(group.get("capturable") or any(_has_device_tensor(group, name) for name in group) for group in groups)


def _has_device_tensor(group: Mapping[str, Any], name: str) -> bool:
    option = group[name]
    if isinstance(option, tuple):  # betas
        return any(map(is_on_device, option))
    return name != "params" and is_on_device(option)


class Decider:
    """Decides a step on the device of its first update, and tells the devices of the others.

    Args:
        optimizer: the optimizer.
        updates: that read what is decided.
        place: tells the deciders of one optimizer apart, see ``MethodOptimizer.decisions``.
    """

    def __init__(self, optimizer: MethodOptimizer, updates: Sequence[Update], place: Any) -> None:
        self._updates = updates
        options = optimizer.options
        may_skip = options.nonfinite == "skip" or options.amp == "fused"
        home = updates[0].device
        key = home, place
        if key not in optimizer.decisions:
            optimizer.decisions[key] = _undecided(home)
        self._home = Decision(optimizer.decisions[key], may_skip)
        self._others = {
            device: Decision(_undecided(device), may_skip)
            for device in dict.fromkeys(update.device for update in updates)
            if device != home
        }
        for update in updates:
            update.decision = self._others.get(update.device, self._home)
        if not options.wants_norm:
            optimizer.grad_norm = optimizer.grad_norm  # a number: what it may be read from is written over from now on
        self._norm = self._home.values[NORM]
        self._nothing = torch.zeros_like(self._norm)

    def decide(self, optimizer: MethodOptimizer, scale: LossScale, norm_to_clip: Callable[[Any], Any] | None) -> float:
        """Enqueue the decision. Return what gradients are multiplied by beside it, as the host knows it.

        Args:
            optimizer: the optimizer.
            scale: of the loss.
            norm_to_clip: see ``take_step``.
        """
        options, values = optimizer.options, self._home.values
        host_scale, grad_scale = 1.0, None
        if isinstance(scale.grad_scale, Tensor):
            grad_scale = scale.grad_scale.to(values.device, non_blocking=True)
        else:
            host_scale = 1 / scale.grad_scale
        total = self._total() if options.wants_norm else self._nothing
        if norm_to_clip is not None and options.wants_norm:
            total = (norm_to_clip(total.sqrt() * host_scale) / host_scale).square()
        self._updates[0].decisions.judge(
            values,
            total,
            grad_scale,
            None if scale.found_inf is None else scale.found_inf.to(values.device, non_blocking=True),
            host_scale,
            options.max_norm or 0.0,
            options.nonfinite == "skip",
        )
        for decision in self._others.values():
            decision.values.copy_(values, non_blocking=True)
        if options.wants_norm and norm_to_clip is None:
            optimizer.note_grad_norm(self._norm)
        return host_scale

    def _total(self) -> Tensor:
        """The sum of the squares of all gradients, on the device that decides."""
        sums = [self._at_home(update.sum_of_squares()) for update in self._updates]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def _at_home(self, number: float | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(self._home.values.device, non_blocking=True)
        return torch.full_like(self._nothing, number)


@updatable_tensors()
def _undecided(device: torch.device) -> Tensor:
    return torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=widest(device), device=device)
