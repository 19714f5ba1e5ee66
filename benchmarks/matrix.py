"""Time the optimizers of whole matrices, the modern element-wise ones, and options of all, against others.

    python benchmarks/matrix.py [--only PATTERN] [--quick] [--json FILE]

The sections; names of cases begin with theirs:

- ``muon``: the 48 hidden matrices of GPT-2, and those of ResNet-50, against torch.optim.Muon.
- ``routed``: ResNet-50 in one Muon, AdamW inside, against torch's Muon beside its fused AdamW.
- ``soap``: a block of GPT-2, a step between two changes of the bases and one with a change, against
  pytorch-optimizer's and heavyball's SOAP. The 12 blocks are alike.
- ``memory``: every element-wise method on all of GPT-2. The bytes that its step must move, over the memory's bandwidth,
  are the least time; beside it, the part of the step's time that this is.
- ``small``: every element-wise method on 1,000 tensors of 1,000, against the class of that name in pytorch-optimizer.
- ``options``: what ``cautious`` and ``ema`` add to a step on all of GPT-2, beside what they add to its bytes.

All times are medians, in milliseconds; the first step of each contender, with its constructor, is shown beside. How the
times are made comparable:

- **Turns.** Contenders have parameters and state of their own, equal at the start, and take turns, see
  ``descend.bench.clock``.
- **Memory** is measured at the start, see ``descend.bench.bandwidth``. A step that is shown to be faster than memory
  says that something else slowed the measurement down.
- **Matrices as torch takes them.** torch's Muon refuses convolutions: it gets views of them, a row an output channel.
- **Apart.** Where torch takes the same step in float32, the norm of the difference of the first updates is shown, as a
  part of their norm. torch rounds products to bfloat16; where ours are in float32, it is some percent.
- **Gradients** stay the same tensors, or are allocated anew before each step, outside the clock: ``fresh``, and all of
  ``soap``, as heavyball's steps take the gradients away.

Peers that are not installed are left out: pip install 'descend[bench]'. On a machine that is busy with something else
the figures are worthless.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from step import environment, parse_arguments, print_row
from torch import Tensor

import descend
from descend.bench.bandwidth import measure
from descend.bench.clock import Contender, Pace, Timing, interleave, keep_gradients
from descend.bench.contenders import reallocate_gradients
from descend.bench.methods import METHODS, OURS, bytes_moved
from descend.bench.shapes import SHAPES, Shape, Size, gpt2_sizes, resnet50_sizes

TORCH, KOZISTR, HEAVYBALL = "torch", "pytorch_optimizer", "heavyball"
PLAIN = "plain"
FLOAT32 = 4  # bytes
NEVER = 10**9

# Names in pytorch-optimizer that are not ours.
THEIR_NAMES = {"adamax": "AdaMax", "lamb": "Lamb", "adamwschedulefree": "ScheduleFreeAdamW"}
OTHERS = ("asgd",)  # whose class of this name there is another method
NOT_ELEMENTWISE = ("rowwiseadagrad",)
# Tensors as large as the parameter that an option moves in a step: read for sums, or read and written.
OPTIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cautious-update": ({"cautious": "update"}, 2, 0),  # gradient and first average show the sign of a step
    "cautious-decay": ({"cautious": "decay"}, 0, 0),
    "ema": ({"ema": 0.999}, 0, 1),
}

Optimizers = list[torch.optim.Optimizer]
Build = Callable[[list[Tensor]], Optimizers]


class Figure(NamedTuple):
    """A figure to reach.

    Attributes:
        what: is measured, in words.
        measured: what came out.
        bound: what is to come out, at least or at most; None if nothing is asked.
        at_least: which of the two.
    """

    what: str
    measured: float
    bound: float | None
    at_least: bool = True

    @property
    def is_reached(self) -> bool | None:
        if self.bound is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


class Case(NamedTuple):
    """One line.

    Attributes:
        name: section, what is stepped, and what is special.
        sizes: of the parameters.
        builds: contender -> the optimizers that step given parameters, one after the other.
        figures: what is read from its times.
        dtype: of parameters, gradients and state.
        fresh: whether gradients are allocated anew before each step.
    """

    name: str
    sizes: Sequence[Size]
    builds: dict[str, Build]
    figures: Callable[[Found], list[Figure]]
    dtype: torch.dtype = torch.float32
    fresh: bool = False


class Found(NamedTuple):
    """What a case has shown.

    Attributes:
        times: seconds of a step, by contender.
        first: of the first one, its constructor included.
        memory: bytes per second of the memory.
        apart: the norm of the difference of torch's first update and ours, as a part of its norm; None without torch.
    """

    times: dict[str, Timing]
    first: dict[str, float]
    memory: float
    apart: float | None

    def ratio(self, peer: str) -> float:
        """How many times the time of ours a step of the peer takes."""
        return self.times[peer].median / self.times[OURS].median


def times_faster(bound: float | None, *peers: str) -> Callable[[Found], list[Figure]]:
    """How many times faster ours is than the peers that were timed."""

    def figures(found: Found) -> list[Figure]:
        return [Figure(f"x {peer}", found.ratio(peer), bound) for peer in peers if peer in found.times]

    return figures


# The sections.


def muon(quick: bool) -> Iterator[Case]:
    gpt2 = gpt2_sizes(64, 1) if quick else gpt2_sizes()
    builds: dict[str, Build] = {
        OURS: lambda params: [descend.Muon(params)],
        TORCH: lambda params: [torch.optim.Muon([_matrix_of(param) for param in params])],
    }
    for name, sizes, bound in (("gpt2", gpt2, 2.5), ("resnet50", _resnet50(quick), None)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"muon-{name}-{str(dtype).removeprefix('torch.')}"
            hidden = [size for size in sizes if is_hidden(size)]
            yield Case(label, hidden, builds, times_faster(bound, TORCH), dtype)


def routed(quick: bool) -> Iterator[Case]:
    def ours(params: list[Tensor]) -> Optimizers:
        hidden, others = _routed(params)
        groups: list[dict[str, Any]] = [dict(params=hidden), dict(params=others, method="adamw")]
        return [descend.Muon(groups)]

    def torchs(params: list[Tensor]) -> Optimizers:
        hidden, others = _routed(params)
        inside = torch.optim.Muon([_matrix_of(param) for param in hidden])
        return [inside, torch.optim.AdamW(others, fused=True)]

    yield Case("routed-resnet50", _resnet50(quick), {OURS: ours, TORCH: torchs}, times_faster(2.0, TORCH))


def soap(quick: bool) -> Iterator[Case]:
    block = [size for size in gpt2_sizes(16 if quick else 768, 1) if is_hidden(size)]
    for name, frequency, bound in (("between", NEVER, 1.5), ("change", 1, None)):
        builds = {who: build for who, build in _soaps(frequency).items() if who == OURS or find_spec(who)}
        yield Case(f"soap-gpt2block-{name}", block, builds, times_faster(bound, KOZISTR, HEAVYBALL), fresh=True)


def memory(quick: bool) -> Iterator[Case]:
    shape = _cut(SHAPES["gpt2"], quick)
    for name, method in METHODS.items():
        if name not in NOT_ELEMENTWISE:
            size = FLOAT32 * shape.numel
            moved = bytes_moved(size, method.state * size, clip=False, summed=method.summed)
            yield Case(f"memory-{name}", shape.sizes, {OURS: _ours(name)}, partial(_part_of_memory, moved))


def small(quick: bool) -> Iterator[Case]:
    shape = _cut(SHAPES["1000x1000"], quick)
    theirs = import_module(KOZISTR) if find_spec(KOZISTR) else None
    for name, method in METHODS.items():
        their_class = getattr(theirs, THEIR_NAMES.get(name, method.name), None)
        if name in (*NOT_ELEMENTWISE, *OTHERS) or (theirs is not None and their_class is None):
            continue
        builds = {OURS: _ours(name)}
        if their_class is not None:
            builds[KOZISTR] = _one(their_class, method.options)
        for fresh in (False, True):
            label = f"small-{name}-{'fresh' if fresh else 'fixed'}"
            yield Case(label, shape.sizes, builds, times_faster(20.0, KOZISTR), fresh=fresh)


def options(quick: bool) -> Iterator[Case]:
    shape = _cut(SHAPES["gpt2"], quick)
    for method in ("adamw", "lion"):
        state = METHODS[method].state
        plain = bytes_moved(FLOAT32, state * FLOAT32, clip=False)
        for name, (extra, summed, averages) in OPTIONS.items():
            with_it = bytes_moved(FLOAT32, (state + averages) * FLOAT32, clip=False, summed=summed)
            builds = {OURS: _ours(method, **extra), PLAIN: _ours(method)}
            yield Case(f"options-{method}-{name}", shape.sizes, builds, partial(_over_bytes, with_it / plain))


SECTIONS = (muon, routed, soap, memory, small, options)


def is_hidden(size: Size) -> bool:
    """Whether Muon takes a parameter of this size: no vector, and no embedding or output layer."""
    return len(size) >= 2 and size[0] not in (50257, 1024, 1000)


def _resnet50(quick: bool) -> Sequence[Size]:
    return resnet50_sizes()[:12] if quick else resnet50_sizes()


def _cut(shape: Shape, quick: bool) -> Shape:
    return shape.cut(tensors=16, rows=8) if quick else shape


def _routed(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    hidden = [param for param in params if is_hidden(tuple(param.shape))]
    return hidden, [param for param in params if not is_hidden(tuple(param.shape))]


def _matrix_of(param: Tensor) -> Tensor:
    """The same memory as a matrix with a row an output channel, with a gradient of its own."""
    matrix = param.detach().flatten(1).requires_grad_()
    matrix.grad = None if param.grad is None else param.grad.flatten(1)
    return matrix


def _one(kind: Callable[..., Any], options: dict[str, Any]) -> Build:
    return lambda params: [kind(params, **options)]


def _ours(name: str, **options: Any) -> Build:
    return _one(getattr(descend, METHODS[name].name), METHODS[name].options | options)


def _soaps(frequency: int) -> dict[str, Build]:
    """All keep a factor for every dimension of a block of GPT-2; the first step finds its eigenvectors."""
    common: dict[str, Any] = dict(lr=3e-3, betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=frequency)

    def heavyballs(params: list[Tensor]) -> Optimizers:
        heavyball = import_module(HEAVYBALL)
        heavyball.utils.compile_mode = None  # compiling changes little: a step is products
        return [heavyball.SOAP(params, **common, shampoo_beta=0.95, max_precond_dim=10000, use_precond_schedule=False)]

    def kozistrs(params: list[Tensor]) -> Optimizers:
        return [import_module(KOZISTR).SOAP(params, **common)]

    return {OURS: _one(descend.SOAP, common), KOZISTR: kozistrs, HEAVYBALL: heavyballs}


def _part_of_memory(moved: int, found: Found) -> list[Figure]:
    return [Figure("of memory", moved / found.times[OURS].median / found.memory, 0.8)]


def _over_bytes(bytes_ratio: float, found: Found) -> list[Figure]:
    cost = 1 / found.ratio(PLAIN)
    return [Figure("x plain", cost, None), Figure("over bytes", cost / bytes_ratio, 1.1, at_least=False)]


# Timing.


@lru_cache(maxsize=1)
def values(sizes: tuple[Size, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of normal numbers, and gradients like those of a network: a few directions, and noise."""
    random = torch.Generator().manual_seed(0)
    params, grads = [], []
    for size in sizes:
        params.append(torch.randn(size, generator=random).to(dtype))
        grad = torch.randn(size, generator=random)
        if len(size) > 1:
            rows = torch.randn(size[0], 4, generator=random)
            grad += (rows @ torch.randn(4, grad[0].numel(), generator=random)).view(size)
        grads.append(grad.to(dtype))
    return params, grads


