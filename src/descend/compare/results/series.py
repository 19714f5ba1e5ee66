"""Runs gathered: a series is one optimizer, a setting one of its learning rates with all seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from descend.compare.records import WINDOW, Run, smooth
from descend.reporting.text import rate


def is_finite(value: float | None) -> bool:
    """Tell whether ``value`` is a number; results read from a file have None for NaN and Inf."""
    return value is not None and math.isfinite(value)


def losses(run: Run) -> list[float]:
    """Return the training losses until the run diverged, if it did."""
    end = run.diverged_at - 1 if run.diverged_at else len(run.losses)
    kept = list(run.losses[:end])
    return kept[: next((i for i, loss in enumerate(kept) if not is_finite(loss)), len(kept))]


def smooth_losses(run: Run) -> list[float]:
    """Return the smoothed training losses until the run diverged; the last is the table's number."""
    return smooth(losses(run), run.window)


def held_out_loss(run: Run) -> float | None:
    """Return the last loss on held-out data; None if there is none, or the run diverged."""
    last = run.test_losses[-1] if run.test_losses and run.status == "finished" else None
    return last if is_finite(last) else None


def held_out_metric(run: Run) -> float | None:
    """Return the last metric on held-out data; None if there is none, or the run diverged."""
    last = run.test_metrics[-1] if run.test_metrics and run.status == "finished" else None
    return last if is_finite(last) else None


def final_loss(run: Run) -> float | None:
    """Return the mean of the last training losses; None unless the run finished."""
    return run.final_loss if run.status == "finished" and is_finite(run.final_loss) else None


def step_seconds(run: Run) -> list[float]:
    """Return the duration of each step but the first, which makes the state."""
    return [after - before for before, after in zip(run.seconds, run.seconds[1:], strict=False)]


def state_bytes(run: Run) -> int | None:
    """Return the memory of the state, of the rank that has most of it; None if it is not known."""
    return max((count for count in run.state_bytes if count is not None), default=None)


def state_per_parameter(run: Run) -> float | None:
    """Return ``state_bytes`` for each number of the model's parameters; None if either is not known."""
    count = state_bytes(run)
    return None if count is None or not run.parameters else count / run.parameters


@dataclass(frozen=True)
class Setting:
    """One optimizer with one learning rate.

    Args:
        lr: the learning rate; None where there is none.
        runs: one a seed.
    """

    lr: float | None
    runs: Sequence[Run]

    def values(self, measure: Callable[[Run], float | None]) -> list[float]:
        """Return the measure of each run that has one."""
        return [value for value in map(measure, self.runs) if value is not None]

    def median(self, measure: Callable[[Run], float | None]) -> float | None:
        """Return the median over the seeds; None unless all runs have the measure."""
        values = self.values(measure)
        return median(values) if values and len(values) == len(self.runs) else None

    @property
    def diverged(self) -> list[Run]:
        return [run for run in self.runs if run.status == "diverged"]


@dataclass(frozen=True)
class Series:
    """One optimizer.

    Args:
        index: its place, which selects its style.
        label: its name.
        settings: by learning rate, ascending.
        tried: what ``--tune`` tried to choose the learning rate, ascending.
    """

    index: int
    label: str
    settings: Sequence[Setting]
    tried: Sequence[Setting] = ()

    @property
    def best(self) -> Setting:
        """The setting that stands for the optimizer: of those whose runs all finished, the one with the lowest held-out
        loss, or training loss if nothing was held out; the first if none finished."""

        def order(setting: Setting) -> float:
            measures = (setting.median(held_out_loss), setting.median(final_loss))
            return next((value for value in measures if value is not None), math.inf)

        return min(self.settings, key=order)

    @property
    def swept(self) -> Sequence[Setting]:
        """The settings that show what another learning rate does; empty if there was only one."""
        return next((settings for settings in (self.settings, self.tried) if len(settings) > 1), ())

    @property
    def timed(self) -> Setting:
        """The runs whose times count, of any learning rate: those that had the machine to themselves."""
        runs = [run for setting in self.settings for run in setting.runs if run.alone]
        return Setting(self.best.lr, runs)

    @property
    def group(self) -> str:
        """The name of its traces."""
        return f"series{self.index}"

    @property
    def name(self) -> str:
        """The label, and the learning rate unless it is part of the label or there is none."""
        lr = self.best.lr
        if lr is None or "lr=" in self.label:
            return self.label
        return f"{self.label}, lr {rate(lr)}" + (f", best of {len(self.settings)}" if len(self.settings) > 1 else "")


def window(series: Sequence[Series]) -> int:
    """Return the most steps that a final loss averages."""
    return max((min(run.window, len(run.losses)) for one in series for run in one.best.runs), default=WINDOW)


def gather(runs: Sequence[Run]) -> list[Series]:
    """Return the series, in the order of their first runs; one with nothing but tuning has none."""
    labels = dict.fromkeys(run.label for run in runs if not run.tuning)
    found = []
    for index, label in enumerate(labels):
        own = [run for run in runs if run.label == label]
        settings = _settings([run for run in own if not run.tuning])
        found.append(Series(index, label, settings, _settings([run for run in own if run.tuning])))
    return found


def _settings(runs: Sequence[Run]) -> list[Setting]:
    rates = sorted({run.lr for run in runs}, key=lambda lr: lr or 0.0)
    return [Setting(lr, sorted((run for run in runs if run.lr == lr), key=lambda run: run.seed)) for lr in rates]
