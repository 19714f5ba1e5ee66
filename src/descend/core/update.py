"""A part of a step: parameters that are updated together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.core.decision import Decision
from descend.core.measures import Sample
from descend.core.memory import wide
from descend.core.method import MethodRef
from descend.core.optimizer import MethodOptimizer


class Cell(NamedTuple):
    """Where a gradient's address is kept: ``table[row, 1]``."""

    table: np.ndarray
    row: int


class Wrapper(NamedTuple):
    """A DTensor, in whose place a plain tensor on the memory of its inner one is updated.

    Attributes:
        param: the DTensor.
        inner: the tensor in it.
        spec: what describes the placements of its gradient; None if the inner tensor of that is not the local gradient.
    """

    param: Tensor
    inner: Tensor
    spec: Any


class Summed(NamedTuple):
    """Parameters that share a rule with sums, see ``ops.summing``.

    Attributes:
        method: finds their method.
        rule: the rule.
        params: the parameters; if they are sharded, the DTensors, or what is cut.
        share: which ranks hold their parts; None for parameters that are not sharded.
        members: for each of their groups, its index and which of the parameters are in it.
        numels: how many elements each parameter has on all ranks; a complex number is two.
        local_numel: how many all of them have here.
        sums: returns the sums over each parameter, given the optimizer: a row a parameter, float64. Waits for no
            device; a tensor on one is valid until it is called again.
        take: takes the scalars that are formed of them, a row a parameter.
    """

    method: MethodRef
    rule: Callable[..., Any]
    params: Sequence[Tensor]
    share: Any
    members: Sequence[tuple[int, Any]]
    numels: np.ndarray
    local_numel: int
    sums: Callable[[MethodOptimizer], np.ndarray | Tensor]
    take: Callable[[np.ndarray], None]


class Update(ABC):
    """What a plan asks of each of its parts, in this order.

    Once: ``compile``. At every step: ``read``, ``sum_of_squares`` if a norm is wanted, ``set_scalars``; before the
    first, ``make_state``; the sums of what is ``summed``; then ``run``, and ``release`` in any case. Nothing before
    ``run`` moves a parameter.

    Attributes:
        params: the plain tensors it updates, all on one device.
        share: which ranks hold the rest of them; None for parameters that are not sharded.
        summed: parameters whose rules need sums before ``run``.
        decisions: the ``backends.backend.Decisions`` of the backend that runs it; None if it reads none.
        decision: what the device decides about each step; None where the host does. The plan sets it.
        counts_on_device: whether the step counts are on the device, and the host does not know them. The plan sets it.
    """

    params: Sequence[Tensor]
    share: Any = None
    summed: Sequence[Summed] = ()
    decisions: Any = None
    decision: Decision | None = None
    counts_on_device: bool = False

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.params[0].device

    @property
    def takes_device(self) -> bool:
        """Whether its steps can be decided on its device."""
        return self.decisions is not None and self.decisions.takes(self.device)

    def may_count_on_device(self, optimizer: MethodOptimizer) -> bool:
        """Whether the host need not know how many steps have been taken."""
        return False

    @property
    def is_atomic(self) -> bool:
        """Whether ``run`` cannot be interrupted half-way."""
        return False

    def compile(self, wants_norm: bool, measures: bool = False) -> None:  # noqa: B027 most need nothing
        """Compile, or load from disk, all that the other methods call. May raise ``RuleError``.

        Args:
            wants_norm: whether ``sum_of_squares`` will be called.
            measures: whether ``run`` will get samples.
        """

    def read(self, optimizer: MethodOptimizer) -> None:  # noqa: B027
        """Check what the gradients hold. May raise ``IndexError`` and ``RuntimeError``."""

    @abstractmethod
    def sum_of_squares(self) -> float | Tensor:
        """Of the gradients, in float64; may overflow to Inf. On a device: shape (), valid until it is called again."""

    def numbers(self, values: Iterable[Any]) -> list[Any]:
        """Numbers out of the tensors that they may be in; those on the device stay there if nobody may wait for it."""
        if not self.counts_on_device:
            return list(map(float, map(number, values)))
        device = self.device
        return [
            wide(value.detach()).reshape(())
            if isinstance(value, Tensor) and value.device == device
            else float(number(value))
            for value in values
        ]

    @abstractmethod
    def set_scalars(self, optimizer: MethodOptimizer, scale: float) -> None:
        """Form the scalars of the coming step. May raise whatever an option that cannot be used makes raise.

        Args:
            optimizer: the optimizer.
            scale: what gradients are multiplied by, before ``maximize``.
        """

    @abstractmethod
    def make_state(self, optimizer: MethodOptimizer) -> None:
        """Make the state that is missing, and keep the addresses of all of it."""

    @abstractmethod
    def run(self, optimizer: MethodOptimizer, sample: Sample | None = None) -> None:
        """Update the parameters, their state and their step counts; add to ``sample`` what it asks for."""

    def release(self) -> None:  # noqa: B027
        """Drop the gradients that were read."""

    # How the plan knows that the next step may use the same update.

    def is_valid(self, optimizer: MethodOptimizer) -> bool:
        """Whether what only this update knows is as it was left. Tensors themselves are watched by the plan."""
        return True

    def state_tensors(self) -> list[tuple[Tensor, str, Tensor]]:
        """Parameter, name and tensor of each state tensor whose address is kept."""
        return []

    def cells(self) -> dict[Tensor, Cell]:
        """Where the addresses of the parameters' gradients are kept."""
        return {}

    def written(self) -> np.ndarray:
        """First and last addresses (exclusive) of the memory written through kept addresses, shape (n, 2)."""
        return np.zeros((0, 2), np.int64)


def signed(scale: float, group: Mapping[str, Any]) -> float:
    """What the gradients of a group are multiplied by, ``maximize`` included."""
    return -scale if group.get("maximize") else scale


def number(value: Any) -> Any:
    """A number, out of the tensor that it may be in."""
    return value.item() if isinstance(value, Tensor) else value
