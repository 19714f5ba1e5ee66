"""AdamW with less state: bytes of state a parameter, and the time of a step at GPT-2's size.

    python benchmarks/memory.py [--only PATTERN] [--quick] [--json FILE]

Contenders take turns in one run, see ``descend.bench.clock``: float32, state in 8 bits and in bfloat16, bfloat16
parameters with each way of rounding; torch's fused AdamW; and the optimizers of torchao and bitsandbytes with 8-bit
state, where they are installed: ``pip install 'descend[bench]'``.

Bytes of state are those behind the tensors that the first step has made. A step has to read and write parameters and
state, and to read the gradients: these bytes, divided by its time, are shown as a part of the memory's bandwidth, which
is measured in the same run. First steps, in which kernels are compiled or loaded too, are shown separately.

Contenders of one dtype share their gradients, which nobody writes to. All of them together take about 10 GB; one that
does not fit into what is available is left out, and named.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
from matrix import Figure, report_figures
from step import environment, parse_arguments, print_row
from torch import Tensor
from torch.optim import Optimizer

import descend
from descend.bench.bandwidth import measure
from descend.bench.clock import Contender, Pace, turns
from descend.bench.methods import bytes_moved
from descend.bench.shapes import SHAPES, Shape
from descend.reporting.memory import memory
from descend.state.available_memory import available_memory

TORCHAO, BITSANDBYTES = "torchao", "bitsandbytes"
MARGIN = 2**30  # bytes that are left to others
FOOTPRINT = 512 * 2**20  # bytes of the arrays that bandwidth is measured on


class Kind(NamedTuple):
    """A contender.

    Attributes:
        build: makes the optimizer of parameters.
        dtype: of parameters and gradients.
        needs: the package that has it; None for descend and torch.
    """

    build: Callable[[list[Tensor]], Optimizer]
    dtype: torch.dtype = torch.float32
    needs: str | None = None


def ours(**options: Any) -> Callable[[list[Tensor]], Optimizer]:
    return lambda params: descend.AdamW(params, **options)


def fused(params: list[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, fused=True)


def theirs(package: str, name: str, **options: Any) -> Callable[[list[Tensor]], Optimizer]:
    return lambda params: getattr(import_module(f"{package}.optim"), name)(params, **options)


BFLOAT16 = torch.bfloat16
KINDS = {
    "float32": Kind(ours()),
    "float32-fused": Kind(fused),
    "8bit": Kind(ours(state_dtype="8bit")),
    "8bit-stochastic": Kind(ours(state_dtype="8bit", rounding="stochastic")),
    "8bit-torchao": Kind(theirs(TORCHAO, "AdamW8bit"), needs=TORCHAO),
    "8bit-bitsandbytes": Kind(theirs(BITSANDBYTES, "AdamW8bit"), needs=BITSANDBYTES),
    "bfloat16-state": Kind(ours(state_dtype=BFLOAT16)),
    "bfloat16-nearest": Kind(ours(), BFLOAT16),
    "bfloat16-fused": Kind(fused, BFLOAT16),
    "bfloat16-stochastic": Kind(ours(rounding="stochastic"), BFLOAT16),
    "bfloat16-stochastic-torchao": Kind(theirs(TORCHAO, "_AdamW", bf16_stochastic_round=True), BFLOAT16, TORCHAO),
    "bfloat16-compensated": Kind(ours(rounding="compensated"), BFLOAT16),
    "bfloat16-8bit-stochastic": Kind(ours(state_dtype="8bit", rounding="stochastic"), BFLOAT16),
}


class Found(NamedTuple):
    """What was measured of a contender.

    Attributes:
        state: bytes of state for each number of the parameters.
        moved: bytes that a step has to move for each of them.
        first: seconds of the first step, the constructor included.
        seconds: of each step that counts.
        rate: bytes per second that the median step moves.
    """

    state: float
    moved: float
    first: float
    seconds: list[float]
    rate: float

    @property
    def median(self) -> float:
        return median(self.seconds)


def gradients(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Numbers as small as those of a network: a thousandth of normal ones."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=random).mul_(1e-3).to(dtype) for size in shape.sizes]


class Entry:
    """A contender that has taken its first step.

    Args:
        kind: which.
        shape: of the parameters.
        grads: the gradients of all steps; nobody writes to them.
    """

    def __init__(self, kind: Kind, shape: Shape, grads: Sequence[Tensor]) -> None:
        random = torch.Generator().manual_seed(1)
        self.params = [
            torch.randn(size, generator=random).mul_(0.02).to(kind.dtype).requires_grad_() for size in shape.sizes
        ]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        if kind.needs is not None:
            import_module(f"{kind.needs}.optim")
        begin = time.perf_counter()
        self.optimizer = kind.build(self.params)
        self.optimizer.step()
        self.first = time.perf_counter() - begin

    def found(self, seconds: list[float]) -> Found:
        """Return what was measured, with the seconds of each step."""
        numbers, size = sum(param.numel() for param in self.params), memory(self.params)
        state = memory(self.optimizer.state)
        moved = bytes_moved(size, state, clip=False)
        return Found(state / numbers, moved / numbers, self.first, seconds, moved / median(seconds))


def run(kinds: dict[str, Kind], shape: Shape, pace: Pace) -> dict[str, Found]:
    """Time contenders in turns; one that fails or does not fit into memory is left out, and named.

    Args:
        kinds: the contenders by name.
        shape: of the parameters.
        pace: rounds, and each contender's share of wall time.
    """
    grads = {dtype: gradients(shape, dtype) for dtype in {kind.dtype: None for kind in kinds.values()}}
    entries: dict[str, Entry] = {}
    for name, kind in kinds.items():
        needed = shape.numel * (kind.dtype.itemsize + 8)  # nobody's state is larger
        if 0 < available_memory() < needed + MARGIN:
            print(f"{name} is left out: it may need {needed / 1e9:.1f} GB, and that much is not available.")
            continue
        try:
            entries[name] = Entry(kind, shape, grads[kind.dtype])
        except Exception as error:  # a package may have nothing for CPUs, and says so with any exception
            if kind.needs is None:
                raise
            print(f"{name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    contenders = {name: Contender(entry.optimizer.step) for name, entry in entries.items()}
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
    try:
        for turn in turns(contenders, shape, pace) if contenders else ():
            seconds[turn.name] += turn.seconds
    finally:
        gc.unfreeze()
    return {name: entry.found(seconds[name]) for name, entry in entries.items()}


def figures(found: dict[str, Found]) -> dict[str, list[Figure]]:
    """What the project wants to reach, for the contenders that were timed."""

    def faster(name: str, other: str, bound: float) -> Iterable[tuple[str, Figure]]:
        if name in found and other in found:
            yield name, Figure(f"x {other}", found[other].median / found[name].median, bound)

    reached: list[tuple[str, Figure]] = []
    if "8bit" in found:
        reached.append(("8bit", Figure("bytes a parameter", found["8bit"].state, 2.1, at_least=False)))
    reached += faster("8bit", "float32", 1.5)
    reached += faster("bfloat16-state", "float32", 1.3)
    reached += faster("bfloat16-stochastic", "bfloat16-nearest", 1 / 1.1)
    names = dict.fromkeys(name for name, _ in reached)
    return {name: [figure for other, figure in reached if other == name] for name in names}


def report(found: dict[str, Found], bandwidth: float) -> None:
    """Print a line for each contender."""
    base = found.get("float32")
    print_row("", ["state", "moved", "first", "median", "fastest", "x float32", "GB/s", "of memory"])
    print_row("", ["B", "B", "s", "ms", "ms", "", "", ""])
    for name, each in found.items():
        cells = [f"{each.state:.3f}", f"{each.moved:.2f}", f"{each.first:.2f}", f"{each.median * 1e3:.2f}"]
        cells += [f"{min(each.seconds) * 1e3:.2f}", f"{base.median / each.median:.2f}" if base else "-"]
        print_row(name, [*cells, f"{each.rate / 1e9:.1f}", f"{each.rate / bandwidth:.0%}"])


def main() -> None:
    arguments = parse_arguments(list(KINDS), "Time AdamW with less state, and measure the state.", "8bit or bfloat16")
    quick = arguments.quick
    shape = SHAPES["gpt2"].cut(tensors=16, rows=8) if quick else SHAPES["gpt2"]
    about = environment()
    bandwidth = measure(FOOTPRINT).rate
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for package in (TORCHAO, BITSANDBYTES):
        if find_spec(package) is None:
            print(f"{package} is not installed, and left out: pip install 'descend[bench]'.")
    kinds = {
        name: kind
        for name, kind in KINDS.items()
        if name in arguments.names and (kind.needs is None or find_spec(kind.needs))
    }
    print(f"\nAdamW, {shape.numel:,} parameters in {len(shape.sizes)} tensors; bytes are for each parameter.\n")
    found = run(kinds, shape, Pace(rounds=2, share=0.0) if quick else Pace(rounds=25, share=10.0))
    bandwidth = max(bandwidth, measure(FOOTPRINT).rate)  # what disturbs a measurement makes it too slow
    report(found, bandwidth)
    print(f"\nMemory: {bandwidth / 1e9:.1f} GB/s.")
    reached = figures(found)
    if quick:
        print("\nQuick run: the shapes were cut down, so none of these times means anything.")
    elif reached:
        report_figures(reached)
    if arguments.json:
        everything = {
            "environment": about,
            "quick": quick,
            "parameters": shape.numel,
            "memory_bytes_per_second": bandwidth,
            "contenders": {name: each._asdict() for name, each in found.items()},
            "figures": {
                name: [{**figure._asdict(), "reached": figure.is_reached} for figure in each]
                for name, each in reached.items()
            },
        }
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
