"""Time a thousand fits at once, against one after the other by `least_squares` and by MINPACK's lm in SciPy.

    python benchmarks/batched_fits.py [--only PATTERN] [--quick] [--repeats N]

Models of 3, 5 and 10 variables are fitted to 20 and to 100 points. Everybody starts at the same points, with the
default tolerances, and at most 100 evaluations. SciPy gets its Jacobians from torch as cheaply as there is a way: one
backward pass through M copies of the model.

Single runs are timed on a sample, because a thousand of them take ten seconds; contenders take turns. With
OMP_NUM_THREADS=1, seconds are CPU time, which other processes disturb less. Every contender's first call is made in a
process of its own, after all imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import scipy.optimize
import torch
from batched import Array, clock
from torch import Tensor

from descend import least_squares  # now, so that no contender's first call imports it

MAX_EVAL = 100
NOISE = 0.01  # standard deviation of the data


class Model(NamedTuple):
    """Curves of one kind.

    Attributes:
        fun: variables (K, n) and times (M,) to curves (K, M).
        low, high: of the true variables.
        spread: of the starts around these, on both sides.
    """

    name: str
    fun: Callable[[Tensor, Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]
    spread: float


def decay(p: Tensor, times: Tensor) -> Tensor:
    return p[:, :1] * torch.exp(-p[:, 1:2] * times) + p[:, 2:]


def two_decays(p: Tensor, times: Tensor) -> Tensor:
    return p[:, :1] * torch.exp(-p[:, 1:2] * times) + p[:, 2:3] * torch.exp(-p[:, 3:4] * times) + p[:, 4:]


def peaks(p: Tensor, times: Tensor) -> Tensor:
    heights, centers, widths = p[:, 0:3, None], p[:, 3:6, None], p[:, 6:9, None].exp()
    return (heights * (-0.5 * ((times - centers) / widths) ** 2).exp()).sum(1) + p[:, 9:]


MODELS = (
    Model("decay", decay, (1.0, 0.3, -0.5), (3.0, 1.5, 0.5), 0.3),
    Model("two-decays", two_decays, (1.0, 0.2, 1.0, 1.5, -0.5), (3.0, 0.5, 3.0, 3.0, 0.5), 0.1),
    Model(
        "peaks",
        peaks,
        (0.5, 0.5, 0.5, 0.7, 2.2, 3.7, -1.5, -1.5, -1.5, -0.2),
        (2.0, 2.0, 2.0, 1.3, 2.8, 4.3, -0.5, -0.5, -0.5, 0.2),
        0.15,
    ),
)


class Task(NamedTuple):
    """Fits of one model: residuals of (K, n) and data (K, M), starts (B, n) and data (B, M)."""

    fun: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    data: Tensor


def task(model: Model, n_points: int, seed: int, count: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    times, n = torch.linspace(0, 5, n_points, dtype=torch.float64), len(model.low)
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (model.low, model.high))
    share, shift = (torch.rand(count, n, generator=generator, dtype=torch.float64) for _ in range(2))
    p = low + (high - low) * share
    noise = NOISE * torch.randn(count, n_points, generator=generator, dtype=torch.float64)
    return Task(lambda x, y: model.fun(x, times) - y, p + model.spread * (2 * shift - 1), model.fun(p, times) + noise)


class Fitted(NamedTuple):
    """Seconds for all B fits; costs and evaluations of those that were run."""

    seconds: float
    costs: list[float]
    n_eval: list[int]


def in_a_batch(given: Task, sample: int) -> Fitted:
    began = clock()
    many = least_squares(given.fun, given.x0, args=(given.data,), batched=True, max_eval=MAX_EVAL)
    return Fitted(clock() - began, many.fun[:sample].tolist(), many.n_eval[:sample].tolist())


def one_by_one(given: Task, sample: int) -> Fitted:
    began = clock()
    ones = [
        least_squares(lambda x, y: given.fun(x[None], y)[0], x, args=(y[None],), max_eval=MAX_EVAL)
        for x, y in zip(given.x0[:sample], given.data, strict=False)
    ]
    seconds = (clock() - began) * len(given.x0) / sample
    return Fitted(seconds, [one.fun for one in ones], [one.n_eval for one in ones])


def minpack(given: Task, sample: int) -> Fitted:
    began = clock()
    ones = [minpack_run(given.fun, x, y[None]) for x, y in zip(given.x0[:sample].numpy(), given.data, strict=False)]
    seconds = (clock() - began) * len(given.x0) / sample
    return Fitted(seconds, [float(one.cost) for one in ones], [int(one.nfev) for one in ones])


def minpack_run(fun: Callable[[Tensor, Tensor], Tensor], x: Array, data: Tensor) -> Any:
    def residuals(x: Array) -> Array:
        values: Array = fun(torch.from_numpy(x)[None], data)[0].numpy()
        return values

    def jacobian(x: Array) -> Array:
        copies = torch.from_numpy(x).repeat(data.shape[1], 1).requires_grad_()
        (rows,) = torch.autograd.grad(fun(copies, data).diagonal().sum(), copies)
        whole: Array = rows.numpy()
        return whole

    return scipy.optimize.least_squares(residuals, x, jacobian, method="lm", max_nfev=MAX_EVAL)


OURS = "batched"
CONTENDERS: dict[str, Callable[[Task, int], Fitted]] = {
    OURS: in_a_batch,
    "least_squares": one_by_one,
    "SciPy lm": minpack,
}


def first_call(model: Model, n_points: int, name: str, count: int, sample: int) -> float:
    """Seconds of a contender's first call, in a new process that has imported everything."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1].split(';'); import batched_fits as fits\n"
        "model = next(model for model in fits.MODELS if model.name == sys.argv[2])\n"
        "given = fits.task(model, int(sys.argv[4]), 999, int(sys.argv[5]))\n"
        "print(fits.CONTENDERS[sys.argv[3]](given, int(sys.argv[6])).seconds)"
    )
    numbers = map(str, (n_points, count, sample))
    command = [sys.executable, "-c", script, ";".join(sys.path), model.name, name, *numbers]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(model: Model, n_points: int, count: int, sample: int, repeats: int) -> None:
    """Print times, their ratios to ours, and how many of the costs are ours, lower or higher."""
    fitted: dict[str, list[Fitted]] = {name: [] for name in CONTENDERS}
    for repeat in range(repeats):
        given = task(model, n_points, 1000 + repeat, count)
        for name, contender in CONTENDERS.items():
            fitted[name].append(contender(given, sample))
    title = f"{model.name}: {count} fits, n = {len(model.low)}, M = {n_points}, single runs on {sample} of them"
    print(f"\n{title}, {repeats} repeats\n")
    columns = ("least s", "median s", "first s", "median / ours", "first / ours", "evaluations", "lower", "higher")
    print(f"{'':<16}" + "".join(f"{column:>15}" for column in columns))
    firsts: dict[str, float] = {}
    for name, runs in fitted.items():
        seconds = [run.seconds for run in runs]
        # What is imported or compiled once must not be multiplied.
        share = 1.0 if name == OURS else sample / count
        first = first_call(model, n_points, name, count, sample)
        firsts[name] = share * first + (1 - share) * statistics.median(seconds)
        ratios = [run.seconds / ours.seconds for run, ours in zip(runs, fitted[OURS], strict=True)]
        pairs = [
            pair
            for run, ours in zip(runs, fitted[OURS], strict=True)
            for pair in zip(run.costs, ours.costs, strict=True)
        ]
        cells = (
            f"{min(seconds):.3f}",
            f"{statistics.median(seconds):.3f}",
            f"{firsts[name]:.3f}",
            f"{statistics.median(ratios):.1f}",
            f"{firsts[name] / firsts[OURS]:.1f}",
            f"{statistics.mean(n for run in runs for n in run.n_eval):.2f}",
            str(sum(cost < ours * (1 - 1e-6) for cost, ours in pairs)),
            str(sum(cost > ours * (1 + 1e-6) for cost, ours in pairs)),
        )
        print(f"{name:<16}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="models whose name matches this pattern")
    parser.add_argument("--quick", action="store_true", help="few fits: shows that the script works")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; SciPy {scipy.__version__}")
    for model in MODELS:
        if fnmatchcase(model.name, arguments.only):
            for n_points in (20, 100):
                report(model, n_points, *((20, 3, 2) if arguments.quick else (1000, 25, arguments.repeats)))


if __name__ == "__main__":
    main()
