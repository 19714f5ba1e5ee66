"""Groups with methods of their own: one optimizer takes the steps of several."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import BACKENDS, assert_same_bits, give_grads, params_of, snapshot, state_of
from torch import Tensor, nn

from descend import SGD, AdamW, FirstOrder, Lion, NAdam, clip_grad_norm_, from_rule, in_backward
from descend.ops import sqrt


def scaled(param: Tensor, grad: Tensor, square: Tensor, lr: float, gain: float) -> tuple[Tensor, Tensor]:
    """A rule of a user."""
    square = (1 - gain) * square + gain * grad * grad
    return param - lr * grad / (sqrt(square) + 1), square


Scaled = from_rule(scaled, "Scaled", lr=0.1, gain=0.1)

OPTIONS: dict[str, dict[str, Any]] = {
    "a": dict(method="lion", lr=0.01, betas=(0.5, 0.75)),
    "b": dict(method="sgd", lr=0.5, momentum=0.9),
    "c": dict(method=Scaled, gain=0.5),
    "d": dict(method="nadam"),
}
ALONE: dict[str, type[FirstOrder]] = {"a": Lion, "b": SGD, "c": Scaled, "d": NAdam, "e": AdamW}


def leaves(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(7, 5, generator=random, dtype=torch.float64).requires_grad_() for name in "abcde"}


def mixed(params: Mapping[str, Tensor], **options: Any) -> AdamW:
    return AdamW(params.items(), lr=0.1, groups=list(OPTIONS.items()), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_group_steps_as_its_method_does_alone(backend: Any) -> None:
    ours = mixed(leaves(), backend=backend)
    alone = []
    for (name, kind), param in zip(ALONE.items(), leaves().values(), strict=True):
        options = {key: value for key, value in OPTIONS.get(name, {"lr": 0.1}).items() if key != "method"}
        alone.append(kind([param], backend=backend, **options))
    for step in range(4):
        everything = {params_of(ours)[i]: "eabcd"[i] for i in range(5)}
        give_grads([param for param, _ in sorted(everything.items(), key=lambda item: item[1])], step)
        give_grads([params_of(each)[0] for each in alone], step)
        ours.step()
        for each in alone:
            each.step()
    found = dict(zip("eabcd", params_of(ours), strict=True))
    states = dict(zip("eabcd", state_of(ours).values(), strict=True))
    for name, each in zip(ALONE, alone, strict=True):
        assert torch.equal(found[name], params_of(each)[0]), name
        assert_same_bits({0: states[name]}, state_of(each))


def test_a_group_shows_the_options_of_its_method() -> None:
    optimizer = mixed(leaves())
    lion, sgd, users, nadam = optimizer.param_groups[1:]
    assert lion["method"] == "lion"
    assert lion["lr"] == 0.01
    assert "eps" not in lion
    assert sgd["method"] == "sgd"
    assert sgd["dampening"] == 0
    assert sgd["weight_decay"] == 0
    assert users["method"] == f"{__name__}:Scaled"
    assert users["gain"] == 0.5
    assert nadam["momentum_decay"] == 4e-3
    assert nadam["lr"] == 2e-3
    assert "method" not in optimizer.param_groups[0]


def test_the_summary_names_methods(capsys: pytest.CaptureFixture[str]) -> None:
    rows = mixed(leaves()).summary()
    assert rows[0].options == {}
    assert rows[1].options == {"method": "lion", "lr": 0.01, "betas": (0.5, 0.75)}
    assert "method=sgd" in capsys.readouterr().out


def test_one_norm_is_clipped() -> None:
    params, expected = leaves(), leaves()
    ours, plain = mixed(params, max_norm=0.5), mixed(expected)
    give_grads(list(params.values()), 0)
    give_grads(list(expected.values()), 0)
    norm = clip_grad_norm_(expected.values(), 0.5)
    ours.step()
    plain.step()
    assert ours.grad_norm == pytest.approx(float(norm), rel=1e-14)
    for name, param in params.items():
        torch.testing.assert_close(param, expected[name], rtol=1e-12, atol=1e-12)


def test_a_gradient_with_nan_holds_all_methods() -> None:
    params = leaves()
    optimizer = mixed(params, nonfinite="skip")
    for step in range(2):
        give_grads(list(params.values()), step)
        before = copy.deepcopy(snapshot(optimizer))
        if step == 1:
            params["c"].grad[3, 2] = torch.nan  # type: ignore[index]
        optimizer.step()
    assert optimizer.skipped_steps == 1
    after = snapshot(optimizer)
    assert all(map(torch.equal, after[0], before[0]))
    assert_same_bits(after[1], before[1])


def test_a_schedule_reaches_all_groups() -> None:
    params = leaves()
    optimizer = mixed(params)
    before = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    give_grads(list(params.values()), 0)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in before]


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_schedules_that_cycle_momentum_find_it_in_every_group(kind: type[FirstOrder]) -> None:
    params = leaves()
    cycled = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(params.items(), groups=[("a", dict(method="lion")), ("b", dict(method="adamw"))], **cycled)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for step in range(4):
        give_grads(list(params.values()), step)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"]


def test_flags_come_from_the_optimizer() -> None:
    params = leaves()
    optimizer = mixed(params, maximize=True)
    assert all(group["maximize"] for group in optimizer.param_groups)
    weight = params["b"].detach().clone()
    params["b"].grad = torch.ones_like(weight)
    optimizer.step()
    assert bool((params["b"] > weight).all())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_go_on_alike(copied: Any) -> None:
    params = leaves()
    optimizer = mixed(params, max_norm=1.0)
    give_grads(list(params.values()), 0)
    optimizer.step()
    other = copied(optimizer)
    for each in (optimizer, other):
        give_grads(params_of(each), 1)
        each.step()
    assert all(map(torch.equal, params_of(optimizer), params_of(other)))
    assert_same_bits(state_of(optimizer), state_of(other))


@pytest.mark.parametrize("by_name", [True, False])
def test_a_checkpoint_goes_on_alike(by_name: bool) -> None:
    params = leaves()
    optimizer = mixed(params)
    give_grads(list(params.values()), 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = {name: param.detach().clone().requires_grad_() for name, param in params.items()}
    other = mixed(others)
    other.load_state_dict(torch.load(file, weights_only=True), match="name" if by_name else "order")
    for each in (params, others):
        give_grads(list(each.values()), 1)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, params.values(), others.values()))


def test_a_checkpoint_of_another_method_is_refused_or_left_aside() -> None:
    params = leaves()
    saved = AdamW(params.items(), groups=[("a", dict(method="lion")), ("b", dict(method="sgd", momentum=0.9))])
    give_grads(list(params.values()), 0)
    saved.step()
    other = AdamW(params.items(), groups=[("a", dict(method="nadam")), ("b", dict(method="sgd", momentum=0.9))])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"has the method 'lion', here it is 'nadam'\. strict=False"):
        other.load_state_dict(saved.state_dict())
    assert str(other.state_dict()) == str(before)
    keys = other.load_state_dict(saved.state_dict(), strict=False)
    assert keys == (["a"], ["a"])
    assert params["a"] not in other.state
    assert "momentum_buffer" in other.state[params["b"]]
    other.step()
    assert float(other.state[params["a"]]["step"]) == 1


@pytest.mark.parametrize("kept", [{}, dict(method="nadam")])
def test_a_file_that_names_no_method_is_refused_if_its_options_are_anothers(kept: dict[str, Any]) -> None:
    params = leaves()
    saved = AdamW(params.items(), groups=[("a", dict(lr=0.1)), ("b", kept)])
    give_grads(list(params.values()), 0)
    saved.step()
    other = AdamW(params.items(), groups=[("a", dict(method="lion")), ("b", kept)])
    for hyperparameters in ("loaded", "current"):
        with pytest.raises(ValueError, match=r"has 'eps', 'amsgrad', .*, which the method 'lion' has not"):
            other.load_state_dict(saved.state_dict(), hyperparameters=hyperparameters)  # type: ignore[arg-type]
    assert other.load_state_dict(saved.state_dict(), strict=False) == (["a"], ["a"])
    assert other.param_groups[1]["lr"] == 1e-4
    own = Lion(params.items())
    own.load_state_dict(Lion(params.items(), lr=0.3).state_dict())
    group = AdamW(params.items(), groups=[("?", dict(method="lion"))])
    group.load_state_dict(own.state_dict())
    assert group.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_know_which_method_has_made_a_state(copied: Any) -> None:
    optimizer = mixed(leaves())
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    first, lion = optimizer.param_groups[:2]
    first["params"], lion["params"] = lion["params"], first["params"]
    other = copied(optimizer)
    give_grads(params_of(other), 1)
    with pytest.raises(RuntimeError, match="was made by lion, and its group has the method AdamW"):
        other.step()


def test_state_that_loading_keeps_is_still_of_the_method_that_has_made_it() -> None:
    optimizer = mixed(leaves())
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    first, lion = optimizer.param_groups[:2]
    first["params"], lion["params"] = lion["params"], first["params"]
    empty = {"state": {}, "param_groups": [{"params": [0], "param_names": ["other"]}]}
    optimizer.load_state_dict(empty, strict=False, hyperparameters="current")
    with pytest.raises(RuntimeError, match="was made by lion, and its group has the method AdamW"):
        optimizer.step()


def test_a_group_whose_method_is_edited_needs_its_options_and_no_old_state() -> None:
    params = leaves()
    optimizer = mixed(params)
    give_grads(list(params.values()), 0)
    optimizer.step()
    group = optimizer.param_groups[1]
    group["method"] = "rmsprop"
    before = copy.deepcopy(snapshot(optimizer))
    with pytest.raises(ValueError, match="a group with method='rmsprop' lacks momentum, alpha, eps"):
        optimizer.step()
    group.update(alpha=0.9, eps=1e-8, momentum=0, centered=False, capturable=False, foreach=None)
    with pytest.raises(RuntimeError, match="the state of a was made by lion, and its group has the method rmsprop"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer)[0], before[0]))
    del optimizer.state[params["a"]]
    optimizer.step()
    assert list(optimizer.state[params["a"]]) == ["step", "square_avg"]


def test_a_method_that_is_deleted_or_a_class_is_refused() -> None:
    optimizer = mixed(leaves())
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    lion = optimizer.param_groups[1]
    lion["method"] = Lion
    with pytest.raises(ValueError, match=r"group\['method'\] must be a text, 'lion' here, got <class"):
        optimizer.step()
    del lion["method"]
    with pytest.raises(ValueError, match="a group with no method of its own lacks eps, amsgrad"):
        optimizer.step()


def test_the_name_of_the_class_itself_is_no_other_method() -> None:
    optimizer = mixed(leaves())
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    optimizer.param_groups[0]["method"] = "adamw"
    optimizer.step()
    assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 2


def test_a_parameter_that_moves_to_a_group_of_another_method_is_refused() -> None:
    params = leaves()
    optimizer = mixed(params)
    give_grads(list(params.values()), 0)
    optimizer.step()
    first, lion = optimizer.param_groups[:2]
    first["params"].append(lion["params"].pop())
    first["param_names"].append(lion["param_names"].pop())
    with pytest.raises(RuntimeError, match="the state of a was made by lion, and its group has the method AdamW"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(method="adamv"), r"method must be one of adadelta, .*, or a class made from FirstOrder, got 'adamv'"),
        (dict(method=3), "method must be one of"),
        (dict(method=torch.optim.SGD), "method must be one of"),
        (dict(method="sparseadam"), "method must be one of"),
        (dict(method="adamwschedulefree"), "method must be one of"),
        (
            dict(method="lion", nesterov=True),
            "'nesterov', for 'a', is no option of Lion. .*SGD have it. There are lr, betas",
        ),
        (dict(method="lion", lr=-1), r"Invalid learning rate: -1 \(Lion: lr"),
        (dict(betas=(0.9, 0.9), momentum=1), "'momentum', for 'a', is no option of AdamW. .*SGD, RMSprop"),
    ],
)
def test_what_a_method_has_not_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AdamW(leaves().items(), groups=[("a", options)])


def test_what_a_method_has_not_is_refused_in_torchs_groups() -> None:
    optimizer = AdamW([{"params": [torch.zeros(2, requires_grad=True)], "method": "lion", "my_label": "kept"}])
    assert optimizer.param_groups[0]["my_label"] == "kept"
    with pytest.raises(ValueError, match="'eps', for a group, is no option of Lion"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "method": "lion", "eps": 1e-3})
    assert len(optimizer.param_groups) == 1


def test_groups_make_other_groups_and_optimizers() -> None:
    params = leaves()
    optimizer = mixed(params)
    copied = {**optimizer.param_groups[2], "params": [torch.zeros(2, requires_grad=True)], "param_names": ["f"]}
    optimizer.add_param_group(copied)
    other = AdamW(optimizer.param_groups)
    assert [group.get("method") for group in other.param_groups] == [
        group.get("method") for group in optimizer.param_groups
    ]
    assert other.param_groups[5]["momentum"] == 0.9


class Needy(FirstOrder):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})


def test_a_class_with_an_option_without_default_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AdamW: a class that is the method of a group needs a default .* 'lr'"):
        AdamW(leaves().items(), groups=[("a", dict(method=Needy, lr=0.1))])


@pytest.mark.parametrize("method", [FirstOrder, "routedoptimizer"])
def test_a_base_class_is_no_method(method: Any) -> None:
    with pytest.raises(ValueError, match="rmsprop, rowwiseadagrad") as error:
        AdamW(leaves().items(), groups=[("a", dict(method=method))])
    assert ", routedoptimizer" not in str(error.value)


def test_a_class_that_checkpoints_cannot_name_is_refused() -> None:
    local = from_rule(scaled, "Nowhere", lr=0.1, gain=0.1)
    with pytest.raises(ValueError, match="assign the class to Nowhere in"):
        AdamW(leaves().items(), groups=[("a", dict(method=local))])


def test_the_class_itself_is_no_other_method() -> None:
    optimizer = AdamW(leaves().items(), lr=0.3, groups=[("a", dict(method="adamw")), ("b", dict(method=AdamW))])
    assert all("method" not in group and group["lr"] == 0.3 for group in optimizer.param_groups)


def test_sparse_gradients_mean_what_the_method_says() -> None:
    table, weight = torch.ones(5, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = AdamW([("table", table), ("weight", weight)], groups=[("table", dict(method="adagrad", lr=0.1))])
    table.grad = torch.sparse_coo_tensor([[1, 1, 3]], torch.ones(3, 2), (5, 2))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert table[:, 0].tolist() == pytest.approx([1, 0.9, 1, 0.9, 1], rel=1e-6)
    optimizer.sparse = "exact"
    with pytest.raises(RuntimeError, match=r"Adagrad: sparse='exact' is for Adam and AdamW, .* but table has"):
        optimizer.step()


def test_steps_inside_backward() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    groups = [("*.weight", dict(method="lion"))]
    ours, plain = AdamW(model, groups=groups), AdamW(twin, groups=groups)
    with in_backward(ours):
        for step in range(3):
            inputs = torch.full((2, 3), float(step), dtype=torch.float64)
            model(inputs).square().sum().backward()
            ours.step()
            plain.zero_grad()
            twin(inputs).square().sum().backward()
            plain.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_init_state_makes_the_state_of_each_method() -> None:
    params = leaves()
    optimizer = mixed(params)
    optimizer.init_state()
    keys = {name: list(optimizer.state[param]) for name, param in params.items()}
    assert keys["a"] == ["exp_avg"]
    assert keys["b"] == ["momentum_buffer"]
    assert keys["c"] == ["square"]
    assert keys["d"] == ["step", "mu_product", "exp_avg", "exp_avg_sq"]
    assert keys["e"] == ["step", "exp_avg", "exp_avg_sq"]
    twin = mixed(leaves())
    for each in (optimizer, twin):
        give_grads(params_of(each), 0)
        each.step()
    assert all(map(torch.equal, params_of(optimizer), params_of(twin)))
    assert_same_bits(state_of(optimizer), state_of(twin))


def test_init_state_makes_copies_of_parameters_without_a_graph() -> None:
    optimizer = mixed(leaves(), ema=0.9)
    optimizer.init_state()
    assert not any(optimizer.state[param]["ema"].requires_grad for param in params_of(optimizer))
    copy.deepcopy(optimizer)
