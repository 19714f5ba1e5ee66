"""The parts of a step for dense gradients: launches of a backend, and single parameters in their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends import EAGER, eager
from descend.backends.backend import Backend, Launch, ScalarState
from descend.backends.opened import Noise
from descend.core.codecs import Formats, needs_noise, stored_names
from descend.core.decision import Decision
from descend.core.measures import Sample, correction
from descend.core.memory import wide
from descend.core.method import MethodRef
from descend.core.noise import Stream
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.core.update import Cell, Summed, Update, number, signed
from descend.distributed.dtensors import local_of
from descend.distributed.ranks import Share
from descend.norms import clip
from descend.state import lazy_memory
from descend.state.container import CPU, State, checked_state
from descend.state.formats import key_of, streams_of
from descend.state.make import ensure_state, scalar_tensors, step_count, step_counts

_NONE = np.zeros(0)


class Entry(NamedTuple):
    """One parameter with a gradient.

    Attributes:
        param: the parameter.
        local: the plain tensor to update, with its gradient: this rank's part of a sharded parameter, else ``param``.
        share: which ranks hold the parts; None if it is not sharded.
        group: the index of its group.
        method: finds how the group is updated.
        rule: the rule to apply.
        state: its state when the plan was made.
        backend: what runs the rule.
        reason: why no compiled backend runs it; None if one does.
        formats: how the parameter, its gradient and its state are stored.
        sparse: what its gradient means, if that is sparse: "all", "touched" or "exact".
        in_order: whether it must be updated by itself, in the order of the groups.
        shares_memory: whether another tensor of the step, or the parameter itself once more, is what it changes.
    """

    param: Tensor
    local: Tensor
    share: Share | None
    group: int
    method: MethodRef
    rule: Any
    state: Mapping[str, Any]
    backend: Backend
    reason: str | None
    formats: Formats
    sparse: str | None
    in_order: bool
    shares_memory: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the tensors of its state, in the order in which backends take them."""
        return stored_names(signature(self.rule).state, self.formats)


class _ScalarsRow:
    """A row of the scalars table, shared by parameters of one group with equal step counts and equal scalar state."""

    def __init__(self, group: int, step: float, state: Sequence[Tensor]) -> None:
        self.group = group
        self.step: Any = step
        self.state = state  # the scalar state of one of them
        self.counter: Tensor | None = None  # the step count of one of them, where the host does not know it
        self.next_state: tuple[Any, ...] = ()


class _Batch(NamedTuple):
    """One launch: its parameters and their entries, the rows of its scalars table, and the row of each parameter."""

    launch: Launch
    params: list[Tensor]
    entries: list[Entry]
    rows: list[_ScalarsRow]
    row_of: np.ndarray


