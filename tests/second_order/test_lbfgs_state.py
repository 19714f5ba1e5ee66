"""The state of LBFGS: checkpoints to and from torch, copies, distributed checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_cases import (
    PROBLEMS,
    SEARCHES,
    TORCH_KEYS,
    Problem,
    assert_same_points,
    flat,
    network,
    numbers,
    twin,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from descend.second_order.lbfgs import HAS_MAXIMIZE, LBFGS

# Checkpoints.


def moved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize(
    ("saver", "loader"),
    [(LBFGS, torch.optim.LBFGS), (torch.optim.LBFGS, LBFGS), (LBFGS, LBFGS)],
    ids=["to torch", "from torch", "ours"],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_checkpoint_continues_bit_for_bit(
    problem: Problem, saver: Any, loader: Any, line_search_fn: str | None
) -> None:
    options = dict(lr=0.5, max_iter=4, history_size=5, line_search_fn=line_search_fn)
    straight, first, second = (twin(cls, problem, **options) for cls in (torch.optim.LBFGS, saver, loader))
    for k in range(2):
        first.step(k)
    with torch.no_grad():
        for param, value in zip(second.params, first.params, strict=True):
            param.copy_(value)
    second.optimizer.load_state_dict(moved(first.optimizer.state_dict()))
    for k in range(4):
        straight.step(k)
        if k >= 2:
            second.step(k)
    assert_same_points([*first.points, *second.points], straight.points)


def test_loading_never_narrows() -> None:
    params = [
        torch.ones(2, dtype=torch.float32, requires_grad=True),
        torch.ones(3, dtype=torch.float64, requires_grad=True),
    ]
    optimizers = [LBFGS(copy.deepcopy(params), max_iter=3) for _ in range(2)]
    for _ in range(2):
        optimizers[0].step(lambda: sum((p.double() ** 4).sum() for p in optimizers[0].param_groups[0]["params"]))
    optimizers[1].load_state_dict(moved(optimizers[0].state_dict()))
    saved, loaded = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    assert loaded["d"].dtype == torch.float64
    assert numbers(loaded["old_dirs"]) == numbers(saved["old_dirs"])


def test_loaded_state_shares_nothing_with_the_saved() -> None:
    ours, other = twin(LBFGS, network, max_iter=4), twin(LBFGS, network, max_iter=4)
    ours.step()
    saved = ours.optimizer.state_dict()
    before = numbers(list(saved["state"][0].values()))
    other.optimizer.load_state_dict(saved)
    for k in range(2):
        other.step(k)
    for name in ("d", "prev_flat_grad"):
        other.state[name].fill_(7)
    for entry in (*other.state["old_dirs"], *other.state["old_stps"], *other.state["ro"]):
        entry.fill_(7)
    assert numbers(list(saved["state"][0].values())) == before


DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.pop("state"), "lacks"),
    (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
    (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
    (lambda d: d["param_groups"][0].update(history_size=0), "history_size"),
    (lambda d: d["state"][0].update(d=torch.zeros(3)), "loaded d has shape [(]3,[)]"),
    (lambda d: d["state"][0].update(old_dirs=[torch.zeros(1)]), "old_dirs"),
    (lambda d: d["state"][0].update(old_dirs=None), "one length"),
    (lambda d: d["state"][0]["ro"].pop(), "one length"),
    (lambda d: d["state"][0].pop("prev_flat_grad"), "prev_flat_grad"),
    (lambda d: d["state"][0].update(H_diag="1"), "H_diag must be a number"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_damaged_checkpoint_changes_nothing(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    ours, other = twin(LBFGS, network, max_iter=4), twin(LBFGS, network, lr=0.5, max_iter=3)
    ours.step()
    other.step()
    saved = copy.deepcopy(ours.optimizer.state_dict())
    damage(saved)
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(saved)
    after = other.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert numbers(list(after["state"][0].values())) == numbers(list(before["state"][0].values()))


def test_load_hooks_run() -> None:
    ours, other = twin(LBFGS, network, max_iter=2), twin(LBFGS, network)
    ours.step()
    seen: list[str] = []
    other.optimizer.register_load_state_dict_pre_hook(lambda opt, d: {**d, "state": {}})
    other.optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    other.optimizer.load_state_dict(ours.optimizer.state_dict())
    assert (dict(other.optimizer.state), seen) == ({}, ["post"])


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_copy_continues(duplicate: Callable[[Any], Any], line_search_fn: str | None) -> None:
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], max_iter=5, line_search_fn=line_search_fn, weight_decay=0.1, maximize=True)

    def step(optimizer: LBFGS) -> list[float]:
        (x,) = optimizer.param_groups[0]["params"]
        optimizer.step(lambda: -100 * (x[1] - x[0] ** 2) ** 2 - (1 - x[0]) ** 2)
        return x.tolist()

    step(optimizer)
    twin = duplicate(optimizer)
    assert [step(twin) for _ in range(3)] == [step(optimizer) for _ in range(3)]


def test_groups_have_torchs_keys() -> None:
    ours = LBFGS([torch.zeros(1, requires_grad=True)], weight_decay=0.1, maximize=True)
    theirs = torch.optim.LBFGS([torch.zeros(1, requires_grad=True)], **(dict(maximize=True) if HAS_MAXIMIZE else {}))
    assert ours.state_dict() == theirs.state_dict()
    assert repr(ours) == repr(theirs)
    assert {k: v for k, v in ours.defaults.items() if k != "differentiable"} == theirs.defaults


def climbs(optimizer: LBFGS) -> bool:
    """Whether a step raises the loss."""
    (x,) = optimizer.param_groups[0]["params"]
    before = x.sum().item()
    optimizer.step(lambda: x.sin().sum())
    return x.sum().item() > before


@pytest.mark.parametrize("line_search_fn", [*SEARCHES, "hager_zhang"])
@pytest.mark.parametrize("saved", [None, True, False])
@pytest.mark.parametrize("given", [True, False])
def test_maximize_of_a_file_replaces_ours_if_it_has_any(
    given: bool, saved: bool | None, line_search_fn: str | None
) -> None:
    """The key is in files of torch 2.14 and later only."""
    x = torch.zeros(2, requires_grad=True)
    optimizer = LBFGS([x], maximize=given, line_search_fn=line_search_fn, max_eval=20)
    file = optimizer.state_dict()
    file["param_groups"][0].pop("maximize", None)
    if saved is not None:
        file["param_groups"][0]["maximize"] = saved
    optimizer.load_state_dict(file)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    assert [climbs(each) for each in (optimizer, *copies)] == [given if saved is None else saved] * 3


@pytest.mark.parametrize("n_params", [1, 2])
def test_distributed_checkpoint_gets_and_sets_the_state(n_params: int) -> None:
    def made() -> tuple[nn.Module, LBFGS]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=n_params == 2)
        return model, LBFGS(model.parameters(), max_iter=3)

    def step(model: nn.Module, optimizer: LBFGS) -> list[float]:
        optimizer.step(lambda: model(torch.eye(3)).square().sum())
        return flat(list(model.parameters())).tolist()

    model, optimizer = made()
    optimizer.init_state()
    before = flat(list(model.parameters()))
    assert get_optimizer_state_dict(model, optimizer)["state"]["weight"]["n_iter"] == 0
    assert torch.equal(flat(list(model.parameters())), before)
    step(model, optimizer)
    other, loader = made()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, loader, get_optimizer_state_dict(model, optimizer))
    assert step(other, loader) == step(model, optimizer)


def test_distributed_checkpoint_makes_the_state_itself() -> None:
    model = nn.Linear(3, 2)
    optimizer = LBFGS(model.parameters())
    found = get_optimizer_state_dict(model, optimizer)
    assert set(found["state"]) == {"weight", "bias"}
    assert optimizer.param_groups[0]["lr"] == 1


def test_step_without_closure_makes_state_and_changes_nothing() -> None:
    ours, untouched = twin(LBFGS, network, max_iter=3), twin(LBFGS, network, max_iter=3)
    assert ours.optimizer.step() is None
    assert list(ours.state) == TORCH_KEYS
    for k in range(3):
        ours.step(k)
        untouched.step(k)
        before = numbers(list(ours.state.values()))
        assert ours.optimizer.step() is None
        assert numbers(list(ours.state.values())) == before
    assert_same_points(ours.points, untouched.points)
