"""What ``distributed.py`` times on each rank: models whose parameters lie on ranks, contenders, and the clock.

How the times are made comparable (the rest is as in ``descend.bench``):

- **All ranks begin at the same instant**; a step takes as long as on the slowest of them. The first rotates. A barrier
  alone lets ranks go up to milliseconds apart, which a step that reduces something would have to wait for.
- **CPU time** is that of the whole process, other threads included: what a step costs where waiting for other ranks,
  or for a core that somebody else uses, does not count.
- **Gradients** come in four ways. "fixed": the same objects at every step. "fsdp": new DTensors with the spec object of
  their parameter, as FSDP2 makes them. "from_local": new ones by ``DTensor.from_local``, each with a spec of its own.
  "backward": a real backward pass under DDP. All but "fixed" have new memory at every step.
- **Caches.** "hot": the steps of a turn follow each other, and the first do not count. "cold": 64 MB are written before
  each step. Both follow a collective, during which some of Python has left the caches already.
- **Bytes sent** are those on the process's TCP connections, with everything that gloo adds; the largest of the ranks.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from contest import MAX_NORM, small_transformer
from process_group import Collectives, from_all, from_rank_0, sent_on_sockets
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import descend
from descend.bench.clock import FEWEST_TURNS, Pace, Timing, keep_gradients
from descend.bench.contenders import clip_and_step
from descend.bench.methods import FOREACH, FUSED, OURS, PEERS
from descend.bench.shapes import gpt2_sizes, resnet50_sizes

SMALL = (32, 16)
COUNTED_STEPS = 4
HEAD_START = 0.005  # seconds until all ranks have heard when to begin
_SWEPT = 16 * 2**20  # float32 numbers, 64 MB


class Case(NamedTuple):
    """One line of a table.

    Attributes:
        model: ``gpt2`` under FSDP2; ``ddp``, a small transformer; ``zero1``, ResNet-50 with ``shard_state`` against
            ``ZeroRedundancyOptimizer``; ``dtensors`` and how many, ``x1`` for one number in each on each rank.
        grads: how gradients come, see above.
    """

    model: str
    clip: bool
    grads: str
    cold: bool
    ranks: int

    @property
    def name(self) -> str:
        clip, cache = "clip" if self.clip else "plain", "cold" if self.cold else "hot"
        return f"{self.model}-{clip}-{self.grads}-{cache}-{self.ranks}"

    @property
    def peers(self) -> tuple[str, ...]:
        return (FUSED,) if self.model == "zero1" else (FOREACH, FUSED)


class Turn(NamedTuple):
    """Steps in a turn, and how many of the first do not count."""

    burst: int
    uncounted: int


class Measured(NamedTuple):
    """One contender's steps.

    Attributes:
        wall, cpu: seconds of a step, on the slowest rank.
        first: seconds of the first step.
        collectives, payload: of one step: how many, and the bytes of the tensors passed to them.
        sent: bytes that a rank sends in one step; None where that cannot be told.
    """

    wall: Timing
    cpu: Timing
    first: float
    collectives: int
    payload: int
    sent: float | None


class Memory(NamedTuple):
    """The state of an optimizer on the rank that has most of it.

    Attributes:
        state: bytes of all state tensors.
        peak: by how many bytes the first three steps made the process grow.
    """

    state: int
    peak: int


class Contender(NamedTuple):
    """``step`` is timed; ``prepare`` runs before each step, outside the clock."""

    step: Callable[[], object]
    prepare: Callable[[], None] = keep_gradients


# Models.


def small_dtensors(count: int, size: tuple[int, ...], mesh: DeviceMesh) -> list[Tensor]:
    """Parameters cut by rows, evenly or not."""
    rows = [len(part) for part in torch.arange(size[0]).tensor_split(mesh.size())]
    generator = torch.Generator().manual_seed(mesh.get_rank())
    stride = torch.empty(size, device="meta").stride()
    params: list[Tensor] = []
    for _ in range(count):
        local = torch.randn(rows[mesh.get_rank()], *size[1:], generator=generator)
        params.append(nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(size), stride=stride)))
    return params


class _Weights(nn.Module):
    """Parameters of the given sizes, without memory."""

    def __init__(self, sizes: Iterable[Sequence[int]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(*size, device="meta")) for size in sizes])


def fsdp_gpt2(width: int, blocks: int, mesh: DeviceMesh) -> list[Tensor]:
    """The parameters of GPT-2 as ``fully_shard`` makes them, block by block."""
    sizes = gpt2_sizes(width, blocks)
    each = (len(sizes) - 4) // blocks  # two embeddings before the blocks, a norm of two tensors behind them
    model = _Weights([*sizes[:2], *sizes[-2:]])
    model.blocks = nn.ModuleList(
        [_Weights(sizes[2 + each * block : 2 + each * (block + 1)]) for block in range(blocks)]
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(mesh.get_rank())
    params: list[Tensor] = list(model.parameters())
    for param in params:
        inner(param).normal_(generator=generator)
    return params


def inner(tensor: Any) -> Tensor:
    """The plain tensor on this rank."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def whole_params(sizes: Iterable[Sequence[int]]) -> list[Tensor]:
    """The same plain parameters on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator).requires_grad_() for size in sizes]


def renew_gradients(params: Sequence[Any], values: Sequence[Tensor], way: str) -> None:
    """Give each parameter a new gradient with the given local values, in backward's order."""
    grads = [value.clone() for value in reversed(values)]
    for param, grad in zip(reversed(params), grads, strict=True):
        if not isinstance(param, DTensor):
            param.grad = grad
        elif way == "from_local":
            param.grad = DTensor.from_local(
                grad, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
            )
        else:
            param.grad = DTensor(grad, param._spec, requires_grad=False)  # type: ignore[no-untyped-call]


