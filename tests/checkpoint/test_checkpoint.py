"""Saving, loading, copying and going on."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    ON_GPU,
    Case,
    Twins,
    assert_same_bits,
    assert_same_state,
    assert_unmoved,
    give_grads,
    leaves,
    params_of,
    snapshot,
    state_of,
)
from programs import OURS, advance, build
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from descend import SGD, Adam, AdamW, FirstOrder, no_decay

COUNTED = ("k", "weight_sum", "lr_max", "scheduled_lr")  # what groups of AdamWScheduleFree count


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_new_optimizer(optimizer: FirstOrder, case: Case) -> FirstOrder:
    params = [param.detach().clone().requires_grad_() for param in params_of(optimizer)]
    new = case.ours(params, **case.options, max_norm=1.0, nonfinite="skip", backend=optimizer.backend)
    new.load_state_dict(through_file(optimizer.state_dict()))
    return new


WAYS: list[Callable[[FirstOrder, Case], FirstOrder]] = [
    through_new_optimizer,
    lambda optimizer, case: copy.deepcopy(optimizer),
    lambda optimizer, case: pickle.loads(pickle.dumps(optimizer)),
]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "state_dict": lambda optimizer: loaded_into_new(optimizer, optimizer.state_dict()),
    "file": lambda optimizer: loaded_into_new(optimizer, through_file(optimizer.state_dict())),
}


def two_groups(kind: Any) -> Any:
    first, second = leaves([(3,), (2,)])
    return kind([{"params": [first]}, {"params": [second]}], lr=torch.tensor(0.5))


def loaded_into_new(optimizer: Any, saved: dict[str, Any]) -> Any:
    new = two_groups(type(optimizer))
    new.load_state_dict(saved)
    return new


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", [AdamW, SGD, torch.optim.AdamW])
def test_groups_that_share_a_tensor_go_on_sharing_it(kind: Any, copied: str) -> None:
    optimizer = two_groups(kind)
    copy_of_it = COPIES[copied](optimizer)
    copy_of_it.param_groups[0]["lr"].fill_(0.25)
    assert [float(group["lr"]) for group in copy_of_it.param_groups] == [0.25, 0.25]
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("backend", ["auto", ON_GPU])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_going_on_equals_not_stopping_bit_for_bit(
    case: Case, backend: str, way: Callable[[FirstOrder, Case], FirstOrder], dtype: torch.dtype
) -> None:
    options = dict(case.options, max_norm=1.0, nonfinite="skip", backend=backend)
    optimizer: Any = case.ours(leaves(dtype=dtype), **options)
    other: Any = case.ours(leaves(dtype=dtype), **options)
    schedulers = [CosineAnnealingLR(o, T_max=10) for o in (optimizer, other)]
    for seed in range(8):
        if seed == 4:
            other = way(other, case)
            scheduler = CosineAnnealingLR(other, T_max=10)
            scheduler.load_state_dict(through_file(schedulers[1].state_dict()))
            schedulers[1] = scheduler
            for group, now in zip(other.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = now["lr"]  # a new scheduler takes its first step at once
        for o, scheduler in zip((optimizer, other), schedulers, strict=True):
            give_grads(params_of(o), seed)
            o.step()
            scheduler.step()
    assert all(map(torch.equal, params_of(optimizer), params_of(other)))
    assert_same_bits(state_of(other), state_of(optimizer))
    assert optimizer.grad_norm == other.grad_norm


@pytest.mark.parametrize("first", ["load", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", OURS)
def test_state_loads_into_what_was_loaded_or_copied_before(name: str, first: str) -> None:
    optimizer = build(OURS[name], leaves([(3, 2)]))
    advance(optimizer, 0)
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    defaults = dict(optimizer.defaults)
    twin: Any = {"load": lambda o: o, "deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}[
        first
    ](optimizer)
    for _ in range(2):
        twin.load_state_dict(optimizer.state_dict())
    twin.add_param_group({"params": leaves([(2, 2)])})
    assert twin.defaults == defaults  # torch adds "differentiable" to those of classes without it
    for group in twin.param_groups:
        assert {key: group[key] for key in group if key != "params"} == options | {
            key: group[key] for key in COUNTED if key in group
        }
    advance(twin, 1)


@pytest.mark.parametrize("way", WAYS[1:], ids=["deepcopy", "pickle"])
def test_our_own_options_survive_copies(way: Callable[[FirstOrder, Case], FirstOrder]) -> None:
    params = leaves()
    options = dict(max_norm=0.5, nonfinite="skip", backend="eager", state_dtype=torch.float64, amp="fused")
    optimizer = AdamW(params, **options)
    give_grads(params, 0)
    params[2].grad[0, 0] = torch.nan
    optimizer.step()
    twin = way(optimizer, CASES[5])
    assert type(twin) is AdamW
    assert {name: getattr(twin, name) for name in options} == options
    assert twin.skipped_steps == 1
    assert not set(options) & {*twin.defaults, *twin.param_groups[0]}


def test_copies_are_independent() -> None:
    params = leaves()
    optimizer = AdamW(params, lr=0.1)
    give_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    twin = copy.deepcopy(optimizer)
    give_grads(params_of(twin), 1)
    twin.step()
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("from_torch", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_go_both_ways_between_torch_and_us(case: Case, from_torch: bool) -> None:
    if case.ours.scalar_state:  # torch casts them to the parameters' dtype: let it be theirs from the start
        torch.set_default_dtype(torch.float64)
    twins = Twins(case)
    for seed in range(3):
        twins.step(seed)
    source = twins.theirs if from_torch else twins.ours
    saved = through_file(source.state_dict())
    fresh = Twins(case, lambda: [param.detach().clone().requires_grad_() for param in params_of(source)])
    fresh.edit(lambda optimizer: optimizer.load_state_dict(saved))
    for seed in range(3, 8):
        fresh.step(seed)
        twins.step(seed)
    fresh.assert_equal()
    for ours, theirs in zip(params_of(fresh.ours), params_of(twins.theirs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, 8 steps
    (ours_group,), (theirs_group,) = (optimizer.state_dict()["param_groups"] for optimizer in fresh.both)
    sums = {key: pytest.approx(theirs_group[key], rel=1e-12) for key in case.ours.group_state if key != "train_mode"}
    assert ours_group == {**theirs_group, **sums}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.ours.scalar_state], ids=str)
def test_scalar_state_keeps_its_dtype(case: Case, dtype: torch.dtype) -> None:
    twins = Twins(case, lambda: leaves(dtype=dtype))
    for seed in range(3):
        twins.step(seed)
    twins.edit(lambda optimizer: optimizer.load_state_dict(through_file(optimizer.state_dict())))
    for name in case.ours.scalar_state:
        ours, theirs = ({state[name].dtype for state in state_of(optimizer).values()} for optimizer in twins.both)
        assert ours == {torch.float32}
        assert theirs == {dtype}  # in bfloat16 a running product with two digits
        for state in twins.ours.state.values():
            state[name] = state[name].bfloat16()
    give_grads(params_of(twins.ours), 3)
    twins.ours.step()  # a file that torch wrote after loading
    assert {state[name].dtype for state in twins.ours.state.values()} == {torch.float32}


def test_adam_adopts_decoupled_decay_and_adamw_forces_it() -> None:
    (saved,) = (AdamW(leaves()).state_dict(),)
    adam, adamw = Adam(leaves()), AdamW(leaves())
    adam.load_state_dict(saved)
    assert adam.param_groups[0]["decoupled_weight_decay"] is True
    adamw.load_state_dict(Adam(leaves()).state_dict())
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True


def test_flags_of_how_to_run_are_not_taken_from_the_file() -> None:
    saved = torch.optim.Adam(leaves(), lr=0.5, fused=True).state_dict()
    optimizer = Adam(leaves())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer.param_groups[0]["lr"] == 0.5
    saved["param_groups"][0].update(foreach=True, capturable=True, differentiable=True)
    optimizer.load_state_dict(saved)
    flags = {key: optimizer.param_groups[0][key] for key in ("fused", "foreach", "capturable", "differentiable")}
    assert flags == dict(fused=None, foreach=None, capturable=False, differentiable=False)


def test_groups_of_old_files_get_what_they_lack() -> None:
    saved = Adam(leaves()).state_dict()
    for key in ("decoupled_weight_decay", "maximize", "amsgrad"):
        del saved["param_groups"][0][key]
    saved["param_groups"][0]["initial_lr"] = 0.7
    optimizer = Adam(leaves())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0].items() >= dict(amsgrad=False, maximize=False, initial_lr=0.7).items()
    give_grads(params_of(optimizer), 0)
    optimizer.step()


WIDTHS = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float64, torch.float64),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float64, torch.float32, torch.float64),
]


@pytest.mark.parametrize(("param_dtype", "saved_dtype", "expected"), WIDTHS, ids=str)
@pytest.mark.parametrize("sparse", [None, "touched"])
def test_loaded_state_is_widened_and_never_narrowed(
    param_dtype: torch.dtype, saved_dtype: torch.dtype, expected: torch.dtype, sparse: str | None
) -> None:
    source = leaves(dtype=saved_dtype)
    saving = Adam(source, state_dtype=saved_dtype)
    give_grads(source, 0)
    saving.step()
    saved = saving.state_dict()
    optimizer = Adam(leaves(dtype=param_dtype), sparse=sparse)
    optimizer.load_state_dict(saved)
    for index, state in state_of(optimizer).items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == expected
            assert torch.equal(state[name], saved["state"][index][name].to(expected))
        assert state["step"].dtype == torch.float32
        assert state["step"].device.type == "cpu"
    give_grads(params_of(optimizer), 1)
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {expected}


def test_integers_and_foreign_values_are_kept() -> None:
    saved = SGD(leaves([(3,)])).state_dict()
    counts, foreign = torch.tensor([1, 2**40, 3]), SimpleNamespace(content=[1])
    content = {"counts": counts, "note": "kept", "mask": torch.tensor([True]), "list": [counts]}
    saved["state"] = {0: content, "global": {"x": foreign, "counts": counts}}
    optimizer = SGD(leaves([(3,)]))
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state[params_of(optimizer)[0]]
    assert state["counts"].dtype == torch.int64
    assert torch.equal(state["counts"], counts)
    assert state["counts"].data_ptr() != counts.data_ptr()
    assert state["note"] == "kept"
    assert torch.equal(state["list"][0], counts)
    assert state["list"][0].data_ptr() != counts.data_ptr()
    assert state["mask"].dtype == torch.bool
    assert optimizer.state["global"]["x"] == foreign
    assert optimizer.state["global"]["x"].content is not foreign.content
    assert torch.equal(optimizer.state["global"]["counts"], counts)
    assert optimizer.state["global"]["counts"].data_ptr() != counts.data_ptr()


@pytest.mark.parametrize("name", OURS)
def test_what_a_program_keeps_in_the_state_beside_parameters_stays(name: str) -> None:
    optimizer = build(OURS[name], leaves([(3, 1)]))
    optimizer.state["epochs"] = 3
    advance(optimizer, 0)
    twin = build(OURS[name], leaves([(3, 1)]))
    twin.load_state_dict(MappingProxyType(optimizer.state_dict()))  # any mapping will do
    advance(twin, 1)
    assert twin.state["epochs"] == twin.state_dict()["state"]["epochs"] == 3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_state_is_copied_not_shared(case: Case) -> None:
    params = leaves()
    source = case.ours(params, **case.options)
    give_grads(params, 0)
    source.step()
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    loaded = [case.ours(leaves(), **case.options) for _ in range(2)]
    for optimizer in loaded:
        optimizer.load_state_dict(saved)
        give_grads(params_of(optimizer), 1)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 77.0
    assert_same_bits(saved["state"], before["state"])
    assert saved["param_groups"] == before["param_groups"]
    assert_same_bits(state_of(loaded[0]), state_of(loaded[1]))


STEPS = [3, 3.0, np.int64(3), torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)]


@pytest.mark.parametrize("step", STEPS)
def test_steps_of_other_programs_are_understood(step: Any) -> None:
    twins = Twins(CASES[3])
    for seed in range(3):
        twins.step(seed)
    saved = twins.ours.state_dict()
    for state in saved["state"].values():
        state["step"] = copy.deepcopy(step)
    twins.ours.load_state_dict(saved)
    for seed in range(3, 5):
        twins.step(seed)
    for ours, theirs in zip(params_of(twins.ours), params_of(twins.theirs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, 5 steps
    for state in saved["state"].values():
        state["step"] = sys.float_info.max
    twins.ours.load_state_dict(saved)


TURNED_ON = [(CASES[3], "amsgrad", True), (CASES[12], "momentum", 0.9), (CASES[12], "centered", True)]


@pytest.mark.parametrize(("case", "option", "value"), TURNED_ON, ids=str)
def test_state_turned_on_just_before_saving_is_no_damage(case: Case, option: str, value: Any) -> None:
    twins = Twins(case)
    twins.step(0)
    twins.ours.param_groups[0][option] = value
    fresh = Twins(case, lambda: [param.detach().clone().requires_grad_() for param in params_of(twins.ours)])
    fresh.ours.load_state_dict(through_file(twins.ours.state_dict()))
    for optimizer in (twins.ours, fresh.ours):
        give_grads(params_of(optimizer), 1)
        optimizer.step()
    assert all(map(torch.equal, params_of(twins.ours), params_of(fresh.ours)))
    assert_same_bits(state_of(fresh.ours), state_of(twins.ours))


@pytest.mark.parametrize("value", [None, {}], ids=str)
def test_parameter_without_state_begins_afresh(value: Any) -> None:
    saved = SGD(leaves([(3,)]), momentum=0.9).state_dict()
    saved["state"] = {0: {"momentum_buffer": None} if value is None else value}
    optimizer, fresh = SGD(leaves([(3,)]), momentum=0.9), SGD(leaves([(3,)]), momentum=0.9)
    optimizer.load_state_dict(saved)
    for each in (optimizer, fresh):
        give_grads(params_of(each), 0)
        each.step()
    assert_same_bits(state_of(optimizer), state_of(fresh))


@pytest.mark.parametrize("made", [lambda buffer: buffer.to(torch.float8_e4m3fn), Tensor.to_sparse], ids=["8", "sparse"])
def test_eight_bit_floats_are_widened_and_sparse_momentum_is_made_dense(made: Callable[[Tensor], Tensor]) -> None:
    saved = SGD(leaves([(3,)]), momentum=0.9).state_dict()
    saved["state"] = {0: {"momentum_buffer": made(torch.tensor([1.0, -2.0, 0.5]))}}
    optimizer = SGD(leaves([(3,)], torch.float32), momentum=0.9)
    optimizer.load_state_dict(saved)
    buffer = optimizer.state[params_of(optimizer)[0]]["momentum_buffer"]
    assert (buffer.dtype, buffer.tolist()) == (torch.float32, [1.0, -2.0, 0.5])


@pytest.mark.parametrize("sparse", [None, "touched"])
def test_state_follows_the_memory_order_of_its_parameter(sparse: str | None) -> None:
    params = [leaves([(4, 3)])[0].detach().mT.requires_grad_()]
    saved = AdamW(leaves([(3, 4)]))
    saved.init_state()
    optimizer = AdamW(params, sparse=sparse)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state[params[0]]["exp_avg"].stride() == params[0].stride()


# A training run as people write it: schedule, loss scaling, named groups, a file.


def run_of(steps: int, files: list[int]) -> list[Tensor]:
    """Parameters after some steps, saved and loaded before those in ``files``."""

    def made() -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        optimizer = AdamW(model, lr=0.05, max_norm=1.0, groups=[*no_decay(model), ("2.*", dict(lr=0.01))])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2)  # overflows at first
        return model, optimizer, OneCycleLR(optimizer, max_lr=[0.05, 0.02, 0.01], total_steps=40), scaler

    parts = made()
    for step in range(steps):
        if step in files:
            saved = through_file([part.state_dict() for part in parts])
            parts = made()
            for part, content in zip(parts, saved, strict=True):
                part.load_state_dict(content)
            parts[1].load_state_dict(saved[1])  # a new schedule has written its first lr
        model, optimizer, schedule, scaler = parts
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(inputs) * 1e3).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    return [param.detach() for param in parts[0].parameters()]


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # of a step that GradScaler skipped
def test_training_with_schedule_and_scaler_goes_on_bit_for_bit() -> None:
    straight = run_of(30, [])
    assert all(map(torch.equal, straight, run_of(30, [3, 17, 18])))
    assert not torch.equal(straight[0], run_of(3, [])[0])


def named(case: Case, kind: Any, seed: int = 0) -> Any:
    params = list(zip("abcd", leaves(seed=seed), strict=True))
    options = {key: value for key, value in case.options.items() if key != "lr"}
    return kind([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}], **options)


@pytest.mark.parametrize("ours_has_groups", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_named_checkpoints_go_both_ways(case: Case, ours_has_groups: bool) -> None:
    def ours() -> Any:
        if not ours_has_groups:
            return named(case, case.ours)
        options = {**case.options, "lr": 0.1}
        return case.ours(list(zip("abcd", leaves(), strict=True)), **options, groups=[("[cd]", dict(lr=0.01))])

    for saver, loader in ((ours(), named(case, case.theirs)), (named(case, case.theirs), ours())):
        give_grads(params_of(saver), 0)
        saver.step()
        loader.load_state_dict(through_file(saver.state_dict()))
        found, expected = state_of(loader), state_of(saver)
        for state in (
            *found.values(),
            *expected.values(),
        ):  # numbers are cast to the parameter's dtype by torch, and kept by us
            for name in ("mu_product", "eta", "mu"):
                if name in state:
                    state[name] = state[name].double()
        assert_same_bits(found, expected)
        assert loader.state_dict()["param_groups"] == saver.state_dict()["param_groups"]
        give_grads(params_of(loader), 1)
        loader.step()


def state_of_wrong_shape(saved: dict[str, Any]) -> None:
    saved["state"][2]["exp_avg"] = torch.zeros(2)


BAD: list[Callable[[dict[str, Any]], Any]] = [
    lambda saved: saved.pop("state"),
    lambda saved: saved.pop("param_groups"),
    lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
    lambda saved: saved["param_groups"][0]["params"].pop(),
    lambda saved: saved["param_groups"][0].update(lr=-1.0),
    lambda saved: saved["param_groups"][0].update(betas=(2.0, 0.9)),
    state_of_wrong_shape,
]


@pytest.mark.parametrize("spoil", BAD, ids=["state", "param_groups", "groups", "params", "lr", "betas", "shape"])
def test_bad_dictionary_is_refused_and_changes_nothing(spoil: Callable[[dict[str, Any]], Any]) -> None:
    params = leaves()
    optimizer = Adam(params)
    give_grads(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["eps"] = 0.5
    spoil(saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"state dict|Invalid|loaded"):
        optimizer.load_state_dict(saved)
    assert_unmoved(optimizer, before)


def test_state_dict_hooks_run_as_in_torch() -> None:
    for optimizer in Twins(CASES[5]).both:
        seen: list[Any] = []
        optimizer.register_state_dict_pre_hook(lambda o, seen=seen: seen.append("save"))
        optimizer.register_state_dict_post_hook(lambda o, saved, seen=seen: {**saved, "extra": seen.append("saved")})
        optimizer.register_load_state_dict_pre_hook(lambda o, saved, seen=seen: {**saved, "got": seen.append(o)})
        optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append(o))
        optimizer.register_load_state_dict_pre_hook(lambda o, saved, seen=seen: seen.append(sorted(saved)))
        saved = optimizer.state_dict()
        assert "extra" in saved
        optimizer.load_state_dict(saved)
        assert seen == ["save", "saved", optimizer, ["extra", "got", "param_groups", "state"], optimizer]
        assert "got" not in saved


def test_state_dict_is_a_live_view_as_in_torch() -> None:
    params = leaves([(3,)])
    optimizer = SGD(params, momentum=0.9)
    give_grads(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert isinstance(saved, Tensor)
    give_grads(params, 1)
    optimizer.step()
    assert torch.equal(saved, optimizer.state[params[0]]["momentum_buffer"])
    assert saved is not optimizer.state[params[0]]["momentum_buffer"]  # nobody can exchange its memory


def test_what_others_have_seen_of_the_state_can_be_edited_as_in_torch() -> None:
    twins = Twins(CASES[1])
    twins.step(0)
    seen: list[dict[str, Any]] = []
    for optimizer in twins.both:
        handle = optimizer.register_state_dict_post_hook(lambda optimizer, saved: seen.append(saved["state"][0]))
        optimizer.state_dict()
        handle.remove()
        seen.pop()["momentum_buffer"] = torch.ones((), dtype=torch.float64)
    twins.step(1)
    states = [optimizer.state[params_of(optimizer)[0]] for optimizer in twins.both]
    twins.edit(lambda optimizer: optimizer.state_dict())
    for state in states:
        state["momentum_buffer"] = torch.ones((), dtype=torch.float64)
    twins.step(2)
    twins.assert_equal()


def test_state_in_a_dictionary_of_another_kind_is_saved() -> None:
    twins = Twins(CASES[1])
    twins.step(0)
    for optimizer in twins.both:
        optimizer.state = defaultdict(dict, optimizer.state)
    assert_same_state(*(optimizer.state_dict()["state"] for optimizer in twins.both), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_saved_state_of_a_differentiable_step_is_differentiable() -> None:
    start = torch.ones(2, requires_grad=True)
    param = start.clone()
    optimizer = SGD([param], momentum=0.9, differentiable=True)
    param.grad = 3 * start
    optimizer.step()
    (gradient,) = torch.autograd.grad(optimizer.state_dict()["state"][0]["momentum_buffer"].sum(), start)
    assert gradient.tolist() == [3.0, 3.0]