def run(case: Case, pace: Pace, memory: float) -> Found:
    """Time one case, and give its tensors back.

    Args:
        case: the case.
        pace: rounds, and each contender's share of wall time.
        memory: bytes per second of the memory.
    """
    gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
    starts, grads = values(tuple(case.sizes), case.dtype)
    contenders: dict[str, Contender] = {}
    first: dict[str, float] = {}
    ends: dict[str, list[Tensor]] = {}
    for name, build in case.builds.items():
        params = [start.clone().requires_grad_() for start in starts]
        reallocate_gradients(params, grads)
        begin = time.perf_counter()
        optimizers = build(params)
        take(optimizers)
        first[name] = time.perf_counter() - begin
        if TORCH in case.builds and case.dtype is torch.float32:  # in bfloat16 parameters have too few digits
            ends[name] = [param.detach().clone() for param in params]
        prepare = partial(reallocate_gradients, params, grads) if case.fresh else keep_gradients
        contenders[name] = Contender(partial(take, optimizers), prepare)
    apart = _apart(starts, ends) if ends else None
    ends.clear()
    found = Found(interleave(contenders, Shape.of(case.sizes), pace), first, memory, apart)
    contenders.clear()
    gc.collect()  # gigabytes must not wait for it, should an optimizer be in a reference cycle
    return found


