"""One run: train a copy of the task's model with one optimizer, and measure it."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

from descend.compare.contestant import Contestant, full_name
from descend.compare.problem import Problem
from descend.compare.ranks import Outcome
from descend.compare.records import HOPELESS, WINDOW, Run
from descend.compare.trainer import Trainer
from descend.reporting.memory import memory

WARM_STEPS = 3  # a table that settles rows compiles one kernel a step
WARM_SECONDS = 2.0
TESTS = 10  # evaluations on held-out data in a run
APART = 5  # steps between them, at least


def prepare(spec: Contestant, problem: Problem) -> float:
    """Build the optimizer once, so that it raises its errors and compiles; return the seconds that it took.

    Raises:
        UsageError: if it rejects the model's parameters or its options.
    """
    model = copy.deepcopy(problem.model)
    started = time.perf_counter()
    spec.trainer(model, problem)
    return time.perf_counter() - started


def train(problem: Problem, spec: Contestant, run: Run, on_step: Callable[[Run], None]) -> bool:
    """Train with one optimizer, and store the measurements in ``run``.

    An exception ends the run and is stored in it. Ctrl-C raises as usual; ``run`` then has the measurements so far.

    Args:
        problem: the task.
        spec: the optimizer.
        run: what is measured; new.
        on_step: called after each step, outside of the times.
    Returns:
        Whether the run ended alike on all ranks; if not, these cannot go on together.
    """
    error, parts = None, list[Mapping[str, float]]()
    try:
        _warm_up(problem, spec)
        gc.collect()  # its copy of the model and the state
        _train(problem, spec, run, parts, on_step)
    except Exception as exception:  # the other optimizers are measured all the same
        error = " ".join(f"{type(exception).__name__}: {exception}".split())
    times = (run.first_step_seconds, run.parts.get("optimizer"))
    own = Outcome(len(run.losses), next(iter(run.state_bytes), None), error, *times)
    ending = problem.ranks.end(f"{run.label} {run.lr} {run.seed} {run.tuning}", own)
    run.error, run.state_bytes = ending.error, ending.state_bytes
    run.ranks = [
        {
            "first_step_seconds": outcome and outcome.first_step_seconds,
            "optimizer_seconds": outcome and outcome.optimizer_seconds,
            "state_bytes": outcome and outcome.state_bytes,
        }
        for outcome in ending.outcomes
    ]
    if run.error:
        run.status = "failed"
    elif ending.is_common:
        run.diverged_at = run.diverged_at or diverged_at(run.losses)
        run.status = "diverged" if run.diverged_at else "finished"
    return ending.is_common


def _warm_up(problem: Problem, spec: Contestant) -> None:
    """Train a throw-away copy for a moment, so that each run finds threads, kernels and allocator as warm as the next.

    The first steps of a process start threads, choose kernels, import torch's compiler, and grow the heap.
    """
    trainer = spec.trainer(copy.deepcopy(problem.model), problem)
    generator = torch.Generator().manual_seed(problem.seed)
    started = time.perf_counter()
    for i in range(WARM_STEPS):
        trainer.step(problem.ranks.share(problem.data.sample(problem.batch_size, generator)))
        is_over = problem.ranks.world == 1 and time.perf_counter() - started > WARM_SECONDS
        if trainer.stopped or is_over or i + 1 == problem.steps:
            return


def _train(
    problem: Problem, spec: Contestant, run: Run, parts: list[Mapping[str, float]], on_step: Callable[[Run], None]
) -> None:
    model = copy.deepcopy(problem.model)
    trainer = spec.trainer(model, problem)
    run.options = {**_options(trainer), **spec.options}
    run.parameters = sum(param.numel() for param in model.parameters())
    run.helper = full_name(type(trainer.optimizers[1])) if len(trainer.optimizers) > 1 else None
    torch.manual_seed(problem.seed)  # a model may draw from it: dropout
    generator = torch.Generator().manual_seed(problem.seed)
    tests = [problem.steps] if run.tuning else test_steps(problem.steps)
    losses, seconds, evaluations = list[float](), list[float](), list[int]()
    run.losses, run.seconds, run.evaluations = losses, seconds, evaluations
    elapsed, count = 0.0, 0
    try:
        for i in range(1, problem.steps + 1):
            started = time.perf_counter()
            batch = problem.ranks.share(problem.data.sample(problem.batch_size, generator))
            drawn = time.perf_counter()
            step = trainer.step(batch)
            loss = problem.ranks.mean(step.loss)
            elapsed += time.perf_counter() - started
            count += step.evaluations
            losses.append(loss)
            seconds.append(elapsed)
            evaluations.append(count)
            parts.append({"data": drawn - started, **step.parts} if step.parts else {})
            on_step(run)
            if not math.isfinite(loss):
                run.diverged_at, run.stopped = i, f"the loss is {loss} at step {i}"
                return
            if i in tests or trainer.stopped:
                _test(problem, trainer, model, run, i)
            if trainer.stopped:
                run.stopped = trainer.stopped
                return
    finally:
        run.parts = medians(parts[1:])
        run.first_step_seconds = parts[0].get("optimizer") if parts else None
        # State only grows, so it is measured once, at the end. Reading the state of a descend optimizer marks it as
        # exposed, which makes the next steps slower.
        is_known = trainer.optimizers and losses
        run.state_bytes = [sum(map(_state_bytes, trainer.optimizers)) if is_known else None]


def _test(problem: Problem, trainer: Trainer, model: torch.nn.Module, run: Run, step: int) -> None:
    """Evaluate held-out data, without any effect on the training."""
    state, modes = torch.get_rng_state(), [(module, module.training) for module in model.modules()]
    with trainer.evaluating():
        model.eval()
        score = problem.task.score(model, problem.data.test)
    for module, is_training in modes:
        module.training = is_training
    torch.set_rng_state(state)
    run.test_steps = [*run.test_steps, step]
    run.test_losses = [*run.test_losses, score.loss]
    if score.metric is not None:
        run.test_metrics = [*run.test_metrics, score.metric]
    if not math.isfinite(score.loss):  # the step has made it so
        run.diverged_at = run.diverged_at or step


def test_steps(steps: int) -> list[int]:
    """Return up to ten steps after which held-out data are evaluated, evenly spaced; the last is the last step."""
    count = min(TESTS, max(1, steps // APART))
    return [math.ceil(steps * (i + 1) / count) for i in range(count)]


def diverged_at(losses: Sequence[float]) -> int | None:
    """Return the step, counted from 1, at which the loss became hopeless; None if it did not.

    The loss of a batch is noisy, so the median of the last ``WINDOW`` counts: if it ends above ten times the first
    loss, the step is the first from which on it stayed there, less what the window lags.
    """
    bad = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if bad or not losses or losses[0] <= 0:
        return bad
    bound, since = HOPELESS * losses[0], len(losses) + 1
    while since > 1 and median(losses[max(0, since - 1 - WINDOW) : since - 1]) > bound:
        since -= 1
    if since > len(losses):
        return None
    return next(i for i in range(max(1, since - WINDOW + 1), since + 1) if losses[i - 1] > bound)


def medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median seconds of each part; none if some step's are not known."""
    if not all(parts):
        return {}
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: median(each.get(name, 0.0) for each in parts) for name in names}


def _options(trainer: Trainer) -> dict[str, Any]:
    """Return the options of the optimizer's first group, if it has any."""
    groups = trainer.optimizers[0].param_groups if trainer.optimizers else [{}]
    return {name: value for name, value in groups[0].items() if name not in ("params", "param_names")}


def _state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of this rank's memory behind all state tensors."""
    # ZeroRedundancyOptimizer keeps this rank's share in an optimizer of its own.
    return memory(getattr(optimizer, "optim", optimizer).state)
