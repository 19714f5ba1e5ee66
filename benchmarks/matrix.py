"""Time methods that see whole matrices against torch's, on the shapes of real models.

    python benchmarks/matrix.py [--only PATTERN] [--quick] [--json FILE]

Each line is a case: seconds of a step, medians of interleaved turns (``descend.bench.clock``); how many times faster
ours is than each peer; the first step of each, with what it compiles and the state it makes; and how far apart the
first updates are, as a part of their norm. At last the figures that the project wants to reach.

On a machine that is busy with something else the figures are worthless. A new section is a function that yields cases,
and a line in ``SECTIONS``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import descend
from descend.bench.clock import Contender, Pace, Timing, interleave
from descend.bench.shapes import Shape, Size, gpt2_sizes, resnet50_sizes

OURS = "ours"
TORCH = "torch"

Optimizers = list[torch.optim.Optimizer]
Build = Callable[[list[Tensor]], Optimizers]


class Case(NamedTuple):
    """One line.

    Attributes:
        name: section, model and dtype.
        sizes: of the parameters.
        dtype: of parameters, gradients and state.
        builds: contender -> the optimizers that step the parameters, one after the other.
        figure: how many times faster than torch ours is to be; None if nothing is asked.
    """

    name: str
    sizes: Sequence[Size]
    dtype: torch.dtype
    builds: dict[str, Build]
    figure: float | None = None


class Found(NamedTuple):
    """What a case has shown: seconds of a step and of the first one, by contender; and how far apart updates are."""

    times: dict[str, Timing]
    first: dict[str, float]
    apart: float


def is_hidden(size: Size) -> bool:
    """Whether Muon takes a parameter of this size: no vector, and no embedding or output layer."""
    return len(size) >= 2 and size[0] not in (50257, 1024, 1000)


def muon_alone(quick: bool) -> Iterator[Case]:
    """The hidden matrices of GPT-2, which torch takes too; those of ResNet-50, which torch is given flattened."""
    gpt2 = gpt2_sizes(64, 1) if quick else gpt2_sizes()
    resnet = resnet50_sizes()[:12] if quick else resnet50_sizes()
    builds: dict[str, Build] = {
        OURS: lambda params: [descend.Muon(params)],
        TORCH: lambda params: [torch.optim.Muon([_matrix_of(param) for param in params])],
    }
    for name, sizes, figure in (("gpt2", gpt2, 2.5), ("resnet50", resnet, None)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"muon-{name}-{str(dtype).removeprefix('torch.')}"
            yield Case(label, [size for size in sizes if is_hidden(size)], dtype, builds, figure)


def muon_beside_adamw(quick: bool) -> Iterator[Case]:
    """All of ResNet-50 in one optimizer, against torch's Muon and its fused AdamW."""

    def ours(params: list[Tensor]) -> Optimizers:
        hidden, others = _routed(params)
        groups: list[dict[str, Any]] = [dict(params=hidden, method="muon"), dict(params=others)]
        return [descend.AdamW(groups)]

    def torchs(params: list[Tensor]) -> Optimizers:
        hidden, others = _routed(params)
        muon = torch.optim.Muon([_matrix_of(param) for param in hidden])
        return [muon, torch.optim.AdamW(others, fused=True)]

    sizes = resnet50_sizes()[:12] if quick else resnet50_sizes()
    yield Case("routed-resnet50-float32", sizes, torch.float32, {OURS: ours, TORCH: torchs}, 2.0)


SECTIONS: tuple[Callable[[bool], Iterator[Case]], ...] = (muon_alone, muon_beside_adamw)


def _routed(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    hidden = [param for param in params if is_hidden(tuple(param.shape))]
    return hidden, [param for param in params if not is_hidden(tuple(param.shape))]


def _matrix_of(param: Tensor) -> Tensor:
    """The same memory as a matrix with a row an output channel, with a gradient of its own."""
    matrix = param.detach().flatten(1).requires_grad_()
    matrix.grad = None if param.grad is None else param.grad.flatten(1)
    return matrix


def parameters(case: Case) -> list[Tensor]:
    """Normal numbers with gradients like those of a network: a few directions, and noise. The same at each call."""
    random = torch.Generator().manual_seed(0)
    params = []
    for size in case.sizes:
        param = torch.randn(size, generator=random).to(case.dtype).requires_grad_()
        grad = torch.randn(size, generator=random)
        if len(size) > 1:
            rows = torch.randn(size[0], 4, generator=random)
            grad += (rows @ torch.randn(4, grad[0].numel(), generator=random)).view(size)
        param.grad = grad.to(case.dtype)
        params.append(param)
    return params


def run(case: Case, pace: Pace) -> Found:
    """Time one case."""
    contenders: dict[str, Contender] = {}
    first: dict[str, float] = {}
    after: dict[str, list[Tensor]] = {}
    before = parameters(case)
    for name, build in case.builds.items():
        params = parameters(case)
        begin = time.perf_counter()
        optimizers = build(params)
        for optimizer in optimizers:
            optimizer.step()
        first[name] = time.perf_counter() - begin
        after[name] = [param.detach().clone() for param in params]

        def step(optimizers: Optimizers = optimizers) -> None:
            for optimizer in optimizers:
                optimizer.step()

        contenders[name] = Contender(step)
    return Found(interleave(contenders, Shape.of(case.sizes), pace), first, _apart(before, after))


@torch.no_grad()
def _apart(before: list[Tensor], after: dict[str, list[Tensor]]) -> float:
    """The norm of the difference of the first updates, as a part of their norm."""
    pairs = zip(before, after[OURS], after[TORCH], strict=True)
    moved = [(float((ours - theirs).norm()), float((theirs - old).norm())) for old, ours, theirs in pairs]
    return float(sum(apart**2 for apart, _ in moved) ** 0.5 / sum(step**2 for _, step in moved) ** 0.5)


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="*", help="pattern of case names")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to see that it runs")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    pace = Pace(rounds=3, share=0.5) if options.quick else Pace(rounds=9, share=60.0)
    cases = [case for section in SECTIONS for case in section(options.quick) if fnmatchcase(case.name, options.only)]
    found: dict[str, Found] = {}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in cases:
        result = found[case.name] = run(case, pace)
        times = "  ".join(
            f"{name} {timing.median * 1e3:9.2f} ms (first {result.first[name] * 1e3:.0f})"
            for name, timing in result.times.items()
        )
        print(f"{case.name:26} {times}  {ratio(result):5.2f}x  apart {result.apart:.3f}", flush=True)
    for case in cases:
        if case.figure is not None and not options.quick:  # small shapes say nothing about the figures
            is_reached = ratio(found[case.name]) >= case.figure
            verdict = "reached" if is_reached else "missed"
            print(f"{verdict:8} {case.name}: {ratio(found[case.name]):.2f}x, at least {case.figure}x is wanted")
    if options.json is not None:
        rows = {
            name: {
                "seconds": {who: timing.median for who, timing in result.times.items()},
                "first": result.first,
                "apart": result.apart,
            }
            for name, result in found.items()
        }
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def ratio(result: Found) -> float:
    """How many times faster ours is than torch's."""
    return result.times[TORCH].median / result.times[OURS].median


if __name__ == "__main__":
    main()
