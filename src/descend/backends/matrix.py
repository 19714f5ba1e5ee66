"""Runs rules of whole matrices on plain tensors: small ones of equal shape as one batch, large ones one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends import eager
from descend.backends.cpu.backend import CpuBackend
from descend.backends.foreach import sums_on_device
from descend.backends.retarget import retarget
from descend.core.codecs import Formats, is_plain
from descend.core.decision import Decision
from descend.core.memory import PLAIN
from descend.core.noise import Stream
from descend.core.signature import signature
from descend.ops import elementwise

# A matrix with at most SMALL elements is computed in less time than the calls for it take; LARGEST elements are stacked
# at a time, which bounds the memory that a batch needs.
SMALL = 2**15
LARGEST = 2**20
PIECE = 2**16  # elements of a piece: what a rule computes on its way with them stays in the cache

_CPU = CpuBackend()


class MatrixBackend(eager.EagerBackend):
    """Plain real tensors, on every device, in any layout of memory."""

    name = "matrix"

    def why_not(
        self,
        rule: Callable[..., Any] | None,
        param: Tensor,
        grad: Tensor | None,
        state: Sequence[tuple[str, Tensor]],
    ) -> str | None:
        if rule is None or signature(rule).kind != "matrix":
            return "no rule of whole matrices"
        if reason := _unsuitable(param):
            return reason
        for name, tensor in state if grad is None else (("gradient", grad), *state):
            if reason := _unsuitable(tensor):
                return f"{name}: {reason}"
            if tensor.device != param.device:
                return f"{name}: on {tensor.device}"
        return None

    def why_not_rows(self, rule: Callable[..., Any], param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
        return "single rows"

    def launch(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> MatrixLaunch:
        return MatrixLaunch(rule, scalars, formats, params, rows, streams)


class MatrixLaunch(eager.EagerLaunch):
    """See ``backend.Launch``."""

    def __init__(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> None:
        super().__init__(rule, scalars, formats, params, rows, streams)
        self._stacked: Callable[[], Callable[..., Any]] | None = getattr(rule, "stacked", None)
        # In float64, torch rounds products of stacks otherwise than single ones: results would depend on which other
        # parameters have gradients, and on whether a plan is new.
        may_stack = self._stacked is not None and torch.float64 not in formats
        self._batches = _batches(params, rows, may_stack)
        self._overwrites: bool = getattr(rule, "overwrites", False)
        self._in_pieces = Pieces()
        self._on_pieces = rule
        if isinstance(rule, FunctionType):
            self._on_pieces = retarget(rule, {elementwise: self._in_pieces}, _as_it_is)

    def sum_of_squares(self) -> float | Tensor:
        grads = [param.grad for param in self._params if param.grad is not None]
        if not grads[0].is_cpu:
            return sums_on_device(grads)
        if all(_CPU.why_not(None, grad, None, ()) is None for grad in grads):
            return _CPU.sum_of_squares(grads)
        return eager.sums_of_squares(grads)

    def run(self, measures: bool, decision: Decision | None) -> None:
        """Apply the rule to one batch after the other.

        To one parameter after the other, if the step is measured or not everything is stored as a dtype.
        """
        if measures or not is_plain(self._formats):
            super().run(measures, decision)
            return
        for members in self._batches:
            scale, scalars = self._scalars[self._rows[members[0]]]
            params = [self._params[i] for i in members]
            grads = [param.grad for param in params if param.grad is not None]
            states = [list(tensors) for tensors in zip(*(self._state[i] for i in members), strict=True)]
            if len(members) == 1:
                state = [tensors[0] for tensors in states]
                if decision is None and params[0].is_cpu:
                    self._run_in_place(params[0], grads[0], state, scalars, scale)
                else:
                    eager.run(self._rule, params[0], grads[0], state, scalars, scale, decision=decision)
                continue
            assert self._stacked is not None
            first, *rest = stacks = [torch.stack(tensors) for tensors in (params, *states)]
            eager.run(self._stacked(), first, torch.stack(grads), rest, scalars, scale, decision=decision)
            for tensors, stack in zip((params, *states), stacks, strict=True):
                torch._foreach_copy_(tensors, list(stack))

    def _run_in_place(
        self, param: Tensor, grad: Tensor, state: Sequence[Tensor], scalars: Sequence[Any], scale: float
    ) -> None:
        """``eager.run``, where element-wise parts of the rule go piece by piece, and over what they replace."""
        tensors = (param, *state)
        compute = reduce(torch.promote_types, (tensor.dtype for tensor in (grad, *tensors)), torch.float32)
        before = [tensor.to(compute) for tensor in tensors]
        self._in_pieces.owned = before if self._overwrites else ()
        grad = grad.to(compute)
        scaled = grad if scale == 1 else self._in_pieces(torch.mul, grad, scale)
        results = self._on_pieces(before[0], scaled, *before[1:], *scalars)
        results = results if state else (results,)
        # A rule may keep one of the tensors as another: what is written first must not change it.
        results = [
            value.clone() if any(value is old for old in before) and value is not own else value
            for value, own in zip(results, before, strict=True)
        ]
        for tensor, value in zip(tensors, results, strict=True):
            if value is not tensor:
                eager.write(tensor, value, None)
        self._in_pieces.owned = ()


class Pieces:
    """Runs element-wise parts of a rule, see ``ops.elementwise``.

    Attributes:
        owned: tensors that may be written over.
    """

    owned: Sequence[Tensor] = ()

    def __call__(self, function: Callable[..., Any], *args: Any, replaces: int = 0) -> Any:
        first = args[0]
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
        is_whole = [tensor.shape == first.shape for tensor in tensors]
        if first.numel() <= PIECE or not all(
            whole or tensor.numel() == 1 for whole, tensor in zip(is_whole, tensors, strict=True)
        ):
            return function(*args)
        step = max(1, PIECE * len(first) // first.numel())
        written: list[Tensor] = []
        for start in range(0, len(first), step):
            rows = slice(start, start + step)
            piece = [arg[rows] if isinstance(arg, Tensor) and arg.shape == first.shape else arg for arg in args]
            results = function(*piece)
            values = results if isinstance(results, tuple) else (results,)
            for index, value in enumerate(values[len(written) :], len(written)):
                may_replace = index < replaces and any(args[index] is tensor for tensor in self.owned)
                written.append(args[index] if may_replace else torch.empty_like(first, dtype=value.dtype))
            for tensor, value in zip(written, values, strict=True):
                tensor[rows].copy_(value)
        return tuple(written) if isinstance(results, tuple) else written[0]


def _as_it_is(function: Any) -> Any:
    return function


def _batches(params: Sequence[Tensor], rows: Sequence[int] | np.ndarray, may_stack: bool) -> list[list[int]]:
    """Positions of the parameters that are computed at once: of equal shape, with equal scalars."""
    batches: list[list[int]] = []
    open_batches: defaultdict[Any, list[int]] = defaultdict(list)
    for position, (param, row) in enumerate(zip(params, map(int, rows), strict=True)):
        if not may_stack or not 0 < param.numel() <= SMALL:
            batches.append([position])
            continue
        batch = open_batches[param.shape, row]
        if not batch:
            batches.append(batch)
        batch.append(position)
        if (len(batch) + 1) * param.numel() > LARGEST:
            del open_batches[param.shape, row]
    return batches


def _unsuitable(tensor: Tensor) -> str | None:
    if type(tensor) not in PLAIN:
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if not tensor.is_floating_point():
        return f"dtype {tensor.dtype}"
    return "an inference tensor or a lazy negation" if tensor.is_inference() or tensor.is_neg() else None
