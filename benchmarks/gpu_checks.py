"""What ``gpu.py`` checks before it times anything: whether a device computes what float64 computes on the CPU.

References are torch.optim in float64, formulas written out here, or the eager backend in float64. Inputs are random and
new in every run. Tensors lie between bytes that nobody may write.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

import descend
from descend.core.options import BackendName, Nonfinite
from descend.ops import sign, where

HOST_LIMIT = 150e-6
"""Seconds that a step of 1,000 tensors may cost the host."""
GUARD = 64
"""Numbers on either side of a guarded tensor."""
WARM, REPLAYS = 3, 5
"""Steps before a graph is captured, and replays of it."""
LARGE = 2**31 + 17
"""Numbers of a tensor whose offsets need 64 bits."""
SAMPLE = 4096
"""Numbers at either end of the large tensor that are compared."""


class WrongError(Exception):
    """The device computed something else, or did what it must not do."""


class NotApplicableError(Exception):
    """The check makes no sense on this device."""


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Args:
        device: of the tensors.
        backend: what ``backend=`` is given.
        is_quick: whether sizes are cut down, for Triton's interpreter.
        random: where inputs come from, on the CPU.
    """

    device: torch.device
    backend: BackendName
    is_quick: bool
    random: torch.Generator

    def draw(self, *shape: int) -> Tensor:
        """Random numbers in float64 on the CPU."""
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def needs_cuda(self, what: str) -> None:
        """Raise ``NotApplicableError`` on another device."""
        if self.device.type != "cuda":
            raise NotApplicableError(f"{what} need a CUDA device")

    def leaves(self, values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Parameters on the device, with copies of these values."""
        return [value.to(self.device, dtype, copy=True).requires_grad_() for value in values]


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to numbers above 1 and absolute below; NaN if either has one."""
    found, wanted = (tensor.detach().to("cpu", torch.float64).reshape(-1) for tensor in (found, wanted))
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1.0)).max()) if len(wanted) else 0.0


def within(what: str, found: float, limit: float) -> float:
    """Return ``found``; raise ``WrongError`` unless it is at most ``limit``. NaN is not."""
    if not found <= limit:
        raise WrongError(f"{what}: {found:.2g}, allowed {limit:.2g}")
    return found


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Set copies of ``grads``, in each parameter's dtype and on its device."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.device, param.dtype, copy=True)


