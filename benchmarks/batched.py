"""Time many problems at once, against one run after the other of SciPy and of `minimize`.

    python benchmarks/batched.py [--only PATTERN] [--quick] [--repeats N]

Problems are fresh in every repeat: other seeds, other data. Everybody starts at the same points and stops by the same
rule: the largest entry of the (projected) gradient is at most 1e-6 times that at the start, or 1e-6 if that is smaller.
SciPy gets value and gradient from the same torch function of one problem; and once more from a function written for
NumPy by hand, which costs it less. Every contender's first call is reported, too: it is made in a process of its own,
after all imports, and loads what has been compiled on this machine before.

Single runs are timed on a sample of the problems, because a thousand of them take a minute; contenders take turns. With
OMP_NUM_THREADS=1, seconds are CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from descend import minimize  # now, so that no contender's first call imports it

Array = NDArray[np.float64]
TOL = 1e-6
# Seconds; CPU seconds of this process where a busy machine would spoil them, in one thread then.
clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter


class Family(NamedTuple):
    """Problems of one kind.

    Attributes:
        fun: x (K, n) and data (K, ...) to values (K,).
        by_hand: the same of one problem, for NumPy: x (n,) and its data to value and gradient.
        make: a seed and B to starts (B, n) and data (B, ...).
        bounds: of all variables.
    """

    name: str
    fun: Callable[[Tensor, Tensor], Tensor]
    by_hand: Callable[[Array, Array], tuple[float, Array]]
    make: Callable[[int, int], tuple[Tensor, Tensor]]
    bounds: tuple[float, float] | None = None


def rosenbrocks(x: Tensor, steepness: Tensor) -> Tensor:
    return (steepness * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def rosenbrock_by_hand(x: Array, steepness: Array) -> tuple[float, Array]:
    rise, left = x[1:] - x[:-1] ** 2, 1 - x[:-1]
    grad = np.zeros_like(x)
    grad[1:] = 2 * steepness * rise
    grad[:-1] -= 4 * steepness * rise * x[:-1] + 2 * left
    return float((steepness * rise**2 + left**2).sum()), grad


def make_rosenbrocks(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Ten variables, steepness from 1 to 100, starts in a box around the minimum."""
    generator = torch.Generator().manual_seed(seed)
    x0, steepness = (torch.rand(count, n, generator=generator, dtype=torch.float64) for n in (10, 1))
    return 3 * x0 - 1.5, 100**steepness


POINTS = 40
TIMES = torch.linspace(0, 5, POINTS, dtype=torch.float64)


def peaks(p: Tensor) -> Tensor:
    """Three Gaussian peaks on a base line: heights, centers, logarithms of widths, and the line: n = 10."""
    heights, centers, widths = p[:, 0:3, None], p[:, 3:6, None], p[:, 6:9, None].exp()
    return (heights * (-0.5 * ((TIMES - centers) / widths) ** 2).exp()).sum(1) + p[:, 9:]


def misfits(p: Tensor, data: Tensor) -> Tensor:
    return (peaks(p) - data).square().sum(1)


TIMES_BY_HAND = TIMES.numpy()


def misfit_by_hand(p: Array, data: Array) -> tuple[float, Array]:
    heights, centers, widths = p[0:3, None], p[3:6, None], np.exp(p[6:9, None])
    scaled = (TIMES_BY_HAND - centers) / widths
    shapes = np.exp(-0.5 * scaled**2)
    residual = (heights * shapes).sum(0) + p[9] - data
    slopes = heights * shapes * scaled
    parts = [shapes @ residual, slopes / widths @ residual, slopes * scaled @ residual, [residual.sum()]]
    return float(residual @ residual), 2 * np.concatenate(parts)


def make_misfits(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Fits of curves: peaks with noise of a hundredth, and starts nearby."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, n: int) -> Tensor:
        return low + (high - low) * torch.rand(count, n, generator=generator, dtype=torch.float64)

    centers = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64) + uniform(-0.3, 0.3, 3)
    p = torch.cat([uniform(0.5, 2, 3), centers, uniform(-1.5, -0.5, 3), uniform(-0.2, 0.2, 1)], 1)
    data = peaks(p) + 0.01 * torch.randn(count, POINTS, generator=generator, dtype=torch.float64)
    return p + uniform(-0.15, 0.15, 10), data


FAMILIES = (
    Family("rosenbrock", rosenbrocks, rosenbrock_by_hand, make_rosenbrocks),
    Family("rosenbrock-bounds", rosenbrocks, rosenbrock_by_hand, make_rosenbrocks, (-1.0, 0.9)),
    Family("curves", misfits, misfit_by_hand, make_misfits),
)


class Solved(NamedTuple):
    """Seconds for all B problems; minima and evaluations of those that were run."""

    seconds: float
    values: list[float]
    n_eval: list[int]


def in_a_batch(family: Family, x0: Tensor, data: Tensor, sample: int, method: str = "l-bfgs") -> Solved:
    began = clock()
    result = minimize(family.fun, x0, method, family.bounds, TOL, args=(data,), batched=True)  # type: ignore[call-overload]
    seconds = clock() - began
    return Solved(seconds, result.fun[:sample].tolist(), result.n_eval[:sample].tolist())


