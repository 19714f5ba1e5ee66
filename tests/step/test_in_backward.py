"""Steps inside backward are the ordinary steps, bit for bit, with one gradient at a time."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backward_cases import assert_same_params_and_state, loss_of, network
from cases import BACKENDS, CASES, INDEPENDENT, Case, one_in, params_of
from torch import Tensor, nn
from torch.optim import lr_scheduler

from descend import SGD, AdamW, FirstOrder, SparseAdam, from_rule, in_backward


def decayed_sign(param, grad, lr, decay):
    return param - lr * (grad / (1 + grad * grad) + decay * param)


Own = from_rule(decayed_sign, "Own", lr=0.1, decay=0.01)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Mixed(nn.Module):
    """Parameters of several dtypes, shapes and layouts; one is complex, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(4, 3, dtype=dtype) for dtype in DTYPES)
        self.transposed = nn.Parameter(torch.randn(3, 4).mT)
        self.complex = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.large = nn.Parameter(torch.randn(40_000))  # several chunks

    def forward(self, x: Tensor) -> Tensor:
        total = torch.tanh(self.scalar) * self.transposed.square().sum() + self.complex.abs().square().sum()
        for weight in self.weights:
            total = total + torch.tanh(weight.float() * x.mean()).sum()
        return total / 10 + (self.large * self.frozen.sum()).square().mean()


Loop = Callable[[FirstOrder, Callable[[int], Tensor], Callable[[], Any]], None]


def ordinary_loop(optimizer: FirstOrder, loss: Callable[[int], Tensor], after: Callable[[], Any]) -> None:
    for seed in range(5):
        optimizer.zero_grad()
        loss(seed).backward()
        optimizer.step()
        after()


def without_step(optimizer: FirstOrder, loss: Callable[[int], Tensor], after: Callable[[], Any]) -> None:
    for seed in range(5):
        loss(seed).backward()
        after()


def with_closure(optimizer: FirstOrder, loss: Callable[[int], Tensor], after: Callable[[], Any]) -> None:
    for seed in range(5):

        def closure(seed: int = seed) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            value = loss(seed)
            value.backward()
            return value

        assert isinstance(optimizer.step(closure), Tensor)
        after()


def run(
    model: nn.Module, optimizer: FirstOrder, loop: Loop = ordinary_loop, schedule: Callable[[Any], Any] | None = None
) -> None:
    scheduler = schedule(optimizer) if schedule else None
    loop(optimizer, lambda seed: loss_of(model, seed), scheduler.step if scheduler else lambda: None)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, "weight_decay": 0.2}]


@pytest.mark.parametrize(("case", "dtype", "backend"), one_in(2, [*INDEPENDENT, Case(Own, SGD, {})], DTYPES, BACKENDS))
def test_steps_are_the_ordinary_ones(case: Case, dtype: torch.dtype, backend: str) -> None:
    assert_ordinary(case, dtype, backend, ordinary_loop)


@pytest.mark.parametrize("loop", [without_step, with_closure], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_every_kind_of_loop_goes_on_working(case: Case, loop: Loop) -> None:
    assert_ordinary(case, torch.float32, "cpu", loop)


def assert_ordinary(case: Case, dtype: torch.dtype, backend: str, loop: Loop) -> None:
    torch.set_num_threads(1)
    optimizers = []
    for inside in (False, True):
        model = network(dtype)
        optimizer = case.ours(model.parameters(), **case.options, backend=backend)
        if inside:
            in_backward(optimizer)
        run(model, optimizer, loop if inside else ordinary_loop)
        assert all((param.grad is None) == inside for param in model.parameters())
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


@pytest.mark.parametrize("kind", [Mixed, network], ids=["mixed", "network"])
@pytest.mark.parametrize(
    "schedule", [None, lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9)], ids=["", "OneCycleLR"]
)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5]], ids=str)
def test_groups_schedules_and_dtypes_go_on_working(
    case: Case, tensor_lr: bool, schedule: Callable[[Any], Any] | None, kind: Callable[[], nn.Module]
) -> None:
    options = {**case.options, "lr": torch.tensor(0.05, dtype=torch.float64)} if tensor_lr else case.options
    optimizers = []
    for inside in (False, True):
        model = kind()
        groups = groups_of(model)
        if tensor_lr:
            groups[1]["lr"] = torch.tensor(0.03)
        optimizer = case.ours(groups, **options)
        if inside:
            in_backward(optimizer)
        run(model, optimizer, ordinary_loop, schedule)
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


