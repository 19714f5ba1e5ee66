"""What a monitor measures, against the same numbers from copies made before and after the step."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, Case, assert_same_bits, give_grads, leaves, params_of
from torch import Tensor, nn

from descend import LBFGS, SGD, AdamW, FirstOrder, Monitor, NAdam, SparseAdam, from_rule, in_backward
from descend.backends.cpu import library
from descend.backends.cpu.launch import Launch
from descend.step.plan import Plan

SIZES = ((0,), (1,), (1023,), (3, 5), (20_000,))  # none, one, odd, rows, several chunks
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().double()


class Around:
    """Copies of an optimizer's parameters before a step; afterwards, what a monitor must have found."""

    def __init__(self, optimizer: FirstOrder, scale: float = 1.0) -> None:
        self.optimizer = optimizer
        self.before = [double(param) for param in params_of(optimizer)]
        self.grads = [None if p.grad is None else double(p.grad.to_dense()) * scale for p in params_of(optimizer)]

    def expected(self, index: int) -> dict[str, float]:
        param, before, grad = params_of(self.optimizer)[index], self.before[index], self.grads[index]
        assert grad is not None
        update, weight = (double(param) - before).norm(), before.norm()
        found = {
            "grad_norm": grad.norm(),
            "update_norm": update,
            "weight_norm": weight,
            "nonfinite_grads": (~grad.isfinite()).sum(),
            "nonfinite_weights": (~double(param).isfinite()).sum(),
        }
        if weight > 0:
            found["update_ratio"] = update / weight
        if (moving := grad != 0).any():
            found["lost_updates"] = (double(param) == before)[moving].double().mean()
        state = self.optimizer.state_dict()["state"].get(index, {})
        if "exp_avg_sq" in state and "exp_avg" in state:
            (group,) = [group for group in self.optimizer.param_groups if any(p is param for p in group["params"])]
            # Of three betas nobody can tell which two belong to these averages: no bias is removed then.
            beta1, beta2 = group["betas"] if len(group["betas"]) == 2 else (0.0, 0.0)
            step = float(state["step"])
            exp_avg = double(state["exp_avg"]) / (1 - beta1**step)
            exp_avg_sq = double(state["exp_avg_sq"]) / (1 - beta2**step)
            if (exp_avg_sq > 0).any():
                found["signal_to_noise"] = (exp_avg.abs() / exp_avg_sq.sqrt())[exp_avg_sq > 0].mean()
        return {name: float(value) for name, value in found.items()}


