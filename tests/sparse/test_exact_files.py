"""Files of tables in exact mode: other optimizers read and write them, some do not fit, and what they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, assert_same_bits, state_of
from exact_cases import (
    ALLOWED,
    LR,
    OPTIONS,
    ORDERS,
    ExactTwins,
    Run,
    assert_unmoved,
    load,
    random_tables,
    run_behind,
    save,
    snapshot,
    through_file,
    train,
)
from torch import Tensor

from descend import Adam, AdamW, from_rule


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch wakes all threads for a handful of numbers: minutes on a busy machine."""
    torch.set_num_threads(1)


# Other optimizers.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_of_torch_is_current(backend: str) -> None:
    """Its averages are kept, and coast on."""
    run = Run(backend=backend).train([0, 1, 2, 3], steps=5)
    new = run.replaced()
    new.ours.load_state_dict(through_file(run.theirs.state_dict()))
    new.layer.load_state_dict(run.dense.state_dict())
    new.assert_close(catch_ups=0)
    before = new.layer.weight.detach().clone()
    assert torch.equal(new.layer(torch.arange(6)), before)
    new.train([0], steps=30)
    new.assert_close()


def test_a_checkpoint_of_torch_replaces_a_state_with_rows_behind() -> None:
    run = run_behind()
    other = Run().train([4, 2], steps=3)
    run.ours.load_state_dict(through_file(other.theirs.state_dict()))
    run.layer.load_state_dict(other.dense.state_dict())
    run.dense, run.theirs = other.dense, other.theirs
    run.train([1], steps=20).assert_close()


def dense_torch(run: Run) -> torch.optim.Optimizer:
    return torch.optim.AdamW(run.layer.parameters(), **OPTIONS)


def dense_ours(run: Run) -> torch.optim.Optimizer:
    return AdamW(run.layer.parameters(), **OPTIONS)


