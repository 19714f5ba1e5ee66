"""``sparse="exact"``: rows that miss steps, and what brings them up to date before they are read.

A dense optimizer moves every row at every step: a row without a gradient coasts on its average and decays. Here such
a row is left alone and its last step noted. When it is next read, all steps it missed are caught up with in one pass,
in closed form (``missed_steps.py``, ``rules.coast``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from descend.backends import EAGER, available
from descend.backends.backend import CatchUp, Rows
from descend.core.interrupts import DeferredSignals
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.sparse.local_reads import LocalReads
from descend.sparse.missed_steps import Schedule
from descend.state import lazy_memory
from descend.state.container import updatable_tensors

# What a table adds to a parameter's state: the step each row is current at (int32; zero or negative while its averages
# are zero). In checkpoints also: learning rate and weight decay of the steps that rows may have missed, a row a step;
# beta1, beta2, eps, the step before the first of these and the last; and a checksum of the weights.
ROW_STEP, SCHEDULE, CONSTANTS, CHECKSUM = "row_step", "schedule", "schedule_constants", "weights_checksum"

NAMES = frozenset({ROW_STEP, SCHEDULE, CONSTANTS, CHECKSUM})

PIECE = 65_536  # rows brought up to date together when all of them are

# The version counter of each table after the last write by any of our optimizers.
_versions: Any = WeakIdKeyDictionary()


def loaded(name: str, value: Tensor, param: Tensor) -> Tensor | None:
    """A copy of the entry ``name`` of a checkpoint's state; None if it is not one that tables add.

    Raises:
        ValueError: if its shape does not fit the parameter.
    """
    rows = param.shape[0] if param.dim() else 1
    expected = {ROW_STEP: (rows,), SCHEDULE: (len(value) if value.dim() else 0, 2), CONSTANTS: (5,), CHECKSUM: ()}
    dtypes = {ROW_STEP: torch.int32, SCHEDULE: torch.float64, CONSTANTS: torch.float64, CHECKSUM: torch.int64}
    if name not in expected:
        return None
    if value.shape != expected[name]:
        raise ValueError(f"the loaded {name} has shape {tuple(value.shape)}, expected {expected[name]}.")
    if name == ROW_STEP and value.is_floating_point() and not torch.equal(value, value.round()):
        raise ValueError(f"the loaded {name} has fractions of steps.")
    if name == ROW_STEP and not param.is_cpu:
        return value.to(param.device, dtypes[name], copy=True)
    return lazy_memory.copied(value.cpu(), dtypes[name])


def check_loaded(state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if what ``loaded`` returned does not fit together."""
    if SCHEDULE in state or CONSTANTS in state:
        if not {ROW_STEP, SCHEDULE, CONSTANTS} <= set(state):
            raise ValueError(f"the loaded schedule is incomplete: it needs {ROW_STEP}, {SCHEDULE} and {CONSTANTS}.")
        beta1, beta2, eps, start, steps = state[CONSTANTS].tolist()
        if len(state[SCHEDULE]) != steps - start:
            raise ValueError(f"the loaded schedule has {len(state[SCHEDULE])} steps, expected {steps - start:g}.")
        is_possible = 0 <= beta1 < beta2 < 1 and 0 < eps < math.inf and start >= 0 and start.is_integer()
        if not is_possible or not state[SCHEDULE].isfinite().all():
            raise ValueError(
                f"the loaded schedule is none: it needs 0 <= beta1 < beta2 < 1, eps > 0, whole steps and finite "
                f"numbers, and has {state[CONSTANTS].tolist()}."
            )
    if isinstance(rows := state.get(ROW_STEP), Tensor) and len(rows):
        lowest, highest = (int(end) for end in torch.aminmax(rows))
        if max(-lowest, highest) > state.get("step", 0):
            raise ValueError(f"the loaded {ROW_STEP} has a row at step {max(-lowest, highest)}, which is to come.")