SPARSE: list[tuple[type[FirstOrder], dict[str, Any]]] = [
    (SGD, dict(lr=0.1)),
    (SGD, dict(lr=0.1, momentum=0.9)),
    (AdamW, dict(lr=0.1, sparse="touched")),
    (AdamW, dict(lr=0.1, sparse="exact")),
    (SparseAdam, dict(lr=0.1)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ours", "options"), SPARSE, ids=str)
def test_sparse_gradients_step_too(ours: type[FirstOrder], options: dict[str, Any], backend: str) -> None:
    optimizers = []
    for inside in (False, True):
        torch.manual_seed(0)
        table, head = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 2)
        params = [*table.parameters(), *([] if ours is SparseAdam else head.parameters())]
        optimizer = ours(params, backend=backend, **options)
        if options.get("sparse") == "exact":
            optimizer.attach(table)
        if inside:
            in_backward(optimizer)
        for seed in range(6):
            words = torch.randint(20, (7,), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            (head(table(words)).square().sum() + table(words[:2]).sum()).backward()
            optimizer.step()
        assert inside == (table.weight.grad is None)
        optimizer.settle()
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


# Memory.


def test_one_gradient_lives_at_a_time() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    alive: list[Any] = []
    most = 0

    def note(param: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(param.grad))
        most = max(most, sum(ref() is not None for ref in alive))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(note)
    in_backward(optimizer)
    for seed in range(3):
        loss_of(model, seed).backward()
    assert len(alive) == 3 * len(params_of(optimizer))
    assert most == 1
    assert all(ref() is None for ref in alive)


def test_gradients_are_taken_over_and_not_copied() -> None:
    addresses: list[list[int]] = []
    for inside in (False, True):
        weight = torch.ones(1000, requires_grad=True)
        if inside:
            in_backward(SGD([weight]))
        made: list[int] = []
        weight.register_hook(lambda grad, made=made: made.append(grad.data_ptr()))
        taken: list[int] = []
        if inside:  # before ours, which lets it go
            weight._post_accumulate_grad_hooks.clear()
        weight.register_post_accumulate_grad_hook(lambda p, taken=taken: taken.append(p.grad.data_ptr()))
        weight.square().sum().backward()
        assert made == taken
        addresses.append(taken)


def test_everything_is_collected_together() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    in_backward(optimizer)
    loss_of(model, 0).backward()
    refs = [weakref.ref(optimizer), weakref.ref(next(model.parameters()))]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_parameters_keep_the_optimizer_alive() -> None:
    model = network()
    in_backward(AdamW(model.parameters(), lr=0.1))
    gc.collect()
    before = [param.detach().clone() for param in model.parameters()]
    loss_of(model, 0).backward()
    assert not any(map(torch.equal, before, model.parameters()))


# Checkpoints and copies.


def ways(optimizer: FirstOrder) -> Iterator[FirstOrder]:
    yield copy.deepcopy(optimizer)
    yield pickle.loads(pickle.dumps(optimizer))


def test_checkpoint_goes_on_bit_for_bit() -> None:
    optimizers = []
    for inside in (False, True):
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.1)
        if inside:
            in_backward(optimizer)
        run(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        run(model, optimizer)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        run(model, optimizer)
        fresh_model = network()
        fresh = AdamW(fresh_model.parameters(), lr=0.1)
        fresh_model.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        if inside:
            in_backward(fresh)
        run(fresh_model, fresh)
        optimizers += [optimizer, fresh]
    for other in optimizers[1:]:
        assert_same_params_and_state(optimizers[0], other)


def test_copies_are_ordinary() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = in_backward(optimizer)
    loss_of(model, 0).backward()
    for twin in ways(optimizer):
        assert twin.in_backward is None
        assert not twin._step_supports_amp_scaling
        assert not any(param._post_accumulate_grad_hooks or param._backward_hooks for param in params_of(twin))
        assert_same_params_and_state(twin, optimizer)
    assert optimizer.in_backward is handle
    assert all(not param._backward_hooks for param in copy.deepcopy(model).parameters())


def test_schedulers_are_content_with_either_loop() -> None:
    for loop in (ordinary_loop, without_step):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1)
        in_backward(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, optimizer, loop, lambda o: lr_scheduler.ExponentialLR(o, 0.5))
        assert optimizer.param_groups[0]["lr"] == 0.1 / 32