def bits(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and their state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return [tensor.detach().clone() for tensor in (*params, *(value for value in state if isinstance(value, Tensor)))]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether all bits are equal."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# The default backend.


def default_backend(place: Place) -> str:
    """Which backend takes dense parameters of each dtype."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    params = [torch.zeros(5, dtype=dtype, device=place.device, requires_grad=True) for dtype in dtypes]
    placements = descend.AdamW(params, backend=place.backend).backends()
    found = sorted({f"{each.backend} ({each.reason})" for each in placements})
    if place.device.type == "cuda" and {each.backend for each in placements} != {"triton"}:
        raise WrongError(", ".join(found))
    return ", ".join(found)


# Rules.


class Rule(NamedTuple):
    """An optimizer and its options; torch has one of the same name unless ``is_ours``."""

    name: str
    options: dict[str, Any]
    is_ours: bool = False


RULES = (
    Rule("SGD", dict(lr=0.1, weight_decay=0.1)),
    Rule("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    Rule("Adam", dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
    Rule("AdamW", dict(lr=0.01, weight_decay=0.1)),
    Rule("NAdam", dict(lr=0.01, weight_decay=0.1)),
    Rule("RAdam", dict(lr=0.01, weight_decay=0.1)),
    Rule("Adamax", dict(lr=0.01, weight_decay=0.1)),
    Rule("Adagrad", dict(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2)),
    Rule("Adadelta", dict(weight_decay=0.1)),
    Rule("RMSprop", dict(lr=0.01, alpha=0.5, centered=True, momentum=0.5)),
    Rule("Rprop", dict(lr=0.1)),
    Rule("ASGD", dict(lr=0.1, lambd=0.1, t0=1)),
    Rule("Lion", dict(lr=0.01, betas=(0.5, 0.75), weight_decay=0.1), is_ours=True),
    Rule("AdamWScheduleFree", dict(lr=0.1, weight_decay=0.1, warmup_steps=3), is_ours=True),
)


def rules(place: Place) -> str:
    """Every rule in float64: trajectories of torch.optim, or of the eager backend, on the CPU."""
    shapes = [(), (0,), (7, 5), (129,)] + ([] if place.is_quick else [(70_001,)])
    steps, worst = (3, 0.0) if place.is_quick else (12, 0.0)
    for rule in RULES:
        values = [place.draw(*shape) for shape in shapes]
        ours = place.leaves(values, torch.float64)
        theirs = [value.clone().requires_grad_() for value in values]
        optimizer = getattr(descend, rule.name)(ours, **rule.options, backend=place.backend)
        reference = (
            getattr(descend, rule.name)(theirs, **rule.options, backend="eager")
            if rule.is_ours
            else getattr(torch.optim, rule.name)(theirs, **rule.options, foreach=False)
        )
        for _ in range(steps):
            grads = [place.draw(*shape) for shape in shapes]
            for params, taken in ((ours, optimizer), (theirs, reference)):
                give(params, grads)
                taken.step()
        for found, wanted in zip(ours, theirs, strict=True):
            worst = max(worst, within(rule.name, distance(found, wanted), 1e-11))
    return f"{len(RULES)} rules, {steps} steps, differ by {worst:.1g} at most"


def _signum(param: Any, grad: Any, momentum_buffer: Any, lr: Any, momentum: Any) -> Any:
    momentum_buffer = momentum * momentum_buffer + grad
    step = where(momentum_buffer > 2, 2.0, sign(momentum_buffer))
    return param - lr * step, momentum_buffer


def own_rule(place: Place) -> str:
    """A rule that a user wrote."""
    signum: Any = descend.from_rule(_signum, "Signum", lr=0.1, momentum=0.9)
    values = [place.draw(1023), place.draw(3, 5)]
    pairs = [
        (place.leaves(values, torch.float64), place.backend),
        ([v.clone().requires_grad_() for v in values], "eager"),
    ]
    optimizers = [signum(params, backend=backend) for params, backend in pairs]
    for _ in range(3):
        grads = [place.draw(1023), place.draw(3, 5)]
        for (params, _), optimizer in zip(pairs, optimizers, strict=True):
            give(params, grads)
            optimizer.step()
    worst = max(distance(ours, theirs) for ours, theirs in zip(pairs[0][0], pairs[1][0], strict=True))
    within("a rule with where", worst, 1e-12)
    return f"differs from eager by {worst:.1g}; ran in {optimizers[0].backends()[0].backend}"


# Single steps of AdamW from a random state, between guards.


class Guarded:
    """A tensor between bytes that must stay as they are.

    Args:
        values: what it holds.
        dtype, device: its dtype and device.
        offset: numbers between an address divisible by 128 and its first.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype, device: torch.device, offset: int) -> None:
        before, size = (GUARD + offset) * dtype.itemsize, values.numel() * dtype.itemsize
        self._memory = torch.randint(256, (before + size + GUARD * dtype.itemsize,), dtype=torch.uint8, device=device)
        self.tensor = self._memory[before : before + size].view(dtype).view(values.shape)
        self.tensor.copy_(values)
        self._ends = slice(0, before), slice(before + size, None)
        self._kept = [self._memory[end].clone() for end in self._ends]

    def check(self, what: str) -> None:
        """Raise ``WrongError`` if something was written beside the tensor."""
        if not all(torch.equal(self._memory[end], kept) for end, kept in zip(self._ends, self._kept, strict=True)):
            raise WrongError(f"bytes beside {what} were written")