def touched(run: Run) -> torch.optim.Optimizer:
    return AdamW(run.layer.parameters(), sparse="touched", **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dense", [dense_torch, dense_ours])
def test_a_dense_optimizer_takes_over_and_gives_back(
    dense: Callable[[Run], torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    run = Run(dtype=dtype).train([0, 1, 2, 3], steps=4).train([0], steps=30)
    with run.ours.settled():
        other = dense(run)
        other.load_state_dict(through_file(run.ours.state_dict()))
    run.ours, exact = other, run.ours
    run.layer.sparse = False
    run.train([0, 1], steps=5)
    for name in ("exp_avg", "exp_avg_sq"):
        found, expected = other.state[run.layer.weight][name], run.theirs.state[run.dense.weight][name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    saved = through_file(other.state_dict())
    run.layer.sparse = True
    run.ours = AdamW(run.layer.parameters(), sparse="exact", **OPTIONS)
    run.ours.attach(run.layer)
    run.ours.load_state_dict(saved)
    run.train([3], steps=10)
    run.assert_close(catch_ups=3)
    assert exact.sparse == "exact"


@pytest.mark.parametrize("other", [dense_ours, touched])
def test_rows_behind_are_not_taken_for_current(other: Callable[[Run], torch.optim.Optimizer]) -> None:
    """An optimizer that cannot bring rows up to date must not be given some that are behind."""
    run = run_behind()
    saved = through_file(run.ours.state_dict())
    try:
        loaded = other(run)
        loaded.load_state_dict(saved)
    except ValueError as error:
        assert "the loaded state of param_groups[0]['params'][0] has rows that are behind" in str(error)
        assert str(error).endswith("bring up to date. Call settle() of the optimizer that made it before saving.")
    else:
        torch.testing.assert_close(run.layer.weight, run.dense.weight, rtol=0, atol=ALLOWED * LR)
        expected = run.theirs.state[run.dense.weight]["exp_avg"]
        torch.testing.assert_close(loaded.state[run.layer.weight]["exp_avg"], expected)


def test_steps_of_touched_rows_in_between_are_no_steps_missed() -> None:
    """``touched`` leaves other rows alone; what it has left is where ``exact`` begins."""
    run = run_behind()
    run.ours.settle()
    between = touched(run)
    between.load_state_dict(through_file(run.ours.state_dict()))
    train(between, run.layer, [0, 1], steps=20)
    weight = run.layer.weight.detach().clone()
    exact = AdamW(run.layer.parameters(), sparse="exact", **OPTIONS)
    exact.attach(run.layer)
    exact.load_state_dict(through_file(between.state_dict()))
    assert torch.equal(run.layer(torch.arange(6)), weight)


def test_adam_takes_decoupled_decay_from_a_checkpoint_and_refuses_l2() -> None:
    run = run_behind()
    adam: Any = Adam(run.layer.parameters(), sparse="exact")
    adam.load_state_dict(run.ours.state_dict())
    assert adam.param_groups[0]["decoupled_weight_decay"] is True
    coupled = torch.optim.Adam(run.dense.parameters(), weight_decay=0.1).state_dict()
    before = snapshot(adam)
    with pytest.raises(ValueError, match="sparse='exact' cannot catch up with L2"):
        adam.load_state_dict(coupled)
    assert_unmoved(adam, before)


# What a file may hold.


OTHERS = ("step", "exp_avg", "exp_avg_sq")  # what torch's files have too
SPOILS: list[Callable[[Tensor], Tensor]] = [
    lambda value: value[:1] if value.dim() else value[None],
    lambda value: torch.cat([value, value, value[:1]]) if value.dim() else value.repeat(2),
    lambda value: value[..., None],
]


@pytest.mark.parametrize("spoil", SPOILS, ids=["short", "long", "deep"])
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(spoil: Callable[[Tensor], Tensor]) -> None:
    """Not at the next step, where memory outside the table would be read."""
    run = run_behind()
    saved = through_file(run.ours.state_dict())
    for name in set(saved["state"][0]) - set(OTHERS):
        wrong = copy.deepcopy(saved)
        wrong["state"][0][name] = spoil(wrong["state"][0][name])
        new = run.replaced()
        before = snapshot(new.ours)
        with pytest.raises(ValueError, match=name):
            new.ours.load_state_dict(wrong)
        assert_unmoved(new.ours, before)


NAN = float("nan")
NO_SCHEDULE = "the loaded schedule is none"
IMPOSSIBLE: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("row_step", lambda rows: rows.fill_(2**31 - 1), "row at step 2147483647, which is to come"),
    ("row_step", lambda rows: rows.fill_(-1000), "row at step 1000, which is to come"),
    ("row_step", lambda rows: rows.double().add_(0.5), "the loaded row_step has fractions of steps"),
    ("schedule", lambda history: history.fill_(NAN), NO_SCHEDULE),
    ("schedule_constants", lambda constants: constants[0].fill_(NAN), NO_SCHEDULE),
    ("schedule_constants", lambda constants: constants[0].fill_(1.0), NO_SCHEDULE),
    ("schedule_constants", lambda constants: constants[1].fill_(2.0), NO_SCHEDULE),
    ("schedule_constants", lambda constants: constants[2].fill_(0.0), NO_SCHEDULE),
    ("schedule_constants", lambda constants: constants[3:].sub_(9.0), NO_SCHEDULE),
    ("schedule_constants", lambda constants: constants[3].fill_(0.5), "the loaded schedule has"),
    ("schedule_constants", lambda constants: constants[4].fill_(float("inf")), "the loaded schedule has"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), IMPOSSIBLE)
def test_a_file_that_cannot_be_true_is_refused(name: str, spoil: Callable[[Tensor], Tensor], message: str) -> None:
    run = run_behind()
    saved = through_file(run.ours.state_dict())
    value = saved["state"][0][name]
    spoiled = spoil(value)
    saved["state"][0][name] = spoiled if spoiled.shape == value.shape else value  # or a part of it, in place
    new = run.replaced()
    before = snapshot(new.ours)
    with pytest.raises(ValueError, match=message):
        new.ours.load_state_dict(saved)
    assert_unmoved(new.ours, before)


def test_names_of_a_rules_state_are_its_own() -> None:
    def rule(param, grad, row_step, schedule, lr):
        return param - lr * grad, row_step + grad, schedule + 0.5

    Named = from_rule(rule, "Named")  # noqa: N806
    weight = torch.ones(3, requires_grad=True)
    optimizer = Named([weight])
    weight.grad = torch.full((3,), 0.25)
    optimizer.step()
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    state = optimizer.state[weight]
    assert (state["row_step"].tolist(), state["schedule"].tolist()) == ([0.25] * 3, [0.5] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_files_of_another_dtype_are_understood(dtype: torch.dtype) -> None:
    """Torch's optimizers cast all that they load, but step, to the parameter's dtype."""
    run = run_behind()
    weights, saved = save(run, "model optimizer")
    for name in set(saved["state"][0]) - set(OTHERS):
        saved["state"][0][name] = saved["state"][0][name].to(dtype)
    new = load(run, (weights, saved), "model optimizer")
    new.train([1], steps=20)
    new.assert_close(catch_ups=2)


@pytest.mark.parametrize("are_behind", [True, False], ids=["rows are behind", "rows are current"])
@pytest.mark.parametrize("step", [34, 34.0, torch.tensor([34.0]), torch.tensor(34)], ids=repr)
def test_steps_of_other_programs_are_understood(step: Any, are_behind: bool) -> None:
    run = run_behind()
    if not are_behind:
        run.ours.settle()
    saved = through_file(run.ours.state_dict())
    saved["state"][0]["step"] = step
    new = load(run, ({"weight": run.layer.weight.detach().clone()}, saved), "model optimizer")
    torch.testing.assert_close(
        new.layer(torch.tensor([1, 5])), run.dense(torch.tensor([1, 5])), rtol=0, atol=ALLOWED * LR
    )
    new.train([1], steps=20)
    new.assert_close(catch_ups=2)


def test_a_long_run_counts_on() -> None:
    """A float32 step count stands still at 2**24."""
    run = Run().train([0, 1], steps=3)
    for optimizer in (run.ours, run.theirs):
        saved = copy.deepcopy(optimizer.state_dict())
        for name in ("row_step", "schedule", "schedule_constants"):
            saved["state"][0].pop(name, None)
        saved["state"][0]["step"] = torch.tensor(2.0**24 - 2)
        optimizer.load_state_dict(saved)
    run.train([0], steps=6)
    run.train([1], steps=2)
    run.assert_close(catch_ups=2)


def test_another_dtype_of_the_model_may_be_loaded() -> None:
    run = Run(dtype=torch.float32).train([0, 1, 2, 3], steps=4).train([0], steps=30)
    for order in ORDERS:
        weights, saved = save(run, order)
        wide = Run(dtype=torch.float64)
        wide.dense, wide.theirs = copy.deepcopy((run.dense, run.theirs))
        wide.layer.load_state_dict(weights)
        wide.ours.load_state_dict(saved)
        torch.testing.assert_close(
            wide.layer(torch.arange(6)), run.layer(torch.arange(6)).double(), rtol=1e-6, atol=1e-6
        )
        run.train([0], steps=2)


def test_betas_of_a_file_and_of_rows_behind_may_differ() -> None:
    """A file saved just after betas were edited: steps that rows have missed were taken with the old ones."""
    run = Run().train([0, 1, 2, 3], steps=4).train([0], steps=10)
    for optimizer in (run.ours, run.theirs):
        optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    saved = through_file(run.ours.state_dict())
    new = run.replaced()
    new.ours.load_state_dict(saved)
    new.layer.weight.data.copy_(run.layer.weight.data)
    new.train([0], steps=10)
    new.assert_close(catch_ups=2)


# What a checkpoint costs.


def history(optimizer: Any) -> int:
    return len(optimizer.state_dict()["state"][0].get("schedule", ()))


def test_the_open_part_of_the_schedule_is_all_that_is_kept() -> None:
    run = Run().train([0, 1], steps=5)
    assert history(run.ours) <= 5
    run.ours.settle()
    assert history(run.ours) == 0
    run.train([0], steps=7)
    assert history(run.ours) <= 7
    run.layer(torch.arange(6))
    run.layer.state_dict()
    assert history(run.ours) == 0
    assert_same_bits(state_of(run.ours), run.ours.state_dict()["state"])


def test_rows_never_touched_have_no_state_after_a_checkpoint() -> None:
    twins = ExactTwins(random_tables((6, 2)), AdamW, **OPTIONS)
    for step in range(20):
        twins.step(([step % 2], torch.ones((1, 2), dtype=torch.float64)))
    twins.edit(lambda optimizer: optimizer.load_state_dict(through_file(optimizer.state_dict())))
    for step in range(20):
        twins.step(([step % 2], torch.ones((1, 2), dtype=torch.float64)))
    assert not twins.ours.state_dict()["state"][0]["exp_avg_sq"][2:].any()
    twins.assert_close()
