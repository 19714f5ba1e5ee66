"""Which backend runs a parameter, why, and who may choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKENDS, CASES, Case, Twins, complex_grads, give_grads, leaves, params_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from descend import SGD, Adam


def test_backends_says_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        ("plain", torch.zeros(3, requires_grad=True)),
        ("narrow", torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)),
        ("complex", torch.zeros(3, dtype=torch.complex64, requires_grad=True)),
        ("strided", torch.zeros(6)[::2].requires_grad_()),
    ]
    placements = Adam(params).backends()
    assert [(p.name, p.backend) for p in placements] == [
        ("plain", "cpu"),
        ("narrow", "cpu"),
        ("complex", "foreach"),
        ("strided", "foreach"),
    ]
    assert "complex64" in placements[2].reason
    assert "stride" in placements[3].reason
    assert {p.backend for p in Adam(params, backend="eager").backends()} == {"eager"}
    monkeypatch.setenv("DESCEND_BACKEND", "eager")
    assert {p.backend for p in Adam(params).backends()} == {"eager"}
    assert Adam(params[:1], backend="cpu").backends()[0].backend == "cpu"


def test_environment_variable_acts_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(CASES[5])
    for seed, backend in enumerate(["cpu", "eager", "auto", "eager", "cpu"]):
        monkeypatch.setenv("DESCEND_BACKEND", backend)
        twins.step(seed)
    twins.assert_equal()


class Watch(TorchDispatchMode):
    """Counts what writes to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.writes += func._schema.is_mutable
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mode_that_watches_torchs_operations_sees_the_step(case: Case) -> None:
    twins = Twins(case)
    twins.step(0)
    with Watch() as watch:
        twins.ours.step()
    twins.theirs.step()
    assert watch.writes >= len(params_of(twins.ours))
    twins.step(1)
    twins.assert_equal()
    assert twins.ours.backends()[2].backend == BACKENDS[0]


def test_step_becomes_a_graph() -> None:
    params, twin = leaves([(3, 2)]), leaves([(3, 2)])
    optimizer, other = SGD(params, lr=0.1, momentum=0.9), SGD(twin, lr=0.1, momentum=0.9)
    for each in (optimizer, other):
        give_grads(params_of(each), 0)
        each.step()
    before = params[0].detach().clone(), optimizer.state[params[0]]["momentum_buffer"].clone()

    def step(grad: Tensor) -> None:
        params[0].grad = grad
        optimizer.step()

    (grad,) = (param.grad for param in params)
    graph = make_fx(step)(grad)
    with torch.no_grad():
        params[0].copy_(before[0])
        optimizer.state[params[0]]["momentum_buffer"].copy_(before[1])
        graph(grad)
    other.step()
    torch.testing.assert_close(params[0], twin[0], rtol=1e-12, atol=1e-12)  # float64, eager and fused


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_steps_become_a_graph(mode: Any) -> None:
    def steps(param: Tensor, grad: Tensor) -> Tensor:
        param = param.clone()
        optimizer = Adam([param])
        for _ in range(3):
            param.grad = grad
            optimizer.step()
        return param

    param, grad = torch.ones(3), torch.arange(3.0)
    graph = make_fx(steps, tracing_mode=mode)(param, grad)
    torch.testing.assert_close(graph(param, 2 * grad), steps(param, 2 * grad))


def test_step_that_counts_becomes_a_graph() -> None:
    (param,) = leaves([(3,)])
    optimizer = Adam([param], lr=0.1)
    give_grads([param], 0)
    optimizer.step()

    def step(grad: Tensor) -> None:
        param.grad = grad
        optimizer.step()

    graph = make_fx(step)(param.grad)
    assert optimizer.state[param]["step"] == 2
    with torch.no_grad():
        graph(param.grad)
    assert optimizer.state[param]["step"] == 3


def test_backend_cpu_refuses_what_it_cannot_run_before_anything_moves() -> None:
    params = [*leaves([(3,)]), torch.ones(2, dtype=torch.complex128, requires_grad=True)]
    optimizer = Adam(params, backend="cpu")
    complex_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(
        RuntimeError, match=r"Adam: backend='cpu' cannot run param_groups\[0\]\['params'\]\[1\].*complex128"
    ):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state