class Mix(NamedTuple):
    """Dtypes of a parameter, its gradient, and ``state_dtype``."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype | None = None

    def __str__(self) -> str:
        return "/".join(str(dtype).removeprefix("torch.") for dtype in self if dtype)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MIXES = (
    Mix(F64, F64),
    Mix(F32, F32),
    Mix(BF16, BF16),
    Mix(F16, F16),
    Mix(F64, F64, F32),
    Mix(F32, F32, BF16),
    Mix(F32, BF16),
    Mix(BF16, F32),
    Mix(BF16, BF16, F32),
    Mix(F16, F16, F16),
    Mix(F16, F32, F32),
)
LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.99), 1e-6, 0.1
START = 5
"""Steps that the random state claims to have behind it."""


def adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """A step in float64, written out. Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101."""
    param = param * (1 - LR * DECAY)
    exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * grad
    exp_avg_sq = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * grad * grad
    corrected = (exp_avg / (1 - BETAS[0] ** step)) / ((exp_avg_sq / (1 - BETAS[1] ** step)).sqrt() + EPS)
    return param - LR * corrected, exp_avg, exp_avg_sq


def single_steps(place: Place, mix: Mix, sizes: Sequence[int], offsets: Sequence[int], max_norm: float | None) -> float:
    """Two steps, each compared with ``adamw`` from the same state; the largest error, in roundings of each dtype.

    Gradients and bytes beside all tensors must stay as they are.
    """
    offset = cycle(offsets)
    guarded = [Guarded(place.draw(size), mix.param, place.device, next(offset)) for size in sizes]
    params = [each.tensor.requires_grad_() for each in guarded]
    if mix.grad != mix.param:
        if not hasattr(params[0], "grad_dtype"):
            raise NotApplicableError(f"torch {torch.__version__} has no gradients of another dtype")
        for param in params:
            param.grad_dtype = mix.grad
    optimizer = descend.AdamW(
        params, LR, BETAS, EPS, DECAY, backend=place.backend, state_dtype=mix.state, max_norm=max_norm
    )
    optimizer.init_state()
    for param in params:
        state = optimizer.state[param]
        for name, values in (("exp_avg", place.draw(len(param))), ("exp_avg_sq", place.draw(len(param)).square())):
            guarded.append(Guarded(values, state[name].dtype, place.device, next(offset)))
            state[name] = guarded[-1].tensor
        state["step"].fill_(START)
    worst = 0.0
    for step in (START + 1, START + 2):
        grads = [Guarded(place.draw(size), mix.grad, place.device, next(offset)) for size in sizes]
        for param, each in zip(params, grads, strict=True):
            param.grad = each.tensor
        kept = [grad.tensor.clone() for grad in grads]
        wide = [grad.double().cpu() for grad in kept]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in wide))
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        before = [_wide(optimizer, param) for param in params]
        optimizer.step()
        if max_norm is not None:
            within("grad_norm", abs(float(optimizer.grad_norm or 0.0) - norm) / norm, 1e-12)
        for param, tensors, grad in zip(params, before, wide, strict=True):
            wanted = adamw(tensors[0], factor * grad, tensors[1], tensors[2], step)
            stored = (param, *(optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")))
            for name, found, exact, old in zip(
                ("param", "exp_avg", "exp_avg_sq"), stored, wanted, tensors, strict=True
            ):
                error = _roundings(found, exact, torch.maximum(old.abs(), exact.abs()) + 0.1)
                worst = max(worst, within(f"{mix} {name}, roundings", error, 8.0))
        for each, old in zip(grads, kept, strict=True):
            if not torch.equal(each.tensor, old):
                raise WrongError(f"{mix}: a gradient was written")
            each.check(f"a gradient of {mix}")
        for each in guarded:
            each.check(f"a parameter or state tensor of {mix}")
    return worst


def _wide(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """Parameter and averages in float64 on the CPU."""
    state = optimizer.state[param]
    return [tensor.detach().to("cpu", F64, copy=True) for tensor in (param, state["exp_avg"], state["exp_avg_sq"])]


def _roundings(found: Tensor, exact: Tensor, size: Tensor) -> float:
    """The largest error in units of what rounding to the dtype found costs; kernels compute in float32 at least."""
    if not len(found):
        return 0.0
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(F32).eps if found.dtype != F64 else 0.0)
    return float(((found.detach().cpu().double() - exact).abs() / (eps * size)).max())


SIZES = (0, 1, 2, 3, 15, 16, 17, 127, 129, 1023, 1024, 1025)
MORE_SIZES = (4095, 4096, 4097, 65_537, 1_000_003)


def dtypes(place: Place) -> str:
    """Every mix of dtypes, with tensors at aligned addresses."""
    done, left_out, worst = [], [], 0.0
    for mix in MIXES:
        try:
            worst = max(worst, single_steps(place, mix, (129,) if place.is_quick else (1000, 4097), (0,), None))
            done.append(mix)
        except NotApplicableError as reason:
            left_out.append(f"; not {mix}: {reason}")
    return f"{len(done)} mixes, {worst:.2g} roundings at most" + "".join(left_out)


FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "8 bits": (F32, dict(state_dtype="8bit")),
    "8 bits at random": (BF16, dict(state_dtype="8bit", rounding="stochastic")),
    "compensated": (BF16, dict(state_dtype=F32, rounding="compensated")),
}


def formats(place: Place) -> str:
    """Numbers in formats, dense and in touched rows: as in the eager backend on the CPU, where nothing is fused.

    A result that is rounded otherwise there may become another code, or another bfloat16: of one number in thousands.
    """
    shapes = [(16, 300), (7,)] + ([] if place.is_quick else [(70_001,), (999, 1000), (300, 64, 3, 3)])
    most, rows = 0.0, 16 if place.is_quick else 4000
    for name, (dtype, options) in FORMATS.items():
        values, table = [place.draw(*shape) for shape in shapes], place.draw(rows, 272)
        sides = []
        for device, backend in ((place.device, place.backend), (torch.device("cpu"), "eager")):
            params = [value.to(device, dtype, copy=True).requires_grad_() for value in (*values, table)]
            optimizer = descend.AdamW(params, lr=0.01, sparse="touched", backend=backend, **options)
            sides.append((params, optimizer))
        for _ in range(1 if place.is_quick else 3):
            grads = [place.draw(*shape) for shape in shapes]
            touched, of_rows = torch.randperm(rows, generator=place.random)[: rows // 4], place.draw(rows // 4, 272)
            for params, optimizer in sides:
                give(params[:-1], grads)
                params[-1].grad = coo(touched, of_rows, params[-1])
                optimizer.step()
        for ours, theirs in zip(*(_stored(*side) for side in sides), strict=True):
            if ours.dtype in (torch.uint8, BF16):
                differing = float((ours != theirs).double().mean())
                most = max(most, within(f"{name}: numbers of {ours.dtype} that differ", differing, 2e-3))
            elif ours.dtype != torch.int16:  # the last digits of a parameter
                within(f"{name}: {ours.dtype}", distance(ours, theirs), 2e-3)
    return f"{len(FORMATS)} formats, at most {most:.1g} of the numbers differ from the CPU's"


def _stored(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters and their state, on the CPU."""
    state = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().cpu() for tensor in (*params, *state)]


