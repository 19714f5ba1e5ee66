"""Runs a rule on lists of tensors: all parameters of one dtype in a few dozen calls, on any device.

Rows of sparse gradients are the eager backend's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, reduce
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends import eager, supports
from descend.backends.backend import Decisions
from descend.backends.cpu import launch, library, threads
from descend.backends.tensor_list import TensorList, Tensors, on_lists
from descend.core.codecs import Formats, element_dtype
from descend.core.decision import Decision
from descend.core.measures import moments
from descend.core.memory import PLAIN, as_real, widest
from descend.core.noise import Stream
from descend.core.signature import signature

# Elements that a rule sees at a time: what it computes on its way has several times their size. On a device that is a
# few hundred MB, whatever the size of the model, and ten times what keeps a GPU busy with one operation. On the CPU it
# stays in the cache: AdamW on 16 M elements takes 56 ms instead of 320.
ELEMENTS = 2**24
CPU_ELEMENTS = 2**17

_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class ForeachDecisions(eager.EagerDecisions):
    """See ``backend.Decisions``."""

    def scalar_state(
        self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray
    ) -> ForeachDeviceScalarState:
        return ForeachDeviceScalarState(tensors, rows)


class ForeachBackend(eager.EagerBackend):
    """Plain tensors of every floating and complex dtype, on every device, as lists."""

    name = "foreach"
    decisions: Decisions | None = ForeachDecisions()

    def why_not(
        self,
        rule: Callable[..., Any] | None,
        param: Tensor,
        grad: Tensor | None,
        state: Sequence[tuple[str, Tensor]],
    ) -> str | None:
        if rule is None:
            return _why_not_norm(param)
        if reason := _why_not_rule(rule) or _unsuitable(param):
            return reason
        for name, tensor in state if grad is None else (("gradient", grad), *state):
            if reason := _unsuitable(tensor):
                return f"{name}: {reason}"
            if tensor.shape != param.shape or tensor.device != param.device:
                return f"{name}: shape {tuple(tensor.shape)} on {tensor.device} differs from the parameter's"
            if tensor.is_complex() != param.is_complex():
                return f"{name}: dtype {tensor.dtype} for a parameter of {param.dtype}"
        return None

    def why_not_rows(self, rule: Callable[..., Any], param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
        return self.why_not(rule, param, None, state)

    def why_not_formats(
        self, rule: Callable[..., Any], param: Tensor, formats: Formats, stored: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        return "state in 8 bits, or rounding"

    def launch(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> ForeachLaunch:
        return ForeachLaunch(rule, scalars, formats, params, rows)

    def scalar_state(self, tensors: Sequence[Tensor]) -> Any:
        if tensors and all(map(_is_host_number, tensors)):
            return HostScalarState(tensors)
        return super().scalar_state(tensors)

    def sum_of_squares(self, tensors: Sequence[Tensor]) -> float | Tensor:
        return sums_of_squares(tensors)


class ForeachLaunch(eager.EagerLaunch):
    """See ``backend.Launch``. Parameters with equal scalars are one list, or several short ones."""

    def __init__(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
    ) -> None:
        super().__init__(rule, scalars, formats, params, rows)
        assert isinstance(rule, FunctionType)
        self._on_lists, self._moments = on_lists(rule), moments(rule)
        dtypes = [element_dtype(format) for format in formats]  # which are dtypes
        self._is_complex = dtypes[0].is_complex
        self._compute = reduce(torch.promote_types, (dtype.to_real() for dtype in dtypes), torch.float32)
        self._elements = CPU_ELEMENTS if params[0].is_cpu else ELEMENTS
        self._lists = list(_lists(params, rows, self._elements))
        self._columns: list[list[list[Tensor]]] = []
        self._formed_lists: list[list[float | TensorList]] = [[] for _ in self._lists]

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        """The rule is not compiled; what the host does with step counts is."""
        for dtype in (torch.float32, torch.get_default_dtype()):
            library.scalar_state(dtype)
        library.sequence()

    def set_state(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        super().set_state(tensors)
        self._columns = []
        for _, members in self._lists:
            rows = [(self._params[i], *tensors[i]) for i in members]
            self._columns.append([list(column) for column in zip(*rows, strict=True)])

    def sums(self) -> Tensor:
        part = signature(self._rule).summed
        assert isinstance(part, FunctionType)
        on_list, found = on_lists(part), dict[int, Tensor]()
        with torch.no_grad():
            for (row, members), written in zip(self._lists, self._columns, strict=True):
                scale, scalars = self._scalars[row]
                grads = [self._params[i].grad for i in members]
                for columns in _parts([grads, *written], self._elements):  # type: ignore[list-item]
                    grad, first, *rest = [TensorList(converted(x, self._compute)) for x in self._real(columns)]
                    results = on_list(first, grad if scale == 1 else grad * scale, *rest, *scalars)
                    results = results if isinstance(results, tuple) else (results,)
                    _add(found, members, torch.stack([_sums(result.tensors) for result in results], dim=1))
        return torch.stack([found[i] for i in range(len(self._params))])

    def set_formed(self, values: np.ndarray) -> None:
        super().set_formed(values)
        numbers = torch.from_numpy(values).to(self._compute).to(self._params[0].device)
        self._formed_lists = [
            [
                float(values[members[0], column])
                if (values[members, column] == values[members[0], column]).all()
                else TensorList(list(numbers[members, column].unbind()))
                for column in range(values.shape[1])
            ]
            for _, members in self._lists
        ]

    def sum_of_squares(self) -> float | Tensor:
        return sums_of_squares([param.grad for param in self._params if param.grad is not None])

    def run(self, measures: bool, decision: Decision | None) -> None:
        """Apply the rule to one list after the other."""
        measured: dict[int, Tensor] = {}
        for (row, members), written, formed in zip(self._lists, self._columns, self._formed_lists, strict=True):
            grads, (scale, scalars) = [self._params[i].grad for i in members], self._scalars[row]
            for part in _parts([grads, *written], self._elements):  # type: ignore[list-item]
                sums = self._run_list(*part, scalars=(scale, (*scalars, *formed)), measures=measures, decision=decision)
                _add(measured, members, sums)
        self._measured = [measured[i] for i in sorted(measured)]

    def _run_list(
        self,
        grads: Tensors,
        *stored: Tensors,
        scalars: tuple[float, Sequence[Any]],
        measures: bool,
        decision: Decision | None,
    ) -> list[Tensor]:
        """See ``eager.run``."""
        grads, *written = self._real([grads, *stored])
        scale, others = scalars
        grads, first, *rest = [converted(tensors, self._compute) for tensors in (grads, *written)]
        before = [tensor.clone() for tensor in first] if measures else []
        scaled = TensorList(grads) if scale == 1 else TensorList(grads) * scale
        if decision is not None:
            scaled = scaled * decision.factor
        results = self._on_lists(TensorList(first), scaled, *map(TensorList, rest), *others)
        results = results if rest else (results,)
        new = [
            [tensor.clone() for tensor in result.tensors]
            if any(result.tensors is old for old in (first, *rest))
            else result.tensors
            for result in results
        ]
        for tensors, values in zip(written, new, strict=True):
            write(tensors, values, decision)
        return [
            eager.measured_sums(old, grad, new, self._moments)
            for old, grad, *new in (zip(before, grads, *written, strict=True) if measures else ())
        ]

    def _real(self, columns: Sequence[Tensors]) -> Sequence[Tensors]:
        """Complex numbers as pairs of real ones."""
        return [list(map(as_real, tensors)) for tensors in columns] if self._is_complex else columns


def converted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same values in ``dtype``; the tensors themselves where they have it."""
    if tensors[0].dtype == dtype:
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def write(tensors: Tensors, values: Tensors, decision: Decision | None) -> None:
    """Copy values into the tensors of a list, all of one dtype, unless the decision leaves the step out."""
    if decision is None or not decision.may_skip:
        torch._foreach_copy_(tensors, values)
        return
    # take * (new - old) is added to the bits, as integers that wrap around: so NaN stays out where take is 0.
    dtype = tensors[0].dtype
    integer = _INTEGERS[dtype.itemsize]
    old, new = [tensor.view(integer) for tensor in tensors], [value.to(dtype).view(integer) for value in values]
    changes = torch._foreach_sub(new, old)
    torch.ops.aten._foreach_mul_.Tensor(changes, decision.take.to(integer))
    torch._foreach_add_(old, changes)


