"""Steps inside backward: what they save in memory and what they cost in time, against ordinary steps and torch.

    python benchmarks/in_backward.py [--only PATTERN] [--quick] [--json FILE]

Four ways to train a model with AdamW: ours with ordinary steps and with ``in_backward``; torch's ``fused=True`` with
ordinary steps, and as PyTorch's tutorial steps inside backward, with one optimizer per parameter in
``register_post_accumulate_grad_hook``.

- **gradients** are the most bytes that ``.grad`` of all parameters held at once, looked at whenever one is complete.
- **peak** is the most memory that a fresh process had which trains the model in one way alone, with everything: torch,
  parameters, state, activations, gradients.
- **Milliseconds** are medians of whole training steps: forward, backward, step. All four take turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contest import small_transformer
from step import environment, print_row
from torch import Tensor, nn

import descend
from descend.bench.clock import Contender, Pace, Timing, interleave
from descend.bench.methods import FUSED, OURS
from descend.bench.shapes import Shape

INSIDE = " inside"
WAYS = (OURS, OURS + INSIDE, FUSED, FUSED + INSIDE)
PROCESS_STEPS = 3


class Model(NamedTuple):
    """What is trained: ``make(shrink)`` builds it, ``inputs(shrink)`` draws a batch."""

    make: Callable[[int], nn.Module]
    inputs: Callable[[int], Tensor]
    turn: Shape


def square_layers(width: int, depth: int, shrink: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width // shrink, width // shrink) for _ in range(depth)])


def transformer(shrink: int) -> nn.Module:
    return small_transformer(8192 // shrink, width=256 // shrink, layers=6)


MODELS = {
    # 25 M numbers in 48 tensors: a step moves many bytes.
    "wide": Model(partial(square_layers, 1024, 24), lambda shrink: torch.randn(16, 1024 // shrink), Shape((), 2, 0)),
    # 400 tensors: a step costs what each of them costs in Python.
    "many": Model(partial(square_layers, 32, 200), lambda shrink: torch.randn(16, 32 // shrink), Shape((), 6, 2)),
    "transformer": Model(transformer, lambda shrink: torch.randint(8192 // shrink, (2, 64)), Shape((), 3, 1)),
}


class Plan(NamedTuple):
    """How much to run: models are ``shrink`` times narrower, a peak is the lowest of some processes'."""

    shrink: int
    pace: Pace
    processes: int


FULL = Plan(shrink=1, pace=Pace(rounds=30, share=12.0), processes=3)
QUICK = Plan(shrink=8, pace=Pace(rounds=2, share=0.0), processes=1)


class Trainer:
    """Trains a model in one of ``WAYS``; ``look`` is called with each parameter whose gradient is complete."""

    def __init__(self, name: str, way: str, shrink: int, look: Callable[[Tensor], None] | None = None) -> None:
        torch.manual_seed(0)
        chosen = MODELS[name]
        self.model, self.inputs = chosen.make(shrink), chosen.inputs(shrink)
        params = list(self.model.parameters())
        for param in params if look else ():  # before the hooks that step
            param.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
        self.optimizer: torch.optim.Optimizer | None = None
        if way == OURS + INSIDE:
            self.optimizer = descend.AdamW(params)
            descend.in_backward(self.optimizer)
        elif way == FUSED + INSIDE:
            for param in params:
                _step_when_complete(param, torch.optim.AdamW([param], fused=True))
        else:
            self.optimizer = descend.AdamW(params) if way == OURS else torch.optim.AdamW(params, fused=True)

    def train(self) -> None:
        self.model(self.inputs).square().mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def _step_when_complete(param: Tensor, optimizer: torch.optim.Optimizer) -> None:
    def step(param: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    param.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


def held_gradients(name: str, way: str, shrink: int) -> int:
    """The most bytes of gradients that training holds at once."""
    most = 0

    def look(param: Tensor) -> None:
        nonlocal most
        most = max(most, sum(param.grad.nbytes for param in trainer.model.parameters() if param.grad is not None))

    trainer = Trainer(name, way, shrink, look)
    for _ in range(2):
        trainer.train()
    return most


def peak_of_process(name: str, way: str, plan: Plan) -> int:
    """The most memory, in bytes, of a fresh process that trains in one way."""
    command = [sys.executable, __file__, "--only", name, "--process", way, *(["--quick"] if plan is QUICK else [])]
    runs = (subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True) for _ in range(plan.processes))
    return min(int(run.stdout) for run in runs)


def train_alone(name: str, way: str, plan: Plan) -> None:
    """What that process does."""
    trainer = Trainer(name, way, plan.shrink)
    for _ in range(PROCESS_STEPS):
        trainer.train()
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def time_ways(name: str, plan: Plan) -> dict[str, Timing]:
    contenders = {way: Contender(Trainer(name, way, plan.shrink).train) for way in WAYS}
    timings = interleave(contenders, MODELS[name].turn, plan.pace)
    contenders.clear()
    gc.collect()
    return timings


def report(name: str, plan: Plan, peaks: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Print a line per way to train one model."""
    timings = time_ways(name, plan)
    rows = {}
    for way in WAYS:
        held = held_gradients(name, way, plan.shrink)
        cells = [f"{held / 1e6:.2f}", f"{peaks[way] / 1e6:.0f}", f"{timings[way].median * 1e3:.2f}"]
        print_row(f"{name}, {way}", [*cells, f"{timings[way].median / timings[OURS].median:.2f}x"])
        rows[way] = {"gradients": held, "peak": peaks[way], "seconds": timings[way]._asdict()}
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What steps inside backward save and cost.")
    parser.add_argument("--only", metavar="PATTERN", default="*", help=f"run these of {', '.join(MODELS)}")
    parser.add_argument("--quick", action="store_true", help="narrow models: shows that it works, measures nothing")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything measured")
    parser.add_argument("--process", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.names = [name for name in MODELS if fnmatchcase(name, arguments.only)]
    if not arguments.names:
        parser.error(f"--only: nothing matches {arguments.only!r}. There is {', '.join(MODELS)}.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    plan = QUICK if arguments.quick else FULL
    if arguments.process:
        train_alone(arguments.names[0], arguments.process, plan)
        return
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    # Before this process grows: a new one begins with the peak of the one that makes it.
    peaks = {name: {way: peak_of_process(name, way, plan) for way in WAYS} for name in arguments.names}
    print_row("model, who steps", ["grads MB", "peak MB", "ms", "/ours"])
    models = {name: report(name, plan, peaks[name]) for name in arguments.names}
    if arguments.quick:
        print("\nQuick run: the models were made narrow, so none of these figures means anything.")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": about, "quick": arguments.quick, "models": models}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