def odd_sizes(place: Place) -> str:
    """Sizes around those of vectors, blocks and chunks."""
    sizes = SIZES if place.is_quick else (*SIZES, *MORE_SIZES)
    worst = max(single_steps(place, mix, sizes, (0,), None) for mix in (MIXES[1], MIXES[2]))
    return f"{len(sizes)} sizes up to {max(sizes):,}, {worst:.2g} roundings at most"


def unaligned(place: Place) -> str:
    """Parameters, gradients and state whose addresses are not divisible by sixteen, each in another way."""
    sizes = SIZES[:9] if place.is_quick else (*SIZES, *MORE_SIZES)
    worst = max(single_steps(place, mix, sizes, (1, 0, 3, 2, 5), None) for mix in (MIXES[1], MIXES[2]))
    return f"{len(sizes)} sizes, {worst:.2g} roundings at most"


def clipping(place: Place) -> str:
    """The norm in float64, and steps that are clipped by it; gradients stay as they are."""
    sizes = SIZES[:9] if place.is_quick else (*SIZES, *MORE_SIZES)
    worst = max(
        single_steps(place, mix, sizes, (0, 1), max_norm) for mix in (MIXES[1], MIXES[2]) for max_norm in (1.0, 1e6)
    )
    param = torch.zeros(100, device=place.device, requires_grad=True)
    param.grad = torch.full_like(param, 1e30)  # whose square is Inf in float32
    optimizer = descend.SGD([param], lr=1.0, max_norm=1.0, backend=place.backend)
    optimizer.step()
    within("a norm of 1e31", distance(param, torch.full((100,), -0.1)), 1e-6)
    return f"norm to 1e-12, {worst:.2g} roundings at most"


def large(place: Place) -> str:
    """Offsets beyond 2**31: both ends of one tensor."""
    place.needs_cuda("tensors of 2**31 numbers")
    if torch.cuda.mem_get_info(place.device)[0] < 6 * LARGE:
        raise NotApplicableError("too little memory is free")
    param = torch.ones(LARGE, dtype=BF16, device=place.device).requires_grad_()
    param.grad = torch.full_like(param, 0.25)
    ends = slice(0, SAMPLE), slice(LARGE - SAMPLE, None)
    values = [place.draw(SAMPLE).to(BF16) for _ in ends]
    for end, value in zip(ends, values, strict=True):
        param.grad[end] = value.to(place.device)
    descend.SGD([param], lr=0.5, backend=place.backend).step()
    for end, value in zip(ends, values, strict=True):
        if not torch.equal(param.detach()[end].cpu(), (1 - 0.5 * value.float()).to(BF16)):
            raise WrongError(f"other numbers at {end}")
    if not bool((param.detach()[SAMPLE:-SAMPLE] == 0.875).all()):
        raise WrongError("other numbers in the middle")
    return f"{LARGE:,} numbers, all exact"


# Steps that are left out.


def nonfinite(place: Place) -> str:
    """A NaN or Inf anywhere leaves a step out, and later steps are those without it."""
    values = [place.draw(1025), place.draw(7, 5)]
    options: dict[str, Any] = dict(lr=0.1, max_norm=1.0, nonfinite="skip", backend=place.backend)
    ours, theirs = (place.leaves(values, F32) for _ in range(2))
    optimizer, plain = (descend.AdamW(params, **options) for params in (ours, theirs))
    for number, bad in enumerate((None, math.nan, math.inf, None)):
        grads = [place.draw(1025), place.draw(7, 5)]
        give(ours, grads)
        before = bits(optimizer)
        if bad is not None:
            ours[number % 2].grad.view(-1)[number] = bad  # type: ignore[union-attr]
        optimizer.step()
        if bad is None:
            give(theirs, grads)
            plain.step()
        elif not same(bits(optimizer), before):
            raise WrongError(f"a step with {bad} moved something")
    if not same(bits(optimizer), bits(plain)):
        raise WrongError("steps after the ones left out differ")
    if int(optimizer.skipped_steps) != 2:
        raise WrongError(f"skipped_steps is {optimizer.skipped_steps}, not 2")
    raising = descend.AdamW(ours, nonfinite="raise", backend=place.backend)
    give(ours, [place.draw(1025) / 0, place.draw(7, 5)])
    before = bits(raising)
    try:
        raising.step()
    except FloatingPointError:
        if not same(bits(raising), before):
            raise WrongError("nonfinite='raise' moved something") from None
        return "skip moves nothing and counts nothing; raise raises and moves nothing"
    raise WrongError("nonfinite='raise' did not raise")


