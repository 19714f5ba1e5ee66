"""What one step will do, worked out once and kept for as long as it can be proved to hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends import eager
from descend.backends.cpu import supports
from descend.backends.cpu.launch import Launch, StoredNumbers
from descend.backends.cpu.probe import Cell, PythonProbe, make_probe
from descend.core import memory
from descend.core.signature import signature
from descend.norms import clip
from descend.sparse.update import SparseUpdate, warm_up_rows
from descend.state import lazy_memory
from descend.state.container import State, state_tensors

if TYPE_CHECKING:
    from descend.first_order.optimizer import FirstOrder


class Placement(NamedTuple):
    """Where a parameter's rule runs."""

    name: str
    backend: str
    reason: str


class Place(NamedTuple):
    """Where a parameter stands in the groups."""

    group: int
    position: int


class _Entry(NamedTuple):
    """One parameter with a gradient."""

    param: Tensor
    group: int
    rule: Any
    found: Mapping[str, Any]  # its state as it was when the plan was made
    reason: str | None  # why it runs eagerly; None for a kernel
    sparse: str | None  # what its gradient means, if that is sparse


class _Row:
    """Parameters of one group that have taken the same steps: they share the numbers of the rule."""

    def __init__(self, group: int, taken: float, kept: Sequence[Tensor]) -> None:
        self.group = group
        self.taken = taken
        self.kept = kept  # those in the state of one of them, once there is any
        self.kept_next: tuple[Any, ...] = ()


class _Call(NamedTuple):
    """One kernel call: its tables, the parameters in them, and the row of numbers of each."""

    launch: Launch
    entries: list[_Entry]
    rows: list[_Row]
    row_of: np.ndarray


