"""Count the evaluations that a physics-informed network needs, by quasi-Newton method.

    python benchmarks/pinn.py [--only PATTERN] [--seeds N] [--evaluations N] [--json FILE] [--quick]

The network, the equation and the points are those of ``descend compare pinn``. Everybody begins at the
same weights, after 300 steps of Adam, and gets the same function, which is counted outside of the
solvers; all stopping rules are off. A run's error is that of the solution at held-out points, at the
lowest loss so far; it is looked at after each tenth evaluation.

Prints for each method the evaluations until an error, or a loss, is reached for the first time: the
geometric mean over the seeds, "-" if a seed does not reach it. Then for each method the evaluations
that self-scaled Broyden needs to the method's lowest error, over those that the method needs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from problems import Problem
from race import BFGS, ENDLESS, PEERS, Counter, Finish, Solver, ours, scipy_first
from torch import Tensor, nn
from torch.func import functional_call

import descend
from descend.compare.tasks import pinn

ADAM_STEPS = 300
EVERY = 10  # evaluations between two looks at the error
BEST = "ss-broyden"
ERRORS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
LOSSES = (1e-3, 1e-4, 1e-5, 1e-6)


def our(method: str, history_size: int | None = None) -> Solver:
    return partial(ours, tol=0.0, method=method, history_size=history_size)


def scipys_lbfgs(history: int) -> Solver:
    return scipy_first("L-BFGS-B", maxcor=history, ftol=0, maxfun=ENDLESS)


SOLVERS: dict[str, Solver] = {
    BEST: our("ss-broyden"),
    "ss-bfgs": our("ss-bfgs"),
    "bfgs": our("bfgs"),
    "l-bfgs, 10": our("l-bfgs", history_size=10),
    "l-bfgs, 50": our("l-bfgs", history_size=50),
    "l-bfgs, 100": our("l-bfgs", history_size=100),
    "SciPy BFGS": PEERS[BFGS],
    "SciPy L-BFGS-B, 10": scipys_lbfgs(10),
    "SciPy L-BFGS-B, 50": scipys_lbfgs(50),
}


class Look(NamedTuple):
    """The state of a run: evaluations so far, the lowest loss, the error there."""

    n_eval: int
    loss: float
    error: float


class Trace(Counter):
    """A counter that looks at the error as the run goes on."""

    def __init__(self, problem: Problem, error: Callable[[Tensor], float], budget: int) -> None:
        super().__init__(problem, 0.0, budget)
        self.error = error
        self.lowest, self.loss = problem.x0, math.inf
        self.looks: list[Look] = []

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = super().evaluate(x)
        if value.item() < self.loss:
            self.lowest, self.loss = x.detach().clone(), value.item()
        if self.n_eval % EVERY == 0:
            self.looks.append(Look(self.n_eval, self.loss, self.error(self.lowest)))
        return value, grad


class Network:
    """The network of one seed as a function of its flat weights, after some steps of Adam."""

    def __init__(self, seed: int, adam_steps: int) -> None:
        torch.manual_seed(seed)
        data = pinn.TASK.load(seed)
        self.model, self.test = pinn.TASK.model(), data.test
        self.batch = data.sample(0, torch.Generator())
        optimizer = descend.Adam(self.model.parameters(), lr=pinn.TASK.lr["adam"])
        for _ in range(adam_steps):
            optimizer.zero_grad()
            pinn.loss(self.model, self.batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        start = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.problem = Problem(f"pinn-{seed}", self.loss, start)

    def at(self, weights: Tensor) -> nn.Module:
        """The network with other weights, as a module."""
        return _At(self.model, weights)

    def loss(self, weights: Tensor) -> Tensor:
        return pinn.loss(self.at(weights), self.batch)

    def error(self, weights: Tensor) -> float:
        points, exact = self.test
        with torch.no_grad():
            error: Tensor = torch.linalg.vector_norm(self.at(weights)(points) - exact)
        return error.item() / torch.linalg.vector_norm(exact).item()


class _At(nn.Module):
    """A module with the weights of a flat vector, through which autograd sees."""

    def __init__(self, model: nn.Module, weights: Tensor) -> None:
        super().__init__()
        shapes = [(name, param.shape) for name, param in model.named_parameters()]
        parts = torch.split(weights, [shape.numel() for _, shape in shapes])
        self.weights = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        self.call = partial(functional_call, model, self.weights)

    def forward(self, points: Tensor) -> Tensor:
        out: Tensor = self.call((points,))
        return out


class Ran(NamedTuple):
    """A run: what was seen of it, and the processor's seconds."""

    looks: list[Look]
    seconds: float


