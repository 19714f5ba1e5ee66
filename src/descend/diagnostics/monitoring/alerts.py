"""What ``Monitor`` warns of: spikes, dead parameters, NaN and Inf."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from descend.core.measures import COLUMNS
from descend.diagnostics.monitoring.records import Names, Record

Kind: TypeAlias = Literal["spike", "dead", "nonfinite"]
KINDS: tuple[Kind, ...] = ("spike", "dead", "nonfinite")

WINDOW = 20  # samples that a spike is compared with
FEWEST = 10  # samples before the first spike: RAdam takes five steps before it divides by sqrt(exp_avg_sq)
FACTOR = 5.0  # a spike is above so many times the median,
LEAP = 2.0  # and above so many times the largest: norms of small batches have heavy tails, and Rprop's steps grow;
BLOWUP = 50.0  # or it is above so many times the median, however it got there
DEAD = 5  # samples in a row with a gradient of zero that make a parameter dead

_SHOWN = 3  # names in a message


class Alert(NamedTuple):
    """Something to look at.

    Attributes:
        kind: ``"spike"``, ``"dead"`` or ``"nonfinite"``.
        step: the step it was seen in.
        names: the parameters, the worst first.
        message: what was seen.
    """

    kind: Kind
    step: int
    names: tuple[str, ...]
    message: str


class MonitorWarning(UserWarning):
    """An alert of ``Monitor`` whose action is ``"warn"``."""


class MonitorError(RuntimeError):
    """An alert of ``Monitor`` whose action is ``"raise"``; the step has been taken."""


Action: TypeAlias = Callable[[Alert], object] | Literal["warn", "raise"]
On: TypeAlias = Kind | Iterable[Kind] | Mapping[Kind, Action]


def actions(on: On) -> dict[str, Action]:
    """What to do about each kind of alert.

    Raises:
        ValueError: for a kind or an action that does not exist.
    """
    kinds: Iterable[Any] = [on] if isinstance(on, str) else on
    chosen: dict[str, Any] = (
        {str(kind): on[kind] for kind in on} if isinstance(on, Mapping) else dict.fromkeys(kinds, "warn")
    )
    for kind, action in chosen.items():
        if kind not in KINDS:
            raise ValueError(f"Monitor: on must name alerts among {KINDS}, got {kind!r}.")
        if action not in ("warn", "raise") and not callable(action):
            raise ValueError(f"Monitor: on[{kind!r}] must be 'warn', 'raise' or a function, got {action!r}.")
    return chosen


def act(alert: Alert, action: Action) -> None:
    """Do what was asked for."""
    if action == "raise":
        raise MonitorError(alert.message)
    if action == "warn":
        warnings.warn(alert.message, MonitorWarning, stacklevel=2)
    else:
        action(alert)


class Watch:
    """Compares each sample with those before it.

    - **spike**: a parameter's gradient norm, or its update norm divided by the learning rate, is more than 5 times its
      median over the last 20 samples and more than twice the largest of them, or more than 50 times the median and
      larger than all; not before 10 samples. Divided by the learning rate, updates grow neither in warm-up nor at a
      restart of the schedule.
    - **dead**: a parameter has had a gradient of exactly zero in 5 samples in a row.
    - **nonfinite**: a gradient or a parameter has a NaN or Inf.

    Each is told of once, and again after it has passed.
    """

    def __init__(self) -> None:
        self._names: Names | None = None

    def look(self, record: Record) -> list[Alert]:
        """The alerts of a sample."""
        if record.names is not self._names:
            self._restart(record.names)
        return [*self._nonfinite(record), *self._spikes(record), *self._dead(record)]

    def _restart(self, names: Names) -> None:
        count = len(names.params)
        self._names = names
        self._norms = {name: _Window(count) for name in ("gradient norm", "update norm")}
        self._zeros = np.zeros(count, np.int64)  # samples in a row
        self._has_elements = np.array([param.numel() > 0 for param in names.params], bool)
        self._was_nonfinite = np.zeros(count, bool)

    def _nonfinite(self, record: Record) -> list[Alert]:
        bad = _column(record, "bad_grads") + _column(record, "bad_weights")
        new, self._was_nonfinite = (bad > 0) & ~self._was_nonfinite, bad > 0
        names = _names(record, new, bad)
        return [nonfinite(record.step, names)] if names else []

    def _spikes(self, record: Record) -> list[Alert]:
        rates = np.array(record.rates)[record.names.group]
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {
                "gradient norm": np.sqrt(_column(record, "grad_sq")),
                "update norm": np.sqrt(_column(record, "update_sq")) / np.where(np.isnan(rates), 1.0, rates),
            }
        found = {
            name: window.add(np.where(record.stepped, values[name], np.nan)) for name, window in self._norms.items()
        }
        times = np.max([*found.values()], axis=0)
        names = _names(record, times > 0, times)
        said = [f"its {name} is {high.max():.3g} times the median" for name, high in found.items() if (high > 0).any()]
        message = f"{_listed(names)}: at step {record.step} {' and '.join(said)}."
        return [Alert("spike", record.step, names, message)] if names else []

    def _dead(self, record: Record) -> list[Alert]:
        is_zero = _column(record, "moving") == 0
        self._zeros = np.where(record.stepped, np.where(is_zero, self._zeros + 1, 0), self._zeros)
        names = _names(record, (self._zeros == DEAD) & record.stepped & self._has_elements, self._zeros)
        message = f"{_listed(names)}: the gradient was zero in {DEAD} samples in a row, the last at step {record.step}."
        return [Alert("dead", record.step, names, message)] if names else []


class _Window:
    """The last values of one norm, a row a sample, a column a parameter."""

    def __init__(self, count: int) -> None:
        self._rows = np.full((WINDOW, count), np.nan)
        self._count = 0
        self._was_high = np.zeros(count, bool)

    def add(self, values: np.ndarray) -> np.ndarray:
        """Take values in; return how many times the median they are where a spike begins, elsewhere 0."""
        times, high = np.zeros(len(values)), np.zeros(len(values), bool)
        last = self._rows[(self._count - 1) % WINDOW]
        rows = self._rows[: min(self._count, WINDOW)]
        # The largest first: medians cost more, and are rarely needed.
        largest = rows.max(axis=0) if self._count >= FEWEST else np.full(len(values), np.inf)
        above = np.flatnonzero(values > largest)
        if len(above):
            median = np.median(rows[:, above], axis=0)
            leaps = (values[above] > FACTOR * median) & (values[above] > LEAP * largest[above])
            is_high = (median > 0) & (leaps | (values[above] > BLOWUP * median))
            above, median = above[is_high], median[is_high]
            high[above] = True
            times[above] = np.where(self._was_high[above], 0, values[above] / median)
        self._was_high = high
        # What is not known, NaN and Inf, would spoil the medians to come.
        self._rows[self._count % WINDOW] = np.where(np.isfinite(values), values, last)
        self._count += 1
        return times


def nonfinite(step: int, names: Sequence[str]) -> Alert:
    """The alert for NaN or Inf in these parameters or their gradients."""
    return Alert("nonfinite", step, tuple(names), f"{_listed(names)}: NaN or Inf at step {step}.")


def _column(record: Record, name: str) -> np.ndarray:
    values: np.ndarray = record.sums[:, COLUMNS.index(name)]
    return values


def _names(record: Record, which: np.ndarray, badness: np.ndarray) -> tuple[str, ...]:
    """Names of the parameters in ``which``, the worst first."""
    found = np.flatnonzero(which)
    return tuple(record.names.of_params[i] for i in found[np.argsort(-badness[found], kind="stable")])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
