"""Programs edit parameters, gradients, state and groups between steps: all of it acts as in torch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, NONZERO_START, Case, Twins, give_grads, leaves, params_of
from edits import EDITS

from descend import Adam, AdamW
from descend.backends.cpu import probe


@pytest.mark.usefixtures("either_probe")
def test_probe_is_the_one_asked_for(request: pytest.FixtureRequest) -> None:
    kind = type(probe.make_probe(leaves(), [None] * 4, [], np.zeros((0, 2), np.int64)))
    is_native = sys.platform == "linux" and "native" in request.node.name
    assert kind is (probe.NativeProbe if is_native else probe.PythonProbe)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6], *NONZERO_START], ids=str)
@pytest.mark.usefixtures("either_probe")
def test_edit_acts_as_in_torch(case: Case, edit: Callable[[Any], None]) -> None:
    twins = Twins(case)
    for seed in range(6):
        twins.step(seed)
        if seed in (1, 3):
            twins.edit(edit)
    twins.assert_equal()


@pytest.mark.usefixtures("either_probe")
def test_parameters_swapped_by_load_state_dict_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    start = copy.deepcopy(models[0].state_dict())
    optimizers = AdamW(models[0].parameters()), torch.optim.AdamW(models[1].parameters())
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.load_state_dict(start)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(5, 3)).square().sum().backward()
                optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


TOGGLES = [
    (CASES[3], dict(amsgrad=True), True),  # torch: KeyError
    (CASES[4], dict(amsgrad=False), False),
    (CASES[3], dict(decoupled_weight_decay=True), False),
    (CASES[0], dict(momentum=0.9), False),
    (CASES[1], dict(momentum=0), False),
    (CASES[2], dict(nesterov=False), False),
    (CASES[2], dict(momentum=0.5), False),
    (CASES[1], dict(dampening=0.0, nesterov=True), False),
    (CASES[13], dict(momentum=0.0), False),
    (CASES[15], dict(momentum=0.0), False),
    (CASES[7], dict(decoupled_weight_decay=True), False),
    (CASES[7], dict(momentum_decay=0.5), False),
    (CASES[17], dict(t0=4, alpha=0.5, lambd=0.01), False),
    (CASES[10], dict(lr_decay=0.5), False),
]


@pytest.mark.parametrize(("case", "change", "torch_fails"), TOGGLES, ids=str)
def test_option_toggled_between_steps_acts_as_in_torch(case: Case, change: dict[str, Any], torch_fails: bool) -> None:
    twins = Twins(case)

    def toggle(optimizer: Any) -> None:
        optimizer.param_groups[0].update(change)
        if torch_fails and not isinstance(optimizer, Adam):  # what torch should do: start the maximum at zero
            for param, state in optimizer.state.items():
                state["max_exp_avg_sq"] = torch.zeros_like(param)

    def toggle_back(optimizer: Any) -> None:
        optimizer.param_groups[0].update({key: case.options.get(key, optimizer.defaults[key]) for key in change})

    for seed in range(9):
        twins.step(seed)
        if seed == 2:
            twins.edit(toggle)
        if seed == 5:
            twins.edit(toggle_back)
    twins.assert_equal()


@pytest.mark.parametrize("change", [dict(momentum=0.9), dict(centered=True)], ids=str)
def test_rmsprop_starts_at_zero_what_is_turned_on_in_mid_run(change: dict[str, Any]) -> None:
    twins = Twins(CASES[12])
    twins.step(0)

    def turn_on(optimizer: Any) -> None:
        optimizer.param_groups[0].update(change)
        if isinstance(optimizer, torch.optim.RMSprop):  # torch: KeyError
            for param, state in optimizer.state.items():
                state["momentum_buffer" if "momentum" in change else "grad_avg"] = torch.zeros_like(param)

    twins.edit(turn_on)
    for seed in range(1, 3):
        twins.step(seed)
    twins.assert_equal()


@pytest.mark.usefixtures("either_probe")
def test_state_shared_by_a_shallow_copy_is_noticed() -> None:
    twins = Twins(CASES[5])
    twins.step(0)
    copies = [copy.copy(optimizer) for optimizer in twins.both]
    for seed in range(3):
        for optimizer in copies:
            give_grads(params_of(optimizer), seed)
            optimizer.step()
        twins.step(10 + seed)
    twins.assert_equal()