def _sums(tensors: Tensors) -> Tensor:
    """Of each tensor, shape (tensors,), in the device's widest dtype."""
    if tensors[0].is_cpu:
        return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])
    return each_on_device(tensors)


def each_on_device(tensors: Tensors) -> Tensor:
    """The same in a few calls, whatever the number of tensors: what is positive, less what is negative."""
    dtype = widest(tensors[0].device)
    positive, negative = torch._foreach_clamp_min(tensors, 0), torch._foreach_clamp_max(tensors, 0)
    sums = [torch.stack(torch._foreach_norm(part, 1, dtype=dtype)) for part in (positive, negative)]
    return sums[0] - sums[1]


def _add(totals: dict[int, Tensor], members: Sequence[int], values: Sequence[Tensor] | Tensor) -> None:
    """Add each member's value to its total, if there are values."""
    for member, value in zip(members, values, strict=False):
        totals[member] = totals[member] + value if member in totals else value


def sums_of_squares(tensors: Sequence[Tensor]) -> float | Tensor:
    """See ``eager.sums_of_squares``."""
    if not tensors or tensors[0].is_cpu:
        return eager.sums_of_squares(tensors)
    return sums_on_device(tensors)


def sums_on_device(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each, then the sum of their squares in order, in the device's widest dtype."""
    real = [as_real(tensor.detach()) for tensor in tensors]
    norms = torch._foreach_norm(real, 2, dtype=widest(tensors[0].device))
    return torch.stack(norms).square().sum()


def _lists(
    params: Sequence[Tensor], rows: Sequence[int] | np.ndarray, elements: int
) -> Iterator[tuple[int, list[int]]]:
    """Rows of scalars, each with the positions of parameters that have it: at most ``elements``, or one parameter."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    sizes: defaultdict[int, int] = defaultdict(int)
    for position, (param, row) in enumerate(zip(params, map(int, rows), strict=True)):
        if members[row] and sizes[row] + param.numel() > elements:
            yield row, members.pop(row)
            sizes.pop(row)
        members[row].append(position)
        sizes[row] += param.numel()
    yield from members.items()


def _parts(columns: list[list[Tensor]], elements: int) -> Iterator[list[Tensors]]:
    """Lists as they are; a parameter with more than ``elements``, and its gradient and state, in parts."""
    tensors = [column[0].detach() for column in columns]
    if tensors[0].numel() <= elements:
        yield list(columns)
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    slices = max(1, elements * len(tensors[0]) // tensors[0].numel())  # along the first dimension
    for pieces in zip(*(torch.split(tensor, slices) for tensor in tensors), strict=True):
        yield [[piece] for piece in pieces]


class HostScalarState:
    """See ``backend.ScalarState``: 0-dim CPU tensors, checked, counted and set by compiled loops."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._state = launch.ScalarState(tensors)
        self._add_one = threads.CallSequence(self._state.add_one_calls())
        self._write = threads.CallSequence(self._state.write_calls())

    def is_unchanged(self) -> bool:
        return self._state.is_unchanged()

    def add_one(self) -> None:
        """Add one to each."""
        self._add_one.run()

    def write(self, values: np.ndarray, decision: Decision | None) -> None:
        """Set them, in the order of the tensors."""
        self._state.set_next(values)
        self._write.run()


class ForeachDeviceScalarState(eager.DeviceScalarState):
    """The same in a few calls."""

    def __init__(self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray) -> None:
        super().__init__(tensors, rows)
        self._lists: defaultdict[tuple[int, torch.dtype], list[tuple[Tensor, int]]] = defaultdict(list)
        for members, row in zip(tensors, map(int, rows), strict=True):
            for column, tensor in enumerate(members):
                self._lists[column, tensor.dtype].append((tensor, row))

    def write(self, values: Sequence[Sequence[Any]], decision: Decision | None) -> None:
        for (column, _), members in self._lists.items():
            tensors, rows = zip(*members, strict=True)
            new = {row: eager.as_tensor(values[row][column], tensors[0]) for row in {*rows}}
            write(tensors, [new[row] for row in rows], decision)
        self._versions = self._current_versions()


def _is_host_number(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.is_floating_point() and tensor.dtype in _DTYPES


@cache
def _why_not_rule(rule: Callable[..., Any]) -> str | None:
    """Why a rule cannot run on lists: found out by running it."""
    takes = signature(rule)
    if reason := supports.why_not_kind(rule):
        return reason
    if not isinstance(rule, FunctionType):
        return f"a rule that is a {type(rule).__name__}"
    ones = torch.ones(2, dtype=torch.float64, device="cpu")
    tensors = [TensorList([ones]) for _ in ("param", "grad", *takes.state)]
    try:
        results = on_lists(rule)(*tensors, *[1.0] * len(takes.scalars))
    except Exception as error:
        return f"a rule that does not run on lists ({type(error).__name__}: {error})"
    results = list(results) if takes.state else [results]
    if takes.summed is not None:
        if not isinstance(takes.summed, FunctionType):
            return f"a rule that sums with a {type(takes.summed).__name__}"
        summed = on_lists(takes.summed)(*tensors, *[1.0] * len(takes.given))
        results += summed if isinstance(summed, tuple) else [summed]
    if not all(isinstance(result, TensorList) for result in results):
        return "a rule that returns numbers"
    return None if all(result.tensors[0].is_floating_point() for result in results) else "a rule that returns bools"


def _why_not_norm(tensor: Tensor) -> str | None:
    if tensor.is_cpu:
        return "norms of CPU tensors are summed chunk by chunk"
    if tensor.dtype.to_real() == torch.float64 or widest(tensor.device) != torch.float64:
        return "its squares may overflow"
    return _unsuitable(tensor)


def _unsuitable(tensor: Tensor) -> str | None:
    if type(tensor) not in PLAIN:
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"dtype {tensor.dtype}"
    if tensor.is_inference() or tensor.is_neg() or tensor.is_conj():
        return "an inference tensor, a lazy negation or a lazy conjugation"
    return None