def is_behind(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's state has rows that may be behind."""
    return isinstance(state.get(SCHEDULE), Tensor) and len(state[SCHEDULE]) > 0


class Table:
    """One parameter whose rows may be behind.

    A step is put on record before it is taken, and rows, their marks and the step count move in one native call. So
    wherever an exception falls, ``_schedule_of`` can tell whether the last step on record was taken.

    Args:
        param: the parameter; its first dimension counts rows.
    Attributes:
        is_attached: whether rows are brought up to date before they are read.
        is_replicated: whether other ranks hold the same table, and read rows that this one does not.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.lock = threading.RLock()
        self.is_attached = self.is_replicated = False
        self._local_reads = LocalReads()
        self._rule: Any = None  # of the last step, as are the next
        self._catch_up_rules: Any = None
        self._schedule: Schedule | None = None
        self._is_stepping = False  # the last step on record may not have been taken
        self._catch_up: tuple[Any, CatchUp] | None = None

    def attach(self, replicated: bool | None) -> None:
        """Begin to trust that rows are brought up to date before they are read, from the weights as they are.

        Args:
            replicated: see ``is_replicated``; None to leave it as it is.
        """
        self.is_attached = True
        if replicated is not None:
            self.is_replicated = replicated
        self._local_reads.forget()
        self.note_version()

    # What a step asks.

    def check_whole(self, optimizer: MethodOptimizer, local: Tensor) -> None:
        """Raise ``RuntimeError`` if this rank updates only a part of the table."""
        if local is not self.param:
            raise RuntimeError(
                f"{type(optimizer).__name__}: sparse='exact' needs whole tables, but this rank updates only a part of "
                f"{optimizer.name_of(self.param)}. Use sparse='touched', or make an optimizer of plain tensors, one "
                "for the rows of each rank. Nothing has moved."
            )

    def check(self, optimizer: MethodOptimizer, group: int, grad: Tensor) -> None:
        """Raise unless the coming step is one that rows may miss."""
        name = type(optimizer).__name__
        which = optimizer.name_of(self.param)
        if not self.is_attached:
            raise RuntimeError(
                f"{name}: {which} gets sparse gradients with sparse='exact', so its rows must be brought up to date "
                "before they are read. Call optimizer.attach(model) once, before training; nothing has moved."
            )
        if grad.sparse_dim() != 1:
            raise RuntimeError(
                f"{name}: sparse='exact' takes gradients with one sparse dimension, that of {which} has "
                f"{grad.sparse_dim()}. Use sparse='touched'; nothing has moved."
            )
        options = optimizer.param_groups[group]
        optimizer.method_of(options).check_exact(options)
        state = optimizer.state_of(self.param)
        schedule = self._schedule_of(optimizer, state)
        if schedule is not None and not _is_count_of(schedule.steps, state["step"]):
            raise RuntimeError(
                f"{name}: the step count of {which} is {state['step']:g}, but {schedule.steps} steps are on "
                "record. With sparse='exact' it cannot be edited; nothing has moved."
            )
        self._check_version(optimizer, schedule)

    def expected_steps(self, optimizer: MethodOptimizer) -> tuple[Tensor | None, int]:
        """The step each row is current at, and the one that rows with a gradient must be; None if any may be behind."""
        if self.is_replicated:
            return None, 0  # another rank may have read it
        state = optimizer.state_of(self.param)
        schedule = self._schedule_of(optimizer, state)
        if schedule is None or not schedule.is_behind:
            return None, 0
        return state[ROW_STEP], schedule.steps

    @updatable_tensors()
    def ensure_state(self, optimizer: MethodOptimizer, state: MutableMapping[str, Any]) -> None:
        """Make what a table adds to the state. Where there is state already, a dense optimizer's, it is current."""
        if isinstance(state.get(ROW_STEP), Tensor):
            return
        rows, step = self.param.shape[0], int(state["step"])
        is_on_cpu = self.param.device.type == "cpu"
        steps = lazy_memory.zeros((rows,), torch.int32) if is_on_cpu else self.param.new_zeros(rows, dtype=torch.int32)
        for first in range(0, rows if step else 0, PIECE):
            piece = slice(first, first + PIECE)
            used = [
                state[name][piece].view(-1, math.prod(self.param.shape[1:])).any(1)
                for name in self._state_names(optimizer)
            ]
            steps[piece] = torch.stack(used).any(0) * step
        state[ROW_STEP] = steps

    def prepare(self, optimizer: MethodOptimizer) -> None:
        """Compile what ``begin_step`` may call to bring rows up to date."""
        if self.is_replicated:
            state = optimizer.state_of(self.param)
            self._catch_up_with(optimizer, [(name, state[name]) for name in self._state_names(optimizer)])

    def begin_step(self, optimizer: MethodOptimizer, group: int, gradient: Rows) -> tuple[Tensor, int]:
        """Put the coming step on record; return the step each row is current at, and the number of this step.

        On a replicated table, the rows with a gradient are brought up to date first: other ranks have read them. What
        only this rank has read goes back to where it is on the others. A new schedule begins if there is none, or if
        betas or eps have changed: all rows are settled first then.
        """
        options = optimizer.param_groups[group]
        constants = float(options["betas"][0]), float(options["betas"][1]), float(options["eps"])
        state = optimizer.state_of(self.param)
        schedule = self._schedule_of(optimizer, state)
        self._note_rules(optimizer, options)
        if self.is_replicated and schedule is not None and schedule.is_behind:
            rows = torch.from_numpy(gradient.rows)
            self._undo_reads(optimizer, rows)
            self._settle_some(optimizer, schedule, rows)
        if schedule is None or (schedule.beta1, schedule.beta2, schedule.eps) != constants:
            self.settle(optimizer)
            schedule = self._schedule = Schedule(*constants, int(state["step"]))
        self._is_stepping = True
        schedule.append(float(options["lr"]), float(options["weight_decay"]))
        return state[ROW_STEP], schedule.steps

    def end_step(self) -> None:
        """The step has been taken."""
        self._is_stepping = False
        self.note_version()

    def note_version(self) -> None:
        """Remember that all that was written to the parameter until now was written to current rows."""
        _versions[self.param] = self.param._version

    def _check_version(self, optimizer: MethodOptimizer, schedule: Schedule | None) -> None:
        """Raise if somebody has written to the parameter while rows were behind."""
        if schedule is None or not schedule.is_behind or self.param.is_inference():
            return
        if self.param._version != _versions.setdefault(self.param, self.param._version):
            name = optimizer.name_of(self.param)
            raise RuntimeError(
                f"{type(optimizer).__name__}: {name} has been written to while rows of it were behind, so the steps "
                "they missed cannot be made up for any more. Call optimizer.settle() before such writes, or make them "
                "in `with optimizer.settled():`. To go on from the weights as they are now, call "
                "optimizer.attach again."
            )

    # Reading.

    def settle(self, optimizer: MethodOptimizer) -> None:
        """Bring all rows up to date; those of a replicated table on all ranks, between the same two steps."""
        with self.lock, DeferredSignals():
            if (schedule := self._behind(optimizer)) is not None:
                self._undo_reads(optimizer)
                self._settle_all(optimizer, schedule)

    def read(self, optimizer: MethodOptimizer, indices: Tensor | None = None) -> None:
        """Bring rows up to date that are about to be read: those that ``indices`` names, or all.

        Indices out of range are left to whoever reads the rows.
        """
        with self.lock, DeferredSignals():
            if (schedule := self._behind(optimizer)) is None:
                return
            if indices is not None:
                self._settle_some(optimizer, schedule, indices, is_local=self.is_replicated)
            elif self.is_replicated:
                for piece in self._pieces():
                    self._settle_some(optimizer, schedule, piece, is_local=True)
            else:
                self._settle_all(optimizer, schedule)

    def _behind(self, optimizer: MethodOptimizer) -> Schedule | None:
        """The schedule, if rows may be behind it."""
        schedule = self._schedule_of(optimizer, optimizer.state_of(self.param))
        if schedule is None or not schedule.is_behind:
            return None
        self._check_version(optimizer, schedule)
        return schedule

    def _undo_reads(self, optimizer: MethodOptimizer, except_for: Tensor | None = None) -> None:
        """Take back what ``read`` has done on this rank alone since the last step."""
        state = optimizer.state_of(self.param)
        used = [state[name] for name in self._state_names(optimizer)]
        self._local_reads.undo(self.param, used, state[ROW_STEP], except_for)

    def _pieces(self) -> Iterator[range]:
        rows = self.param.shape[0]
        return (range(first, min(first + PIECE, rows)) for first in range(0, rows, PIECE))

    def _settle_all(self, optimizer: MethodOptimizer, schedule: Schedule, moves: bool = True) -> None:
        for piece in self._pieces():
            self._settle_some(optimizer, schedule, piece, moves)
        self._schedule = Schedule(schedule.beta1, schedule.beta2, schedule.eps, start=schedule.steps)

    def _settle_some(
        self,
        optimizer: MethodOptimizer,
        schedule: Schedule,
        which: Tensor | range,
        moves: bool = True,
        is_local: bool = False,
    ) -> None:
        """Bring the rows ``which`` up to date.

        Args:
            optimizer: the optimizer.
            schedule: the steps they may have missed.
            which: the rows.
            moves: whether the parameter is behind too, and not its averages alone. Default: True.
            is_local: whether to remember how to undo it. Default: False.
        """
        whole = optimizer.state_of(self.param)
        state = [(name, whole[name]) for name in self._state_names(optimizer)]
        catch_up = self._catch_up_with(optimizer, state)
        stale = catch_up.find(which, tuple(self.param.shape), whole[ROW_STEP], schedule.steps, schedule.start)
        if stale is None or not len(stale[0]):
            return
        since, has_state, has_none = stale
        scalars = _missed(schedule, since, moves) if has_state else None
        factors = schedule.shrinkage(since) if moves and has_none else None
        if factors is not None and not (factors != 1).any():
            factors = None
        # Where a range has neither, the schedule begins anew: a mark would only cost memory.
        marks = scalars is not None or factors is not None or isinstance(which, Tensor)
        if is_local and marks:
            self._local_reads.save(catch_up.rows, self.param, [tensor for _, tensor in state], whole[ROW_STEP])
        catch_up.run(self.param, [tensor for _, tensor in state], scalars, factors, marks)

    def _state_names(self, optimizer: MethodOptimizer) -> tuple[str, ...]:
        if self._rule is None:
            self._note_rules(optimizer, optimizer.group_of(self.param))
        return signature(self._rule).state

    def _note_rules(self, optimizer: MethodOptimizer, group: Mapping[str, Any]) -> None:
        """Remember the rules: a parameter that has left its group has rows that are behind."""
        method = optimizer.method_of(group)
        self._rule, self._catch_up_rules = method.rule_for(group), method.catch_up_rules

    def _catch_up_with(self, optimizer: MethodOptimizer, state: list[tuple[str, Tensor]]) -> CatchUp:
        """What brings rows up to date, on the backend that takes them."""
        dtypes = (self.param.dtype, *(tensor.dtype for _, tensor in state))
        if self._catch_up_rules is None:
            self._note_rules(optimizer, optimizer.group_of(self.param))
        with_state, without_state = self._catch_up_rules
        backends = available(optimizer.requested_backend())
        backend = next((b for b in backends if b.why_not_rows(with_state, self.param, state) is None), EAGER)
        if self._catch_up is None or self._catch_up[0] != (backend, dtypes):
            scalars = len(signature(with_state).scalars)
            catch_up = backend.catch_up(with_state, without_state, scalars, dtypes, self.param)
            catch_up.compile()
            self._catch_up = (backend, dtypes), catch_up
        return self._catch_up[1]

    # Checkpoints.

    def _schedule_of(self, optimizer: MethodOptimizer, state: MutableMapping[str, Any]) -> Schedule | None:
        """The schedule; read from the state after loading, None before the first step."""
        with self.lock:  # in another thread a step may be half-way
            if "step" not in state:
                self.forget_schedule()  # the state has been cleared
            elif self._schedule is None and isinstance(state.get(SCHEDULE), Tensor):
                history = state[SCHEDULE].numpy()
                beta1, beta2, eps, start, steps = state[CONSTANTS].tolist()
                if not _is_count_of(steps, state["step"]):  # a dense optimizer has gone on: all rows are current
                    for name in (ROW_STEP, SCHEDULE, CONSTANTS):
                        state.pop(name, None)
                    self.ensure_state(optimizer, state)
                    return None
                self._schedule = Schedule.restored(beta1, beta2, eps, int(start), history)
                if len(history) and state.get(CHECKSUM) != self._checksum():
                    # The weights are not those of the state. Those saved after it have been brought up to date.
                    self._settle_all(optimizer, self._schedule, moves=False)
                self.note_version()
            if self._is_stepping and self._schedule is not None:
                self._is_stepping = False
                if float(state["step"]) == self._schedule.steps - 1:
                    self._schedule.drop_last()
                self.note_version()
            return self._schedule

    def write_schedule(self, optimizer: MethodOptimizer) -> None:
        """Put into the state what only checkpoints need."""
        state = optimizer.state_of(self.param)
        if not state:
            return
        schedule = self._schedule_of(optimizer, state)
        if schedule is not None:
            constants = (schedule.beta1, schedule.beta2, schedule.eps, schedule.start, schedule.steps)
            state[SCHEDULE] = torch.from_numpy(schedule.history())
            state[CONSTANTS] = torch.tensor(constants, dtype=torch.float64, device="cpu")
            state.pop(CHECKSUM, None)
            if schedule.is_behind:
                state[CHECKSUM] = self._checksum()

    def _checksum(self) -> Tensor:
        """Of the bits of all weights: the sum, modulo 2^64, of what they are as integers."""
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[min(self.param.itemsize, 8)]
        pieces = torch.split(self.param.detach(), PIECE)
        return torch.stack([piece.contiguous().view(integer).sum() for piece in pieces]).sum().cpu()

    def is_settled(self, optimizer: MethodOptimizer) -> bool:
        """Whether steps have been taken, and all rows are up to date."""
        schedule = self._schedule_of(optimizer, optimizer.state_of(self.param))
        return schedule is not None and not schedule.is_behind

    def refuse_if_behind(self, optimizer: MethodOptimizer) -> None:
        """Raise if rows may be behind: a copy that nobody can bring up to date would be wrong."""
        schedule = self._schedule_of(optimizer, optimizer.state_of(self.param))
        if schedule is not None and schedule.is_behind:
            raise RuntimeError(
                f"{type(optimizer).__name__}: rows of {optimizer.name_of(self.param)} are behind, so its module cannot "
                "be pickled. Call optimizer.settle() first, or save model.state_dict(), which does."
            )

    def forget_schedule(self) -> None:
        """Another state has been loaded: read the schedule from there when it is next needed."""
        self._schedule = None
        self._is_stepping = False
        self._local_reads.forget()


def _is_count_of(steps: float, step: Any) -> bool:
    """Whether the step count ``step`` stands for ``steps``: in float32 it stops at 2^24."""
    return float(step) == steps or (getattr(step, "dtype", None) == torch.float32 and steps >= float(step) >= 2**24)


def _missed(schedule: Schedule, since: np.ndarray, moves: bool) -> np.ndarray:
    """The scalars of ``rules.coast``; those that do not move the parameter if it is current."""
    scalars = schedule.missed(since)
    if not moves:
        shrink, pace1, pace2 = 0, 1, 3
        scalars[..., shrink], scalars[..., pace1], scalars[..., pace2] = 1.0, 0.0, 0.0
    return scalars
