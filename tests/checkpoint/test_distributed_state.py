"""State made without a step, and ``torch.distributed.checkpoint`` as it is: one process, no group."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import BACKENDS, CASES, Case, assert_same_bits, give_grads, leaves, params_of, state_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from descend import SGD, AdamW, FirstOrder, Rprop, from_rule, no_decay

DAMPED = Case(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5, nesterov=False))
WITH_STATE = [case for case in CASES if "lr" in case.options and case.options != CASES[0].options]


def steps(optimizer: FirstOrder, seeds: range) -> None:
    for seed in seeds:
        give_grads(params_of(optimizer), seed)
        optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_init_state_is_that_of_a_first_step_without_taking_it(case: Case) -> None:
    made, straight, stepped = (case.ours(leaves(), **case.options) for _ in range(3))
    made.init_state()
    assert all(map(torch.equal, params_of(made), leaves()))
    steps(stepped, range(1))
    new = {index: made.state[param] for index, param in enumerate(params_of(made)) if param in made.state}
    assert new.keys() == state_of(stepped).keys()
    for key, state in state_of(stepped).items():
        assert list(new[key]) == list(state)
        assert float(new[key].get("step", 0)) == 0
        for name, value in new[key].items():
            assert (value.dtype, value.shape, value.device) == (
                state[name].dtype,
                state[name].shape,
                state[name].device,
            )
    made.init_state()  # once more changes nothing
    steps(made, range(4))
    steps(straight, range(4))
    assert all(map(torch.equal, params_of(made), params_of(straight)))
    assert_same_bits(state_of(made), state_of(straight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_before_the_first_step_know_that_it_is_the_first(duplicate: Callable[[Any], Any], backend: str) -> None:
    made, straight = (SGD(leaves(), backend=backend, **DAMPED.options) for _ in range(2))
    made.init_state()
    made = duplicate(made)
    steps(made, range(3))
    made = duplicate(made)
    steps(made, range(3, 5))
    steps(straight, range(5))
    assert all(map(torch.equal, params_of(made), params_of(straight)))


def test_init_state_in_mid_run_makes_what_is_missing() -> None:
    params = leaves([(3,), (2,)])
    frozen = leaves([(4,)])[0].requires_grad_(False)
    optimizer, straight = (SGD([*group, frozen], **DAMPED.options) for group in (params, copy.deepcopy(params)))
    for each in (optimizer, straight):
        give_grads(params_of(each)[:1], 0)
        each.step()
    optimizer.init_state()
    assert [len(state) for state in state_of(optimizer).values()] == [1, 1]
    assert frozen not in optimizer.state
    for each in (optimizer, straight):
        for seed in range(1, 4):
            give_grads(params_of(each)[:2], seed)
            each.step()
    assert all(map(torch.equal, params_of(optimizer), params_of(straight)))


def test_file_of_a_state_without_steps_needs_no_class_of_ours(tmp_path: Path) -> None:
    optimizer = SGD(leaves(), **DAMPED.options)
    optimizer.init_state()
    for _ in range(2):
        torch.save(optimizer.state_dict(), tmp_path / "file")
        assert set(torch.load(tmp_path / "file", weights_only=True)["state"]) == {0, 1, 2, 3}
        optimizer.state[params_of(optimizer)[0]]  # now somebody has looked


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        give_grads(list(model.parameters()), seed)
        optimizer.step()


WAYS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "unnamed": lambda model: dict(params=model.parameters()),
    "named": lambda model: dict(params=model),
    "reversed": lambda model: dict(params=list(model.named_parameters())[::-1]),
    "groups": lambda model: dict(params=model, groups=no_decay(model)),
    "wrapped": lambda model: dict(params=[(f"module.{name}", param) for name, param in model.named_parameters()]),
    "other names": lambda model: dict(params=[(f"my.{name}", param) for name, param in model.named_parameters()]),
}
OPTIONS = [dict(), dict(flatten_optimizer_state_dict=True), dict(full_state_dict=True), dict(cpu_offload=True)]


# Every pair of two of these, not every triple.
ROUNDS = [
    (case, way, OPTIONS[(row + column) % len(OPTIONS)])
    for row, case in enumerate(WITH_STATE)
    for column, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("case", "way", "options"), ROUNDS, ids=str)
def test_distributed_state_goes_round(case: Case, way: str, options: dict[str, bool]) -> None:
    if way == "groups" and case.ours is Rprop:
        pytest.skip("Rprop has no weight decay to leave out")
    how = StateDictOptions(**options)
    first, second, straight = model(), model(), model()
    optimizers = [case.ours(**WAYS[way](each), **case.options) for each in (first, second, straight)]
    for optimizer in optimizers[:2]:
        optimizer.init_state()
    template = get_optimizer_state_dict(second, optimizers[1], options=how)
    train(first, optimizers[0], range(3))
    taken = get_optimizer_state_dict(first, optimizers[0], options=how)
    assert sorted(template) == sorted(taken)
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, optimizers[1], taken, options=how)
    train(second, optimizers[1], range(3, 6))
    train(straight, optimizers[2], range(6))
    assert all(map(torch.equal, second.parameters(), straight.parameters()))
    assert_same_bits(state_of(optimizers[1]), state_of(optimizers[2]))


@pytest.mark.parametrize(("saver", "loader"), [("named", "reversed"), ("reversed", "named"), ("unnamed", "reversed")])
@pytest.mark.parametrize("way", ["through torch", "directly"])
def test_distributed_state_finds_reordered_parameters(saver: str, loader: str, way: str) -> None:
    first, second, straight = model(), model(), model()
    saving, going_on = AdamW(**WAYS[saver](first)), AdamW(**WAYS[saver](straight))
    loading = AdamW(**WAYS[loader](second))
    saving.init_state()
    train(first, saving, range(3))
    second.load_state_dict(first.state_dict())
    taken = get_optimizer_state_dict(first, saving)
    if way == "directly":
        loading.load_state_dict(taken)
    else:
        set_optimizer_state_dict(second, loading, taken)
    train(second, loading, range(3, 5))
    train(straight, going_on, range(5))
    assert all(map(torch.equal, second.parameters(), straight.parameters()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is told to do without
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_on_disk(flatten: bool, tmp_path: Path) -> None:
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    first, second, straight = model(), model(), model()
    optimizers = [
        AdamW(each, groups=no_decay(each), lr=lr) for each, lr in ((first, 0.1), (second, 0.5), (straight, 0.1))
    ]
    for optimizer in optimizers[:2]:
        optimizer.init_state()
    train(first, optimizers[0], range(2))
    taken = {"model": first.state_dict(), "optimizer": get_optimizer_state_dict(first, optimizers[0], options=how)}
    dcp.save(taken, checkpoint_id=tmp_path, no_dist=True)
    into = {"model": second.state_dict(), "optimizer": get_optimizer_state_dict(second, optimizers[1], options=how)}
    dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(second, optimizers[1], into["optimizer"], options=how)
    train(second, optimizers[1], range(2, 4))
    train(straight, optimizers[2], range(4))
    assert all(map(torch.equal, second.parameters(), straight.parameters()))


def test_not_strict_distributed_state_leaves_new_parameters_alone() -> None:
    first, second = model(), model()
    second.append(nn.Linear(1, 1).double())
    saving, loading = AdamW(first), AdamW(second)
    saving.init_state()
    loading.init_state()
    train(first, saving, range(3))
    set_optimizer_state_dict(
        second, loading, get_optimizer_state_dict(first, saving), options=StateDictOptions(strict=False)
    )
    taken = [int(loading.state[param].get("step", 0)) for param in second.parameters()]
    assert taken == [3] * 6 + [0] * 2
    train(second, loading, range(1))


def test_from_rule_has_init_state() -> None:
    def rule(param: Tensor, grad: Tensor, average: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        average = average + 0.1 * (grad - average)
        return param - lr * average, average

    optimizer = from_rule(rule, "Rule")(leaves([(3,)]))
    optimizer.init_state()
    assert optimizer.state_dict()["state"][0]["average"].tolist() == [0, 0, 0]
