"""What is timed, and how: the shapes, the contenders of a case, and the interleaved clock.

How the times are made comparable:

- **Interleaved.** All contenders of a case live in one process and take turns in rounds, so that a
  slow minute of the machine hits each of them. Who goes first rotates from round to round.
- **Bursts.** A turn is several steps in a row. An optimizer that trains alone finds in the caches
  what its last step left there, and its worker threads awake; right after another contender it
  finds neither. So the first steps of a turn are not counted. The huge shapes take one step a turn,
  and it counts: no cache holds them.
- **Pacing.** Everyone has the same share of wall time. A contender too slow for a turn in every
  round has fewer turns, at even distances over all rounds, but no fewer than ``FEWEST_TURNS``.
- **Own tensors.** Each contender has its own parameters, gradients and state, equal at the start.
- **Fresh gradients** are allocated before every step, outside the clock and in backward's order
  (last parameter first), while the old ones are still alive: every address differs from the step
  before. After ``zero_grad(set_to_none=True)`` and a backward pass most of them do.
- **Clipping peers write to their gradients**, ours does not. With fixed gradients the peers' norm
  is therefore 1 from the second step on. Their work stays the same: ``clip_grad_norm_`` multiplies
  whatever the norm is, and no number gets so small that arithmetic on it slows down.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import descend

OURS = "ours"
DEFAULT = "default"
FOREACH = "foreach"
FUSED = "fused"
UNPLANNED = "unplanned"
"""Ours, with a parameter that moves before every step: no step can use the plan of the one before."""

# torch's default on the CPU is its for-loop; asking for it keeps that so in other versions.
PEERS: dict[str, dict[str, Any]] = {
    DEFAULT: {"foreach": False, "fused": False},
    FOREACH: {"foreach": True},
    FUSED: {"fused": True},
}
MAX_NORM = 1.0
FEWEST_TURNS = 3


class Shape(NamedTuple):
    """A model seen by an optimizer: the sizes of its parameters, and how long a turn is.

    Attributes:
        sizes: one per parameter, in the model's order.
        burst: steps in a turn.
        uncounted: the first steps of a turn, which only restore caches and threads.
    """

    sizes: tuple[tuple[int, ...], ...]
    burst: int
    uncounted: int

    @property
    def numel(self) -> int:
        return sum(torch.Size(size).numel() for size in self.sizes)

    def cut(self, tensors: int, rows: int) -> Shape:
        """The first tensors, with at most so many rows each: small enough for a smoke test."""
        sizes = tuple((min(size[0], rows), *size[1:]) for size in self.sizes[:tensors])
        return Shape(sizes, burst=1, uncounted=0)


def gpt2_sizes(width: int = 768, blocks: int = 12) -> tuple[tuple[int, ...], ...]:
    """GPT-2 small, 148 tensors, 124 M numbers; the output layer shares the token embedding.

    Source: Radford et al. 2019, https://github.com/openai/gpt-2.
    """
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *blocks * (*norm, *attention, *norm, *mlp), *norm)


def resnet50_sizes() -> tuple[tuple[int, ...], ...]:
    """ResNet-50, 161 tensors, 25.6 M numbers.

    Source: He et al. 2016, Table 1, https://arxiv.org/abs/1512.03385.
    """

    def convolution(outputs: int, inputs: int, kernel: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # and its batch norm

    sizes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += convolution(width, inputs, 1)
            sizes += convolution(width, width, 3)
            sizes += convolution(4 * width, width, 1)
            if block == 0:
                sizes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return (*sizes, (1000, 2048), (1000,))


def odd_sizes() -> tuple[tuple[int, ...], ...]:
    """Three hundred small tensors of ten shapes, none a power of two, 0.25 M numbers."""
    shapes = ((7, 13), (129,), (33, 65), (1001,), (3, 5, 7), (255,), (63, 17), (1,), (31, 3, 3, 3), (2049,))
    return 30 * shapes


SHAPES = {
    "64M": Shape(((64 * 2**20,),), burst=1, uncounted=0),
    "gpt2": Shape(gpt2_sizes(), burst=1, uncounted=0),
    "resnet50": Shape(resnet50_sizes(), burst=4, uncounted=1),
    "1000x1000": Shape(1000 * ((1000,),), burst=10, uncounted=3),
    "mlp": Shape(((32, 16), (32,), (32, 32), (32,), (10, 32), (10,)), burst=20, uncounted=5),
    # A step a turn: the peers take theirs in between, and leave nothing of ours in the caches.
    "1000x1000cold": Shape(1000 * ((1000,),), burst=1, uncounted=0),
    "300odd": Shape(odd_sizes(), burst=1, uncounted=0),
    # One number per tensor: what is left is the time spent in Python, per step and per tensor.
    "1000x1": Shape(1000 * ((1,),), burst=10, uncounted=3),
    "6x1": Shape(6 * ((1,),), burst=20, uncounted=5),
}
MODEL_SHAPES = ("64M", "gpt2", "resnet50", "1000x1000", "mlp")
ROW_SHAPES = ("gpt2", "1000x1000")
COLD_SHAPES = ("1000x1000cold", "300odd")
PYTHON_SHAPES = ("1000x1", "6x1")


class Method(NamedTuple):
    """An optimizer.

    Attributes:
        name: of its class, here and in torch.
        traffic: how many numbers a step reads or writes for each number of the parameter.
        peers: the ways in which torch runs it.
        yardstick: the class in torch to time it against, where torch has none of this name.
    """

    name: str
    options: dict[str, Any]
    traffic: int
    peers: tuple[str, ...] = (DEFAULT, FOREACH)
    yardstick: str | None = None


EVERY_PEER = (DEFAULT, FOREACH, FUSED)
METHODS = {
    # Reads param, grad, exp_avg, exp_avg_sq; writes all but grad.
    "adamw": Method("AdamW", {}, traffic=7, peers=EVERY_PEER),
    "adam": Method("Adam", {}, traffic=7, peers=EVERY_PEER),
    # Reads param, grad, momentum_buffer; writes all but grad.
    "sgd": Method("SGD", {"momentum": 0.9}, traffic=5, peers=EVERY_PEER),
    # The same with one or two state tensors of other names.
    "nadam": Method("NAdam", {}, traffic=7),
    "radam": Method("RAdam", {}, traffic=7),
    "adamax": Method("Adamax", {}, traffic=7),
    "adadelta": Method("Adadelta", {}, traffic=7),
    "rprop": Method("Rprop", {}, traffic=7),
    "adagrad": Method("Adagrad", {}, traffic=5, peers=EVERY_PEER),
    "rmsprop": Method("RMSprop", {}, traffic=5),
    "asgd": Method("ASGD", {}, traffic=5),
    "lion": Method("Lion", {}, traffic=5, peers=EVERY_PEER, yardstick="AdamW"),
    "adamwschedulefree": Method("AdamWScheduleFree", {}, traffic=7, peers=EVERY_PEER, yardstick="AdamW"),
}
# Timed on every shape and dtype, with and without clipping; the others on float32 in the two shapes that differ most.
THOROUGH = ("adamw", "adam", "sgd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """One line of the table. The dtype is that of parameters, gradients and state."""

    shape: str
    dtype: str
    method: str
    clip: bool
    fresh: bool

    @property
    def name(self) -> str:
        clip = "clip" if self.clip else "plain"
        grads = "fresh" if self.fresh else "fixed"
        return f"{self.method}-{self.dtype}-{self.shape}-{clip}-{grads}"

    def bytes_moved(self, shape: Shape) -> int:
        """Bytes that a step has to move, whoever takes it.

        ``numel * itemsize * traffic``. With two state tensors, as in Adam, a step reads param,
        grad and state and writes all but grad: 7. With one, as in SGD with momentum: 5. Clipping
        reads grad once more, as the norm has to be known before the first parameter moves.
        """
        traffic = METHODS[self.method].traffic + self.clip
        return shape.numel * DTYPES[self.dtype].itemsize * traffic


class Timing(NamedTuple):
    """Seconds: median and quartiles, and how many steps they come from."""

    median: float
    quartile1: float
    quartile3: float
    steps: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        quartile1, median, quartile3 = np.percentile(seconds, (25, 50, 75)).tolist()
        return cls(median, quartile1, quartile3, len(seconds))


class Pace(NamedTuple):
    """How long a case runs: rounds, and each contender's share of wall time in seconds."""

    rounds: int
    share: float


