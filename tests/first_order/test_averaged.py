"""``ema``: averages in the pass that steps, and ``averaged``, which exchanges them with the weights for a while."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DENSE_BACKENDS, Case, give_grads, leaves, params_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from descend import SGD, AdamW, AdamWScheduleFree, Lion, Monitor, Muon, in_backward
from descend.state import averages

EMA = 0.9
INSIDE = r"inside `with optimizer\.averaged\(\)` the weights are their averages"


def trained(backend: str = "auto", dtype: torch.dtype = torch.float32, steps: int = 10, **options: Any) -> Any:
    """A model, its optimizer with averages, and torch's average of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    average.update_parameters(model)  # the first average is the model as it is
    optimizer = AdamW(model, lr=0.01, ema=EMA, backend=backend, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    return model, optimizer, average


def values_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_averages_are_those_of_torchs_averaged_model(backend: str) -> None:
    model, optimizer, average = trained(backend)
    with optimizer.averaged():
        for ours, theirs in zip(model.parameters(), average.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_method_can_be_averaged_and_moves_as_without(case: Case) -> None:
    ours, plain = leaves(), leaves()
    averaged = [param.detach().clone() for param in ours]
    optimizer, other = (
        case.ours(ours, **case.options, ema=0.75, backend="eager"),
        case.ours(plain, **case.options, backend="eager"),
    )
    for seed in range(4):
        for params in (ours, plain):
            give_grads(params, seed)
        optimizer.step()
        other.step()
        averaged = [old + 0.25 * (new.detach() - old) for old, new in zip(averaged, ours, strict=True)]
    assert all(map(torch.equal, ours, plain))
    for param, expected in zip(ours, averaged, strict=True):
        torch.testing.assert_close(optimizer.state[param]["ema"], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_weights_and_averages_are_exchanged_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    params = [torch.randn(5, 3, dtype=dtype), torch.randn(3, 5, dtype=dtype).t(), torch.randn((), dtype=dtype)]
    params = [param.requires_grad_() for param in params]
    state_dtype = None if dtype.is_complex else torch.bfloat16
    optimizer = SGD(params, lr=0.5, ema=EMA, state_dtype=state_dtype, backend="eager")
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    kept = [optimizer.state[param]["ema"].clone() for param in params]
    assert {tensor.dtype for tensor in kept} == {torch.promote_types(dtype, torch.float32)}
    for _ in range(2):
        with optimizer.averaged():
            assert all(torch.equal(param, ema.to(dtype)) for param, ema in zip(params, kept, strict=True))
        assert all(map(torch.equal, params, before))
        assert all(torch.equal(optimizer.state[param]["ema"], ema) for param, ema in zip(params, kept, strict=True))
    optimizer.step()


def test_no_second_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "CHUNK", 10)
    (param,) = leaves([(97,)])
    optimizer = SGD([param], lr=0.5, ema=EMA)
    give_grads([param], 0)
    optimizer.step()
    before, ema = param.detach().clone(), optimizer.state[param]["ema"]
    place, kept = ema.data_ptr(), ema.clone()
    with optimizer.averaged():
        assert torch.equal(param, kept)
        assert torch.equal(ema, before)  # the weights are where the average was
    assert optimizer.state[param]["ema"].data_ptr() == place
    assert torch.equal(param, before)


def test_parameters_without_an_average_keep_their_values() -> None:
    first, second = leaves([(3,), (3,)])
    optimizer = SGD([first, second], lr=0.5, ema=EMA)
    give_grads([first], 0)
    optimizer.step()
    before = second.detach().clone()
    with optimizer.averaged():
        assert torch.equal(second, before)
    assert "ema" not in optimizer.state[second]


def test_a_parameter_in_two_groups_of_memory_comes_back() -> None:
    memory = torch.randn(8, dtype=torch.float64)
    params = [memory[:5].requires_grad_(), memory[3:].requires_grad_()]
    optimizer = SGD(params, lr=0.5, ema=EMA)
    give_grads(params, 0)
    optimizer.step()
    before = memory.detach().clone()
    with optimizer.averaged():
        pass
    assert torch.equal(memory.detach(), before)


FORBIDDEN: list[Callable[[Any], Any]] = [
    lambda optimizer: optimizer.step(),
    lambda optimizer: optimizer.state_dict(),
    lambda optimizer: optimizer.load_state_dict({}),
    copy.deepcopy,
    pickle.dumps,
    lambda optimizer: optimizer.averaged().__enter__(),
]


@pytest.mark.parametrize("act", FORBIDDEN)
def test_inside_the_block_nothing_else_happens(act: Callable[[Any], Any]) -> None:
    model, optimizer, _ = trained(steps=2)
    before = values_of(model)
    with optimizer.averaged():
        inside = values_of(model)
        with pytest.raises(RuntimeError, match=INSIDE):
            act(optimizer)
        assert all(map(torch.equal, model.parameters(), inside))
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()


def test_a_step_inside_backward_is_refused_too() -> None:
    model, optimizer, _ = trained(steps=2)
    in_backward(optimizer)
    before = values_of(model)
    with optimizer.averaged(), pytest.raises(RuntimeError, match=INSIDE):
        model(torch.randn(4, 5)).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))