class Plan:
    """Every parameter with a gradient, sorted into kernel calls and eager updates.

    Making a plan validates everything and touches nothing. ``prepare`` then makes the state that is missing, and
    ``run`` takes one step. ``holds`` tells whether the next step may use the same plan.

    Args:
        optimizer: whose parameters they are.
        only_with_grad: leave out parameters without a gradient. Default: True.
        place: of the one parameter to plan for. Default: all parameters of all groups.
    """

    def __init__(self, optimizer: FirstOrder, only_with_grad: bool = True, place: Place | None = None) -> None:
        self._place = place
        self._is_prepared = False
        self._request = optimizer.requested_backend()
        self._state = optimizer.state
        if isinstance(self._state, State) and self._state.owner() is not optimizer:
            self._state.exposed = True  # two optimizers write it: neither knows of the other's steps
        self._groups = [
            (index, list(params), optimizer.rule_for(group), bool(group.get("differentiable")))
            for index, group, params in self._listed(optimizer.param_groups)
        ]
        entries: list[_Entry] = []
        for index, params, rule, differentiable in self._groups:
            for param in params:
                if not only_with_grad or param.grad is not None:
                    entries.append(self._entry(optimizer, index, rule, param, differentiable))
        self._entries = self._keep_order_of_overlaps(entries)
        if self._request == "cpu" and (entry := next((entry for entry in self._entries if entry.reason), None)):
            raise RuntimeError(
                f"{type(optimizer).__name__}: backend='cpu' cannot run {optimizer.name_of(entry.param)}: "
                f"{entry.reason}. Use backend='auto' to run such parameters eagerly."
            )
        self._eager = [entry for entry in self._entries if entry.reason and not entry.sparse]
        self._sparse = []
        self._one_by_one: list[_Entry | SparseUpdate] = []  # in the order of the groups: they may share memory
        for entry in self._entries:
            if entry.sparse:
                update = SparseUpdate(optimizer, entry.param, entry.group, entry.rule, entry.sparse, entry.reason)
                self._sparse.append(update)
            if entry.reason:
                self._one_by_one.append(update if entry.sparse else entry)
        self._sort_into_launches(optimizer)
        self._probe: Any = None

    def _listed(self, groups: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any], list[Tensor]]]:
        """The groups this plan is about, each with its index and those of its parameters that are meant."""
        if self._place is None:
            return [(index, group, group["params"]) for index, group in enumerate(groups)]
        index, position = self._place
        return [(index, group, group["params"][position : position + 1]) for group in groups[index : index + 1]]

    def _entry(self, optimizer: FirstOrder, index: int, rule: Any, param: Tensor, differentiable: bool) -> _Entry:
        optimizer.check_param(param, optimizer.param_groups[index])
        found = dict.get(self._state, param) or {}
        state = state_tensors(optimizer, param, signature(rule).state, found)
        sparse = optimizer.meaning_of_sparse(param, optimizer.param_groups[index])
        if differentiable:
            reason: str | None = "differentiable=True"
        elif self._request == "eager":
            reason = "backend='eager'"
        elif sparse:
            reason = supports.why_not_rows(param, state)
        else:
            reason = supports.why_not_cpu(param, param.grad, state)
        return _Entry(param, index, rule, found, reason, sparse)

    def _keep_order_of_overlaps(self, entries: list[_Entry]) -> list[_Entry]:
        """Give parameters that share memory to the eager backend, which takes one after the other.

        Memory counts as shared when two tensors of a step meet and at least one of them is written.
        """
        spans = []
        for i, entry in enumerate(entries):
            state = [value for value in entry.found.values() if isinstance(value, Tensor)]
            for tensor, is_written in ((entry.param, True), (entry.param.grad, False), *((s, True) for s in state)):
                if tensor is not None and (found := memory.span(tensor)):
                    spans.append((*found, is_written, i))
        for i in memory.overlapping(spans):
            if not entries[i].reason:
                entries[i] = entries[i]._replace(reason="shares memory with another tensor of the step")
        return entries

    def _sort_into_launches(self, optimizer: FirstOrder) -> None:
        sorted_entries: defaultdict[Any, list[_Entry]] = defaultdict(list)
        for entry in self._entries:
            if entry.reason is None and entry.sparse is None:
                dtypes = optimizer.state_dtypes(entry.rule, entry.param, entry.found)
                grad = entry.param if entry.param.grad is None else entry.param.grad
                sorted_entries[entry.rule, (entry.param.dtype, grad.dtype, *dtypes)].append(entry)
        self._calls: list[_Call] = []
        for (rule, dtypes), members in sorted_entries.items():
            rows: dict[Any, _Row] = {}
            keys = []
            for entry in members:
                group, taken = optimizer.param_groups[entry.group], optimizer.steps_taken(entry.rule, entry.found)
                kept = optimizer.stored_numbers(optimizer.keeps, entry.param, group, entry.found)
                keys.append((entry.group, taken, *((number.dtype, number.item()) for number in kept)))
                rows.setdefault(keys[-1], _Row(entry.group, taken, kept))
            place = {key: row for row, key in enumerate(rows)}
            row_of = np.array([place[key] for key in keys])
            numbers = len(signature(rule).numbers)
            params = [entry.param for entry in members]
            grads = [param if param.grad is None else param.grad for param in params]
            launch = Launch(rule, numbers, dtypes, params, grads, row_of)
            self._calls.append(_Call(launch, members, list(rows.values()), row_of))

    def read(self, optimizer: FirstOrder) -> None:
        """Check and sum up what sparse gradients hold: unlike memory, that is new at every step."""
        for update in self._sparse:
            update.read(optimizer)

    def forget(self) -> None:
        """Let go of the gradients that were read: there will be no step."""
        for update in self._sparse:
            update.forget()

    def total_norm(self) -> float:
        """Of all gradients, in float64; its bits do not depend on threads or on how the plan came about."""
        total = sum(call.launch.grad_sum_of_squares() for call in self._calls)
        total += sum(update.sum_of_squares() for update in self._sparse)
        for entry in self._eager:
            norm = float(clip.norm([entry.param.grad], 2.0))  # type: ignore[list-item]
            total += norm * norm
        if math.isfinite(total):
            return math.sqrt(total)
        # Not finite, or finite with squares that overflow: the slower way can tell.
        return float(clip.norm([entry.param.grad for entry in self._entries], 2.0))  # type: ignore[misc]

    def nonfinite_gradients(self, optimizer: FirstOrder) -> list[str]:
        """Names of the parameters whose gradients have a NaN or Inf."""
        return [
            optimizer.name_of(entry.param)
            for entry in self._entries
            if entry.param.grad is not None and not clip.is_finite(entry.param.grad)
        ]

    @torch.no_grad()
    def prepare(self, optimizer: FirstOrder) -> None:
        """Make the missing state of the parameters that kernels update, and complete the tables. Needed once."""
        if self._is_prepared:
            return
        cells: dict[Tensor, Cell] = {}
        self._params: list[Tensor] = []
        self._made: list[tuple[Tensor, str, Tensor]] = []
        steps, kept = list[Tensor](), list[Tensor]()
        for launch, entries, rows, row_of in self._calls:
            tensors = []
            for place, entry in enumerate(entries):
                state = optimizer.ensure_state(entry.param, entry.rule, optimizer.param_groups[entry.group])
                names = signature(entry.rule).state
                tensors.append([state[name] for name in names])
                lazy_memory.commit(tensors[-1])
                if optimizer.counts_steps:
                    steps.append(state["step"])
                    names += ("step",)
                rows[row_of[place]].kept = [state[name] for name in optimizer.keeps]
                kept += rows[row_of[place]].kept
                self._made += [(entry.param, name, state[name]) for name in (*names, *optimizer.keeps)]
                cells[entry.param] = Cell(launch.addresses, place)
                self._params.append(entry.param)
            launch.set_state(tensors)
        for update in self._sparse:
            state = update.prepare(optimizer)
            self._made += [(update.param, name, value) for name, value in state.items() if isinstance(value, Tensor)]
            if optimizer.counts_steps and not optimizer.step_is_int and not update.reason:
                steps.append(state["step"])
            self._params.append(update.param)
        self._steps, self._kept_numbers = StoredNumbers(steps), StoredNumbers(kept)
        watched = [param for _, params, _, _ in self._groups for param in params]
        made = [tensor for _, _, tensor in self._made]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *(call.launch.written() for call in self._calls)])
        written = spans[np.argsort(spans[:, 0])]
        # A native probe owns its tensors where the garbage collector cannot see it; steps inside backward hang on them.
        kind = make_probe if self._place is None else PythonProbe
        self._probe = kind(watched, [cells.get(param) for param in watched], made, written)
        self._is_prepared = True

    def holds(self, optimizer: FirstOrder) -> bool:
        """Whether nothing this plan relies on has changed since it was made."""
        groups = self._listed(optimizer.param_groups)
        if not self._is_prepared or len(groups) != len(self._groups) or optimizer.requested_backend() != self._request:
            return False
        for (_, group, listed), (_, params, rule, differentiable) in zip(groups, self._groups, strict=True):
            if (
                len(listed) != len(params)
                or not all(map(is_, listed, params))
                or optimizer.rule_for(group) is not rule
                or bool(group.get("differentiable")) != differentiable
            ):
                return False
        if optimizer.state is not self._state:
            return False
        for update in self._sparse:
            if optimizer.meaning_of_sparse(update.param, optimizer.param_groups[update.group]) != update.meaning:
                return False
        exposed = not isinstance(self._state, State) or self._state.exposed
        if exposed and not self._state_is_ours():
            return False
        return bool(self._probe.holds(state=exposed)) and self._steps.unchanged() and self._kept_numbers.unchanged()

    def _state_is_ours(self) -> bool:
        """Whether every state tensor is still the one that was put there."""
        for param, name, tensor in self._made:
            found = dict.get(self._state, param)
            if found is None or found.get(name) is not tensor:
                return False
        return True

    def set_scalars(self, optimizer: FirstOrder, scale: float) -> None:
        """Form every number of the coming step: an option that cannot be used is found before anything moves."""
        self._scale = scale
        try:
            self._form_numbers(optimizer, scale)
        except Exception:
            for group in optimizer.param_groups:
                optimizer.check_group(group)  # says which option it was
            raise

    def _form_numbers(self, optimizer: FirstOrder, scale: float) -> None:
        groups = optimizer.param_groups
        for launch, _, rows, _ in self._calls:
            for values, row in zip(launch.scalars, rows, strict=True):
                group = groups[row.group]
                numbers, kept_next = optimizer.scalars_and_kept(group, row.taken + 1, row.kept)
                values[:] = (_signed(scale, group), *map(float, map(_number, numbers)))
                row.kept_next = tuple(map(_number, kept_next))
        for update in self._sparse:
            self._set_numbers(optimizer, update)
        for entry in self._eager:
            takes = signature(entry.rule)
            state_tensors(optimizer, entry.param, takes.state, optimizer.state_of(entry.param))
            numbers, kept_next = self._next_numbers(optimizer, entry)
            for _, number in zip((*takes.numbers, *optimizer.keeps), (*numbers, *kept_next), strict=True):
                float(_number(number))

    def run(self, optimizer: FirstOrder) -> None:
        """Take the step."""
        for launch, _, rows, _ in self._calls:
            launch.update()
            for row in rows:
                row.taken += 1
        for update in self._sparse:
            if not update.reason:
                update.run(optimizer)
                if optimizer.step_is_int:
                    optimizer.state_of(update.param)["step"] += 1
        if self._params:
            self._steps.advance()
            if optimizer.keeps and self._calls:
                kept = [np.array([row.kept_next for row in call.rows])[call.row_of].ravel() for call in self._calls]
                self._kept_numbers.write(np.concatenate(kept))
            torch.autograd.graph.increment_version(self._params)
        for each in self._one_by_one:
            if isinstance(each, SparseUpdate):
                if optimizer.counts_steps:  # a parameter listed twice has taken a step since
                    self._set_numbers(optimizer, each)
                each.run(optimizer)
                if optimizer.counts_steps:
                    optimizer.state_of(each.param)["step"] += 1
            else:
                self._run_eagerly(optimizer, each)

    def _set_numbers(self, optimizer: FirstOrder, update: SparseUpdate) -> None:
        numbers, kept_next = self._next_numbers(optimizer, update)
        scale = _signed(self._scale, optimizer.param_groups[update.group])
        update.set_numbers([float(_number(value)) for value in numbers], [*map(_number, kept_next)], scale)

    @staticmethod
    def _next_numbers(optimizer: FirstOrder, each: _Entry | SparseUpdate) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        group, found = optimizer.param_groups[each.group], optimizer.state_of(each.param)
        kept = optimizer.stored_numbers(optimizer.keeps, each.param, group, found)
        return optimizer.scalars_and_kept(group, optimizer.steps_taken(each.rule, found) + 1, kept)

    def _run_eagerly(self, optimizer: FirstOrder, entry: _Entry) -> None:
        group = optimizer.param_groups[entry.group]
        differentiable = bool(group.get("differentiable"))
        with torch.set_grad_enabled(differentiable):
            found = dict.get(optimizer.state, entry.param) or {}
            taken = optimizer.steps_taken(entry.rule, found)
            state = optimizer.ensure_state(entry.param, entry.rule, group)
            kept = [state[name] for name in optimizer.keeps]
            # As in the rule: what a graph has seen is not written to.
            seen = [number.clone() for number in kept] if differentiable else kept
            numbers, kept_next = optimizer.scalars_and_kept(group, taken + 1, seen)
            if not differentiable:
                numbers = tuple(map(_number, numbers))
            tensors = [state[name] for name in signature(entry.rule).state]
            grad = entry.param.grad
            assert grad is not None
            eager.run(entry.rule, entry.param, grad, tensors, numbers, _signed(self._scale, group), differentiable)
            for number, value in zip(kept, kept_next, strict=True):
                number.copy_(torch.as_tensor(value).reshape(()))
            if optimizer.counts_steps:
                state["step"] += 1

    def warm_up(self, optimizer: FirstOrder) -> None:
        """Load what a step will call beside the updates, which making the plan has loaded."""
        wants_norm = optimizer.max_norm is not None or optimizer.nonfinite != "step"
        for call in self._calls if wants_norm else ():
            call.launch.grad_sum_of_squares()
        if self._calls:
            make_probe([], [], [], np.zeros((0, 2), np.int64))
            if optimizer.counts_steps:
                StoredNumbers([torch.zeros(())])
        for update in self._sparse:
            update.warm_up(wants_norm)
        if optimizer.sparse is not None:
            for dtype in {entry.param.dtype for entry in self._entries if entry.reason is None}:
                warm_up_rows(dtype)

    def placements(self, optimizer: FirstOrder) -> list[Placement]:
        """Where each parameter's rule runs, and why."""
        return [
            Placement(
                optimizer.name_of(entry.param),
                "eager" if entry.reason else "cpu",
                entry.reason or str(entry.param.dtype).removeprefix("torch."),
            )
            for entry in self._entries
        ]


def _signed(scale: float, group: Mapping[str, Any]) -> float:
    return -scale if group.get("maximize") else scale


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
