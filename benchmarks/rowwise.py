"""Time ``RowwiseAdagrad`` with sparse gradients against Adagrad and SparseAdam, ours and torch's.

    python benchmarks/rowwise.py [--quick]

A step looks up 16,384 rows of a table of 1 M rows, another set at every step. All contenders update the same table and
get the same gradients, which are not coalesced and made outside the clock; each has its own state, all of it in memory
before anything is timed. They take turns, see ``descend.bench.clock``; of each turn the median of the last steps
counts, and ratios are formed within a round. Shown are the median of all rounds, the fastest turn, and the median
ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import descend
from descend.bench.clock import Contender
from descend.bench.shapes import Shape

OURS = "RowwiseAdagrad"
MAKERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    OURS: lambda params: descend.RowwiseAdagrad(params, state_pages="all"),
    "Adagrad": lambda params: descend.Adagrad(params, state_pages="all"),
    "SparseAdam": lambda params: descend.SparseAdam(params, state_pages="all"),
    "torch Adagrad": torch.optim.Adagrad,
    "torch SparseAdam": torch.optim.SparseAdam,
}
TURN = Shape((), burst=5, uncounted=2)


def lookups(rows: int, count: int, is_zipf: bool) -> Iterator[Tensor]:
    """Rows, over and over the same 32 sets: uniform, or by Zipf's law (exponent 1.2) on shuffled rows."""
    random = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(rows, generator=random)
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -1.2
    sets = [
        shuffled[torch.multinomial(weights, count, replacement=True, generator=random)]
        if is_zipf
        else torch.randint(rows, (count,), generator=random)
        for _ in range(32)
    ]
    return itertools.cycle(sets)


def time_case(rows: int, width: int, count: int, is_zipf: bool, rounds: int) -> dict[str, list[float]]:
    """The seconds of a step in each round, by contender."""
    table = torch.randn(rows, width).requires_grad_()
    values, sets = torch.randn(count, width) * 1e-3, lookups(rows, count, is_zipf)

    def look_up() -> None:
        indices = next(sets).clone()[None]
        table.grad = torch.sparse_coo_tensor(indices, values.clone(), table.shape, check_invariants=False)

    contenders = {name: Contender(make([table]).step, look_up) for name, make in MAKERS.items()}
    for contender in contenders.values():
        contender.turn(TURN)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(statistics.median(contenders[name].turn(TURN)))
    return seconds


def main() -> None:
    """Print a line a case and contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small table and few rounds, to see that it runs")
    quick = parser.parse_args().quick
    rows, count, rounds = (10_000, 256, 2) if quick else (1_000_000, 16_384, 20)
    print(f"{'case':<16}{'optimizer':<20}{'ms':>8}{'fastest':>9}{'times ours':>12}")
    for width, is_zipf in itertools.product((64, 128), (False, True)):
        seconds = time_case(rows, width, count, is_zipf, rounds)
        for name, times in seconds.items():
            ratio = statistics.median(their / our for their, our in zip(times, seconds[OURS], strict=True))
            case = f"{width} {'zipf' if is_zipf else 'uniform'}"
            median, least = 1e3 * statistics.median(times), 1e3 * min(times)
            print(f"{case:<16}{name:<20}{median:>8.2f}{least:>9.2f}{ratio:>12.1f}", flush=True)


if __name__ == "__main__":
    main()