def assert_measured(found: dict[str, float], expected: dict[str, float], rtol: float = 1e-5) -> None:
    """Assert that all expected numbers were found. |m| / sqrt(v) and updates are formed in float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rtol, abs=1e-300, nan_ok=True), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_parameter_is_measured(backend: str, dtype: torch.dtype) -> None:
    first, second = leaves(SIZES, dtype), leaves(SIZES, dtype, seed=1)
    groups = [{"params": first}, {"params": second, "lr": 0.1, "betas": (0.5, 0.8)}]
    optimizer = AdamW(groups, lr=1e-3, weight_decay=0.1, backend=backend)
    monitor = Monitor(optimizer, every=1)
    for seed in range(3):
        give_grads(params_of(optimizer), seed)
        around = Around(optimizer)
        optimizer.step()
    read = monitor.read()
    assert read["step"] == 3
    for index, found in enumerate(read["params"].values()):
        assert_measured(found, around.expected(index))
    for group, start in (("0", 0), ("1", len(SIZES))):
        members = [around.expected(index) for index in range(start, start + len(SIZES))]
        for norm in ("grad_norm", "update_norm", "weight_norm"):
            assert read["groups"][group][norm] == pytest.approx(math.hypot(*(member[norm] for member in members)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_measured_steps_change_no_bit(case: Case, backend: str) -> None:
    plain = case.ours(leaves(dtype=torch.float32), **case.options, backend=backend, max_norm=3.0)
    watched = case.ours(leaves(dtype=torch.float32), **case.options, backend=backend, max_norm=3.0)
    monitor = Monitor(watched, every=2, on=())
    for seed in range(5):
        for optimizer in (plain, watched):
            give_grads(params_of(optimizer), seed)
        around = Around(watched)
        plain.step()
        watched.step()
        if monitor.step == 4:
            expected = [around.expected(index) for index in range(len(around.before))]
    assert all(map(torch.equal, params_of(plain), params_of(watched)))
    assert_same_bits(plain.state_dict()["state"], watched.state_dict()["state"])
    assert [sample["step"] for sample in monitor.history] == [2, 4]
    for found, wanted in zip(monitor.read()["params"].values(), expected, strict=True):
        wanted.pop("signal_to_noise", None)
        assert_measured({name: value for name, value in found.items() if name != "signal_to_noise"}, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_measured_steps_change_no_bit_in_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    pair = [case.ours(leaves((*SIZES, ()), dtype), **case.options) for _ in range(2)]
    Monitor(pair[1], every=1, on=())
    for seed in range(4):
        for optimizer in pair:
            give_grads(params_of(optimizer), seed)
            optimizer.step()
    assert all(map(torch.equal, *map(params_of, pair)))
    assert_same_bits(*(optimizer.state_dict()["state"] for optimizer in pair))


def test_results_do_not_depend_on_threads() -> None:
    def sums(threads: int) -> list[dict[str, Any]]:
        torch.set_num_threads(threads)
        optimizer = AdamW(leaves(((300_000,), (7,)), torch.float32))
        monitor = Monitor(optimizer, every=1)
        for seed in range(2):
            give_grads(params_of(optimizer), seed)
            optimizer.step()
        return monitor.history

    assert sums(1) == sums(2)


def test_strided_views_and_parameters_in_the_order_of_the_groups_are_measured() -> None:
    base = torch.randn(6, 10)
    strided, shared = base[:, ::2].requires_grad_(), torch.randn(8)
    optimizer = AdamW([strided, shared[:5].requires_grad_(), shared[3:].requires_grad_()], lr=0.1)
    monitor = Monitor(optimizer, every=1)
    give_grads(params_of(optimizer), 0)
    around = Around(optimizer)
    optimizer.step()
    found = [*monitor.read()["params"].values()]
    assert_measured(found[0], around.expected(0))
    assert found[1]["grad_norm"] == pytest.approx(around.expected(1)["grad_norm"])
    assert found[2]["update_norm"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_lost_to_rounding_are_counted(backend: str) -> None:
    weight = torch.tensor([1.0, 1.0, 256.0, 2.0**-20], dtype=torch.bfloat16).requires_grad_()
    wide = torch.ones(4, requires_grad=True)
    optimizer = SGD([("weight", weight), ("wide", wide)], lr=1.0, backend=backend)
    monitor = Monitor(optimizer, every=1)
    # bfloat16 has 8 digits: 1 - 2**-10 rounds to 1, and 256 - 2**-10 to 256. The second has no update.
    weight.grad = torch.tensor([2.0**-10, 0.0, 2.0**-10, 2.0**-10], dtype=torch.bfloat16)
    wide.grad = torch.tensor([1e-30, 1.0, 1.0, 1.0])
    optimizer.step()
    params = monitor.read()["params"]
    assert params["weight"]["lost_updates"] == pytest.approx(2 / 3)
    assert params["wide"]["lost_updates"] == 0.25


def test_a_learning_rate_of_zero_loses_no_updates() -> None:
    groups = [{"params": leaves(((4,),)), "lr": 0.0}, {"params": leaves(((4,),)), "lr": 1e-30}]
    optimizer = SGD(groups)
    monitor = Monitor(optimizer, every=1)
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    assert [group["lost_updates"] for group in monitor.read()["groups"].values()] == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_counted(backend: str) -> None:
    weight = torch.ones(40, requires_grad=True)
    optimizer = SGD([("weight", weight)], backend=backend)
    monitor = Monitor(optimizer, every=1, on=())
    weight.grad = torch.ones(40)
    weight.grad[3], weight.grad[30:32] = math.nan, math.inf
    optimizer.step()
    found = monitor.read()["params"]["weight"]
    assert (found["nonfinite_grads"], found["nonfinite_weights"]) == (3, 3)
    assert math.isnan(found["grad_norm"])
    assert found["weight_norm"] == pytest.approx(math.sqrt(40))


def test_gradients_are_measured_before_clipping() -> None:
    weight = torch.zeros(2, requires_grad=True)
    optimizer = SGD([weight], lr=1.0, max_norm=1.0)
    monitor = Monitor(optimizer, every=4)
    for factor in (1.0, 0.1, 2.0, 4.0):
        weight.grad = torch.tensor([3.0, 4.0]) * factor
        optimizer.step()
    read = monitor.read()
    assert read["grad_norm"] == 20
    assert read["update_norm"] == pytest.approx(1)
    assert read["clipped"] == 0.75
    assert read["clip_coefficient"] == pytest.approx(1 / 20)


@pytest.mark.parametrize("amp", [None, "fused"])
def test_gradients_are_measured_without_their_loss_scale(amp: Any) -> None:
    weight = torch.zeros(2, requires_grad=True)
    optimizer = AdamW([weight], amp=amp)
    monitor = Monitor(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for loss in ((weight * torch.tensor([3.0, 4.0])).sum(), weight.sum() * math.inf):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert monitor.read()["grad_norm"] == pytest.approx(5)
    assert monitor.step == 1
    assert monitor.skipped == (amp == "fused"), "a GradScaler that skips by itself calls no step"


def test_steps_left_out_are_counted_and_the_sample_is_taken_later() -> None:
    weight = torch.zeros(2, requires_grad=True)
    optimizer = SGD([("weight", weight)], nonfinite="skip")
    monitor = Monitor(optimizer, every=2, on=("nonfinite",))
    for value in (1.0, math.nan, math.nan, 2.0):
        weight.grad = torch.full((2,), value)
        if math.isnan(value) and not monitor.alerts:
            with pytest.warns(UserWarning, match="weight: NaN or Inf at step 1"):
                optimizer.step()
        else:
            optimizer.step()
    assert (monitor.step, monitor.skipped, optimizer.skipped_steps) == (2, 2, 2)
    assert monitor.read()["grad_norm"] == pytest.approx(math.sqrt(8))
    assert len(monitor.alerts) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", ["touched", "exact", None])
def test_rows_that_a_sparse_gradient_names_are_measured(sparse: Any, backend: str) -> None:
    table = nn.Embedding(30, 3, sparse=True)
    kind: Any = AdamW if sparse else SparseAdam
    optimizer = kind(table.named_parameters(), lr=0.1, backend=backend, **({"sparse": sparse} if sparse else {}))
    if sparse == "exact":
        optimizer.attach(table)
    twin = copy.deepcopy(table)
    monitor = Monitor(optimizer, every=1)
    for tokens in ([1, 2, 2], [2, 5, 7, 5]):
        optimizer.zero_grad()
        (table(torch.tensor(tokens)) ** 2).sum().backward()
        before, grad = double(table.weight), double(table.weight.grad.to_dense())
        optimizer.step()
    rows = [2, 5, 7]
    found = monitor.read()["params"]["weight"]
    assert found["rows_named"] == 3
    assert found["grad_norm"] == pytest.approx(float(grad.norm()))
    assert found["update_norm"] == pytest.approx(float((double(table.weight) - before)[rows].norm()), rel=1e-5)
    assert found["weight_norm"] == pytest.approx(float(before[rows].norm()))
    assert monitor.dead_rows() == {"weight": (26, 30)}
    assert torch.equal(table.weight[[0, 3]], twin.weight[[0, 3]])


def test_zeros_for_the_other_rows_are_measured_too() -> None:
    weight = torch.randn(9, 2).requires_grad_()
    optimizer = SGD([weight], lr=1.0, momentum=0.9)
    monitor = Monitor(optimizer, every=1)
    weight.grad = torch.sparse_coo_tensor([[3, 5]], torch.ones(2, 2), (9, 2))
    before = double(weight)
    optimizer.step()
    (found,) = monitor.read()["params"].values()
    assert found["weight_norm"] == pytest.approx(float(before.norm()))
    assert found["update_norm"] == pytest.approx(2.0)


def test_dead_rows_are_those_whose_state_no_gradient_has_reached() -> None:
    weight, bias = torch.ones(4, 2, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = AdamW([("weight", weight), ("bias", bias)])
    monitor = Monitor(optimizer)
    assert monitor.dead_rows() == {}
    weight.grad, bias.grad = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), torch.zeros(4)
    optimizer.step()
    assert monitor.dead_rows() == {"weight": (2, 4)}
    assert Monitor(SGD([weight])).dead_rows() == {}, "its state says nothing"


def test_steps_inside_backward_are_measured() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ordinary = copy.deepcopy(model)
    inside, whole = AdamW(model, lr=0.1), AdamW(ordinary, lr=0.1)
    monitors = [Monitor(optimizer, every=2) for optimizer in (inside, whole)]
    in_backward(inside)
    for _ in range(5):
        data = torch.randn(5, 3)
        for trained in (model, ordinary):
            (trained(data) ** 2).sum().backward()
        inside.step()
        whole.step()
        whole.zero_grad()
    assert monitors[0].step == 5
    assert monitors[0].read()["step"] == 4
    for name, expected in monitors[1].read()["params"].items():
        assert monitors[0].read()["params"][name] == pytest.approx(expected), name


def test_layers_are_the_names_up_to_the_last_dot() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = Monitor(optimizer, every=1, names=model)
    give_grads(params_of(optimizer), 0)
    model[1].bias.grad = None
    optimizer.step()
    read = monitor.read()
    assert [*read["params"]] == ["0.weight", "0.bias", "1.weight"], "a parameter that took no step has no numbers"
    assert [*read["layers"]] == ["0", "1"]
    parts = [read["params"][name]["grad_norm"] for name in ("0.weight", "0.bias")]
    assert read["layers"]["0"]["grad_norm"] == pytest.approx(math.hypot(*parts))
    assert read["layers"]["1"]["grad_norm"] == read["params"]["1.weight"]["grad_norm"]
    unnamed = Monitor(SGD([torch.ones(2, requires_grad=True)]), every=1)
    unnamed.optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    unnamed.optimizer.step()
    assert [*unnamed.read()["layers"]] == ["param_groups[0]['params'][0]"]


def test_rules_of_users_are_measured() -> None:
    kind = from_rule(lambda param, grad, lr: param - lr * grad, "Descent", lr=0.5)
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    optimizer = kind([weight])
    monitor = Monitor(optimizer, every=1)
    optimizer.step()
    assert monitor.read()["update_norm"] == pytest.approx(0.5 * math.sqrt(3))


def test_averages_with_other_betas_than_two_are_measured_as_they_are() -> None:
    def rule(param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, lr: Any) -> Any:
        return param - lr * grad, exp_avg + grad / 2, exp_avg_sq + grad * grad

    class ThreeBetas(FirstOrder):
        def scalars(self, group: Any, step: float) -> tuple[Any, ...]:
            return (group["lr"],)

    ThreeBetas.rule = staticmethod(rule)
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    optimizer = ThreeBetas([weight], {"lr": 0.5, "betas": (0.9, 0.92, 0.99)})
    monitor = Monitor(optimizer, every=1)
    optimizer.step()
    assert monitor.read()["signal_to_noise"] == pytest.approx(0.5)
    assert int(optimizer.state[weight]["step"]) == 1


def test_momentum_of_nadam_is_corrected() -> None:
    optimizer = NAdam(leaves(((50,),)))
    monitor = Monitor(optimizer, every=1)
    give_grads(params_of(optimizer), 0)
    around = Around(optimizer)
    optimizer.step()
    (found,) = monitor.read()["params"].values()
    assert found["signal_to_noise"] == pytest.approx(1.0), "after one step each average is the gradient's"
    assert_measured(found, around.expected(0))


def test_steps_between_samples_call_the_ordinary_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKENDS[0] != "cpu":
        pytest.skip("needs kernels")
    measured = Launch.measured_update_call
    calls: list[int] = []

    def recorded(launch: Launch) -> Any:
        calls.append(monitor.step + 1)
        return measured(launch)

    monkeypatch.setattr(Launch, "measured_update_call", recorded)
    optimizer = AdamW(leaves(((50,),)))
    monitor = Monitor(optimizer, every=3)
    stepped(optimizer)
    monkeypatch.setattr(library, "measures", None)  # compiled before it is needed
    for seed in range(6):
        stepped(optimizer, seed)
    assert {*calls} == {3, 6}
    assert [sample["step"] for sample in monitor.history] == [3, 6]


# Its life beside the optimizer's.


def stepped(optimizer: FirstOrder, seed: int = 0) -> None:
    give_grads(params_of(optimizer), seed)
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_the_optimizer_leave_the_monitor_behind(copied: Callable[[Any], Any]) -> None:
    optimizer = AdamW(leaves())
    keys = optimizer.state_dict().keys()
    monitor = Monitor(optimizer, every=1, on={"spike": lambda alert: None})
    stepped(optimizer)
    twin = copied(optimizer)
    assert twin.observer is None
    assert optimizer.observer is monitor
    stepped(twin, 1)
    assert monitor.step == 1
    assert optimizer.state_dict().keys() == keys


def test_a_monitor_outlives_loading_and_new_groups() -> None:
    optimizer, other = AdamW(leaves(((3,),))), AdamW(leaves(((3,),)))
    monitor = Monitor(optimizer, every=1)
    stepped(other)
    stepped(optimizer)
    optimizer.load_state_dict(other.state_dict())
    optimizer.add_param_group({"params": torch.ones(2, requires_grad=True)})
    stepped(optimizer)
    assert monitor.step == 2
    assert [len(sample["params"]) for sample in monitor.history] == [1, 2]


def test_steps_that_end_with_an_interrupt_count_and_steps_that_fail_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    optimizer = AdamW([weight], max_norm=1.0)
    monitor = Monitor(optimizer, every=1)
    optimizer.param_groups[0]["betas"] = (0.9,)
    with pytest.raises(ValueError, match="betas"):
        optimizer.step()
    assert (monitor.step, monitor.skipped, monitor.read()) == (0, 0, {})
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    released = Plan.release

    def interrupted(plan: Plan) -> None:
        released(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 2
    assert [sample["step"] for sample in monitor.history] == [1, 2]
    assert monitor.read()["clipped"] == 1


def test_closing_ends_it() -> None:
    optimizer = AdamW(leaves(((3,),)))
    with Monitor(optimizer, every=1) as monitor:
        with pytest.raises(RuntimeError, match=r"this AdamW has a monitor already; close\(\) it first"):
            Monitor(optimizer)
        stepped(optimizer)
    stepped(optimizer)
    assert monitor.step == 1
    Monitor(optimizer).close()
    monitor.close()


def test_only_the_last_samples_are_kept() -> None:
    optimizer = SGD(leaves(((3,),)))
    monitor = Monitor(optimizer, every=2, keep=2, step=3)
    for seed in range(7):
        stepped(optimizer, seed)
    assert [sample["step"] for sample in monitor.history] == [8, 10]


def test_what_cannot_be_monitored_is_refused() -> None:
    weight = torch.zeros(2, requires_grad=True)
    for optimizer in (torch.optim.SGD([weight]), LBFGS([weight]), None):
        with pytest.raises(TypeError, match="Monitor takes an optimizer of descend"):
            Monitor(optimizer)
    optimizer = SGD([weight])
    for options, message in (
        (dict(every=0), "every must be an integer >= 1, got 0"),
        (dict(keep=1.5), "keep must be an integer >= 1, got 1.5"),
        (dict(step=-1), "step must be an integer >= 0, got -1"),
        (dict(detail="all"), "detail must be 'layers' or 'params', got 'all'"),
        (dict(on="spikes"), "on must name alerts among"),
        (dict(on={"spike": "shout"}), r"on\['spike'\] must be 'warn', 'raise' or a function, got 'shout'"),
    ):
        with pytest.raises(ValueError, match=message):
            Monitor(optimizer, **options)
    with pytest.raises(TypeError, match="to must be a path, a dictionary"):
        Monitor(optimizer, to=3)
    assert optimizer.observer is None
    assert Monitor(optimizer).read() == {}


def test_names_that_two_models_share_are_told_apart() -> None:
    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizer = SGD([{"params": list(model.named_parameters())} for model in models])
    monitor = Monitor(optimizer, every=1)
    stepped(optimizer)
    assert [*monitor.read()["params"]] == ["group0.weight", "group0.bias", "group1.weight", "group1.bias"]


def test_history_is_made_of_plain_numbers() -> None:
    optimizer = AdamW(nn.Linear(2, 3))
    monitor = Monitor(optimizer, every=1)
    stepped(optimizer)
    leaves_of = [monitor.history[0]]
    while leaves_of:
        value = leaves_of.pop()
        if isinstance(value, dict):
            leaves_of += value.values()
        else:
            assert type(value) in (int, float)
            assert not isinstance(value, np.generic)