def take(optimizers: Optimizers) -> None:
    """One step of all of them."""
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _apart(starts: list[Tensor], ends: dict[str, list[Tensor]]) -> float:
    triples = zip(starts, ends[OURS], ends[TORCH], strict=True)
    norms = [(float((ours - theirs).norm()), float((theirs - start).norm())) for start, ours, theirs in triples]
    return float(sum(apart**2 for apart, _ in norms) ** 0.5 / sum(step**2 for _, step in norms) ** 0.5)


def report(case: Case, found: Found) -> list[Figure]:
    """Print what a case has shown: a line of figures, and one for each contender."""
    figures = case.figures(found)
    cells = [f"{figure.measured:.2f} {figure.what}" for figure in figures]
    if found.apart is not None:
        cells.append(f"{found.apart:.3f} apart")
    print(f"{case.name:<34}" + "   ".join(cells), flush=True)
    for name, timing in found.times.items():
        print_row(f"    {name}", [f"{timing.median * 1e3:.3f}", f"{found.first[name] * 1e3:.1f}"])
    return figures


def report_figures(figures: dict[str, list[Figure]]) -> None:
    """Print those to reach beside what was measured."""
    print("\nFigures to reach\n")
    print_row("case", ["measured", "bound", "reached"])
    for name, of_case in figures.items():
        for figure in of_case:
            if figure.bound is not None:
                sign = ">=" if figure.at_least else "<="
                cells = [f"{figure.measured:.2f}", f"{sign} {figure.bound:g}", "yes" if figure.is_reached else "no"]
                print_row(f"{name}, {figure.what}", cells)


