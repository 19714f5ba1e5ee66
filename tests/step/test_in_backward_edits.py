"""Hooks, edits, threads and hands that write to gradients, while steps are taken inside backward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_cases import assert_same_params_and_state, loss_of, network
from cases import CASES, Case, leaves, params_of
from edits import EDITS
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

from descend import SGD, AdamW, in_backward


def test_hooks_run_once_a_step_in_torchs_order() -> None:
    params = leaves([(2,), (3,)])
    optimizer = SGD(params, lr=0.1)
    in_backward(optimizer)
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append(name) if opt is optimizer else None

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    sum(param.sum() for param in params).backward()
    assert seen == []
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
def test_edit_acts_as_with_the_ordinary_step(case: Case, edit: Callable[[Any], None]) -> None:
    optimizers = [case.ours(leaves(), **case.options) for _ in range(2)]
    in_backward(optimizers[1])
    for seed in range(6):
        for optimizer in optimizers:
            sum(torch.sin((seed + 1) * param).sum() for param in params_of(optimizer)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if seed in (1, 3):
                edit(optimizer)
    assert_same_params_and_state(*optimizers)


def test_parameters_that_join_step_inside_backward() -> None:
    first, second, third = leaves([(2,), (3,), (4,)])
    optimizer = SGD([first])
    in_backward(optimizer)
    optimizer.add_param_group({"params": [second]})
    optimizer.param_groups[0]["params"].append(third)
    (first.sum() + second.sum() + third.sum()).backward()
    assert [param.grad is None for param in (first, second, third)] == [True, True, False]
    optimizer.step()  # finds the one that was put there by hand
    (first.sum() + second.sum() + third.sum()).backward()
    assert [param.grad is None for param in (first, second, third)] == [True, True, True]


def test_parameters_that_left_keep_their_gradients() -> None:
    params = leaves([(2,), (3,)])
    optimizer = SGD(params)
    in_backward(optimizer)
    optimizer.param_groups[0]["params"].pop(0)
    before = params[0].detach().clone()
    (params[0].sum() + params[1].sum()).backward()
    assert [param.grad is None for param in params] == [False, True]
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_parameters_may_be_trained_later(frozen_first: bool) -> None:
    model = network()
    model[0].requires_grad_(not frozen_first)
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = in_backward(optimizer)
    assert [param.requires_grad for param in model[0].parameters()] == [not frozen_first] * 2
    before = model[0].weight.detach().clone()
    loss_of(model, 0).backward()
    assert torch.equal(before, model[0].weight) == frozen_first
    model[0].requires_grad_(frozen_first)
    before = model[0].weight.detach().clone()
    loss_of(model, 1).backward()
    assert torch.equal(before, model[0].weight) != frozen_first
    handle.remove()
    assert [param.requires_grad for param in model[0].parameters()] == [frozen_first] * 2


def test_gradients_set_by_hand_are_taken_by_step() -> None:
    optimizers = [AdamW(leaves()) for _ in range(2)]
    in_backward(optimizers[1])
    for optimizer in optimizers:  # as a distributed checkpoint makes state
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)
        optimizer.step(closure=None)
        optimizer.zero_grad()
    assert_same_params_and_state(*optimizers)


def test_removed_handle_leaves_an_ordinary_optimizer() -> None:
    model = network()
    optimizer = SGD(model.parameters())
    for _ in range(2):
        with in_backward(optimizer, accumulate=2) as handle:
            assert optimizer.in_backward is handle
            loss_of(model, 0).backward()
        assert optimizer.in_backward is None
        assert not any(param._post_accumulate_grad_hooks or param._backward_hooks for param in model.parameters())
        before = [param.detach().clone() for param in model.parameters()]
        loss_of(model, 1).backward()
        assert all(map(torch.equal, before, model.parameters()))
        optimizer.step()  # of both gradients
        assert not any(map(torch.equal, before, model.parameters()))
        optimizer.zero_grad()
    handle.remove()  # once more


def test_ordinary_and_inside_steps_alternate() -> None:
    optimizers = []
    for alternate in (False, True):
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.1)
        for seed in range(8):
            handle = in_backward(optimizer) if alternate and seed % 3 else None
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
            if handle:
                handle.remove()
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


def test_users_hooks_see_the_gradient_if_they_came_first() -> None:
    weight = torch.ones(2, requires_grad=True)

    def double(param: Tensor) -> None:
        param.grad.mul_(2.0)

    weight.register_post_accumulate_grad_hook(double)
    in_backward(SGD([weight], lr=0.25))
    weight.sum().backward()
    assert weight.tolist() == [0.5, 0.5]


def test_backward_in_several_threads() -> None:
    optimizers = []
    for inside in (False, True):
        models = [network() for _ in range(4)]
        optimizer = AdamW(nn.ModuleList(models).parameters(), lr=0.01)
        if inside:
            in_backward(optimizer)

        def work(model: nn.Module, seed: int) -> None:
            loss_of(model, seed).backward()

        for seed in range(5):
            threads = [threading.Thread(target=work, args=(model, seed)) for model in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


def test_gradient_that_comes_back_is_an_error() -> None:
    model = network()
    optimizer = SGD(model.named_parameters())
    in_backward(optimizer)
    loss_of(model, 0).backward()
    model[0].bias.grad = torch.ones(6)
    with pytest.raises(RuntimeError, match=r"0\.bias has stepped and its gradient was let go, but there is one again"):
        optimizer.step()


def average_of_one(state, bucket):  # DistributedDataParallel would read annotations
    result = torch.futures.Future()
    result.set_result(bucket.buffer())
    return result


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_data_parallel_replicas_do_not_drift_apart_unnoticed() -> None:
    # One replica that needs no network, which a machine that runs tests may not have.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = network()
        replica = nn.parallel.DistributedDataParallel(model)
        replica.register_comm_hook(None, average_of_one)
        optimizer = SGD(model.parameters())
        in_backward(optimizer)
        loss_of(replica, 0).backward()
        with pytest.raises(RuntimeError, match="DistributedDataParallel does that"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