def one_by_one(family: Family, x0: Tensor, data: Tensor, sample: int) -> Solved:
    began = clock()
    results = [
        minimize(
            lambda x, datum: family.fun(x[None], datum)[0],
            x0[i],
            bounds=family.bounds,
            tol=TOL,
            args=(data[i : i + 1],),
        )
        for i in range(sample)
    ]
    seconds = (clock() - began) * len(x0) / sample
    return Solved(seconds, [result.fun for result in results], [result.n_eval for result in results])


def scipy_one_by_one(family: Family, x0: Tensor, data: Tensor, sample: int, by_hand: bool = False) -> Solved:
    began = clock()
    results = [
        scipy_run(family, family.by_hand if by_hand else of_torch(family.fun), x0[i], data[i : i + 1], by_hand)
        for i in range(sample)
    ]
    seconds = (clock() - began) * len(x0) / sample
    return Solved(seconds, [float(result.fun) for result in results], [int(result.nfev) for result in results])


def scipy_run(family: Family, fun: Callable[..., Any], x0: Tensor, datum: Tensor, by_hand: bool) -> Any:
    argument: Any = datum[0].numpy() if by_hand else datum
    start = x0.numpy()
    first = np.asarray(fun(start, argument)[1])
    bounds = None if family.bounds is None else scipy.optimize.Bounds(*family.bounds)
    options = dict(maxcor=10, ftol=0.0, gtol=TOL * max(1.0, float(np.abs(first).max())), maxiter=15_000, maxfun=15_000)
    return scipy.optimize.minimize(fun, start, (argument,), "L-BFGS-B", jac=True, bounds=bounds, options=options)


def of_torch(fun: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Array, Tensor], tuple[float, Array]]:
    """The function of one problem, as people who have it in torch give it to SciPy."""

    def value_and_grad(x: Array, datum: Tensor) -> tuple[float, Array]:
        leaf = torch.from_numpy(x.copy()).requires_grad_()
        value = fun(leaf[None], datum)[0]
        (grad,) = torch.autograd.grad(value, leaf)
        return value.item(), grad.numpy()

    return value_and_grad


OURS = "batched"
CONTENDERS: dict[str, Callable[..., Solved]] = {
    OURS: in_a_batch,
    "batched bfgs": partial(in_a_batch, method="bfgs"),
    "minimize": one_by_one,
    "SciPy, torch": scipy_one_by_one,
    "SciPy, NumPy by hand": partial(scipy_one_by_one, by_hand=True),
}


def first_call(family: Family, name: str, count: int, sample: int) -> float:
    """Seconds of a contender's first call, in a new process that has imported everything."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1].split(';'); import batched\n"
        "family = next(family for family in batched.FAMILIES if family.name == sys.argv[2])\n"
        "x0, data = family.make(999, int(sys.argv[4]))\n"
        "print(batched.CONTENDERS[sys.argv[3]](family, x0, data, int(sys.argv[5])).seconds)"
    )
    command = [sys.executable, "-c", script, ";".join(sys.path), family.name, name, str(count), str(sample)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(family: Family, count: int, sample: int, repeats: int) -> None:
    """Print times, their ratios to ours, and whether the minima are the same."""
    names = [name for name in CONTENDERS if family.bounds is None or name != "batched bfgs"]
    solved: dict[str, list[Solved]] = {name: [] for name in names}
    for repeat in range(repeats):
        x0, data = family.make(1000 + repeat, count)
        for name in names:
            solved[name].append(CONTENDERS[name](family, x0, data, sample))
    print(f"\n{family.name}: {count} problems, n = {x0.shape[1]}, single runs on {sample} of them, {repeats} repeats\n")
    columns = (
        "least s",
        "median s",
        "first s",
        "least / ours",
        "median / ours",
        "first / ours",
        "evaluations",
        "lower",
        "higher",
    )
    print(f"{'':<22}" + "".join(f"{column:>14}" for column in columns))
    firsts = {name: first_call(family, name, count, sample) for name in names}
    for name in names:
        seconds = [run.seconds for run in solved[name]]
        ratios = [run.seconds / ours.seconds for run, ours in zip(solved[name], solved[OURS], strict=True)]
        values = [value for run in solved[name] for value in run.values]
        ours_values = [value for run in solved[OURS] for value in run.values]
        lower = sum(v < o - 1e-6 * (1 + abs(o)) for v, o in zip(values, ours_values, strict=True))
        higher = sum(v > o + 1e-6 * (1 + abs(o)) for v, o in zip(values, ours_values, strict=True))
        n_eval = statistics.mean(n for run in solved[name] for n in run.n_eval)
        cells = (
            f"{min(seconds):.3f}",
            f"{statistics.median(seconds):.3f}",
            f"{firsts[name]:.3f}",
            f"{min(seconds) / min(run.seconds for run in solved[OURS]):.1f}",
            f"{statistics.median(ratios):.1f}",
            f"{firsts[name] / firsts[OURS]:.1f}",
            f"{n_eval:.1f}",
            str(lower),
            str(higher),
        )
        print(f"{name:<22}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="families whose name matches this pattern")
    parser.add_argument("--quick", action="store_true", help="few problems: shows that the script works")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; SciPy {scipy.__version__}")
    for family in FAMILIES:
        if fnmatchcase(family.name, arguments.only):
            report(family, *((20, 3, 2) if arguments.quick else (1000, 50, arguments.repeats)))


if __name__ == "__main__":
    main()
