"""Time steps with sparse gradients: ours against torch's SparseAdam, a dense AdamW, and the memory's own limit.

    python benchmarks/sparse.py [--only PATTERN] [--quick] [--json FILE]

A step looks up 16,384 rows of one table, another set of rows at every step, and all that is timed is the optimizer:

- ``touched`` and ``exact`` are descend's AdamW with that ``sparse``. ``exact`` includes what happens before rows are
  read: the hook of ``attach``. 1,000 steps lie behind it, and every row has state: there is something to catch up with.
- ``torch`` is torch.optim.SparseAdam; ``dense`` is torch.optim.AdamW(fused=True) with a dense gradient, where its
  tensors take no more than 8 GB.
- ``floor`` does no mathematics. It reads the gradient once, and reads and writes back the rows of parameter and both
  averages, on the same threads, from a sorted list of distinct rows that somebody else has made, asking for lines ahead
  of use. No optimizer can be faster.

How the times are made comparable:

- **One table.** All contenders update the same parameter and the same two averages; copies of the largest case would
  not fit into memory. The averages are those that ours allocated, and every number in them has been written before.
  So torch, too, finds them in the huge pages that ours asks for.
- **Rounds.** In each round everybody takes a turn of several steps; the first ones only restore the caches, the median
  of the others counts. Who goes first rotates. A ratio is formed in each round; the median of all rounds is reported.
- **Gradients** are what the backward pass of ``nn.Embedding(sparse=True)`` leaves, not coalesced, newly allocated
  before each step, outside the clock.
- **Zipf** looks up the row of rank r with a probability proportional to r**-1.2; ranks are strewn over the table.

Cases called ``first-steps`` time new optimizers, whose state has no memory yet. In each round everybody begins anew and
takes 50 steps, with state of its own. The first one, which allocates the state, is shown and not compared.

The largest case needs 17 GB of memory; what does not fit is left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
import torch
from contest import DTYPES
from llvmlite import ir as llvm_ir
from numba import types
from step import environment, print_row
from torch import Tensor

import descend
from descend.backends.cpu import threads
from descend.backends.cpu.intrinsics import fetch_add, intrinsic, load_int, prefetcher
from descend.bench.clock import Contender
from descend.bench.shapes import Shape
from descend.state.available_memory import available_memory

TOUCHED, EXACT, TORCH, DENSE, FLOOR = "touched", "exact", "torch", "dense", "floor"
CONTENDERS = (TOUCHED, EXACT, TORCH, DENSE, FLOOR)

ROWS = {"100k": 100_000, "1M": 1_000_000, "10M": 10_000_000}
DIMS = (16, 64, 128)
UNIFORM, ZIPF = "uniform", "zipf"
FIRST_STEPS = "first-steps"
LARGEST_DENSE = 8e9
"""Bytes of parameter, gradient and averages."""


class Plan(NamedTuple):
    """How much to run.

    Attributes:
        shrink: tables have so many times fewer rows.
        lookups: rows looked up in a step, those named several times included.
        sets: how many sets of lookups there are; then they repeat.
        rounds: turns of each contender.
        turn: steps of a turn, and how many of them do not count.
        history: steps of ``exact`` before anything is timed.
        fresh_rounds: new optimizers of each contender.
        fresh_steps: steps that each of these takes.
    """

    shrink: int
    lookups: int
    sets: int
    rounds: int
    turn: Shape
    history: int
    fresh_rounds: int
    fresh_steps: int


FULL = Plan(
    shrink=1,
    lookups=16_384,
    sets=256,
    rounds=25,
    turn=Shape((), burst=6, uncounted=2),
    history=1000,
    fresh_rounds=5,
    fresh_steps=50,
)
QUICK = Plan(
    shrink=100,
    lookups=256,
    sets=8,
    rounds=2,
    turn=Shape((), burst=1, uncounted=0),
    history=20,
    fresh_rounds=2,
    fresh_steps=4,
)
DENSE_TURN = Shape((), burst=1, uncounted=0)  # no cache holds what it needs


class Case(NamedTuple):
    """One line of the table. The dtype is that of parameter, gradient and averages."""

    dtype: str
    rows: str
    dims: int
    lookups: str

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.rows}-{self.dims}-{self.lookups}"

    @property
    def row_bytes(self) -> int:
        return self.dims * DTYPES[self.dtype].itemsize


CASES = [
    Case(dtype, rows, dims, lookups)
    for dtype in DTYPES
    for rows in ROWS
    for dims in DIMS
    for lookups in (UNIFORM, ZIPF)
]
FIRST_STEPS_CASES = {
    f"{FIRST_STEPS}-{rows}-{lookups}": Case("float32", rows, 64, lookups)
    for rows in ROWS
    for lookups in (UNIFORM, ZIPF)
}


class Result(NamedTuple):
    """What was measured of a case.

    Attributes:
        rows: distinct rows of a step, in the mean.
        moved: bytes a step has to move: it reads and writes these rows in three tables, and reads the gradient.
        seconds: by contender, one number a round.
    """

    rows: float
    moved: float
    seconds: dict[str, list[float]]

    def ratio(self, slow: str, fast: str) -> float | None:
        """How many times longer ``slow`` takes: median over the rounds."""
        if not {slow, fast} <= self.seconds.keys():
            return None
        return statistics.median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


Results = dict[str, Result]
"""By name of the case."""


class FirstSteps(NamedTuple):
    """What was measured of new optimizers.

    Attributes:
        seconds: by contender, an array of shape (rounds, steps).
    """

    seconds: dict[str, np.ndarray]

    def together(self, name: str) -> float:
        """Seconds of all steps but the first: median over the rounds."""
        return float(np.median(self.seconds[name][:, 1:].sum(1)))

    def worst(self, slow: str, fast: str) -> float:
        """How many times longer ``slow`` takes, in the worst of all steps but the first."""
        slow_steps, fast_steps = (np.median(self.seconds[name][:, 1:], axis=0) for name in (slow, fast))
        return float((slow_steps / fast_steps).min())


FirstStepsResults = dict[str, FirstSteps]
"""By name of the case."""


def draw_lookups(case: Case, plan: Plan) -> Tensor:
    """Sets of row numbers, int64 of shape (sets, lookups)."""
    rows, shape = ROWS[case.rows] // plan.shrink, (plan.sets, plan.lookups)
    generator = torch.Generator().manual_seed(0)
    if case.lookups == UNIFORM:
        return torch.randint(rows, shape, generator=generator)
    cumulative = torch.arange(1, rows + 1, dtype=torch.float64).pow_(-1.2).cumsum_(0)
    drawn = torch.rand(shape, dtype=torch.float64, generator=generator) * cumulative[-1]
    ranks = torch.searchsorted(cumulative, drawn).clamp_(max=rows - 1)
    return torch.randperm(rows, generator=generator)[ranks]


class Reader(torch.nn.Embedding):
    """An embedding of which only what comes before the forward pass is wanted."""

    def prepare(self, indices: Tensor) -> None:
        """Run the hooks before a forward pass."""
        for hook in self._forward_pre_hooks.values():
            hook(self, (indices,), {})


class Table:
    """One parameter, its averages, and everybody who updates them.

    Attributes:
        rows: distinct rows that the steps so far have touched, one number a step.
    """

    def __init__(self, case: Case, plan: Plan) -> None:
        self.case, self.plan = case, plan
        self.rows: list[int] = []
        self._sets = itertools.cycle(draw_lookups(case, plan))
        self._values = torch.randn(plan.lookups, case.dims, generator=torch.Generator().manual_seed(0))
        self._values = self._values.to(DTYPES[case.dtype])
        values = torch.full((ROWS[case.rows] // plan.shrink, case.dims), 0.1, dtype=DTYPES[case.dtype])
        self.reader = Reader(len(values), case.dims, sparse=True, _weight=values)
        self.param = self.reader.weight
        self._indices = self._distinct = torch.empty(0, dtype=torch.int64)
        self._averages: dict[str, Tensor] = {}

    def contenders(self) -> dict[str, tuple[Contender, Shape]]:
        """Everybody who updates the table, and how long the turns are."""
        touched = self._touched()
        exact = self._exact()
        torchs = torch.optim.SparseAdam([self.param])
        torchs.state[self.param] = {"step": self.plan.history, **self._averages}
        floor = partial(memory_floor(self.case.row_bytes), (self.param, *self._averages.values()))
        turn = self.plan.turn
        contenders = {
            TOUCHED: (Contender(touched.step, self.look_up), turn),
            EXACT: (self._exact_contender(exact), turn),
            TORCH: (Contender(torchs.step, self.look_up), turn),
            FLOOR: (Contender(lambda: floor(self._distinct, self._grad()), self.look_up), turn),
        }
        if 4 * self.param.nbytes <= LARGEST_DENSE:
            dense = torch.optim.AdamW([self.param], fused=True)
            dense.state[self.param] = {"step": torch.tensor(float(self.plan.history)), **self._averages}
            grad = torch.full_like(self.param, 1e-3)
            contenders[DENSE] = Contender(dense.step, partial(setattr, self.param, "grad", grad)), DENSE_TURN
        return contenders

    def fresh(self, name: str) -> Contender:
        """A new optimizer without state."""
        if name == TORCH:
            return Contender(torch.optim.SparseAdam([self.param]).step, self.look_up)
        optimizer = descend.AdamW([self.param], sparse="exact" if name == EXACT else "touched")
        if name == TOUCHED:
            return Contender(optimizer.step, self.look_up)
        optimizer.attach(self.reader)
        return self._exact_contender(optimizer)

    def _exact_contender(self, optimizer: descend.AdamW) -> Contender:
        def prepare() -> None:
            self.look_up()
            optimizer.attach(self.param)  # the others have stepped on the same weights: accept them

        return Contender(partial(self._read_and_step, optimizer), prepare)

    def _touched(self) -> torch.optim.Optimizer:
        optimizer = descend.AdamW([self.param], sparse="touched")
        self.look_up()
        optimizer.step()
        state = optimizer.state[self.param]
        self._averages = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        self._averages["exp_avg"].fill_(1e-3)
        self._averages["exp_avg_sq"].fill_(1e-4)
        return optimizer

    def _exact(self) -> descend.AdamW:
        optimizer = descend.AdamW([self.param], sparse="exact")
        optimizer.attach(self.reader)
        optimizer.state[self.param] = {"step": torch.tensor(0.0), **self._averages}
        self.look_up()
        self._read_and_step(optimizer)
        optimizer.state[self.param]["row_step"].fill_(1)  # as though every row had had a gradient in the first step
        self.param.grad = self._gradient(self._indices[:0], self._values[:0])
        for _ in range(self.plan.history - 1):
            optimizer.step()
        return optimizer

    def look_up(self) -> None:
        self._indices = next(self._sets).clone()
        self._distinct = torch.unique(self._indices)
        self.rows.append(len(self._distinct))
        self.param.grad = self._gradient(self._indices, self._values.clone())

    def _gradient(self, indices: Tensor, values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(indices[None], values, self.param.shape, check_invariants=False)

    def _read_and_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.reader.prepare(self._indices)
        optimizer.step()

    def _grad(self) -> Tensor:
        assert self.param.grad is not None
        values: Tensor = self.param.grad._values()
        return values


AHEAD = 16
BLOCK = 512


def mover(size: int) -> Any:
    """``target ^= source & mask`` for ``size`` bytes, in one register."""
    word, lane = llvm_ir.IntType(64), llvm_ir.IntType(32)
    vector, lanes = llvm_ir.VectorType(word, size // 8), llvm_ir.VectorType(lane, size // 8)

    def move(typing: Any, target: Any, source: Any, mask: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            undefined = llvm_ir.Constant(vector, llvm_ir.Undefined)
            masks = builder.insert_element(undefined, args[2], lane(0))
            masks = builder.shuffle_vector(masks, undefined, lanes(None))
            addresses = [builder.inttoptr(address, vector.as_pointer()) for address in args[:2]]
            old, new = (builder.load(address, align=8) for address in addresses)
            builder.store(builder.xor(old, builder.and_(new, masks)), addresses[0], align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return intrinsic(move)


def memory_floor(row_bytes: int) -> Callable[..., None]:
    """Compile what a step does to memory, without its arithmetic.

    Lines are asked for 16 rows ahead, into the second-level cache and for reading. Measured on AMD EPYC with rows of 64
    to 512 bytes: for writing or into the first level it takes up to half as long again; 8 to 64 rows ahead are alike.
    """
    size = math.gcd(row_bytes, 64)  # of a line, at most
    move, prefetch = mover(size), prefetcher(3 * (torch.float64,))

    def kernel(call: int) -> None:
        counter, rows, count, lookups = load_int(call, 0), load_int(call, 1), load_int(call, 2), load_int(call, 3)
        param, exp_avg, exp_avg_sq = load_int(call, 4), load_int(call, 5), load_int(call, 6)
        grad, zero = load_int(call, 7), load_int(call, 8)  # the compiler cannot know that it is zero: it must write
        while True:
            first = fetch_add(counter, BLOCK)
            if first >= count:
                break
            last, read = min(first + BLOCK, count), first * lookups // count
            for i in range(first - AHEAD, last):
                if i + AHEAD < last:
                    start = load_int(rows, i + AHEAD) * row_bytes
                    for byte in range(0, row_bytes, 64):
                        prefetch((param + start, exp_avg + start, exp_avg_sq + start), byte // 8)
                if i >= first:
                    start, end = load_int(rows, i) * row_bytes, (i + 1) * lookups // count
                    for byte in range(start, start + row_bytes, size):
                        move(exp_avg + byte, exp_avg + byte, zero)
                        move(exp_avg_sq + byte, exp_avg_sq + byte, zero)
                    while read < end:
                        for byte in range(0, row_bytes, size):
                            move(param + start + byte, grad + read * row_bytes + byte, zero)
                        read += 1

    compiled: Any = numba.cfunc("void(int64)")(kernel)
    counter = np.zeros(1, np.int64)

    def run(tensors: tuple[Tensor, ...], rows: Tensor, grad: Tensor) -> None:
        counter[0] = 0
        addresses = [tensor.data_ptr() for tensor in (*tensors, grad)]
        call = [counter.ctypes.data, rows.data_ptr(), len(rows), len(grad), *addresses, 0]
        arguments = np.array(call, np.int64)
        threads.run(compiled.address, arguments.ctypes.data, grad.numel())

    return run


def time_case(case: Case, plan: Plan) -> Result:
    """Let all contenders take their turns, and give the memory back."""
    gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
    table = Table(case, plan)
    contenders = table.contenders()
    for contender, turn in contenders.values():
        contender.turn(turn)
    table.rows.clear()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(plan.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            contender, turn = contenders[name]
            seconds[name].append(statistics.median(contender.turn(turn)))
    rows = statistics.mean(table.rows)
    moved = (6 * rows + plan.lookups) * case.row_bytes
    contenders.clear()
    del table, contender
    gc.collect()
    return Result(rows, moved, seconds)


def time_first_steps(case: Case, plan: Plan) -> FirstSteps:
    """Let new optimizers take their first steps."""
    gc.freeze()
    table, names = Table(case, plan), [TOUCHED, EXACT, TORCH]
    turn = Shape((), burst=plan.fresh_steps, uncounted=0)
    for name in (TOUCHED, EXACT):
        table.fresh(name).turn(turn)  # compiles the kernels
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(plan.fresh_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()  # gives back the state of the optimizer before
            seconds[name].append(table.fresh(name).turn(turn))
    return FirstSteps({name: np.array(rounds) for name, rounds in seconds.items()})


class Figure(NamedTuple):
    """A figure to reach.

    Attributes:
        what: its title.
        cases: pattern of case names; the worst of them counts.
        measure: how many times longer one thing takes than another in a case; None where one of them is missing.
        sign: whether the bound is the least or the most that is allowed.
        bound: a ratio of times.
    """

    what: str
    cases: str
    measure: Callable[[Any, str], float | None]
    sign: Literal[">=", "<="]
    bound: float

    def measured(self, results: Mapping[str, Any]) -> list[float]:
        """All cases it is about, the worst first."""
        found = [self.measure(results, name) for name in results if fnmatchcase(name, self.cases)]
        return sorted((ratio for ratio in found if ratio is not None), reverse=self.sign == "<=")

    def reached_by(self, measured: float) -> bool:
        return measured >= self.bound if self.sign == ">=" else measured <= self.bound


def times(slow: str, fast: str) -> Callable[[Results, str], float | None]:
    """How many times longer ``slow`` takes than ``fast`` in the same case."""
    return lambda results, name: results[name].ratio(slow, fast)


def growth(contender: str) -> Callable[[Results, str], float | None]:
    """How many times longer a touched row takes than in the same case with 100k rows."""

    def measure(results: Results, name: str) -> float | None:
        small = results.get("-".join("100k" if part in ROWS else part for part in name.split("-")))
        if small is None:
            return None
        large = results[name]
        return large.median(contender) / large.rows / (small.median(contender) / small.rows)

    return measure


def worst_step(name: str) -> Callable[[FirstStepsResults, str], float | None]:
    """How many times longer torch takes than ``name``, in the worst step from the second on."""
    return lambda results, case: results[case].worst(TORCH, name)


def steps_together(name: str) -> Callable[[FirstStepsResults, str], float | None]:
    """How many times longer torch takes than ``name`` for all steps from the second on."""
    return lambda results, case: results[case].together(TORCH) / results[case].together(name)


FIGURES = (
    Figure("torch / touched", "*-1M-*-uniform", times(TORCH, TOUCHED), ">=", 8),
    Figure("torch / touched", "*-10M-*-uniform", times(TORCH, TOUCHED), ">=", 8),
    Figure("torch / touched", "*-1M-*-zipf", times(TORCH, TOUCHED), ">=", 6),
    Figure("torch / touched", "*-10M-*-zipf", times(TORCH, TOUCHED), ">=", 6),
    Figure("floor / touched", "*-uniform", times(FLOOR, TOUCHED), ">=", 0.4),
    Figure("floor / touched", "*-zipf", times(FLOOR, TOUCHED), ">=", 0.4),
    Figure("exact / touched", "*", times(EXACT, TOUCHED), "<=", 3),
    Figure("dense / exact", "*-1M-*", times(DENSE, EXACT), ">=", 12),
    Figure("touched, 10M rows / 100k", "*-10M-*-zipf", growth(TOUCHED), "<=", 2),
)
FIRST_STEPS_FIGURES = tuple(
    Figure(f"torch / {name}, {what}", "*", measure(name), ">=", 1)
    for name in (TOUCHED, EXACT)
    for what, measure in (("worst of steps", worst_step), ("steps together", steps_together))
)


def report_cases(cases: list[Case], plan: Plan) -> Results:
    """Print a line per case as it is measured."""
    print("\nMilliseconds per step; how many times longer others take; what touched is of the floor, and its bytes.\n")
    ratios = ((TORCH, TOUCHED), (EXACT, TOUCHED), (DENSE, EXACT), (FLOOR, TOUCHED))
    print_row("case", ["rows", *CONTENDERS, *(f"{slow}/{fast[0]}" for slow, fast in ratios), "GB/s", "at floor"])
    results: Results = {}
    for case in cases:
        needed = 3 * case.row_bytes * ROWS[case.rows] / plan.shrink
        if needed + 1e9 > (available_memory() or math.inf):
            print(f"{case.name:<40} left out: its tensors take {needed / 1e9:.1f} GB", flush=True)
            continue
        results[case.name] = result = time_case(case, plan)
        milliseconds = [f"{result.median(name) * 1e3:.3f}" if name in result.seconds else "-" for name in CONTENDERS]
        measured = [result.ratio(*pair) for pair in ratios]
        bandwidths = [f"{result.moved / result.median(name) / 1e9:.1f}" for name in (TOUCHED, FLOOR)]
        shown = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in measured]
        print_row(case.name, [f"{result.rows:.0f}", *milliseconds, *shown, *bandwidths])
    return results


def report_first_steps(cases: Mapping[str, Case], plan: Plan) -> FirstStepsResults:
    """Print a line per case and contender: what the first steps of a new optimizer take."""
    print(f"\nMilliseconds of the first {plan.fresh_steps} steps; how many times longer torch takes.\n")
    print_row("case", ["step 1", "step 2", f"2 to {plan.fresh_steps}", "torch/", "worst step"])
    results: FirstStepsResults = {}
    for name, case in cases.items():
        # The parameter, and both averages twice: ours commits them ahead only if they take half of what is available.
        needed = 5 * case.row_bytes * ROWS[case.rows] / plan.shrink
        if needed + 1e9 > (available_memory() or math.inf):
            print(f"{name:<40} left out: its tensors take {needed / 1e9:.1f} GB", flush=True)
            continue
        results[name] = result = time_first_steps(case, plan)
        for contender, seconds in result.seconds.items():
            first, second = np.median(seconds[:, :2], axis=0) * 1e3
            together, worst = result.together(contender), result.worst(TORCH, contender)
            cells = [f"{first:.2f}", f"{second:.2f}", f"{together * 1e3:.1f}"]
            print_row(f"{name} {contender}", [*cells, f"{result.together(TORCH) / together:.2f}x", f"{worst:.2f}x"])
    return results


def report_figures(results: Results, first_steps: FirstStepsResults) -> list[dict[str, Any]]:
    """Print the figures to reach beside the measured ones; return them for the JSON file."""
    print("\nFigures to reach (the worst of the cases counts)\n")
    print_row("figure, cases", ["bound", "worst", "median", "reached"])
    rows = []
    pairs = [(figure, results) for figure in FIGURES] + [(figure, first_steps) for figure in FIRST_STEPS_FIGURES]
    for figure, of_cases in pairs:
        measured = figure.measured(of_cases)
        worst, median = (measured[0], statistics.median(measured)) if measured else (None, None)
        reached = None if worst is None else figure.reached_by(worst)
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in (worst, median)]
        verdict = {True: "yes", False: "no", None: "-"}[reached]
        print_row(f"{figure.what}, {figure.cases}", [f"{figure.sign} {figure.bound:g}", *shown, verdict])
        about = {"what": figure.what, "cases": figure.cases, "sign": figure.sign, "bound": figure.bound}
        rows.append({**about, "worst": worst, "median": median, "reached": reached})
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time steps with sparse gradients, ours against torch's.")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="*",
        help=f"run the cases with the pattern in their name, as in float32-1M-64-zipf, or {FIRST_STEPS}",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="cut tables and rounds down: shows that the script works, measures nothing",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything measured")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():  # said now, not after ten minutes
        parser.error(f"--json: there is no folder {arguments.json.parent}.")
    names = [case.name for case in CASES] + list(FIRST_STEPS_CASES)
    arguments.names = {name for name in names if fnmatchcase(name, f"*{arguments.only}*")}
    if not arguments.names:
        parser.error(
            f"--only: nothing matches {arguments.only!r}. There is ({'|'.join(DTYPES)})-({'|'.join(ROWS)})-"
            f"({'|'.join(map(str, DIMS))})-({UNIFORM}|{ZIPF}), {FIRST_STEPS}-...-..."
        )
    return arguments


def main() -> None:
    arguments = parse_arguments()
    plan = QUICK if arguments.quick else FULL
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = report_cases([case for case in CASES if case.name in arguments.names], plan)
    first_cases = {name: case for name, case in FIRST_STEPS_CASES.items() if name in arguments.names}
    first_steps = report_first_steps(first_cases, plan)
    figures = report_figures(results, first_steps)
    if arguments.quick:
        print("\nQuick run: the tables were cut down, so none of these times means anything.")
    if arguments.json:
        cases: dict[str, Any] = {name: result._asdict() for name, result in results.items()}
        for name, result in first_steps.items():
            cases[name] = {"seconds": {contender: array.tolist() for contender, array in result.seconds.items()}}
        report = {"environment": about, "quick": arguments.quick, "cases": cases, "figures": figures}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
