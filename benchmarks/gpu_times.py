"""What ``gpu.py`` times: dense and sparse steps on a device, against torch.optim and the memory's own limit.

How the times are made comparable:

- **Device events.** A turn is several steps between two events. A copy before the first event keeps the device busy
  while the host prepares, so that what is timed begins at once. Steps follow each other as fast as the host can launch
  them: where the host is slower than the device, its time is what counts.
- **Sets.** Contenders step the same parameters with the same gradients, each with state of its own. There are so many
  sets of them that together they exceed the second-level cache several times; a step takes the next set.
- **Turns.** All contenders of a case take turns, who goes first rotates, and medians are reported. The first step,
  which makes state and perhaps compiles, is reported apart.
- **The floor** is what a step must read and write, over the bandwidth of a large copy within the device's memory; if
  its state is in the host's memory, what it must send one way, over the bandwidth of a copy from pinned memory.

A case that does not fit into the device's memory is left out, or loses its hungriest contender.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count, cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

import descend
from descend.bench.clock import Timing
from descend.bench.methods import bytes_moved
from descend.bench.shapes import Size, gpt2_sizes
from descend.core.codecs import BLOCK
from descend.core.options import BackendName

OURS, FUSED, FOREACH, TORCH = "ours", "fused", "foreach", "torch"
MEMORY = 100 * 2**30
"""Bytes that a case may take at most."""
CACHES = 4
"""Sets of parameters together are at least so many times as large as the second-level cache."""
CACHE = 64 * 2**20
"""Bytes of the second-level cache where torch does not say."""
MOST_SETS = 64
COPY = 2**30
"""Bytes of a copy's source."""
COPIES = 4
"""Copies in a row, when their bandwidth is measured."""
TURN = 0.015
"""Seconds of a turn, or one step."""
ZIPF = 1.2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def llama_1b_sizes() -> tuple[Size, ...]:
    """Llama 3.2 1B, 146 tensors, 1.24 B numbers; the output layer shares the token embedding.

    Source: https://huggingface.co/meta-llama/Llama-3.2-1B, config.json.
    """
    width, keys, hidden = 2048, 512, 8192
    attention = ((width, width), (keys, width), (keys, width), (width, width))
    mlp = ((hidden, width), (hidden, width), (width, hidden))
    return ((128_256, width), *16 * (*attention, *mlp, (width,), (width,)), (width,))


SHAPES: dict[str, tuple[Size, ...]] = {
    "1B": ((1_000_000_000,),),
    "1000x1000": 1000 * ((1000,),),
    "gpt2": gpt2_sizes(),
    "llama-1b": llama_1b_sizes(),
    "124M": ((124_000_000,),),
    "1M": ((1_000_000,),),
}


