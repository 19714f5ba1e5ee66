"""Watches an optimizer: norms, update-to-weight ratios and more, measured in the pass that steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from descend.core.measures import Observer, Sample
from descend.core.optimizer import MethodOptimizer
from descend.diagnostics.monitoring import alerts, callbacks, ranks
from descend.diagnostics.monitoring import report as page
from descend.diagnostics.monitoring.alerts import KINDS, Alert, On, Watch
from descend.diagnostics.monitoring.dead_rows import DeadRows, dead_rows
from descend.diagnostics.monitoring.records import Clipping, Names, Record
from descend.diagnostics.monitoring.writers import writer


class Monitor(Observer):
    """Measures every so many steps of an optimizer, inside the pass that steps; warns of what goes wrong.

    On a sampled step a loop around the compiled kernel also sums up norms and counts. Other steps run as always.
    Parameters and state stay bit for bit what they would be without a monitor. That loop is loaded, or compiled, when
    the monitor is made. Measured of each parameter, each layer (the name up to its last dot), each group, and all:

    - ``grad_norm``: of the gradient, without a loss scale, before clipping; ``update_norm``: of the new parameter minus
      the old one, as they are stored; ``weight_norm``: of the old one; ``update_ratio``: update by weight norm.
    - ``signal_to_noise``: the mean of |exp_avg| / sqrt(exp_avg_sq), without their bias, over elements where exp_avg_sq
      is positive. For Adam, AdamW, NAdam, RAdam.
    - ``lost_updates``: of the elements whose gradient is not zero, the share whose stored value stays the same: updates
      too small for the parameter's digits. In bfloat16 that happens below 1/512 of a weight. A learning rate of 0 loses
      nothing; the pauses that ``Rprop`` makes count as lost.
    - ``nonfinite_grads``, ``nonfinite_weights``: NaN and Inf in the gradient, and in the parameter after the step.
    - ``rows_named``: rows that a sparse gradient names. Its other numbers are those of the rows that were updated.
    - With ``max_norm``: ``clipped``, the share of the steps since the last sample whose norm was above it, and
      ``clip_coefficient`` of this step. ``skipped_steps``: left out by ``nonfinite="skip"`` or, with ``amp="fused"``,
      for a loss scale that overflowed; a ``GradScaler`` that skips by itself calls no ``step``.

    Of sharded parameters each rank measures its own part, see ``read``.

    Args:
        optimizer: of this library, not ``LBFGS`` or ``Newton``. It can have one monitor.
        every: steps between samples, >= 1. Default: 100.
        names: a module, or ``(name, parameter)`` pairs, for an optimizer that was made without names.
        to: where each sample is written: a path for JSON lines, a dictionary, TensorBoard's ``SummaryWriter``, a run of
            Weights & Biases or trackio, a Lightning logger, or a function ``(metrics, step)``; or a list of these.
            Default: nowhere.
        on: what is warned of: ``"spike"``, ``"dead"`` and ``"nonfinite"``; one of them, several, or a dictionary that
            says for each what to do: ``"warn"``, ``"raise"`` or a function of the ``Alert``. A spike: a gradient norm,
            or update norm divided by the learning rate, above 5 times its median over the last 20 samples and above
            twice all of them, or above 50 times the median; not in the first 10 samples. Dead: a gradient of zero in 5
            samples in a row. Default: warnings of all three.
        detail: what is written beside the totals: of each of the ``"layers"`` or of all ``"params"``.
            Default: ``"layers"``.
        keep: samples in ``history``, about 80 bytes for each parameter tensor. Default: 1000.
        step: steps taken before, for a run that continues. Default: 0.
    Attributes:
        step: steps taken so far.
        skipped: steps left out so far.
        alerts: all alerts so far.
    Raises:
        TypeError: if the optimizer is of another kind, or ``to`` is nothing that can be written to.
        ValueError: if an argument is out of range.
        RuntimeError: if the optimizer has a monitor already.
    Example:
        >>> import torch
        >>> from descend import SGD, Monitor
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = SGD(model, lr=0.5)
        >>> monitor = Monitor(optimizer, every=1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> monitor.read()["params"]["weight"]["grad_norm"]
        5.0
    """

    def __init__(
        self,
        optimizer: Any,
        every: int = 100,
        names: nn.Module | Iterable[tuple[str, Tensor]] | None = None,
        to: Any = None,
        on: On = KINDS,
        detail: Literal["layers", "params"] = "layers",
        keep: int = 1000,
        step: int = 0,
    ) -> None:
        if not isinstance(optimizer, MethodOptimizer):
            kind = type(optimizer)
            raise TypeError(
                "Monitor takes an optimizer of descend that updates each parameter by itself (SGD, Adam, AdamW, "
                f"SparseAdam, classes of from_rule), got {kind.__module__}.{kind.__name__}."
            )
        for name, value, least in (("every", every, 1), ("keep", keep, 1), ("step", step, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Monitor: {name} must be an integer >= {least}, got {value!r}.")
        if detail not in ("layers", "params"):
            raise ValueError(f"Monitor: detail must be 'layers' or 'params', got {detail!r}.")
        if optimizer.observer is not None:
            raise RuntimeError(f"Monitor: this {type(optimizer).__name__} has a monitor already; close() it first.")
        self.optimizer, self.every, self.step, self._detail = optimizer, every, step, detail
        self.skipped = 0
        self.alerts: list[Alert] = []
        self._actions = alerts.actions(on)
        self._writers = [writer(each) for each in (to if isinstance(to, list | tuple) else [to]) if each is not None]
        pairs = names.named_parameters() if isinstance(names, nn.Module) else names or ()
        self._given = {param: name for name, param in pairs}
        self._names = Names(optimizer.param_groups, self._given)
        self._watch = Watch()
        self._records: deque[Record] = deque(maxlen=keep)
        self._next = step - step % every + every
        self._waiting: list[tuple[Any, ...]] = []  # what ``Record`` takes
        self._sample: Sample | None = None
        self._begun = self._clipped = 0
        self._has_moved = self._is_left_out = self._was_bad = False
        self._bad: tuple[str, ...] = ()
        self._coefficient = 1.0
        self._groups: tuple[Names, list[float]] = self._names, []  # and learning rates, when the sampled step began
        optimizer.observe(self)

    @classmethod
    def lightning_callback(cls, **options: Any) -> Any:
        """A Lightning callback that monitors the optimizers of this library, from the start of training to its end.

        Args:
            options: those of ``Monitor``. Default of ``to``: the trainer's loggers. ``names`` and ``step`` are the
                module's and the trainer's.
        Returns:
            The callback; its list ``monitors`` is filled when training starts.
        Raises:
            ImportError: if Lightning is not installed.
        """
        return callbacks.lightning(cls, options)

    @classmethod
    def transformers_callback(cls, **options: Any) -> Any:
        """A callback for the Trainer of transformers, which monitors its optimizer during training.

        Args:
            options: those of ``Monitor``. Default of ``to``: the trainer's ``state.log_history``. ``names`` and
                ``step`` are the model's and the trainer's.
        Returns:
            The callback; its list ``monitors`` is filled when training begins.
        Raises:
            ImportError: if transformers is not installed.
        """
        return callbacks.transformers(cls, options)

    def close(self) -> None:
        """Measure no more. What was measured stays."""
        if self.optimizer.observer is self:
            self.optimizer.observe(None)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What was measured.

    def read(self, all_ranks: bool = False) -> dict[str, Any]:
        """The latest sample as plain numbers; on a device this waits for it.

        Args:
            all_ranks: of sharded parameters, the sums over all ranks, instead of this rank's part. All ranks must call
                it then. Default: False.
        Returns:
            ``{"step": ..., "grad_norm": ..., ..., "groups": {"0": {...}}, "layers": {name: {...}}, "params": {name:
            {...}}}``, with what is listed above for each; empty before the first sample. A parameter without a gradient
            in that step is left out.
        """
        self._collect()
        if not self._records:
            return {}
        record = self._records[-1]
        return (ranks.reduced(self.optimizer, record) if all_ranks else record).as_dict()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The last ``keep`` samples, each as in ``read``."""
        self._collect()
        return [record.as_dict() for record in self._records]

    def dead_rows(self) -> dict[str, DeadRows]:
        """Rows that no gradient has reached, of parameters with two or more dimensions: a pass over their state.

        A row is dead if its state is still what it started as: of an embedding, a token that no batch has named; of a
        weight matrix, a unit that has never had a gradient. The count goes back to when the state was made, not to the
        monitor's beginning. Optimizers whose state says nothing about it (SGD without momentum, ASGD) have no entry.

        Returns:
            By parameter, how many rows are dead, and of how many.
        """
        names = self._current_names()
        return dead_rows(self.optimizer, dict(zip(names.of_params, names.params, strict=True)))

    def report(self, path: str | Path, overwrite: bool = False, layers: Sequence[str] = ()) -> Path:
        """Draw the samples as a page that needs no network: a map of layers over time, curves, alerts.

        Args:
            path: the HTML file.
            overwrite: whether an existing file is replaced. Default: False.
            layers: those drawn as curves. Default: the eight whose update-to-weight ratio varies most.
        Returns:
            The path.
        Raises:
            UsageError: if there is nothing to draw, the file exists, a layer does not, or plotly is not installed.
        """
        self._collect()
        return page.report(
            Path(path),
            overwrite,
            type(self.optimizer).__name__,
            list(self._records),
            self.alerts,
            self.dead_rows(),
            layers,
        )

    # What the optimizer calls.

    def begin(self, scale: float, coefficient: float) -> Sample | None:
        self._has_moved = True
        self._begun += 1
        if coefficient < 1:
            self._clipped += 1
        if self.step + 1 < self._next:
            return None
        if self._sample is None:
            self._sample, self._coefficient = Sample(), 1.0
            # Inside backward a step may end when the next begins, which has a learning rate of its own.
            self._groups = self._current_names(), list(map(_rate, self.optimizer.param_groups))
        self._sample.scale, self._coefficient = scale, min(self._coefficient, coefficient)
        return self._sample

    def skip(self, names: Sequence[str]) -> None:
        self._is_left_out = True
        self._bad += tuple(names)

    def end_step(self) -> None:
        sample, self._sample, bad, self._bad = self._sample, None, self._bad, ()
        if self._has_moved:
            self.step += 1
        elif self._is_left_out:
            self.skipped += 1
        self._has_moved = self._is_left_out = False
        is_news, self._was_bad = bad and not self._was_bad, bool(bad)
        if sample is not None:
            self._take(sample)
        if is_news:
            self._alert([alerts.nonfinite(self.step, bad)])

    def _take(self, sample: Sample) -> None:
        """Put a sample on record; if it is on a device, it waits there until the next."""
        share = self._clipped / self._begun
        clipping = None if self.optimizer.max_norm is None else Clipping(share, self._coefficient)
        self._next, self._begun, self._clipped = self.step - self.step % self.every + self.every, 0, 0
        self._collect()
        names, rates = self._groups
        self._waiting.append((self.step, names, sample, rates, clipping, self.skipped))
        if all(isinstance(part.sums, np.ndarray) or part.sums.is_cpu for part in sample.parts):
            self._collect()

    def _collect(self) -> None:
        """Make records of the samples that wait, look at them, and write them."""
        while self._waiting:
            record = Record(*self._waiting.pop(0))
            self._records.append(record)
            if self._writers:
                metrics = record.flat(self._detail)
                for write in self._writers:
                    write(metrics, record.step)
            if self._actions:
                self._alert(self._watch.look(record))

    def _alert(self, found: Sequence[Alert]) -> None:
        wanted = [alert for alert in found if alert.kind in self._actions]
        self.alerts += wanted
        for alert in wanted:
            alerts.act(alert, self._actions[alert.kind])

    def _current_names(self) -> Names:
        if not self._names.fit(self.optimizer.param_groups):
            self._names = Names(self.optimizer.param_groups, self._given)
        return self._names


def _rate(group: Mapping[str, Any]) -> float:
    return float(group.get("lr", math.nan))
