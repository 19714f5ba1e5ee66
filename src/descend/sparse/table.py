"""``sparse="exact"``: rows that miss steps, and what brings them up to date before they are read.

A dense optimizer moves every row at every step: a row without a gradient coasts on its average and decays. Here such
a row is left alone and its last step noted. When it is next read, all steps it missed are caught up with in one pass,
in closed form (``schedule.py``, ``rules.coast``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from descend.backends import eager
from descend.backends.cpu import supports
from descend.backends.cpu.rows import StaleRows, mark
from descend.core.signature import signature
from descend.sparse.missed_steps import Schedule
from descend.state import lazy_memory
from descend.state.container import updatable_tensors

if TYPE_CHECKING:
    from descend.sparse.attach import Settling

# What a table adds to a parameter's state: the step each row is current at (int32; zero or negative while its averages
# are zero). In checkpoints also: learning rate and weight decay of the steps that rows may have missed, a row a step;
# beta1, beta2, eps, the step before the first of these and the last; and a checksum of the weights.
ROW_STEP, SCHEDULE, CONSTANTS, CHECKSUM = "row_step", "schedule", "schedule_constants", "weights_checksum"

NAMES = frozenset({ROW_STEP, SCHEDULE, CONSTANTS, CHECKSUM})

PIECE = 65_536  # rows brought up to date together when all of them are


def loaded(name: str, value: Tensor, param: Tensor) -> Tensor | None:
    """What a checkpoint has under ``name``, copied; None if tables have no such thing.

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

    Args:
        param: the parameter; its first dimension counts rows.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.lock = threading.RLock()
        self.is_attached = False
        self._rule: Any = None  # of the last step
        self._schedule: Schedule | None = None
        self._stale: tuple[Any, StaleRows] | None = None

    # What a step asks.

    def check(self, optimizer: Settling, group: int, grad: Tensor) -> None:
        """Raise if the coming step is not one that rows could miss."""
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
        optimizer.check_exact(optimizer.param_groups[group])
        found = optimizer.state_of(self.param)
        schedule = self._schedule_of(optimizer, found)
        if schedule is not None and not _counts(found["step"], schedule.steps):
            raise RuntimeError(
                f"{name}: the step count of {which} is {found['step']:g}, but {schedule.steps} steps are on "
                "record. With sparse='exact' it cannot be edited; nothing has moved."
            )

    def expected_steps(self, optimizer: Settling) -> tuple[Tensor | None, int]:
        """The step each row is current at, and the one that rows with a gradient must be; None if all are."""
        found = optimizer.state_of(self.param)
        schedule = self._schedule_of(optimizer, found)
        if schedule is None or schedule.start == schedule.steps:
            return None, 0
        return found[ROW_STEP], schedule.steps

    @updatable_tensors()
    def ensure_state(self, optimizer: Settling, found: MutableMapping[str, Any]) -> None:
        """Make what a table adds to the state. Where there is state already, a dense optimizer's, it is current."""
        if isinstance(found.get(ROW_STEP), Tensor):
            return
        rows, taken = self.param.shape[0], int(found["step"])
        is_on_cpu = self.param.device.type == "cpu"
        steps = lazy_memory.zeros((rows,), torch.int32) if is_on_cpu else self.param.new_zeros(rows, dtype=torch.int32)
        for first in range(0, rows if taken else 0, PIECE):
            piece = slice(first, first + PIECE)
            used = [
                found[name][piece].view(-1, math.prod(self.param.shape[1:])).any(1)
                for name in self._state_names(optimizer)
            ]
            steps[piece] = torch.stack(used).any(0) * taken
        found[ROW_STEP] = steps

    def begin_step(self, optimizer: Settling, group: int) -> None:
        """Start a schedule if there is none, or if betas or eps have changed: all rows are settled first then."""
        options = optimizer.param_groups[group]
        constants = float(options["betas"][0]), float(options["betas"][1]), float(options["eps"])
        found = optimizer.state_of(self.param)
        schedule = self._schedule_of(optimizer, found)
        self._rule = optimizer.rule_for(options)
        if schedule is None or (schedule.beta1, schedule.beta2, schedule.eps) != constants:
            self.settle(optimizer)
            self._schedule = Schedule(*constants, int(found["step"]))

    def end_step(self, optimizer: Settling, group: int, rows: np.ndarray) -> None:
        """Note which rows have been touched, and what the others have missed."""
        options = optimizer.param_groups[group]
        assert self._schedule is not None
        self._schedule.append(float(options["lr"]), float(options["weight_decay"]))
        steps = optimizer.state_of(self.param)[ROW_STEP]
        if steps.device.type == "cpu":
            mark(rows, steps, self._schedule.steps, have_state=True)
        else:
            steps[torch.from_numpy(rows).to(steps.device)] = self._schedule.steps

    # Reading.

    def settle(self, optimizer: Settling, indices: Tensor | None = None) -> None:
        """Bring rows up to date: those that ``indices`` names, or all.

        Indices out of range are left to whoever reads the rows.
        """
        with self.lock:
            schedule = self._schedule_of(optimizer, optimizer.state_of(self.param))
            if schedule is None or schedule.start == schedule.steps:
                return
            if indices is None:
                self._settle_all(optimizer, schedule)
            else:
                self._settle_some(optimizer, schedule, indices)

    def _settle_all(self, optimizer: Settling, schedule: Schedule, moves: bool = True) -> None:
        rows = self.param.shape[0]
        for first in range(0, rows, PIECE):
            self._settle_some(optimizer, schedule, range(first, min(first + PIECE, rows)), moves)
        self._schedule = Schedule(schedule.beta1, schedule.beta2, schedule.eps, start=schedule.steps)

    def _settle_some(self, optimizer: Settling, schedule: Schedule, which: Tensor | range, moves: bool = True) -> None:
        """``moves``: whether the parameter is behind too, and not its averages alone."""
        found = optimizer.state_of(self.param)
        state = [(name, found[name]) for name in self._state_names(optimizer)]
        is_native = optimizer.requested_backend() != "eager" and supports.why_not_rows(self.param, state) is None
        settle = self._settle_native if is_native else self._settle_eagerly
        settle(optimizer, schedule, found[ROW_STEP], [tensor for _, tensor in state], which, moves)

    def _state_names(self, optimizer: Settling) -> tuple[str, ...]:
        return signature(self._rule or optimizer.rule_for(optimizer.group_of(self.param))).state

    def _settle_native(
        self,
        optimizer: Settling,
        schedule: Schedule,
        steps: Tensor,
        state: list[Tensor],
        which: Tensor | range,
        moves: bool,
    ) -> None:
        dtypes = (self.param.dtype, *(tensor.dtype for tensor in state))
        if self._stale is None or self._stale[0] != dtypes:
            assert optimizer.coasting is not None
            coast, decay = optimizer.coasting
            self._stale = dtypes, StaleRows(coast, decay, len(signature(coast).numbers), dtypes)
        stale = self._stale[1]
        length = math.prod(self.param.shape[1:])
        if isinstance(which, Tensor):
            which = which.reshape(1, -1).long().contiguous()
        since = stale.find(which, (self.param.shape[0],), length, steps, schedule.steps, schedule.start)
        if since is None or not len(since):
            return
        numbers = _missed(schedule, since, moves) if stale.has_used else None
        factors = schedule.shrinkage(since) if moves and stale.has_unused else np.ones(1)
        decays = bool((factors != 1).any())
        if numbers is not None or decays or isinstance(which, Tensor):
            # Where a range has none of these, the schedule begins anew: a note would only cost memory.
            mark(stale.rows, steps, schedule.steps, have_state=False)  # while these are still in the caches
        if numbers is not None:
            stale.coast(self.param, state, numbers)
        if decays:
            stale.decay(self.param, factors)

    def _settle_eagerly(
        self,
        optimizer: Settling,
        schedule: Schedule,
        steps: Tensor,
        state: list[Tensor],
        which: Tensor | range,
        moves: bool,
    ) -> None:
        device = steps.device
        if isinstance(which, range):
            rows = torch.arange(which.start, which.stop, device=device)
        else:
            rows = torch.unique(which.reshape(-1).long()).to(device)
            if len(rows) and (rows[0] < 0 or rows[-1] >= len(steps)):
                return
        since = steps[rows].abs().clamp(min=schedule.start)
        rows, since = rows[since < schedule.steps], since[since < schedule.steps]
        if not len(rows):
            return
        steps_missed, where = torch.unique(since.long(), return_inverse=True)
        distinct = steps_missed.cpu().numpy()
        used = steps[rows] > 0
        assert optimizer.coasting is not None
        coast, decay = optimizer.coasting
        with torch.no_grad():
            for numbers in _missed(schedule, distinct, moves):
                table = torch.from_numpy(numbers).to(device)[where[used]]
                eager.run_rows(coast, self.param, (rows[used],), None, state, list(table.unbind(1)))
            if moves:
                factors = torch.from_numpy(schedule.shrinkage(distinct)).to(device)[where[~used]]
                eager.run_rows(decay, self.param, (rows[~used],), None, [], [factors])
            steps[rows] = torch.where(used, schedule.steps, -schedule.steps).int()

    # Checkpoints.

    def _schedule_of(self, optimizer: Settling, found: MutableMapping[str, Any]) -> Schedule | None:
        """The schedule; taken from the state after loading, None before the first step."""
        if "step" not in found:
            self._schedule = None  # somebody has cleared the state
        elif self._schedule is None and isinstance(found.get(SCHEDULE), Tensor):
            history = found[SCHEDULE].numpy()
            beta1, beta2, eps, start, steps = found[CONSTANTS].tolist()
            if not _counts(found["step"], steps):  # a dense optimizer has gone on from there: all rows are current
                for name in (ROW_STEP, SCHEDULE, CONSTANTS):
                    found.pop(name, None)
                self.ensure_state(optimizer, found)
                return None
            self._schedule = Schedule.restored(beta1, beta2, eps, int(start), history)
            if len(history) and found.get(CHECKSUM) != self._checksum():
                # The weights are not those of the state. Those saved after it have been brought up to date.
                self._settle_all(optimizer, self._schedule, moves=False)
        return self._schedule

    def write_schedule(self, found: MutableMapping[str, Any]) -> None:
        """Put into the state what only checkpoints need."""
        schedule = self._schedule
        if schedule is not None:
            constants = (schedule.beta1, schedule.beta2, schedule.eps, schedule.start, schedule.steps)
            found[SCHEDULE] = torch.from_numpy(schedule.history())
            found[CONSTANTS] = torch.tensor(constants, dtype=torch.float64, device="cpu")
            found.pop(CHECKSUM, None)
            if schedule.start < schedule.steps:
                found[CHECKSUM] = self._checksum()

    def _checksum(self) -> Tensor:
        """Of the bits of all weights: the sum, modulo 2^64, of what they are as integers."""
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[min(self.param.itemsize, 8)]
        pieces = torch.split(self.param.detach(), PIECE)
        return torch.stack([piece.contiguous().view(integer).sum() for piece in pieces]).sum().cpu()

    def refuse_if_behind(self, optimizer: Settling) -> None:
        """Raise if rows may be behind: a copy that nobody can bring up to date would be wrong."""
        schedule = self._schedule_of(optimizer, optimizer.state_of(self.param))
        if schedule is not None and schedule.start < schedule.steps:
            raise RuntimeError(
                f"{type(optimizer).__name__}: rows of {optimizer.name_of(self.param)} are behind, so its module cannot "
                "be pickled. Call optimizer.settle() first, or save model.state_dict(), which does."
            )

    def forget_schedule(self) -> None:
        """Take it from the state when it is next needed: another state has been loaded."""
        self._schedule = None


def _counts(step: Any, steps: float) -> bool:
    """Whether a step count stands for ``steps``: in float32 it stands still at 2^24."""
    return float(step) == steps or (getattr(step, "dtype", None) == torch.float32 and steps >= float(step) >= 2**24)


def _missed(schedule: Schedule, since: np.ndarray, moves: bool) -> np.ndarray:
    """The numbers of ``rules.coast``; those that do not move the parameter if it is current."""
    numbers = schedule.missed(since)
    if not moves:
        shrink, pace1, pace2 = 0, 1, 3
        numbers[..., shrink], numbers[..., pace1], numbers[..., pace2] = 1.0, 0.0, 0.0
    return numbers