class Plan(NamedTuple):
    """How much to time.

    Attributes:
        shrink: tensors have so many times fewer rows, and there are at most 16 of them; 1 for all.
        seconds: of a case, after its first steps.
        fewest, most: turns of each contender.
        warm: single steps whose host and device times are measured.
    """

    shrink: int
    seconds: float
    fewest: int
    most: int
    warm: int

    def sizes(self, shape: str) -> tuple[Size, ...]:
        """The sizes of a shape's tensors."""
        if self.shrink == 1:
            return SHAPES[shape]
        return tuple(
            (max(1, size[0] // self.shrink), *(min(dim, 3) for dim in size[1:])) for size in SHAPES[shape][:16]
        )


FULL = Plan(shrink=1, seconds=3.0, fewest=5, most=60, warm=10)
QUICK = Plan(shrink=1_000_000, seconds=0.0, fewest=1, most=1, warm=1)


STORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "8bit": dict(state_dtype="8bit"),
    "stochastic": dict(rounding="stochastic"),
    "8bit-stochastic": dict(state_dtype="8bit", rounding="stochastic"),
}
STATE_IN_8_BITS = 2 * (1 + 4 / BLOCK)
"""Bytes of state of a number whose two averages are in 8 bits."""


class Case(NamedTuple):
    """One line of the table.

    Attributes:
        shape: of ``SHAPES``; for tables, how rows are looked up.
        dtype: of parameters, gradients and, unless ``stored`` says otherwise, state.
        clip: whether gradients are clipped to a norm of 1.
        stored: how ours keeps numbers, of ``STORED``; its peers know only dtypes.
        offload: whether state is in the host's memory.
    """

    shape: str
    dtype: str
    clip: bool = False
    stored: str = "plain"
    offload: bool = False

    @property
    def is_sparse(self) -> bool:
        return self.shape in ("uniform", "zipf")

    @property
    def name(self) -> str:
        if self.is_sparse:
            return f"sparseadam-{self.dtype}-10Mx64-{self.shape}"
        kind = "offloaded" if self.offload else "clip" if self.clip else self.stored
        return f"adamw-{self.dtype}-{self.shape}-{kind}"


# In order of importance: what the time does not suffice for is left out at the end.
CASES = (
    *(Case("1B", "float32", clip) for clip in (False, True)),
    *(Case("1000x1000", "float32", clip) for clip in (False, True)),
    *(Case(lookups, "float32") for lookups in ("uniform", "zipf")),
    *(Case("1B", "bfloat16", clip) for clip in (False, True)),
    *(Case(shape, dtype, clip) for shape in ("gpt2", "llama-1b") for dtype in DTYPES for clip in (False, True)),
    *(Case(shape, "float32", stored="8bit") for shape in ("1B", "gpt2")),
    *(Case("llama-1b", "bfloat16", stored=stored) for stored in ("stochastic", "8bit-stochastic")),
    Case("gpt2", "float32", offload=True),
    Case("1000x1000", "bfloat16", clip=True),
    *(Case(shape, dtype, clip) for shape in ("124M", "1M") for dtype in DTYPES for clip in (False, True)),
)


class LeftOutError(Exception):
    """A case is not timed; the message says why."""


class Times(NamedTuple):
    """What was measured of a contender, in seconds.

    Attributes:
        step: of steps that follow each other.
        device: of single steps that the host has launched before the device begins; median.
        host: until a step returns, if nothing is queued; median.
        first: constructor and first step, compiling included.
    """

    step: Timing
    device: float
    host: float
    first: float

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "step": self.step._asdict()}


class Result(NamedTuple):
    """What was measured of a case.

    Attributes:
        tensors, numbers: how many there are.
        sets: how many sets of parameters took turns.
        moved: bytes that a step must read or write.
        floor: seconds that this takes at the bandwidth of a copy.
        times: by contender.
        note: what was left out.
    """

    case: Case
    tensors: int
    numbers: int
    sets: int
    moved: float
    floor: float
    times: dict[str, Times]
    note: str = ""

    def ratio(self, peer: str) -> float | None:
        """How many times longer a peer takes; None if it was not timed."""
        if peer not in self.times or OURS not in self.times:
            return None
        return self.times[peer].step.median / self.times[OURS].step.median

    @property
    def of_floor(self) -> float:
        """The share of a copy's bandwidth at which ours moves what must be moved."""
        return self.floor / self.times[OURS].step.median

    def to_json(self) -> dict[str, Any]:
        times = {name: each.to_json() for name, each in self.times.items()}
        return {**self._asdict(), "case": self.case.name, "times": times}


class Contender(NamedTuple):
    """How a contender makes an optimizer, and what its step is.

    Attributes:
        prepare: runs before each step, given the number of its set; it launches nothing.
    """

    make: Callable[[int], Callable[[], object]]
    prepare: Callable[[int], object] = lambda number: None


class Clock:
    """Times work on one device.

    Args:
        device: the device; on the CPU the host's clock is read, which only shows that the script works.
        is_quick: whether the copy is small.
    """

    def __init__(self, device: torch.device, is_quick: bool) -> None:
        self.device, self._is_cuda = device, device.type == "cuda"
        size = 2**16 if is_quick else COPY
        if self._is_cuda:
            size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
        self._source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self._fill()
        self._copy_seconds = self.elapsed(self._fill)
        times = [self.elapsed(self._several, ahead=1e-4) / COPIES for _ in range(3 if is_quick else 25)]
        self._copy_seconds = statistics.median(times)
        self.bandwidth = 2 * size / self._copy_seconds
        """Bytes read or written per second by a copy within the device's memory."""

    def _fill(self) -> None:
        self._target.copy_(self._source)

    def _several(self) -> None:
        for _ in range(COPIES):
            self._fill()

    def synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self.device)

    def elapsed(self, work: Callable[[], object], ahead: float = 0.0) -> float:
        """Seconds that ``work`` takes on the device, which is kept busy until the host is ``ahead`` seconds ahead."""
        self.synchronize()
        if not self._is_cuda:
            return self.host(work)
        for _ in range(math.ceil(ahead / self._copy_seconds) if ahead else 0):
            self._fill()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def host(self, work: Callable[[], object]) -> float:
        """Seconds until ``work`` returns; nothing is queued before."""
        self.synchronize()
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


