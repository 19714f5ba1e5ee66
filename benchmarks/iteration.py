"""Time of an L-BFGS iteration outside of the closure, ours against torch's.

How the times are made comparable:

- **The closure is subtracted.** It is cheap, measures itself, and what it took is taken off.
- **The history is full** when the clock starts: the first iterations are not counted.
- **The problem goes on.** A convex quadratic, whose eigenvalues are spread over a condition number
  that nobody is done with in the iterations measured.
- **Interleaved.** Everybody runs once from the start in each round, and who goes first rotates. A
  run gives several times, each a mean over a few iterations; the figure is the median of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import descend

MINIMIZE = "ours, minimize"
CLASS = "ours, class"
TORCH = "torch"


class Size(NamedTuple):
    """What is timed.

    Attributes:
        numel, history: number of variables and of remembered steps.
        rounds: runs of each contender.
        windows, width: how many times one run gives, and over how many iterations each.
        dtype: of the numbers.
    """

    numel: int
    history: int
    rounds: int
    windows: int
    width: int
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        return f"iteration-{self.numel}-{self.history}-{str(self.dtype).removeprefix('torch.')}"


SIZES = (
    Size(100, 10, rounds=20, windows=5, width=20),
    Size(100, 100, rounds=10, windows=5, width=20),
    *(
        Size(numel, history, rounds, 4, 5, dtype)
        for dtype in (torch.float64, torch.float32)
        for numel, history, rounds in (
            (10_000, 10, 10),
            (10_000, 100, 4),
            (100_000, 10, 10),
            (1_000_000, 10, 4),
            (10_000_000, 10, 2),
            (100_000, 100, 4),
            (1_000_000, 100, 2),
        )
    ),
)
QUICK = (
    Size(100, 10, rounds=2, windows=2, width=5),
    Size(1000, 20, rounds=1, windows=2, width=5),
)


class Valley:
    """The quadratic, with a clock: eigenvalues from 1 to a million, evenly in the logarithm.

    Attributes:
        inside: seconds spent in here so far.
    """

    def __init__(self, numel: int, dtype: torch.dtype = torch.float64) -> None:
        self.curvatures = torch.logspace(0, 6, numel, dtype=dtype)
        self.start = torch.ones(numel, dtype=dtype)
        self.inside = 0.0

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        begin = time.perf_counter()
        grad = self.curvatures * x
        value = grad.dot(x) / 2
        self.inside += time.perf_counter() - begin
        return value, grad


class Stopwatch:
    """Seconds outside of the valley since it was last read."""

    def __init__(self, valley: Valley) -> None:
        self.valley = valley
        self.last = time.perf_counter() - valley.inside

    def read(self) -> float:
        now = time.perf_counter() - self.valley.inside
        seconds, self.last = now - self.last, now
        return seconds


def warmup(size: Size) -> int:
    return size.history + 5


def time_minimize(valley: Valley, size: Size) -> list[float]:
    """Seconds per iteration of ``minimize``: from one evaluation to the next, as the valley has seen them."""
    watch, outside = Stopwatch(valley), [0.0]

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        outside.append(outside[-1] + watch.read())
        return valley.value_and_grad(x)

    result = descend.minimize(
        look,
        valley.start,
        jac=True,
        tol=0.0,
        max_iter=warmup(size) + size.windows * size.width,
        history_size=size.history,
    )
    ends = [outside[iteration.n_eval] for iteration in result.history[warmup(size) :: size.width]]
    return [(end - begin) / size.width for begin, end in pairwise(ends)]


def time_class(make: type[torch.optim.Optimizer], line_search: str, valley: Valley, size: Size) -> list[float]:
    """Seconds per iteration of an optimizer, in steps of ``width`` iterations; nothing if it took fewer."""
    param = valley.start.clone().requires_grad_()
    optimizer = make(
        [param],
        max_iter=warmup(size),
        max_eval=10 * warmup(size),
        history_size=size.history,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn=line_search,
    )  # type: ignore[call-arg]

    def closure() -> Tensor:
        value, param.grad = valley.value_and_grad(param.detach())
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    optimizer.param_groups[0]["max_iter"] = size.width
    watch = Stopwatch(valley)
    seconds = []
    for _ in range(size.windows):
        optimizer.step(closure)  # type: ignore[arg-type]
        seconds.append(watch.read() / size.width)
    iterations = optimizer.state[param]["n_iter"]
    return seconds if iterations == warmup(size) + size.windows * size.width else []


CONTENDERS: dict[str, Callable[[Valley, Size], list[float]]] = {
    MINIMIZE: time_minimize,
    CLASS: lambda valley, size: time_class(descend.LBFGS, "hager_zhang", valley, size),
    TORCH: lambda valley, size: time_class(torch.optim.LBFGS, "strong_wolfe", valley, size),
}


def time_iterations(size: Size) -> dict[str, float]:
    """The median of each contender's seconds per iteration."""
    names = list(CONTENDERS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(size.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times = CONTENDERS[name](Valley(size.numel, size.dtype), size)
            if len(times) < size.windows:
                raise RuntimeError(f"{size.name}: {name} ended before the iterations were done.")
            seconds[name] += times
    return {name: float(np.median(times)) for name, times in seconds.items()}