def loss_scaling(place: Place) -> str:
    """A GradScaler with ``amp="fused"``: scaled training is training, and an overflow moves nothing."""
    values = [place.draw(1025), place.draw(7, 5)]
    scaled, plain = (place.leaves(values, F32) for _ in range(2))
    options: dict[str, Any] = dict(lr=0.1, max_norm=1.0, backend=place.backend)
    optimizer, reference = descend.AdamW(scaled, **options, amp="fused"), descend.AdamW(plain, **options)
    scaler = torch.amp.GradScaler(place.device.type, init_scale=1024.0)
    for factor in (1.0, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        weights = [place.draw(1025).to(place.device, F32), place.draw(7, 5).to(place.device, F32)]
        before = bits(optimizer)
        losses = [(param * weight).sum() for param, weight in zip(scaled, weights, strict=True)]
        torch.autograd.backward(scaler.scale(factor * torch.stack(losses).sum()))
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(factor):
            give(plain, weights)
            reference.step()
        elif not same(bits(optimizer), before):
            raise WrongError("a step that overflowed moved something")
    worst = max(distance(*pair) for pair in zip(scaled, plain, strict=True))
    return f"differs from unscaled training by {within('scaled training', worst, 1e-6):.1g}"


# CUDA graphs.


def new_stream(place: Place) -> torch.cuda.Stream:
    """A stream of the device."""
    return torch.cuda.Stream(place.device)  # type: ignore[no-untyped-call]


def capture(place: Place) -> str:
    """A captured step, replayed with new gradients and a new lr, is torch's step in float64."""
    place.needs_cuda("CUDA graphs")
    worst = max(replays(place, max_norm, skips) for max_norm, skips in ((None, False), (1.0, False), (1.0, True)))
    return f"3 graphs, {REPLAYS} replays each, lr changed between, differ by {worst:.1g} at most"


def replays(place: Place, max_norm: float | None, skips: bool) -> float:
    """Three steps, a graph, and its replays; how far they are from float64."""
    shapes = [(1025,), (64, 33), (3,)]
    values = [place.draw(*shape) for shape in shapes]
    params = place.leaves(values, F32)
    exact = [param.detach().double().cpu().requires_grad_() for param in params]
    lr = torch.tensor(0.01, device=place.device)
    nonfinite: Nonfinite = "skip" if skips else "step"
    options: dict[str, Any] = dict(max_norm=max_norm, nonfinite=nonfinite, backend=place.backend)
    optimizer = descend.AdamW(params, lr=lr, capturable=True, **options)
    reference = torch.optim.AdamW(exact, lr=0.01, foreach=False)
    grads = [torch.empty_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad

    def draw_grads() -> None:
        for grad, twin in zip(grads, exact, strict=True):
            grad.copy_(place.draw(*grad.shape))
            twin.grad = grad.double().cpu()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(exact, max_norm)
        reference.step()

    side, current = new_stream(place), torch.cuda.current_stream(place.device)
    for _ in range(WARM):
        draw_grads()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            optimizer.step()
        current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for number in range(REPLAYS):
        if number == 3:
            lr.fill_(0.003)
            reference.param_groups[0]["lr"] = float(lr)
        draw_grads()
        graph.replay()
    what = f"replays with max_norm={max_norm}, nonfinite={nonfinite}"
    worst = max(within(what, distance(*pair), 2e-5) for pair in zip(params, exact, strict=True))
    if {int(optimizer.state[param]["step"]) for param in params} != {WARM + REPLAYS}:
        raise WrongError(f"{what}: the step count is not {WARM + REPLAYS}")
    if skips:
        grads[0].fill_(math.nan)
        before = bits(optimizer)
        graph.replay()
        if not same(bits(optimizer), before):
            raise WrongError("a replay with NaN moved something")
    return worst


def captured_training(place: Place) -> str:
    """A whole training step in a graph, whose gradients are new memory of the graph, is torch's in float64."""
    place.needs_cuda("CUDA graphs")
    exact = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 3)).double()
    model = copy.deepcopy(exact).to(place.device, F32)
    inputs = torch.empty(16, 33, device=place.device)
    optimizer = descend.AdamW(model.parameters(), lr=0.01, capturable=True, max_norm=0.1, backend=place.backend)
    reference = torch.optim.AdamW(exact.parameters(), lr=0.01, foreach=False)

    def draw_inputs() -> None:
        inputs.copy_(place.draw(*inputs.shape))
        reference.zero_grad()
        torch.autograd.backward(exact(inputs.double().cpu()).square().mean())
        torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.1)
        reference.step()

    def train() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(inputs).square().mean())
        optimizer.step()

    side, current = new_stream(place), torch.cuda.current_stream(place.device)
    for _ in range(WARM):
        draw_inputs()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            train()
        current.wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    for _ in range(REPLAYS):
        draw_inputs()
        graph.replay()
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    worst = max(within("replayed training", distance(*pair), 1e-4) for pair in pairs)
    return f"{REPLAYS} replays of forward, backward and step differ by {worst:.1g} at most"