class LaunchUpdate(Update):
    """All parameters of a method with dense gradients that one backend takes, as launches by rule and dtypes.

    Args:
        optimizer: the optimizer.
        backend: runs the rules.
        entries: the parameters, all of one method and share, and on one device.
    """

    # From ``make_state`` on.
    _counters: ScalarState
    _scalar_state: ScalarState
    _run_together: Callable[[Any, Decision | None], None]
    _run_measured: Callable[[Any, Decision | None], None] | None

    def __init__(self, optimizer: MethodOptimizer, backend: Backend, entries: Sequence[Entry]) -> None:
        self._method, self._backend, self.decisions = entries[0].method, backend, backend.decisions
        self._batches = [
            _batch(optimizer, backend, rule, formats, members)
            for (rule, formats), members in _by_signature(entries).items()
        ]
        self._has_scalar_state = bool(self._method().scalar_state)
        self._launches = [batch.launch for batch in self._batches]
        self.summed = [
            _summed(batch.entries, _sums_of(batch.launch), batch.launch.set_formed)
            for batch in self._batches
            if signature(batch.entries[0].rule).summed is not None
        ]
        self.params = [entry.local for batch in self._batches for entry in batch.entries]
        self.share = entries[0].share
        self._wrappers = [entry.param for entry in entries if entry.share is not None]
        self._state_tensors: list[tuple[Tensor, str, Tensor]] = []
        self._cells: dict[Tensor, Cell] = {}

    @property
    def is_atomic(self) -> bool:
        return self._backend.is_atomic  # in a forked child it may not be

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        for launch in self._launches:
            launch.compile(wants_norm, measures)

    def sum_of_squares(self) -> float | Tensor:
        sums = [launch.sum_of_squares() for launch in self._launches]
        return sums[0] if len(sums) == 1 else sum(sums)

    def may_count_on_device(self, optimizer: MethodOptimizer) -> bool:
        groups = {row.group for batch in self._batches for row in batch.rows}
        return all(self._method().may_decide_on_device(optimizer.param_groups[group]) for group in groups)

    def set_scalars(self, optimizer: MethodOptimizer, scale: float) -> None:
        groups, method = optimizer.param_groups, self._method()
        for launch, _, entries, rows, _ in self._batches:
            is_noisy = needs_noise(entries[0].formats)
            for index, row in enumerate(rows):
                group = groups[row.group]
                step: Any = row.step + 1 if row.counter is None else wide(row.counter).reshape(()) + 1
                scalars, next_state = method.scalars_and_state(group, step, row.state)
                launch.set_scalars(index, signed(scale, group), self.numbers(scalars))
                if is_noisy:
                    launch.set_noise(index, key_of(optimizer, step))
                row.next_state = tuple(self.numbers(next_state)) if next_state else ()
                if self.counts_on_device and method.counts_steps:
                    row.next_state = (step, *row.next_state)

    def make_state(self, optimizer: MethodOptimizer) -> None:
        method = self._method()
        counters: list[Tensor] = []
        scalar_state: list[Tensor] = []
        place = self.device if self.counts_on_device else CPU
        for launch, _, entries, rows, row_of in self._batches:
            tensors = []
            for position, entry in enumerate(entries):
                group = optimizer.param_groups[entry.group]
                state = ensure_state(optimizer, entry.param, entry.rule, group, scalars_on=place)
                names = entry.stored
                tensors.append([local_of(state[name]) for name in names])
                lazy_memory.commit(tensors[-1])
                if method.counts_steps:
                    counters.append(state["step"])
                    names += ("step",)
                row = rows[row_of[position]]
                row.state = [state[name] for name in method.scalar_state]
                if self.counts_on_device and method.counts_steps:
                    row.counter = state["step"]
                scalar_state += row.state
                self._state_tensors += [(entry.param, name, state[name]) for name in (*names, *method.scalar_state)]
                if launch.addresses is not None:
                    self._cells[entry.local] = Cell(launch.addresses, position)
            launch.set_state(tensors)
        if self.counts_on_device:
            self._counters, self._scalar_state = self._backend.scalar_state([]), self._on_device(optimizer)
        else:
            self._counters = self._backend.scalar_state(counters)
            self._scalar_state = self._backend.scalar_state(scalar_state)
        self._run_together, self._run_measured = self._together(), None

    def _on_device(self, optimizer: MethodOptimizer) -> ScalarState:
        """The step counts and scalar state of all parameters, which rows of ``_next_rows`` follow."""
        method = self._method()
        names = ("step", *method.scalar_state) if method.counts_steps else method.scalar_state
        tensors, rows, first = [], [], 0
        for batch in self._batches:
            tensors += [[optimizer.state_of(entry.param)[name] for name in names] for entry in batch.entries]
            rows += [first + row for row in batch.row_of]
            first += len(batch.rows)
        return self.decisions.scalar_state(tensors, rows)  # type: ignore[no-any-return]

    def _together(self, measures: bool = False) -> Callable[[Any, Decision | None], None]:
        # Autograd keeps a version counter for a DTensor, and one for its inner tensor.
        written = [*self.params, *self._wrappers]
        return self._backend.together(written, self._launches, self._counters, self._scalar_state, measures)

    def run(self, optimizer: MethodOptimizer, sample: Sample | None = None) -> None:
        values: Any = _NONE
        if self.counts_on_device:
            values = [row.next_state for batch in self._batches for row in batch.rows]
        elif self._has_scalar_state:
            values = self._next_values()
        if sample is None:
            self._run_together(values, self.decision)
        else:
            if self._run_measured is None:
                self._run_measured = self._together(measures=True)
            self._run_measured(values, self.decision)
        for batch in self._batches:
            for row in batch.rows:
                row.step += 1
        if sample is not None:
            self._add_to(sample, optimizer)

    def _add_to(self, sample: Sample, optimizer: MethodOptimizer) -> None:
        """Add what the launches have measured in this step."""
        for launch, params, entries, rows, row_of in self._batches:
            rule, groups = entries[0].rule, optimizer.param_groups
            corrections = np.array([correction(rule, groups[row.group], row.step) for row in rows])
            sample.add(params, launch.measured(), corrections[row_of])

    def _next_values(self) -> np.ndarray:
        """The scalar state after the step, in the order of its tensors."""
        return np.concatenate(
            [np.array([row.next_state for row in batch.rows])[batch.row_of].ravel() for batch in self._batches]
        )

    def is_valid(self, optimizer: MethodOptimizer) -> bool:
        state = optimizer.state
        if self.counts_on_device and isinstance(state, State) and state.is_private:
            return True  # asking a thousand tensors for their versions costs more than the rest of a step
        return self._counters.is_unchanged() and self._scalar_state.is_unchanged()

    def state_tensors(self) -> list[tuple[Tensor, str, Tensor]]:
        return self._state_tensors

    def cells(self) -> dict[Tensor, Cell]:
        return self._cells

    def written(self) -> np.ndarray:
        return np.concatenate([launch.written() for launch in self._launches])


