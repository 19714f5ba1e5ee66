"""Steps that are decided on a device.

There need not be one: here the eager backend's CPU tensors count as being on a device, and whatever would read a number
back from it is an error.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, Case, give_grads, params_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import descend
from descend import SGD, AdamW, Monitor, NAdam
from descend.backends import eager
from descend.core.decision import NORM
from descend.step import decide, scaling

OPTIONS = [dict(max_norm=0.5), dict(nonfinite="skip"), dict(max_norm=0.5, nonfinite="skip")]


@pytest.fixture(autouse=True)
def cpu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_device(tensors: Any) -> Tensor:
        return torch.stack([eager._sum_of_squares(tensor) for tensor in tensors]).sum()

    monkeypatch.setattr(eager.EagerDecisions, "takes", lambda self, device: True)
    monkeypatch.setattr(eager, "sums_of_squares", on_device)
    for module in (decide, scaling):
        monkeypatch.setattr(module, "is_on_device", lambda value: isinstance(value, Tensor))


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "the host waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    with _NoReads():
        yield


@pytest.fixture(params=["eager", "foreach"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def two(case: Case, backend: str, **options: Any) -> tuple[Any, Any]:
    """The same optimizer twice: decided on a device, and on the host."""
    params = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    copies = [param.detach().clone().requires_grad_() for param in params]
    return (
        case.ours(params, backend=backend, **case.options, **options),
        case.ours(copies, backend="cpu", **case.options, **options),
    )


def assert_same(optimizer: Any, expected: Any) -> None:
    """Equal to rounding: scalars are formed in another order."""
    for param, other in zip(params_of(optimizer), params_of(expected), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
        state, other_state = optimizer.state[param], expected.state[other]
        assert list(state) == list(other_state)
        for name in state:
            torch.testing.assert_close(state[name], other_state[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_match_those_that_the_host_decides(case: Case, options: dict[str, Any], backend: str) -> None:
    device, host = two(case, backend, **options)
    for seed in range(6):
        for optimizer in (device, host):
            give_grads(params_of(optimizer), seed)
            if seed == 3 and "nonfinite" in options:
                params_of(optimizer)[1].grad[2] = torch.nan
            optimizer.step()
    assert device.grad_norm == pytest.approx(host.grad_norm, rel=1e-12)
    assert device.skipped_steps == host.skipped_steps == ("nonfinite" in options)
    assert_same(device, host)


def test_a_steady_step_reads_nothing(backend: str) -> None:
    for options in OPTIONS[1:]:
        weight = torch.randn(5, requires_grad=True)
        optimizer = AdamW([weight], backend=backend, **options)
        for seed in range(3):
            give_grads([weight], seed)
            if seed:
                with no_reads():
                    optimizer.step()
            else:
                optimizer.step()


def test_a_step_left_out_moves_nothing(backend: str) -> None:
    weight = torch.randn(5, requires_grad=True)
    optimizer = NAdam([weight], backend=backend, nonfinite="skip")
    give_grads([weight], 0)
    optimizer.step()
    before = weight.detach().clone(), copy.deepcopy(dict(optimizer.state[weight]))
    weight.grad = torch.full((5,), torch.inf)
    optimizer.step()
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in optimizer.state[weight].items())
    assert optimizer.state[weight]["step"] == 1
    assert optimizer.skipped_steps == 2
    optimizer.skipped_steps = 5
    optimizer.step()
    assert optimizer.skipped_steps == 6


def test_the_first_step_may_be_left_out(backend: str) -> None:
    device, host = two(CASES[7], backend, nonfinite="skip")
    for optimizer in (device, host):
        give_grads(params_of(optimizer), 0)
        params_of(optimizer)[0].grad[0] = torch.nan
        optimizer.step()
        assert all(param.isfinite().all() for param in params_of(optimizer))
        for seed in (1, 2):
            give_grads(params_of(optimizer), seed)
            optimizer.step()
    assert_same(device, host)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_loss_scale_and_overflow_are_read_on_the_device(max_norm: float | None, backend: str) -> None:
    device, host = two(CASES[5], backend, amp="fused", max_norm=max_norm)
    for seed in range(5):
        for optimizer in (device, host):
            give_grads(params_of(optimizer), seed)
            for param in params_of(optimizer):
                param.grad *= 1024.0
            found = torch.tensor(float(seed == 2))
            optimizer.found_inf, optimizer.grad_scale = (found, torch.tensor(1024.0))
            if optimizer is host:
                optimizer.found_inf, optimizer.grad_scale = float(seed == 2), 1024.0
            if optimizer is device and seed > 2:
                with no_reads():
                    optimizer.step()
            else:
                optimizer.step()
    assert device.state[params_of(device)[0]]["step"] == 4
    assert device.skipped_steps == 0  # as on the host: the scaler counts its own
    if max_norm:
        assert device.grad_norm == pytest.approx(host.grad_norm, rel=1e-12)
    assert_same(device, host)


def test_a_learning_rate_on_the_device_is_not_read(backend: str) -> None:
    weight, other = (torch.ones(5, requires_grad=True) for _ in range(2))
    lr = torch.tensor(0.1)
    optimizer, expected = AdamW([weight], lr=lr, backend=backend), AdamW([other], lr=0.1)
    for seed in range(4):
        give_grads([weight], seed)
        give_grads([other], seed)
        if seed == 2:
            lr.fill_(0.5)
            expected.param_groups[0]["lr"] = 0.5
        if seed:
            with no_reads():
                optimizer.step()
        else:
            optimizer.step()
        expected.step()
    assert_same(optimizer, expected)


def test_parameters_that_share_memory_step_in_order() -> None:
    results = []
    for backend in ("eager", "cpu"):
        whole = torch.arange(6.0)
        params = [whole[:4].requires_grad_(), whole.detach()[2:].requires_grad_()]
        optimizer = AdamW(
            params, lr=0.1, nonfinite="skip", max_norm=1.0, backend=backend if backend == "eager" else "auto"
        )
        for seed in range(4):
            give_grads(params, seed)
            if seed == 1:
                params[0].grad[0] = torch.nan
            optimizer.step()
        assert [optimizer.state[param]["step"].item() for param in params] == [3, 3]
        results.append(whole)
    torch.testing.assert_close(*results)


def test_sparse_rows_follow_the_decision() -> None:
    results = []
    for backend in ("eager", "cpu"):
        weight = torch.ones(6, 2, requires_grad=True)
        optimizer = AdamW([weight], lr=0.1, sparse="touched", nonfinite="skip", max_norm=0.5, backend=backend)
        for seed in range(5):
            values = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
            if seed == 3:
                values[1] = torch.inf
            weight.grad = torch.sparse_coo_tensor([[1, 4, 1]], values, (6, 2))
            optimizer.step()
        assert optimizer.state[weight]["step"] == 4
        results.append((weight.detach(), optimizer.skipped_steps, optimizer.grad_norm))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1:] == pytest.approx(results[1][1:])


@pytest.mark.parametrize("clip", ["parameter", "previous"])
def test_steps_inside_backward_are_clipped_there(clip: Any) -> None:
    results = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        optimizer = AdamW(model.parameters(), lr=0.1, max_norm=0.1, backend=backend)
        descend.in_backward(optimizer, clip=clip)
        for seed in range(4):
            inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            model(inputs).square().sum().backward()
            optimizer.step()
        results.append(([param.detach() for param in model.parameters()], optimizer.grad_norm))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("clip", ["parameter", "previous"])
def test_a_gradient_left_out_inside_backward_does_not_count_for_the_others(clip: Any) -> None:
    results = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        params = list(model.parameters())
        optimizer = AdamW(params, lr=0.1, max_norm=0.1, nonfinite="skip", backend=backend)
        descend.in_backward(optimizer, clip=clip, nonfinite="parameter")
        params[2].register_hook(lambda grad: grad * torch.nan)
        for seed in range(3):
            inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            model(inputs).square().sum().backward()
            optimizer.step()
        counts = [float(optimizer.state[param].get("step", 0)) for param in params]
        assert counts == [3.0, 3.0, 0.0, 3.0]
        results.append(([param.detach() for param in params], optimizer.grad_norm, optimizer.skipped_steps))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1:] == pytest.approx(results[1][1:], rel=1e-5)


@pytest.mark.parametrize("nonfinite", ["step", "skip"])
def test_a_differentiable_step_has_the_derivatives_that_it_has_on_the_host(
    nonfinite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for _ in ("device", "host"):
        start = torch.linspace(-1.5, 2.0, 4, dtype=torch.float64, requires_grad=True)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        weight = start.clone()
        optimizer = AdamW([weight], lr=lr, differentiable=True, nonfinite=nonfinite, max_norm=0.5)
        for seed in range(3):
            (weight.grad,) = torch.autograd.grad(weight.clone().square().sum(), weight, create_graph=True)
            if nonfinite == "skip" and seed == 1:
                weight.grad = torch.full_like(weight, torch.nan)
            optimizer.step()
        results.append([weight.detach(), *torch.autograd.grad(weight.sum(), (start, lr)), optimizer.skipped_steps])
        monkeypatch.undo()
    torch.testing.assert_close(*results)


def test_counts_move_when_the_options_do(backend: str) -> None:
    device, host = two(CASES[7], backend, max_norm=1.0)
    for seed, nonfinite in enumerate(["step", "skip", "skip", "raise", "skip", "step"]):
        for optimizer in (device, host):
            optimizer.nonfinite = nonfinite
            give_grads(params_of(optimizer), seed)
            optimizer.step()
    assert_same(device, host)


def test_an_edited_step_count_is_noticed(backend: str) -> None:
    device, host = two(CASES[5], backend, nonfinite="skip")
    for seed in range(3):
        for optimizer in (device, host):
            give_grads(params_of(optimizer), seed)
            if seed == 2:
                optimizer.state[params_of(optimizer)[0]]["step"].fill_(40)
            optimizer.step()
    assert [state["step"].item() for state in device.state.values()] == [41, 3]
    assert_same(device, host)


def test_step_counts_of_one_element_are_taken_as_they_are(backend: str) -> None:
    device, host = two(CASES[7], backend, nonfinite="skip")
    for seed in range(3):
        for optimizer in (device, host):
            give_grads(params_of(optimizer), seed)
            if seed == 1:
                state = optimizer.state[params_of(optimizer)[1]]
                state["step"], state["mu_product"] = state["step"].reshape(1), state["mu_product"].reshape(1)
            optimizer.step()
    assert [state["step"].item() for state in device.state.values()] == [3, 3]
    assert_same(device, host)


def test_the_norm_is_that_of_the_last_step_that_asked_for_it(backend: str) -> None:
    device, host = two(CASES[5], backend, amp="fused", max_norm=1.0)
    for optimizer in (device, host):
        give_grads(params_of(optimizer), 0)
        optimizer.step()
        optimizer.max_norm = None
        optimizer.step()
    assert device.grad_norm == pytest.approx(host.grad_norm, rel=1e-12)


def test_the_norm_follows_replays_of_a_graph() -> None:
    weight = torch.ones(4, requires_grad=True)
    optimizer = AdamW([weight], max_norm=1.0, backend="eager")
    weight.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.grad_norm == 2.0
    for values in optimizer.decisions.values():  # what a replayed graph writes
        values[NORM] = 3.0
    assert optimizer.grad_norm == 3.0


def test_a_step_count_edited_through_a_checkpoint_is_noticed(backend: str) -> None:
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = AdamW(params, nonfinite="skip", backend=backend)
    for seed in range(4):
        give_grads(params, seed)
        if seed == 2:
            saved = optimizer.state_dict()["state"]
        if seed == 3:
            saved[1]["step"].fill_(40)  # the other parameter, whose count gives the scalars of both, is left as it is
        optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [4, 41]


def test_copies_and_pickles_hold_numbers(backend: str) -> None:
    device, _ = two(CASES[5], backend, nonfinite="skip")
    for seed in range(2):
        give_grads(params_of(device), seed)
        if seed:
            params_of(device)[0].grad[0] = torch.nan
        device.step()
    for twin in (copy.deepcopy(device), pickle.loads(pickle.dumps(device))):
        assert twin.skipped_steps == 1
        assert twin.grad_norm != twin.grad_norm
        give_grads(params_of(twin), 2)
        twin.step()
        assert twin.skipped_steps == 1
        assert twin.state[params_of(twin)[0]]["step"] == 2


def test_whoever_must_know_waits() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.full((3,), torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient"):
        AdamW([weight], nonfinite="raise", backend="eager").step()
    optimizer = SGD([weight], momentum=0.9, dampening=0.5, nonfinite="skip", backend="eager")
    optimizer.step()
    weight.grad = torch.ones(3)
    optimizer.step()  # the first one, whose gradient is not damped
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1.0, 1.0, 1.0]
    optimizer = AdamW([weight], nonfinite="skip", backend="eager")
    monitor = Monitor(optimizer)
    weight.grad = torch.full((3,), torch.nan)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        optimizer.step()
    assert (monitor.skipped, optimizer.skipped_steps) == (1, 1)