class Runner:
    """Takes a contender's steps, from set to set."""

    def __init__(self, contender: Contender, sets: int, clock: Clock) -> None:
        self._contender, self._clock, self._numbers = contender, clock, cycle(range(sets))
        self._steps: dict[int, Callable[[], object]] = {}
        clock.synchronize()
        begin = time.perf_counter()
        self._one()
        clock.synchronize()
        self.first = time.perf_counter() - begin
        for _ in range(2 * sets):  # plans and tables are complete after the second step
            self._one()
        clock.synchronize()

    def _one(self) -> None:
        number = next(self._numbers)
        self._contender.prepare(number)
        if number not in self._steps:
            self._steps[number] = self._contender.make(number)
        self._steps[number]()

    def _several(self, steps: int) -> None:
        for _ in range(steps):
            self._one()

    def singles(self, steps: int) -> tuple[float, float]:
        """Host and device seconds of single steps, medians."""
        host = statistics.median(self._clock.host(self._one) for _ in range(steps))
        return host, statistics.median(self._clock.elapsed(self._one, ahead=1.5 * host) for _ in range(steps))

    def turn(self, steps: int) -> float:
        """Seconds of a step, among several that follow each other."""
        return self._clock.elapsed(partial(self._several, steps), ahead=1e-4) / steps


