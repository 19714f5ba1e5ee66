"""What torch expects of an optimizer: hooks, groups, compilers, averages, functional programs, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_state, give_grads, leaves, params_of, state_of
from programs import (
    EXACT_TWINS,
    FIRST_ORDER,
    OURS,
    TWINS,
    advance,
    assert_same_model,
    batch,
    build,
    loss_of,
    network,
    params_for,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import descend

# Hooks.


def with_own_step(kind: Any) -> Any:
    """A subclass with a step of its own, as people write for logging."""

    def step(self: Any, closure: Any = None) -> Any:
        return kind.step(self, closure)

    return type(kind.__name__, (kind,), {"step": step})


@pytest.mark.parametrize("is_subclass", [False, True], ids=["the class", "a subclass with its own step"])
@pytest.mark.parametrize("name", OURS)
def test_step_hooks_run_once_in_torchs_order(name: str, is_subclass: bool) -> None:
    build(OURS[name], leaves([(2, 2)]))  # torch wraps a class's step when the first is made
    kind = with_own_step(OURS[name]) if is_subclass else OURS[name]
    optimizer = build(kind, leaves([(2, 2)]))
    seen: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append(what if args[0] is opt is optimizer else "another optimizer")

    handles = [
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_step_pre_hook(note("pre")),
        register_optimizer_step_post_hook(note("global post")),
        register_optimizer_step_pre_hook(note("global pre")),
    ]
    try:
        advance(optimizer, 0)
        assert seen == ["global pre", "pre", "post", "global post"]
        advance(optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    advance(optimizer, 2)
    assert seen == 2 * ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("name", OURS)
def test_state_dict_hooks_run_once_and_may_replace(name: str) -> None:
    optimizer = build(OURS[name], leaves([(2, 2)]))
    advance(optimizer, 0)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": seen.append("saved")})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append("load") or dict(saved, state={}))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = optimizer.state_dict()
    assert "note" in saved
    optimizer.load_state_dict(saved)
    assert seen == ["save", "saved", "load", "loaded"]
    assert not optimizer.state_dict()["state"].get(0)  # the hook took it away
    assert seen[4:] == ["save", "saved"]


# Groups.


@pytest.mark.parametrize("name", EXACT_TWINS)
def test_group_added_in_mid_run_goes_on_as_in_torch(name: str) -> None:
    if name == "LBFGS":
        pytest.skip("torch's has one group")
    results = []
    for kind in TWINS[name]:
        optimizer = build(kind, leaves([(3, 2)]))
        advance(optimizer, 0)
        optimizer.add_param_group({"params": leaves([(4, 1)], seed=1), "lr": 0.3})
        for seed in range(1, 4):
            advance(optimizer, seed)
        results.append((params_of(optimizer), {k: v for k, v in optimizer.param_groups[1].items() if k != "params"}))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, four steps
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("name", OURS)
def test_zero_grad_clears_or_zeroes(name: str) -> None:
    optimizer = build(OURS[name], leaves([(3, 2)]))
    (param,) = params_of(optimizer)
    give_grads([param], 0)
    held = param.grad
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is held
    assert not held.any()
    optimizer.zero_grad()
    assert param.grad is None


# Programs.


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_compiled_programs_train_as_eager_ones(name: str) -> None:
    torch.compiler.reset()
    models = [network() for _ in range(3)]
    kind = FIRST_ORDER[name]
    optimizers = [build(kind, params_for(kind, model), lr=0.01) for model in models]
    whole = torch.compile(models[1], backend="eager")

    @torch.compile(backend="eager")
    def program(inputs: Tensor, classes: Tensor) -> None:
        nn.functional.cross_entropy(models[2](inputs), classes).backward()
        optimizers[2].step()
        optimizers[2].zero_grad()

    for seed in range(3):
        for model, optimizer in zip((models[0], whole), optimizers[:2], strict=True):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
        program(*batch(seed))
    for model in models[1:]:
        assert_same_model(model, models[0])


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_functional_call_programs_train_as_modules(name: str) -> None:
    model, plain = network(), network()
    params = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    optimizer, other = (
        build(FIRST_ORDER[name], given, lr=0.01) for given in (params.items(), plain.named_parameters())
    )
    for seed in range(3):
        inputs, classes = batch(seed)
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, params, inputs), classes)
        for param, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            param.grad = grad
        optimizer.step()
        other.zero_grad()
        loss_of(plain, seed).backward()
        other.step()
    for key, value in plain.named_parameters():
        assert torch.equal(params[key], value)
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == sorted(params)


def averaged_run(kind: Any, make_average: Callable[[nn.Module], AveragedModel]) -> tuple[nn.Module, AveragedModel]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    for param in model.parameters():
        nn.init.constant_(param, 0.1)
    nn.init.eye_(model[0].weight)
    optimizer = build(kind, model.parameters(), lr=0.01)
    average = make_average(model)
    for seed in range(5):
        optimizer.zero_grad()
        inputs, classes = batch(seed)
        nn.functional.cross_entropy(model(inputs.double()), classes).backward()
        optimizer.step()
        average.update_parameters(model)
    update_bn([batch(seed)[0].double() for seed in range(3)], average)
    return model, average


@pytest.mark.parametrize(
    "make_average",
    [AveragedModel, lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)],
    ids=["mean", "ema"],
)
# Behind BatchNorm the gradient of a bias is rounding alone, which Adafactor divides by its own size.
@pytest.mark.parametrize("name", [name for name in FIRST_ORDER if name in EXACT_TWINS and name != "Adafactor"])
def test_averaged_models_follow_as_with_torch(name: str, make_average: Any) -> None:
    (model, average), (their_model, their_average) = (averaged_run(kind, make_average) for kind in TWINS[name])
    for ours, theirs in ((model, their_model), (average, their_average)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)  # through BatchNorm


@pytest.mark.skipif(torch.__version__ < "2.13", reason="new in torch 2.13")
@pytest.mark.parametrize("name", [name for name in EXACT_TWINS if name != "LBFGS"])  # torch's keeps a list of its own
def test_swapped_in_parameters_step_as_in_torch_and_the_others_stay(name: str) -> None:
    results = []
    for kind in TWINS[name]:
        optimizer = build(kind, leaves([(3, 2), (4, 1)]))
        advance(optimizer, 0)
        before = [param.detach().clone() for param in params_of(optimizer)]
        others, saved = leaves([(3, 2), (4, 1)], seed=5), copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        with descend.swap_in_optimizer_params_and_state(optimizer, dict(zip("ab", others, strict=True)), saved):
            advance(optimizer, 1)
        assert all(map(torch.equal, params_of(optimizer), before))
        assert optimizer.param_groups[0]["lr"] != 0.5
        advance(optimizer, 2)
        results.append(([*others, *params_of(optimizer)], saved["state"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)  # float64, two steps
    assert_same_state(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)


# Distributed checkpoints, in one process.


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_distributed_state_dict_round_trips(name: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = network(), network()
    kind = FIRST_ORDER[name]
    optimizer = build(kind, params_for(kind, model), lr=0.01)
    for seed in range(3):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    fresh = build(kind, params_for(kind, other), lr=0.01)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_same_bits(state_of(fresh), state_of(optimizer))
    for seed in range(3, 5):
        for each, its in ((model, optimizer), (other, fresh)):
            its.zero_grad()
            loss_of(each, seed).backward()
            its.step()
    assert_same_model(other, model)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_distributed_state_dict_of_a_fresh_optimizer_moves_nothing(name: str) -> None:
    model, before = network(), network()
    kind = FIRST_ORDER[name]
    get_optimizer_state_dict(model, build(kind, params_for(kind, model), lr=0.01))
    assert_same_model(model, before)