def run(solver: Solver, network: Network, budget: int) -> Ran:
    """Let one solver loose on one network."""
    trace = Trace(network.problem, network.error, budget)
    began = time.process_time()
    with suppress(Finish):
        solver(trace)
    return Ran(trace.looks, time.process_time() - began)


def first(looks: Iterable[Look], quantity: str, bound: float) -> float:
    """Evaluations until a quantity of a look is at most a bound; infinity if it never is."""
    return next((float(look.n_eval) for look in looks if getattr(look, quantity) <= bound), math.inf)


def mean(values: Iterable[float]) -> float:
    """The geometric mean; infinity if one value is."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def shown(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "-"


def row(title: str, cells: Iterable[str]) -> None:
    print(f"{title:<22}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


def report(runs: dict[str, list[Ran]]) -> None:
    """Print the tables."""
    for quantity, bounds in (("error", ERRORS), ("loss", LOSSES)):
        print(f"\nEvaluations until the {quantity} is\n")
        row("", [f"{bound:g}" for bound in bounds])
        for name, rans in runs.items():
            row(name, [shown(mean(first(ran.looks, quantity, bound) for ran in rans)) for bound in bounds])
    print("\nAt the end: evaluations, lowest loss, error, seconds; geometric means\n")
    for name, rans in runs.items():
        ends = [ran.looks[-1] for ran in rans]
        row(
            name,
            [
                f"{mean(end.n_eval for end in ends):.0f}",
                f"{mean(end.loss for end in ends):.1e}",
                f"{mean(end.error for end in ends):.1e}",
                f"{mean(ran.seconds for ran in rans):.0f}",
            ],
        )
    if BEST in runs:
        print(f"\nEvaluations of {BEST} to each method's lowest error / the method's own\n")
        for name, rans in runs.items():
            row(name, [f"{mean(ratio(*pair) for pair in zip(runs[BEST], rans, strict=True)):.2f}"])


def ratio(ours_: Ran, theirs: Ran) -> float:
    lowest = min(look.error for look in theirs.looks)
    return first(ours_.looks, "error", lowest) / first(theirs.looks, "error", lowest)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the evaluations that a physics-informed network needs.")
    parser.add_argument("--only", metavar="PATTERN", default="*", help=f"some of {', '.join(SOLVERS)}")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="default: 3")
    parser.add_argument("--evaluations", metavar="N", type=int, default=2000, help="for each run; default: 2,000")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all that was seen")
    parser.add_argument("--quick", action="store_true", help="one seed and 30 evaluations: shows that the script works")
    arguments = parser.parse_args()
    seeds, budget, adam_steps = (1, 30, 10) if arguments.quick else (arguments.seeds, arguments.evaluations, ADAM_STEPS)
    torch.set_num_threads(1)
    names = [name for name in SOLVERS if fnmatchcase(name, arguments.only)]
    if not names:
        parser.error(f"--only: nothing matches {arguments.only!r}.")
    runs: dict[str, list[Ran]] = {name: [] for name in names}
    for seed in range(seeds):
        network = Network(seed, adam_steps)
        for name in names:
            runs[name].append(run(SOLVERS[name], network, budget))
            row(f"seed {seed}, {name}", [f"{value:.1e}" for value in runs[name][-1].looks[-1][1:]])
    report(runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
