"""Healthy checkpoints give no findings; each thing that is wrong is found, and nothing else with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, give_grads, leaves, params_of
from inspecting import inspected, model, of, train, trained, where

import descend

SHAPES = ((), (0,), (7, 5), (129,), (3, 2, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_healthy_state_is_silent(case: Case, whose: str, tmp_path: Path) -> None:
    optimizer = getattr(case, whose)(leaves(SHAPES, torch.float32), **case.options)
    for seed in range(5):
        give_grads(params_of(optimizer), seed)
        optimizer.step()
    _, found = of(tmp_path / "state.pt", optimizer.state_dict())
    assert set(found) <= ({"decay"} if case.options.get("weight_decay") else set())


def test_sums_of_rows_have_as_many_numbers_as_rows(tmp_path: Path) -> None:
    net = model()
    optimizer = descend.RowwiseAdagrad(net)
    train(net, optimizer)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    examination, found = of(tmp_path / "state.pt", saved)
    assert examination.saved.method == "RowwiseAdagrad"
    assert not found
    saved["optimizer"]["state"][0]["sum"] = torch.ones(7, 1)
    _, found = of(tmp_path / "damaged.pt", saved)
    assert where(found["shape"]) == ["0.weight"]


def closures(optimizer: Any, net: torch.nn.Module, backward: bool) -> Callable[[], torch.Tensor]:
    data = torch.randn(16, 6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(data).square().mean()
        if backward:
            loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("make", [torch.optim.LBFGS, descend.LBFGS, descend.Newton], ids=["torch", "LBFGS", "Newton"])
def test_healthy_second_order_state_is_silent(make: Any, tmp_path: Path) -> None:
    net = model()
    optimizer = make(net.parameters(), max_iter=4)
    for _ in range(2):
        optimizer.step(closures(optimizer, net, make is not descend.Newton))
    examination, found = of(tmp_path / "state.pt", optimizer.state_dict())
    assert not found
    if make is not descend.Newton:
        assert examination.saved.method == "L-BFGS"
        assert len(examination.saved.params[0].tensors["old_dirs"]) > 1


@pytest.mark.parametrize(
    "make", [torch.optim.Adafactor, torch.optim.Muon, descend.Adafactor, descend.SOAP], ids=lambda make: str(make)
)
def test_healthy_matrix_state_is_silent(make: Any, tmp_path: Path) -> None:
    net = model()
    optimizer = make([param for param in net.parameters() if param.dim() == 2])
    train(net, optimizer)
    examination, found = of(tmp_path / "state.pt", optimizer.state_dict())
    assert not found
    assert examination.saved.method == make.__name__


@pytest.mark.parametrize("sparse", [None, "exact"])
def test_healthy_sparse_state_only_shows_unused_rows(sparse: Any, tmp_path: Path) -> None:
    table = torch.nn.Embedding(40, 4, sparse=True)
    optimizer: Any = descend.SparseAdam(table.parameters()) if sparse is None else descend.Adam(table, sparse=sparse)
    if sparse:
        optimizer.attach(table)
    for step in range(4):
        optimizer.zero_grad()
        table(torch.arange(step, 10 + 3 * step)).square().sum().backward()
        optimizer.step()
    _, found = of(tmp_path / "state.pt", optimizer.state_dict())
    assert set(found) == {"rows"}
    assert found["rows"].cases[0].detail == "21 of 40"


def test_flattened_parameters_are_not_biases(tmp_path: Path) -> None:
    flat = torch.nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.AdamW([("0._flat_param", flat)], weight_decay=0.1)
    flat.square().sum().backward()
    optimizer.step()
    assert not of(tmp_path / "state.pt", optimizer.state_dict())[1]


def test_frozen_parameters_of_a_fresh_sgd_need_no_state(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer)
    assert not of(tmp_path / "state.pt", optimizer.state_dict())[1]


def nan(state: Any) -> None:
    state["state"][2]["exp_avg"][3] = float("nan")
    state["state"][2]["exp_avg"][4] = float("inf")


def negative(state: Any) -> None:
    state["state"][0]["exp_avg_sq"][0, 1] = -0.5


def out_of_range(state: Any) -> None:
    state["param_groups"][0]["betas"] = (0.9, 1.5)


def twice(state: Any) -> None:
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    for name in ("params", "param_names"):
        state["param_groups"][1][name] = state["param_groups"][1][name][:1]


def orphan(state: Any) -> None:
    state["state"][77] = copy.deepcopy(state["state"][0])


def misnamed(state: Any) -> None:
    state["param_groups"][0]["param_names"].pop()


def misshapen(state: Any) -> None:
    state["state"][0]["exp_avg"] = torch.ones(3, 3)


def never(state: Any) -> None:
    for content in state["state"].values():
        content["step"].zero_()


def missing(state: Any) -> None:
    del state["state"][1]


def behind(state: Any) -> None:
    state["state"][1]["step"] -= 2


def zero(state: Any) -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][5][name].zero_()


def stuck(state: Any) -> None:
    for content in state["state"].values():
        content["exp_avg_sq"] = content["exp_avg_sq"].bfloat16()


def underflow(state: Any) -> None:
    state["state"][0]["exp_avg_sq"] = torch.full((8, 6), 1e-9).half()


def eps(state: Any) -> None:
    state["state"][0]["exp_avg_sq"].fill_(1e-22)


def small(state: Any) -> None:
    state["state"][1]["exp_avg_sq"].fill_(1e-22)


def lost(state: Any) -> None:
    state["state"][0]["exp_avg_sq"].zero_()


def listed_twice(state: Any) -> None:
    for name in ("params", "param_names"):
        state["param_groups"][0][name].append(state["param_groups"][0][name][0])


def text(state: Any) -> None:
    state["param_groups"][0]["lr"] = "1e-3"


def empty(state: Any) -> None:
    state["state"].clear()
    state["param_groups"].clear()


def backwards(state: Any) -> None:
    state["state"][1]["step"].fill_(-3)


def incomplete(state: Any) -> None:
    del state["state"][0]["exp_avg_sq"], state["state"][0]["step"]


def far_behind(state: Any) -> None:
    for content in state["state"].values():
        content["step"].fill_(1_234_568)
    state["state"][1]["step"] -= 1


def quiet(state: Any) -> None:
    state["state"][5]["exp_avg"].zero_()


def bad_scalar(state: Any) -> None:
    state["state"][3]["step"].fill_(float("nan"))


def flags(state: Any) -> None:
    state["param_groups"][0].update(foreach=True, fused=True)


def decay(state: Any) -> None:
    state["param_groups"][0]["weight_decay"] = 0.1


def rows(state: Any) -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][0][name][2:4] = 0


def no_lr(state: Any) -> None:
    state["param_groups"][0].update(lr=0.0, initial_lr=0.1)


def subnormal(state: Any) -> None:
    state["state"][0]["exp_avg"][0] = 1e-40


@pytest.mark.parametrize(
    ("damage", "kind", "place", "detail"),
    [
        (nan, "nonfinite", "1.weight", "exp_avg: 1 NaN, 1 Inf of 8"),
        (negative, "negative", "0.weight", "exp_avg_sq: 1 of 48, smallest -0.5"),
        (out_of_range, "option", "group 0", "betas[1]=1.5, must be in [0, 1)"),
        (twice, "twice", "0.weight", "in groups 0, 1"),
        (orphan, "orphan", "#77", "step, exp_avg, exp_avg_sq"),
        (misnamed, "names", "group 0", "6 parameters"),
        (misshapen, "shape", "0.weight", "exp_avg [3, 3], exp_avg_sq [8, 6]"),
        (never, "never", "all parameters", "step 0"),
        (missing, "missing", "0.bias", "group 0"),
        (behind, "steps", "0.bias", "1, most have 3"),
        (zero, "zero", "3.bias", "exp_avg_sq and exp_avg, 4 elements"),
        (stuck, "stuck", "0.weight", "exp_avg_sq: 48 of 48 in bfloat16 are the same after a decay by 0.999"),
        (underflow, "underflow", "0.weight", "at least 48 of 48 in float16"),
        (eps, "eps", "0.weight", "sqrt(v_hat) is below eps=1e-08 in 48 of 48"),
        (small, "small", "0.bias", "sqrt(v_hat) is below eps=1e-08 in 8 of 8"),
        (lost, "underflow", "0.weight", "at least 48 of 48 in float32"),
        (listed_twice, "twice", "0.weight", "2 times in group 0"),
        (text, "option", "group 0", "lr='1e-3', must be a number"),
        (empty, "empty", "param_groups", "empty"),
        (backwards, "count", "0.bias", "step is -3"),
        (incomplete, "incomplete", "0.weight", "no step and no exp_avg_sq"),
        (far_behind, "steps", "0.bias", "1,234,567, most have 1,234,568"),
        (quiet, "quiet", "3.bias", "exp_avg, 4 elements"),
        (flags, "flags", "group 0", "foreach=True, fused=True"),
        (decay, "decay", "0.bias", "weight_decay=0.1"),
        (rows, "rows", "0.weight", "2 of 8"),
        (no_lr, "lr", "group 0", "lr=0, it began at 0.1"),
        (subnormal, "subnormal", "0.weight", "exp_avg: 6 of 48"),
    ],
)
def test_damage_is_found(damage: Callable[[Any], None], kind: str, place: str, detail: str, tmp_path: Path) -> None:
    state = trained()
    assert not of(tmp_path / "healthy.pt", state)[1]
    damage(state)
    _, found = of(tmp_path / "damaged.pt", state)
    assert list(found) == [kind]
    assert found[kind].cases[0].where == place
    assert found[kind].cases[0].detail == detail


def test_scalars_and_weights_are_looked_at(tmp_path: Path) -> None:
    state = trained()
    bad_scalar(state)
    assert of(tmp_path / "state.pt", state)[1]["nonfinite"].cases[0].detail == "step is nan"
    weights = model().state_dict()
    weights["3.bias"][0] = float("inf")
    _, found = of(tmp_path / "both.pt", {"optimizer": trained(), "model": weights})
    assert list(found) == ["nonfinite"]
    assert found["nonfinite"].cases[0].detail == "weight: 0 NaN, 1 Inf of 4"


def test_bfloat16_that_decays_is_not_reported(tmp_path: Path) -> None:
    state = trained(betas=(0.9, 0.95))
    stuck(state)
    assert not of(tmp_path / "state.pt", state)[1]


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [
        (descend.Lion, {"betas": (0.9, 0.999)}, "exp_avg"),
        (descend.Adamax, {}, "exp_inf"),
        (descend.SGD, {"momentum": 0.999, "lr": 0.01}, "momentum_buffer"),
    ],
)
def test_every_average_in_bfloat16_is_looked_at(make: Any, options: Any, name: str, tmp_path: Path) -> None:
    net = model()
    optimizer = make(net.named_parameters(), weight_decay=0, **options)
    train(net, optimizer)
    state = optimizer.state_dict()
    assert not of(tmp_path / "float32.pt", state)[1]
    for content in state["state"].values():
        content[name] = content[name].bfloat16()
    _, found = of(tmp_path / "bfloat16.pt", state)
    assert list(found) == ["stuck"]
    assert found["stuck"].cases[0].detail.startswith(f"{name}: ")


def test_groups_that_run_differently_are_mentioned(tmp_path: Path) -> None:
    net = model()
    groups = [{"params": net[0].parameters(), "foreach": True}, {"params": net[3].parameters()}]
    optimizer = torch.optim.Adam(groups)
    train(net, optimizer)
    _, found = of(tmp_path / "state.pt", optimizer.state_dict())
    assert list(found) == ["mixed"]
    assert found["mixed"].cases[0].detail == "True in group 0, None in group 1"


def test_state_made_ahead_has_never_stepped(tmp_path: Path) -> None:
    optimizer = descend.AdamW(model(), weight_decay=0)
    optimizer.init_state()
    assert list(of(tmp_path / "state.pt", optimizer.state_dict())[1]) == ["never"]
    assert list(of(tmp_path / "none.pt", torch.optim.Adam(model().parameters()).state_dict())[1]) == ["never"]


def test_weights_of_another_shape_are_found(tmp_path: Path) -> None:
    other = torch.nn.Sequential(torch.nn.Linear(6, 9)).state_dict()
    _, found = of(tmp_path / "state.pt", {"model": other, "optimizer": trained()})
    assert list(found) == ["shape"]
    assert where(found["shape"]) == ["0.weight", "0.bias"]


def test_weights_give_names(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    train(net, optimizer)
    torch.save({"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    examination, found = inspected(tmp_path / "a.ckpt")
    assert examination.saved.where == "optimizer_states.0"
    assert [param.name for param in examination.saved.params] == [name for name, _ in net.named_parameters()]
    assert where(found["decay"]) == ["0.bias", "1.weight", "1.bias", "3.bias"]
