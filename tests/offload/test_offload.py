"""``state_device="cpu"``: the same bits as without it, on what the tests take for two devices."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backward_cases import loss_of, network
from cases import assert_same_bits, assert_unmoved, give_grads, leaves, params_of, snapshot, state_of
from interrupting import interrupted_everywhere
from torch import Tensor, nn
from torch.amp import GradScaler
from two_devices import flush, pretend, step, transfers_of

from descend import LAMB, SGD, AdamW, AdamWScheduleFree, FirstOrder, Monitor, Muon, SparseAdam, in_backward
from descend.offload import buckets

SHAPES = [(260, 256), (7, 5), (), (0, 3), (66_000,), (3,)]  # two are large enough for fingerprints
METHODS = [(AdamW, dict(lr=0.01)), (SGD, dict(lr=0.1, momentum=0.9))]


class Pair:
    """An optimizer with ``state_device`` and one without, on equal parameters; all is done to both."""

    def __init__(
        self, kind: Any, make: Callable[[], Any] = lambda: leaves(SHAPES, torch.float32), **options: Any
    ) -> None:
        self.ours: FirstOrder = kind(make(), state_device="cpu", **options)
        self.plain: FirstOrder = kind(make(), **options)
        self.both = (self.ours, self.plain)

    def step(self, seed: int, grads: Callable[[list[Tensor], int], None] = give_grads) -> None:
        for optimizer in self.both:
            grads(params_of(optimizer), seed)
            step(optimizer)

    def edit(self, change: Callable[[list[Tensor]], Any]) -> None:
        for optimizer in self.both:
            change(params_of(optimizer))

    def assert_equal(self) -> None:
        assert self.ours.transfers
        assert not self.plain.transfers
        assert all(map(torch.equal, *map(params_of, self.both)))
        assert_same_bits(*map(state_of, self.both))


def some_grads(params: list[Tensor], seed: int) -> None:
    """Gradients that come and go."""
    give_grads(params, seed)
    for param in params[seed % 3 :: 3]:
        param.grad = None


@torch.no_grad()
def edits(params: list[Tensor]) -> Iterator[None]:
    """Writes to parameters, by every way that programs take."""
    params[0].data.copy_(params[0].flip(0))  # which no version counter tells
    yield
    params[4].clamp_(-0.1, 0.1)
    yield
    params[0].data = params[0] + 1
    yield
    nn.ParameterList(params).load_state_dict({str(i): torch.full_like(p, 0.5) for i, p in enumerate(params)})
    yield
    for param in params:
        param.data.mul_(0.5)
    yield


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bucket_bytes=300_000)


@pytest.mark.parametrize(("kind", "options"), METHODS)
@pytest.mark.parametrize("bucket_bytes", [1, 300_000])
def test_steps_are_those_without_it(
    kind: Any, options: dict[str, Any], bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, bucket_bytes=bucket_bytes)
    pair = Pair(kind, **options)
    for seed in range(3):
        pair.step(seed)
        pair.assert_equal()
    for seed in range(6):
        pair.step(seed, some_grads)
    pair.assert_equal()
    written = [edits(params_of(optimizer)) for optimizer in pair.both]
    for seed, _ in enumerate(zip(*written, strict=True)):
        pair.step(seed)
        pair.assert_equal()


def test_state_in_8_bits_and_rounded_parameters_are_those_without_it() -> None:
    def make() -> list[Tensor]:
        return [*leaves([(64, 100), (64, 64)], torch.bfloat16), *leaves([(3, 4)], torch.bfloat16)]

    for options in (dict(state_dtype="8bit", rounding="stochastic", max_norm=0.5), dict(rounding="compensated")):
        pair = Pair(AdamW, make, lr=0.01, backend="eager", **options)
        for seed in range(3):
            pair.step(seed)
            pair.assert_equal()
        codes = [value for value in state_of(pair.ours)[0].values() if value.dtype == torch.uint8]
        assert len(codes) == 2 * ("state_dtype" in options)
    saved = pair.ours.state_dict()
    pair.plain.load_state_dict(saved)
    pair.step(3)
    pair.assert_equal()


def test_only_gradients_come_if_nobody_has_written() -> None:
    pair = Pair(SGD, lr=0.1)
    transfers, numels = [], [param.numel() for param in params_of(pair.ours)]
    for seed in range(3):
        pair.step(seed)
        transfers.append((transfers_of(pair.ours).downloaded, transfers_of(pair.ours).uploaded))
    small = sum(numel for numel in numels if numel < 65_536)
    assert transfers_of(pair.ours).downloads == 6  # two buckets
    first, *later = [down - before for (down, _), (before, _) in zip(transfers, [(0, 0), *transfers], strict=False)]
    assert first == 2 * sum(numels)
    assert later == [sum(numels) + small + 2] * 2  # two answers: nobody has written to the large ones
    assert [up for _, up in transfers] == [sum(numels) * steps for steps in (1, 2, 3)]
    pair.edit(lambda params: params[0].data.add_(1))
    pair.step(3)
    assert transfers_of(pair.ours).downloaded - transfers[-1][0] == later[0] + numels[0]
    assert transfers_of(pair.ours).downloads == 9  # found out late
    pair.edit(lambda params: params[0].detach().add_(1))
    pair.step(4)
    assert transfers_of(pair.ours).downloads == 11  # a version counter has told
    pair.assert_equal()


def test_a_parameter_may_become_another_tensor() -> None:
    pair = Pair(SGD, lambda: leaves([(3, 2), (4,)], torch.float32), lr=0.1, backend="eager")
    for seed, change in enumerate((lambda value: value, lambda value: value.double(), lambda value: value.float()[1:])):
        for optimizer in pair.both:
            for param in params_of(optimizer):
                param.grad = None
                param.data = change(param.data)
        pair.step(seed)
        pair.assert_equal()


def test_the_host_looks_for_nothing_between_steps() -> None:
    pair = Pair(AdamW, lr=0.01)
    for seed in range(3):
        for optimizer in pair.both:
            give_grads(params_of(optimizer), seed)
            optimizer.step()
    flush(pair.both)
    pair.assert_equal()


def test_an_error_names_the_gradient_that_is_not_finite() -> None:
    pair = Pair(SGD, lr=0.1, nonfinite="raise")
    for optimizer in pair.both:
        give_grads(params_of(optimizer), 0)
        params_of(optimizer)[1].grad = torch.full((7, 5), torch.nan)
        with pytest.raises(FloatingPointError, match=re.escape("gradient of param_groups[0]['params'][1]. Nothing")):
            optimizer.step()
    pair.step(0)
    pair.assert_equal()


@pytest.mark.parametrize(
    ("backend", "options"), [("auto", {}), ("eager", dict(ema=0.9, cautious="decay")), ("foreach", {})]
)
def test_other_options_mean_what_they_do_without_it(backend: Any, options: dict[str, Any]) -> None:
    def groups() -> list[Any]:
        params = leaves([(9, 4), (5,), (6,)], torch.float32)
        return [{"params": params[:1]}, {"params": params[1:], "maximize": True, "lr": 0.5}]

    pair = Pair(AdamW, groups, lr=0.01, max_norm=0.5, nonfinite="skip", backend=backend, **options)
    for seed in range(3):
        pair.step(seed)
        pair.assert_equal()
        assert pair.ours.grad_norm == pair.plain.grad_norm

    def bad(params: list[Tensor], seed: int) -> None:
        give_grads(params, seed)
        params[1].grad = torch.full_like(params[1], torch.nan)

    before = snapshot(pair.ours)
    pair.step(0, bad)
    assert_unmoved(pair.ours, before)
    assert [optimizer.skipped_steps for optimizer in pair.both] == [1, 1]
    pair.step(4)
    if "ema" in options:
        with pair.ours.averaged(), pair.plain.averaged():
            assert all(map(torch.equal, *map(params_of, pair.both)))
    pair.step(5)
    pair.assert_equal()
    pair.ours.state_device = None
    pair.step(6)
    assert not pair.ours.host_copies  # pinned memory is dear
    pair.ours.state_device = "cpu"
    pair.step(7)
    pair.assert_equal()


@pytest.mark.parametrize("amp", [None, "fused"])
def test_scaled_training_is_that_without_it(amp: Any) -> None:
    pair = Pair(SGD, lr=0.1, amp=amp)
    scalers = [GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in pair.both]
    for factor in (1.0, torch.inf, 1.0, 1.0):
        for optimizer, scaler in zip(pair.both, scalers, strict=True):
            optimizer.zero_grad()
            loss = sum(torch.tanh(param).square().sum() for param in params_of(optimizer))
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            flush([optimizer])
            scaler.update()
        pair.assert_equal()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LAMB, dict(lr=0.01)),
        (AdamWScheduleFree, dict(lr=0.01)),
        (Muon, dict(lr=0.01, backend="auto")),
        (SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    ],
)
def test_methods_of_all_kinds_step(kind: Any, options: dict[str, Any]) -> None:
    shapes = [(4, 3), (5, 4)]
    pair = Pair(kind, lambda: leaves(shapes, torch.float32), **{"backend": "eager", **options})
    for seed in range(3):
        pair.step(seed)
        pair.assert_equal()
    if isinstance(pair.ours, AdamWScheduleFree):
        for optimizer in pair.both:
            optimizer.eval()  # type: ignore[attr-defined]
            optimizer.train()  # type: ignore[attr-defined]
        pair.step(3)
        pair.assert_equal()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_any_memory_order_and_dtype_comes_and_goes(dtype: torch.dtype) -> None:
    def make() -> list[Tensor]:
        values = torch.linspace(-1, 1, 24).to(dtype)
        return [values.view(4, 6).t().clone().requires_grad_(), values.view(4, 6)[:, ::2].detach().requires_grad_()]

    def expanded(params: list[Tensor], seed: int) -> None:
        params[0].grad = torch.arange(4.0).to(dtype).expand(6, 4)
        params[1].grad = torch.ones(3, 4, dtype=dtype).t()

    pair = Pair(SGD, make, lr=0.1, momentum=0.9)
    for seed in range(3):
        pair.step(seed, expanded)
        pair.assert_equal()


def test_parameters_that_share_memory_are_stepped_in_order() -> None:
    def make() -> list[Tensor]:
        whole = torch.linspace(-1, 1, 10)
        return [whole[:6].requires_grad_(), torch.ones(2, requires_grad=True), whole[4:].requires_grad_()]

    def grads(params: list[Tensor], seed: int) -> None:
        give_grads(params, seed)
        params[2].grad = params[0].detach()  # which the first update changes

    pair = Pair(SGD, make, lr=0.1, momentum=0.9)
    for seed in range(3):
        pair.step(seed, grads)
        pair.assert_equal()

    def overlap(params: list[Tensor]) -> None:
        params[1].data = params[0].data[:2]

    pair.edit(overlap)
    for seed in range(3, 5):
        pair.step(seed, grads)
        pair.assert_equal()

    def rows(params: list[Tensor], seed: int) -> None:
        for param in params:
            param.grad = torch.sparse_coo_tensor([[1, 5]], torch.ones(2), param.shape)

    pair = Pair(AdamW, lambda: make()[::2], lr=0.1, sparse="touched")
    for seed in range(3):
        pair.step(seed, rows)
        pair.assert_equal()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamW, dict(sparse="touched")), (SparseAdam, {}), (SGD, dict(momentum=0.9))],
    ids=["touched", "SparseAdam", "all rows"],
)
def test_sparse_gradients_come_as_indices_and_values(kind: Any, options: dict[str, Any]) -> None:
    rows, width = 1000, 3

    def grads(params: list[Tensor], seed: int) -> None:
        indices = torch.randint(rows, (1, 5), generator=torch.Generator().manual_seed(seed))
        indices[0, 1] = indices[0, 0]  # a row that is named twice
        params[0].grad = torch.sparse_coo_tensor(indices, torch.full((5, width), 1.0 + seed), (rows, width))

    options = {"lr": 0.1, "max_norm": 0.5, **options} if kind is not SparseAdam else {"lr": 0.1}
    pair = Pair(kind, lambda: leaves([(rows, width)], torch.float32), **options)
    for seed in range(3):
        pair.step(seed, grads)
        pair.edit(lambda params: params[0].data.mul_(0.9))
    pair.assert_equal()
    transfers = transfers_of(pair.ours)
    moved = 3 * 4 * width if kind is not SGD else 3 * rows * width
    assert (transfers.downloaded, transfers.uploaded) == (moved, moved)
    if kind is AdamW:  # the host has not seen the other rows
        pair.step(3)
        pair.assert_equal()


def test_a_sparse_gradient_with_a_row_out_of_range_is_refused() -> None:
    pair = Pair(SparseAdam, lambda: leaves([(4, 2)], torch.float32), lr=0.1)
    param = params_of(pair.ours)[0]
    param.grad = torch.sparse_coo_tensor([[9]], torch.ones(1, 2), (4, 2), check_invariants=False)
    before = snapshot(pair.ours)
    with pytest.raises(IndexError, match="Nothing has moved"):
        pair.ours.step()
    assert_unmoved(pair.ours, before)


def test_state_goes_to_an_optimizer_without_it_and_back() -> None:
    pair = Pair(AdamW, lr=0.01)
    pair.step(0)
    crossed = Pair(AdamW, lr=0.5)
    crossed.ours.load_state_dict(pair.plain.state_dict())
    crossed.plain.load_state_dict(pair.ours.state_dict())
    for seed in range(1, 3):
        crossed.step(seed)
    crossed.assert_equal()


def test_a_monitor_sees_the_same() -> None:
    pair = Pair(SGD, lambda: leaves([(6, 5), (4,)], torch.float32), lr=0.1, momentum=0.9, backend="eager")
    monitors = [Monitor(optimizer, every=1, on=()) for optimizer in pair.both]
    for seed in range(2):
        pair.step(seed)
    ours, plain = (monitor.read() for monitor in monitors)
    assert len(plain["params"]) == 2
    assert ours == plain


def test_copies_and_pickles_go_on() -> None:
    pair = Pair(AdamW, lr=0.01)
    pair.step(0)
    again = copy.deepcopy(pair.ours)
    assert again.state_device == "cpu"
    for optimizer in (*pair.both, again):
        give_grads(params_of(optimizer), 1)
        step(optimizer)
    pair.assert_equal()
    assert all(map(torch.equal, params_of(again), params_of(pair.plain)))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, dict(ema=0.5)),
        (torch.float32, dict(state_dtype="8bit")),
        (torch.bfloat16, dict(rounding="compensated")),
    ],
    ids=["plain", "8bit", "compensated"],
)
def test_state_of_another_device_is_made_and_loaded_on_the_cpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    param = torch.zeros(64, 100, dtype=dtype, device="meta", requires_grad=True)  # stands for one that has values
    optimizer = AdamW([param], state_device="cpu", **options)
    if "ema" not in options:  # it starts as the values
        optimizer.init_state()
        assert {value.device.type for value in optimizer.state[param].values()} == {"cpu"}
    twin = torch.zeros(64, 100, dtype=dtype, requires_grad=True)
    saved = AdamW([twin], **options)
    give_grads([twin], 0)
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    assert_same_bits(state_of(optimizer), state_of(saved))
    assert {value.device.type for value in optimizer.state[param].values()} == {"cpu"}
    give_grads([param], 0)
    optimizer.state_device = None
    with pytest.raises(RuntimeError, match=r"load_state_dict.* moves it. Nothing has moved"):
        optimizer.step()


def test_parameters_on_the_cpu_are_stepped_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda param: param.dim() == 1)
    pair = Pair(AdamW, lr=0.01, max_norm=0.5)
    for seed in range(3):
        pair.step(seed)
    pair.assert_equal()
    assert {id(param) for param in pair.ours.host_copies} == {
        id(param) for param in params_of(pair.ours) if param.dim() == 1
    }
    pretend(monkeypatch, lambda param: False)
    optimizer = AdamW(leaves(), state_device="cpu")
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    assert not optimizer.transfers


def test_steps_inside_backward() -> None:
    models = [network(), network()]
    optimizers = [SGD(models[0].parameters(), lr=0.1, state_device="cpu"), SGD(models[1].parameters(), lr=0.1)]
    for model, optimizer in zip(models, optimizers, strict=True):
        in_backward(optimizer)
        for seed in range(3):
            loss_of(model, seed).backward()
            step(optimizer)
    assert optimizers[0].transfers
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_two_optimizers_of_one_parameter_see_each_others_steps() -> None:
    results = []
    for options in (dict(state_device="cpu"), {}):
        params = leaves([(260, 256)], torch.float32)
        optimizers = [SGD(params, lr=0.1, momentum=0.9, **options) for _ in range(2)]  # type: ignore[arg-type]
        for seed in range(4):
            give_grads(params, seed)
            step(optimizers[seed % 2])
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_a_step_is_whole_or_not_at_all() -> None:
    def steps() -> None:
        give_grads(params, 0)
        ours.step()
        flush([ours])

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        params, twins = (leaves([(7, 5), (3,)], torch.float32) for _ in range(2))
        ours, straight = SGD(params, lr=0.1, state_device="cpu", max_norm=1.0), SGD(twins, lr=0.1, max_norm=1.0)
        give_grads(twins, 0)
        straight.step()
        taken = 1
        give_grads(params, 0)
        step(ours)
        for was_raised in interrupted_everywhere(steps, stride=13):
            flush([ours])
            if not (was_raised and torch.equal(params[0], twins[0])):
                straight.step()
                taken += 1
            assert all(map(torch.equal, params, twins))
        assert taken > 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_device_is_right_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(SGD, lr=0.1)
    pair.step(0)
    with monkeypatch.context() as patch:
        patch.setattr(buckets.Bucket, "leave", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pair.ours.step()
    pair.step(1)
    pair.assert_equal()


def test_nothing_is_under_way_after_an_error() -> None:
    pair = Pair(SGD, lr=0.1)
    pair.step(0)
    pair.ours.param_groups[0]["lr"] = "fast"
    with pytest.raises(ValueError, match="learning rate"):
        pair.ours.step()
    assert transfers_of(pair.ours).is_idle  # gradients may be let go of
    pair.ours.param_groups[0]["lr"] = 0.1
    pair.step(1)
    pair.assert_equal()


# Refused, before anything moves.


def refused(optimizer: FirstOrder, match: str) -> None:
    before = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    flush([optimizer])
    assert all(map(torch.equal, before, params_of(optimizer)))


def test_steps_that_the_host_cannot_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = leaves([(3,)], torch.float32)
    give_grads(params, 0)
    refused(AdamW(params, state_device="cpu", differentiable=True), "leave out `differentiable`")
    monkeypatch.setattr(AdamW, "check_param", lambda *arguments: None)  # torch allows it on devices
    refused(AdamW(params, state_device="cpu", capturable=True), "leave out `capturable`")


def test_parameters_that_cannot_be_copied_are_refused() -> None:
    expanded = torch.zeros(1).expand(3).requires_grad_()
    expanded.grad = torch.ones(3)
    refused(SGD([expanded], lr=0.1, state_device="cpu"), "the parameter is expanded")
    odd = torch.zeros(3).as_subclass(type("Odd", (Tensor,), {})).requires_grad_()
    odd.grad = torch.ones(3)
    refused(SGD([odd], lr=0.1, state_device="cpu"), "is a Odd")
    params = leaves([(3,)], torch.float32)
    give_grads(params, 0)
    optimizer = SGD(params, lr=0.1, state_device="cpu")
    step(optimizer)
    assert params[0].grad is not None
    params[0].grad.untyped_storage().resize_(0)
    refused(optimizer, "memory of its gradient has been freed")


@pytest.mark.parametrize("options", [dict(sparse="exact"), dict(shard_state=object()), dict(state_device="cuda")])
def test_options_that_exclude_it_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="state_device"):
        AdamW([torch.zeros(2)], **{"state_device": "cpu", **options})
