"""What a comparison measures, as plain data: the lines of ``results.jsonl``.

The first line is a ``Comparison``, each further line a ``Run``. NaN and Inf, which JSON does not have, are null. A run
is written once, when it has ended; a line that a crash has cut off is ignored when the file is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HOPELESS = 10.0  # times the first loss: above this, a run has diverged unless it comes back
WINDOW = 20  # steps that a final loss, and each point of a curve, averages, where each step has a batch of its own


@dataclass(frozen=True)
class Comparison:
    """What all runs share.

    Args:
        task: name of the task.
        summary: the task in one line.
        loss_name: what the loss is, with its unit: "cross-entropy in nats".
        metric_name: what else is measured on held-out data, "accuracy" or "relative error"; None for nothing.
        metric_is_error: whether less of it is better.
        settings: the request, defaults filled in; runs of equal settings can be resumed.
        versions: of descend, torch and Python.
        machine: processor, cores, threads.
        started: date and time, ISO 8601.
        tuned: how learning rates were chosen, in words; None if they were given or are the task's.
    """

    task: str
    summary: str
    loss_name: str
    metric_name: str | None
    metric_is_error: bool
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    started: str
    tuned: str | None = None


@dataclass
class Run:
    """One optimizer with one learning rate and one seed.

    Args:
        label: the optimizer's name in tables and legends; runs that differ in ``lr`` (of a sweep) or ``seed`` alone
            share it.
        spec: what the user wrote.
        optimizer: the full name of its class, or ``minimize``'s method.
        options: its options, defaults filled in.
        lr: its learning rate; None where it has none.
        seed: of weights, batches and held-out part.
        status: "finished", "diverged", "failed" or "interrupted".
        error: why it failed.
        diverged_at: the first step, from 1, whose loss is NaN or Inf, or from which on it stays above ten times the
            first.
        stopped: why it ended before the last step, in words.
        losses: training loss before each step, of its batch.
        seconds: time since the start of the run, at the end of each step.
        evaluations: gradients evaluated until the end of each step: 1, 2, 3, ... without a line search.
        parts: median seconds a step, the first excluded: "data", "forward", "backward", "norm", "optimizer"; a part
            that does not exist, or cannot be told apart, is absent.
        prepare_seconds: time to build the optimizer and compile its kernels.
        first_step_seconds: time inside the optimizer in the first step, which makes the state.
        test_steps: steps after which held-out data were evaluated; the last is the last step.
        test_losses: loss on held-out data then.
        test_metrics: the metric on held-out data then.
        state_bytes: memory of the optimizer's state, by rank; None where it is not known: of a solver, which keeps its
            own, of a run that failed in its first step, and of a rank that was not heard of.
        parameters: numbers in all parameters of the model, on all ranks together; None of a run that did not begin.
        ranks: by rank, "first_step_seconds", "optimizer_seconds" (the median of the other steps) and "state_bytes";
            None for what is not known.
        helper: full name of a second optimizer for parameters that the first does not take.
        tuning: whether the run helped to choose a learning rate; it has a seed of its own and is not reported.
        window: steps that ``final_loss`` averages: ``WINDOW``, or 1 if each step uses all data.
        alone: whether no other run went on at the same time; times of runs that shared the machine are not compared.
    """

    label: str
    spec: str
    optimizer: str
    options: Mapping[str, Any]
    lr: float | None
    seed: int
    status: str = "interrupted"
    error: str | None = None
    diverged_at: int | None = None
    stopped: str | None = None
    losses: Sequence[float] = field(default_factory=list)
    seconds: Sequence[float] = field(default_factory=list)
    evaluations: Sequence[int] = field(default_factory=list)
    parts: Mapping[str, float] = field(default_factory=dict)
    prepare_seconds: float = 0.0
    first_step_seconds: float | None = None
    test_steps: Sequence[int] = field(default_factory=list)
    test_losses: Sequence[float] = field(default_factory=list)
    test_metrics: Sequence[float] = field(default_factory=list)
    state_bytes: Sequence[int | None] = ()
    parameters: int | None = None
    ranks: Sequence[Mapping[str, float | None]] = ()
    helper: str | None = None
    tuning: bool = False
    window: int = WINDOW
    alone: bool = True

    @property
    def peak(self) -> tuple[int, float] | None:
        """The step, from 1, and the value of the largest loss, if the run finished although it blew up there."""
        if self.status != "finished" or not self.losses:
            return None
        largest = max(self.losses)
        is_high = self.losses[0] > 0 and largest > HOPELESS * self.losses[0]
        return (self.losses.index(largest) + 1, largest) if is_high else None

    @property
    def final_loss(self) -> float | None:
        """The mean training loss of the last ``window`` steps; None if the run diverged or has no steps."""
        last = self.losses[-self.window :]
        return sum(last) / len(last) if last and self.status != "diverged" else None


def smooth(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of the last ``window`` losses at each step, so that a curve ends at ``final_loss``."""
    return [sum(losses[max(0, i - window) : i]) / min(i, window) for i in range(1, len(losses) + 1)]