class SingleUpdate(Update):
    """One parameter, updated eagerly and by itself.

    It may share memory with another, or be listed twice, so its state is read when it runs. With ``differentiable``,
    autograd sees every operation, on the scalars too.

    Args:
        entry: the parameter.
        differentiable: whether autograd shall see the step.
    """

    def __init__(self, entry: Entry, differentiable: bool) -> None:
        self._entry, self._differentiable = entry, differentiable
        self.params, self.share, self.decisions = [entry.local], entry.share, EAGER.decisions
        self._scale = 1.0
        has_sums = signature(entry.rule).summed is not None
        self.summed = [_summed([entry], self._sums, self._take_formed)] if has_sums else []
        self._formed: tuple[float, ...] = ()
        self._stream: Stream | None = None  # of its noise, if it needs any; from ``set_scalars`` on

    def sum_of_squares(self) -> float | Tensor:
        norm = clip.norm([self._grad], 2.0)
        norm = norm if self.decision is not None else float(norm)
        return norm * norm

    def may_count_on_device(self, optimizer: MethodOptimizer) -> bool:
        # The graph of a step that is left out would multiply its NaN by zero.
        group = optimizer.param_groups[self._entry.group]
        return not self._differentiable and self._entry.method().may_decide_on_device(group)

    def set_scalars(self, optimizer: MethodOptimizer, scale: float) -> None:
        self._scale, method = scale, self._entry.method()
        group, state = optimizer.param_groups[self._entry.group], optimizer.state_of(self._entry.param)
        takes = signature(self._entry.rule)
        checked_state(optimizer, self._entry.param, self._entry.local, self._entry.stored, group, state)
        place = self.device if self.counts_on_device else CPU
        scalar_state = scalar_tensors(method, method.scalar_state, self._entry.param, group, state, place)
        scalars, next_state = method.scalars_and_state(group, self._step_count(optimizer) + 1, scalar_state)
        for _, value in zip((*takes.given, *method.scalar_state), (*scalars, *next_state), strict=True):
            if not (self.counts_on_device and isinstance(value, Tensor)):
                float(number(value))  # raises for what cannot be used, before anything moves
        if self.summed:
            self._given = scalars
        if needs_noise(self._entry.formats):
            key_of(optimizer, self._step_count(optimizer) + 1)
            if self._stream is None:
                (self._stream,) = streams_of(optimizer, [self._entry.param])

    def make_state(self, optimizer: MethodOptimizer) -> None:
        """The state is made when the update runs: another update of the step may share it."""

    def _sums(self, optimizer: MethodOptimizer) -> Tensor:
        """Over what the parameter is before any of the step's updates has run."""
        entry, group = self._entry, optimizer.param_groups[self._entry.group]
        state = ensure_state(optimizer, entry.param, entry.rule, group)
        tensors = [local_of(state[name]) if entry.share else state[name] for name in entry.stored]
        given, scale = self.numbers(self._given), signed(self._scale, group)
        return eager.sums(entry.rule, entry.local, self._grad, tensors, given, scale, entry.formats)[None]

    def _take_formed(self, values: np.ndarray) -> None:
        self._formed = tuple(values[0].tolist())

    def run(self, optimizer: MethodOptimizer, sample: Sample | None = None) -> None:
        entry, method, differentiable = self._entry, self._entry.method(), self._differentiable
        group = optimizer.param_groups[entry.group]
        with torch.set_grad_enabled(differentiable):
            step = self._step_count(optimizer) + 1
            place = self.device if self.counts_on_device else CPU
            state = ensure_state(optimizer, entry.param, entry.rule, group, scalars_on=place)
            scalar_state = [state[name] for name in method.scalar_state]
            # As in the rule: what a graph has seen is not written to.
            seen = [value.clone() for value in scalar_state] if differentiable else scalar_state
            scalars, next_state = method.scalars_and_state(group, step, seen)
            if not differentiable:
                scalars, next_state = tuple(self.numbers(scalars)), tuple(self.numbers(next_state))
            tensors = [local_of(state[name]) if entry.share else state[name] for name in entry.stored]
            bits = None
            if self._stream is not None:
                bits = Noise(self._stream, key_of(optimizer, step))
            scale, decision = signed(self._scale, group), self.decision
            if differentiable and decision is not None:  # the next step writes the values that the graph has seen
                decision = decision._replace(values=decision.values.clone())
            if entry.share is not None:
                torch.autograd.graph.increment_version([entry.param])
            sums = eager.run(
                entry.rule,
                entry.local,
                self._grad,
                tensors,
                (*scalars, *self._formed),
                scale,
                differentiable,
                measures=sample is not None,
                decision=decision,
                formats=entry.formats,
                noise=bits,
            )
            for tensor, value in zip(scalar_state, next_state, strict=True):
                eager.write(tensor, eager.as_tensor(value, tensor).reshape(()), decision)
            if method.counts_steps:
                eager.write(state["step"], state["step"] + 1, decision)
        if sample is not None and sums is not None:
            sample.add([entry.param], sums[None], np.array([correction(entry.rule, group, step)]))

    @property
    def _grad(self) -> Tensor:
        assert self._entry.local.grad is not None
        return self._entry.local.grad

    def _step_count(self, optimizer: MethodOptimizer) -> Any:
        state, method = dict.get(optimizer.state, self._entry.param) or {}, self._entry.method()
        if self.counts_on_device and method.counts_steps and isinstance(state.get("step"), Tensor):
            return wide(state["step"]).to(self.device).reshape(())
        return step_count(method, self._entry.rule, state)


