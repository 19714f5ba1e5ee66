"""Train the same model from the same seed on the same batches, once with each optimizer."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import descend
from descend.compare.problem import Problem
from descend.compare.ranks import Outcome
from descend.compare.specs import Spec, embeddings


class Step(NamedTuple):
    """Measurements of one step: the loss before it, in nats, and each rank's seconds inside the optimizer."""

    loss: float
    seconds: tuple[float, ...]


class Stopwatch:
    """Adds up the seconds between each ``start`` and the next ``stop``; both can be registered as module hooks."""

    def __init__(self) -> None:
        self.seconds = self.started = 0.0

    def start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started

    def reset(self) -> float:
        """Return the seconds so far and reset them to 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass
class Run:
    """The measurements of one optimizer.

    Args:
        spec: the optimizer.
        options: options of its first group, and those of the spec.
        helper: the second optimizer, for parameters that the first does not take; None if it takes all.
        prepare_seconds: time to build the optimizer, including compilation.
        state_bytes: memory of the optimizer's state, by rank; only this rank's if the run was interrupted, and None for
            a rank that was not heard of.
    """

    spec: Spec
    options: dict[str, Any]
    prepare_seconds: float
    steps: list[Step] = field(default_factory=list)
    total_seconds: float = 0.0
    state_bytes: Sequence[int | None] = ()
    test_loss: float | None = None
    test_accuracy: float | None = None
    helper: type[Optimizer] | None = None
    error: str | None = None
    is_complete: bool = False

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def final_loss(self) -> float | None:
        return self.steps[-1].loss if self.steps else None

    @property
    def best_loss(self) -> float | None:
        return min(filter(math.isfinite, self.losses), default=None)

    @property
    def first_step_seconds(self) -> Sequence[float]:
        """Each rank's time inside the optimizer in the first step, which creates the state and may compile."""
        return self.steps[0].seconds if self.steps else ()

    @property
    def optimizer_seconds(self) -> Sequence[float]:
        """Each rank's time inside the optimizer in all other steps; empty if there are none."""
        return [sum(seconds) for seconds in zip(*(step.seconds for step in self.steps[1:]), strict=True)]

    @property
    def diverged_at(self) -> int | None:
        """The first step, counted from 1, whose loss is NaN or infinite; None if there is none."""
        return next((i for i, loss in enumerate(self.losses, 1) if not math.isfinite(loss)), None)

    @property
    def status(self) -> str:
        if self.error:
            return "failed"
        if not self.is_complete:
            return "interrupted"
        has_diverged = self.diverged_at or not math.isfinite(self.test_loss or 0)
        return "diverged" if has_diverged else "finished"


def prepare(specs: Sequence[Spec], problem: Problem) -> list[Run]:
    """Build every optimizer once, so that it raises its errors and compiles before any training."""
    model = problem.way.wrap(copy.deepcopy(problem.model))
    runs = []
    for spec in specs:
        started = time.perf_counter()
        optimizer = spec.build(model.parameters(), problem.way.construct)
        seconds = time.perf_counter() - started
        group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        runs.append(Run(spec, options={**group, **spec.options}, prepare_seconds=seconds))
    return runs


def compete(problem: Problem, runs: Sequence[Run], on_step: Callable[[Run], None]) -> None:
    """Train with each optimizer in turn, and store the measurements in ``runs``.

    An exception from one optimizer ends only its own run, unless it comes on some ranks alone: these cannot go on
    together. Ctrl-C raises ``KeyboardInterrupt`` as usual. ``runs`` then hold the measurements so far.

    Args:
        problem: what the runs share.
        runs: one per optimizer, as returned by ``prepare``.
        on_step: called after each step.
    """
    # The first pass of a process sets up threads and kernels, and the first zero_grad imports torch's compiler.
    # Both happen here, so that no optimizer's time includes them.
    model = problem.way.wrap(copy.deepcopy(problem.model))
    batch = problem.data.sample(problem.batch_size, torch.Generator())
    problem.task.loss(model, problem.ranks.share(batch)).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters()).zero_grad()
    for run in runs:
        error = None
        try:
            _train(problem, run, on_step)
        except Exception as exception:  # the other optimizers are measured all the same
            error = " ".join(f"{type(exception).__name__}: {exception}".split())
        outcome = Outcome(len(run.steps), sum(filter(None, run.state_bytes)), error)
        ending = problem.ranks.end(run.spec.label, outcome)
        run.error, run.state_bytes = ending.error, ending.state_bytes
        if not ending.is_common:
            return


def _train(problem: Problem, run: Run, on_step: Callable[[Run], None]) -> None:
    model = copy.deepcopy(problem.model)
    generator = torch.Generator().manual_seed(problem.seed)
    run.spec.set_gradients(model)  # DistributedDataParallel looks at them
    model = problem.way.wrap(model)
    optimizers = run.spec.build_for(model, problem.way.construct)
    run.helper = type(optimizers[1]) if len(optimizers) > 1 else None
    watch = Stopwatch()
    for table in embeddings(model):  # settling rows before they are read counts as time in the optimizer
        table.register_forward_pre_hook(watch.start, prepend=True)
        table.register_forward_pre_hook(watch.stop)
    started = time.perf_counter()
    try:
        for _ in range(problem.steps):
            batch = problem.data.sample(problem.batch_size, generator)
            loss = problem.task.loss(model, problem.ranks.share(batch))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            watch.start()
            for optimizer in optimizers:
                optimizer.step()
            watch.stop()
            run.steps.append(Step(*problem.ranks.measure(loss.item(), watch.reset())))
            run.total_seconds = time.perf_counter() - started
            on_step(run)
    finally:
        # State only grows, so it is measured once, at the end. Reading the state of a descend optimizer marks it as
        # exposed, which makes the next steps slower.
        run.state_bytes = [sum(map(_state_bytes, optimizers))]
    for optimizer in optimizers:
        if isinstance(optimizer, descend.AdamWScheduleFree):
            optimizer.eval()
    run.test_loss, run.test_accuracy = problem.task.score(model, problem.data.test)
    run.is_complete = True


def _state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of this rank's memory behind all state tensors; shared storage counts once."""
    # ZeroRedundancyOptimizer keeps this rank's share in an optimizer of its own.
    states = getattr(optimizer, "optim", optimizer).state.values()
    tensors = (value for state in states for value in state.values() if isinstance(value, Tensor))
    # A DTensor has no memory of its own.
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in local)}
    return sum(storages.values())