def main() -> None:
    names = [case.name for section in SECTIONS for case in section(True)]
    arguments = parse_arguments(
        names,
        "Time optimizers of matrices, modern ones and options, ours against others.",
        "muon-gpt2 or small-*-fresh",
    )
    quick = arguments.quick
    pace = Pace(rounds=2, share=0.0) if quick else Pace(rounds=9, share=15.0)
    about = environment()
    memory_rate = measure(footprint=512 * 2**20).rate
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f", memory {memory_rate / 1e9:.1f} GB/s")
    for peer in (KOZISTR, HEAVYBALL):
        if find_spec(peer) is None:
            print(f"{peer} is not installed, and left out: pip install 'descend[bench]'.")
    print("\nMilliseconds per step, and of the first.\n")
    found: dict[str, Found] = {}
    figures: dict[str, list[Figure]] = {}
    for section in SECTIONS:
        for case in section(quick):
            if case.name in arguments.names:
                found[case.name] = run(case, pace, memory_rate)
                figures[case.name] = report(case, found[case.name])
    if quick:
        print("\nQuick run: the shapes were cut down, so none of these times means anything.")
    else:
        report_figures(figures)
    if arguments.json:
        cases = {
            name: {
                "seconds": {who: timing._asdict() for who, timing in each.times.items()},
                "first": each.first,
                "apart": each.apart,
                "figures": [{**figure._asdict(), "reached": figure.is_reached} for figure in figures[name]],
            }
            for name, each in found.items()
        }
        everything = {"environment": about, "quick": quick, "memory_bytes_per_second": memory_rate, "cases": cases}
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
