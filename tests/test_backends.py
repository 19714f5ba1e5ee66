"""Which backend runs a parameter, why, and who may choose."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Twins, complex_grads, leaves

from descend import Adam


def test_backends_tell_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("complex", "eager"),
        ("strided", "eager"),
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