def time_contenders(contenders: Mapping[str, Contender], sets: int, plan: Plan, clock: Clock) -> dict[str, Times]:
    """Let the contenders take turns."""
    runners = {name: Runner(contender, sets, clock) for name, contender in contenders.items()}
    singles = {name: runner.singles(plan.warm) for name, runner in runners.items()}
    burst = {name: min(200, max(1, math.ceil(TURN / max(1e-9, *both)))) for name, both in singles.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    names, begin = list(runners), time.perf_counter()
    for number in range(plan.most):
        if number >= plan.fewest and time.perf_counter() - begin > plan.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(runners[name].turn(burst[name]))
    return {
        name: Times(Timing.of(seconds[name]), singles[name][1], singles[name][0], runners[name].first) for name in names
    }


def sets_for(size: int, device: torch.device) -> int:
    """How many sets of so many bytes exceed the second-level cache ``CACHES`` times."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE)
    return max(1, min(MOST_SETS, math.ceil(CACHES * cache / size)))


def free_memory(device: torch.device) -> int:
    """Bytes that a case may take."""
    if device.type != "cuda":
        return MEMORY
    gc.collect()
    torch.cuda.empty_cache()
    return min(MEMORY, int(0.95 * torch.cuda.mem_get_info(device)[0]))


def _adamw(name: str, case: Case, backend: BackendName, params: Sequence[Tensor]) -> Callable[[], object]:
    """The step of an AdamW."""
    options: dict[str, Any] = dict(STORED[case.stored])
    if case.clip:
        options["max_norm"] = 1.0
    if name == OURS:
        return descend.AdamW(params, **options, backend=backend).step
    step = torch.optim.AdamW(params, **{name: True}).step  # type: ignore[arg-type]
    if not case.clip:
        return step

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        step()

    return clip_and_step


def time_dense(
    case: Case, plan: Plan, clock: Clock, backend: BackendName, names: Sequence[str] = (OURS, FUSED, FOREACH)
) -> Result:
    """Time steps of AdamW, those of the contenders in ``names``.

    Raises:
        LeftOutError: if ours and the fused one do not fit into the memory.
    """
    sizes, dtype = plan.sizes(case.shape), DTYPES[case.dtype]
    numbers = sum(map(math.prod, sizes))
    bytes_of_one = numbers * dtype.itemsize
    sets, free = sets_for(4 * bytes_of_one, clock.device), free_memory(clock.device)
    names, note = list(names), ""

    def needed(names: Sequence[str]) -> int:
        # Parameters and gradients are shared; foreach makes about three more tensors of their size while it steps.
        return bytes_of_one * (sets * (2 + 2 * len(names)) + 3 * (FOREACH in names))

    if needed(names) > free:
        names.remove(FOREACH)
        note = "foreach left out: memory"
    if needed(names) > free:
        raise LeftOutError(f"needs {needed(names) / 2**30:.0f} GiB, {free / 2**30:.0f} GiB may be taken")
    all_params = []
    for _ in range(sets):
        params = [torch.randn(size, dtype=dtype, device=clock.device).mul_(0.02).requires_grad_() for size in sizes]
        for param in params:
            param.grad = torch.randn_like(param).mul_(1e-3)
        all_params.append(params)

    def made(name: str, number: int) -> Callable[[], object]:
        return _adamw(name, case, backend, all_params[number])

    times = time_contenders({name: Contender(partial(made, name)) for name in names}, sets, plan, clock)
    state_bytes = STATE_IN_8_BITS * numbers if case.stored.startswith("8bit") else 2 * bytes_of_one
    moved = bytes_moved(bytes_of_one, round(state_bytes), case.clip)
    return Result(case, len(sizes), numbers, sets, moved, moved / clock.bandwidth, times, note)


def time_offloaded(case: Case, plan: Plan, clock: Clock) -> Result:
    """Time steps of AdamW with state in the host's memory, against torch's fused one there between two copies.

    Raises:
        LeftOutError: if parameters and gradients do not fit into the memory.
    """
    sizes, dtype = plan.sizes(case.shape), DTYPES[case.dtype]
    numbers, is_cuda = sum(map(math.prod, sizes)), clock.device.type == "cuda"
    size, free = numbers * dtype.itemsize, free_memory(clock.device)
    if 2 * size > free:
        raise LeftOutError(f"needs {2 * size / 2**30:.0f} GiB, {free / 2**30:.0f} GiB may be taken")
    params = [torch.randn(each, dtype=dtype, device=clock.device).mul_(0.02).requires_grad_() for each in sizes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)

    def one_after_the_other(number: int) -> Callable[[], object]:
        copies = [torch.empty_like(param, device="cpu", pin_memory=is_cuda).copy_(param.detach()) for param in params]
        for copy in copies:
            copy.grad = torch.empty_like(copy, pin_memory=is_cuda)
        inner = torch.optim.AdamW(copies, fused=True)
        grads = [copy.grad for copy in copies if copy.grad is not None]

        @torch.no_grad()
        def step() -> None:
            for grad, param in zip(grads, params, strict=True):
                assert param.grad is not None
                grad.copy_(param.grad, non_blocking=True)
            clock.synchronize()
            inner.step()
            for copy, param in zip(copies, params, strict=True):
                param.copy_(copy, non_blocking=True)

        return step

    contenders = {
        OURS: Contender(lambda number: descend.AdamW(params, state_device="cpu").step),
        TORCH: Contender(one_after_the_other),
    }
    times = time_contenders(contenders, 1, plan, clock)
    source = torch.empty(min(size, COPY), dtype=torch.uint8, pin_memory=is_cuda)
    there = torch.empty_like(source, device=clock.device)
    seconds = statistics.median(clock.elapsed(lambda: there.copy_(source, non_blocking=True)) for _ in range(5))
    return Result(
        case, len(sizes), numbers, 1, size, size * seconds / len(source), times, "floor: one way over the bus"
    )


def draw_lookups(lookups: str, rows: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Row numbers, int64: uniform, or the row of rank r with a probability proportional to r**-1.2."""
    if lookups == "uniform":
        return torch.randint(rows, shape, device=device)
    cumulative = torch.arange(1, rows + 1, dtype=torch.float64, device=device).pow_(-ZIPF).cumsum_(0)
    drawn = torch.rand(shape, dtype=torch.float64, device=device) * cumulative[-1]
    ranks = torch.searchsorted(cumulative, drawn).clamp_(max=rows - 1)
    return torch.randperm(rows, device=device)[ranks]


def time_sparse(case: Case, plan: Plan, clock: Clock, backend: BackendName) -> Result:
    """Time steps of SparseAdam on a table of 10 M rows of 64 numbers, 65,536 of them looked up.

    Gradients are as the backward pass of ``nn.Embedding`` leaves them: not coalesced. Another one comes at each step.

    Raises:
        LeftOutError: if the table does not fit into the memory.
    """
    rows, dims, lookups = (10_000_000, 64, 65_536) if plan.shrink == 1 else (100, 4, 20)
    dtype, sets, free = DTYPES[case.dtype], 8, free_memory(clock.device)
    needed = dtype.itemsize * (5 * rows * dims + 3 * sets * lookups * dims) + 40 * rows
    if needed > free:
        raise LeftOutError(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB may be taken")
    indices = draw_lookups(case.shape, rows, (sets, lookups), clock.device)
    param = torch.full((rows, dims), 0.1, dtype=dtype, device=clock.device).requires_grad_()
    grads = [
        torch.sparse_coo_tensor(
            each[None],
            torch.randn(lookups, dims, dtype=dtype, device=clock.device),
            param.shape,
            check_invariants=False,
        )
        for each in indices
    ]
    distinct = statistics.mean(len(torch.unique(each)) for each in indices)
    turns = count()

    def look_up(number: int) -> None:
        param.grad = grads[next(turns) % sets]

    contenders = {
        OURS: Contender(lambda number: descend.SparseAdam([param], backend=backend).step, look_up),
        TORCH: Contender(lambda number: torch.optim.SparseAdam([param]).step, look_up),
    }
    times = time_contenders(contenders, 1, plan, clock)
    moved = dtype.itemsize * dims * (6 * distinct + lookups) + 8 * lookups
    return Result(case, 1, rows * dims, sets, moved, moved / clock.bandwidth, times, f"{distinct:,.0f} distinct rows")


def time_case(case: Case, plan: Plan, clock: Clock, backend: BackendName) -> Result:
    """Time one case."""
    if case.is_sparse:
        return time_sparse(case, plan, clock, backend)
    if case.offload:
        return time_offloaded(case, plan, clock)
    with suppress(torch.cuda.OutOfMemoryError):
        return time_dense(case, plan, clock, backend)
    return time_dense(case, plan, clock, backend, (OURS, FUSED))._replace(note="foreach left out: out of memory")


# Figures to reach.


class Figure(NamedTuple):
    """A figure to reach on a GPU of the class of an H100.

    Attributes:
        says: what it is about.
        cases: names of its cases; the worst counts.
        against: the contender that ours is to be faster than; None for the share of a copy's bandwidth.
        bound: how many times faster at least, or the least share.
    """

    says: str
    cases: tuple[str, ...]
    against: str | None
    bound: float

    def measured(self, results: Mapping[str, Result]) -> float | None:
        """The worst of its cases; None unless all were timed."""
        found = [results[name] for name in self.cases if name in results]
        values = [each.of_floor if self.against is None else each.ratio(self.against) for each in found]
        present = [value for value in values if value is not None]
        return min(present) if len(present) == len(self.cases) else None

    def to_json(self, results: Mapping[str, Result]) -> dict[str, Any]:
        measured = self.measured(results)
        return {**self._asdict(), "measured": measured, "reached": None if measured is None else measured >= self.bound}


_TABLES = tuple(Case(lookups, "float32").name for lookups in ("uniform", "zipf"))
FIGURES = (
    Figure("AdamW float32, 1 B: share of a copy's bandwidth", ("adamw-float32-1B-plain",), None, 0.92),
    Figure("AdamW float32, 1 B: torch fused", ("adamw-float32-1B-plain",), FUSED, 1.0),
    Figure("clipped at 1.0: clip_grad_norm_ + fused", ("adamw-float32-1B-clip",), FUSED, 1.4),
    Figure("1,000 x 1,000: torch fused", ("adamw-float32-1000x1000-plain",), FUSED, 2.0),
    Figure("1,000 x 1,000, clipped: clip_grad_norm_ + fused", ("adamw-float32-1000x1000-clip",), FUSED, 4.0),
    Figure("SparseAdam, 10 M x 64, 65,536 lookups: torch", _TABLES, TORCH, 5.0),
)


def run_cases(
    cases: Sequence[Case], plan: Plan, clock: Clock, backend: BackendName, deadline: float
) -> Iterator[tuple[Case, Result | str]]:
    """Time one case after the other; yield what was measured, or why it was left out.

    Args:
        deadline: time of ``time.perf_counter`` after which no case begins.
    """
    for case in cases:
        try:
            if time.perf_counter() > deadline:
                raise LeftOutError("no time was left")
            yield case, time_case(case, plan, clock, backend)
        except LeftOutError as reason:
            yield case, str(reason)
        except torch.cuda.OutOfMemoryError:
            yield case, "out of memory"
        except Exception as error:
            yield case, f"failed: {type(error).__name__}: {error}".splitlines()[0]
