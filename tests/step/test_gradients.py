"""Gradients of any origin; they are read, never written and never kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from cases import BACKENDS, CASES, Case, Twins, give_grads, leaves
from torch import Tensor

from descend import SGD


def in_same_memory(params: list[Tensor], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for param in params:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(torch.randn(param.shape, generator=random, dtype=param.dtype))


def one_or_the_other(params: list[Tensor], seed: int) -> None:
    give_grads(params, seed)
    params[seed % len(params)].grad = None


def none_at_all(params: list[Tensor], seed: int) -> None:
    give_grads(params, seed)
    for param in params if seed % 2 else []:
        param.grad = None


def now_and_then_strided(params: list[Tensor], seed: int) -> None:
    give_grads(params, seed)
    for param in params if seed % 2 else []:
        param.grad = torch.stack([param.grad, param.grad], -1)[..., 1]


def expanded(params: list[Tensor], seed: int) -> None:
    for param in params:
        param.grad = torch.tensor(0.1 * seed - 0.2, dtype=param.dtype).expand(param.shape)


def shared(params: list[Tensor], seed: int) -> None:
    give_grads(params, seed)
    memory = torch.arange(200, dtype=params[0].dtype) / 100 - seed
    for param in params:
        param.grad = memory[: param.numel()].view(param.shape)


def the_parameters_themselves(params: list[Tensor], seed: int) -> None:
    give_grads(params, seed)
    for param in params if seed in (2, 3) else []:
        param.grad = param.detach()


def swapped_data(params: list[Tensor], seed: int) -> None:
    if seed == 0:
        give_grads(params, seed)
    for param in params:
        param.grad.data = param.grad.detach().clone() * -0.9


@pytest.mark.parametrize(
    "grads",
    [
        in_same_memory,
        one_or_the_other,
        none_at_all,
        now_and_then_strided,
        expanded,
        shared,
        the_parameters_themselves,
        swapped_data,
    ],
    ids=lambda grads: grads.__name__,
)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
@pytest.mark.usefixtures("either_probe")
def test_gradients_of_any_origin_act_as_in_torch(case: Case, grads: Callable[[list[Tensor], int], None]) -> None:
    twins = Twins(case)
    for seed in range(6):
        twins.step(seed, grads)
    twins.assert_equal()  # only now: looking at the state makes the next steps careful


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_versions_of_parameters_move_and_of_gradients_do_not(case: Case, backend: str) -> None:
    params = leaves([(3,), (7, 5)])
    optimizer = case.ours(params, **case.options, backend=backend, max_norm=0.1)
    for seed in range(3):
        give_grads(params, seed)
        grads = [param.grad for param in params]
        copies = [grad.clone() for grad in grads]
        versions = [(param._version, param.grad._version) for param in params]
        optimizer.step()
        assert all(param._version > before for param, (before, _) in zip(params, versions, strict=True))
        assert [grad._version for grad in grads] == [version for _, version in versions]
        assert all(map(torch.equal, grads, copies))
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_never_aliases_gradients(case: Case, backend: str) -> None:
    params = leaves([(3,), (7, 5)])
    optimizer = case.ours(params, **case.options, backend=backend)
    give_grads(params, 0)
    optimizer.step()
    pointers = {param.grad.data_ptr() for param in params} | {param.data_ptr() for param in params}
    assert not pointers & {tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()}


def test_autograd_notices_the_update() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_and_old_storage_are_not_kept_alive() -> None:
    params = leaves([(5,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    give_grads(params, 0)
    optimizer.step()
    grad = weakref.ref(params[0].grad)
    params[0].grad = None
    assert grad() is None
    param = weakref.ref(params[0])
    del optimizer, params
    assert param() is None