def _summed(
    entries: Sequence[Entry], sums: Callable[[MethodOptimizer], Any], take: Callable[[np.ndarray], None]
) -> Summed:
    """Parameters that have one rule, with sums."""
    first, params = entries[0], [entry.param for entry in entries]
    numels = np.array([_numel(param) for param in params])
    local_numel = sum(_numel(entry.local) for entry in entries)
    groups = np.array([entry.group for entry in entries])
    members: list[tuple[int, Any]] = [(index, np.flatnonzero(groups == index)) for index in np.unique(groups).tolist()]
    if len(members) == 1:
        members = [(members[0][0], slice(None))]
    return Summed(first.method, first.rule, params, first.share, members, numels, local_numel, sums, take)


def _numel(tensor: Tensor) -> int:
    """How many real numbers it has."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _sums_of(launch: Launch) -> Callable[[MethodOptimizer], np.ndarray | Tensor]:
    return lambda optimizer: launch.sums()


def _by_signature(entries: Sequence[Entry]) -> dict[Any, list[Entry]]:
    by_signature: defaultdict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_signature[entry.rule, entry.formats].append(entry)
    return by_signature


def _batch(optimizer: MethodOptimizer, backend: Backend, rule: Any, formats: Formats, entries: list[Entry]) -> _Batch:
    rows: dict[Any, _ScalarsRow] = {}
    keys = []
    method = entries[0].method()
    steps = step_counts(method, rule, [entry.state for entry in entries])
    for entry, step in zip(entries, steps, strict=True):
        group = optimizer.param_groups[entry.group]
        state = scalar_tensors(method, method.scalar_state, entry.param, group, entry.state)
        keys.append((entry.group, step, *((tensor.dtype, tensor.item()) for tensor in state)))
        rows.setdefault(keys[-1], _ScalarsRow(entry.group, step, state))
    index = {key: row for row, key in enumerate(rows)}
    row_of = np.array([index[key] for key in keys])
    params = [entry.local for entry in entries]
    given = len(signature(rule).given)
    if needs_noise(formats):
        streams = streams_of(optimizer, [entry.param for entry in entries])
        launch = backend.launch(rule, given, formats, params, row_of, streams)
    else:
        launch = backend.launch(rule, given, formats, params, row_of)
    return _Batch(launch, [entry.param for entry in entries], entries, list(rows.values()), row_of)