# Sparse gradients.


def sparse_gradient(place: Place, rows: int, dims: int, lookups: int) -> tuple[Tensor, Tensor]:
    """Row numbers with many duplicates, in no order, and float64 values."""
    return torch.randint(rows, (lookups,), generator=place.random), place.draw(lookups, dims)


def coo(indices: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """A gradient as the backward pass of an embedding leaves it: not coalesced."""
    values = values.to(like.device, like.dtype, copy=True)
    return torch.sparse_coo_tensor(indices[None].to(like.device), values, like.shape, check_invariants=False)


def sparse_rows(place: Place) -> str:
    """SparseAdam with duplicates: rows move as torch's in float64, the others keep their bits."""
    worst, rows = 0.0, 200 if place.is_quick else 20_000
    for dtype, dims in ((F64, 17), (F32, 64), (F32, 3)):
        table = place.draw(rows, dims)
        [ours], theirs = place.leaves([table], dtype), table.to(dtype).double().requires_grad_()
        optimizer = descend.SparseAdam([ours], lr=0.01, backend=place.backend)
        reference: Any = torch.optim.SparseAdam([theirs], lr=0.01)
        touched = torch.zeros(rows, dtype=torch.bool)
        for _ in range(3):
            indices, values = sparse_gradient(place, rows // 4, dims, rows // 4)
            ours.grad = coo(indices, values, ours)
            theirs.grad = coo(indices, values.to(dtype), theirs)
            touched[indices] = True
            optimizer.step()
            reference.step()
        what = f"rows of {dims} {str(dtype).removeprefix('torch.')}"
        worst = max(worst, within(what, distance(ours, theirs), 1e-12 if dtype == F64 else 2e-5))
        if not torch.equal(ours.detach().cpu()[~touched], table.to(dtype)[~touched]):
            raise WrongError(f"{what}: a row without a gradient moved")
    return f"3 tables of {rows:,} rows, differ by {worst:.1g} at most; ran in {optimizer.backends()[0].backend}"


def sparse_exact(place: Place) -> str:
    """AdamW with ``sparse="exact"`` is AdamW with dense gradients in float64."""
    rows, dims = (60, 5) if place.is_quick else (5000, 33)
    table = torch.nn.Embedding(rows, dims, sparse=True, dtype=F64, _weight=place.draw(rows, dims)).to(place.device)
    dense = table.weight.detach().cpu().clone().requires_grad_()
    options: dict[str, Any] = dict(lr=0.01, weight_decay=0.1)
    optimizer = descend.AdamW(table.parameters(), **options, sparse="exact", backend=place.backend)
    optimizer.attach(table)
    reference = torch.optim.AdamW([dense], **options, foreach=False)
    for _ in range(6):
        indices, values = sparse_gradient(place, rows, dims, rows // 3)
        table(indices.to(place.device))
        table.weight.grad = coo(indices, values, table.weight)
        dense.grad = coo(indices, values, dense).to_dense()
        optimizer.step()
        reference.step()
    optimizer.settle()
    return f"{rows:,} rows differ by {within('settled rows', distance(table.weight, dense), 1e-11):.1g}"


# What a step does beside computing.


def deterministic(place: Place) -> str:
    """Two runs, the same bits: clipped steps of many tensors, and sums of rows named often."""
    sizes = (1, 1025, 129) if place.is_quick else (1, 1025, 70_001, 5_000_003)
    values, seeds = [place.draw(size) for size in sizes], torch.randint(2**40, (3,), generator=place.random).tolist()
    table = place.draw(64, 16)
    found = []
    for _ in range(2):
        dense, sparse = place.leaves(values, F32), place.leaves([table], F32)
        optimizers = [
            descend.AdamW(dense, lr=0.1, max_norm=1.0, backend=place.backend),
            descend.SparseAdam(sparse, lr=0.1, max_norm=1.0, backend=place.backend),
        ]
        for seed in seeds:
            random = torch.Generator().manual_seed(seed)
            give(dense, [torch.randn(size, generator=random) for size in sizes])
            rows = torch.randint(64, (500 if place.is_quick else 50_000,), generator=random)
            sparse[0].grad = coo(rows, torch.randn(len(rows), 16, generator=random), sparse[0])
            for optimizer in optimizers:
                optimizer.step()
        found.append([*bits(optimizers[0]), *bits(optimizers[1])])
    if not same(*found):
        raise WrongError("bits differ between two runs")
    return f"{sum(sizes):,} numbers clipped, 64 rows named often: the same bits twice"


def mixed_devices(place: Place) -> str:
    """Parameters on the CPU and on the device in one optimizer, clipped by their joint norm."""
    place.needs_cuda("several devices")
    count = torch.cuda.device_count()
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]
    values = [place.draw(1025) for _ in devices]
    params = [v.to(device, F32).requires_grad_() for v, device in zip(values, devices, strict=True)]
    exact = [param.detach().double().cpu().requires_grad_() for param in params]
    optimizer = descend.AdamW(params, lr=0.01, max_norm=1.0)
    reference = torch.optim.AdamW(exact, lr=0.01, foreach=False)
    for _ in range(3):
        grads = [place.draw(1025).float() for _ in devices]
        give(params, grads)
        give(exact, grads)
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        reference.step()
    worst = max(within("mixed devices", distance(*pair), 1e-5) for pair in zip(params, exact, strict=True))
    return f"CPU and {count} GPU(s) differ by {worst:.1g} at most"


def offloaded(place: Place) -> str:
    """State stays in the host's memory; the device gets what float64 computes, edits of parameters included."""
    place.needs_cuda("parameters on a device")
    sizes = [(300, 300), (7,), (3_000_000,)]
    values = [place.draw(*size) for size in sizes]
    params = place.leaves(values, F32)
    exact = [param.detach().cpu().double().requires_grad_() for param in params]
    optimizer = descend.AdamW(params, lr=0.01, max_norm=1.0, state_device="cpu")
    reference = torch.optim.AdamW(exact, lr=0.01, foreach=False)
    for step in range(5):
        grads = [place.draw(*size).float() for size in sizes]
        give(params, grads)
        give(exact, grads)
        if step == 3:
            for param in (*params, *exact):
                param.data.mul_(0.5)  # no version counter tells
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    places = {value.device.type for state in optimizer.state.values() for value in state.values()}
    if places != {"cpu"}:
        raise WrongError(f"state is on {', '.join(sorted(places))}")
    worst = max(within("offloaded", distance(*pair), 1e-5) for pair in zip(params, exact, strict=True))
    return f"differs by {worst:.1g} at most"


def streams(place: Place) -> str:
    """A step in another stream comes after what that stream was given."""
    place.needs_cuda("streams")
    [param] = place.leaves([torch.zeros(1_000_003)], F32)
    optimizer = descend.SGD([param], lr=1.0, max_norm=1e9, backend=place.backend)
    busy, side = torch.randn(4096, 4096, device=place.device), new_stream(place)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    side.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(side):
        for _ in range(20):
            busy = busy @ busy / 64
        param.grad.fill_(1.0)
        optimizer.step()
    torch.cuda.current_stream(place.device).wait_stream(side)
    return f"differs by {within('a step in another stream', distance(param, torch.full_like(param, -1.0)), 1e-6):.1g}"


def checkpoints(place: Place) -> str:
    """A checkpoint goes from the device to the CPU, to torch.optim, and back."""
    [ours], grads = place.leaves([place.draw(1025)], F64), [place.draw(1025) for _ in range(3)]
    optimizer: Any = descend.AdamW([ours], lr=0.1, max_norm=1e6, backend=place.backend)
    reference = ours.detach().cpu().clone().requires_grad_()
    straight = torch.optim.AdamW([reference], lr=0.1, foreach=False)
    param = ours
    for grad, moved in zip(grads, ("cpu", place.device, None), strict=True):
        give([param, reference], [grad, grad])
        optimizer.step()
        straight.step()
        if moved is not None:
            saved, param = optimizer.state_dict(), param.detach().to(moved, copy=True).requires_grad_()
            optimizer = torch.optim.AdamW([param]) if moved == "cpu" else descend.AdamW([param], backend=place.backend)
            optimizer.load_state_dict(saved)
    return f"differs by {within('going on elsewhere', distance(param, reference), 1e-12):.1g}"


def steady(place: Place, fresh: bool = False) -> Iterator[tuple[str, Callable[[], None], Callable[[], object]]]:
    """Optimizers that have taken some steps: what each is, what comes before a step, and the step."""
    values = [place.draw(1000) for _ in range(10)]
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "clipped": dict(max_norm=1.0),
        "skip": dict(max_norm=1.0, nonfinite="skip"),
        "amp": dict(max_norm=1.0, amp="fused"),
        "capturable": dict(max_norm=1.0, capturable=True),
        "lr on the device": dict(lr=torch.tensor(0.01, device=place.device)),
    }
    one, zero = (torch.tensor(value, device=place.device) for value in (1.0, 0.0))
    for name, options in ways.items():
        params = place.leaves(values, F32)
        optimizer: Any = descend.AdamW(params, backend=place.backend, **options)
        give(params, values)
        kept = [torch.randn_like(param) for param in params]

        def prepare(optimizer: Any = optimizer, params: Any = params, kept: Any = kept, name: str = name) -> None:
            if name == "amp":
                optimizer.grad_scale, optimizer.found_inf = one, zero
            if fresh:
                for param, grad in zip(params, kept, strict=True):
                    param.grad = grad.clone()

        for _ in range(3):
            prepare()
            optimizer.step()
        yield name, prepare, optimizer.step
    if fresh:
        [table] = place.leaves([place.draw(1000, 16)], F32)
        optimizer = descend.SparseAdam([table], backend=place.backend)
        indices, rows = sparse_gradient(place, 1000, 16, 500)
        grads = cycle([coo(indices, rows, table) for _ in range(5)])

        def look_up() -> None:
            table.grad = next(grads)

        for _ in range(3):
            look_up()
            optimizer.step()
        yield "sparse rows", look_up, optimizer.step


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_waiting(place: Place) -> str:
    """A step never waits for the device, with gradients in new memory either."""
    place.needs_cuda("waits")
    passed: list[str] = []
    failed: list[str] = []
    for fresh in (False, True):
        for name, prepare, step in steady(place, fresh):
            what = f"{name} (new gradients)" if fresh else name
            prepare()
            try:
                with _no_waiting():
                    step()
                passed.append(what)
            except RuntimeError as error:
                failed.append(f"{what}: {str(error).splitlines()[0]}")
    if failed:
        raise WrongError("; ".join(failed))
    return f"nothing waits: {', '.join(passed)}"


def no_allocation(place: Place) -> str:
    """A step in a steady state asks the allocator for nothing."""
    place.needs_cuda("the allocator's statistics")
    passed: list[str] = []
    failed: list[str] = []
    for name, prepare, step in steady(place):
        prepare()
        before = _allocations(place)
        for _ in range(10):
            prepare()
            step()
        made = _allocations(place) - before
        (failed if made else passed).append(f"{name}: {made} in 10 steps" if made else name)
    if failed:
        raise WrongError("; ".join(failed))
    return f"nothing allocated: {', '.join(passed)}"


def _allocations(place: Place) -> int:
    """How often the allocator has been asked so far."""
    return int(torch.cuda.memory_stats(place.device)["allocation.all.allocated"])


def host_cost(place: Place) -> str:
    """What a step of 1,000 tensors costs the host, which does not wait; the queue is empty before it."""
    place.needs_cuda("times of the host")
    values = [torch.randn(1000, device=place.device) for _ in range(1000)]
    ways: dict[str, dict[str, Any]] = {"plain": {}, "clipped": dict(max_norm=1.0)}
    seen, failed = [], []
    for name, options in ways.items():
        params = place.leaves(values, F32)
        give(params, values)
        optimizer = descend.AdamW(params, backend=place.backend, **options)
        for fresh in (False, True):
            times = []
            for _ in range(60):
                if fresh:
                    give(params, values)
                torch.cuda.synchronize(place.device)
                begin = time.perf_counter()
                optimizer.step()
                times.append(time.perf_counter() - begin)
            cost = statistics.median(times[10:])
            seen.append(f"{name}{', new gradients' if fresh else ''} {cost * 1e6:.0f} us")
            if not fresh and cost > HOST_LIMIT:
                failed.append(name)
    if failed:
        raise WrongError(f"{', '.join(seen)}; allowed {HOST_LIMIT * 1e6:.0f} us with gradients that stay")
    return ", ".join(seen)


CHECKS: dict[str, Callable[[Place], str]] = {
    "backend": default_backend,
    "rules": rules,
    "own-rule": own_rule,
    "dtypes": dtypes,
    "formats": formats,
    "odd-sizes": odd_sizes,
    "unaligned": unaligned,
    "clipping": clipping,
    "large": large,
    "nonfinite": nonfinite,
    "amp": loss_scaling,
    "capture": capture,
    "training": captured_training,
    "sparse-rows": sparse_rows,
    "sparse-exact": sparse_exact,
    "deterministic": deterministic,
    "devices": mixed_devices,
    "offloaded": offloaded,
    "streams": streams,
    "checkpoints": checkpoints,
    "no-waiting": no_waiting,
    "no-allocation": no_allocation,
    "host-cost": host_cost,
}
"""By name, in the order in which they run."""


class Outcome(NamedTuple):
    """What came of a check.

    Attributes:
        name: the check's.
        outcome: "pass", "FAIL" or "n/a".
        seen: what it saw.
        seconds: how long it took, compiling included.
    """

    name: str
    outcome: str
    seen: str
    seconds: float


def run_checks(place: Place, names: Sequence[str]) -> Iterator[Outcome]:
    """Run the checks of these names; one that fails does not stop the others."""
    for name in names:
        begin = time.perf_counter()
        try:
            outcome, seen = "pass", CHECKS[name](place)
        except NotApplicableError as reason:
            outcome, seen = "n/a", str(reason)
        except WrongError as reason:
            outcome, seen = "FAIL", str(reason)
        except Exception as error:
            outcome, seen = "FAIL", f"{type(error).__name__}: {error}".splitlines()[0]
        yield Outcome(name, outcome, seen, time.perf_counter() - begin)