def keep_gradients() -> None:
    """Prepare a step that needs no preparation."""


class Contender(NamedTuple):
    """``step`` is timed; ``prepare`` runs before each step, outside the clock."""

    step: Callable[[], object]
    prepare: Callable[[], None] = keep_gradients

    def turn(self, shape: Shape) -> list[float]:
        """Run one burst; return the seconds of the steps that count."""
        seconds = []
        for _ in range(shape.burst):
            self.prepare()
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        return seconds[shape.uncounted :]


def interleave(contenders: dict[str, Contender], shape: Shape, pace: Pace) -> dict[str, Timing]:
    """Time the contenders in turns.

    Each begins with two turns that do not count: the first makes its state and its kernels, the
    second tells how long a turn is.
    """
    turns: dict[str, int] = {}
    for name, contender in contenders.items():
        contender.turn(shape)
        begin = time.perf_counter()
        contender.turn(shape)
        affordable = int(pace.share / (time.perf_counter() - begin))
        turns[name] = min(max(affordable, FEWEST_TURNS), pace.rounds)

    names = list(contenders)
    taken = dict.fromkeys(names, 0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(pace.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if taken[name] * pace.rounds <= number * turns[name]:
                seconds[name] += contenders[name].turn(shape)
                taken[name] += 1
    return {name: Timing.of(seconds[name]) for name in names}


def reallocate_gradients(params: list[Tensor], values: list[Tensor]) -> None:
    """Give each parameter a new gradient with the given value."""
    grads = [value.clone() for value in reversed(values)]
    for param, grad in zip(reversed(params), grads, strict=True):
        param.grad = grad


def prepare_and_move(prepare: Callable[[], None], param: Tensor) -> None:
    prepare()
    param.data = param.data.clone()


def clip_and_step(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
    optimizer.step()


def contender(name: str, case: Case, values: list[Tensor]) -> Contender:
    """One optimizer with parameters, gradients and state of its own.

    Args:
        name: ``OURS``, ``UNPLANNED`` or one of ``PEERS``.
        values: what the parameters start from, and the value of the gradients; read only.
    """
    params = [value.clone().requires_grad_() for value in values]
    reallocate_gradients(params, values)
    prepare = partial(reallocate_gradients, params, values) if case.fresh else keep_gradients
    method = METHODS[case.method]
    if name in (OURS, UNPLANNED):
        max_norm = MAX_NORM if case.clip else None
        ours = getattr(descend, method.name)(params, **method.options, max_norm=max_norm)
        return Contender(ours.step, prepare if name == OURS else partial(prepare_and_move, prepare, params[0]))
    peer = getattr(torch.optim, method.yardstick or method.name)(params, **method.options, **_flags(method, name))
    step = partial(clip_and_step, params, peer) if case.clip else peer.step
    return Contender(step, prepare)


def _flags(method: Method, peer: str) -> dict[str, Any]:
    """What makes torch run a method in one of its ways; most have no ``fused`` to turn off."""
    return {flag: value for flag, value in PEERS[peer].items() if flag != "fused" or FUSED in method.peers}


def draw_values(shape: Shape, dtype: str) -> list[Tensor]:
    """Normal numbers, the same for every contender and run: a norm far above ``MAX_NORM``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in shape.sizes]


def time_case(
    case: Case, shape: Shape, values: list[Tensor], pace: Pace, names: Sequence[str] = ()
) -> dict[str, Timing]:
    """Time the contenders of these names (default: ours and every peer) on one case, and give the memory back."""
    gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
    contenders = {name: contender(name, case, values) for name in names or (OURS, *METHODS[case.method].peers)}
    timings = interleave(contenders, shape, pace)
    contenders.clear()
    gc.collect()  # gigabytes must not wait for it, should an optimizer be in a reference cycle
    return timings


def time_training(pace: Pace) -> dict[str, Timing]:
    """Time whole training steps of a small transformer: forward, backward, clip, step."""
    batch, length, vocabulary = 4, 64, 128
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)

    def trainer(name: str) -> Contender:
        torch.manual_seed(0)
        model = small_transformer(vocabulary, width=128, layers=6)
        params = list(model.parameters())
        if name == OURS:
            ours = descend.AdamW(params, max_norm=MAX_NORM)
            zero_grad, update = ours.zero_grad, ours.step
        else:
            peer = torch.optim.AdamW(params, **PEERS[name])
            zero_grad, update = peer.zero_grad, partial(clip_and_step, params, peer)

        def train() -> None:
            zero_grad()
            scores = model(tokens[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            update()

        return Contender(train)

    contenders = {name: trainer(name) for name in (OURS, DEFAULT, FUSED)}
    return interleave(contenders, Shape((), burst=4, uncounted=1), pace)


def small_transformer(vocabulary: int, width: int, layers: int) -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return torch.nn.Sequential(torch.nn.Embedding(vocabulary, width), encoder, torch.nn.Linear(width, vocabulary))


def copy_bandwidth(numel: int, repeats: int) -> float:
    """Bytes per second that torch reads and writes when it copies one float32 tensor to another.

    Not an upper limit: a copy also fetches what it overwrites, which is counted for neither a copy
    nor a step, and weighs more in a copy.
    """
    source, target = torch.ones(numel), torch.zeros(numel)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / Timing.of(seconds).median