def test_without_ema_there_is_nothing_to_put_in_place() -> None:
    with pytest.raises(ValueError, match="AdamW: there are no averages"), AdamW([torch.zeros(1)]).averaged():
        pass


@pytest.mark.parametrize("value", [1.0, -0.1, "0.9", float("nan"), True])
def test_ema_is_a_number_below_one(value: Any) -> None:
    with pytest.raises(ValueError, match="SGD: ema must be a number in"):
        SGD([torch.zeros(1)], ema=value)


def test_exact_tables_have_no_averages() -> None:
    with pytest.raises(ValueError, match=r"sparse='exact' cannot catch up with ema=0\.9"):
        AdamW([torch.zeros(1)], ema=0.9, sparse="exact")


def test_weights_come_back_after_an_exception_and_after_ctrl_c() -> None:
    model, optimizer, _ = trained(steps=2)
    before = values_of(model)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        signal.raise_signal(signal.SIGINT)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("call", [0, 1, 2])
def test_ctrl_c_in_the_middle_of_the_exchange_waits(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    model, optimizer, _ = trained(steps=2)
    before, swap, calls = values_of(model), averages._swap, []

    def interrupted(*tensors: Tensor) -> None:
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        calls.append(tensors)
        swap(*tensors)

    monkeypatch.setattr(averages, "_swap", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        pass
    assert all(map(torch.equal, model.parameters(), before))
    with optimizer.averaged():  # not left in the middle
        pass


def test_rows_that_a_gradient_names_are_averaged_alone() -> None:
    table = nn.Embedding(10, 2, sparse=True, dtype=torch.float64)
    optimizer = AdamW(table.parameters(), lr=0.1, ema=0.5, sparse="touched")
    old = table.weight.detach().clone()
    table(torch.tensor([1, 3, 3])).sum().backward()
    optimizer.step()
    table.weight.grad = None
    ema = optimizer.state[table.weight]["ema"]
    expected = old.clone()
    expected[[1, 3]] = (old[[1, 3]] + table.weight.detach()[[1, 3]]) / 2
    torch.testing.assert_close(ema, expected)
    with optimizer.averaged():
        assert torch.equal(table.weight, ema) is False  # they have changed places
        torch.testing.assert_close(table.weight.detach(), expected)


# Checkpoints.


def test_checkpoints_by_name_contain_averages() -> None:
    model, optimizer, _ = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    other = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    other.load_state_dict(model.state_dict())
    again = AdamW(list(other.named_parameters())[::-1], ema=EMA)
    again.load_state_dict(saved)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(again.state[ours]["ema"], optimizer.state[theirs]["ema"])
    for net, each in ((model, optimizer), (other, again)):
        net.zero_grad()
        net(torch.ones(1, 5)).sum().backward()
        each.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(again.state[ours]["ema"], optimizer.state[theirs]["ema"])


@pytest.mark.parametrize("kind", [AdamW, Lion, SGD])
def test_a_checkpoint_without_averages_begins_them_where_the_parameters_are(kind: Any) -> None:
    options: dict[str, Any] = dict(lr=0.1, backend="eager")
    options |= dict(momentum=0.9, dampening=0.5) if kind is SGD else {}
    (plain,) = leaves([(33,)])
    optimizer = kind([plain], **options)
    give_grads([plain], 0)
    optimizer.step()
    param = plain.detach().clone().requires_grad_()
    again = kind([param], **options, ema=0.5)
    again.load_state_dict(optimizer.state_dict())
    assert "ema" not in again.state_dict()["state"][0]
    loaded = param.detach().clone()
    for params, each in (([plain], optimizer), ([param], again)):
        give_grads(params, 1)
        each.step()
    assert torch.equal(param, plain)  # the step count, or that it is not the first, has been kept
    torch.testing.assert_close(again.state[param]["ema"], (loaded + param.detach()) / 2)


def test_an_average_in_half_precision_is_loaded_in_float32() -> None:
    param = torch.randn(5).requires_grad_()
    optimizer = SGD([param], ema=EMA)
    give_grads([param], 0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["ema"] = saved["state"][0]["ema"].bfloat16()
    other = SGD([param.detach().bfloat16().requires_grad_()], ema=EMA)
    other.load_state_dict(saved)
    assert other.state_dict()["state"][0]["ema"].dtype == torch.float32


def test_averages_can_be_turned_on_and_off_between_steps() -> None:
    (param,) = leaves([(33,)])
    optimizer = AdamW([param], lr=0.1)
    for ema in (None, 0.5, None):
        optimizer.ema = ema
        old = param.detach().clone()
        give_grads([param], 0)
        optimizer.step()
        if ema is not None:
            kept = (old + param.detach()) / 2
    torch.testing.assert_close(optimizer.state[param]["ema"], kept)  # as it was when it was turned off


def test_state_made_without_a_step_begins_at_the_parameters() -> None:
    (param,) = leaves([(33,)])
    optimizer = SGD([param], lr=0.1, ema=0.5)
    optimizer.init_state()
    assert torch.equal(optimizer.state_dict()["state"][0]["ema"], param)


# Others.


def test_schedule_free_modes_are_refused_inside() -> None:
    (param,) = leaves([(33,)])
    optimizer = AdamWScheduleFree([param], ema=0.5)
    give_grads([param], 0)
    optimizer.step()
    with optimizer.averaged(), pytest.raises(RuntimeError, match=INSIDE):
        optimizer.eval()


def test_a_monitor_sees_the_same_steps() -> None:
    found = []
    for options in ({}, dict(ema=0.5)):
        (param,) = leaves([(129,)], torch.float32)
        optimizer = AdamW([("weight", param)], lr=0.1, **options)
        with Monitor(optimizer, every=1) as monitor:
            give_grads([param], 0)
            optimizer.step()
            found.append(monitor.read()["params"])
    assert found[0] == found[1]


def test_an_optimizer_with_averages_is_freed_with_its_last_name() -> None:
    params = leaves([(3,)])
    optimizer = AdamW(params, ema=0.5, cautious="decay")
    reference = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()


def test_a_model_with_muon_and_adamw_inside_is_averaged_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    shown, weights = [], []
    for options in ({}, dict(ema=0.5)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4))
        optimizer = Muon(model, lr=0.02, adamw=dict(lr=0.01), **options)
        old = values_of(model)
        model(torch.tensor([1, 2])).square().sum().backward()
        shown.append([row.options for row in optimizer.summary()])
        optimizer.step()
        weights.append(values_of(model))
        assert not optimizer.options.ema or len(optimizer.methods()) == 2
    assert shown[0] == shown[1]
    assert all(map(torch.equal, *weights))
    with optimizer.averaged():
        for param, before, after in zip(model.parameters(), old, weights[1], strict=True):
            torch.testing.assert_close(param.detach(), (before + after) / 2)


def test_summary_counts_the_memory_of_averages() -> None:
    _, optimizer, _ = trained(steps=1)
    (row,) = optimizer.summary()
    assert row.state_bytes == sum(3 * 4 * param.numel() + 4 for param in params_of(optimizer))