class Job(NamedTuple):
    """Parameters of one contender, and what prepares a step."""

    params: list[Tensor]
    prepare: Callable[[], None]


def job(case: Case, shrink: int) -> Job:
    """The model of a case; a large ``shrink`` leaves just enough for a smoke test."""
    if case.model == "ddp":
        return _ddp_job(shrink)
    mesh = init_device_mesh("cpu", (case.ranks,))
    if case.model == "gpt2":
        params = fsdp_gpt2(768 // shrink, blocks=max(1, 12 // shrink), mesh=mesh)
    elif case.model == "zero1":
        params = whole_params(resnet50_sizes()[: 161 // shrink])
    else:
        count, _, size = case.model.removeprefix("dtensors").partition("x")
        params = small_dtensors(int(count) // shrink, (case.ranks * int(size),) if size else SMALL, mesh)
    values = [inner(param).clone() for param in params]
    renew_gradients(params, values, "fsdp")
    renew = partial(renew_gradients, params, values, case.grads)
    return Job(params, keep_gradients if case.grads == "fixed" else renew)


def _ddp_job(shrink: int) -> Job:
    batch, length, vocabulary = 4, 64, 128
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    torch.manual_seed(0)
    model = DistributedDataParallel(small_transformer(vocabulary, width=128 // shrink, layers=6))

    def train() -> None:
        model.zero_grad()
        scores = model(tokens[:, :-1]).flatten(0, 1)
        nn.functional.cross_entropy(scores, tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]

    return Job(list(model.parameters()), train)


def contender(name: str, case: Case, shrink: int) -> Contender:
    """One optimizer with parameters, gradients and state of its own."""
    params, prepare = job(case, shrink)
    if name == OURS:
        options: dict[str, Any] = {"shard_state": dist.group.WORLD} if case.model == "zero1" else {}
        max_norm = MAX_NORM if case.clip else None
        return Contender(descend.AdamW(params, max_norm=max_norm, **options).step, prepare)
    peer: torch.optim.Optimizer
    if case.model == "zero1":
        peer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, fused=True)
    else:
        peer = torch.optim.AdamW(params, **PEERS[name])
    return Contender(partial(clip_and_step, params, peer, MAX_NORM) if case.clip else peer.step, prepare)


# The clock.


class Seconds(NamedTuple):
    """Wall and CPU time of one step on this rank."""

    wall: float
    cpu: float


def turn(contender: Contender, steps: int, sweep: Tensor | None) -> list[Seconds]:
    """Run some steps, all ranks at once."""
    seconds = []
    for _ in range(steps):
        contender.prepare()
        if sweep is not None:
            sweep.add_(1)
        begin_together()
        cpu, begin = time.process_time(), time.perf_counter()
        contender.step()
        end = time.perf_counter()
        seconds.append(Seconds(end - begin, time.process_time() - cpu))
    return seconds


def begin_together() -> None:
    """Return at the same instant on all ranks."""
    start = torch.tensor(time.perf_counter() + HEAD_START, dtype=torch.float64)  # one clock for all of a machine
    dist.broadcast(start, 0)
    instant = start.item()
    while time.perf_counter() < instant:
        pass


def traffic(contender: Contender) -> tuple[int, int, float | None]:
    """Collectives, their payload, and bytes sent, of one step on this rank."""
    sent: list[int] = []
    for _ in range(COUNTED_STEPS):
        contender.prepare()
        dist.barrier()
        time.sleep(0.01)  # what the barrier has sent is not to be counted
        before = sent_on_sockets()
        contender.step()
        after = sent_on_sockets()
        if before is not None and after is not None:
            sent.append(after - before)
    contender.prepare()
    with Collectives() as collectives:
        contender.step()
    return collectives.count, collectives.payload, fmean(sent) if sent else None


def time_case(case: Case, length: Turn, pace: Pace, shrink: int) -> dict[str, Measured]:
    """Time the contenders of a case in turns. Every rank calls this; rank 0 returns what counts for all."""
    gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
    contenders = {name: contender(name, case, shrink) for name in (OURS, *case.peers)}
    sweep = torch.zeros(_SWEPT // shrink) if case.cold else None
    firsts, turns, sent = {}, {}, {}
    for name, runner in contenders.items():
        firsts[name] = turn(runner, 1, sweep)[0].wall
        sent[name] = traffic(runner)
        begin = time.perf_counter()
        turn(runner, length.burst, sweep)
        affordable = from_rank_0(int(pace.share / (time.perf_counter() - begin)))
        turns[name] = min(max(affordable, FEWEST_TURNS), pace.rounds)

    names, taken = list(contenders), dict.fromkeys(contenders, 0)
    seconds: dict[str, list[Seconds]] = {name: [] for name in names}
    for number in range(pace.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if taken[name] * pace.rounds <= number * turns[name]:
                seconds[name] += turn(contenders[name], length.burst, sweep)[length.uncounted :]
                taken[name] += 1
    return {name: _of_all_ranks(seconds[name], firsts[name], sent[name]) for name in names}


def _of_all_ranks(seconds: list[Seconds], first: float, sent: tuple[int, int, float | None]) -> Measured:
    """Each step as long as on the slowest rank."""
    by_rank = from_all((seconds, first, sent))
    steps = [*zip(*(steps for steps, _, _ in by_rank), strict=True)]
    bytes_sent = [sent for _, _, (_, _, sent) in by_rank]
    return Measured(
        Timing.of([max(seconds.wall for seconds in step) for step in steps]),
        Timing.of([max(seconds.cpu for seconds in step) for step in steps]),
        max(first for _, first, _ in by_rank),
        max(count for _, _, (count, _, _) in by_rank),
        max(payload for _, _, (_, payload, _) in by_rank),
        None if None in bytes_sent else max(bytes_sent),
    )


# Memory.


def measure_state(model: str, shards: bool, shrink: int) -> Memory:
    """Take three steps of AdamW, with ``shard_state`` or with all state on each rank. Every rank calls this."""
    options: dict[str, Any] = {"shard_state": dist.group.WORLD if shards else None}
    _steps(whole_params([SMALL]), options)  # loads the kernels
    sizes = gpt2_sizes(768 // shrink, max(1, 12 // shrink)) if model == "gpt2" else resnet50_sizes()[: 161 // shrink]
    params = whole_params(sizes)
    before = resident() + sum(param.nbytes for param in params)  # and their gradients
    optimizer = _steps(params, options)
    grown = peak_resident() - before
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    return Memory(max(from_all(sum(inner(tensor).nbytes for tensor in tensors))), max(from_all(grown)))


def _steps(params: list[Tensor], options: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer = descend.AdamW(params, **options)
    for param in params:
        param.grad = param.detach().clone()
    for _ in range(3):
        optimizer.step()
    return optimizer


def resident() -> int:
    """Bytes of memory that the process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes of memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
