"""Mixed precision: ``GradScaler`` around every optimizer, unscaling first or inside the step (``amp="fused"``)."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import (
    CASES,
    Twins,
    assert_same_state,
    assert_unmoved,
    device,
    leaves,
    one_in,
    params_of,
    rounding,
    snapshot,
    state_of,
)
from torch import Tensor
from torch.amp import GradScaler

from descend import SGD, AdamW, FirstOrder, SparseAdam, in_backward

AMP = (None, "fused")
SCALE = 1024.0  # a power of two: scaling and unscaling round nothing


class Trained(NamedTuple):
    """An optimizer, and whether its first parameter is an embedding with sparse gradients."""

    ours: type[FirstOrder]
    options: dict[str, Any]
    sparse: bool = False

    def __str__(self) -> str:
        options = {"gradients": "sparse", **self.options} if self.sparse else self.options
        return "-".join([self.ours.__name__, *(f"{key}={value}" for key, value in options.items())])


OPTIMIZERS = [
    *(Trained(case.ours, case.options) for case in CASES),
    Trained(SGD, dict(lr=0.1, momentum=0.9), sparse=True),
    Trained(AdamW, dict(lr=0.1, sparse="touched"), sparse=True),
    Trained(AdamW, dict(lr=0.1, sparse="exact"), sparse=True),
    Trained(SparseAdam, dict(lr=0.1), sparse=True),
]


OPTIONS = [
    {},
    dict(max_norm=0.5),
    dict(backend="eager"),
    dict(nonfinite="raise"),
    pytest.param(dict(max_norm=0.5, backend="triton"), id="cuda", marks=pytest.mark.gpu),
]


class Training:
    """A model, its optimizer and perhaps a scaler."""

    def __init__(self, trained: Trained, scale: float | None = SCALE, **options: Any) -> None:
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(9, 4, sparse=trained.sparse).to(device())
        params = [*self.table.parameters(), *([] if trained.ours is SparseAdam else leaves([(4,)], torch.float32))]
        self.optimizer = trained.ours(params, **trained.options, **options)
        if trained.options.get("sparse") == "exact":
            self.optimizer.attach(self.table)
        self.scaler = GradScaler(device().type, init_scale=scale or 1.0, enabled=scale is not None, growth_interval=3)

    def backward(self, seed: int, factor: float = 1.0) -> None:
        """Gradients of the loss times ``factor``, in place of those before."""
        self.optimizer.zero_grad()
        words = torch.randint(9, (5,), generator=torch.Generator().manual_seed(seed))
        loss = torch.tanh(self.table(words.to(device()))).square().sum()
        for param in params_of(self.optimizer)[1:]:
            loss = loss + torch.tanh(param).square().sum()
        self.scaler.scale(loss * factor).backward()

    def step(self, seed: int, factor: float = 1.0, unscale: bool = False) -> None:
        self.backward(seed, factor)
        if unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def assert_same_training(one: Training, other: Training) -> None:
    states = []
    for training in (one, other):
        training.optimizer.settle()
        state = training.optimizer.state_dict()["state"]
        states.append({key: dict(sorted(found.items())) for key, found in state.items()})
    params = map(params_of, (one.optimizer, other.optimizer))
    torch.testing.assert_close(*params, rtol=rounding(1e-5), atol=rounding(1e-5))
    assert_same_state(*states, rtol=rounding(1e-5), atol=rounding(1e-5))


@pytest.mark.parametrize(("trained", "amp", "unscale", "options"), one_in(2, OPTIMIZERS, AMP, (False, True), OPTIONS))
def test_scaled_training_is_training_bit_for_bit(
    trained: Trained, amp: str | None, unscale: bool, options: dict[str, Any]
) -> None:
    scaled, plain = Training(trained, amp=amp, **options), Training(trained, None, **options)
    for seed in range(5):
        scaled.step(seed, unscale=unscale)
        plain.step(seed)
        norms = [training.optimizer.grad_norm or 0.0 for training in (scaled, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=rounding(1e-5), abs=0)
    assert scaled.scaler.get_scale() == 2 * SCALE
    assert_same_training(scaled, plain)


@pytest.mark.parametrize(
    ("trained", "amp", "nonfinite", "unscale"), one_in(2, OPTIMIZERS, AMP, ("step", "skip", "raise"), (False, True))
)
def test_overflow_moves_nothing_and_counts_nothing(
    trained: Trained, amp: str | None, nonfinite: str, unscale: bool
) -> None:
    bad = math.nan if unscale else math.inf
    scaled, plain = Training(trained, amp=amp, nonfinite=nonfinite), Training(trained, None)
    for seed in range(3):
        for training in (scaled, plain):
            training.optimizer.settle()  # with "exact" the forward pass would move rows that are behind
        before = snapshot(scaled.optimizer)
        scaled.step(10 + seed, factor=bad, unscale=unscale)
        assert_unmoved(scaled.optimizer, before)
        assert scaled.optimizer.skipped_steps == 0
        scaled.step(seed, unscale=unscale)
        plain.step(seed)
    assert scaled.scaler.get_scale() == SCALE / 8
    assert_same_training(scaled, plain)


def test_overflow_of_one_optimizer_lets_the_other_step() -> None:
    first, second = (Training(OPTIMIZERS[5], amp=amp) for amp in AMP)
    second.scaler = first.scaler
    for factors in ((1.0, math.inf), (math.inf, 1.0), (1.0, 1.0)):
        before = [snapshot(training.optimizer) for training in (first, second)]
        for training, factor in zip((first, second), factors, strict=True):
            training.backward(0, factor)
            first.scaler.step(training.optimizer)
        first.scaler.update()
        for training, factor, seen in zip((first, second), factors, before, strict=True):
            moved = any(not torch.equal(p, q) for p, q in zip(params_of(training.optimizer), seen[0], strict=True))
            assert moved == (factor == 1.0)
    assert first.scaler.get_scale() == SCALE / 4


@pytest.mark.parametrize("trained", [OPTIMIZERS[0], OPTIMIZERS[5], OPTIMIZERS[7]], ids=str)
def test_gradients_stay_scaled_with_fused_and_are_rewritten_without(trained: Trained) -> None:
    for amp in AMP:
        training = Training(trained, amp=amp)
        training.backward(0)
        before = [param.grad.to_dense().clone() for param in params_of(training.optimizer)]
        training.scaler.step(training.optimizer)
        after = [param.grad.to_dense() for param in params_of(training.optimizer)]
        factor = 1.0 if amp == "fused" else 1 / SCALE
        assert all(torch.equal(a, b * factor) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize("unscale", [False, True])
def test_fused_is_torchs_fused(name: str, unscale: bool) -> None:
    trajectories = []
    case = next(case for case in CASES if case.ours.__name__ == name)
    for kind, options in ((case.ours, dict(amp="fused")), (case.theirs, dict(fused=True))):
        params = leaves([(7, 5), (129,)])
        optimizer, scaler = kind(params, **case.options, **options), GradScaler("cpu", init_scale=1000.0)
        assert optimizer._step_supports_amp_scaling
        for seed in range(5):
            optimizer.zero_grad()
            factor = math.inf if seed == 2 else 1.0
            scaler.scale(factor * sum(torch.tanh(param * (seed + 1)).sum() for param in params)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert not hasattr(optimizer, "found_inf")
        trajectories.append(
            [*params, *(torch.as_tensor(s["step"]) for s in state_of(optimizer).values() if "step" in s)]
        )
    for ours, theirs in zip(*trajectories, strict=True):
        # torch divides by the scale, we multiply by its reciprocal, and unscale_ rounds that to float32
        torch.testing.assert_close(ours, theirs, rtol=1e-12 if not unscale else 1e-6, atol=1e-12)


def test_max_norm_and_grad_norm_are_of_unscaled_gradients() -> None:
    for max_norm, scale in ((0.01, 3.0), (0.01, 65536.0), (None, 3.0)):
        params = leaves([(6,)])
        optimizer = SGD(params, lr=1.0, max_norm=max_norm, nonfinite="skip", amp="fused")
        start = params[0].detach().clone()
        params[0].grad = torch.arange(6.0, dtype=torch.float64) * scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        grad = torch.arange(6.0, dtype=torch.float64)
        assert optimizer.grad_norm == pytest.approx(float(grad.norm()), rel=1e-12)
        wanted = grad if max_norm is None else grad * max_norm / (grad.norm() + 1e-6)
        torch.testing.assert_close(start - params[0], wanted, rtol=1e-12, atol=1e-15)  # rounding of float64


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("amp", AMP)
def test_nonfinite_watches_what_comes_after_the_scaler(amp: str | None, nonfinite: str) -> None:
    training = Training(OPTIMIZERS[5], amp=amp, nonfinite=nonfinite)
    training.step(0)
    training.backward(1)
    training.scaler.unscale_(training.optimizer)
    params_of(training.optimizer)[1].grad[2] = math.nan
    before = snapshot(training.optimizer)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient of"):
            training.scaler.step(training.optimizer)
    else:
        training.scaler.step(training.optimizer)
    assert_unmoved(training.optimizer, before)
    assert training.optimizer.skipped_steps == (nonfinite == "skip")


def test_half_precision_gradients_keep_what_unscaling_would_lose() -> None:
    params = [torch.ones(3, dtype=torch.float16, requires_grad=True)]
    optimizer, scaler = SGD(params, lr=2.0**16, amp="fused"), GradScaler("cpu", init_scale=2.0**16)
    scaler.scale((params[0].float() * 2.0**-26).sum()).backward()  # the smallest float16 is 2**-24
    scaler.step(optimizer)
    assert torch.equal(params[0], torch.full((3,), 1 - 2.0**-10, dtype=torch.float16))
    scaler = GradScaler("cpu", init_scale=2.0**16)
    scaler.scale((params[0].float() * 2.0**-26).sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):  # torch's own refusal without it
        scaler.step(SGD(params))


def test_overflow_hidden_in_rows_named_twice_is_found() -> None:
    weight = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    optimizer, scaler = SGD([weight], lr=1.0, amp="fused"), GradScaler("cpu", init_scale=2.0**15)
    table = torch.nn.functional.embedding(torch.tensor([1, 1, 2]), weight, sparse=True)
    scaler.scale(table.float().sum() * 1.5).backward()  # 49152 is a float16, the sum of two is not
    before = snapshot(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_unmoved(optimizer, before)
    assert scaler.get_scale() == 2.0**14


# Closures.


@pytest.mark.parametrize("amp", AMP)
def test_closure_as_keyword_is_torchs_error(amp: str | None) -> None:
    training = Training(OPTIMIZERS[5], amp=amp)
    training.backward(0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler is enabled"):
        training.scaler.step(training.optimizer, closure=lambda: None)


@pytest.mark.parametrize("hooked", [False, True])
def test_closure_by_position_is_refused_where_the_check_would_be_of_old_gradients(hooked: bool) -> None:
    training = Training(OPTIMIZERS[5], amp="fused")
    training.step(0)
    if hooked:
        training.optimizer.register_step_pre_hook(lambda *_: None)
    training.backward(1)
    before = snapshot(training.optimizer)
    with pytest.raises(RuntimeError, match="GradScaler has checked the gradients before the closure"):
        training.scaler.step(training.optimizer, lambda: pytest.fail("was called"))
    assert_unmoved(training.optimizer, before)


def test_closure_by_position_is_torchs_without_fused() -> None:
    twins = Twins(CASES[5])
    for optimizer in twins.both:
        scaler, params = GradScaler("cpu", init_scale=SCALE), params_of(optimizer)

        def closure(optimizer: Any = optimizer, params: list[Tensor] = params) -> Tensor:
            optimizer.zero_grad()
            loss = sum(torch.tanh(param).sum() for param in params)
            loss.backward()
            return loss

        scaler.scale(params[2].square().sum()).backward()
        assert scaler.step(optimizer, closure) is not None
    twins.assert_equal()


# What the user sets.


def test_scale_set_by_hand_joins_that_of_the_scaler() -> None:
    for unscale in (False, True):
        scaled, plain = Training(OPTIMIZERS[5], amp="fused"), Training(OPTIMIZERS[5], None)
        for seed in range(3):
            scaled.backward(seed, factor=4.0)
            if unscale:
                scaled.scaler.unscale_(scaled.optimizer)
            scaled.optimizer.grad_scale = torch.tensor(4.0)
            scaled.scaler.step(scaled.optimizer)
            scaled.scaler.update()
            plain.step(seed)
        assert_same_training(scaled, plain)


@pytest.mark.parametrize("value", [8.0, torch.tensor(8.0), torch.tensor([8.0])], ids=str)
def test_scale_set_by_hand_needs_no_scaler(value: Any) -> None:
    scaled, plain = Training(OPTIMIZERS[5], None, amp="fused"), Training(OPTIMIZERS[5], None)
    scaled.optimizer.grad_scale = value
    for seed in range(3):
        scaled.step(seed, factor=8.0)
        plain.step(seed)
    assert_same_training(scaled, plain)


@pytest.mark.parametrize("stays", [False, True])
def test_scale_of_a_step_that_raised_is_not_that_of_the_next(stays: bool) -> None:
    scaled, plain = (Training(OPTIMIZERS[5], scale, nonfinite="raise", amp="fused") for scale in (SCALE, None))
    scaled.backward(0)
    scaled.scaler.unscale_(scaled.optimizer)
    params_of(scaled.optimizer)[0].grad[0, 0] = math.nan
    if stays:  # GradScaler would have taken this with it as well
        scaled.optimizer.grad_scale = 2.0
    with pytest.raises(FloatingPointError):
        scaled.scaler.step(scaled.optimizer)
    scaled.scaler.update()
    for training in (scaled, plain):
        training.step(1)
    assert_same_training(scaled, plain)


def test_scale_of_a_step_whose_hook_raised_is_not_that_of_the_next() -> None:
    scaled, plain = (Training(OPTIMIZERS[5], scale, amp="fused") for scale in (SCALE, None))

    def stop(*_: Any) -> None:
        raise KeyError("stop")

    scaled.backward(0)
    with pytest.raises(KeyError), scaled.optimizer.register_step_pre_hook(stop):
        scaled.scaler.step(scaled.optimizer)
    scaled.scaler.update()
    for training in (scaled, plain):
        training.step(1)
    assert_same_training(scaled, plain)


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf])
def test_scale_set_by_hand_must_be_one(value: float) -> None:
    training = Training(OPTIMIZERS[5], None, amp="fused")
    training.step(0)
    before = snapshot(training.optimizer)
    training.optimizer.grad_scale = value
    with pytest.raises(ValueError, match="AdamW: grad_scale must be a number > 0"):
        training.step(1)
    assert_unmoved(training.optimizer, before)


@pytest.mark.parametrize("attribute", ["grad_scale", "found_inf"])
def test_scale_set_by_hand_is_not_ignored_without_fused(attribute: str) -> None:
    training = Training(OPTIMIZERS[5], None)
    training.step(0)
    before = snapshot(training.optimizer)
    setattr(training.optimizer, attribute, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="amp='fused'"):
        training.step(1)
    assert_unmoved(training.optimizer, before)


# The flag.


def ways(optimizer: FirstOrder) -> Iterator[FirstOrder]:
    """The optimizer, copied and loaded."""
    yield optimizer
    yield copy.deepcopy(optimizer)
    yield pickle.loads(pickle.dumps(optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    yield optimizer


@pytest.mark.parametrize("amp", AMP)
@pytest.mark.parametrize("ours", [SGD, AdamW])
def test_flag_is_kept(ours: type[FirstOrder], amp: str | None) -> None:
    for optimizer in ways(ours(leaves(), amp=amp)):
        assert optimizer.amp == amp
        assert optimizer._step_supports_amp_scaling == (amp == "fused")
        assert "amp" not in {*optimizer.defaults, *optimizer.param_groups[0]}


def test_copies_without_the_option_have_its_default() -> None:
    optimizer = AdamW(leaves())
    state = optimizer.__getstate__()
    del state["amp"]
    old = AdamW.__new__(AdamW)
    old.__setstate__(state)
    assert old.amp is None
    assert not old._step_supports_amp_scaling


# Steps inside backward.


def test_scaler_cannot_be_used_inside_backward() -> None:
    with pytest.raises(ValueError, match="A GradScaler finds out whether gradients overflowed when all of them"):
        in_backward(AdamW(leaves(), amp="fused"))
    for unscale in (False, True):
        training = Training(OPTIMIZERS[5])
        handle = in_backward(training.optimizer)
        training.backward(0)
        if unscale:
            training.scaler.unscale_(training.optimizer)
        with pytest.raises(RuntimeError, match="has stepped with scaled gradients"):
            training.scaler.step(training.optimizer)
        handle.remove()
        assert not training.optimizer._step_supports_amp_scaling
    training = Training(OPTIMIZERS[5], None)  # a scaler that is switched off is none
    in_backward(training.optimizer)
    training.step(0)
